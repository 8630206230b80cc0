"""Deterministic sums: programs write partials, and one small launch adds them up in a fixed order, in float64.

A last-block reduction would save that launch at the price of a counter, a barrier and an order that needs proof on every target;
a second launch of one program is ordered by the stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TYPES, Fold, launch, narrow, read, scalar

# Where a tile's values go: nowhere; into one partial sum a program; one a row and chunk of columns; one a column and group of rows;
# or each to its own element.
NOTHING, TOTAL, ROWS, COLS, EACH = (tl.constexpr(i) for i in range(5))

_REDUCE = 1024


class Segments(NamedTuple):
    """out[k] = scale * sum over o, i of parts[o, k, i], for parts of shape (outer, kept, inner), row-major."""

    parts: Tensor
    out: Tensor
    outer: int
    kept: int
    inner: int
    scale: float | Tensor = 1.0
    step: int = 1  # stride of out


@triton.jit
def _segment(pid, parts, out, outer, kept, inner, step, BK: tl.constexpr, BR: tl.constexpr):
    """Sums of BK neighbouring segments, in float64. Returns (sums, pointers, mask)."""
    k = pid * BK + tl.arange(0, BK)
    total = tl.zeros((BR, BK), tl.float64)
    count = outer * inner
    for start in range(0, count, BR):
        r = start + tl.arange(0, BR)
        at = (r // inner).to(tl.int64)[:, None] * (kept * inner) + k.to(tl.int64)[None, :] * inner + (r % inner)[:, None]
        total += tl.load(parts + at, (r < count)[:, None] & (k < kept)[None, :], other=0.0).to(tl.float64)
    return tl.sum(total, 0), out + k.to(tl.int64) * step, k < kept


@triton.jit(
    do_not_specialize=[
        "a_outer", "a_kept", "a_inner", "a_step", "b_outer", "b_kept", "b_inner", "b_step", "v_outer", "v_kept", "v_inner", "v_step"
    ]
)  # fmt: skip
def finish_kernel(
    a, a_out, a_outer, a_kept, a_inner, a_step, a_scale, b, b_out, b_outer, b_kept, b_inner, b_step, b_scale,
    v, v_out, v_outer, v_kept, v_inner, v_step, v_scale, loss, beta,
    A_BK: tl.constexpr, B_BK: tl.constexpr, V_BK: tl.constexpr, REDUCE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Up to three families of segments; with `loss`, a and b are totals and the first program also stores a + beta * b."""
    pid = tl.program_id(0)
    a_programs = 0
    b_programs = 0
    if a is not None:
        a_programs = tl.cdiv(a_kept, A_BK)
    if b is not None:
        if loss is None:
            b_programs = tl.cdiv(b_kept, B_BK)
    if a is not None:
        if pid < a_programs:
            sums, at, live = _segment(pid, a, a_out, a_outer, a_kept, a_inner, a_step, A_BK, REDUCE // A_BK)
            first = (sums * read(a_scale, ACC).to(tl.float64)).to(ACC)
            tl.store(at, first, live)
            if loss is not None:
                sums, at, live = _segment(0, b, b_out, b_outer, b_kept, b_inner, b_step, B_BK, REDUCE // B_BK)
                second = (sums * read(b_scale, ACC).to(tl.float64)).to(ACC)
                tl.store(at, second, live)
                tl.store(loss + tl.arange(0, A_BK), first + read(beta, ACC) * second)
    if b is not None:
        if loss is None:
            if (pid >= a_programs) & (pid < a_programs + b_programs):
                sums, at, live = _segment(pid - a_programs, b, b_out, b_outer, b_kept, b_inner, b_step, B_BK, REDUCE // B_BK)
                tl.store(at, narrow((sums * read(b_scale, ACC).to(tl.float64)).to(ACC), b_out), live)
    if v is not None:
        if pid >= a_programs + b_programs:
            rank = pid - a_programs - b_programs
            sums, at, live = _segment(rank, v, v_out, v_outer, v_kept, v_inner, v_step, V_BK, REDUCE // V_BK)
            tl.store(at, narrow((sums * read(v_scale, ACC).to(tl.float64)).to(ACC), v_out), live)


def finish(
    acc: torch.dtype,
    a: Segments | None = None,
    b: Segments | None = None,
    v: Segments | None = None,
    loss: Tensor | None = None,
    beta: float | Tensor = 1.0,
) -> None:
    """Add partials up in one launch: the terms `a` (and, with `loss`, `b`) into tensors of dtype acc, gradients into their own."""
    args: list[object] = []
    blocks, programs = [], 0
    for s in (a, b, v):
        # Few long segments are read along themselves; many short ones side by side.
        block = 1 if s is None or s.kept == 1 or s.inner >= 64 else 16
        blocks.append(block)
        if s is None:
            args += [None, None, 0, 0, 0, 0, 0.0]
        else:
            args += [s.parts, s.out, s.outer, s.kept, s.inner, s.step, scalar(s.scale, acc, s.parts.device)]
            if not (s is b and loss is not None):
                programs += -(-s.kept // block)
    if not programs:
        return
    device = next(s for s in (a, b, v) if s is not None).parts.device
    launch(finish_kernel, programs, device, *args, loss, scalar(beta, acc, device), *blocks, _REDUCE, TYPES[acc])


def sums(
    f: Fold, shape: torch.Size, scale: float | Tensor, programs: int, acc: torch.dtype, device: torch.device
) -> tuple[tl.constexpr, Tensor, Segments | None, Tensor]:
    """The sink, its buffer, what remains to be added up, and the result for sums of `shape` over the tiles of a launch."""
    out = torch.empty(shape, dtype=acc, device=device)
    if not shape:
        parts = torch.empty(programs, dtype=acc, device=device)
        return TOTAL, parts, Segments(parts, out, 1, 1, programs, scale), out
    inner = f.per_out * f.chunks
    if inner == 1:
        return ROWS, out, None, out
    parts = torch.empty(f.rows * f.chunks, dtype=acc, device=device)
    return ROWS, parts, Segments(parts, out, 1, f.rows // f.per_out, inner, scale), out
