"""What a program of the linear kernels owns and how far it walks: by the kind of products, the width of h and the target.

Constants, so that every device adds in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl


class Limits(NamedTuple):
    """The largest sizes that the kernels serve; `fastelbo.backend` reads them."""

    hidden: int = 128  # the widest h whose rows stay on the chip through a walk
    rows: int = 2**31 - 2**10  # rows of h, and columns of x: numbered in int32 up to the end of a tile
    unaligned_hidden: int = 16  # the widest z that is drawn in registers where its rows start anywhere: wider ones spill


linear_limits = Limits()

# Programs of a launch, where sizes allow: some for every multiprocessor of the largest chips.
WANTED = 512
# Tiles of a walk that is not split further: each part of a split walk costs a row block of partial sums.
SHORTEST = 4


class Tile(NamedTuple):
    """What a program owns and what a step of its walk takes: rows and columns, or columns and rows."""

    own: int
    step: int
    warps: int
    stages: int

    @property
    def tuned(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


class Tiles(NamedTuple):
    """The tiles of `rows_kernel`, of `columns_kernel`, and of `rows_kernel` where it samples."""

    rows: Tile
    columns: Tile
    sampled: Tile


# By the kind of products and the width of h, padded: what fits in the registers of every target of `benchmarks/codegen.py` and in
# 99 KiB of shared memory. Products of tf32x3 hold each operand in two parts; those of ieee are multiply-adds, which hold both
# factors in registers. Sampling and the KL work on all of a block's mu and logvar at once.
_HALF = Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 3))
_TF32 = Tiles(Tile(64, 32, 4, 3), Tile(64, 32, 8, 2), Tile(64, 32, 4, 3))
_OF_HALF = {16: _HALF._replace(sampled=Tile(64, 64, 8, 3)), 32: _HALF, 64: _HALF._replace(sampled=Tile(64, 32, 8, 3))}
_OF_HALF[128] = _HALF._replace(sampled=Tile(32, 64, 8, 3))
_OF_TF32 = {16: _TF32, 32: _TF32, 64: _TF32._replace(sampled=Tile(64, 32, 8, 2))}
_OF_TF32[128] = Tiles(Tile(64, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 32, 8, 2))
_OF_TF32X3 = dict.fromkeys((16, 32, 64), Tiles(*[Tile(32, 32, 4, 2)] * 3))
_OF_TF32X3[128] = Tiles(Tile(32, 16, 8, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2))
_OF_IEEE = dict.fromkeys((16, 32, 64), Tiles(*[Tile(64, 32, 8, 2)] * 3))
_OF_IEEE[128] = Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2))
_OF_AMD = dict.fromkeys((16, 32, 64, 128), Tiles(Tile(64, 32, 4, 2), Tile(64, 16, 4, 2), Tile(32, 32, 4, 2)))
TILES = {
    "cuda": {"bf16": _OF_HALF, "fp16": _OF_TF32, "tf32": _OF_TF32, "tf32x3": _OF_TF32X3, "ieee": _OF_IEEE},
    "hip": {"bf16": _OF_AMD, "fp16": _OF_AMD, "ieee": _OF_AMD},
}

_PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def products_of(operands: torch.dtype, precision: str | None, backend: str) -> str:
    """The kind of products: a row of `TILES`."""
    if operands != torch.float32:
        return "bf16" if operands == torch.bfloat16 else "fp16"
    if backend == "hip":
        return "ieee"  # in matrix instructions, which take float32; tf32 exists on one of the architectures only
    return precision or _PRECISIONS[torch.get_float32_matmul_precision()]


def dot_of(products: str, backend: str) -> tuple[tl.dtype, tl.dtype, str]:
    """The two products of a tile: the dtypes of the one that makes the reconstruction and of the other, and `tl.dot`'s precision.

    A residual over a small variance leaves float16's range. tf32 has float16's digits and float32's range.
    """
    if products == "fp16":
        return tl.float16, tl.float32, "ieee" if backend == "hip" else "tf32"
    return (tl.bfloat16, tl.bfloat16, "ieee") if products == "bf16" else (tl.float32, tl.float32, products)


def split_walk(owners: int, tiles: int) -> tuple[int, int]:
    """(parts of a walk, tiles of a part) for so many walks of so many tiles."""
    parts = max(1, min(WANTED // owners, tiles // SHORTEST))
    walk = -(-tiles // parts)
    return -(-tiles // walk), walk
