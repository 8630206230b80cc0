"""What the ops here have in common: forward and backward are one function, and gradients that are ready wait for their factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

from fastelbo.dtypes import has_float16
from fastelbo.specs import Gradients, Needs, Op

from .launch import PROGRAMS, TILE, launch
from .tile import narrow


def op_of(run: Callable[..., tuple[tuple[Tensor | None, ...], Gradients]], early: Callable[[Any], bool] = lambda spec: False) -> Op:
    """An op by `run(inputs, spec, needs, grad_outputs)`, which has no `grad_outputs` in a forward pass: (outputs, gradients).

    Where the one output with a gradient is a total (`early`), forward computes the gradients too, for an upstream gradient of 1.
    A float16 gradient written before GradScaler's factor is known, and already divided by the batch, would underflow.
    """

    def is_early(inputs: Any, spec: Any, needs: Needs) -> bool:
        return early(spec) and any(needs) and not has_float16(inputs[: len(needs)])

    def forward(inputs: Any, spec: Any, needs: Needs) -> tuple[tuple[Tensor | None, ...], Gradients | None]:
        if is_early(inputs, spec, needs):
            return run(inputs, spec, needs, None)
        return run(inputs, spec, (False,) * len(needs), None)[0], None

    def backward(inputs: Any, spec: Any, grads: Gradients, needs: Needs, kept: Gradients | None, **options: Any) -> Gradients:
        # A later pass makes them as the first did: otherwise the two would differ in their last bits.
        if kept is None and is_early(inputs, spec, needs):
            kept = run(inputs, spec, needs, None)[1]
        if kept is not None:
            return _scale_gradients(kept, grads[0])
        return run(inputs, spec, needs, grads, **options)[1]

    return Op(forward, backward)


# Buffers that one launch scales, at most: the gradients of an ELBO.
_SCALED = 7


def _scale_gradients(gradients: Sequence[Tensor | None], grad_output: Tensor) -> Gradients:
    """Multiply gradients that nobody has seen yet by the upstream scalar, in place and without reading it on the host."""
    given = [g for g in gradients if g is not None]
    for start in range(0, len(given), _SCALED):
        some = given[start : start + _SCALED]
        counts = [g.numel() for g in some]
        programs = min(PROGRAMS, max(1, -(-max(counts) // TILE)))
        unused = (0,) * (_SCALED - len(some))
        launch(scale_kernel, programs, grad_output.device, (tuple(some), *counts, *unused, grad_output, TILE))
    return tuple(gradients)


@triton.jit(do_not_specialize=[f"n{i}" for i in range(_SCALED)])
def scale_kernel(gradients, n0, n1, n2, n3, n4, n5, n6, grad_output, BLOCK: tl.constexpr):
    """Multiply dense buffers of n0, n1, ... elements by a scalar, unless it is 1."""
    factor = tl.load(grad_output)
    counts = (n0, n1, n2, n3, n4, n5, n6)
    if factor != 1.0:
        for i in tl.static_range(len(gradients)):
            _scale(gradients[i], counts[i], factor, BLOCK)


@triton.jit
def _scale(gradient, count, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    whole = count // BLOCK
    for block in range(tl.program_id(0), whole, tl.num_programs(0)):
        here = gradient + core.to_tensor(block).to(tl.int64) * BLOCK + at
        tl.store(here, narrow(tl.load(here).to(factor.dtype) * factor, gradient))
    if tl.program_id(0) == whole % tl.num_programs(0):
        here = gradient + core.to_tensor(whole).to(tl.int64) * BLOCK + at
        mask = at < count - whole * BLOCK
        tl.store(here, narrow(tl.load(here, mask, other=0.0).to(factor.dtype) * factor, gradient), mask)
