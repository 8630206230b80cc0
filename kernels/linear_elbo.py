"""-log N(x; h weight^T + bias, var) across a linear decoder: neither the reconstruction nor its gradient is ever in memory.

Two kernels, each with a product that makes a tile of the reconstruction and one that uses it up. `rows_kernel` owns rows of h and
walks the columns of x: the terms and h's gradient. `columns_kernel` owns columns of x and walks the rows: the gradients of weight,
bias, variance and x. Each would have to share the other's sums between programs; making the tile twice is cheaper, since h and
weight are narrow. Where owners alone are too few to fill a chip, walks are split, and the parts are added in a fixed order.

A decoder input wider than `WIDEST`, and float64, go by blocks of columns through the vendor's matrix products instead (`_blocks`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

from fastelbo.reference import LOG_2PI, accumulate_dtype

from . import launch as launch_module
from .gaussian_nll import inverse_variance
from .launch import INTERPRETED, launch, narrow, read, scalar
from .math import exp
from .reduction import Segments, finish

FIXED, SCALAR, COLUMNS = (tl.constexpr(i) for i in range(3))
NOTHING, TOTAL, EACH = (tl.constexpr(i) for i in range(3))

# The widest h whose rows stay on the chip through a walk.
WIDEST = 128
# Programs of a launch, where sizes allow: some for every multiprocessor of the largest chips. A constant, so that every device adds
# in the same order.
WANTED = 512
# Tiles of a walk that is not split further: each part of a split walk costs a row block of partial sums.
SHORTEST = 4
# Bytes of the two scratch tiles of `_blocks` together.
SCRATCH = 1 << 26

# The interpreter multiplies the bit patterns of bfloat16.
_WIDEN = tl.constexpr(INTERPRETED)

OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Tile(NamedTuple):
    """What a program owns and what a step of its walk takes: rows and columns, or columns and rows."""

    own: int
    step: int
    warps: int
    stages: int

    @property
    def tuned(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@triton.jit
def operand(value, OP: tl.constexpr):
    """A factor of a product, rounded to the dtype in which the product is taken."""
    value = value.to(OP)
    if _WIDEN:
        value = value.to(tl.float32)
    return value


@triton.jit
def rows_of(pointer, rows, stride, width, HP: tl.constexpr, OP: tl.constexpr):
    """Rows of h or weight, as wide as the next power of two."""
    j = tl.arange(0, HP)
    at = rows.to(tl.int64)[:, None] * stride + j[None, :]
    return operand(tl.load(pointer + at, (j < width)[None, :], other=0.0), OP)


@triton.jit
def shift_and_level(bias, var, fixed, cols, live, KIND: tl.constexpr):
    """For a block of columns: bias, log-variance (0 if it is fixed: the host adds it) and 1 / variance; 0 where not live."""
    shift = tl.zeros(cols.shape, tl.float32)
    if bias is not None:
        shift = tl.load(bias + cols, live, other=0.0).to(tl.float32)
    level = tl.zeros(cols.shape, tl.float32)
    factor = level + fixed
    if KIND != FIXED:
        level = tl.load(var + (cols if KIND == COLUMNS else cols * 0), live, other=0.0).to(tl.float32)
        factor = exp(-level)
    # An infinite factor times the residual of 0 beyond the last column would be NaN.
    return shift, level, tl.where(live, factor, 0.0)


@triton.jit(do_not_specialize=["count", "batch", "splits", "walk"])
def rows_kernel(count, batch, splits, walk, tensors, strides, cols, width, scalars, C: tl.constexpr):
    """Program (block of rows of h, part of the columns): the terms' sums and h's gradient."""
    h, x, weight, bias, var, up, d_h, parts = tensors
    KIND: tl.constexpr = C[0]
    TERMS: tl.constexpr = C[1]
    SHARED: tl.constexpr = C[2]
    OP: tl.constexpr = C[3]
    PRECISION: tl.constexpr = C[4]
    BM: tl.constexpr = C[5]
    BN: tl.constexpr = C[6]
    HP: tl.constexpr = C[7]
    fixed = read(scalars[0], tl.float32)
    cols = core.to_tensor(cols)
    pid = tl.program_id(0)
    split = pid % splits
    rows = (pid // splits) * BM + tl.arange(0, BM)
    in_rows = rows < count
    # Beyond the last row it is read again: a mask in two dimensions costs an AMD GPU two registers for each element of a thread.
    row = tl.minimum(rows, count - 1)
    mine = rows_of(h, row, strides[0], width, HP, OP)
    of_x = row
    if SHARED:
        of_x = row % batch
    of_x = of_x.to(tl.int64) * strides[1]
    squares = tl.zeros((BM,), tl.float32)
    levels = tl.zeros((BN,), tl.float32)
    grad = tl.zeros((BM, HP), tl.float32)
    first = split * walk
    last = tl.minimum(first + walk, tl.cdiv(cols, BN))
    for tile in range(first, last):
        c = tile * BN + tl.arange(0, BN)
        in_cols = c < cols
        w = rows_of(weight, tl.minimum(c, cols - 1), strides[2], width, HP, OP)
        target = tl.load(x + of_x[:, None] + c[None, :], in_cols[None, :], other=0.0).to(tl.float32)
        shift, level, factor = shift_and_level(bias, var, fixed, c, in_cols, KIND)
        d = tl.dot(mine, tl.trans(w), input_precision=PRECISION) + shift[None, :] - target
        ratio = d * factor[None, :]
        if TERMS != NOTHING:
            squares += tl.sum(d * ratio, 1)
            if KIND != FIXED:
                levels += level
        if d_h is not None:
            grad = tl.dot(operand(ratio, OP), w, grad, input_precision=PRECISION)
    if TERMS != NOTHING:
        constant = (tl.minimum(last * BN, cols) - first * BN).to(tl.float32) * read(scalars[3], tl.float32)
        terms = (0.5 * (squares + tl.sum(levels)) + constant) * read(scalars[4], tl.float32)
        if TERMS == EACH:
            tl.store(parts + rows.to(tl.int64) * splits + split, terms, in_rows)
        else:
            tl.store(parts + pid, tl.sum(tl.where(in_rows, terms, 0.0)))
    if d_h is not None:
        # Upstream gradients multiply the sum and not what is rounded on its way into the product.
        gain = read(scalars[1], tl.float32) * read(scalars[2], tl.float32)
        if up is not None:
            gain = gain * tl.load(up + rows.to(tl.int64) * strides[3], in_rows, other=0.0).to(tl.float32)[:, None]
        j = tl.arange(0, HP)
        at = (split.to(tl.int64) * count + rows)[:, None] * width + j[None, :]
        tl.store(d_h + at, narrow(grad * gain, d_h), in_rows[:, None] & (j < width)[None, :])


@triton.jit
def rated_residual(
    mine, target, shift, factor, rows, in_rows, other, up, up_stride, d_weight, d_bias, d_var, grad, total, slope,
    PRECISION: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """One tile, (columns, rows): the residual over its variance times its row's upstream gradient, and the three sums with it."""
    d = tl.dot(mine, tl.trans(other), input_precision=PRECISION) + shift[:, None] - target
    ratio = tl.where(in_rows[None, :], d * factor[:, None], 0.0)
    share = ratio
    if d_var is not None:
        share = tl.where(in_rows[None, :], 1.0 - d * ratio, 0.0)
    if up is not None:
        rate = tl.load(up + rows.to(tl.int64) * up_stride).to(tl.float32)[None, :]
        ratio *= rate
        share *= rate
    if d_var is not None:
        slope += tl.sum(share, 1)
    if d_bias is not None:
        total += tl.sum(ratio, 1)
    if d_weight is not None:
        grad = tl.dot(operand(ratio, OP), other, grad, input_precision=PRECISION)
    return ratio, grad, total, slope


