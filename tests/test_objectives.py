"""Objectives: log q beside a sample, densities at z, importance-weighted bounds, free bits, balance, capacity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FORMS, Backend, each_backend
from settings import drawn, same
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

import fastelbo

INTO: dict[str, Callable[[Tensor], Tensor]] = {
    "logvar": lambda std: 2 * std.log(), "logstd": torch.log, "std": lambda std: std, "var": torch.square,
}  # fmt: skip
STD: dict[str, Callable[[Tensor], Tensor]] = {
    "logvar": lambda t: (0.5 * t).exp(), "logstd": torch.exp, "std": lambda t: t, "var": torch.sqrt,
}  # fmt: skip


# ---- log q -----------------------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("masked", [None, "mask", "weights"])
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("form", FORMS)
def test_log_prob(form: str, samples: int | None, masked: str | None, backend: Backend) -> None:
    """The log density of torch's Normal at z, and its gradient along with z."""
    mu, spread = drawn(4, 3, 5), INTO[form](drawn(4, 3, 5, seed=1).exp())
    lead = () if samples is None else (samples,)
    eps = drawn(*lead, 4, 3, 5, seed=2).float()
    weight = {"mask": drawn(3, 5) > -0.5, "weights": drawn(4, 3, 1).abs().float(), None: None}[masked or None]

    def call(mu: Tensor, spread: Tensor) -> Any:
        w = None if weight is None else weight.to(backend.device)
        options: dict[str, Any] = {form: spread, "num_samples": samples, "eps": eps.to(backend.device), "weight": w}
        return fastelbo.reparameterize_kl(mu, log_prob=True, impl=backend.impl, **options)

    def written(mu: Tensor, spread: Tensor) -> Any:
        q = Normal(mu, STD[form](spread))
        z = mu + q.scale * eps.to(mu)
        w = torch.ones_like(mu) if weight is None else weight.to(mu)
        return z, (w * torch_kl(q, Normal(0.0, 1.0))).sum((1, 2)), (w * q.log_prob(z)).sum((-2, -1))

    same(call, written, [mu, spread], backend)


@each_backend
@pytest.mark.parametrize("look", ["plain", "halves", "channels-last", "batch_dims", "clamp", "bfloat16", "odd"])
def test_log_prob_of_a_seed(look: str, backend: Backend) -> None:
    """The noise of a seed is what `reparameterize` draws; layouts change nothing."""
    options: dict[str, Any] = {"num_samples": 2, "seed": 5, "impl": backend.impl}
    moments = drawn(3, 8, 4, 3 if look == "odd" else 4).float().to(backend.device)
    if look == "channels-last":
        moments = moments.to(memory_format=torch.channels_last)
    if look == "bfloat16":
        moments = moments.bfloat16()
    mu, logvar = moments.chunk(2, 1) if look in ("halves", "odd") else (moments[:, :4].clone(), moments[:, 4:].clone())
    batch_dims = 2 if look == "batch_dims" else 1
    clamp = (-0.5, 0.5) if look == "clamp" else None
    z, kl, log_q = fastelbo.reparameterize_kl(mu, logvar, log_prob=True, logvar_clamp=clamp, batch_dims=batch_dims, **options)
    want_z, want_kl = fastelbo.reparameterize_kl(mu, logvar, logvar_clamp=clamp, batch_dims=batch_dims, **options)
    assert torch.equal(z, want_z)
    assert torch.equal(kl, want_kl)
    eps = fastelbo.reparameterize(torch.zeros_like(mu.float()), torch.zeros_like(mu.float()), **options).double()
    level = logvar.double() if clamp is None else logvar.double().clamp(*clamp)
    want = -0.5 * (eps**2 + level + math.log(2 * math.pi)).flatten(1 + batch_dims).sum(-1)
    torch.testing.assert_close(log_q.double(), want, rtol=2e-6, atol=0)
    assert log_q.dtype == torch.float32


