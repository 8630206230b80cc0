"""The discretized logistic likelihood against mpmath, and against the difference of sigmoids that defines it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from cases import LAYOUTS, Backend, each_backend, reduced
from settings import in_turn
from test_likelihoods import PATTERNS, REDUCTIONS, SHAPE, drawn, leaves, same, tolerance
from torch import Tensor

import fastelbo

# Bins of centres that every dtype holds.
BINS = 17
F64 = torch.float64


def centres(*shape: int, seed: int = 1, bins: int = BINS) -> Tensor:
    picked = torch.randint(0, bins, shape, generator=torch.Generator().manual_seed(seed))
    return picked.double() * 2 / (bins - 1) - 1


def defined(recon: Tensor, x: Tensor, logscale: Tensor | float, bins: int = BINS, low: float = -1.0, high: float = 1.0) -> Tensor:
    """-log of the mass of the bin around x, for bins that are narrow or hold recon no deeper than a few scales."""
    half, scale = (high - low) / (2 * (bins - 1)), torch.as_tensor(logscale, dtype=recon.dtype).exp()
    # On the left of the distribution's centre, where no probability is near 1.
    side = torch.where(x > recon, -1.0, 1.0)
    edges = [torch.where(x > high - half, 1e9, x + half - recon), torch.where(x < low + half, -1e9, x - half - recon)]
    above, below = (torch.sigmoid(side * edge / scale) for edge in edges)
    return -torch.log(side * (above - below))


def exact(recon: float, x: float, logscale: float) -> tuple[list[float], list[float]]:
    """The term of one of 256 bins and its slopes in recon and logscale; and how far from each a right result may be, in eps.

    A result may be off by a few roundings of each summand, and by what the rounding of an edge of the bin, in units of the scale,
    makes of it.
    """
    with mpmath.workdps(700):
        # The logistic distribution is symmetric. Left of its centre no probability is near 1, and differences are exact.
        mirror = -1 if x > recon else 1
        half, scale = mpmath.mpf(1) / 255, mpmath.exp(logscale)
        first, last = (x < -1 + half, x > 1 - half)[::mirror]
        d = mirror * (mpmath.mpf(x) - recon)
        a, b = (d + half) / scale, (d - half) / scale
        cdf = lambda t: 1 / (1 + mpmath.exp(-t))  # noqa: E731
        density = lambda t: cdf(t) * cdf(-t)  # noqa: E731
        at_a, at_b = (mpmath.mpf(0) if last else density(a)), (mpmath.mpf(0) if first else density(b))
        mass = (1 if last else cdf(a)) - (0 if first else cdf(b))
        in_recon, in_scale = mirror * (at_a - at_b) / mass / scale, (a * at_a - b * at_b) / mass
        p, q = (0 if last else cdf(-a)), (0 if first else cdf(b))
        # The roundings of a and b.
        off_a, off_b = abs(a) + half / scale, abs(b) + half / scale
        w = a - b
        of_width = 0 if first or last else w / mpmath.expm1(w)
        of_slopes = p * (1 - p) * off_a + q * (1 - q) * off_b
        bounds = [
            abs(mpmath.log(mass)) + p * off_a + q * off_b,
            (p + q + of_slopes) / scale,
            (abs(a) * p + abs(b) * q + of_width)
            + p * off_a
            + q * off_b
            + abs(a) * p * (1 - p) * off_a
            + abs(b) * q * (1 - q) * off_b,
        ]
        return [float(v) for v in (-mpmath.log(mass), in_recon, in_scale)], [float(v) for v in bounds]


@pytest.mark.parametrize("given", ["tensor", "number"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logscale", [-12.0, -9.0, -7.0, -4.0, -1.0, 3.0, 80.0])
@each_backend
def test_against_mpmath(backend: Backend, logscale: float, dtype: torch.dtype, given: str) -> None:
    """In the first, the last and inner bins; with recon in the bin, on its edge, just beside it, and far away."""
    scale, half, points = math.exp(logscale), 1 / 255, []
    for k in (0, 1, 100, 128, 254, 255):
        x = k / 127.5 - 1
        near = [x, x + 0.3 * half, x - 0.9 * half, x + half, x - half, x + half + scale, x - half - 3 * scale, x + 7 * scale]
        points += [(x, recon) for recon in (*near, x + 0.1, x - 0.5, 1.7, -2.0)]
    x, recon = (torch.tensor(t, dtype=dtype, device=backend.device) for t in zip(*points, strict=True))
    recon.requires_grad_()
    spread = torch.full_like(x, logscale).requires_grad_() if given == "tensor" else logscale
    nll = fastelbo.discretized_logistic_nll(recon, x, logscale=spread, impl=backend.impl)
    got = [nll, *torch.autograd.grad(nll.sum(), [recon, spread] if given == "tensor" else [recon])]
    truths = [exact(r, t, logscale) for r, t in zip(recon.tolist(), x.tolist(), strict=True)]
    info = torch.finfo(dtype)
    for i, result in enumerate(got):
        want, bound = (torch.tensor([truth[part][i] for truth in truths], dtype=F64) for part in (0, 1))
        error = (result.detach().double().cpu() - want).abs()
        assert bool((error <= 4 * info.eps * bound + info.tiny / scale).all()), (i, (error / (info.eps * bound)).max())
    assert bool((nll >= 0).all())


@each_backend
def test_a_scale_far_below_a_bin(backend: Backend) -> None:
    """Outside of the bin the term is the distance in units of the scale, and inside it is 0."""
    x = torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0], device=backend.device)
    d = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.01, 0.5, -0.5], device=backend.device)
    recon, logscale = (x + d).requires_grad_(), torch.full_like(x, -80.0).requires_grad_()
    nll = fastelbo.discretized_logistic_nll(recon, x, logscale=logscale, bins=BINS, impl=backend.impl)
    distance = torch.tensor([0.4375, 0.0, 0.4375, 0.4375, 0.0, 0.0, 0.4375], dtype=F64) * math.exp(80)
    in_recon = torch.tensor([1.0, 0.0, 1.0, -1.0, 0.0, 0.0, -1.0], dtype=F64) * math.exp(80)
    slopes = torch.autograd.grad(nll.sum(), [recon, logscale])
    for got, want in zip((nll, *slopes), (distance, in_recon, -distance), strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bins", "low", "high"), [(256, -1.0, 1.0), (2, 0.0, 1.0), (32, 0.0, 1.0), (1024, -3.0, 5.0)])
@each_backend
def test_the_probabilities_of_all_bins_sum_to_1(backend: Backend, bins: int, low: float, high: float) -> None:
    x = torch.arange(bins, dtype=F64).mul_((high - low) / (bins - 1)).add_(low).to(backend.device)
    for logscale in (-12.0, -7.0, -3.0, 0.0, 3.0):
        recon = torch.tensor([low - 1, low, 0.1234, 0.5 * (low + high), high, high + 0.5], dtype=F64, device=backend.device)
        nll = fastelbo.discretized_logistic_nll(
            recon[:, None].expand(-1, bins), x.expand(6, bins), logscale=logscale, bins=bins, low=low, high=high, batch_dims=2,
            impl=backend.impl,
        )  # fmt: skip
        # The centres of the bins are rounded numbers, and so is where one ends and the next one begins.
        rounding = torch.finfo(F64).eps * max(abs(low), abs(high)) / math.exp(logscale)
        assert bool(((-nll).exp().sum(1) - 1).abs().max() < 1e-12 + rounding)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("pattern", "dtype", "reduction", "masked"), in_turn(list(PATTERNS), DTYPES, REDUCTIONS, [False, True]))
@each_backend
def test_reductions(backend: Backend, pattern: str, dtype: torch.dtype, reduction: Any, masked: bool) -> None:
    shape = PATTERNS[pattern]
    spreads = [] if shape is None else [0.5 * drawn(*shape, seed=2) - 1]
    given, wide = leaves(backend, dtype, drawn(*SHAPE), *spreads)
    x = centres(*SHAPE)
    mask = drawn(*SHAPE, seed=3) > -0.5 if masked else None
    for batch_dims in (1, 3) if reduction == "none" else (1,):
        got = fastelbo.discretized_logistic_nll(
            given[0], x.to(backend.device, dtype), logscale=-0.7 if shape is None else given[1], bins=BINS,
            weight=None if mask is None else mask.to(backend.device), reduction=reduction, batch_dims=batch_dims, impl=backend.impl,
        )  # fmt: skip
        want = reduced(defined(wide[0], x, -0.7 if shape is None else wide[1]), mask, reduction, batch_dims)
        same(got, want, given, wide, tolerance(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
def test_layouts(backend: Backend, layout: str) -> None:
    size, view = LAYOUTS[layout]
    recon, x, logscale = (
        view(t.float().to(backend.device)) for t in (drawn(*size), centres(*size), 0.3 * drawn(*size, seed=2) - 1)
    )
    got = fastelbo.discretized_logistic_nll(recon, x, logscale=logscale, bins=BINS, impl=backend.impl)
    want = reduced(defined(recon.double(), x.double(), logscale.double()), None, "none", 1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [(5000,), (40, 1), (40, 5000)])
def test_runs_of_large_tensors_add_up(pattern: tuple[int, ...]) -> None:
    backend = Backend("torch", torch.device("cpu"))
    given, wide = leaves(backend, torch.float32, drawn(40, 5000), 0.3 * drawn(*pattern, seed=2) - 1)
    x = centres(40, 5000)
    got = fastelbo.discretized_logistic_nll(given[0], x.float(), logscale=given[1], bins=BINS, reduction="batchmean", impl="torch")
    same(got, reduced(defined(wide[0], x, wide[1]), None, "batchmean", 1), given, wide, 3e-6)


@each_backend
def test_samples_in_front_and_images(backend: Backend) -> None:
    recon = drawn(3, 4, 60).float().to(backend.device)
    image = torch.randint(0, 256, (4, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image[:, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    options: dict[str, Any] = {"logscale": -2.0, "batch_dims": 2, "impl": backend.impl}
    got = fastelbo.discretized_logistic_nll(recon, image.to(backend.device), x_scale=1 / 127.5, x_shift=-1, **options)
    want = defined(recon.double().cpu(), (image.double() / 127.5 - 1).expand(recon.shape), -2.0, bins=256).sum(-1)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=0)


@each_backend
def test_nan(backend: Backend) -> None:
    """A NaN under a mask is absent; elsewhere it stays in each kind of bin."""
    recon = torch.tensor([[0.3, math.nan, -2.0]], device=backend.device, requires_grad=True)
    x = torch.tensor([[1.0, math.inf, 0.0]], device=backend.device)
    mask = torch.tensor([[True, False, True]], device=backend.device)
    logscale = torch.tensor([[0.0, math.nan, 0.0]], device=backend.device, requires_grad=True)
    nll = fastelbo.discretized_logistic_nll(recon, x, logscale=logscale, weight=mask, impl=backend.impl)
    torch.testing.assert_close(
        nll.detach().double().cpu()[0], defined(*(t.double().cpu()[0, ::2] for t in (recon, x)), 0.0, 256).sum()
    )
    for slope in torch.autograd.grad(nll.sum(), [recon, logscale]):
        assert bool(slope.isfinite().all())
        assert float(slope[0, 1]) == 0
    x = torch.tensor([-1.0, 0.0, 1.0], device=backend.device)
    for number in (0.0, torch.zeros(3, device=backend.device)):
        assert bool(
            fastelbo.discretized_logistic_nll(torch.full_like(x, math.nan), x, logscale=number, impl=backend.impl).isnan().all()
        )


def calls(impl: str) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    recon, x = drawn(3, 5), centres(3, 5)
    x[0, :2] = torch.tensor([-1.0, 1.0])
    options: dict[str, Any] = {"bins": BINS, "impl": impl}
    return {
        "number": (lambda r: fastelbo.discretized_logistic_nll(r, x.to(r.device), logscale=-1.5, **options), [recon]),
        "tensor": (
            lambda r, s: fastelbo.discretized_logistic_nll(r, x.to(r.device), logscale=s, **options), [recon, drawn(5) - 2]
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
    own = [t.clone().requires_grad_() for t in inputs]
    gradients = torch.autograd.grad(call(*own).sum(), own)
    torch.testing.assert_close(slopes, gradients[0])
    each = torch.func.vmap(call)(*[torch.stack([t, 2 * t]) for t in inputs])
    torch.testing.assert_close(each, torch.stack([call(*inputs), call(*[2 * t for t in inputs])]))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*own)
    torch.testing.assert_close(compiled, call(*inputs))
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), own), gradients)


def test_numbers_may_change_in_a_trace() -> None:
    compiled = torch.compile(fastelbo.discretized_logistic_nll, fullgraph=True, backend="aot_eager", dynamic=True)
    recon = drawn(3, 5)
    for bins, high, logscale in ((17, 1.0, -1.0), (9, 3.0, -2.0), (5, 0.0, 0.5)):
        x = torch.linspace(-1, high, bins, dtype=F64)[torch.arange(15).view(3, 5) % bins]
        options = {"bins": bins, "high": high}
        want = defined(recon, x, logscale, bins, -1.0, high)
        torch.testing.assert_close(compiled(recon, x, logscale=logscale, batch_dims=2, **options), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_backend
def test_verify_knows_it(backend: Backend, dtype: torch.dtype) -> None:
    given, _ = leaves(backend, dtype, drawn(6, 50), 3 * drawn(50) - 4)
    image = torch.randint(0, 256, (6, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(backend.device)
    with fastelbo.verify() as report:
        for logscale in (given[1], -6.0):
            for x, numbers in ((image, (1 / 127.5, -1)), (centres(6, 50, bins=256).to(backend.device, dtype), (None, None))):
                fastelbo.discretized_logistic_nll(
                    given[0], x, logscale=logscale, x_scale=numbers[0], x_shift=numbers[1], impl=backend.impl
                ).sum().backward()
    assert (report.calls, report.backwards, report.mismatches) == (4, 4, 0)


@each_backend
def test_empty(backend: Backend) -> None:
    for shape in ((0, 5), (4, 0)):
        recon = torch.zeros(shape, device=backend.device, requires_grad=True)
        nll = fastelbo.discretized_logistic_nll(recon, torch.zeros(shape, device=backend.device), impl=backend.impl)
        nll.sum().backward()
        assert nll.shape == shape[:1]
        assert not nll.any()


def test_errors() -> None:
    recon, call = torch.zeros(4, 6), fastelbo.discretized_logistic_nll
    with pytest.raises(ValueError, match=r"x requires grad, but the bin around it is a constant here: detach it"):
        call(recon, torch.zeros(4, 6, requires_grad=True))
    with pytest.raises(ValueError, match=r"bins must be at least 2, got 1"):
        call(recon, recon, bins=1)
    for bins, kind in ((2.0, "float"), (True, "bool"), (torch.tensor(3), "Tensor")):
        with pytest.raises(TypeError, match=rf"bins must be an int, got {kind}"):
            call(recon, recon, bins=bins)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"low and high must be finite with low < high, got low=1 and high=-1"):
        call(recon, recon, low=1, high=-1)
    for high in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"low and high must be finite with low < high, got low=-1.0 and high="):
            call(recon, recon, high=high)
    with pytest.raises(TypeError, match=r"low must be a number, got NoneType"):
        call(recon, recon, low=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logscale has shape \(5,\), which does not broadcast to the shape \(4, 6\) of recon"):
        call(recon, recon, logscale=torch.zeros(5))
    with pytest.raises(TypeError, match=r"x_scale is not given, which an x of torch\.uint8 needs"):
        call(recon, torch.zeros(4, 6, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"likelihood must be one of 'gaussian', 'laplace', 'bernoulli', got"):
        fastelbo.elbo_loss(recon, recon, recon, recon, likelihood="discretized_logistic")  # type: ignore[arg-type]