@triton.jit(do_not_specialize=["count", "batch", "splits", "walk"])
def columns_kernel(count, batch, splits, walk, tensors, strides, cols, width, scalars, C: tl.constexpr):
    """Program (block of columns, part of the rows): the gradients of weight, bias, variance and x."""
    h, x, weight, bias, var, up, d_x, d_weight, d_bias, d_var = tensors
    KIND: tl.constexpr = C[0]
    SHARED: tl.constexpr = C[1]
    OP: tl.constexpr = C[2]
    PRECISION: tl.constexpr = C[3]
    BM: tl.constexpr = C[4]
    BN: tl.constexpr = C[5]
    HP: tl.constexpr = C[6]
    cols = core.to_tensor(cols)
    gain = read(scalars[1], tl.float32) * read(scalars[2], tl.float32)
    pid = tl.program_id(0)
    split = pid % splits
    c = (pid // splits) * BN + tl.arange(0, BN)
    in_cols = c < cols
    mine = rows_of(weight, tl.minimum(c, cols - 1), strides[2], width, HP, OP)
    shift, _, factor = shift_and_level(bias, var, read(scalars[0], tl.float32), c, in_cols, KIND)
    grad = tl.zeros((BN, HP), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    slope = tl.zeros((BN,), tl.float32)
    first = split * walk
    if SHARED and d_x is not None:
        # The rows of x are walked, and for each block of them its samples, whose gradients add up.
        last = tl.minimum(first + walk, tl.cdiv(batch, BM))
        for tile in range(first, last):
            r = tile * BM + tl.arange(0, BM)
            in_rows = r < batch
            r = tl.minimum(r, batch - 1)
            target = tl.load(x + r.to(tl.int64)[None, :] * strides[1] + c[:, None], in_cols[:, None], other=0.0).to(tl.float32)
            sum_x = tl.zeros((BN, BM), tl.float32)
            for sample in range(count // batch):
                rows = sample * batch + r
                other = rows_of(h, rows, strides[0], width, HP, OP)
                ratio, grad, total, slope = rated_residual(
                    mine, target, shift, factor, rows, in_rows, other, up, strides[3], d_weight, d_bias, d_var, grad, total,
                    slope, PRECISION, OP,
                )  # fmt: skip
                sum_x += ratio
            live = in_cols[:, None] & in_rows[None, :]
            tl.store(d_x + r.to(tl.int64)[None, :] * cols + c[:, None], narrow(sum_x * -gain, d_x), live)
    else:
        last = tl.minimum(first + walk, tl.cdiv(count, BM))
        for tile in range(first, last):
            rows = tile * BM + tl.arange(0, BM)
            in_rows = rows < count
            rows = tl.minimum(rows, count - 1)
            r = rows
            if SHARED:
                r = rows % batch
            other = rows_of(h, rows, strides[0], width, HP, OP)
            target = tl.load(x + r.to(tl.int64)[None, :] * strides[1] + c[:, None], in_cols[:, None], other=0.0).to(tl.float32)
            ratio, grad, total, slope = rated_residual(
                mine, target, shift, factor, rows, in_rows, other, up, strides[3], d_weight, d_bias, d_var, grad, total,
                slope, PRECISION, OP,
            )  # fmt: skip
            if d_x is not None:
                live = in_cols[:, None] & in_rows[None, :]
                tl.store(d_x + rows.to(tl.int64)[None, :] * cols + c[:, None], narrow(ratio * -gain, d_x), live)
    at = split.to(tl.int64) * cols + c
    if d_weight is not None:
        j = tl.arange(0, HP)
        tl.store(
            d_weight + at[:, None] * width + j[None, :], narrow(grad * gain, d_weight), in_cols[:, None] & (j < width)[None, :]
        )
    if d_bias is not None:
        tl.store(d_bias + at, narrow(total * gain, d_bias), in_cols)
    if d_var is not None:
        slope = slope * (0.5 * gain)
        if KIND == COLUMNS:
            tl.store(d_var + at, narrow(slope, d_var), in_cols)
        else:
            tl.store(d_var + pid, tl.sum(tl.where(in_cols, slope, 0.0)))


# ---- the host side ---------------------------------------------------------------------------------------------------------------

# For `rows_kernel` and `columns_kernel`, by the kind of products and the width of h, padded: what fits in the registers of every
# target of `benchmarks/codegen.py` and in 99 KiB of shared memory. Products of tf32x3 hold each operand in two parts; those of ieee
# are multiply-adds, which hold both factors in registers.
_HALF = Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)
_TF32 = Tile(64, 32, 4, 3), Tile(64, 32, 8, 2)
_WIDE = Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)
_TF32X3 = Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)
_AMD = dict.fromkeys((16, 32, 64, 128), (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)))
TILES: dict[str, dict[str, dict[int, tuple[Tile, Tile]]]] = {
    "cuda": {
        "half": dict.fromkeys((16, 32, 64, 128), _HALF),
        "tf32": {16: _TF32, 32: _TF32, 64: _TF32, 128: (Tile(64, 32, 8, 2), Tile(64, 16, 8, 2))},
        "tf32x3": {16: _TF32X3, 32: _TF32X3, 64: _TF32X3, 128: (Tile(32, 16, 8, 2), Tile(16, 32, 4, 2))},
        "ieee": {16: _WIDE, 32: _WIDE, 64: _WIDE, 128: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2))},
    },
    "hip": {"half": _AMD, "ieee": _AMD},
}

_PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def _products(operands: torch.dtype, precision: str | None, backend: str) -> str:
    """Kind of products: a row of `TILES`, and for float32 the `input_precision` of `tl.dot`."""
    if operands != torch.float32:
        return "half"
    if backend == "hip":
        return "ieee"  # in matrix instructions, which take float32; tf32 exists on one of the architectures only
    return precision or _PRECISIONS[torch.get_float32_matmul_precision()]


def _split(owners: int, tiles: int) -> tuple[int, int]:
    """(parts of a walk, tiles of a part) for so many walks of so many tiles."""
    parts = max(1, min(WANTED // owners, tiles // SHORTEST))
    walk = -(-tiles // parts)
    return -(-tiles // walk), walk


def _rows_dense(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _tiles(h, x, weight, bias, var, full, keep, scale, up, precision, needs, want_terms, acc):
    """The terms' sums and the gradients by the two kernels; `up` is None for an upstream gradient of 1."""
    (count, width), (batch, cols), device = h.shape, x.shape, x.device
    h, x, weight = _rows_dense(h), _rows_dense(x), _rows_dense(weight)
    bias, learned = (t if t is None else t.contiguous() for t in (bias, var if isinstance(var, Tensor) else None))
    backend, operands = launch_module.backend(), torch.promote_types(h.dtype, weight.dtype)
    products = _products(operands, precision, backend)
    padded = max(16, triton.next_power_of_2(width))
    by_rows, by_columns = TILES[backend][products][padded]
    dot = (OPERANDS[operands], "ieee" if products == "half" else products)
    kind = FIXED if learned is None else SCALAR if learned.numel() == 1 else COLUMNS
    level = 0.0 if learned is not None else var
    of_row = up if keep else None
    strides = (h.stride(0), x.stride(0), weight.stride(0), of_row.stride(0) if of_row is not None else 0)
    factors = (inverse_variance(level), scale, 1.0 if up is None or keep else up)
    shared = count != batch

    def empty(*shape: int, like: Tensor | None = None) -> Tensor:
        return torch.empty(shape, dtype=acc if like is None else like.dtype, device=device)

    need_h, need_x, need_weight, need_bias, need_var = needs
    nll = d_h = terms = None
    if need_h or want_terms:
        owners = -(-count // by_rows.own)
        splits, walk = _split(owners, -(-cols // by_rows.step))
        sink, parts = NOTHING, None
        if want_terms:
            sink, nll = (EACH, empty(count)) if keep else (TOTAL, empty())
            parts = nll if keep and splits == 1 else empty(count * splits if keep else owners * splits)
            if parts is not nll:
                terms = Segments(parts, nll, 1, *((count, splits) if keep else (1, owners * splits)))
        if need_h:
            d_h = empty(count, width, like=h) if splits == 1 else empty(splits, count, width)
        constant = 0.5 * level + (0.5 * LOG_2PI if full else 0.0)
        launch(
            rows_kernel, owners * splits, device, count, batch, splits, walk, (h, x, weight, bias, learned, of_row, d_h, parts),
            strides, cols, width, tuple(scalar(f, acc, device) for f in (*factors, constant, scale)),
            (kind.value, sink.value, shared, *dot, by_rows.own, by_rows.step, padded), tuned=by_rows.tuned,
        )  # fmt: skip

    d_x = d_weight = d_bias = d_var = of_bias = of_var = None
    if any(needs[1:]):
        owners = -(-cols // by_columns.own)
        splits, walk = _split(owners, -(-(batch if need_x else count) // by_columns.step))
        many = splits > 1
        if need_x:
            d_x = empty(batch, cols, like=x)
        if need_weight:
            d_weight = empty(splits, cols, width) if many else empty(cols, width, like=weight)
        if need_bias:
            d_bias = empty(cols, like=bias)
            if many:
                of_bias = Segments(empty(splits, cols), d_bias, splits, cols, 1)
        if need_var:
            d_var = torch.empty(var.shape, dtype=var.dtype, device=device)
            if kind is SCALAR:
                of_var = Segments(empty(owners * splits), d_var, 1, 1, owners * splits)
            elif many:
                of_var = Segments(empty(splits, cols), d_var, splits, cols, 1)
        launch(
            columns_kernel, owners * splits, device, count, batch, splits, walk,
            (
                h, x, weight, bias, learned, of_row, d_x, d_weight,
                d_bias if of_bias is None else of_bias.parts, d_var if of_var is None else of_var.parts,
            ),
            strides, cols, width, tuple(scalar(f, acc, device) for f in factors),
            (kind.value, shared, *dot, by_columns.step, by_columns.own, padded), tuned=by_columns.tuned,
        )  # fmt: skip
    finish(acc, a=terms, b=of_bias, v=of_var)
    d_h, d_weight = (None if d is None else d.sum(0).to(t.dtype) if d.ndim == 3 else d for d, t in ((d_h, h), (d_weight, weight)))
    return nll, (d_h, d_x, d_weight, d_bias, d_var)


@contextlib.contextmanager
def _matmul_precision(precision: str | None, device: torch.device) -> Iterator[None]:
    """torch's setting for float32 products on a GPU; the products of "tf32x3" are nearer to float32's than to tf32's."""
    if precision is None or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _add_product(out: Tensor, a: Tensor, b: Tensor, fresh: bool = False) -> None:
    """out += a b, or out = a b, where halves multiply into a float32 out without being rounded in between."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=0 if fresh else 1, out=out)
    elif _WIDE_PRODUCTS and a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=0 if fresh else 1, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=0 if fresh else 1, out=out)


# Since torch 2.8, of CUDA.
_WIDE_PRODUCTS = torch.version.cuda is not None and hasattr(torch.ops.aten.addmm, "dtype_out")


def _blocks(h, x, weight, bias, var, full, keep, scale, up, precision, needs, want_terms, acc):
    """What `_tiles` returns, by torch's matrix products over blocks of the reconstruction."""
    need_h, need_x, need_weight, need_bias, need_var = needs
    (count, width), (batch, cols), device = h.shape, x.shape, x.device
    operands = torch.promote_types(h.dtype, weight.dtype)
    learned = torch.full((), var, dtype=acc, device=device) if not isinstance(var, Tensor) else var.to(acc)
    learned = learned.expand(cols) if learned.numel() == 1 else learned
    factor = torch.exp(-learned)
    rate = None if up is None or not keep else up.to(acc).unsqueeze(1)
    gain = scale if up is None or keep else up * scale

    summed_x = need_x and count != batch
    tiles = 3 if summed_x else 2
    height = max(1, min(batch, SCRATCH // tiles // acc.itemsize))
    span = max(1, min(cols, SCRATCH // tiles // acc.itemsize // height))
    scratch = torch.empty(tiles, height * span, dtype=acc, device=device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=acc, device=device)

    d_h, d_weight, d_bias = (
        zeros(*shape) if need else None
        for need, shape in ((need_h, (count, width)), (need_weight, (cols, width)), (need_bias, (cols,)))
    )
    d_x = torch.empty(batch, cols, dtype=x.dtype, device=device) if need_x else None
    squares, slopes = zeros(count), zeros(cols)
    with _matmul_precision(precision, device):
        for left in range(0, cols, span):
            at = slice(left, min(left + span, cols))
            w, f = weight[at].to(operands), factor[at]
            for top in range(0, batch, height):
                rows = slice(top, min(top + height, batch))
                shape = rows.stop - top, at.stop - left
                d, other, *total = (s[: math.prod(shape)].view(shape) for s in scratch)
                for sample in range(0, count, batch):
                    here = slice(sample + top, sample + rows.stop)
                    mine = h[here].to(operands)
                    _add_product(d, mine, w.T, fresh=True)
                    if bias is not None:
                        d += bias[at]
                    d -= x[rows, at]
                    torch.mul(d, f, out=other)
                    if need_h:
                        _add_product(d_h[here], other.to(operands), w)
                    d *= other
                    if want_terms:
                        squares[here] += d.sum(1)
                    if need_var:
                        d.neg_().add_(1.0)
                        slopes[at] += (d if rate is None else d.mul_(rate[here])).sum(0)
                    if rate is not None:
                        other *= rate[here]
                    if need_weight:
                        _add_product(d_weight[at], other.to(operands).T, mine)
                    if need_bias:
                        d_bias[at] += other.sum(0)
                    if summed_x:
                        total[0].copy_(other) if sample == 0 else total[0].add_(other)
                if need_x:
                    d_x[rows, at] = (total[0] if summed_x else other).mul_(-gain)

    nll = None
    if want_terms:
        terms = 0.5 * (squares + learned.sum()) + (0.5 * LOG_2PI * cols if full else 0.0)
        nll = ((terms if keep else terms.sum()) * scale).to(acc)
    if need_h and rate is not None:
        d_h *= rate
    d_var = (slopes if need_var and var.numel() == cols else slopes.sum()) * 0.5 if need_var else None
    grads = [None if d is None else (d * gain).to(t.dtype) for d, t in ((d_h, h), (d_weight, weight), (d_bias, bias), (d_var, var))]
    return nll, (grads[0], d_x, *grads[1:3], None if d_var is None else grads[3].reshape(var.shape))


def _run(h, x, weight, bias, var, *rest):
    """By tiles where the kernels can number them and hold a row of h, and otherwise by blocks."""
    acc = accumulate_dtype(h, x, weight, bias, var)
    small = 0 < h.shape[1] <= WIDEST and 0 < h.shape[0] < _MOST and 0 < x.shape[1] < _MOST
    return (_tiles if acc == torch.float32 and small else _blocks)(h, x, weight, bias, var, *rest, acc)


# Rows or columns, counted in int32 and up to the end of a tile.
_MOST = 2**31 - 2**10


def linear_nll_forward(h, x, weight, bias, var, full, keep, scale, precision, needs):
    half = any(isinstance(t, Tensor) and t.dtype == torch.float16 for t in (h, x, weight, bias, var))
    early = keep == 0 and any(needs) and not half
    nll, grads = _run(h, x, weight, bias, var, full, keep, scale, None, precision, needs if early else (False,) * 5, True)
    return nll, grads if early else None


def linear_nll_backward(h, x, weight, bias, var, keep, scale, grad, precision, needs):
    return _run(h, x, weight, bias, var, False, keep, scale, grad, precision, needs, False)[1]
