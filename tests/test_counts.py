"""Likelihoods of counts against scipy, mpmath and scvi-tools' formulas written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Backend, each_backend, reduced
from settings import in_turn
from torch import Tensor
from torch.distributions import Poisson

import fastelbo

SHAPE = (4, 3, 10)
REDUCTIONS = ("none", "batchmean", "sum", "mean")
PATTERNS: dict[str, tuple[int, ...] | None] = {"number": None, "0d": (), "gene": (10,), "sample": (4, 1, 1), "element": SHAPE}
FAMILIES = ("poisson", "negative_binomial", "zero_inflated")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def counts(*shape: int) -> Tensor:
    """Half of them 0."""
    return (3 * drawn(*shape, seed=5)).clamp(min=0.0).round()


def call(family: str, mean: Tensor, x: Tensor, theta: Any = None, logits: Any = None, **options: Any) -> Tensor:
    if family == "poisson":
        return fastelbo.poisson_nll(mean, x, **options)
    if family == "negative_binomial":
        return fastelbo.negative_binomial_nll(mean, x, theta=theta, **options)
    return fastelbo.zero_inflated_negative_binomial_nll(mean, x, theta=theta, zi_logits=logits, **options)


# ---- what they are held to: in float64, at values where it cancels little --------------------------------------------------------


def scvi_nb(x: Tensor, mu: Tensor, theta: Tensor, eps: float = 1e-8) -> Tensor:
    """`log_nb_positive` of scvi-tools 1.4.2."""
    log_theta_mu_eps = torch.log(theta + mu + eps)
    return (
        theta * (torch.log(theta + eps) - log_theta_mu_eps)
        + x * (torch.log(mu + eps) - log_theta_mu_eps)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )


def scvi_zinb(x: Tensor, mu: Tensor, theta: Tensor, pi: Tensor, eps: float = 1e-8) -> Tensor:
    """`log_zinb_positive` of scvi-tools 1.4.2."""
    softplus_pi = F.softplus(-pi)
    log_theta_eps, log_theta_mu_eps = torch.log(theta + eps), torch.log(theta + mu + eps)
    pi_theta_log = -pi + theta * (log_theta_eps - log_theta_mu_eps)
    case_zero = F.softplus(pi_theta_log) - softplus_pi
    case_non_zero = (
        -softplus_pi
        + pi_theta_log
        + x * (torch.log(mu + eps) - log_theta_mu_eps)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )
    return torch.where(x < eps, case_zero, case_non_zero)


def terms(family: str, mean: Tensor, x: Tensor, theta: Tensor, logits: Tensor) -> Tensor:
    if family == "poisson":
        return -Poisson(mean, validate_args=False).log_prob(x)
    return -scvi_nb(x, mean, theta, 0.0) if family == "negative_binomial" else -scvi_zinb(x, mean, theta, logits, 1e-30)


def tensors(backend: Backend, dtype: torch.dtype, family: str, theta: tuple[int, ...] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Of mean, theta and logits what the family learns, as leaves, and the same values as float64 leaves on the CPU."""
    found = [drawn(*SHAPE).exp()]
    if family != "poisson" and theta is not None:
        found.append(drawn(*theta, seed=1).exp())
    if family == "zero_inflated":
        found.append(drawn(*SHAPE, seed=2))
    given = [t.to(backend.device, dtype).requires_grad_() for t in found]
    return given, [t.detach().double().cpu().requires_grad_() for t in given]


def arguments(family: str, leaves: list[Tensor], theta: tuple[int, ...] | None) -> tuple[Any, Any, Any]:
    """(mean, theta, logits)"""
    mean, *rest = leaves
    number = torch.tensor(0.7, dtype=torch.float64)
    of_theta = rest.pop(0) if family != "poisson" and theta is not None else number
    return mean, of_theta, rest[0] if rest else torch.zeros(())


def same(got: Tensor, want: Tensor, inputs: list[Tensor], wide: list[Tensor], rtol: float) -> None:
    """Values and gradients, the gradient of what comes out weighed by row."""
    results = []
    for out, leaves in ((got, inputs), (want, wide)):
        rate = torch.linspace(0.5, 2, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, leaves, rate, retain_graph=True)])
    for a, b in zip(*results, strict=True):
        size = b.detach().abs().max().clamp(min=1.0)
        assert a.shape == b.shape
        assert bool(((a.detach().double().cpu() - b.detach()).abs() <= rtol * size).all()), (a, b)


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]


# ---- values and gradients --------------------------------------------------------------------------------------------------------


