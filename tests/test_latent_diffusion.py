"""AutoencoderKLLoss against the expression of latent-diffusion code, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS, Backend
from torch import Tensor, nn

import fastelbo

BATCH, SIZE = 3, 5


class Perceptual(nn.Module):
    """Stands for LPIPS: a distance with weights of its own, of one of the shapes that such distances have."""

    def __init__(self, shape: str):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.5, 1.5, 1.0]))
        self.shape = shape

    def forward(self, x: Tensor, recon: Tensor) -> Tensor:
        each = (self.weights[:, None, None] * (x - recon).tanh() ** 2).sum(1, keepdim=True)
        if self.shape == "map":
            return each
        means = each.mean((1, 2, 3), keepdim=True)
        return means if self.shape == "(batch, 1, 1, 1)" else means.flatten()


class Setting:
    """An autoencoder's last layers, a discriminator and their inputs."""

    def __init__(self, backend: Backend, dtype: torch.dtype, perceptual: str | None = None):
        generator = torch.Generator().manual_seed(2)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(backend.device, dtype)

        torch.manual_seed(3)
        self.h = randn(BATCH, 4, SIZE, SIZE).requires_grad_()
        self.x = randn(BATCH, 3, SIZE, SIZE).requires_grad_()
        self.moments = randn(BATCH, 4, 2, 2).requires_grad_()
        self.decoder = nn.Conv2d(4, 3, 3, padding=1).to(backend.device, dtype)
        self.discriminator = nn.Conv2d(3, 1, 3).to(backend.device, dtype)
        self.perceptual = None if perceptual is None else Perceptual(perceptual).to(backend.device, dtype)
        self.weight = torch.tensor([0.5, 2.0, 1.25], dtype=dtype, device=backend.device)

    def leaves(self, logvar: Tensor) -> list[Tensor]:
        learned = [] if self.perceptual is None else list(self.perceptual.parameters())
        return [self.h, self.x, self.moments, logvar, *self.decoder.parameters(), *learned]

    def kl(self) -> Tensor:
        mean, logvar = self.moments.chunk(2, 1)
        return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3))


