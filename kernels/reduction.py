"""Deterministic sums: programs write partials, and one small launch adds them up in a fixed order, in float64.

A last-block reduction would save that launch at the price of a counter, a barrier and an order that needs proof on every target;
a second launch of one program is ordered by the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastelbo.specs import Factor

from .launch import TYPES, Fold, launch, narrow, read, scalar

# Where a tile's values go: nowhere; into one partial sum a program; one a row and chunk of columns; one a column and group of rows;
# or each to its own element.
NOTHING, TOTAL, ROWS, COLS, EACH = (tl.constexpr(i) for i in range(5))

_REDUCE = 1024
# Families that one launch adds up, at most.
_FAMILIES = 3


class Segments(NamedTuple):
    """out[k] = scale * sum over o, i of parts[o, k, i], for parts of shape (outer, kept, inner), row-major."""

    parts: Tensor
    out: Tensor
    outer: int
    kept: int
    inner: int
    scale: Factor = 1.0
    step: int = 1  # stride of out

    @property
    def block(self) -> int:
        """How many segments a program sums: few long ones are read along themselves, many short ones side by side."""
        return 1 if self.kept == 1 or self.inner >= 64 else 16


# ---- on the device ---------------------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """A `Segments` as a kernel takes it, except its sizes, which are arguments of their own (see `launch.py`)."""

    parts: Any  # (outer, kept, inner)
    out: Any  # (kept,), `step` apart
    step: Any
    scale: Any  # a number, or a pointer to one


class Sizes(NamedTuple):
    outer: Any
    kept: Any
    inner: Any


class Loss(NamedTuple):
    """out = nll + beta * kl, of families 0 and 1, which are then totals."""

    out: Any  # ()
    beta: Any  # a number, or a pointer to one


class FinishFlags(NamedTuple):
    BLOCKS: tuple[int, ...]  # of each family, the segments of a program
    REDUCE: int  # partial sums that a program reads at once
    ACC: tl.dtype


@triton.jit
def _sum(family, sizes, rank, BK: tl.constexpr, C: tl.constexpr):
    """Store the sums of BK neighbouring segments, and return them (BK,)."""
    BR: tl.constexpr = C.REDUCE // BK
    k = rank * BK + tl.arange(0, BK)
    total = tl.zeros((BR, BK), tl.float64)
    count = sizes.outer * sizes.inner
    for start in range(0, count, BR):
        r = start + tl.arange(0, BR)
        outer = (r // sizes.inner).to(tl.int64)[:, None] * (sizes.kept * sizes.inner)
        at = outer + k.to(tl.int64)[None, :] * sizes.inner + (r % sizes.inner)[:, None]
        mask = (r < count)[:, None] & (k < sizes.kept)[None, :]
        total += tl.load(family.parts + at, mask, other=0.0).to(tl.float64)
    sums = (tl.sum(total, 0) * read(family.scale, C.ACC).to(tl.float64)).to(C.ACC)
    tl.store(family.out + k.to(tl.int64) * family.step, narrow(sums, family.out), k < sizes.kept)
    return sums


_SIZES = [f"{size}_{i}" for i in range(_FAMILIES) for size in Sizes._fields]


@triton.jit(do_not_specialize=_SIZES)
def finish_kernel(
    families, loss, outer_0, kept_0, inner_0, outer_1, kept_1, inner_1, outer_2, kept_2, inner_2, C: tl.constexpr
):  # fmt: skip
    """Families of segments, one after another in the order of the programs. With `loss`, the first program sums the first two."""
    sizes = (Sizes(outer_0, kept_0, inner_0), Sizes(outer_1, kept_1, inner_1), Sizes(outer_2, kept_2, inner_2))
    pid = tl.program_id(0)
    first = 0
    if loss is not None:
        if pid == 0:
            nll = _sum(families[0], sizes[0], 0, C.BLOCKS[0], C)
            kl = _sum(families[1], sizes[1], 0, C.BLOCKS[1], C)
            tl.store(loss.out + tl.arange(0, C.BLOCKS[0]), nll + read(loss.beta, C.ACC) * kl)
        first = 1
    for i in tl.static_range(len(families)):
        if loss is None or i >= 2:
            programs = tl.cdiv(sizes[i].kept, C.BLOCKS[i])
            if (pid >= first) & (pid < first + programs):
                _sum(families[i], sizes[i], pid - first, C.BLOCKS[i], C)
            first += programs


# ---- on the host -----------------------------------------------------------------------------------------------------------------


def finish(acc: torch.dtype, *segments: Segments | None, loss: Tensor | None = None, beta: Factor = 1.0) -> None:
    """Add partials up in one launch, each to the dtype of its result. With `loss`, the first two are the totals nll and kl."""
    families: list[Family] = []
    sizes: list[int] = []
    blocks: list[int] = []
    programs = 0
    for s in segments:
        if s is not None:
            device, block = s.parts.device, s.block
            families.append(Family(s.parts, s.out, s.step, scalar(s.scale, acc, device)))
            sizes += s.outer, s.kept, s.inner
            blocks.append(block)
            programs += -(-s.kept // block)
    if not families:
        return
    of_loss = None
    if loss is not None:
        of_loss = Loss(loss, scalar(beta, acc, device))
        programs -= 1  # one sums both totals
    sizes += (0,) * (3 * _FAMILIES - len(sizes))
    flags = FinishFlags(tuple(blocks), _REDUCE, TYPES[acc])
    launch(finish_kernel, programs, device, tuple(families), of_loss, *sizes, flags)


class Terms(NamedTuple):
    """The sums of the terms that a launch computes."""

    sink: tl.constexpr = NOTHING
    parts: Tensor | None = None  # what its programs write where the sink is TOTAL or ROWS
    segments: Segments | None = None  # what remains to be added up
    out: Tensor | None = None
    factor: Factor = 1.0  # what remains to be multiplied; always 1 in the package's own reductions

    def result(self) -> Tensor | None:
        if isinstance(self.factor, Tensor) or self.factor != 1.0:
            return self.out.mul_(self.factor)
        return self.out


def sums(fold: Fold, shape: torch.Size, scale: Factor, programs: int, empty: Callable[..., Tensor]) -> Terms:
    """For sums of that shape over the tiles of a launch; `empty` makes buffers in the dtype of the arithmetic."""
    out = empty(shape)
    if not shape:
        parts = empty(programs)
        return Terms(TOTAL, parts, Segments(parts, out, 1, 1, programs, scale), out)
    inner = fold.per_out * fold.chunks
    if inner == 1:
        return Terms(ROWS, out, None, out, scale)
    parts = empty(fold.rows * fold.chunks)
    return Terms(ROWS, parts, Segments(parts, out, 1, fold.rows // fold.per_out, inner, scale), out)