PATTERNED = [("poisson", "number"), *itertools.product(("negative_binomial", "zero_inflated"), PATTERNS)]


@pytest.mark.parametrize(("case", "dtype", "reduction", "masked"), in_turn(PATTERNED, DTYPES, REDUCTIONS, [False, True]))
@each_backend
def test_values(backend: Backend, case: tuple[str, str], dtype: torch.dtype, reduction: Any, masked: bool) -> None:
    family, pattern = case
    shape = PATTERNS[pattern]
    given, wide = tensors(backend, dtype, family, shape)
    x = counts(*SHAPE)
    weight = drawn(*SHAPE, seed=3).clamp(min=0.0) if masked else None
    mean, theta, logits = arguments(family, given, shape)
    if pattern == "number":
        theta = 0.7
    options = {"reduction": reduction, "weight": None if weight is None else weight.to(backend.device)}
    wide_mean, wide_theta, wide_logits = arguments(family, wide, shape)
    each = terms(family, wide_mean, x, wide_theta, wide_logits)
    for batch_dims, full in ((1, True), (3, True), (1, False)) if reduction == "none" else ((1, True),):
        got = call(family, mean, x.to(mean), theta, logits, **options, batch_dims=batch_dims, full=full, impl=backend.impl)
        want = reduced(each if full else each - torch.lgamma(x + 1), weight, reduction, batch_dims)
        same(got, want, given, wide, tolerance(dtype))


def exact(x: float, mean: float, theta: float, logits: float) -> dict[str, tuple[float, ...]]:
    """Of each family the value, and the slopes in the mean, in theta and in the logits, by mpmath; and the sizes of the slopes."""
    k, m, t, p = (mpmath.mpf(v) for v in (x, mean, theta, logits))
    nll = mpmath.loggamma(t) + mpmath.loggamma(k + 1) - mpmath.loggamma(k + t) + t * mpmath.log1p(m / t) + k * mpmath.log1p(t / m)
    in_mean = t * (m - k) / (m * (m + t))
    in_theta = mpmath.digamma(t) - mpmath.digamma(k + t) + mpmath.log1p(m / t) + (k - m) / (t + m)
    of_poisson = m - k * mpmath.log(m) + mpmath.loggamma(k + 1)
    inflated = 1 / (1 + mpmath.exp(-p))
    counted = 1 / (1 + mpmath.exp(p))
    if k == 0:
        zero = inflated + counted * mpmath.exp(-nll)
        share = counted * mpmath.exp(-nll) / zero
        in_logits = -inflated * counted * -mpmath.expm1(-nll) / zero
        of_zinb = (-mpmath.log1p(mpmath.expm1(-nll) * counted), in_mean * share, in_theta * share, in_logits)
    else:
        of_zinb = (mpmath.log1p(mpmath.exp(p)) + nll, in_mean, in_theta, inflated)
    found = {"poisson": (of_poisson, 1 - k / m), "negative_binomial": (nll, in_mean, in_theta), "zero_inflated": of_zinb}
    return {family: tuple(float(v) for v in values) for family, values in found.items()}


GRID = list(
    itertools.product(
        (0.0, 1.0, 2.0, 10.0, 1234.0, 1e5),
        (1e-6, 1e-3, 1.0, 3.0, 50.0, 1e6),
        (1e-4, 0.3, 2.5, 7.0, 1e4, 1e8),
        (-20.0, -2.0, 0.0, 3.0),
    )
)


@pytest.fixture(scope="module")
def truths() -> dict[torch.dtype, dict[str, Tensor]]:
    found = {}
    with mpmath.workdps(60):
        for dtype in (torch.float32, torch.float64):
            rounded = torch.tensor(GRID, dtype=dtype).double().tolist()
            rows = [exact(*point) for point in rounded]
            found[dtype] = {family: torch.tensor([row[family] for row in rows], dtype=torch.float64) for family in FAMILIES}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_a_few_ulp_everywhere(backend: Backend, family: str, dtype: torch.dtype, truths: Any) -> None:
    """From theta = 1e-4 to 1e8, means from 1e-6 to 1e6, counts to 1e5.

    The slope in theta is a difference, t - log(1 + t) less another positive number: it is held to the size of the former.
    """
    x, mean, theta, logits = (t.contiguous()[:, None].to(backend.device) for t in torch.tensor(GRID, dtype=dtype).unbind(1))
    learned = [mean, theta, logits][: {"poisson": 1, "negative_binomial": 2, "zero_inflated": 3}[family]]
    for t in learned:
        t.requires_grad_()
    nll = call(family, mean, x, theta, logits, impl=backend.impl)
    got = torch.stack([nll.detach(), *(g[:, 0] for g in torch.autograd.grad(nll.sum(), learned))], 1).double().cpu()
    want = truths[dtype][family]
    size = want.abs()
    if len(learned) > 1:
        x, mean, theta = (t.detach().double().cpu()[:, 0] for t in (x, mean, theta))
        t = (x - mean) / (mean + theta)
        size[:, 2] = torch.where(x == 0, size[:, 2], torch.maximum(size[:, 2], (t - torch.log1p(t)).abs()))
    ulp = (got - want).abs() / (torch.finfo(dtype).eps * size.clamp(min=torch.finfo(dtype).tiny))
    # e^-20 and its like are as far off as their exponent is rounded.
    assert float(ulp.max()) <= (4 if family == "poisson" else 8 if family == "negative_binomial" else 30), ulp.max(0)


