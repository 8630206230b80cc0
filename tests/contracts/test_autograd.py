"""Derivatives of every function against finite differences, under a retained graph, and of each input alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPS, TORCH, Backend, broadcast_shape, draw, each_backend, leaves, make, run
from torch.autograd import gradcheck, gradgradcheck

import fastelbo

# ---- finite differences ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", list(FUNCTIONS))
@each_backend
def test_gradcheck(backend: Backend, name: str) -> None:
    fn, names = FUNCTIONS[name]
    # The fast mode checks a random projection of the Jacobian: two evaluations where the interpreter makes each one slow.
    assert gradcheck(lambda *t: fn(backend.impl, *t), arguments(names, backend.device), fast_mode=backend.truncates)


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("backend", [TORCH])
def test_gradgradcheck(backend: Backend, name: str) -> None:
    """Double backward goes through the reference whatever the backend, so that one backend will do."""
    fn, names = FUNCTIONS[name]
    assert gradgradcheck(lambda *t: fn(backend.impl, *t), arguments(names, backend.device))


@pytest.mark.parametrize("name", list(FUNCTIONS))
@each_backend
def test_create_graph_gives_the_same_first_derivative(backend: Backend, name: str) -> None:
    fn, names = FUNCTIONS[name]
    inputs = [t.detach().float().requires_grad_() for t in arguments(names, backend.device)]

    def grads(create_graph: bool) -> Any:
        out = fn(backend.impl, *inputs)
        total = sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()
        return torch.autograd.grad(3 * total, inputs, create_graph=create_graph)

    for name_, plain, graphed in zip(names, grads(False), grads(True), strict=True):
        torch.testing.assert_close(graphed, plain, rtol=1e-5, atol=1e-5, msg=lambda m, n=name_: f"{n}: {m}")


# ---- more than one backward, and each input alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_retain_graph_for_every_op(backend: Backend, name: str) -> None:
    """A second backward of the same graph with three times the upstream gives three times the gradient."""
    op = OPS[name]
    v = leaves(make(op.names, "columns", seed=5), device=backend.device)
    outs = op.fast(v, backend.impl)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    asked = [t for t in v.values() if t.requires_grad]
    first = torch.autograd.grad(outs, asked, [torch.ones_like(o) for o in outs], retain_graph=True)
    second = torch.autograd.grad(outs, asked, [torch.full_like(o, 3.0) for o in outs])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, 3 * a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_each_input_alone(backend: Backend, name: str) -> None:
    op = OPS[name]
    values = make(op.names, "columns", seed=5)
    every = run(lambda t: op.fast(t, backend.impl), leaves(values, device=backend.device))[1]
    for n in every:
        alone = run(lambda t: op.fast(t, backend.impl), leaves(values, [n], backend.device))[1]
        assert set(alone) == {n}
        torch.testing.assert_close(alone[n], every[n], rtol=1e-6, atol=1e-6)
