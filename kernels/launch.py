"""From tensors to launches: the launch table, the view that the tensors of a launch have in common, compiler options.

Every elementwise kernel here sees its tensors as rows of columns. `fold` finds that view: it merges the dimensions that are
contiguous with each other in all operands at once, so contiguous tensors are one long row, packed halves and slices are strided
rows, and what broadcasts has stride 0 along a row or a column. Nothing is copied unless no such view exists.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import Block, Operand

# Triton decides this when it decorates a kernel, so it cannot change later.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Elements of a tile. Four warps then hold 16 float32 a thread: four 16-byte loads of each input in flight.
TILE = 2048
WARPS = 4
# Programs of a launch whose sums are partial: enough to fill any current chip several times over, few enough for one small
# program to add them up. A constant and not the number of multiprocessors, so that every device adds in the same order.
PROGRAMS = 2048

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


# The shape, strides and dtype of a tensor. What a launch is made of follows from those of its tensors, except for pointers and
# factors. So each side plans a layout once, on tensors of these forms that have no memory, and a call only fills it in.
Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
# Layouts that each side remembers: of a batch of varied length every length is one.
LAYOUTS = 4096


def forms(tensors: Sequence[Tensor | None]) -> tuple[Form | None, ...]:
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors])


def imagined(found: Sequence[Form | None]) -> list[Tensor | None]:
    """Tensors of these forms, without memory."""
    return [None if f is None else torch.empty_strided(f[0], f[1], dtype=f[2], device="meta") for f in found]


def imagined_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.empty_like` of an imagined tensor, which takes much longer than this where t is contiguous."""
    if t.is_contiguous():
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype or t.dtype, device="meta")
    return torch.empty_like(t, dtype=dtype)


def made(form: Form | None, device: torch.device) -> Tensor | None:
    """A new tensor of this form. `torch.empty` takes longer on the host."""
    return None if form is None else torch.empty_strided(form[0], form[1], dtype=form[2], device=device)


def made_like(t: Tensor | None, device: torch.device) -> Tensor | None:
    """A new tensor on the device, of the form of an imagined one."""
    return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


class Fold(NamedTuple):
    """Rows of columns: `rows` have up to three dimensions (the inner two of sizes r1, r2), `per_out` of them make an output."""

    rows: int
    cols: int
    r1: int
    r2: int
    per_out: int
    chunks: int  # tiles along a row
    tiles: int
    programs: int
    block: Block
    reach: int  # the largest offset of an element in an operand
    strides: tuple[tuple[int, ...], ...]  # of each operand, as `Operand` has them

    def grid(self, programs: int) -> tuple[int, ...]:
        """The fields of `Grid` up to `cols`."""
        return programs, self.rows, self.r1, self.r2

    def operands(self, tensors: Sequence[Tensor | None]) -> list[Operand | None]:
        """The records of tensors that lie as those that this view was made for. What broadcasts need not be expanded."""
        return [t if t is None else Operand(t, strides) for t, strides in zip(tensors, self.strides, strict=True)]


