"""`elbo_loss` and `elbo_terms`: dtypes, terms, beta and extremes. tests/test_elbo_autograd.py has the uses of their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CPU,
    Backend,
    Values,
    assert_close,
    check,
    draw,
    each_backend,
    leaves,
    make,
    run,
    slow_kl,
    slow_loss,
    slow_nll,
    slow_terms,
)
from settings import assert_grads

import fastelbo
from fastelbo.eager import walk

NAMES = ("recon", "x", "recon_logvar", "mu", "logvar", "prior_mu", "prior_logvar")


def elbo(v: Values, impl: str, **options: Any) -> Any:
    return fastelbo.elbo_loss(*positional(v), **keywords(v), impl=impl, **options)


def slow_elbo(v: Values, **options: Any) -> torch.Tensor:
    return slow_loss(*positional(v), **keywords(v), **options)


def positional(v: Values) -> list[torch.Tensor]:
    return [v[n] for n in ("recon", "x", "mu", "logvar")]


def keywords(v: Values) -> Values:
    return {n: v[n] for n in ("recon_logvar", "prior_mu", "prior_logvar") if n in v}


def elbo_inputs(dtype: torch.dtype = torch.float32, names: tuple[str, ...] = NAMES, **patterns: str) -> Values:
    return {n: t.to(dtype) for n, t in make(names, "chunk1", seed=11, **patterns).items()}


def expected(v: Values, upstream: Any = 1.0, wanted: Any = None, **options: Any) -> Values:
    """The true gradients of elbo_loss."""
    truth = leaves(v, wanted, dtype=torch.float64)
    return run(lambda t: slow_elbo(t, **options), truth, [torch.as_tensor(upstream, dtype=torch.float64).cpu()])[1]


# ---- dtypes ----------------------------------------------------------------------------------------------------------------------


@each_backend
def test_one_float64_input_makes_the_loss_float64(backend: Backend) -> None:
    """Whichever it is, the whole loss is computed and returned in float64."""
    names = ("recon", "x", "recon_logvar", "mu", "logvar", "prior_mu", "prior_logvar")
    base = make(names, "contiguous")
    failed = []
    for double, reduction in itertools.product(names, ["none", "batchmean"]):
        tensors = {**base, double: base[double].double()}

        def terms(v: dict[str, torch.Tensor], fn: Any, reduction: str = reduction, **o: Any) -> Any:
            args = (v[n] for n in ("recon", "x", "mu", "logvar"))
            return fn(*args, **{n: v[n] for n in ("recon_logvar", "prior_mu", "prior_logvar")}, reduction=reduction, **o)

        for fast, slow, count in ((fastelbo.elbo_terms, slow_terms, 2), (fastelbo.elbo_loss, slow_loss, 1)):
            try:
                check(
                    lambda v, f=fast: terms(v, f, impl=backend.impl),
                    lambda v, f=slow: terms(v, f),
                    tensors,
                    backend,
                    out_dtypes=[torch.float64] * count,
                )
            except AssertionError as error:
                failed.append(f"{fast.__name__} {reduction} with a double {double}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    "dtypes", list(itertools.permutations([torch.float32, torch.bfloat16, torch.float16], 2)) + [(torch.float32, torch.float64)]
)
@pytest.mark.parametrize("block", [16, 1 << 17])
@each_backend
def test_mixed_dtypes_round_once(backend: Backend, block: int, dtypes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """x's gradient is recon's with the other sign, yet has its own dtype: neither may pass through the other's rounding."""
    if backend.impl != "torch" and block == 16:
        pytest.skip("blocks are the plain-PyTorch backend's")
    monkeypatch.setattr(walk, "RUN", block)
    g = torch.Generator().manual_seed(0)
    tensors = {n: draw(n, (5, 11), g).to(d) for n, d in zip(("recon", "x"), dtypes, strict=True)}
    tensors |= {n: draw(n, (5, 11), g).to(d) for n, d in zip(("mu", "logvar"), reversed(dtypes), strict=True)}
    check(
        lambda v: fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], impl=backend.impl),
        lambda v: slow_loss(v["recon"], v["x"], v["mu"], v["logvar"]),
        tensors,
        backend,
    )


