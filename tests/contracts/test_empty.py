"""Tensors without elements, and tensors without dimensions."""

from __future__ import annotations

import math

import pytest
import torch
from cases import OPS, Backend, assert_close, each_backend, leaves, run

import fastelbo


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 0), (4, 0, 16), (0,)])
@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_empty(backend: Backend, name: str, shape: tuple[int, ...]) -> None:
    """Sums over nothing are 0, means over nothing NaN (as torch's are), and gradients are empty or 0."""
    op = OPS[name]
    tensors = {n: torch.zeros(shape) for n in op.names}
    for reduction in ["none", "sum", "mean", "batchmean"] if "reduction" in op.options else [None]:
        options = {} if reduction is None else {"reduction": reduction}
        outs, grads = run(lambda v, o=options: op.fast(v, backend.impl, **o), leaves(tensors, device=backend.device))
        loss = outs[-1]
        if reduction == "sum":
            assert loss.ndim == 0
            assert float(loss) == 0.0
        elif reduction == "none":
            assert torch.equal(loss.cpu(), torch.zeros(shape[0]))
        elif reduction == "mean" or (reduction == "batchmean" and shape[0] == 0):
            assert bool(loss.isnan())
        elif reduction == "batchmean":
            assert float(loss) == 0.0
        for n, g in grads.items():
            assert g is not None, n
            assert g.shape == tensors[n].shape


@pytest.mark.parametrize("shape", [(0, 16), (4, 0)])
@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_a_batch_without_samples_from_one_tensor(backend: Backend, name: str, shape: tuple[int, ...]) -> None:
    """All inputs come from one leaf, by operations, as an encoder's outputs do; backward twice."""
    leaf = torch.zeros(shape, device=backend.device, requires_grad=True)
    out = OPS[name].fast({n: leaf.detach() if n == "eps" else leaf * 1 for n in OPS[name].names}, backend.impl)
    total = sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()
    for _ in range(2):
        (slope,) = torch.autograd.grad(total, leaf, retain_graph=True)
        assert slope.shape == shape


@each_backend
def test_no_dimensions(backend: Backend) -> None:
    """0-d tensors are legal where no batch is asked for."""
    v = {n: torch.tensor(k, device=backend.device, requires_grad=True) for n, k in (("mu", 0.5), ("logvar", -0.3))}
    kl = fastelbo.gaussian_kl(v["mu"], v["logvar"], batch_dims=0, impl=backend.impl)
    nll = fastelbo.gaussian_nll(v["mu"], v["logvar"], batch_dims=0, impl=backend.impl)
    z = fastelbo.reparameterize(v["mu"], v["logvar"], eps=torch.tensor(2.0, device=backend.device), impl=backend.impl)
    assert_close(kl, torch.tensor(0.5 * (0.25 + math.expm1(-0.3) + 0.3), dtype=torch.float64), "kl")
    assert_close(nll, torch.tensor(0.5 * (math.log(2 * math.pi) + 0.64), dtype=torch.float64), "nll")
    assert_close(z, torch.tensor(0.5 + 2 * math.exp(-0.15), dtype=torch.float64), "z")
    mu, logvar = torch.autograd.grad(kl + nll + z, list(v.values()))
    assert_close(mu, torch.tensor(0.5 + 0.8 + 1.0, dtype=torch.float64), "mu")
    assert_close(logvar, torch.tensor(0.5 * math.expm1(-0.3) - 0.8 + math.exp(-0.15), dtype=torch.float64), "logvar")
