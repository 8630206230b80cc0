"""Accuracy: a few ulp where the exact value is known, and nowhere worse than the formula that users write in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CPU, Backend, Values, each_backend, slow_kl, slow_loss, slow_nll, slow_sample

import fastelbo
from fastelbo import reference

LOG_2PI = math.log(2 * math.pi)


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Errors in units of float32's last place at the exact value."""
    exact = exact.double()
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-126))) - 23)
    return (actual.detach().cpu().double() - exact).abs() / spacing


# ---- KL near the prior and far from it -------------------------------------------------------------------------------------------


def exact_kl_of_logvar(v: torch.Tensor) -> torch.Tensor:
    """(expm1(v) - v) / 2 in float64, by its series where expm1(v) - v would cancel: 20 terms are exact to 1e-16 for |v| < 1/2."""
    v = v.double()
    series = torch.zeros_like(v)
    for k in range(20, 1, -1):
        series = (series + 1 / math.factorial(k)) * (v if k > 2 else 1)
    return 0.5 * torch.where(v.abs() < 0.5, series * v * v, torch.expm1(v) - v)


def logvar_grid(count: int) -> torch.Tensor:
    """-80 to 85, every binade of tiny values, and where the forms meet."""
    tiny = torch.logspace(-30, 0, count // 4, dtype=torch.float64)
    seams = torch.cat([torch.linspace(s - 0.01, s + 0.01, 64, dtype=torch.float64) for s in (-1.0, -0.5, 0.5, 1.0)])
    grid = torch.cat([torch.linspace(-80, 85, count, dtype=torch.float64), tiny, -tiny, seams, torch.tensor([0.0, 85.0, -80.0])])
    return grid.float()


def test_the_exact_kl_is_exact() -> None:
    mpmath = pytest.importorskip("mpmath")
    v = torch.cat([logvar_grid(40), torch.tensor([0.4999, 0.5, -0.4999, -0.5])])
    with mpmath.workdps(60):
        for x, got in zip(v.tolist(), exact_kl_of_logvar(v).tolist(), strict=True):
            want = float((mpmath.expm1(mpmath.mpf(x)) - mpmath.mpf(x)) / 2)
            assert got == pytest.approx(want, rel=1e-15, abs=1e-300), x


@each_backend
def test_kl_within_4_ulp_and_never_negative(backend: Backend) -> None:
    v = logvar_grid(4000 if backend.impl == "triton" and backend.device == CPU else 400_000)
    zero = torch.zeros_like(v).to(backend.device)
    kl = fastelbo.gaussian_kl(zero, v.to(backend.device), batch_dims=1, impl=backend.impl)
    exact = exact_kl_of_logvar(v)
    # Below float32's smallest normal number the value may be flushed to 0.
    error = torch.where(exact < 2.0**-126, 0.0, ulps(kl, exact))
    worst = int(error.argmax())
    assert float(error[worst]) <= 4, f"{error[worst]:.2f} ulp at logvar = {v[worst]:.9g}: {kl[worst]:.9g} for {exact[worst]:.9g}"
    assert float(kl.min()) >= 0.0
    assert float(kl[v.to(backend.device) == 0].abs().max()) == 0.0
    assert not bool(kl.isnan().any())


@each_backend
def test_kl_with_a_prior_is_never_negative(backend: Backend) -> None:
    """Near a learned prior, where the eager formula goes below 0 for a third of the values."""
    n = 2000 if backend.impl == "triton" and backend.device == CPU else 100_000
    prior = torch.randn(n)
    logvar = prior + 1e-4 * torch.randn(n)
    mu = torch.randn(n)
    args = [t.to(backend.device) for t in (mu, logvar, mu, prior)]
    kl = fastelbo.gaussian_kl(*args, batch_dims=1, impl=backend.impl)
    exact = exact_kl_of_logvar(logvar.double() - prior.double())
    assert float(kl.min()) >= 0.0
    assert float(ulps(kl, exact).max()) <= 6  # the difference of the log-variances is rounded too


@each_backend
def test_gradient_of_the_kl_within_4_ulp(backend: Backend) -> None:
    v = logvar_grid(2000 if backend.impl == "triton" and backend.device == CPU else 100_000)
    logvar, mu = (t.to(backend.device, copy=True).requires_grad_() for t in (v, v.flip(0)))
    fastelbo.gaussian_kl(mu, logvar, reduction="sum", impl=backend.impl).backward()
    assert float(torch.where(v.abs() < 2.0**-120, 0.0, ulps(logvar.grad, 0.5 * torch.expm1(v.double()))).max()) <= 4
    assert torch.equal(mu.grad, mu.detach())


# ---- numbers computed by hand, with fifty digits ---------------------------------------------------------------------------------

POINTS = [
    (0.0, 0.0, 0.0, 0.0, 0.0),
    (1.5, -0.25, 0.75, -1.25, 0.5),
    (-3.0, 2.0, -4.0, 0.1, -6.0),
    (1e-4, 1e-5, 1e-3, -1e-4, 1e-6),
    (25.0, -25.0, 8.0, 5.0, -20.0),
    (0.1, 0.1000001, -12.0, 1e3, 3.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_backend
def test_values_by_mpmath(backend: Backend, dtype: torch.dtype) -> None:
    mpmath = pytest.importorskip("mpmath")
    names = ("recon", "x", "recon_logvar", "mu", "logvar")
    points = torch.tensor(POINTS, dtype=dtype)
    v = {n: points[:, i : i + 1].to(backend.device) for i, n in enumerate(names)}
    nll, kl = fastelbo.elbo_terms(
        v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["recon_logvar"], reduction="none", impl=backend.impl
    )
    loss = fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["recon_logvar"], beta=0.5, impl=backend.impl)
    z = fastelbo.reparameterize(v["mu"], v["logvar"], eps=v["recon"], impl=backend.impl)
    rtol = 1e-6 if dtype == torch.float32 else 1e-14
    total = mpmath.mpf(0)
    with mpmath.workdps(50):
        for i, row in enumerate(points.tolist()):
            recon, x, s, mu, lv = (mpmath.mpf(t) for t in row)
            square = (x - recon) ** 2 * mpmath.exp(-s)
            want_nll = (mpmath.log(2 * mpmath.pi) + s + square) / 2
            want_kl = (mu**2 + mpmath.expm1(lv) - lv) / 2
            want_z = mu + mpmath.exp(lv / 2) * recon
            total += want_nll + want_kl / 2
            assert float(nll[i]) == pytest.approx(float(want_nll), rel=rtol, abs=rtol * float(1 + abs(s) + square))
            assert float(kl[i]) == pytest.approx(float(want_kl), rel=rtol)
            assert float(z[i]) == pytest.approx(float(want_z), rel=rtol, abs=rtol * abs(float(mu)))
        assert float(loss) == pytest.approx(float(total / len(POINTS)), rel=rtol)


def test_the_reference_is_the_papers() -> None:
    """The oracle itself, against torch.distributions, and equation 10 against its parts."""
    g = torch.Generator().manual_seed(0)
    x, recon, s = (torch.randn(5, 3, 7, generator=g, dtype=torch.float64) for _ in range(3))
    mu, logvar, prior_mu, prior_logvar = (torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(4))
    normal = torch.distributions.Normal
    torch.testing.assert_close(reference.gaussian_log_prob(x, recon, s), normal(recon, (s / 2).exp()).log_prob(x))
    q, p = normal(mu, (logvar / 2).exp()), normal(prior_mu, (prior_logvar / 2).exp())
    torch.testing.assert_close(
        reference.gaussian_kl(mu, logvar, prior_mu, prior_logvar), torch.distributions.kl_divergence(q, p), rtol=1e-10, atol=1e-10
    )
    paper = 0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)  # -KL to N(0, I), appendix B
    likelihood = normal(recon, (s / 2).exp()).log_prob(x[0]).sum(-1).mean(0)
    torch.testing.assert_close(reference.sgvb(x[0], recon, s, mu, logvar), paper + likelihood)
    torch.testing.assert_close(reference.reparameterize(mu, logvar, prior_mu), mu + q.stddev * prior_mu)
    losses = [fastelbo.elbo_loss(r, x[0], mu, logvar, recon_logvar=v, reduction="none") for r, v in zip(recon, s, strict=True)]
    torch.testing.assert_close(-torch.stack(losses).mean(0), paper + likelihood)


# ---- no worse than what users write ----------------------------------------------------------------------------------------------


def eager_nll(recon: torch.Tensor, x: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    return (0.5 * (LOG_2PI + logvar + (x - recon) ** 2 / logvar.exp())).flatten(1).sum(1)


def eager_kl(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).flatten(1).sum(1)


def eager_kl_prior(mu: torch.Tensor, logvar: torch.Tensor, prior_mu: torch.Tensor, prior_logvar: torch.Tensor) -> torch.Tensor:
    terms = prior_logvar - logvar - 1 + (logvar.exp() + (mu - prior_mu) ** 2) / prior_logvar.exp()
    return 0.5 * terms.flatten(1).sum(1)


def eager_sample(mu: torch.Tensor, logvar: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return mu + torch.exp(0.5 * logvar) * eps


Fn = Callable[..., Any]
# name: (inputs that get gradients, constants, fastelbo, the user's formula, the oracle)
RIVALS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Fn, Fn, Fn]] = {
    "nll": (
        ("recon", "x"), (),
        lambda v, i: fastelbo.gaussian_nll(v["recon"], v["x"], impl=i),
        lambda v: eager_nll(v["recon"], v["x"], torch.zeros_like(v["x"])),
        lambda v: slow_nll(v["recon"], v["x"]),
    ),
    "nll-logvar": (
        ("recon", "x", "spread"), (),
        lambda v, i: fastelbo.gaussian_nll(v["recon"], v["x"], logvar=v["spread"], impl=i),
        lambda v: eager_nll(v["recon"], v["x"], v["spread"]),
        lambda v: slow_nll(v["recon"], v["x"], logvar=v["spread"]),
    ),
    "nll-scalar-logvar": (
        ("recon", "x", "scalar"), (),
        lambda v, i: fastelbo.gaussian_nll(v["recon"], v["x"], logvar=v["scalar"], impl=i),
        lambda v: eager_nll(v["recon"], v["x"], v["scalar"]),
        lambda v: slow_nll(v["recon"], v["x"], logvar=v["scalar"]),
    ),
    "nll-std": (
        ("recon", "x", "std"), (),
        lambda v, i: fastelbo.gaussian_nll(v["recon"], v["x"], std=v["std"], impl=i),
        lambda v: -torch.distributions.Normal(v["recon"], v["std"]).log_prob(v["x"]).flatten(1).sum(1),
        lambda v: slow_nll(v["recon"], v["x"], std=v["std"]),
    ),
    "nll-var": (
        ("recon", "x", "var"), (),
        lambda v, i: fastelbo.gaussian_nll(v["recon"], v["x"], var=v["var"], impl=i),
        lambda v: F.gaussian_nll_loss(v["recon"], v["x"], v["var"], full=True, reduction="none").flatten(1).sum(1),
        lambda v: slow_nll(v["recon"], v["x"], var=v["var"]),
    ),
    "kl": (
        ("mu", "logvar"), (),
        lambda v, i: fastelbo.gaussian_kl(v["mu"], v["logvar"], impl=i),
        lambda v: eager_kl(v["mu"], v["logvar"]),
        lambda v: slow_kl(v["mu"], v["logvar"]),
    ),
    "kl-prior": (
        ("mu", "logvar", "prior_mu", "prior_logvar"), (),
        lambda v, i: fastelbo.gaussian_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], impl=i),
        lambda v: eager_kl_prior(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"]),
        lambda v: slow_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"]),
    ),
    "reparameterize": (
        ("mu", "logvar"), ("eps",),
        lambda v, i: fastelbo.reparameterize(v["mu"], v["logvar"], eps=v["eps"], impl=i),
        lambda v: eager_sample(v["mu"], v["logvar"], v["eps"]),
        lambda v: slow_sample(v["mu"], v["logvar"], v["eps"]),
    ),
    "elbo": (
        ("recon", "x", "spread", "mu", "logvar"), (),
        lambda v, i: fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["spread"], beta=0.5, impl=i),
        lambda v: (eager_nll(v["recon"], v["x"], v["spread"]) + 0.5 * eager_kl(v["mu"], v["logvar"])).mean(),
        lambda v: slow_loss(v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["spread"], beta=0.5),
    ),
}  # fmt: skip