@each_backend
def test_float64_beta_keeps_a_float32_loss(backend: Backend) -> None:
    v = leaves(make(["recon", "x", "mu", "logvar"], "contiguous"), device=backend.device)
    truth = leaves(make(["recon", "x", "mu", "logvar"], "contiguous"), dtype=torch.float64)
    for reduction in ("none", "batchmean"):
        for beta in (
            torch.tensor(0.3, dtype=torch.float64),
            torch.tensor(0.3),
            torch.tensor(2),
            torch.tensor(0.3, dtype=torch.float16),
        ):
            loss = fastelbo.elbo_loss(*v.values(), beta=beta.to(backend.device), reduction=reduction, impl=backend.impl)
            assert_close(loss, slow_loss(*truth.values(), beta=float(beta), reduction=reduction), f"{beta!r}", dtype=torch.float32)
            loss.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_a_beta_on_the_cpu_beside_gpu_tensors(reduction: str) -> None:
    """Torch lets a 0-d CPU tensor into any operation: here it works as well, or is refused by name."""
    v = leaves(make(["recon", "x", "mu", "logvar"], "contiguous"), device=torch.device("cuda"))
    try:
        loss = fastelbo.elbo_loss(*v.values(), beta=torch.tensor(0.3), reduction=reduction)
    except ValueError as error:
        assert "beta" in str(error)  # noqa: PT017 (no error is right too)
    else:
        torch.testing.assert_close(loss, fastelbo.elbo_loss(*v.values(), beta=0.3, reduction=reduction))


@each_backend
def test_loss_scaling_does_not_underflow(backend: Backend) -> None:
    """GradScaler multiplies by 65536 in backward: a float16 gradient rounded before that would be 0."""
    shape = (64, 40) if backend.impl == "triton" and backend.device == CPU else (64, 3000)
    g = torch.Generator().manual_seed(2)
    values = {n: (1e-3 * draw(n, shape, g)).half() for n in ("recon", "x")} | {
        n: draw(n, (64, 4), g).half() for n in ("mu", "logvar")
    }
    for reduction in ("mean", "batchmean", "sum", "none"):
        v, truth = leaves(values, device=backend.device), leaves(values, dtype=torch.float64)
        scale = 65536.0 if reduction in ("mean", "batchmean") else 2.0
        loss = fastelbo.elbo_loss(*v.values(), reduction=reduction, impl=backend.impl)
        (scale * loss).sum().backward()
        want = run(lambda t: scale * slow_loss(*t.values(), reduction=reduction), truth)[1]  # noqa: B023
        for n in v:
            assert_close(v[n].grad, want[n], f"{reduction} {n}", dtype=torch.float16)
            assert bool((v[n].grad != 0).any())


@each_backend
def test_amp_grad_scaler_and_autocast(backend: Backend) -> None:
    """Autocast changes what the decoder returns, not what the loss does with it."""
    values = elbo_inputs(names=("recon", "x", "mu", "logvar"))
    v = leaves(values, device=backend.device)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        loss = elbo(v, backend.impl)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, list(v.values()))
    assert_grads(dict(zip(v, grads, strict=True)), expected(values))


# ---- values and terms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", [(3,), (3, 7), (3, 4, 5, 2), (3, 0)])
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@each_backend
def test_latents_of_another_rank(backend: Backend, reduction: str, latent: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    tensors = {n: draw(n, (3, 2, 9), g).float() for n in ("recon", "x")} | {n: draw(n, latent, g).float() for n in ("mu", "logvar")}
    check(
        lambda v: fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], beta=2.5, reduction=reduction, impl=backend.impl),
        lambda v: slow_loss(v["recon"], v["x"], v["mu"], v["logvar"], beta=2.5, reduction=reduction),
        tensors,
        backend,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_backend
def test_extreme_logvar(backend: Backend, dtype: torch.dtype) -> None:
    """Where the true value is a float32 it comes out; where it overflows it is inf and not NaN."""
    extremes = [80.0, -80.0, 88.0, -85.0, 1e4, -1e4, 0.0]
    for recon_logvar, logvar in zip(extremes, reversed(extremes), strict=True):
        tensors = {
            "recon": torch.tensor([[1.0, -2.0]], dtype=dtype),
            "x": torch.tensor([[0.5, 1.0]], dtype=dtype),
            "recon_logvar": torch.full((1, 2), recon_logvar, dtype=dtype),
            "mu": torch.tensor([[0.25, -3.0]], dtype=dtype),
            "logvar": torch.full((1, 2), logvar, dtype=dtype),
        }
        truth = leaves(tensors, dtype=torch.float64)
        mine = leaves(tensors, device=backend.device)
        args = ("recon", "x", "mu", "logvar")
        outs, grads = run(
            lambda v, args=args: fastelbo.elbo_terms(*(v[n] for n in args), recon_logvar=v["recon_logvar"], impl=backend.impl), mine
        )
        nll = slow_nll(truth["recon"], truth["x"], logvar=truth["recon_logvar"], reduction="batchmean")
        kl = slow_kl(truth["mu"], truth["logvar"], reduction="batchmean")
        want = torch.autograd.grad([nll, kl], list(truth.values()))
        for what, got, true in [("nll", outs[0], nll), ("kl", outs[1], kl), *zip(truth, grads.values(), want, strict=True)]:
            assert_close(got, true.detach().to(dtype).double(), f"{what} at {recon_logvar}, {logvar}")


