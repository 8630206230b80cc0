"""The modules, the estimator as code uses it, and what `effective_beta` claims about losses."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Backend, each_backend, slow_loss
from torch import nn

import fastelbo


def batch(backend: Backend) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    shapes = ((4, 3, 5), (4, 3, 5), (4, 2), (4, 2))
    return [torch.randn(s, generator=g).to(backend.device).requires_grad_() for s in shapes]


def truth(args: list[torch.Tensor], **options: Any) -> torch.Tensor:
    doubles = {n: v.detach().double().cpu() if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    return slow_loss(*(a.detach().double().cpu() for a in args), **doubles).to(torch.float32)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected, rtol=2e-6, atol=1e-6)


# ---- ELBOLoss --------------------------------------------------------------------------------------------------------------------


@each_backend
def test_elbo_loss_module_is_the_function(backend: Backend) -> None:
    args = batch(backend)
    same(fastelbo.ELBOLoss(impl=backend.impl)(*args), truth(args))
    loss = fastelbo.ELBOLoss(beta=0.2, recon_logvar=-1.0, full=False, logvar_clamp=(-0.5, 0.5), reduction="mean", impl=backend.impl)
    options = {"beta": 0.2, "recon_logvar": -1.0, "full": False, "logvar_clamp": (-0.5, 0.5), "reduction": "mean"}
    same(loss(*args), truth(args, **options))
    weight = torch.rand(4, 1, 5, device=backend.device)
    prior = torch.randn(2, device=backend.device)
    same(loss(*args, weight=weight, prior_mu=prior, prior_logvar=0.3),
         truth(args, **options, weight=weight, prior_mu=prior, prior_logvar=0.3))  # fmt: skip
    total, nll, kl = fastelbo.ELBOLoss(beta=0.5, return_terms=True, impl=backend.impl)(*args)
    same(total, (nll + 0.5 * kl).cpu())
    same(total, truth(args, beta=0.5))


@each_backend
def test_beta_can_be_scheduled(backend: Backend) -> None:
    args = batch(backend)
    loss = fastelbo.ELBOLoss(beta=0.0, impl=backend.impl)
    for beta in (0.0, 0.25, 1.0, 4, torch.tensor(0.5)):
        loss.beta = beta
        same(loss(*args), truth(args, beta=float(beta)))
    # A KL with weight 0 passes no gradient, not even as NaN.
    loss.beta = 0.0
    grads = torch.autograd.grad(loss(*args), args[2:])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@each_backend
def test_held_and_learned_variance(backend: Backend) -> None:
    args = batch(backend)
    for start in (None, 0.7, torch.tensor([0.1, -0.2, 0.3]).view(3, 1)):
        learned = fastelbo.ELBOLoss(recon_logvar=start, learned=True, impl=backend.impl).to(backend.device)
        assert [n for n, _ in learned.named_parameters()] == ["recon_logvar"]
        assert isinstance(learned.recon_logvar, nn.Parameter)
        held = 0.0 if start is None else start
        same(learned(*args), truth(args, recon_logvar=held))
        learned(*args).backward()
        reference = torch.as_tensor(held, dtype=torch.float64).clone().requires_grad_()
        slow_loss(*(a.detach().double().cpu() for a in args), recon_logvar=reference).backward()
        same(learned.recon_logvar.grad, reference.grad.float())
    # The caller's tensor is where it starts, not what it is.
    start = torch.zeros(3, 1)
    module = fastelbo.ELBOLoss(recon_logvar=start, learned=True)
    with torch.no_grad():
        module.recon_logvar.add_(1)
    assert torch.equal(start, torch.zeros(3, 1))
    buffered = fastelbo.ELBOLoss(recon_logvar=torch.tensor(0.5), impl=backend.impl).to(backend.device)
    assert not list(buffered.parameters())
    assert buffered.recon_logvar.device.type == backend.device.type
    same(buffered(*args), truth(args, recon_logvar=0.5))
    with pytest.raises(ValueError, match="recon_logvar"):
        buffered(*args, recon_logvar=0.5)
    same(fastelbo.ELBOLoss(impl=backend.impl)(*args, recon_logvar=0.25), truth(args, recon_logvar=0.25))


def test_a_learned_variance_finds_the_data() -> None:
    """The optimum of the learned scalar is the log of the mean squared error: what sigma-VAEs rest on."""
    torch.manual_seed(0)
    x, recon = torch.randn(256, 10), torch.zeros(256, 10)
    x = 0.3 * x
    zero = torch.zeros(256, 1)
    loss = fastelbo.ELBOLoss(learned=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(recon, x, zero, zero).backward()
        optimizer.step()
    assert float(loss.recon_logvar) == pytest.approx(float(x.square().mean().log()), abs=1e-3)


def test_state_dict() -> None:
    learned = fastelbo.ELBOLoss(recon_logvar=torch.randn(3, 1), learned=True)
    held = fastelbo.ELBOLoss(recon_logvar=torch.randn(3, 1))
    for module in (learned, held):
        assert list(module.state_dict()) == ["recon_logvar"]
        other = fastelbo.ELBOLoss(recon_logvar=torch.zeros(3, 1), learned=module is learned)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.recon_logvar, module.recon_logvar)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert torch.equal(again.recon_logvar, module.recon_logvar)
        assert torch.equal(copy.deepcopy(module).recon_logvar, module.recon_logvar)
    assert fastelbo.ELBOLoss(recon_logvar=0.5).state_dict() == {}
    assert fastelbo.ELBOLoss().state_dict() == {}


def test_a_float64_start_is_kept_exact() -> None:
    """A tensor brings its dtype; only numbers take the default one."""
    start = torch.tensor([1 / 3], dtype=torch.float64)
    assert fastelbo.ELBOLoss(recon_logvar=0.5, learned=True).recon_logvar.dtype == torch.get_default_dtype()
    assert torch.equal(fastelbo.ELBOLoss(recon_logvar=start, learned=True).recon_logvar.detach(), start)


def test_module_reprs() -> None:
    assert repr(fastelbo.ELBOLoss(beta=0.5, recon_logvar=-1.0)) == "ELBOLoss(beta=0.5, reduction='batchmean', recon_logvar=-1.0)"
    assert "GaussianNLLLoss(" in repr(fastelbo.GaussianNLLLoss())
    assert "num_samples=3" in repr(fastelbo.Reparameterize(3))
    with pytest.raises(TypeError, match="beta"):
        fastelbo.ELBOLoss(beta="1")  # type: ignore[arg-type]


# ---- Reparameterize --------------------------------------------------------------------------------------------------------------


@each_backend
def test_reparameterize_module(backend: Backend) -> None:
    _, _, mu, logvar = batch(backend)
    for samples in (None, 3):
        sample = fastelbo.Reparameterize(samples, impl=backend.impl)
        eps = torch.randn((4, 2) if samples is None else (3, 4, 2), device=backend.device)
        same(sample(mu, logvar, eps=eps), (mu + torch.exp(logvar / 2) * eps).detach().cpu())
        assert torch.equal(sample(mu, logvar, seed=1), sample(mu, logvar, seed=1))
        sample.eval()
        z = sample(mu, logvar)
        assert torch.equal(z, mu if samples is None else mu.expand(3, 4, 2))
        (g,) = torch.autograd.grad(z.sum(), mu)
        assert torch.equal(g, torch.full_like(mu, samples or 1))
    assert not list(fastelbo.Reparameterize().parameters())


@each_backend
def test_a_training_step(backend: Backend) -> None:
    """A VAE of two linear layers, once with the loss as users write it and once fused: the same loss and the same gradients."""
    torch.manual_seed(1)
    encoder, decoder = nn.Linear(15, 8).to(backend.device), nn.Linear(4, 15).to(backend.device)
    x = torch.rand(6, 15, device=backend.device)
    eps = torch.randn(6, 4, device=backend.device)
    found = []
    for fused in (False, True):
        mu, logvar = encoder(x).chunk(2, 1)
        if fused:
            recon = decoder(fastelbo.Reparameterize(impl=backend.impl)(mu, logvar, eps=eps))
            # mse + KL, both summed and over the batch: the ELBO at a variance of 1/2, except for its constant.
            loss = fastelbo.elbo_loss(recon, x, mu, logvar, recon_logvar=-0.6931471805599453, full=False, impl=backend.impl)
            loss = loss + 0.5 * 15 * 0.6931471805599453
        else:
            recon = decoder(mu + torch.exp(0.5 * logvar) * eps)
            loss = (F.mse_loss(recon, x, reduction="sum") - 0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())) / len(x)
        parameters = [*encoder.parameters(), *decoder.parameters()]
        found.append((loss.detach(), torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


# ---- sgvb_loss: what tests/test_estimators.py does not say -----------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
@each_backend
def test_sgvb_calls_the_decoder_once(backend: Backend, samples: int) -> None:
    shapes: list[Any] = []

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 15)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(z.shape))
            return self.linear(z).view(-1, 3, 5)

    decoder = Decoder().to(backend.device)
    _, x, mu, logvar = batch(backend)
    loss = fastelbo.sgvb_loss(decoder, x, mu, logvar, num_samples=samples, seed=6, impl=backend.impl)
    assert shapes == [(samples * 4, 2)]
    eps = fastelbo.noise.philox_normal((samples, 4, 2), 6).to(backend.device)
    recon = decoder((mu + torch.exp(logvar / 2) * eps).flatten(0, 1)).view(samples, 4, 3, 5)
    want = torch.stack([fastelbo.elbo_loss(r, x, mu, logvar, impl=backend.impl) for r in recon]).mean()
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=0)
    got = torch.autograd.grad(loss, [mu, logvar, x, *decoder.parameters()])
    expected = torch.autograd.grad(want, [mu, logvar, x, *decoder.parameters()])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@each_backend
def test_sgvb_default_noise_is_the_callers_generator(backend: Backend) -> None:
    _, x, mu, logvar = batch(backend)

    def once(**noise: Any) -> torch.Tensor:
        return fastelbo.sgvb_loss(lambda z: z.sum(-1)[:, None, None].expand(-1, 3, 5), x, mu, logvar, impl=backend.impl, **noise)

    torch.manual_seed(3)
    first = once()
    second = once()
    torch.manual_seed(3)
    assert torch.equal(first, once())
    assert not torch.equal(first, second)
    generators = [torch.Generator(backend.device).manual_seed(8) for _ in range(2)]
    assert torch.equal(once(generator=generators[0]), once(generator=generators[1]))


# ---- effective_beta --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [1.0, 0.5, 0.1])
@pytest.mark.parametrize(("of_squares", "of_kl"), list(itertools.product(["mean", "batchmean", "sum"], repeat=2)))
def test_effective_beta_is_the_beta_of_the_loss(of_squares: str, of_kl: str, variance: float) -> None:
    """`mse + w * KL` and the ELBO at that beta and variance have gradients that differ by one factor only."""
    torch.manual_seed(2)
    b, d, j, w = 4, 15, 3, 0.3
    recon, x = (torch.randn(b, d, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mu, logvar = (torch.randn(b, j, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def reduced(total: torch.Tensor, how: str, per_sample: int) -> torch.Tensor:
        return total / {"sum": 1, "batchmean": b, "mean": b * per_sample}[how]

    squares = reduced(((recon - x) ** 2).sum(), of_squares, d)
    kl = reduced(-0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(), of_kl, j)
    users = torch.autograd.grad(squares + w * kl, [recon, x, mu, logvar])
    beta = fastelbo.effective_beta(
        w, elements=d, latents=j, recon_reduction=of_squares, kl_reduction=of_kl, variance=variance, batch_size=b
    )
    loss = fastelbo.elbo_loss(
        recon, x, mu, logvar, recon_logvar=float(torch.tensor(variance, dtype=torch.float64).log()), beta=beta
    )
    ours = torch.autograd.grad(loss, [recon, x, mu, logvar])
    factor = users[0][0, 0] / ours[0][0, 0]
    for u, o in zip(users, ours, strict=True):
        torch.testing.assert_close(u, factor * o, rtol=1e-9, atol=1e-12)


def test_effective_beta_known_cases() -> None:
    """DESIGN's two: mean-MSE is beta = w D / 2 at variance 1; sum-MSE + KL is the ELBO itself at variance 1/2."""
    assert fastelbo.effective_beta(0.01, elements=784) == pytest.approx(3.92)
    assert fastelbo.effective_beta(1.0, elements=784, recon_reduction="sum", kl_reduction="sum", variance=0.5) == pytest.approx(1.0)
    assert fastelbo.effective_beta(1.0, elements=784, recon_reduction="batchmean", variance=0.5) == pytest.approx(1.0)
    assert fastelbo.effective_beta(1.0, elements=100, latents=10, kl_reduction="mean") == pytest.approx(5.0)
