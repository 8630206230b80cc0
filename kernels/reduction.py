"""Deterministic sums: programs write partial sums, and one small launch adds them up in a fixed order, in float64. A total that one
program has whole needs no such launch.

A last-block reduction would save that launch at the price of a counter, a barrier and an order that needs proof on every target;
a second launch of one program is ordered by the stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

from fastelbo.specs import Factor, Gradients, Needs

from .launch import TYPES, Fold, launch, made_like, scalars
from .tile import narrow, put, read, store

# Where a tile's values go: nowhere; into one partial sum a program; one a row and chunk of columns; one a column and group of rows;
# or each to its own element.
NOTHING, TOTAL, ROWS, COLS, EACH = (tl.constexpr(i) for i in range(5))

# Partial sums that a program reads at once.
_REDUCE = tl.constexpr(1024)
# Families of sums that one launch adds up, at most.
FAMILIES = 3


@triton.jit
def collect(values, total, operand, parts, tile, SINK: tl.constexpr, B: tl.constexpr):
    """Put the values of a tile where they go. `total` comes back, with them where they are summed over the tiles of a program."""
    if SINK == EACH:
        store(operand, values, tile, B)
    elif SINK == ROWS:
        tl.store(parts + tile.rows.to(tl.int64) * tile.chunks + tile.chunk, tl.sum(values, 1), tile.in_rows)
    elif SINK != NOTHING:
        total += values
    return total


@triton.jit
def put_total(values, parts, pid, grid, scale):
    """Store the sum of a program's values. Where it is the only program this is the result, so it is scaled, as `_sum` does."""
    total = tl.sum(values)
    if grid.programs == 1:
        total = (total.to(tl.float64) * core.to_tensor(scale).to(tl.float64)).to(total.dtype)
    tl.store(parts + pid, narrow(total, parts))


