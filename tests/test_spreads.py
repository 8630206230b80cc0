"""A posterior and a prior by their logstd, std or var: values near a ratio of 1 and far from it, mixed forms, torch's Normal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import FORMS, Backend, each_backend
from torch import Tensor
from torch.distributions import Independent, Laplace, Normal
from torch.distributions import kl_divergence as torch_kl

import fastelbo

mpmath = pytest.importorskip("mpmath")


def exact(form: str, mu: float, spread: float, prior_mu: float = 0.0, prior: float | None = None) -> list[float]:
    """The KL, and its derivatives in mu, in the spread, in prior_mu and in the prior's spread, with sixty digits."""
    sigma = {
        "logvar": lambda t: mpmath.exp(t / 2), "logstd": mpmath.exp, "std": lambda t: t, "var": mpmath.sqrt,
    }[form]  # fmt: skip
    unit = 0.0 if form in ("logvar", "logstd") else 1.0
    with mpmath.workdps(60):

        def kl(m: Any, s: Any, pm: Any, ps: Any) -> Any:
            q, p = sigma(s), sigma(ps)
            return mpmath.log(p / q) + (q**2 + (m - pm) ** 2) / (2 * p**2) - mpmath.mpf(1) / 2

        at = [mpmath.mpf(v) for v in (mu, spread, prior_mu, unit if prior is None else prior)]
        slopes = [mpmath.diff(kl, tuple(at), tuple(int(i == j) for j in range(4))) for i in range(4)]
        return [float(v) for v in (kl(*at), *slopes)]


# Of a std, beside a prior's: next to it, near it, far from it on both sides.
RATIOS = [(1.0, 1.0), (1.0000001, 1.0), (0.9999999, 1.0), (1.001, 1.0), (0.37, 1.0), (2.5, 1.0), (1e-4, 1.0), (3e3, 1.0),
          (0.05, 0.05), (0.0500001, 0.05), (0.07, 0.05), (40.0, 3.0), (1e-9, 2.0), (3e4, 0.1)]  # fmt: skip


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_values_and_slopes(form: str, backend: Backend) -> None:
    """To a few units in the last place, the gradient in a spread near the prior's included, where the usual formula cancels.

    A logarithm is a rounded one: 1 ulp of a log-std of -20 moves the variance by 40, so the truth is that of what is given.
    """
    into = {"logvar": lambda s: 2 * math.log(s), "logstd": math.log, "std": lambda s: s, "var": lambda s: s * s}[form]
    rows = [[0.3 * p, into(s), 0.1 * p, into(p)] for s, p in RATIOS]
    given = torch.tensor(rows, dtype=torch.float64).float().to(backend.device)
    mu, spread, prior_mu, prior = (t.clone().requires_grad_() for t in given.unbind(1))
    options: dict[str, Any] = {form: spread, "prior_mu": prior_mu, f"prior_{form}": prior, "impl": backend.impl}
    kl = fastelbo.gaussian_kl(mu, **options)
    slopes = torch.autograd.grad(kl.sum(), (mu, spread, prior_mu, prior))
    for i, row in enumerate(given.double().tolist()):
        want = exact(form, *row)
        assert kl[i].item() == pytest.approx(want[0], rel=6e-7, abs=1e-37), (row, "kl")
        for name, slope, value in zip(("mu", form, "prior_mu", f"prior_{form}"), slopes, want[1:], strict=True):
            # A prior's slope is the difference of two terms.
            scale = abs(want[1] * (row[0] - row[2])) if name.startswith("prior") else 0.0
            assert slope[i].item() == pytest.approx(value, rel=1e-6, abs=1e-6 * scale + 1e-37), (row, name)


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_the_sample(form: str, backend: Backend) -> None:
    """z and its slopes for given noise; a seed draws the same noise whatever the form."""
    std = torch.tensor([1e-3, 0.5, 1.0, 7.0], device=backend.device)
    into = {"logvar": lambda s: 2 * s.log(), "logstd": torch.log, "std": lambda s: s.clone(), "var": torch.square}[form]
    mu, spread = torch.arange(4.0, device=backend.device).requires_grad_(), into(std).requires_grad_()
    eps = torch.tensor([0.3, -2.0, 1.5, 0.1], device=backend.device)
    z = fastelbo.reparameterize(mu, **{form: spread}, eps=eps, impl=backend.impl)
    torch.testing.assert_close(z, mu + std * eps)
    d_mu, d_spread = torch.autograd.grad(z.sum(), (mu, spread))
    per = {"logvar": 0.5 * std, "logstd": std, "std": torch.ones_like(std), "var": 0.5 / std}[form]
    torch.testing.assert_close(d_mu, torch.ones_like(mu))
    torch.testing.assert_close(d_spread, eps * per, rtol=1e-5, atol=0)

    both = fastelbo.reparameterize_kl(mu, **{form: spread}, seed=3, num_samples=2, impl=backend.impl)
    alone = fastelbo.reparameterize(mu, 2 * std.log(), 2, seed=3, impl=backend.impl)
    torch.testing.assert_close(both[0], alone)
    torch.testing.assert_close(both[1], fastelbo.gaussian_kl(mu, 2 * std.log(), impl=backend.impl))