# What the inputs look like: (scale of means and data, offset shared by recon and x, centre and scale of log-variances).
REGIMES = {
    "start of training": (1.0, 0.0, 0.0, 0.1),
    "trained": (0.1, 1.0, -2.0, 1.0),
    "collapsed to the prior": (1e-3, 0.0, 0.0, 1e-3),
    "sharp": (0.02, 0.5, -9.0, 0.5),
    "wide": (5.0, 0.0, 3.0, 2.0),
}


def regime_inputs(regime: str, shape: tuple[int, int]) -> Values:
    scale, offset, centre, spread = REGIMES[regime]
    g = torch.Generator().manual_seed(17)

    def normal(*s: int) -> torch.Tensor:
        return torch.randn(s, generator=g)

    v = {n: offset + scale * normal(*shape) for n in ("recon", "x")}
    v["x"] = v["recon"] + scale * 0.5 * normal(*shape)
    v |= {n: centre + spread * normal(*shape) for n in ("spread", "logvar", "prior_logvar")}
    v["prior_logvar"] = v["logvar"] + 0.3 * spread * normal(*shape)
    v["mu"], v["eps"] = scale * normal(*shape), normal(*shape)
    v["prior_mu"] = v["mu"] + 0.3 * scale * normal(*shape)
    v["scalar"] = torch.tensor(centre)
    return v | {"std": torch.exp(0.5 * v["spread"]), "var": torch.exp(v["spread"])}


