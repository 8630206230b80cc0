"""Likelihoods other than the Gaussian against torch.distributions and torch's own losses, alone and in the ELBO."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Backend, each_backend, reduced, slow_kl
from torch import Tensor
from torch.distributions import Laplace
from torch.testing._internal.common_methods_invocations import op_db

import fastelbo

SHAPE = (4, 3, 10)
REDUCTIONS = ("none", "batchmean", "sum", "mean")
PATTERNS = {"number": None, "0d": (), "channel": (3, 1), "sample": (4, 1, 1), "element": SHAPE}
FAMILIES = ("laplace", "bernoulli")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def laplace_terms(recon: Tensor, x: Tensor, logscale: Tensor) -> Tensor:
    return -Laplace(recon, logscale.exp(), validate_args=False).log_prob(x)


def bernoulli_terms(logits: Tensor, x: Tensor) -> Tensor:
    # F.softplus is the identity from 20 on unless told otherwise.
    return x * F.softplus(-logits, threshold=1e9) + (1 - x) * F.softplus(logits, threshold=1e9)


def same(got: Any, want: Any, inputs: list[Tensor], wide: list[Tensor], rtol: float) -> None:
    """Values and gradients, the gradient of what comes out weighed by row."""
    results = []
    for out, leaves in ((got, inputs), (want, wide)):
        outs = out if isinstance(out, tuple) else (out,)
        rate = [torch.linspace(0.5, 2, t.numel(), dtype=torch.float64, device=t.device).view(t.shape).to(t.dtype) for t in outs]
        results.append([*outs, *torch.autograd.grad(outs, leaves, rate)])
    for a, b in zip(*results, strict=True):
        size = b.detach().abs().max().clamp(min=1.0)
        assert a.shape == b.shape
        assert bool(((a.detach().double().cpu() - b.detach()).abs() <= rtol * size).all()), (a, b)


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]


def leaves(backend: Backend, dtype: torch.dtype, *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs in a dtype, and the same values in float64 on the CPU."""
    given = [t.to(backend.device, dtype).requires_grad_() for t in tensors]
    return given, [t.detach().double().cpu().requires_grad_() for t in given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@each_backend
def test_laplace(backend: Backend, pattern: str, masked: bool, reduction: Any, dtype: torch.dtype) -> None:
    shape = PATTERNS[pattern]
    given, wide = leaves(backend, dtype, drawn(*SHAPE), drawn(*SHAPE, seed=1), *([] if shape is None else [drawn(*shape, seed=2)]))
    mask = drawn(*SHAPE, seed=3) > -0.5 if masked else None
    for batch_dims in (1, 3) if reduction == "none" else (1,):
        got = fastelbo.laplace_nll(
            *given[:2], logscale=given[2] if shape is not None else 0.3, weight=None if mask is None else mask.to(backend.device),
            reduction=reduction, batch_dims=batch_dims, impl=backend.impl,
        )  # fmt: skip
        spread = wide[2] if shape is not None else torch.tensor(0.3, dtype=torch.float64)
        want = reduced(laplace_terms(wide[0], wide[1], spread), mask, reduction, batch_dims)
        same(got, want, given, wide, tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@each_backend
def test_bernoulli(backend: Backend, masked: bool, reduction: Any, dtype: torch.dtype) -> None:
    given, wide = leaves(backend, dtype, 5 * drawn(*SHAPE), torch.sigmoid(4 * drawn(*SHAPE, seed=1)).round(decimals=1))
    weight = drawn(*SHAPE, seed=3).clamp(min=0.0) if masked else None
    for batch_dims in (1, 3) if reduction == "none" else (1,):
        got = fastelbo.bernoulli_nll(
            *given, weight=None if weight is None else weight.to(backend.device), reduction=reduction, batch_dims=batch_dims,
            impl=backend.impl,
        )  # fmt: skip
        want = reduced(bernoulli_terms(*wide), weight, reduction, batch_dims)
        same(got, want, given, wide, tolerance(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_layouts(backend: Backend, family: str, layout: str) -> None:
    size, view = LAYOUTS[layout]
    recon, x = (view(drawn(*size, seed=s).float().to(backend.device)) for s in (0, 1))
    call = fastelbo.laplace_nll if family == "laplace" else fastelbo.bernoulli_nll
    terms = (
        laplace_terms(recon.double(), x.double(), torch.zeros(()))
        if family == "laplace"
        else bernoulli_terms(recon.double(), x.double())
    )
    got = call(recon, x, impl=backend.impl)
    torch.testing.assert_close(got.double(), reduced(terms, None, "none", 1), rtol=1e-5, atol=1e-5)


@each_backend
def test_bernoulli_keeps_the_small_part(backend: Backend) -> None:
    """Where 1 + e^-|m| rounds to 1, and beside targets near 0 and 1."""
    logits = torch.tensor([-100.0, -88.0, -30.0, -17.0, -1e-3, 0.0, 1e-3, 17.0, 30.0, 88.0, 100.0]).to(backend.device)
    for x in (0.0, 1.0, 1e-6, 1 - 2**-20):
        target = torch.full_like(logits, x)
        got = fastelbo.bernoulli_nll(logits, target, batch_dims=1, impl=backend.impl)
        want = bernoulli_terms(logits.double(), target.double())
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-38)
        assert bool((got >= 0).all())


@each_backend
def test_a_laplace_scale_beyond_float32(backend: Backend) -> None:
    recon, logscale = torch.full((2, 3), 1e-30), torch.full((2, 3), -90.0)
    given, wide = leaves(backend, torch.float32, recon, torch.zeros(2, 3), logscale)
    got = fastelbo.laplace_nll(*given[:2], logscale=given[2], full=False, impl=backend.impl)
    want = ((wide[0] - wide[1]).abs() * torch.exp(-wide[2]) + wide[2]).sum(1)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-6, atol=0)


@each_backend
def test_nan_under_a_mask(backend: Backend) -> None:
    mask = torch.tensor([[True, False, True]], device=backend.device)
    for call in (fastelbo.laplace_nll, fastelbo.bernoulli_nll):
        recon = torch.tensor([[0.3, math.nan, -2.0]], device=backend.device, requires_grad=True)
        nll = call(recon, torch.tensor([[1.0, math.inf, 0.0]], device=backend.device), weight=mask, impl=backend.impl)
        (slope,) = torch.autograd.grad(nll.sum(), recon)
        assert bool(nll.isfinite().all())
        assert bool(slope.isfinite().all())
        assert float(slope[0, 1]) == 0


@each_backend
def test_the_median_has_no_slope(backend: Backend) -> None:
    recon = torch.zeros(2, 3, device=backend.device, requires_grad=True)
    (slope,) = torch.autograd.grad(fastelbo.laplace_nll(recon, torch.zeros_like(recon).detach(), impl=backend.impl).sum(), recon)
    assert not slope.any()


def calls(impl: str) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    recon, x, mu, logvar, spread = drawn(3, 5), torch.sigmoid(drawn(3, 5, seed=1)), drawn(3, 2), drawn(3, 2, seed=1), drawn(5)
    laplace: dict[str, Any] = {"likelihood": "laplace", "impl": impl}
    return {
        "laplace_nll": (lambda r, x, s: fastelbo.laplace_nll(r, x, logscale=s, impl=impl), [recon, x, spread]),
        "bernoulli_nll": (lambda r, x: fastelbo.bernoulli_nll(r, x, impl=impl), [recon, x]),
        "elbo laplace": (
            lambda r, x, m, v, s: fastelbo.elbo_loss(r, x, m, v, recon_logscale=s, **laplace), [recon, x, mu, logvar, spread]
        ),
        "elbo bernoulli": (
            lambda r, x, m, v: fastelbo.elbo_loss(r, x, m, v, likelihood="bernoulli", impl=impl), [recon, x, mu, logvar]
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(calls("torch")))
@each_backend
def test_gradcheck(backend: Backend, name: str) -> None:
    call, inputs = calls(backend.impl)[name]
    inputs = [t.to(backend.device).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=backend.truncates)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=backend.truncates)


@pytest.mark.parametrize("name", list(calls("torch")))
def test_transforms(name: str) -> None:
    call, inputs = calls("torch")[name]
    slopes = torch.func.grad(lambda *t: call(*t).sum())(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    torch.testing.assert_close(slopes, torch.autograd.grad(call(*leaves).sum(), leaves)[0])
    each = torch.func.vmap(call)(*[torch.stack([t, 2 * t]) for t in inputs])
    torch.testing.assert_close(each, torch.stack([call(*inputs), call(*[2 * t for t in inputs])]))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), call(*inputs))


def test_a_slope_at_0_in_a_transform() -> None:
    """Expressions of |m| have none there, or half of one."""
    slope = torch.func.grad(lambda m: fastelbo.bernoulli_nll(m, torch.zeros(1)).sum())(torch.zeros(1))
    assert float(slope) == 0.5


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_in_the_elbo(backend: Backend, family: Any, reduction: Any) -> None:
    given, wide = leaves(
        backend, torch.float32, drawn(4, 7), torch.sigmoid(drawn(4, 7, seed=1)), drawn(4, 3), drawn(4, 3, seed=1), drawn(7)
    )
    spread = {"recon_logscale": given[4]} if family == "laplace" else {}

    def truth() -> tuple[Tensor, Tensor]:
        terms = laplace_terms(wide[0], wide[1], wide[4]) if family == "laplace" else bernoulli_terms(*wide[:2])
        return reduced(terms, None, reduction, 1), slow_kl(*wide[2:4], reduction=reduction)

    asked = 5 if family == "laplace" else 4
    options: dict[str, Any] = {"likelihood": family, "reduction": reduction, "impl": backend.impl, **spread}
    nll, kl = truth()
    same(fastelbo.elbo_loss(*given[:4], beta=0.5, **options), nll + 0.5 * kl, given[:asked], wide[:asked], 3e-6)
    same(fastelbo.elbo_terms(*given[:4], **options), truth(), given[:asked], wide[:asked], 3e-6)


@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_sgvb_averages_over_samples(backend: Backend, family: Any) -> None:
    x, mu, logvar, matrix = (
        t.float().to(backend.device) for t in (torch.sigmoid(drawn(4, 6)), drawn(4, 3), drawn(4, 3, seed=1), drawn(3, 6))
    )
    eps = drawn(5, 4, 3).float().to(backend.device)
    spread = drawn(20, 6).float().to(backend.device)
    decoder: Any = (lambda z: (z @ matrix, spread)) if family == "laplace" else (lambda z: z @ matrix)
    loss = fastelbo.sgvb_loss(decoder, x, mu, logvar, num_samples=5, eps=eps, likelihood=family, impl=backend.impl)
    recon = (mu + torch.exp(0.5 * logvar) * eps) @ matrix
    terms = laplace_terms(recon, x, spread.view(5, 4, 6)) if family == "laplace" else bernoulli_terms(recon, x.expand(recon.shape))
    want = terms.sum(-1).mean() + slow_kl(mu, logvar, reduction="batchmean")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_samples_in_front_and_images(backend: Backend, family: Any) -> None:
    recon = drawn(3, 4, 6).float().to(backend.device)
    image = torch.randint(0, 256, (4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(backend.device)
    call: Any = fastelbo.laplace_nll if family == "laplace" else fastelbo.bernoulli_nll
    got = call(recon, image, x_scale=1 / 255, batch_dims=2, impl=backend.impl)
    want = call(recon, (image.float() * (1 / 255)).expand(recon.shape), batch_dims=2, impl=backend.impl)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_empty(backend: Backend, family: Any) -> None:
    call: Any = fastelbo.laplace_nll if family == "laplace" else fastelbo.bernoulli_nll
    for shape in ((0, 5), (4, 0)):
        recon = torch.zeros(shape, device=backend.device, requires_grad=True)
        nll = call(recon, torch.zeros(shape, device=backend.device), impl=backend.impl)
        nll.sum().backward()
        assert nll.shape == shape[:1]
        assert not nll.any()


@each_backend
def test_verify_knows_them(backend: Backend) -> None:
    given, _ = leaves(
        backend, torch.float32, drawn(4, 7), torch.sigmoid(drawn(4, 7, seed=1)), drawn(4, 3), drawn(4, 3, seed=1), drawn(7)
    )
    with fastelbo.verify() as report:
        for reduction in ("none", "mean"):
            fastelbo.laplace_nll(*given[:2], logscale=given[4], reduction=reduction, impl=backend.impl).sum().backward()
            fastelbo.bernoulli_nll(*given[:2], reduction=reduction, impl=backend.impl).sum().backward()
            options: dict[str, Any] = {"reduction": reduction, "impl": backend.impl}
            fastelbo.elbo_loss(*given[:4], likelihood="bernoulli", **options).sum().backward()
            fastelbo.elbo_loss(*given[:4], likelihood="laplace", recon_logscale=given[4], **options).sum().backward()
    assert (report.calls, report.backwards, report.mismatches) == (8, 8, 0)


(BCE,) = (op for op in op_db if op.name == "nn.functional.binary_cross_entropy_with_logits")


def test_bernoulli_on_torchs_own_samples() -> None:
    seen = 0
    for sample in BCE.sample_inputs("cpu", torch.float64, requires_grad=False):
        options = dict(sample.kwargs)
        if options.pop("pos_weight", None) is not None:
            continue  # another distribution
        weight, reduction = options.pop("weight", None), options.pop("reduction", "mean")
        assert not options
        logits, x = sample.input, sample.args[0]
        want = F.binary_cross_entropy_with_logits(logits, x, weight=weight, reduction=reduction)
        nll = fastelbo.bernoulli_nll(logits, x, weight=weight, batch_dims=logits.ndim)
        torch.testing.assert_close({"none": nll, "sum": nll.sum(), "mean": nll.mean()}[reduction], want)
        seen += 1
    assert seen >= 3


def test_errors() -> None:
    x = torch.zeros(4, 6)
    mu = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"likelihood must be one of 'gaussian', 'laplace', 'bernoulli', got 'l1'"):
        fastelbo.elbo_loss(x, x, mu, mu, likelihood="l1")  # type: ignore[arg-type]
    for family, name in (("laplace", "recon_logvar"), ("gaussian", "recon_logscale"), ("bernoulli", "recon_logscale")):
        with pytest.raises(ValueError, match=f"{name} is given, but likelihood='{family}' takes"):
            fastelbo.elbo_terms(x, x, mu, mu, likelihood=family, **{name: 0.0})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{name} is given, but likelihood='{family}' takes"):
            fastelbo.sgvb_loss(lambda z: x, x, mu, mu, likelihood=family, **{name: 0.0})  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"decoder\(z\) must be the logits for likelihood='bernoulli', got a tuple of 2"):
        fastelbo.sgvb_loss(lambda z: (x, x), x, mu, mu, likelihood="bernoulli")
    with pytest.raises(ValueError, match=r"logscale has shape \(5,\), which does not broadcast to the shape \(4, 6\) of recon"):
        fastelbo.laplace_nll(x, x, logscale=torch.zeros(5))
    with pytest.raises(TypeError, match=r"logits must be float16, .* got torch\.int64"):
        fastelbo.bernoulli_nll(torch.zeros(4, 6, dtype=torch.int64), x)


@pytest.mark.parametrize(("logit", "x", "want"), [(math.inf, 0.0, math.inf), (math.inf, 0.5, math.inf), (-math.inf, 1.0, math.inf)])
@each_backend
def test_an_infinite_logit_that_is_wrong(backend: Backend, logit: float, x: float, want: float) -> None:
    logits, target = (torch.full((1, 1), t, device=backend.device) for t in (logit, x))
    assert float(fastelbo.bernoulli_nll(logits, target, impl=backend.impl)) == want