@each_backend
@pytest.mark.parametrize("prior_form", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_mixed_forms(form: str, prior_form: str, backend: Backend) -> None:
    """A prior in another form, as a number and as a tensor that broadcasts, in half precision and with its gradient."""
    generator = torch.Generator().manual_seed(0)
    mu, logvar = (torch.randn(3, 5, generator=generator).to(backend.device) for _ in range(2))
    into = {"logvar": lambda t: t, "logstd": lambda t: 0.5 * t, "std": lambda t: (0.5 * t).exp(), "var": torch.exp}
    for prior_logvar, dtype in ((torch.randn(5, generator=generator), torch.float32), (torch.zeros(()) + 0.5, torch.bfloat16)):
        prior = into[prior_form](prior_logvar).to(backend.device, dtype).requires_grad_()
        kl = fastelbo.gaussian_kl(mu, **{form: into[form](logvar), f"prior_{prior_form}": prior}, impl=backend.impl)
        wide = prior.detach().double().requires_grad_()
        back = {"logvar": lambda t: t, "logstd": lambda t: 2 * t, "std": lambda t: 2 * t.log(), "var": torch.log}[prior_form]
        want = torch_kl(Normal(mu.double(), (0.5 * logvar.double()).exp()), Normal(0.0, (0.5 * back(wide)).exp())).sum(1)
        torch.testing.assert_close(kl.double(), want, rtol=2e-6, atol=0)
        kl.sum().backward()
        want.sum().backward()
        assert prior.grad is not None
        assert wide.grad is not None
        rtol = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(prior.grad.double(), wide.grad, rtol=rtol, atol=1e-5 * float(wide.grad.abs().max()))
    number = float(into[prior_form](torch.tensor(0.5)))
    got = fastelbo.gaussian_kl(mu, **{form: into[form](logvar), f"prior_{prior_form}": number}, impl=backend.impl)
    torch.testing.assert_close(got, fastelbo.gaussian_kl(mu, logvar, prior_logvar=0.5, impl=backend.impl), rtol=1e-5, atol=0)


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_derivatives(form: str, backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str) -> Tensor:
        t = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        return (t.exp() if form in ("std", "var") and "mu" not in name else t).to(backend.device).requires_grad_()

    inputs = [drawn(name) for name in ("mu", "spread", "prior_mu", "prior")]
    eps = torch.randn(2, 3, generator=generator, dtype=torch.float64).to(backend.device)

    def call(mu: Tensor, spread: Tensor, prior_mu: Tensor, prior: Tensor) -> Any:
        options: dict[str, Any] = {form: spread, f"prior_{form}": prior}
        return fastelbo.reparameterize_kl(mu, prior_mu=prior_mu, eps=eps, impl=backend.impl, **options)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=backend.truncates)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=backend.truncates)


