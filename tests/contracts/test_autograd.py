"""Derivatives of every function against finite differences, under a retained graph, and of each input alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import OPS, TORCH, Backend, each_backend, leaves, make, run
from settings import FUNCTIONS, arguments
from torch.autograd import gradcheck, gradgradcheck

# ---- finite differences ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FUNCTIONS))
@each_backend
def test_gradcheck(backend: Backend, name: str) -> None:
    fn, names = FUNCTIONS[name]
    # The fast mode checks a random projection of the Jacobian: two evaluations where the interpreter makes each one slow.
    assert gradcheck(lambda *t: fn(backend.impl, *t), arguments(names, backend.device), fast_mode=backend.truncates)


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("backend", [TORCH])
def test_gradgradcheck(backend: Backend, name: str) -> None:
    """Double backward goes through the reference whatever the backend, so that one backend will do."""
    fn, names = FUNCTIONS[name]
    assert gradgradcheck(lambda *t: fn(backend.impl, *t), arguments(names, backend.device))


@pytest.mark.parametrize("name", list(FUNCTIONS))
@each_backend
def test_create_graph_gives_the_same_first_derivative(backend: Backend, name: str) -> None:
    fn, names = FUNCTIONS[name]
    inputs = [t.detach().float().requires_grad_() for t in arguments(names, backend.device)]

    def grads(create_graph: bool) -> Any:
        out = fn(backend.impl, *inputs)
        total = sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()
        return torch.autograd.grad(3 * total, inputs, create_graph=create_graph)

    for name_, plain, graphed in zip(names, grads(False), grads(True), strict=True):
        torch.testing.assert_close(graphed, plain, rtol=1e-5, atol=1e-5, msg=lambda m, n=name_: f"{n}: {m}")


# ---- more than one backward, and each input alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_a_second_backward_gives_the_same_bits(backend: Backend, name: str, reduction: str, dtype: torch.dtype) -> None:
    """Or gradcheck calls the function not reentrant: the gradients that forward has ready are made once more as they were."""
    op = OPS[name]
    v = leaves(make(op.names, "contiguous", seed=5), device=backend.device, dtype=dtype)
    outs = op.fast(v, backend.impl, **({"reduction": reduction} if "reduction" in op.options else {}))
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    asked = [t for t in v.values() if t.requires_grad]
    ups = [torch.linspace(0.3, 1.7, max(1, o.numel()), dtype=o.dtype, device=o.device).view(o.shape) for o in outs]
    first, second, third = (torch.autograd.grad(outs, asked, ups, retain_graph=True) for _ in range(3))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_retain_graph_for_every_op(backend: Backend, name: str) -> None:
    """A second backward of the same graph with three times the upstream gives three times the gradient."""
    op = OPS[name]
    v = leaves(make(op.names, "columns", seed=5), device=backend.device)
    outs = op.fast(v, backend.impl)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    asked = [t for t in v.values() if t.requires_grad]
    first = torch.autograd.grad(outs, asked, [torch.ones_like(o) for o in outs], retain_graph=True)
    second = torch.autograd.grad(outs, asked, [torch.full_like(o, 3.0) for o in outs])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, 3 * a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_each_input_alone(backend: Backend, name: str) -> None:
    op = OPS[name]
    values = make(op.names, "columns", seed=5)
    every = run(lambda t: op.fast(t, backend.impl), leaves(values, device=backend.device))[1]
    for n in every:
        alone = run(lambda t: op.fast(t, backend.impl), leaves(values, [n], backend.device))[1]
        assert set(alone) == {n}
        torch.testing.assert_close(alone[n], every[n], rtol=1e-6, atol=1e-6)
