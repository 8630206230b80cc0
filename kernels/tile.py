"""What a program of an elementwise kernel sees: rows of columns, a tile (BM, BN) at a time, on the device.

Triton takes a NamedTuple apart and compiles for its fields: an integer of 1 and a None become constants, and whether an integer
is a multiple of 16 counts too. `do_not_specialize` reaches only what is no field of a record, so sizes that vary from call to call
are arguments of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
import triton.language.core as core


class Operand(NamedTuple):
    """A tensor in the view of a launch. For a tensor that does not exist, or is not wanted, None takes the place of the record."""

    pointer: Any  # on the host the tensor itself
    # Of each dimension of the rows, in elements, and 1 for the columns; where a row has one value for all of its columns, that 1 is
    # left out. (Triton 3.6 cannot ask whether a record is None if there is a None in it.)
    strides: tuple[Any, ...]


class Block(NamedTuple):
    """The shape of a tile, and the dtypes of the arithmetic and of offsets; a constant of each launch."""

    DIMS: int  # of the rows
    BM: int
    BN: int
    LEAD: int  # 3: a row's tiles start up to so many elements before it, where 4 divides their numbers; otherwise 0
    ACC: tl.dtype
    INDEX: tl.dtype


class Grid(NamedTuple):
    """The rows and columns that `programs` programs walk, made on the device of arguments that do not specialise."""

    programs: Any
    rows: Any
    r1: Any  # the sizes of the inner two dimensions of the rows
    r2: Any
    cols: Any


class Tile(NamedTuple):
    """One step of that walk."""

    rows: Any  # (BM,)
    r1: Any
    r2: Any
    in_rows: Any  # (BM,): which of the rows exist
    chunk: Any  # the tile is the chunk-th of the `chunks` of its rows
    chunks: Any
    first: Any  # its first column; with LEAD that of each row (BM,), which may be negative
    mask: Any  # (BM, BN): which elements exist


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
def chunks_of(cols, B: tl.constexpr):
    """Tiles along a row."""
    return (cols + (B.LEAD - 1)) // B.BN + 1  # tl.cdiv overflows just below 2**31


@triton.jit
def tiles_of(grid, B: tl.constexpr):
    return ((grid.rows - 1) // B.BM + 1) * chunks_of(grid.cols, B)


@triton.jit
def tile_at(index, grid, B: tl.constexpr):
    """The tile of that number, in the order in which rows are walked."""
    chunks = chunks_of(grid.cols, B)
    rows = (index // chunks) * B.BM + tl.arange(0, B.BM)
    chunk = index % chunks
    first = chunk.to(grid.cols.dtype) * B.BN
    in_rows = rows < grid.rows
    if B.LEAD == 0:
        mask = in_rows[:, None] & (tl.arange(0, B.BN) < grid.cols - first)[None, :]
    else:
        first = first - ((rows * grid.cols.to(tl.int32)) & B.LEAD)
        column = first[:, None] + tl.arange(0, B.BN)[None, :]
        UNSIGNED: tl.constexpr = tl.uint64 if column.dtype == tl.int64 else tl.uint32  # where a negative number is a large one
        mask = in_rows[:, None] & (column.to(UNSIGNED) < grid.cols.to(UNSIGNED))
    return Tile(rows, grid.r1, grid.r2, in_rows, chunk, chunks, first, mask)


@triton.jit
def row_offset(rows, r1, r2, strides, B: tl.constexpr):
    """Offsets of a block of rows."""
    I: tl.constexpr = B.INDEX
    if B.DIMS == 0:
        return rows.to(I) * 0
    elif B.DIMS == 1:
        return rows.to(I) * strides[0]
    elif B.DIMS == 2:
        return (rows // r2).to(I) * strides[0] + (rows % r2).to(I) * strides[1]
    else:
        outer = rows // r2
        high = (outer // r1).to(I) * strides[0] + (outer % r1).to(I) * strides[1]
        return high + (rows % r2).to(I) * strides[2]


@triton.jit
def pointers(operand, tile, B: tl.constexpr, offset):
    """Pointers to a tile (BM, BN) of an operand that is dense along its columns, `offset` elements on."""
    start = row_offset(tile.rows, tile.r1, tile.r2, operand.strides, B)
    return (operand.pointer + (start + tile.first + offset))[:, None] + tl.arange(0, B.BN)[None, :]


@triton.jit
def load(operand, tile, B: tl.constexpr, offset=0):
    """A tile (BM, BN), or (BM, 1) where a row has one value for all of its columns. What does not exist reads as 0."""
    if len(operand.strides) > B.DIMS:
        return tl.load(pointers(operand, tile, B, offset), tile.mask, other=0).to(B.ACC)
    else:
        start = row_offset(tile.rows, tile.r1, tile.r2, operand.strides, B)
        return tl.load(operand.pointer + offset + start[:, None], tile.in_rows[:, None], other=0).to(B.ACC)


@triton.jit
def narrow(value, pointer):
    """The value in the dtype of what the pointer points to. Triton has no conversion from float64 straight to bfloat16."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def put(value, pointer, at, mask):
    """Store a block in the dtype of what the pointer points to, if there is one."""
    if pointer is not None:
        tl.store(pointer + at, narrow(value, pointer), mask)


@triton.jit
def store(operand, value, tile, B: tl.constexpr, offset=0):
    """The elements of a tile that exist, in the dtype of the operand, if there is one."""
    if operand is not None:
        tl.store(pointers(operand, tile, B, offset), narrow(value, operand.pointer), tile.mask)