@each_backend
@pytest.mark.parametrize("form", FORMS[1:])
def test_transforms_and_compilation(form: str, backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    mu, spread = torch.randn(4, 3, generator=generator), torch.rand(4, 3, generator=generator) + 0.5
    mu, spread = mu.to(backend.device), spread.to(backend.device)
    call = lambda mu, spread: fastelbo.gaussian_kl(mu, **{form: spread, f"prior_{form}": 0.7}, impl=backend.impl)  # noqa: E731
    one = torch.func.vmap(torch.func.grad(lambda m, s: call(m[None], s[None]).sum(), argnums=(0, 1)))(mu, spread)
    leaves = [t.clone().requires_grad_() for t in (mu, spread)]
    torch.testing.assert_close(one, torch.autograd.grad(call(*leaves).sum(), leaves))
    if backend.impl == "torch":
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        value = compiled(*leaves)
        torch.testing.assert_close(value, call(*leaves))
        torch.testing.assert_close(torch.autograd.grad(value.sum(), leaves), torch.autograd.grad(call(*leaves).sum(), leaves))


def test_errors() -> None:
    mu, one = torch.zeros(3, 4), torch.ones(3, 4)
    for function in (fastelbo.gaussian_kl, fastelbo.reparameterize, fastelbo.reparameterize_kl):
        call: Any = function
        with pytest.raises(
            TypeError, match=r"logvar must be a torch.Tensor, got NoneType, and none of logstd, std and var is given"
        ):
            call(mu)
        with pytest.raises(ValueError, match="give one of logvar, logstd, std, var, got logvar and std"):
            call(mu, one, std=one)
        with pytest.raises(ValueError, match=r"std has shape \(4,\), but mu has shape \(3, 4\)"):
            call(mu, std=one[0])
        with pytest.raises(TypeError, match=r"var must be a torch.Tensor, got float"):
            call(mu, var=1.0)
        with pytest.raises(TypeError, match=r"logstd must be float16.* got torch.int64: logstd.float\(\) converts it"):
            call(mu, logstd=one.long())
    for function in (fastelbo.gaussian_kl, fastelbo.reparameterize_kl):
        call = function
        with pytest.raises(ValueError, match="prior_var, got prior_std and prior_var"):
            call(mu, one, prior_std=1.0, prior_var=1.0)
        for value in (0.0, -1, float("nan")):
            with pytest.raises(ValueError, match="prior_std must be positive"):
                call(mu, std=one, prior_std=value)
        with pytest.raises(TypeError, match=r"prior_var must be a torch.Tensor, got str"):
            call(mu, one, prior_var="1")
        with pytest.raises(ValueError, match=r"prior_std has shape \(3,\), which does not broadcast to the shape \(3, 4\) of mu"):
            call(mu, std=one, prior_std=one[:, 0])
        with pytest.raises(ValueError, match=r"prior_std has shape \(3,\), which does not broadcast"):
            call(mu, one, prior_std=one[:, 0])
        with pytest.raises(ValueError, match="logvar_clamp is given, but the posterior's spread is std: only a logvar is clamped"):
            call(mu, std=one, logvar_clamp=(-30, 20))


# ---- torch's Normal --------------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize(("shape", "prior_shape", "event"), [
    ((4, 3), (4, 3), 0), ((4, 3), (3,), 1), ((3,), (2, 3), 1), ((2, 3, 5), (1, 3, 1), 2), ((), (), 0), ((4, 1), (5,), 0),
])  # fmt: skip
def test_kl_divergence(shape: tuple[int, ...], prior_shape: tuple[int, ...], event: int, backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape, prior_shape, prior_shape)]
    for dtype, kl in ((torch.float32, lambda q, p: fastelbo.kl_divergence(q, p, impl=backend.impl)), (torch.float64, torch_kl)):
        leaves = [t.to(backend.device, dtype).requires_grad_() for t in drawn]
        q, p = Normal(leaves[0], leaves[1].exp()), Normal(leaves[2], leaves[3].exp())
        value = kl(*(Independent(d, event) if event else d for d in (q, p))) if shape == prior_shape or not event else kl(
            Independent(q.expand(torch.broadcast_shapes(shape, prior_shape)), event),
            Independent(p.expand(torch.broadcast_shapes(shape, prior_shape)), event),
        )  # fmt: skip
        found.append([value, *torch.autograd.grad(value.sum(), leaves)])
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6 * float(want.abs().max()))


def test_kl_divergence_near_the_prior() -> None:
    """Two stds that differ by 1 in 7,000, where torch's own is off by nearly 1 in a thousand."""
    q, p = (Normal(torch.zeros(1), torch.full((1,), std)) for std in (0.7001, 0.7))
    want = exact("std", 0.0, q.scale.double().item(), 0.0, p.scale.double().item())[0]
    assert fastelbo.kl_divergence(q, p).item() == pytest.approx(want, rel=2e-7)
    assert abs(torch_kl(q, p).item() - want) > 5e-4 * want


def test_kl_divergence_errors() -> None:
    normal = Normal(torch.zeros(3, 4), torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"p must be a torch.distributions.Normal or an Independent of one, got Laplace"):
        fastelbo.kl_divergence(normal, Laplace(torch.zeros(4), torch.ones(4)))
    with pytest.raises(ValueError, match="the event of q has 1 dimensions and that of p 0: they must be equal"):
        fastelbo.kl_divergence(Independent(normal, 1), normal)
    with pytest.raises(ValueError, match="prior_mu has shape"):
        fastelbo.kl_divergence(normal, Normal(torch.zeros(5), torch.ones(5)))