def errors(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest and root-mean-square error."""
    error = (got.detach().cpu().double() - exact).abs()
    return float(error.max()), float(error.square().mean().sqrt())


@pytest.mark.parametrize("shape", [(64, 20), (32, 784), (8, 12_288)], ids=str)
@pytest.mark.parametrize("regime", list(REGIMES))
@pytest.mark.parametrize("name", list(RIVALS))
@each_backend
def test_no_worse_than_the_formula_that_users_write(backend: Backend, name: str, regime: str, shape: tuple[int, int]) -> None:
    """Values and every gradient; the floor is two ulp of the largest value, and half as much again is luck."""
    if backend.impl == "triton" and backend.device == CPU:
        if shape != (32, 784):
            pytest.skip("the interpreter sees fewer cases")
        shape = (8, 300)
    learned, constants, fast, formula, oracle = RIVALS[name]
    values = regime_inputs(regime, shape)
    found = []
    for fn, dtype, device in (
        (lambda v: fast(v, backend.impl), torch.float32, backend.device),
        (formula, torch.float32, backend.device),
        (oracle, torch.float64, CPU),
    ):
        v = {n: values[n].to(device, dtype).requires_grad_(n in learned) for n in (*learned, *constants)}
        out = fn(v)
        grads = torch.autograd.grad(out, [v[n] for n in learned], torch.ones_like(out))
        found.append([out.detach(), *grads])
    for what, ours, theirs, exact in zip(("value", *learned), *found, strict=True):
        floor = 2.0**-22 * float(exact.abs().max())
        for kind, mine, rival in zip(("largest", "rms"), errors(ours, exact), errors(theirs, exact), strict=True):
            assert mine <= 1.5 * rival + floor, (
                f"{what}: {kind} error {mine:.3g}, the formula's is {rival:.3g} (two ulp: {floor:.3g})"
            )


@each_backend
def test_long_sums(backend: Backend) -> None:
    """Many terms of one sign and size: the error of the sum does not grow with their number."""
    n = 20_001 if backend.impl == "triton" and backend.device == CPU else 600_001
    d = torch.full((1, n), 0.1)
    for shape in ((1, n), (n, 1)):
        here = d.view(shape).to(backend.device)
        exact = n * 0.5 * float(torch.tensor(0.1)) ** 2
        for reduction in ("sum", "mean"):
            got = fastelbo.gaussian_nll(here, torch.zeros_like(here), full=False, reduction=reduction, impl=backend.impl)
            assert float(got) == pytest.approx(exact / (n if reduction == "mean" else 1), rel=5e-7)
            kl = fastelbo.gaussian_kl(here, torch.zeros_like(here), reduction=reduction, impl=backend.impl)
            assert float(kl) == pytest.approx(exact / (n if reduction == "mean" else 1), rel=5e-7)
    spread = torch.zeros((), device=backend.device, requires_grad=True)
    fastelbo.gaussian_nll(
        d.to(backend.device), torch.zeros_like(d).to(backend.device), logvar=spread, reduction="sum", impl=backend.impl
    ).backward()
    assert float(spread.grad) == pytest.approx(n * 0.5 * (1 - float(torch.tensor(0.1)) ** 2), rel=5e-7)


@each_backend
def test_runs_are_reproducible(backend: Backend) -> None:
    """The same bits every time: reductions are in a fixed order."""
    v = {n: t.to(backend.device) for n, t in regime_inputs("trained", (5, 333)).items()}
    losses = {
        float(fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["scalar"], impl=backend.impl))
        for _ in range(5)
    }
    assert len(losses) == 1


@each_backend
def test_how_small_a_variance_may_be(backend: Backend) -> None:
    """Of a residual of exactly 0, which 0 * inf would make NaN of: as docs/numerics.md has it."""

    def both(zeros: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nll = fastelbo.gaussian_nll(zeros, zeros, logvar=level, full=False, impl=backend.impl)
        return nll, fastelbo.gaussian_kl(zeros, level, zeros, level, impl=backend.impl)

    traced = torch.compile(both, backend="aot_eager")
    for fn, least in [(both, -103.0), (traced, -88.0)] if backend.impl == "torch" else [(both, -88.0)]:
        nll, kl = fn(torch.zeros(1, 4, device=backend.device), torch.full((1, 4), least, device=backend.device))
        assert (nll.item(), kl.item()) == (2 * least, 0.0)
