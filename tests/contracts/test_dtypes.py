"""What is computed and returned in which dtype."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CPU, Backend, assert_close, each_backend, leaves, make
from settings import compare

import fastelbo
from fastelbo.eager import walk


@each_backend
def test_half_precision_does_not_overflow(backend: Backend) -> None:
    """exp(15) and sums over 4 x 64 x 64 latents both leave float16's range; the arithmetic is float32's."""
    side = 64 if backend.impl != "triton" or backend.device != CPU else 32
    mu = torch.zeros(1, 4, side, side, dtype=torch.float16)
    for level in (15.0, -17.0):
        tensors = {"mu": mu, "logvar": torch.full_like(mu, level), "eps": torch.full_like(mu, 0.5)}
        mine = leaves(tensors, device=backend.device)
        kl = fastelbo.gaussian_kl(mine["mu"], mine["logvar"], impl=backend.impl)
        assert_close(
            kl, torch.tensor([mu.numel() * 0.5 * (math.expm1(level) - level)], dtype=torch.float64), "kl", dtype=torch.float32
        )
        z = fastelbo.reparameterize(mine["mu"], mine["logvar"], eps=mine["eps"], impl=backend.impl)
        assert_close(z, 0.5 * torch.exp(0.5 * tensors["logvar"].double()), "z", dtype=torch.float16)
    x = torch.full((1, 4, side, side), 40.0, dtype=torch.float16, device=backend.device)
    nll = fastelbo.gaussian_nll(-x, x, logvar=-9.0, full=False, impl=backend.impl)
    assert_close(nll, torch.tensor([x.numel() * 0.5 * (6400 * math.exp(9) - 9)], dtype=torch.float64), "nll", dtype=torch.float32)


@pytest.mark.parametrize("block", [16, 1 << 17])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each_backend
def test_weight_dtype_does_not_decide_the_result_dtype(
    backend: Backend, reduction: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float64 weight beside float32 inputs: the same dtype whatever the size and the backend."""
    monkeypatch.setattr(walk, "RUN", block)
    t = make(["recon", "x", "mu", "logvar"], "contiguous")
    for dtype in (torch.float64, torch.float16):
        w = make(["weight"], "contiguous", seed=2)["weight"].to(dtype)
        v = leaves({**t, "weight": w}, device=backend.device)
        for out in (
            fastelbo.gaussian_nll(v["recon"], v["x"], weight=v["weight"], reduction=reduction, impl=backend.impl),
            fastelbo.gaussian_kl(v["mu"], v["logvar"], weight=v["weight"], reduction=reduction, impl=backend.impl),
            fastelbo.elbo_loss(
                v["recon"], v["x"], v["mu"], v["logvar"], weight=v["weight"], reduction=reduction, impl=backend.impl
            ),
        ):
            assert out.dtype == torch.float32
        compare("elbo_loss", backend, "contiguous", "float32", {"reduction": reduction}, weight="weight:element")


@pytest.mark.parametrize("half", ["recon", "mu"])
@each_backend
def test_gradients_in_bfloat16_beside_float64_are_scaled(backend: Backend, half: str) -> None:
    """The loss writes them for an upstream gradient of 1, and another one multiplies them afterwards."""
    wide, narrow = torch.float64, torch.bfloat16
    shapes = {"recon": (2, 5), "x": (2, 5), "mu": (2, 3), "logvar": (2, 3)}
    v = {name: torch.ones(shape, dtype=narrow if name == half else wide, device=backend.device) for name, shape in shapes.items()}
    v["x"] = 0 * v["x"]
    v[half].requires_grad_()
    loss = fastelbo.elbo_loss(**v, reduction="sum", impl=backend.impl)
    (slope,) = torch.autograd.grad(1.5 * loss, v[half])
    assert bool((slope == 1.5).all())