@each_backend
def test_against_scipy(backend: Backend) -> None:
    stats = pytest.importorskip("scipy.stats")
    x = torch.arange(0.0, 200.0, dtype=torch.float64, device=backend.device)
    for mean, theta in itertools.product((0.1, 3.0, 80.0), (0.05, 1.0, 30.0)):
        got = fastelbo.negative_binomial_nll(torch.full_like(x, mean), x, theta=theta, impl=backend.impl)
        want = -stats.nbinom.logpmf(x.cpu().numpy(), theta, theta / (theta + mean))
        torch.testing.assert_close(got.cpu(), torch.from_numpy(want), rtol=1e-10, atol=1e-10)
    got = fastelbo.poisson_nll(torch.full_like(x, 3.0), x, impl=backend.impl)
    torch.testing.assert_close(got.cpu(), torch.from_numpy(-stats.poisson.logpmf(x.cpu().numpy(), 3.0)), rtol=1e-12, atol=0)


@each_backend
def test_scvi_tools_formulas_with_their_eps(backend: Backend) -> None:
    """Where eps = 1e-8 is nothing, they agree forward and backward."""
    given, wide = tensors(backend, torch.float64, "zero_inflated", (10,))
    x = counts(*SHAPE)
    for family, ours, theirs in (("negative_binomial", given[:2], wide[:2]), ("zero_inflated", given, wide)):
        got = call(family, given[0], x.to(backend.device), given[1], given[2], batch_dims=3, impl=backend.impl)
        formula = scvi_nb(x, *wide[:2]) if family == "negative_binomial" else scvi_zinb(x, *wide)
        same(got, -formula, ours, theirs, 3e-7)


@each_backend
def test_means_of_0(backend: Backend) -> None:
    """A zero that is certain costs nothing and has a slope; any other count is impossible."""
    zero = torch.zeros(1, 1, device=backend.device)
    for family in FAMILIES:
        mean = zero.clone().requires_grad_()
        nll = call(family, mean, zero, zero + 2, zero, impl=backend.impl)
        (slope,) = torch.autograd.grad(nll.sum(), mean)
        assert float(nll) == 0
        assert float(slope) == (0.5 if family == "zero_inflated" else 1.0)
        assert float(call(family, zero, zero + 3, zero + 2, zero, impl=backend.impl)) == math.inf