@triton.jit
def _sum(family, sizes, rank, BK: tl.constexpr, ACC: tl.constexpr):
    """Store the sums of BK neighbouring segments, and return them (BK,). Takes a `Sums`: its tensors and factors, and its sizes."""
    BR: tl.constexpr = _REDUCE // BK
    parts, out, step, scale = family
    outer, kept, inner = sizes
    k = rank * BK + tl.arange(0, BK)
    total = tl.zeros((BR, BK), tl.float64)
    count = outer * inner
    for start in range(0, count, BR):
        r = start + tl.arange(0, BR)
        row = (r // inner).to(tl.int64)[:, None] * (kept * inner)
        at = row + k.to(tl.int64)[None, :] * inner + (r % inner)[:, None]
        mask = (r < count)[:, None] & (k < kept)[None, :]
        total += tl.load(parts + at, mask, other=0.0).to(tl.float64)
    sums = (tl.sum(total, 0) * read(scale, ACC).to(tl.float64)).to(ACC)
    put(sums, out, k.to(tl.int64) * step, k < kept)
    return sums


@triton.jit(do_not_specialize=[f"{size}_{i}" for i in range(FAMILIES) for size in ("outer", "kept", "inner")])
def finish_kernel(
    families, loss, beta, outer_0, kept_0, inner_0, outer_1, kept_1, inner_1, outer_2, kept_2, inner_2,
    BLOCKS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Families of segments, one after another in the order of the programs. Of each, a program sums so many: BLOCKS.

    With `loss` (), the first program sums the first two. They are then the totals nll and kl, and the loss is nll + beta * kl; beta
    is a number, or a pointer to one.
    """
    sizes = ((outer_0, kept_0, inner_0), (outer_1, kept_1, inner_1), (outer_2, kept_2, inner_2))
    pid = tl.program_id(0)
    first = 0
    if loss is not None:
        if pid == 0:
            nll = _sum(families[0], sizes[0], 0, BLOCKS[0], ACC)
            kl = _sum(families[1], sizes[1], 0, BLOCKS[1], ACC)
            tl.store(loss + tl.arange(0, BLOCKS[0]), nll + read(beta, ACC) * kl)
        first = 1
    for i in tl.static_range(len(families)):
        if loss is None or i >= 2:
            programs = tl.cdiv(sizes[i][1], BLOCKS[i])
            if (pid >= first) & (pid < first + programs):
                _sum(families[i], sizes[i], pid - first, BLOCKS[i], ACC)
            first += programs


class Sums(NamedTuple):
    """out[k] = scale * sum over o, i of parts[o, k, i]: where a launch puts its values, and what is left to add up then."""

    sink: tl.constexpr = NOTHING
    out: Tensor | None = None  # (kept,), `step` apart
    # (outer, kept, inner), row-major; `out` itself where nothing is left to add up, None where nothing is added at all
    parts: Tensor | None = None
    outer: int = 1
    kept: int = 1
    inner: int = 1
    scale: Factor = 1.0
    step: int = 1

    @property
    def is_partial(self) -> bool:
        return self.parts is not None and self.parts is not self.out

    def on(self, device: torch.device, scale: Factor = 1.0, out: Tensor | None = None) -> Sums:
        """What was planned on tensors without memory, on a device: in `out`, or in a new tensor."""
        if self.out is None:
            return self
        if out is None:
            out = made_like(self.out, device)
        parts = out
        if self.parts is not self.out:
            parts = made_like(self.parts, device)
        elif self.sink is TOTAL:
            scale = 1.0  # the one program has scaled it
        return Sums(self.sink, out, parts, self.outer, self.kept, self.inner, scale, self.step)

    @property
    def block(self) -> int:
        """How many segments a program sums: few long ones are read along themselves, many short ones side by side."""
        return 1 if self.kept == 1 or self.inner >= 64 else 16

    def result(self) -> Tensor | None:
        """The sums, once the partial ones are added up. No reduction of the package scales what has no partial sums."""
        if self.is_partial or (not isinstance(self.scale, Tensor) and self.scale == 1.0):
            return self.out
        return self.out.mul_(self.scale)


NO_SUMS = Sums()


def partial(sink: tl.constexpr, out: Tensor, outer: int, kept: int, inner: int, acc: torch.dtype, step: int = 1) -> Sums:
    return Sums(sink, out, torch.empty(outer * kept * inner, dtype=acc, device=out.device), outer, kept, inner, step=step)


def total_of(out: Tensor, programs: int, acc: torch.dtype) -> Sums:
    """One sum over all programs, in `out`. A single program scales it itself."""
    return Sums(TOTAL, out, out) if programs == 1 else partial(TOTAL, out, 1, 1, programs, acc)


def sums_of_terms(keep: int, view: Fold, programs: int, like: Tensor, each: Tensor | None, acc: torch.dtype) -> Sums:
    """For the terms of a launch over tensors like this one; `each` is for them all, where none are summed."""
    if each is not None:
        return Sums(EACH, each)
    out = torch.empty(like.shape[:keep], dtype=acc, device=like.device)
    if not out.shape:
        return total_of(out, programs, acc)
    inner = view.per_out * view.chunks
    if inner == 1:
        return Sums(ROWS, out, out)
    return partial(ROWS, out, 1, view.rows // view.per_out, inner, acc)


def finish(acc: torch.dtype, *sums: Sums, loss: Tensor | None = None, beta: Factor = 1.0) -> None:
    """Add partial sums up in one launch, each to the dtype of its result. With `loss`, the first two are the totals nll and kl.

    A total that is whole already is its own one part, and is stored once more as it is.
    """
    totals = 0 if loss is None else 2  # whole or partial
    left = [s for i, s in enumerate(sums) if i < totals or s.is_partial]
    if not left:
        return
    device = left[0].parts.device
    scales = scalars([s.scale for s in left], acc, device)
    families = tuple([(s.parts, s.out, s.step, scale) for s, scale in zip(left, scales, strict=True)])
    sizes = [size for s in left for size in (s.outer, s.kept, s.inner)] + [0] * (3 * (FAMILIES - len(left)))
    blocks = tuple([s.block for s in left])
    programs = sum([-(-s.kept // block) for s, block in zip(left, blocks, strict=True)])
    factor = None
    if loss is not None:
        (factor,) = scalars((beta,), acc, device)
        programs -= 1  # one sums both totals
    launch(finish_kernel, programs, device, (families, loss, factor, *sizes, blocks, TYPES[acc]))


class Plan(NamedTuple):
    """One side's launch, what is left to add up after it, and what it yields."""

    kernel: Any
    sizes: tuple[int, ...]  # its arguments that do not specialise; those of a `Grid` come first
    args: Any
    flags: Any
    terms: Sums
    gradients: Gradients
    of_variance: Sums = NO_SUMS  # the gradient of a variance that broadcasts
    z: Tensor | None = None
    squares: Sums = NO_SUMS  # of the noise

    @property
    def programs(self) -> int:
        return self.sizes[0]

    def launch(self, device: torch.device) -> None:
        if self.programs:
            launch(self.kernel, self.programs, device, (*self.sizes, self.args, self.flags))


def nothing(needs: Needs) -> Plan:
    """The plan of a side that has nothing to do."""
    return Plan(None, (0,), None, None, NO_SUMS, (None,) * len(needs))
