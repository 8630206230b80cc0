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


# ---- records that kernels take ---------------------------------------------------------------------------------------------------

# Triton takes a NamedTuple apart and compiles for the fields: an integer of 1 and a None become constants, and whether an integer
# is a multiple of 16 counts too. `do_not_specialize` reaches only what is no field of a record, so sizes that vary from call to
# call are arguments of their own.


class Operand(NamedTuple):
    """A tensor in the view of a launch. For a tensor that does not exist, or is not wanted, None takes the place of the record."""

    pointer: Any  # on the host the tensor itself
    # Of each dimension of the rows, in elements, and 1 for the columns; where a row has one value for all of its columns, that 1 is
    # left out. (Triton 3.6 cannot ask whether a record is None if there is a None in it.)
    strides: tuple[Any, ...]


class Block(NamedTuple):
    """The shape of a tile, and the dtype of the arithmetic; a constant of each launch."""

    DIMS: int  # of the rows
    BM: int
    BN: int
    ACC: tl.dtype


class Grid(NamedTuple):
    """The rows and columns that `programs` programs walk, made on the device of arguments that do not specialise."""

    programs: Any
    rows: Any
    r1: Any
    r2: Any
    cols: Any


class Tile(NamedTuple):
    """One step of that walk, on the device."""

    rows: Any  # (BM,)
    r1: Any
    r2: Any
    in_rows: Any  # (BM,): which of the rows exist
    chunk: Any  # the tile is the chunk-th of its rows
    first: Any  # its first column
    mask: Any  # (BM, BN): which of its elements exist


# ---- the common view of several tensors ------------------------------------------------------------------------------------------


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
    strides: tuple[tuple[int, ...], ...]  # of each operand, as `Operand` has them

    @property
    def chunks(self) -> int:
        return -(-self.cols // self.bn)

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.bm) * self.chunks

    @property
    def programs(self) -> int:
        return min(self.tiles, PROGRAMS)

    def grid(self, programs: int) -> tuple[int, ...]:
        """The fields of `Grid` up to `cols`."""
        return programs, self.rows, self.r1, self.r2

    def block(self, acc: torch.dtype) -> Block:
        return Block(self.dims, self.bm, self.bn, TYPES[acc])

    def operands(self, tensors: Sequence[Tensor | None]) -> list[Operand | None]:
        """The records of the tensors that this view was made for."""
        return [None if t is None else Operand(t, strides) for t, strides in zip(tensors, self.strides, strict=True)]


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
    each = iter([tuple(steps[i] for _, steps in rows) + (1,) * col_steps[i] for i in range(len(given))])
    return Fold(
        rows=count,
        cols=cols,
        dims=len(rows),
        r1=sizes[-2] if len(rows) > 1 else 1,
        r2=sizes[-1] if rows else 1,
        per_out=math.prod(size for size, _ in inner[:-1]),
        bm=tile // bn,
        bn=bn,
        strides=tuple(() if s is None else next(each) for s in strides),
    )


def expanded(t: Tensor | None, shape: torch.Size) -> Tensor | None:
    """An input as an operand of that shape: dimensions that it lacks at the front or that are 1 get a stride of 0."""
    # A comparison costs a tenth of a view.
    return t if t is None or t.shape == shape else t.expand(shape)


def trailing(t: Tensor | None, ndim: int) -> Tensor | None:
    """An upstream gradient of the first dimensions of a shape, with ones for the others."""
    return None if t is None else t.reshape(t.shape + (1,) * (ndim - t.ndim))


def densified(t: Tensor | None) -> Tensor | None:
    """What a tensor is copied to where no common view exists: contiguous, except one value that is the same for all."""
    return t if t is None or not any(t.stride()) else t.contiguous()


# ---- launches --------------------------------------------------------------------------------------------------------------------


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, tuned: dict[str, int] | None = None) -> None:
    """Launch on the device of the tensors, which need not be the current one, with `tuned` compiler options of its own."""
    # Left out where there are none, so that what takes the place of `start` need not know of them.
    options_of_its_own = () if tuned is None else (tuned,)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, programs, args, *options_of_its_own)
    else:
        start(kernel, programs, args, *options_of_its_own)


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
def zeros(B: tl.constexpr):
    """A tile of zeros."""
    BM: tl.constexpr = B.BM  # Triton 3.6 takes no bare field in a tuple
    BN: tl.constexpr = B.BN
    return tl.zeros((BM, BN), B.ACC)


@triton.jit
def chunks_of(cols, BN: tl.constexpr):
    return (cols - 1) // BN + 1  # tl.cdiv overflows just below 2**31


@triton.jit
def tiles_of(grid, B: tl.constexpr):
    return ((grid.rows - 1) // B.BM + 1) * chunks_of(grid.cols, B.BN)


@triton.jit
def tile_at(index, grid, B: tl.constexpr):
    """The tile of that number, in the order in which rows are walked."""
    chunks = chunks_of(grid.cols, B.BN)
    rows = (index // chunks) * B.BM + tl.arange(0, B.BM)
    chunk = index % chunks
    first = chunk.to(grid.cols.dtype) * B.BN
    in_rows = rows < grid.rows
    mask = in_rows[:, None] & (tl.arange(0, B.BN) < grid.cols - first)[None, :]
    return Tile(rows, grid.r1, grid.r2, in_rows, chunk, first, mask)


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
def pointers(operand, tile, B: tl.constexpr, offset):
    """Pointers to a tile (BM, BN) of an operand that is dense along its columns, `offset` elements on."""
    start = row_offset(tile.rows, tile.r1, tile.r2, operand.strides, B.DIMS)
    return operand.pointer + offset + (start + tile.first)[:, None] + tl.arange(0, B.BN)[None, :]


@triton.jit
def load(operand, tile, B: tl.constexpr, offset=0):
    """A tile (BM, BN), or (BM, 1) where a row has one value for all of its columns. What does not exist reads as 0."""
    if len(operand.strides) > B.DIMS:
        return tl.load(pointers(operand, tile, B, offset), tile.mask, other=0).to(B.ACC)
    else:
        start = row_offset(tile.rows, tile.r1, tile.r2, operand.strides, B.DIMS)
        return tl.load(operand.pointer + offset + start[:, None], tile.in_rows[:, None], other=0).to(B.ACC)


@triton.jit
def narrow(value, pointer):
    """The value in the dtype of what the pointer points to. Triton has no conversion from float64 straight to bfloat16."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def store(operand, value, tile, B: tl.constexpr, offset=0):
    """The elements of a tile that exist, in the dtype of the operand."""
    tl.store(pointers(operand, tile, B, offset), narrow(value, operand.pointer), tile.mask)


@triton.jit
def divide(a, b):
    """Correctly rounded: the plain float32 quotient is an approximation on NVIDIA GPUs."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b
