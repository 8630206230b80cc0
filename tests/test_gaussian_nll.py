"""`gaussian_nll`: forms and shapes of the variance."""

from __future__ import annotations

import pytest
import torch
from cases import CPU, PATTERNS, Backend, broadcast_shape, check, draw, each_backend, make, slow_nll
from settings import compare

import fastelbo
from fastelbo.eager import walk


@pytest.mark.parametrize("form", ["logvar", "std", "var"])
@pytest.mark.parametrize("pattern", PATTERNS)
@each_backend
def test_variance_patterns(backend: Backend, pattern: str, form: str) -> None:
    for options in ({"reduction": "mean"}, {"batch_dims": 1}, {"batch_dims": 2}):
        compare(f"gaussian_nll_{form}", backend, "contiguous", "float32", options, patterns={form: pattern})
    compare(f"gaussian_nll_{form}", backend, "5d", "float32", {"batch_dims": 2}, patterns={form: pattern}, weight="weight:pixel")


@pytest.mark.parametrize("form", ["logvar", "std", "var"])
@pytest.mark.parametrize("pattern", ["row2", "sample", "dim", "element", "0d"])
@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3, 4])
def test_in_blocks_by_batch_dims(batch_dims: int, pattern: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense inputs with two or more batch dimensions: blocks see them as one."""
    monkeypatch.setattr(walk, "RUN", 16)
    tensors = make(["recon", "x"], "5d", seed=3)
    tensors = {k: v.reshape(4, 3, 2, 3) for k, v in tensors.items()}
    spread = draw(form, broadcast_shape(pattern, (4, 3, 2, 3)), torch.Generator().manual_seed(4)).float()
    check(
        lambda v: fastelbo.gaussian_nll(v["recon"], v["x"], **{form: v[form]}, batch_dims=batch_dims, impl="torch"),
        lambda v: slow_nll(v["recon"], v["x"], **{form: v[form]}, batch_dims=batch_dims),
        {**tensors, form: spread},
        Backend("torch", CPU),
    )


@pytest.mark.parametrize("pattern", ["0d", "channel", "sample"])
@each_backend
def test_shared_variance_of_nothing_has_no_gradient(backend: Backend, pattern: str) -> None:
    for shape in [(0, 3), (3, 0)]:
        recon = torch.zeros(shape, device=backend.device)
        spread = torch.ones(broadcast_shape(pattern, shape), device=backend.device, requires_grad=True)
        fastelbo.gaussian_nll(recon, recon, logvar=spread, reduction="sum", impl=backend.impl).backward()
        assert spread.grad is not None
        assert torch.equal(spread.grad, torch.zeros_like(spread))


@pytest.mark.parametrize("value", [-75.0, 75.0])
@each_backend
def test_one_extreme_learned_log_variance(backend: Backend, value: float) -> None:
    recon, x = (torch.randn(3, 5).to(backend.device) for _ in range(2))
    logvar = torch.tensor(value, device=backend.device, requires_grad=True)
    wide = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    fastelbo.gaussian_nll(recon, x, logvar=logvar, reduction="sum", impl=backend.impl).backward()
    fastelbo.gaussian_nll(recon.cpu().double(), x.cpu().double(), logvar=wide, reduction="sum", impl="reference").backward()
    torch.testing.assert_close(logvar.grad.cpu().double(), wide.grad, rtol=1e-5, atol=0)