@each_backend
def test_terms_are_differentiable_apart(backend: Backend) -> None:
    values = elbo_inputs()
    for reduction in ("batchmean", "none"):
        v = leaves(values, device=backend.device)
        nll, kl = fastelbo.elbo_terms(*positional(v), **keywords(v), reduction=reduction, impl=backend.impl)
        of_nll = torch.autograd.grad(nll.sum(), list(v.values()), retain_graph=True, allow_unused=True)
        of_kl = torch.autograd.grad(kl.sum(), list(v.values()), allow_unused=True)
        for n, a, b in zip(v, of_nll, of_kl, strict=True):
            mine, other = (a, b) if n in ("recon", "x", "recon_logvar") else (b, a)
            assert other is None, f"the other term has a gradient for {n}"
            want = expected(values, torch.ones(nll.shape), beta=1.0, reduction=reduction)[n]
            assert_close(mine, want, n, scale=float(want.abs().max()) + 1)


@each_backend
def test_returned_terms_are_detached_and_right(backend: Backend) -> None:
    values = elbo_inputs()
    for reduction in ("batchmean", "none", "mean", "sum"):
        v = leaves(values, device=backend.device)
        loss, nll, kl = elbo(v, backend.impl, beta=0.25, reduction=reduction, return_terms=True)
        assert loss.requires_grad
        assert not nll.requires_grad
        assert not kl.requires_grad
        torch.testing.assert_close(loss.detach(), nll + 0.25 * kl, rtol=1e-6, atol=0)
        want = fastelbo.elbo_terms(*positional(v), **keywords(v), reduction=reduction, impl=backend.impl)
        torch.testing.assert_close((nll, kl), tuple(w.detach() for w in want), rtol=1e-6, atol=0)


@each_backend
def test_the_same_tensor_twice(backend: Backend) -> None:
    """recon is x; mu is the prior's mu; everything is one tensor: each place adds its own gradient."""
    t = make(["recon", "x", "mu", "logvar"], "contiguous", seed=6)
    aliases: list[Callable[[Values], tuple[Any, dict[str, Any]]]] = [
        lambda v: ((v["recon"], v["recon"], v["mu"], v["logvar"]), {}),
        lambda v: ((v["recon"], v["x"], v["mu"], v["mu"]), {}),
        lambda v: ((v["recon"], v["x"], v["mu"], v["logvar"]), {"prior_mu": v["mu"], "prior_logvar": v["logvar"]}),
        lambda v: ((v["recon"], v["x"], v["recon"], v["x"]), {"recon_logvar": v["x"], "prior_mu": v["x"]}),
        lambda v: ((v["mu"],) * 4, {"recon_logvar": v["mu"], "prior_mu": v["mu"], "prior_logvar": v["mu"]}),
    ]
    for reduction, arrange in itertools.product(("batchmean", "none"), aliases):
        v, truth = leaves(t, device=backend.device), leaves(t, dtype=torch.float64)
        args, options = arrange(v)
        want_args, want_options = arrange(truth)
        loss = fastelbo.elbo_loss(*args, **options, reduction=reduction, impl=backend.impl)
        want = slow_loss(*want_args, **want_options, reduction=reduction)
        assert_close(loss, want, "loss", scale=float(want.detach().abs().max()) + t["mu"].numel())
        for create_graph in (False, True):
            got = torch.autograd.grad(loss.sum(), list(v.values()), allow_unused=True, retain_graph=True, create_graph=create_graph)
            true = torch.autograd.grad(want.sum(), list(truth.values()), allow_unused=True, retain_graph=True)
            for n, g, w in zip(v, got, true, strict=True):
                assert (g is None) == (w is None), n
                if w is not None:
                    assert_close(g, w, n, scale=float(w.abs().max()) + 10)
