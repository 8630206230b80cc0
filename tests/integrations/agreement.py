"""A training step with a library as it is, patched, and as it is again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fastelbo import autograd

DTYPES = [torch.float32, torch.float64]

Step = Callable[[], dict[str, Tensor]]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that has one, which it then has no longer."""
    found = {f"gradient of {name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the fused operations that are called within."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("call", "call_packed"):
            original = getattr(autograd, name)

            def spy(*args: object, original: Callable[..., object] = original, name: str = name) -> object:
                calls.append(args[0].__name__ if name == "call" else "PackedLatent")
                return original(*args)

            patch.setattr(autograd, name, spy)
        yield calls


def seeded(step: Step) -> tuple[dict[str, Tensor], list[str]]:
    torch.manual_seed(7)
    with counted() as calls:
        return {name: t.detach().clone() for name, t in step().items()}, calls


def check(library: ModuleType, step: Step, operations: set[str]) -> None:
    """Patched, a step gives the library's tensors to rounding, by means of these operations; afterwards it gives the very bits."""
    before, fused = seeded(step)
    assert not fused
    with library.patch():
        patched, fused = seeded(step)
    after, fused_after = seeded(step)
    assert set(fused) == operations
    assert not fused_after
    assert before.keys() == patched.keys() == after.keys()
    largest_gradient = max((t.abs().max().item() for name, t in before.items() if name.startswith("gradient")), default=0.0)
    for name, want in before.items():
        got = patched[name]
        assert got.dtype == want.dtype, name
        # Sums are taken in another order. In a network what that changes spreads from one gradient to the next, and some of them
        # are sums that cancel to nothing.
        eps = torch.finfo(want.dtype).eps
        scale = largest_gradient if name.startswith("gradient") else want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=64 * eps, atol=64 * eps * scale, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(after[name], want), name