def fold(
    shape: torch.Size, keep: int, operands: Sequence[Tensor | None], acc: torch.dtype, ordered: bool = False, share: int = 1
) -> Fold | None:
    """The common view of `operands` (of `shape`, or None) whose sums keep `keep` dimensions; None if one of them must be copied.

    `ordered` keeps the logical order of the elements, which noise is numbered by, and lets tiles start where 4 divides a number;
    otherwise elements are walked in memory order. A tile has the `share`-th part of the elements that it usually has.
    """
    # At half of TILE float64 still spilled on one target of `benchmarks/codegen.py`.
    tile = (TILE // 4 if acc == torch.float64 else TILE) // share
    if math.prod(shape) >= 2**31 * tile // 2:
        raise ValueError(f"a tensor of shape {tuple(shape)} has more tiles than one launch can number")
    strides = [t if t is None else t.stride() for t in operands]
    given = [s for s in strides if s is not None]
    # Kept rows must stay apart from the elements that they sum; where everything or nothing is summed there is one group.
    split = keep if 0 < keep < len(shape) else 0
    groups = []
    for lo, hi in ((0, split), (split, len(shape))):
        dims = [(shape[i], tuple(s[i] for s in given)) for i in range(lo, hi) if shape[i] != 1]
        if lo == split and not ordered:
            dims.sort(key=lambda d: [-s for s in d[1]])
        merged: list[tuple[int, tuple[int, ...]]] = []
        for size, step in dims:
            if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], step, strict=True)):
                merged[-1] = (merged[-1][0] * size, step)
            else:
                merged.append((size, step))
        groups.append(merged)
    outer, inner = groups
    cols, col_steps = inner[-1] if inner else (1, (0,) * len(given))
    rows = outer + inner[:-1]
    if len(rows) > 3 or any(s not in (0, 1) for s in col_steps):
        return None
    sizes = [size for size, _ in rows]
    count = math.prod(sizes)
    if count > 2**31 - 2 * tile:
        raise ValueError(
            f"a tensor of shape {tuple(shape)} lies in {count} separate rows, more than one launch can number; make it contiguous"
        )
    lead = 3 if ordered and count > 1 and cols % 4 else 0
    bn = tile if count == 1 else min(tile, triton.next_power_of_2(cols + lead))
    reach = max((sum((n - 1) * s for n, s in zip(shape, step, strict=True)) for step in given), default=0)
    each = iter([tuple(steps[i] for _, steps in rows) + (1,) * col_steps[i] for i in range(len(given))])
    own = tuple(() if s is None else next(each) for s in strides)
    r1, r2 = [1, 1, *sizes][-2:]
    bm, chunks, per_out = tile // bn, -(-(cols + lead) // bn), math.prod(size for size, _ in inner[:-1])
    tiles = -(-count // bm) * chunks
    # A batch of videos exceeds 2**31 elements. Other offsets take half the instructions.
    block = Block(len(rows), bm, bn, lead, TYPES[acc], tl.int32 if reach < 2**31 else tl.int64)
    return Fold(count, cols, r1, r2, per_out, chunks, tiles, min(tiles, PROGRAMS), block, reach, own)


def views(tensors: Sequence[Tensor | None], shape: torch.Size, dense: bool) -> list[Tensor | None]:
    """Inputs, and last the upstream gradient of some first dimensions, as operands of that shape: what broadcasts has strides of 0.

    Where no common view exists, `dense` copies what is not contiguous, except one value that is the same for all.
    """
    *inputs, grad = tensors
    # A comparison costs a tenth of a view.
    found = [t if t is None or t.shape == shape else t.expand(shape) for t in inputs]
    if grad is not None and grad.ndim < len(shape):
        grad = grad.as_strided(shape, grad.stride() + (0,) * (len(shape) - grad.ndim))
    found.append(grad)
    return [t.contiguous() if t is not None and any(t.stride()) else t for t in found] if dense else found


def launch(kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...], *tuned: dict[str, int]) -> None:
    """Launch on the device of the tensors, which need not be the current one; `tuned` are compiler options of the launch's own."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, programs, args, *tuned)
    else:
        start(kernel, programs, args, *tuned)


def start(kernel: Any, programs: int, args: tuple[Any, ...], tuned: dict[str, int] | None = None) -> None:
    """Every launch of the package goes through here: `benchmarks/codegen.py` and the tests that count launches take its place."""
    chosen = {} if INTERPRETED else _options_of(torch.cuda.current_device(), tuple(tuned.items()) if tuned else ())
    kernel[(programs,)](*args, **chosen)


@cache
def _options_of(device: int, tuned: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(device)
    return options(backend(), 10 * major + minor, dict(tuned))


def backend() -> str:
    """For which of Triton's backends to plan a launch that differs between them."""
    return "hip" if torch.version.hip else "cuda"


def options(backend: str, capability: int, tuned: dict[str, int] | None = None) -> dict[str, Any]:
    """Compiler options for a target ("cuda" or "hip", and 10 times the compute capability); `tuned` ones override the common."""
    chosen: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": True}
    if backend == "hip":
        # With WARPS it spilled scalar registers (a mask takes two of them for each element of a thread); with twice as many, none.
        chosen["num_warps"] = 2 * WARPS
    elif capability >= 100 or tuned:
        # Left alone, its assembler spills around the loop of a kernel that uses 48 registers. The bounds tried
        # (128 to 255) stop that, and this one binds nothing else. The large kernels with tuned options need it on every target.
        chosen["maxnreg"] = 255
    return chosen | (tuned or {})


def scalars(values: Iterable[float | Tensor | None], acc: torch.dtype, device: torch.device) -> list[float | Tensor | None]:
    """Run-time factors as kernel arguments. Triton passes a float as float32, so a float64 goes by memory."""
    if acc == torch.float32:
        return [v if v is None or isinstance(v, (float, Tensor)) else float(v) for v in values]
    return [v if v is None or isinstance(v, Tensor) else torch.full((), v, dtype=acc, device=device) for v in values]
