"""From tensors to tiles: folding shapes, addressing operands, the launch table.

Every elementwise kernel here sees its tensors as rows of columns. `fold` finds that view: it merges the dimensions that are
contiguous with each other in all operands at once, so contiguous tensors are one long row, packed halves and slices are strided
rows, and what broadcasts has stride 0 along a row or a column. Nothing is copied unless no such view exists.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

# Triton decides this when it decorates a kernel, so it cannot change later.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# ---- the launch table ------------------------------------------------------------------------------------------------------------

# Elements of a tile. Four warps then hold 16 float32 a thread: four 16-byte loads of each input in flight.
TILE = 2048
WARPS = 4
# Programs of a launch whose sums are partial: enough to fill any current chip several times over, few enough for one small
# program to add them up. A constant and not the number of multiprocessors, so that every device adds in the same order.
PROGRAMS = 2048


class Fold(NamedTuple):
    """Rows of columns: `rows` have up to three dimensions (the inner two of sizes r1, r2), `per_out` of them make an output."""

    rows: int
    cols: int
    dims: int
    r1: int
    r2: int
    per_out: int
    bm: int
    bn: int
    strides: tuple[tuple[int, ...], ...]  # of each operand, for each dimension of the rows
    col_strides: tuple[int, ...]  # 0 or 1

    @property
    def chunks(self) -> int:
        return -(-self.cols // self.bn)

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.bm) * self.chunks


def tile_size(acc: torch.dtype) -> int:
    """Elements of a tile. At half of TILE float64 still spilled on one target of `benchmarks/codegen.py`."""
    return TILE // 4 if acc == torch.float64 else TILE


def fold(shape: torch.Size, keep: int, operands: Sequence[Tensor | None], ordered: bool = False, tile: int = TILE) -> Fold | None:
    """The common view of `operands` (of `shape`, or None) whose sums keep `keep` dimensions; None if one of them must be copied.

    `ordered` keeps the logical order of the elements, which noise is numbered by; otherwise they are walked in memory order.
    """
    if math.prod(shape) >= 2**31 * tile // 2:
        raise ValueError(f"a tensor of shape {tuple(shape)} has more tiles than one launch can number")
    return _fold(tuple(shape), keep, tuple(None if t is None else t.stride() for t in operands), ordered, tile)


@lru_cache(maxsize=4096)
def _fold(shape: tuple[int, ...], keep: int, strides: tuple[tuple[int, ...] | None, ...], ordered: bool, tile: int) -> Fold | None:
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
            f"a tensor of shape {shape} lies in {count} separate rows, more than one launch can number; make it contiguous"
        )
    bn = tile if count == 1 else min(tile, triton.next_power_of_2(cols))
    each = iter([tuple(steps[i] for _, steps in rows) for i in range(len(given))])
    cols_each = iter(col_steps)
    return Fold(
        rows=count,
        cols=cols,
        dims=len(rows),
        r1=sizes[-2] if len(rows) > 1 else 1,
        r2=sizes[-1] if rows else 1,
        per_out=math.prod(size for size, _ in inner[:-1]),
        bm=tile // bn,
        bn=bn,
        strides=tuple((0,) * len(rows) if s is None else next(each) for s in strides),
        col_strides=tuple(0 if s is None else next(cols_each) for s in strides),
    )


class Call(NamedTuple):
    """A planned launch, what remains to be added up after it, and what it yields."""

    # The tile function's arguments. Only those at the top level can be kept from specialising the kernel on their value.
    programs: int
    sizes: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    strides: tuple[tuple[int, ...], ...]
    cols: int
    scalars: tuple[float | Tensor, ...]
    constants: tuple[Any, ...]
    acc: torch.dtype
    terms: Any = None  # the Segments of the terms' sums
    var: Any = None  # and of the variance's gradient
    out: Tensor | None = None
    grads: tuple[Tensor | None, ...] = ()
    shares: Tensor | None = None  # the elementwise gradient of a variance that broadcasts, still to be summed
    z: Tensor | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        return self.programs, *self.sizes, self.tensors, self.strides, self.cols, self.scalars, self.constants

    def gradients(self, var: Tensor | float) -> tuple[Tensor | None, ...]:
        if self.shares is None:
            return self.grads
        return *self.grads[:2], self.shares.sum_to_size(var.shape).to(var.dtype)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, tuned: dict[str, int] | None = None) -> None:
    """Launch on the device of the tensors, which need not be the current one, with `tuned` compiler options of its own."""
    # Left out where there are none, so that what takes the place of `start` need not know of them.
    rest = () if tuned is None else (tuned,)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, programs, args, *rest)
    else:
        start(kernel, programs, args, *rest)


def start(kernel: Any, programs: int, args: tuple[Any, ...], tuned: dict[str, int] | None = None) -> None:
    """Every launch of the package goes through here: `benchmarks/codegen.py` and the tests that count launches take its place."""
    kernel[(programs,)](*args, **_current_options(tuned))


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


@cache
def _options_of(device: int, tuned: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(device)
    return options(backend(), 10 * major + minor, dict(tuned))


def _current_options(tuned: dict[str, int] | None) -> dict[str, Any]:
    return {} if INTERPRETED else _options_of(torch.cuda.current_device(), tuple(tuned.items()) if tuned else ())


def scalar(value: float | Tensor, acc: torch.dtype, device: torch.device) -> float | Tensor:
    """A run-time factor as a kernel argument. Triton passes a float as float32, so a float64 goes by memory."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=acc, device=device) if acc == torch.float64 else float(value)


TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


# ---- on the device ---------------------------------------------------------------------------------------------------------------


@triton.jit
def read(value, ACC: tl.constexpr):
    """A factor that came as a pointer or as a float32."""
    value = core.to_tensor(value)  # the interpreter passes Python numbers as they are
    if value.dtype.is_ptr():
        return tl.load(value).to(ACC)
    else:
        return value.to(ACC)


@triton.jit
def row_offset(rows, r1, r2, strides, DIMS: tl.constexpr):
    """Offsets of a block of rows, in int64: a batch of videos exceeds 2**31 elements."""
    if DIMS == 0:
        return rows.to(tl.int64) * 0
    elif DIMS == 1:
        return rows.to(tl.int64) * strides[0]
    elif DIMS == 2:
        return (rows // r2).to(tl.int64) * strides[0] + (rows % r2).to(tl.int64) * strides[1]
    else:
        outer = rows // r2
        high = (outer // r1).to(tl.int64) * strides[0] + (outer % r1).to(tl.int64) * strides[1]
        return high + (rows % r2).to(tl.int64) * strides[2]


@triton.jit
def tile_of(pointer, rows, first, BN: tl.constexpr, r1, r2, strides, DIMS: tl.constexpr):
    """Pointers to a tile of rows x (first, first + 1, ...) of a tensor that is dense along its columns."""
    start = row_offset(rows, r1, r2, strides, DIMS)
    return pointer + (start + first)[:, None] + tl.arange(0, BN)[None, :]


@triton.jit
def load(
    pointer,
    rows,
    row_live,
    first,
    live,
    BN: tl.constexpr,
    r1,
    r2,
    strides,
    COL: tl.constexpr,
    DIMS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile, or one value a row (BM, 1) of an operand whose column stride, COL, is 0. What is not live reads as 0."""
    if COL:
        return tl.load(tile_of(pointer, rows, first, BN, r1, r2, strides, DIMS), live, other=0).to(ACC)
    else:
        start = row_offset(rows, r1, r2, strides, DIMS)
        return tl.load(pointer + start[:, None], row_live[:, None], other=0).to(ACC)


@triton.jit
def narrow(value, pointer):
    """The value in the dtype of what the pointer points to; there is no conversion from float64 to bfloat16 but by float32."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def store(pointer, value, rows, first, live, BN: tl.constexpr, r1, r2, strides, DIMS: tl.constexpr):
    tl.store(tile_of(pointer, rows, first, BN, r1, r2, strides, DIMS), narrow(value, pointer), live)


@triton.jit
def divide(a, b):
    """Correctly rounded: the plain float32 quotient is an approximation on NVIDIA GPUs."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b