@each_backend
def test_logits_beyond_e(backend: Backend) -> None:
    """Where sigmoid(logits) or 1 - sigmoid(logits), and the chance of a zero, are below float32's range."""
    mean = torch.full((1, 4), 1000.0, device=backend.device)
    logits = torch.tensor([[-200.0, -90.0, 90.0, 200.0]], device=backend.device)
    got = fastelbo.zero_inflated_negative_binomial_nll(
        mean, torch.zeros_like(mean), theta=150.0, zi_logits=logits, batch_dims=2, impl=backend.impl
    )
    want = torch.tensor([[200.0, 90.0, math.exp(-90), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-38)  # e^-90 is a subnormal number


# ---- how they are called ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_layouts(backend: Backend, family: str, layout: str) -> None:
    size, view = LAYOUTS[layout]
    mean, x, theta, logits = (
        view(t.float().to(backend.device))
        for t in (drawn(*size).exp(), counts(*size), drawn(*size, seed=1).exp(), drawn(*size, seed=2))
    )
    learned = [t.detach().requires_grad_() for t in (mean, theta, logits)[: {"poisson": 1, "negative_binomial": 2}.get(family, 3)]]
    mean, theta, logits = (
        [*learned, theta, logits][0],
        (learned[1] if len(learned) > 1 else theta),
        (learned[2] if len(learned) > 2 else logits),
    )
    got = call(family, mean, x, theta, logits, impl=backend.impl)
    wide = [t.detach().double().cpu().requires_grad_() for t in learned]
    of_theta = wide[1] if len(wide) > 1 else torch.ones((), dtype=torch.float64)
    of_logits = wide[2] if len(wide) > 2 else torch.zeros((), dtype=torch.float64)
    want = reduced(terms(family, wide[0], x.double().cpu(), of_theta, of_logits), None, "none", 1)
    same(got, want, learned, wide, 3e-6)


@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_deterministic_algorithms(backend: Backend, family: str) -> None:
    """torch raises for any operation that may add in another order."""
    given, _ = tensors(backend, torch.float32, family, (10,))
    mean, theta, logits = arguments(family, given, (10,))
    x = counts(*SHAPE).to(mean)
    want = torch.autograd.grad(call(family, mean, x, theta, logits, impl=backend.impl).sum(), given)
    torch.use_deterministic_algorithms(True)
    try:
        got = torch.autograd.grad(call(family, mean, x, theta, logits, impl=backend.impl).sum(), given)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, want)


@each_backend
def test_nan_under_a_mask(backend: Backend) -> None:
    mask = torch.tensor([[True, False, True]], device=backend.device)
    for family, bad in itertools.product(FAMILIES, (math.nan, 0.0, -1.0)):
        given = [torch.tensor([[0.3, bad, 2.0]], device=backend.device, requires_grad=True) for _ in range(3)]
        x = torch.tensor([[1.0, math.nan, 0.0]], device=backend.device)
        nll = call(family, given[0], x, given[1], given[2], weight=mask, impl=backend.impl)
        learned = given[: {"poisson": 1, "negative_binomial": 2}.get(family, 3)]
        assert bool(nll.isfinite().all())
        for slope in torch.autograd.grad(nll.sum(), learned, retain_graph=True):
            assert bool(slope.isfinite().all())
            assert float(slope[0, 1]) == 0


@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_samples_in_front_and_bytes(backend: Backend, family: str) -> None:
    mean, theta, logits = drawn(3, 4, 6).exp().float(), drawn(6).exp().float(), drawn(6, seed=1).float()
    mean, theta, logits = (t.to(backend.device) for t in (mean, theta, logits))
    x = counts(4, 6).to(backend.device)
    got = call(family, mean, x.to(torch.uint8), theta, logits, batch_dims=2, impl=backend.impl)
    want = call(family, mean, x.float().expand(mean.shape), theta, logits, batch_dims=2, impl=backend.impl)
    assert torch.equal(got, want)
    each = terms(family, mean.double().cpu(), x.cpu().expand(mean.shape), theta.double().cpu(), logits.double().cpu())
    torch.testing.assert_close(got.double().cpu(), each.sum(-1), rtol=1e-5, atol=1e-5)


@each_backend
def test_shared_logits_and_mixed_dtypes(backend: Backend) -> None:
    x = counts(4, 6).to(backend.device)
    for shape, dtype in itertools.product([(), (6,), (4, 1)], (torch.float32, torch.float64, torch.bfloat16)):
        mean, logits = (
            drawn(4, 6).exp().float().to(backend.device),
            drawn(*shape, seed=1).to(backend.device, dtype).requires_grad_(),
        )
        nll = fastelbo.zero_inflated_negative_binomial_nll(mean, x.float(), theta=2.0, zi_logits=logits, impl=backend.impl)
        assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (slope,) = torch.autograd.grad(nll.sum(), logits)
        wide = logits.detach().double().cpu().requires_grad_()
        want = -scvi_zinb(x.cpu(), mean.double().cpu(), torch.tensor(2.0, dtype=torch.float64), wide, 1e-30)
        (slope_wanted,) = torch.autograd.grad(want.sum(), wide)
        assert slope.shape == logits.shape
        assert slope.dtype == dtype
        torch.testing.assert_close(slope.double().cpu(), slope_wanted, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def calls(impl: str) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    x = counts(3, 5)
    mean, theta, logits = drawn(3, 5).exp(), drawn(5).exp(), drawn(3, 5, seed=1)
    return {
        "poisson": (lambda m: call("poisson", m, x.to(m.device), impl=impl), [mean]),
        "negative_binomial": (lambda m, t: call("negative_binomial", m, x.to(m.device), t, impl=impl), [mean, theta]),
        "zero_inflated": (lambda m, t, p: call("zero_inflated", m, x.to(m.device), t, p, impl=impl), [mean, theta, logits]),
    }


@pytest.mark.parametrize("name", FAMILIES)
@each_backend
def test_gradcheck(backend: Backend, name: str) -> None:
    function, inputs = calls(backend.impl)[name]
    inputs = [t.to(backend.device).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend.truncates)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=backend.truncates)


@pytest.mark.parametrize("name", FAMILIES)
def test_transforms(name: str) -> None:
    function, inputs = calls("torch")[name]
    slopes = torch.func.grad(lambda *t: function(*t).sum())(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    found = torch.autograd.grad(function(*leaves).sum(), leaves)
    torch.testing.assert_close(slopes, found[0])
    each = torch.func.vmap(function)(*[torch.stack([t, 2 * t]) for t in inputs])
    torch.testing.assert_close(each, torch.stack([function(*inputs), function(*[2 * t for t in inputs])]))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).sum(), leaves), found)