def written_out(
    setting: Setting, logvar: Tensor, likelihood: str, weight: Tensor | None, divisors: tuple[float, float] = (BATCH, BATCH)
) -> list[Tensor]:
    """loss, nll, kl, adaptive weight, and all gradients of the loss of the generator."""
    recon = setting.decoder(setting.h)
    rec = (setting.x - recon).abs() if likelihood == "l1" else (setting.x - recon) ** 2
    if setting.perceptual is not None:
        p = setting.perceptual(setting.x, recon)
        rec = rec + 0.7 * (p if p.ndim == 4 else p[:, None, None, None])
    nll = rec / torch.exp(logvar) + logvar
    weighted = nll if weight is None else weight[:, None, None, None] * nll
    nll, weighted = nll.sum() / divisors[0], weighted.sum() / divisors[0]
    kl = setting.kl().sum() / divisors[1]
    g_loss = -setting.discriminator(recon).mean()
    last = setting.decoder.weight
    norms = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (nll, g_loss)]
    d_weight = 0.8 * (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()
    loss = weighted + 0.01 * kl
    return [loss, nll, kl, d_weight, *torch.autograd.grad(loss + d_weight * g_loss, setting.leaves(logvar))]


def ours(setting: Setting, loss_fn: fastelbo.AutoencoderKLLoss, **options: Any) -> list[Tensor]:
    recon = setting.decoder(setting.h)
    loss, nll, kl = loss_fn(recon, setting.x, setting.kl(), **options)
    g_loss = -setting.discriminator(recon).mean()
    d_weight = loss_fn.adaptive_weight(nll, g_loss, setting.decoder.weight)
    assert not d_weight.requires_grad
    return [loss, nll, kl, d_weight, *torch.autograd.grad(loss + d_weight * g_loss, setting.leaves(loss_fn.logvar))]


def make(setting: Setting, backend: Backend, likelihood: Any, dtype: torch.dtype, **options: Any) -> fastelbo.AutoencoderKLLoss:
    loss_fn = fastelbo.AutoencoderKLLoss(
        likelihood=likelihood, logvar=0.3, kl_weight=0.01, perceptual_loss=setting.perceptual, perceptual_weight=0.7,
        disc_weight=0.8, impl=backend.impl, **options,
    )  # fmt: skip
    return loss_fn.to(backend.device, dtype)


def assert_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    # Gradients go through a convolution, and are sums of some hundred terms of both signs.
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, i=i: f"result {i}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("perceptual", [None, "(batch, 1, 1, 1)", "(batch,)", "map"])
@pytest.mark.parametrize("likelihood", ["l1", "l2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_expression(
    backend: Backend, likelihood: str, perceptual: str | None, weighted: bool, dtype: torch.dtype
) -> None:
    setting = Setting(backend, dtype, perceptual)
    loss_fn = make(setting, backend, likelihood, dtype)
    weight = setting.weight if weighted else None
    assert_close(ours(setting, loss_fn, weight=weight), written_out(setting, loss_fn.logvar, likelihood, weight), dtype)


@pytest.mark.parametrize("likelihood", ["l1", "l2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_divisors(backend: Backend, likelihood: str) -> None:
    setting = Setting(backend, torch.float64)
    loss_fn = make(setting, backend, likelihood, torch.float64)
    want = written_out(setting, loss_fn.logvar, likelihood, setting.weight, (24, 2.5))
    assert_close(ours(setting, loss_fn, weight=setting.weight, nll_divisor=24, kl_divisor=2.5), want, torch.float64)


def test_videos_have_more_frames_than_posteriors() -> None:
    """Two videos of three frames, whose KL is of each video and each column, as diffusers returns it."""
    recon, x, kl = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), torch.rand(2, 5)
    loss, nll, kl_loss = fastelbo.AutoencoderKLLoss(kl_weight=0.5)(recon, x, kl)
    torch.testing.assert_close(nll, (recon - x).abs().sum() / 6)
    torch.testing.assert_close(kl_loss, kl.sum() / 2)
    torch.testing.assert_close(loss, nll + 0.5 * kl_loss)


def test_gradients_accumulate() -> None:
    backend = Backend("torch", torch.device("cpu"))
    setting = Setting(backend, torch.float64, "map")
    loss_fn = make(setting, backend, "l1", torch.float64)
    first, second = setting.weight, setting.weight.flip(0)
    want = [written_out(setting, loss_fn.logvar, "l1", weight)[4:] for weight in (first, second)]
    leaves = setting.leaves(loss_fn.logvar)
    for weight in (first, second):
        recon = setting.decoder(setting.h)
        loss, nll, _ = loss_fn(recon, setting.x, setting.kl(), weight=weight)
        g_loss = -setting.discriminator(recon).mean()
        (loss + loss_fn.adaptive_weight(nll, g_loss, setting.decoder.weight) * g_loss).backward()
    assert_close([leaf.grad for leaf in leaves], [a + b for a, b in zip(*want, strict=True)], torch.float64)


@pytest.mark.parametrize("likelihood", ["l1", "l2"])
def test_autocast(likelihood: str) -> None:
    backend = Backend("torch", torch.device("cpu"))
    setting = Setting(backend, torch.float32)
    loss_fn = make(setting, backend, likelihood, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        recon = setting.decoder(setting.h)
        assert recon.dtype == torch.bfloat16
        loss, nll, kl = loss_fn(recon, setting.x, setting.kl())
        g_loss = -setting.discriminator(recon).mean()
        d_weight = loss_fn.adaptive_weight(nll, g_loss, setting.decoder.weight)
    assert {t.dtype for t in (loss, nll, kl, d_weight)} == {torch.float32}
    # The loss itself is computed in float32 from what the decoder returned.
    d = (setting.x - recon.float()).abs()
    rec = d if likelihood == "l1" else d**2
    torch.testing.assert_close(nll, (rec * torch.exp(-loss_fn.logvar) + loss_fn.logvar).sum() / BATCH)
    (loss + d_weight * g_loss).backward()
    torch.testing.assert_close(loss_fn.logvar.grad, (1 - rec * torch.exp(-loss_fn.logvar)).sum() / BATCH)


@pytest.mark.parametrize("likelihood", ["l1", "l2"])
def test_compiled(likelihood: str) -> None:
    backend = Backend("torch", torch.device("cpu"))
    setting = Setting(backend, torch.float64, "(batch, 1, 1, 1)")
    loss_fn = make(setting, backend, likelihood, torch.float64)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    recon = setting.decoder(setting.h)
    results: list[list[Tensor]] = []
    for function in (loss_fn, compiled):
        call: Callable[..., tuple[Tensor, Tensor, Tensor]] = function
        out = call(recon, setting.x, setting.kl(), weight=setting.weight)
        results.append([*out, *torch.autograd.grad(out[0], setting.leaves(loss_fn.logvar), retain_graph=True)])
    assert_close(results[1], results[0], torch.float64)


def test_the_adaptive_weight_is_bounded() -> None:
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    loss_fn = fastelbo.AutoencoderKLLoss(disc_weight=0.5)
    # |d nll| = 2 |last| = 10; the generator's loss has the gradient (0, 0) or (1e-9, 0), and 10 / 1e-4 is above 1e4.
    for scale in (0.0, 1e-9):
        assert loss_fn.adaptive_weight(last.square().sum(), (scale * last)[0], last).item() == 0.5e4
    assert loss_fn.adaptive_weight((0 * last).sum(), last.sum(), last).item() == 0


def test_checkpoints_and_optimizers_see_the_logvar() -> None:
    loss_fn = fastelbo.AutoencoderKLLoss(logvar=-1.5)
    assert {name: p.item() for name, p in loss_fn.state_dict().items()} == {"logvar": -1.5}
    assert [p.requires_grad for p in loss_fn.parameters()] == [True]
    fixed = fastelbo.AutoencoderKLLoss(learn_logvar=False)
    fixed.load_state_dict(loss_fn.state_dict())
    assert [(p.item(), p.requires_grad) for p in fixed.parameters()] == [(-1.5, False)]
    assert repr(fixed) == "AutoencoderKLLoss(likelihood='l1', kl_weight=1e-06)"


T = torch.zeros(2, 3, 4, 4)
WRONG: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], str]] = {
    "likelihood": ({"likelihood": "l3"}, (), {}, "likelihood must be 'l1' or 'l2', got 'l3'"),
    "logvar": ({"logvar": torch.zeros(1)}, (), {}, "logvar must be a number, got Tensor"),
    "learn_logvar": ({"learn_logvar": 1}, (), {}, "learn_logvar must be a bool, got int"),
    "kl_weight": ({"kl_weight": True}, (), {}, "kl_weight must be a number, got bool"),
    "perceptual_loss": ({"perceptual_loss": 1.0}, (), {}, "perceptual_loss must be a function of .x, recon. or None, got float"),
    "impl": ({"impl": "cuda"}, (), {}, "impl"),
    "perceptual": (
        {"perceptual_loss": lambda x, recon: (x - recon).sum()}, (T, T, T), {}, r"each of the 2 samples, got shape \(\)",
    ),
    "x": ({}, (T, T[:1], T), {}, "x has shape"),
    "kl": ({}, (T, T, T.sum()), {}, "kl must have a batch dimension"),
    "integer kl": ({}, (T, T, T.int()), {}, "kl must be float16, bfloat16, float32 or float64, got torch.int32"),
    "weight": ({}, (T, T, T), {"weight": torch.ones(2, 1, 1, 1)}, r"weight has shape \(2, 1, 1, 1\), which does not broadcast"),
    "nll_divisor": ({}, (T, T, T), {"nll_divisor": "2"}, "nll_divisor must be a number, got str"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    options, args, keywords, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        fastelbo.AutoencoderKLLoss(**options)(*args, **keywords)
