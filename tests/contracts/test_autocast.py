"""No result depends on whether autocast is on, around the forward pass or around the backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPS, Backend, each_backend, leaves, make
from torch import Tensor

import fastelbo


def products(impl: str) -> dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]]:
    return {
        "linear_gaussian_nll": (
            lambda h, w, x, b: fastelbo.linear_gaussian_nll(h, w, x, b, reduction="mean", impl=impl),
            [(8, 5), (6, 5), (8, 6), (6,)],
        ),
        "linear_gaussian_nll, rows": (
            lambda h, w, x, b: fastelbo.linear_gaussian_nll(h, w, x, b, impl=impl),
            [(8, 5), (6, 5), (8, 6), (6,)],
        ),
        "linear_elbo_loss": (
            lambda x, m, s, w: fastelbo.linear_elbo_loss(x, m, s, w, seed=3, impl=impl),
            [(8, 6), (8, 5), (8, 5), (6, 5)],
        ),
        "linear_elbo_loss, samples": (
            lambda x, m, s, w: fastelbo.linear_elbo_loss(x, m, s, w, seed=3, num_samples=2, impl=impl),
            [(8, 6), (8, 5), (8, 5), (6, 5)],
        ),
    }


def assert_the_same(
    call: Callable[..., Any], inputs: list[Tensor], device: str, backwards: tuple[bool, ...] = (False, True)
) -> None:
    found = []
    for forward, backward in itertools.product((False, True), backwards):
        with torch.autocast(device, torch.bfloat16, enabled=forward):
            outs = call(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        with torch.autocast(device, torch.bfloat16, enabled=backward):
            grads = [
                torch.autograd.grad(
                    outs, [t for t in inputs if t.requires_grad], [torch.ones_like(o) for o in outs], retain_graph=more
                )
                for more in (True, False)
            ]
        found.append([*outs, *grads[0], *grads[1]])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", list(products("torch")))
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_products_across_a_layer(name: str, impl: str, device: torch.device) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
    call, shapes = products(impl)[name]
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    # The reference is differentiated by autograd, whose products follow autocast.
    assert_the_same(call, inputs, device.type, (False,) if impl == "reference" else (False, True))


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_every_op(backend: Backend, name: str) -> None:
    v = leaves(make(OPS[name].names, "contiguous", seed=5), device=backend.device, dtype=torch.float32)

    def call(*tensors: Tensor) -> Any:
        return OPS[name].fast(dict(zip(v, tensors, strict=True)), backend.impl)

    assert_the_same(call, list(v.values()), backend.device.type)