@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_empty(backend: Backend, family: str) -> None:
    for shape in ((0, 5), (4, 0)):
        mean = torch.zeros(shape, device=backend.device, requires_grad=True)
        theta = torch.ones(5 if shape[1] else 1, device=backend.device, requires_grad=True)
        nll = call(family, mean, torch.zeros(shape, device=backend.device), theta, torch.zeros_like(mean), impl=backend.impl)
        nll.sum().backward()
        assert nll.shape == shape[:1]
        assert not nll.any()


@each_backend
def test_verify_knows_them(backend: Backend) -> None:
    x, theta, logits = (t.float().to(backend.device) for t in (counts(4, 7), drawn(7).exp(), drawn(4, 7, seed=2)))
    given = [drawn(4, 7).exp().float().to(backend.device), theta, logits]
    mean, theta, logits = (t.requires_grad_() for t in given)
    mask = (drawn(4, 7, seed=3) > -0.5).to(backend.device)
    with fastelbo.verify() as report:
        for reduction, full in itertools.product(("none", "mean"), (True, False)):
            for family in FAMILIES:
                options: dict[str, Any] = {"reduction": reduction, "full": full, "impl": backend.impl}
                call(family, mean, x, theta, logits, weight=mask if full else None, **options).sum().backward()
    assert (report.calls, report.backwards, report.mismatches) == (12, 12, 0)


@pytest.mark.parametrize("family", FAMILIES)
@each_backend
def test_verify_over_the_whole_range(backend: Backend, family: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x, mean, theta, logits = (t.contiguous()[:, None].to(backend.device) for t in torch.tensor(GRID, dtype=dtype).unbind(1))
        mean, theta, logits = (t.requires_grad_() for t in (mean, theta, logits))
        with fastelbo.verify() as report:
            call(family, mean, x, theta, logits, impl=backend.impl).sum().backward()
        assert (report.checked, report.backwards, report.mismatches) == (1, 1, 0)


def test_errors() -> None:
    x = torch.zeros(4, 6)
    mean = torch.ones(4, 6)
    zinb: Any = fastelbo.zero_inflated_negative_binomial_nll
    with pytest.raises(ValueError, match="x requires grad, but counts are constants here: detach it"):
        fastelbo.poisson_nll(mean, x.clone().requires_grad_())
    with pytest.raises(TypeError, match=r"theta must be a number or a torch\.Tensor, got NoneType"):
        fastelbo.negative_binomial_nll(mean, x, theta=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="theta must be positive, got 0"):
        fastelbo.negative_binomial_nll(mean, x, theta=0)
    with pytest.raises(ValueError, match=r"theta has shape \(5,\), which does not broadcast to the shape \(4, 6\) of mean"):
        fastelbo.negative_binomial_nll(mean, x, theta=torch.ones(5))
    with pytest.raises(ValueError, match=r"zi_logits has shape \(5,\), which does not broadcast to the shape \(4, 6\) of mean"):
        zinb(mean, x, theta=1.0, zi_logits=torch.ones(5))
    with pytest.raises(TypeError, match=r"zi_logits must be a torch\.Tensor, got float"):
        zinb(mean, x, theta=1.0, zi_logits=0.5)
    with pytest.raises(TypeError, match=r"rate must be a torch\.Tensor, got int"):
        fastelbo.poisson_nll(3, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x must be float16, .* got torch\.int64"):
        fastelbo.poisson_nll(mean, x.long())
    with pytest.raises(ValueError, match=r"x has shape \(4, 5\), but mean has shape \(4, 6\)"):
        fastelbo.negative_binomial_nll(mean, x[:, :5], theta=1.0)
