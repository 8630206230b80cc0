"""Settings in which an operation is tried, its comparison with the oracle in one of them, and the comparison of gradients."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import FORMS, OPS, PATTERNS, Backend, Op, Values, accumulated, assert_close, broadcast_shape, check, draw, make
from torch import Tensor

import fastelbo


def variances(op: Op) -> list[str]:
    """The likelihood's variance among the inputs, which may broadcast; the posterior's spread may not."""
    return [n for n in op.names if n == "recon_logvar" or (n in FORMS and "mu" not in op.names)]


def some_weight(op: Op, rng: random.Random) -> str | None:
    if "weight" not in op.options or rng.random() < 0.6:
        return None
    return f"{rng.choice(['mask', 'weight'])}:{rng.choice(PATTERNS)}"


def options_of(op: Op, rank: int, rng: random.Random) -> dict[str, Any]:
    """Some setting of the options that the operation takes."""
    out: dict[str, Any] = {}
    if "reduction" in op.options:
        out["reduction"] = rng.choice(["none", "batchmean", "sum", "mean"])
    if "batch_dims" in op.options:
        out["batch_dims"] = rng.choice([0, 1, 1, min(2, rank), rank])
    if "logvar_clamp" in op.options and rng.random() < 0.4:
        out["logvar_clamp"] = (-1.0, 0.75)
    return out


def compare(name: str, backend: Backend, layout: str, dtype: str, options: dict[str, Any], *, weight: str | None = None,
            patterns: dict[str, str] | None = None, seed: int = 0, **more: Any) -> None:  # fmt: skip
    """One operation against its oracle; `weight` is "mask:PATTERN" or "weight:PATTERN"."""
    op = OPS[name]
    tensors = make(op.names, layout, dtype, seed, **(patterns or {}))
    kind = None
    if weight is not None:
        kind, pattern = weight.split(":")
        tensors |= make([kind], layout, "float32", seed + 1, **{kind: pattern})

    def fast(v: dict[str, torch.Tensor]) -> Any:
        return op.fast(v, backend.impl, **options, **({} if kind is None else {"weight": v[kind]}))

    def slow(v: dict[str, torch.Tensor]) -> Any:
        return op.slow(v, **options, **({} if kind is None else {"weight": v[kind]}))

    acc = accumulated(*(tensors[n] for n in op.names if n != "eps"))
    z = [tensors["mu"].dtype] if op.returns_z else []
    outputs = len(z) if op.options == () else {"elbo_terms": 2}.get(name, 1 + len(z))
    check(fast, slow, tensors, backend, out_dtypes=z + [acc] * (outputs - len(z)), **more)


def assert_grads(grads: Values, want: Values, what: str = "", **bars: Any) -> None:
    assert set(grads) == set(want)
    for name, g in want.items():
        assert_close(grads[name], g, f"{what} gradient of {name}", scale=float(g.abs().max()) + 1, **bars)


# ---- every function of tensors alone ---------------------------------------------------------------------------------------------


def functions() -> dict[str, tuple[Callable[..., Any], list[str]]]:
    """Every function and form of variance as a function of its tensors, with what to draw for them."""
    two, latent = ["recon", "x"], ["mu", "logvar"]
    out: dict[str, Any] = {
        "reparameterize": (lambda i, m, s: fastelbo.reparameterize(m, s, seed=1, impl=i), latent),
        "reparameterize-samples": (lambda i, m, s: fastelbo.reparameterize(m, s, 2, seed=1, impl=i), latent),
        "reparameterize_kl": (lambda i, m, s: fastelbo.reparameterize_kl(m, s, seed=1, reduction="batchmean", impl=i), latent),
        "reparameterize_kl-clamp": (
            lambda i, m, s: fastelbo.reparameterize_kl(m, s, seed=1, logvar_clamp=(-0.4, 0.3), impl=i),
            latent,
        ),
        "gaussian_kl": (lambda i, m, s: fastelbo.gaussian_kl(m, s, impl=i), latent),
        "gaussian_kl-prior": (
            lambda i, m, s, p, q: fastelbo.gaussian_kl(m, s, p, q, reduction="mean", impl=i),
            [*latent, "mu:dim", "logvar:0d"],
        ),
        "gaussian_nll": (lambda i, r, x: fastelbo.gaussian_nll(r, x, impl=i), two),
        "DiagonalGaussian": (
            lambda i, m: fastelbo.DiagonalGaussian.from_moments(m, impl=i).rsample_kl(seed=2),
            ["moments"],
        ),
        "elbo_terms": (
            lambda i, r, x, v, m, s: fastelbo.elbo_terms(r, x, m, s, recon_logvar=v, reduction="none", impl=i),
            [*two, "logvar:dim", *latent],
        ),
        "elbo_loss": (
            lambda i, r, x, v, m, s, p: fastelbo.elbo_loss(r, x, m, s, recon_logvar=v, prior_mu=p, beta=0.7, impl=i),
            [*two, "logvar:0d", *latent, "mu:dim"],
        ),
        "elbo_loss-none": (
            lambda i, r, x, m, s: fastelbo.elbo_loss(r, x, m, s, recon_logvar=-0.3, beta=0.7, reduction="none", impl=i),
            [*two, *latent],
        ),
        "sgvb_loss": (
            lambda i, x, m, s: fastelbo.sgvb_loss(torch.tanh, x, m, s, num_samples=2, seed=3, recon_logvar=0.2, impl=i),
            ["x", *latent],
        ),
    }  # fmt: skip
    for form, pattern in itertools.product(("logvar", "std", "var"), ("0d", "channel", "dim", "sample", "element", "float")):
        weight = torch.tensor([[1.0, 0.0, 2.0]])
        if pattern == "float":
            out[f"gaussian_nll-{form}-float"] = (
                lambda i, r, x, form=form: fastelbo.gaussian_nll(r, x, **{form: 0.6}, reduction="mean", impl=i),
                two,
            )
        else:
            out[f"gaussian_nll-{form}-{pattern}"] = (
                lambda i, r, x, v, form=form, weight=weight: fastelbo.gaussian_nll(
                    r, x, **{form: v}, weight=weight.to(r.device), impl=i
                ),
                [*two, f"{form}:{pattern}"],
            )
    return out


FUNCTIONS = functions()


def arguments(names: list[str], device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    out = []
    for name in names:
        name, _, pattern = name.partition(":")
        shape = (2, 6) if name == "moments" else broadcast_shape(pattern or "element", (2, 3))
        out.append((draw(name, shape, generator) * (1.0 if name in ("std", "var") else 0.7)).to(device).requires_grad_())
    return out


def in_turn(first: Sequence[Any], second: Sequence[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every pair of the first two, with the values of the others going round at speeds of their own."""
    pairs = enumerate(itertools.product(first, second))
    return [(*pair, *(t[(i // k + i // len(t)) % len(t)] for k, t in enumerate(others, 1))) for i, pair in pairs]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def same(call: Callable[..., Any], written: Callable[..., Any], inputs: list[Tensor], backend: Backend, rtol: float = 3e-6) -> None:
    """Values and gradients of `call` in float32, and of `written` in float64, on the same numbers."""
    found = []
    for function, dtype in ((call, torch.float32), (written, torch.float64)):
        leaves = [t.detach().float().to(backend.device, dtype).requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        ups = [drawn(*o.shape, seed=9).to(o) if o.ndim else torch.ones_like(o) for o in outputs]
        slopes = torch.autograd.grad(outputs, leaves, ups, allow_unused=True)
        found.append([*outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, slopes, strict=True))])
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * float(want.detach().abs().max()))