@each_backend
def test_derivatives_of_log_prob(backend: Backend) -> None:
    mu, logvar = (drawn(2, 3, seed=i).to(backend.device).requires_grad_() for i in range(2))
    eps = drawn(2, 3, seed=2).to(backend.device)
    call = lambda mu, logvar: fastelbo.reparameterize_kl(mu, logvar, eps=eps, log_prob=True, impl=backend.impl)  # noqa: E731
    assert torch.autograd.gradcheck(call, (mu, logvar), fast_mode=backend.truncates)
    assert torch.autograd.gradgradcheck(call, (mu, logvar), fast_mode=backend.truncates)
    with fastelbo.verify() as report:
        torch.stack([t.sum() for t in call(mu, logvar)]).sum().backward()
    assert (report.checked, report.backwards, report.mismatches) == (1, 1, 0)


def test_log_prob_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` sees a sum of squares that is wrong."""
    backend = Backend("torch", torch.device("cpu"))
    right = backend.ops().latent.forward

    def wrong(*args: Any) -> Any:
        (z, kl, squares), kept = right(*args)
        return (z, kl, squares * 1.001), kept

    backend.replace(monkeypatch, "latent", forward=wrong)
    with fastelbo.verify(), pytest.raises(fastelbo.NumericsMismatch, match="squares is off"):
        fastelbo.reparameterize_kl(torch.zeros(3, 4), torch.zeros(3, 4), log_prob=True)


def test_errors_of_log_prob() -> None:
    mu = torch.zeros(3, 4)
    for options in ({"reduction": "batchmean"}, {"batch_dims": 2}, {"free_bits": 1.0, "reduction": "batchmean"}):
        with pytest.raises(ValueError, match="log_prob=True gives values of each sample"):
            fastelbo.reparameterize_kl(mu, mu, log_prob=True, **options)  # type: ignore[call-overload]


# ---- densities at z --------------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("z_shape", "mu_shape", "spread_shape", "batch_dims"), [
    ((4, 3), (4, 3), (4, 3), 1), ((4, 1, 3), (6, 3), (6, 3), 2), ((4, 1, 3), (4, 3), (3,), 3), ((5, 4, 3), (4, 3), (4, 1), 2),
    ((3,), (4, 3), (), 1),
])  # fmt: skip
def test_gaussian_log_prob(z_shape: Any, mu_shape: Any, spread_shape: Any, batch_dims: int, form: str, backend: Backend) -> None:
    inputs = [drawn(*z_shape), drawn(*mu_shape, seed=1), INTO[form](drawn(*spread_shape, seed=2).exp())]

    def call(z: Tensor, mu: Tensor, spread: Tensor) -> Tensor:
        return fastelbo.gaussian_log_prob(z, mu, **{form: spread}, batch_dims=batch_dims, impl=backend.impl)

    def written(z: Tensor, mu: Tensor, spread: Tensor) -> Tensor:
        each = Normal(mu, STD[form](spread)).log_prob(z)
        return each.flatten(batch_dims).sum(-1) if batch_dims < each.ndim else each

    same(call, written, inputs, backend, 5e-6)


@each_backend
def test_densities_of_numbers(backend: Backend) -> None:
    z = drawn(4, 3)
    impl: Any = backend.impl
    mask = (drawn(3, seed=3) > -0.5).to(backend.device)
    same(
        lambda z: fastelbo.gaussian_log_prob(z, impl=impl), lambda z: Normal(0.0, 1.0).log_prob(z).sum(1), [z], backend
    )  # fmt: skip
    same(
        lambda z: fastelbo.gaussian_log_prob(z, 0.5, std=2.0, weight=mask, reduction="mean", impl=impl),
        lambda z: (Normal(0.5, 2.0).log_prob(z) * mask).sum() / (4 * mask.sum()),
        [z], backend,
    )  # fmt: skip
    same(
        lambda z, m, s: fastelbo.sample_kl(z, m, std=s, prior_mu=1, prior_logstd=-0.25, reduction="batchmean", impl=impl),
        lambda z, m, s: (Normal(m, s).log_prob(z) - Normal(1.0, math.exp(-0.25)).log_prob(z)).sum(1).mean(),
        [z, drawn(4, 3, seed=1), drawn(3, seed=2).exp()], backend,
    )  # fmt: skip


@each_backend
def test_sample_kl(backend: Backend) -> None:
    """Against a mixture's components without a copy; and its mean over samples is the KL."""
    inputs = [drawn(5, 1, 3), drawn(5, 1, 3, seed=1), drawn(5, 1, 3, seed=2), drawn(6, 3, seed=3), drawn(6, 3, seed=4)]
    same(
        lambda *v: fastelbo.sample_kl(*v, batch_dims=2, impl=backend.impl),
        lambda z, m, s, pm, ps: (Normal(m, (s / 2).exp()).log_prob(z) - Normal(pm, (ps / 2).exp()).log_prob(z)).sum(2),
        inputs, backend, 2e-5,
    )  # fmt: skip
    mu, logvar, prior_mu, prior_logvar = (0.5 * drawn(3, seed=i).float().to(backend.device) for i in range(4))
    count = 20_000 if backend.impl == "torch" else 50  # the interpreter draws one after the other
    z = fastelbo.reparameterize(mu, logvar, count, seed=1, impl=backend.impl)
    each = fastelbo.sample_kl(z, mu, logvar, prior_mu, prior_logvar, impl=backend.impl)
    kl = fastelbo.gaussian_kl(mu, logvar, prior_mu, prior_logvar, batch_dims=0, impl=backend.impl)
    assert abs(float(each.mean() - kl)) < 4 * float(each.std()) / math.sqrt(len(each))


@each_backend
def test_a_mixture_of_posteriors(backend: Backend) -> None:
    """The prior of a VampPrior, as its paper writes it: against torch.distributions' own mixture."""
    z, mu, logvar = drawn(4, 3), drawn(6, 3, seed=1), drawn(6, 3, seed=2)

    def call(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        each = fastelbo.gaussian_log_prob(z[:, None], mu, logvar, batch_dims=2, impl=backend.impl)
        return torch.logsumexp(each, 1) - math.log(len(mu))

    def written(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        d = torch.distributions
        parts = d.Independent(Normal(mu, (0.5 * logvar).exp()), 1)
        return d.MixtureSameFamily(d.Categorical(logits=torch.zeros(6, dtype=torch.float64, device=z.device)), parts).log_prob(z)

    same(call, written, [z, mu, logvar], backend, 1e-5)


def test_errors_of_densities() -> None:
    z = torch.zeros(3, 4)
    with pytest.raises(TypeError, match=r"z must be a torch.Tensor, got float"):
        fastelbo.gaussian_log_prob(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mu has shape \(5,\), which does not broadcast with \(3, 4\)"):
        fastelbo.gaussian_log_prob(z, torch.zeros(5))
    with pytest.raises(ValueError, match="give one of logvar, logstd, std, var, got std and var"):
        fastelbo.gaussian_log_prob(z, z, std=1.0, var=1.0)
    with pytest.raises(TypeError, match=r"prior_mu must be a torch.Tensor, got str"):
        fastelbo.sample_kl(z, z, z, "0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prior_std must be positive, got -1"):
        fastelbo.sample_kl(z, z, z, prior_std=-1)
    with pytest.raises(TypeError, match=r"logstd must be float16.*torch.int64"):
        fastelbo.sample_kl(z, z, logstd=z.long())


# ---- free bits, balance, capacity ------------------------------------------------------------------------------------------------


def kl_each(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    return torch_kl(Normal(mu, (0.5 * logvar).exp()), Normal(prior_mu, (0.5 * prior_logvar).exp()))


def posterior_and_prior() -> list[Tensor]:
    return [drawn(6, 4), 0.5 * drawn(6, 4, seed=1), drawn(6, 4, seed=2), 0.5 * drawn(6, 4, seed=3)]


@each_backend
@pytest.mark.parametrize("masked", [False, True])
def test_free_bits(masked: bool, backend: Backend) -> None:
    mask = (drawn(6, 1, seed=4) > -0.3).to(backend.device) if masked else None
    w = torch.ones(6, 1, dtype=torch.float64) if mask is None else mask.cpu().double()
    w = w.to(backend.device)
    options: dict[str, Any] = {"weight": mask, "impl": backend.impl}

    def over_batch(*v: Tensor) -> Tensor:
        """Kingma et al. 2016, equation 15."""
        return ((w * kl_each(*v)).sum(0) / w.sum(0)).clamp(min=1.75).sum()

    inputs = posterior_and_prior()
    assert bool(((w.cpu() * kl_each(*inputs)).sum(0) / w.sum().cpu() < 1.75).any()), "some latent is below"
    same(lambda *v: fastelbo.gaussian_kl(*v, free_bits=1.75, reduction="batchmean", **options), over_batch, inputs, backend)
    per_sample = lambda *v: (w * kl_each(*v).clamp(min=0.8)).sum(1)  # noqa: E731
    sample: dict[str, Any] = {"free_bits": 0.8, "free_bits_over": "sample", **options}
    same(lambda *v: fastelbo.gaussian_kl(*v, **sample), per_sample, inputs, backend)
    for reduction, divisor in (("sum", 1), ("batchmean", 6), ("mean", 4 * w.sum())):
        same(
            lambda *v, r=reduction: fastelbo.gaussian_kl(*v, reduction=r, **sample),
            lambda *v, n=divisor: per_sample(*v).sum() / n,
            inputs, backend,
        )  # fmt: skip
    eps = drawn(6, 4, seed=5).float()
    same(
        lambda *v: fastelbo.reparameterize_kl(*v, eps=eps.to(backend.device), **sample),
        lambda *v: (v[0] + (0.5 * v[1]).exp() * eps.to(v[0]), per_sample(*v)),
        inputs, backend,
    )  # fmt: skip


def test_free_bits_have_no_gradient_below() -> None:
    mu = torch.tensor([[0.1, 3.0], [0.2, 2.0]], requires_grad=True)
    kl = fastelbo.gaussian_kl(mu, torch.zeros(2, 2), free_bits=0.5, reduction="batchmean")
    assert kl.item() == pytest.approx(0.5 + (4.5 + 2.0) / 2)
    kl.backward()
    assert mu.grad is not None
    assert mu.grad.tolist() == [[0.0, 1.5], [0.0, 1.0]]


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_balance(masked: bool, form: str, backend: Backend) -> None:
    """DreamerV2: the value stays, the gradients are shared; a sample's gradient is its own."""
    mask = (drawn(6, 1, seed=4) > -0.3).to(backend.device) if masked else None
    w = 1.0 if mask is None else mask.double()
    inputs = [drawn(6, 4), INTO[form](drawn(6, 4, seed=1).exp()), drawn(6, 4, seed=2), INTO[form](drawn(6, 4, seed=3).exp())]
    eps = drawn(6, 4, seed=5).float()

    def each(mu: Tensor, spread: Tensor, prior_mu: Tensor, prior: Tensor) -> Tensor:
        return torch_kl(Normal(mu, STD[form](spread)), Normal(prior_mu, STD[form](prior)))

    def written(mu: Tensor, spread: Tensor, prior_mu: Tensor, prior: Tensor) -> Any:
        z = mu + STD[form](spread) * eps.to(mu)
        of_prior = each(mu.detach(), spread.detach(), prior_mu, prior)
        of_posterior = each(mu, spread, prior_mu.detach(), prior.detach())
        return z, (w * (0.8 * of_prior + 0.2 * of_posterior)).sum(1)

    def call(mu: Tensor, spread: Tensor, prior_mu: Tensor, prior: Tensor) -> Any:
        options: dict[str, Any] = {form: spread, f"prior_{form}": prior, "weight": mask, "impl": backend.impl}
        return fastelbo.reparameterize_kl(mu, prior_mu=prior_mu, eps=eps.to(backend.device), kl_balance=0.8, **options)

    same(call, written, inputs, backend, 2e-5)
    wide = [t.to(backend.device).requires_grad_() for t in inputs]
    alone = lambda *v: fastelbo.gaussian_kl(  # noqa: E731
        v[0], **{form: v[1], f"prior_{form}": v[3]}, prior_mu=v[2], kl_balance=0.8, impl=backend.impl
    )  # fmt: skip
    with fastelbo.verify() as report:
        alone(*wide).sum().backward()
    assert (report.checked, report.backwards) == (1, 1)
    (slope,) = torch.autograd.grad(alone(*wide).sum(), wide[0], create_graph=True)
    (want,) = torch.autograd.grad(written(*wide)[1].sum() if not masked else each(*wide).sum() * 0.2, wide[0], create_graph=True)
    torch.testing.assert_close(slope, want)


@each_backend
def test_capacity(backend: Backend) -> None:
    """Burgess et al. 2018, equation 8, on both sides of the capacity."""
    inputs = posterior_and_prior()
    for reduction, reduce in (("none", lambda t: t.sum(1)), ("batchmean", lambda t: t.sum(1).mean())):
        for capacity in (0.0, 5.0, 500):
            same(
                lambda *v, r=reduction, c=capacity: fastelbo.gaussian_kl(*v, capacity=c, reduction=r, impl=backend.impl),
                lambda *v, r=reduce, c=capacity: (r(kl_each(*v)) - c).abs(),
                inputs, backend,
            )  # fmt: skip


@pytest.mark.parametrize("function", [fastelbo.gaussian_kl, fastelbo.reparameterize_kl])
def test_errors_of_objectives(function: Any) -> None:
    mu = torch.zeros(3, 4)
    for name in ("kl_balance", "free_bits", "capacity"):
        for value in (True, "1", mu):
            with pytest.raises(TypeError, match=f"{name} must be a number or None, got {type(value).__name__}"):
                function(mu, mu, reduction="batchmean", **{name: value})
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"kl_balance must be from 0 to 1, got {value}"):
            function(mu, mu, kl_balance=value)
    with pytest.raises(ValueError, match="free_bits must not be negative, got -1"):
        function(mu, mu, free_bits=-1, reduction="batchmean")
    with pytest.raises(ValueError, match="free_bits_over must be one of 'batch', 'sample', got 'latent'"):
        function(mu, mu, free_bits=1, free_bits_over="latent")
    with pytest.raises(ValueError, match="reduction must be 'batchmean', got 'none'"):
        function(mu, mu, free_bits=1)
    with pytest.raises(TypeError, match=r"weight must be a bool mask beside free_bits, got torch.float32"):
        function(mu, mu, free_bits=1, weight=mu, reduction="batchmean")


# ---- importance-weighted bounds --------------------------------------------------------------------------------------------------

WEIGHT = 0.5 * drawn(6, 3, seed=20)


class Model:
    """A decoder, and the bounds of it as their papers write them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = WEIGHT.to(device, dtype).requires_grad_()

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z) @ self.weight.to(z.dtype).T

    def log_w(self, x: Tensor, z: Tensor, q: Normal, prior: Normal, beta: Any = 1.0) -> Tensor:
        log_p = Normal(self(z), 1.0).log_prob(x).sum(-1)
        return log_p + beta * (prior.log_prob(z) - q.log_prob(z)).sum(-1)


def setting(samples: int, batch: int = 4) -> tuple[list[Tensor], Tensor]:
    return [drawn(batch, 6), drawn(batch, 3, seed=1), 0.3 * drawn(batch, 3, seed=2)], drawn(samples, batch, 3, seed=3).float()


@each_backend
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum"])
@pytest.mark.parametrize("samples", [1, 5])
def test_iwae(samples: int, reduction: str, backend: Backend) -> None:
    """Burda et al. 2016, equation 8, written out: values, terms and gradients, in the decoder's weight too, with a beta."""
    inputs, eps = setting(samples)
    beta = torch.rand(4, generator=torch.Generator().manual_seed(0)).to(backend.device) + 0.5
    reduce = {"none": lambda t: t, "batchmean": torch.mean, "sum": torch.sum}[reduction]
    found = []
    for dtype in (torch.float32, torch.float64):
        model = Model(dtype, backend.device)
        x, mu, logvar = (t.float().to(backend.device, dtype).requires_grad_() for t in inputs)
        noise = eps.to(backend.device, dtype)
        if dtype == torch.float32:
            options: dict[str, Any] = {"reduction": reduction, "impl": backend.impl, "return_terms": True, "beta": beta}
            options |= {"prior_mu": 0.2, "prior_logvar": -0.1, "num_samples": samples, "eps": noise}
            out = list(fastelbo.sgvb_loss(model, x, mu, logvar, objective="iwae", **options))
        else:
            q, prior = Normal(mu, (0.5 * logvar).exp()), Normal(0.2, math.exp(-0.05))
            z = mu + q.scale * noise
            log_w = model.log_w(x, z, q, prior, beta.double())
            bound = torch.logsumexp(log_w, 0) - math.log(samples)
            nll = -Normal(model(z), 1.0).log_prob(x).sum(-1).mean(0)
            out = [reduce(t) for t in (-bound, nll, (q.log_prob(z) - prior.log_prob(z)).sum(-1).mean(0))]
        slopes = torch.autograd.grad(out[0].sum(), (x, mu, logvar, model.weight))
        found.append([*out, *slopes])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max()))


@each_backend
def test_one_importance_sample_is_the_elbo(backend: Backend) -> None:
    """With S = 1 and the same noise, the bound is the ELBO with the KL at the sample."""
    inputs, eps = setting(1)
    x, mu, logvar = (t.float().to(backend.device) for t in inputs)
    model = Model(torch.float32, backend.device)
    options: dict[str, Any] = {"eps": eps[0].to(backend.device), "impl": backend.impl, "return_terms": True}
    bound, nll, kl = fastelbo.sgvb_loss(model, x, mu, logvar, objective="iwae", **options)
    loss, elbo_nll, _ = fastelbo.sgvb_loss(model, x, mu, logvar, **options)
    z = fastelbo.reparameterize(mu, logvar, eps=options["eps"], impl=backend.impl)
    at_z = fastelbo.sample_kl(z, mu, logvar, reduction="batchmean", impl=backend.impl)
    torch.testing.assert_close(nll, elbo_nll)
    torch.testing.assert_close(bound, elbo_nll + at_z)
    torch.testing.assert_close(kl, at_z)
    assert not torch.allclose(bound, loss)


def test_the_bound_rises_to_the_evidence() -> None:
    """Of a linear Gaussian model, whose log p(x) is known, under a posterior that is not its own."""
    weight, x = WEIGHT.float(), drawn(8, 6).float()
    mu, logvar = torch.zeros(8, 3), torch.zeros(8, 3)
    covariance = weight @ weight.T + torch.eye(6)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(x).mean()
    bounds = []
    for samples in (1, 10, 100, 10_000):
        each = [
            -fastelbo.sgvb_loss(lambda z: z @ weight.T, x, mu, logvar, objective="iwae", num_samples=samples, seed=i)
            for i in range(20)
        ]
        bounds.append(torch.stack(each).mean().item())
    assert bounds == sorted(bounds)
    assert bounds[0] < evidence - 0.5
    assert bounds[-1] == pytest.approx(float(evidence), abs=0.02)


@each_backend
def test_dreg(backend: Backend) -> None:
    """Tucker et al. 2019, equation 8: the value and the decoder's gradient are IWAE's; the posterior's is written out."""
    inputs, eps = setting(6)
    x, mu, logvar = (t.float().to(backend.device).requires_grad_(i > 0) for i, t in enumerate(inputs))
    model, noise = Model(torch.float32, backend.device), eps.to(backend.device)
    options: dict[str, Any] = {"num_samples": 6, "eps": noise, "impl": backend.impl, "reduction": "sum"}
    loss, iwae = (fastelbo.sgvb_loss(model, x, mu, logvar, objective=o, **options) for o in ("dreg", "iwae"))
    torch.testing.assert_close(loss, iwae)
    got = torch.autograd.grad(loss, (model.weight, mu, logvar))
    torch.testing.assert_close(got[0], torch.autograd.grad(iwae, model.weight)[0], rtol=1e-4, atol=1e-5)

    wide = Model(torch.float64, backend.device)
    m, s = (t.detach().double().requires_grad_() for t in (mu, logvar))
    z = (m + (0.5 * s).exp() * noise.double()).detach().requires_grad_()
    log_w = wide.log_w(x.double(), z, Normal(m.detach(), (0.5 * s.detach()).exp()), Normal(0.0, 1.0))
    share = torch.softmax(log_w.detach(), 0)
    (steep,) = torch.autograd.grad((share**2 * log_w).sum(), z)
    want = torch.autograd.grad(m + (0.5 * s).exp() * noise.double(), (m, s), -steep)
    for a, b in zip(got[1:], want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("samples", [4, 32])
def test_dregs_gradient_has_iwaes_mean(samples: int) -> None:
    """Within its standard error; and its variance is the smaller one."""
    x, mu, logvar = (t.float().repeat(400, 1) for t in setting(1, batch=1)[0])
    model = Model(torch.float32, torch.device("cpu"))
    moments = []
    for objective in ("iwae", "dreg"):
        m, s = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        fastelbo.sgvb_loss(model, x, m, s, objective=objective, num_samples=samples, seed=3, reduction="sum").backward()
        slopes = torch.cat([m.grad, s.grad], 1)  # type: ignore[list-item]
        moments.append((slopes.mean(0), slopes.var(0)))
    (mean, var), (dreg_mean, dreg_var) = moments
    assert bool(((mean - dreg_mean).abs() < 4 * ((var + dreg_var) / 400).sqrt()).all())
    assert float(dreg_var[:3].sum()) < float(var[:3].sum())


def test_errors_of_bounds() -> None:
    x, mu = torch.zeros(3, 6), torch.zeros(3, 3)
    model = Model(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="objective must be one of 'elbo', 'iwae', 'dreg', got 'vae'"):
        fastelbo.sgvb_loss(model, x, mu, mu, objective="vae")  # type: ignore[call-overload]
    for objective in ("iwae", "dreg"):
        with pytest.raises(ValueError, match="reduction must be 'batchmean', 'sum' or 'none' for objective="):
            fastelbo.sgvb_loss(model, x, mu, mu, objective=objective, reduction="mean")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="objective='dreg' needs an ordinary backward pass"):
        torch.func.grad(lambda m: fastelbo.sgvb_loss(model, x, m, mu, objective="dreg"))(mu)


@pytest.mark.parametrize("seeded", [False, True])
def test_iwae_compiles(seeded: bool) -> None:
    inputs, eps = setting(5)
    x, mu, logvar = (t.float().requires_grad_() for t in inputs)
    model = Model(torch.float32, torch.device("cpu"))
    source: dict[str, Any] = {"seed": 3} if seeded else {"eps": eps}
    call = lambda x, mu, logvar: fastelbo.sgvb_loss(model, x, mu, logvar, objective="iwae", num_samples=5, **source)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mu, logvar), call(x, mu, logvar))
    got, want = (torch.autograd.grad(f(x, mu, logvar), (mu, logvar)) for f in (compiled, call))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
