"""Across a linear decoder: -log N(x; h weight^T + bias, var), and the whole ELBO where h is a sample z of N(mu, exp(logvar)).

Neither the reconstruction nor its gradient is ever in memory. Two kernels, each with a product that makes a tile of the
reconstruction and one that uses it up. `rows_kernel` owns rows of h, which it reads or samples in registers, and walks the columns
of x: the terms, the KL and the gradients of h, or of mu and logvar. `columns_kernel` owns columns of x and walks the rows: the
gradients of weight, bias, variance and x. Each would have to share the other's sums between programs; making the tile twice is
cheaper, since h and weight are narrow. Drawing noise twice is not, so the rows leave z, of mu's size, to the columns where these
have work. Where owners alone are too few to fill a chip, walks are split, and the parts are added in a fixed order.

A decoder input wider than `WIDEST`, and float64, go by tiles through torch's matrix products instead, as in `fastelbo.eager`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

import fastelbo.kernels
from fastelbo import eager
from fastelbo.reference import LOG_2PI, accumulate_dtype

from . import launch as launch_module
from .gaussian_kl import kl_math
from .gaussian_nll import inverse_variance
from .launch import INTERPRETED, launch, narrow, read, scalar
from .math import exp
from .philox import normal_at, normal_tile_aligned
from .reduction import EACH, NOTHING, TOTAL, Segments, finish
from .reparameterize import ALIGNED, GIVEN, NO_NOISE, UNALIGNED

FIXED, SCALAR, COLUMNS = (tl.constexpr(i) for i in range(3))

# The widest h whose rows stay on the chip through a walk.
WIDEST = 128
# Programs of a launch, where sizes allow: some for every multiprocessor of the largest chips. A constant, so that every device adds
# in the same order.
WANTED = 512
# Tiles of a walk that is not split further: each part of a split walk costs a row block of partial sums.
SHORTEST = 4

# The interpreter multiplies the bit patterns of bfloat16.
_WIDEN = tl.constexpr(INTERPRETED)


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
def rows_of(pointer, rows, stride, width, HP: tl.constexpr):
    """Rows of a matrix, as wide as the next power of two."""
    j = tl.arange(0, HP)
    at = rows.to(tl.int64)[:, None] * stride + j[None, :]
    return tl.load(pointer + at, (j < width)[None, :], other=0.0)


@triton.jit
def noise_of(eps, seed, rows, width, HP: tl.constexpr, NOISE: tl.constexpr):
    """The noise of rows of z: read, or drawn by the elements' numbers (beyond the last column as well, which nobody uses)."""
    start = rows.to(tl.int64) * width
    if NOISE == GIVEN:
        noise = rows_of(eps, rows, width, width, HP).to(tl.float32)
    elif NOISE == ALIGNED:
        noise = normal_tile_aligned(tl.load(seed), (start >> 2)[:, None] + tl.arange(0, HP // 4)[None, :])
    else:
        noise = normal_at(tl.load(seed), start[:, None] + tl.arange(0, HP)[None, :])
    return noise


@triton.jit
def shift_and_level(bias, var, fixed, gain, cols, live, KIND: tl.constexpr):
    """For a block of columns: bias, log-variance (0 if it is fixed: the host adds it) and gain / variance; 0 where not live.

    A mean's 1 / batch belongs here: sums that it multiplies later may overflow.
    """
    shift = tl.zeros(cols.shape, tl.float32)
    if bias is not None:
        shift = tl.load(bias + cols, live, other=0.0).to(tl.float32)
    level = tl.zeros(cols.shape, tl.float32)
    factor = level + fixed * gain
    if KIND != FIXED:
        level = tl.load(var + (cols if KIND == COLUMNS else cols * 0), live, other=0.0).to(tl.float32)
        factor = exp(-level) * gain
    # An infinite factor times the residual of 0 beyond the last column would be NaN.
    return shift, level, tl.where(live, factor, 0.0)


@triton.jit(do_not_specialize=["batch", "splits", "walk"])
def rows_kernel(batch, splits, walk, tensors, latent, strides, cols, width, scalars, C: tl.constexpr):
    """Program (sample, block of rows of x, part of the columns): the terms' sums, and the gradient of h or what z is made from."""
    h, x, weight, bias, var, up, d_h, parts = tensors
    mu, logvar, prior_mu, prior_logvar, eps, seed, d_mu, d_logvar, d_prior_mu, d_prior_logvar, kls = latent
    KIND: tl.constexpr = C[0]
    TERMS: tl.constexpr = C[1]
    NOISE: tl.constexpr = C[2]
    SLOPES: tl.constexpr = C[3]
    OP: tl.constexpr = C[4]
    SLOPE: tl.constexpr = C[5]
    PRECISION: tl.constexpr = C[6]
    BM: tl.constexpr = C[7]
    BN: tl.constexpr = C[8]
    HP: tl.constexpr = C[9]
    fixed = read(scalars[0], tl.float32)
    scale = read(scalars[1], tl.float32)
    rate = read(scalars[2], tl.float32)
    cols = core.to_tensor(cols)
    pid = tl.program_id(0)
    split = pid % splits
    owner = pid // splits
    blocks = tl.cdiv(batch, BM)
    sample = owner // blocks
    row = (owner % blocks) * BM + tl.arange(0, BM)
    in_rows = row < batch
    # Beyond the last row it is read again: a mask in two dimensions costs an AMD GPU two registers for each element of a thread.
    row = tl.minimum(row, batch - 1)
    rows = sample * batch + row
    j = tl.arange(0, HP)
    live = in_rows[:, None] & (j < width)[None, :]
    if NOISE == NO_NOISE:
        mine = operand(rows_of(h, rows, strides[0], width, HP), OP)
    else:
        sigma = exp(0.5 * rows_of(logvar, row, strides[5], width, HP).to(tl.float32))
        z = rows_of(mu, row, strides[4], width, HP).to(tl.float32) + sigma * noise_of(eps, seed, rows, width, HP, NOISE)
        z = narrow(z, mu)
        if h is not None:
            if split == 0:
                tl.store(h + rows.to(tl.int64)[:, None] * width + j[None, :], z, live)
        mine = operand(z, OP)

    of_x = row.to(tl.int64) * strides[1]
    squares = tl.zeros((BM,), tl.float32)
    levels = tl.zeros((BN,), tl.float32)
    grad = tl.zeros((BM, HP), tl.float32)
    first = split * walk
    last = tl.minimum(first + walk, tl.cdiv(cols, BN))
    if SLOPES or TERMS != NOTHING:
        for tile in range(first, last):
            c = tile * BN + tl.arange(0, BN)
            in_cols = c < cols
            w = operand(rows_of(weight, tl.minimum(c, cols - 1), strides[2], width, HP), OP)
            target = tl.load(x + of_x[:, None] + c[None, :], in_cols[None, :], other=0.0).to(tl.float32)
            shift, level, factor = shift_and_level(bias, var, fixed, scale * rate, c, in_cols, KIND)
            d = tl.dot(mine, tl.trans(w), input_precision=PRECISION) + shift[None, :] - target
            ratio = d * factor[None, :]
            if TERMS != NOTHING:
                squares += tl.sum(d * ratio, 1)
                if KIND != FIXED:
                    levels += level
            if SLOPES:
                grad = tl.dot(operand(ratio, SLOPE), operand(w, SLOPE), grad, input_precision=PRECISION)

    if TERMS != NOTHING:
        # Terms are asked for with an upstream gradient of 1, so the squares have their scale.
        constant = (tl.minimum(last * BN, cols) - first * BN).to(tl.float32) * read(scalars[3], tl.float32)
        terms = 0.5 * squares + (0.5 * tl.sum(levels) + constant) * scale
        if TERMS == EACH:
            tl.store(parts + rows.to(tl.int64) * splits + split, terms, in_rows)
        else:
            tl.store(parts + pid, tl.sum(tl.where(in_rows, terms, 0.0)))
    if up is not None:
        of_row = tl.load(up + rows.to(tl.int64) * strides[3]).to(tl.float32)[:, None]
        rate = rate * of_row
        grad *= of_row
    at = ((sample * splits + split).to(tl.int64) * batch + row)[:, None] * width + j[None, :]
    if d_h is not None:
        tl.store(d_h + at, narrow(grad, d_h), live)
    if NOISE != NO_NOISE:
        # Read and drawn again: over the walk they would fill the registers.
        lv = rows_of(logvar, row, strides[5], width, HP).to(tl.float32)
        through = grad
        if SLOPES:
            through = 0.5 * exp(0.5 * lv) * noise_of(eps, seed, rows, width, HP, NOISE) * grad
        # The KL of a row belongs to one of the programs that share it.
        if (split == 0) & (sample == 0):
            m = rows_of(mu, row, strides[4], width, HP).to(tl.float32)
            pm = None
            if prior_mu is not None:
                pm = rows_of(prior_mu, row, strides[6], width, HP).to(tl.float32)
            plv = None
            if prior_logvar is not None:
                plv = rows_of(prior_logvar, row, strides[7], width, HP).to(tl.float32)
            term, of_mu, of_lv, of_plv = kl_math(m, lv, pm, plv)
            kl_scale = read(scalars[4], tl.float32)
            if TERMS != NOTHING:
                term = tl.where(live, term, 0.0)
                if TERMS == EACH:
                    tl.store(kls + row, tl.sum(term, 1) * kl_scale, in_rows)
                else:
                    tl.store(kls + owner, tl.sum(term) * kl_scale)
            of_kl = rate * (kl_scale * read(scalars[5], tl.float32))
            grad += of_mu * of_kl
            through += of_lv * of_kl
            if d_prior_mu is not None:
                tl.store(d_prior_mu + at, narrow(-of_mu * of_kl, d_prior_mu), live)
            if d_prior_logvar is not None:
                tl.store(d_prior_logvar + at, narrow(of_plv * of_kl, d_prior_logvar), live)
        if d_mu is not None:
            tl.store(d_mu + at, narrow(grad, d_mu), live)
        if d_logvar is not None:
            tl.store(d_logvar + at, narrow(through, d_logvar), live)


@triton.jit
def rated_residual(
    mine, target, shift, factor, gain, rows, in_rows, other, up, up_stride, d_weight, d_bias, d_var, grad, total, slope,
    PRECISION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """One tile, (columns, rows): the residual over its variance times its row's upstream gradient, and the three sums with it."""
    d = tl.dot(mine, tl.trans(other), input_precision=PRECISION) + shift[:, None] - target
    ratio = tl.where(in_rows[None, :], d * factor[:, None], 0.0)
    share = ratio
    if d_var is not None:
        share = tl.where(in_rows[None, :], gain - d * ratio, 0.0)
    if up is not None:
        rate = tl.load(up + rows.to(tl.int64) * up_stride).to(tl.float32)[None, :]
        ratio *= rate
        share *= rate
    if d_var is not None:
        slope += tl.sum(share, 1)
    if d_bias is not None:
        total += tl.sum(ratio, 1)
    if d_weight is not None:
        grad = tl.dot(operand(ratio, SLOPE), operand(other, SLOPE), grad, input_precision=PRECISION)
    return ratio, grad, total, slope


@triton.jit(do_not_specialize=["count", "batch", "splits", "walk"])
def columns_kernel(count, batch, splits, walk, tensors, strides, cols, width, scalars, C: tl.constexpr):
    """Program (block of columns, part of the rows): the gradients of weight, bias, variance and x."""
    h, x, weight, bias, var, up, d_x, d_weight, d_bias, d_var = tensors
    KIND: tl.constexpr = C[0]
    SHARED: tl.constexpr = C[1]
    OP: tl.constexpr = C[2]
    SLOPE: tl.constexpr = C[3]
    PRECISION: tl.constexpr = C[4]
    BM: tl.constexpr = C[5]
    BN: tl.constexpr = C[6]
    HP: tl.constexpr = C[7]
    cols = core.to_tensor(cols)
    gain = read(scalars[1], tl.float32) * read(scalars[2], tl.float32)
    pid = tl.program_id(0)
    split = pid % splits
    c = (pid // splits) * BN + tl.arange(0, BN)
    in_cols = c < cols
    mine = operand(rows_of(weight, tl.minimum(c, cols - 1), strides[2], width, HP), OP)
    shift, _, factor = shift_and_level(bias, var, read(scalars[0], tl.float32), gain, c, in_cols, KIND)
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
                other = operand(rows_of(h, rows, strides[0], width, HP), OP)
                ratio, grad, total, slope = rated_residual(
                    mine, target, shift, factor, gain, rows, in_rows, other, up, strides[3], d_weight, d_bias, d_var, grad, total,
                    slope, PRECISION, SLOPE,
                )  # fmt: skip
                sum_x += ratio
            live = in_cols[:, None] & in_rows[None, :]
            tl.store(d_x + r.to(tl.int64)[None, :] * cols + c[:, None], narrow(-sum_x, d_x), live)
    else:
        last = tl.minimum(first + walk, tl.cdiv(count, BM))
        for tile in range(first, last):
            rows = tile * BM + tl.arange(0, BM)
            in_rows = rows < count
            rows = tl.minimum(rows, count - 1)
            r = rows
            if SHARED:
                r = rows % batch
            other = operand(rows_of(h, rows, strides[0], width, HP), OP)
            target = tl.load(x + r.to(tl.int64)[None, :] * strides[1] + c[:, None], in_cols[:, None], other=0.0).to(tl.float32)
            ratio, grad, total, slope = rated_residual(
                mine, target, shift, factor, gain, rows, in_rows, other, up, strides[3], d_weight, d_bias, d_var, grad, total,
                slope, PRECISION, SLOPE,
            )  # fmt: skip
            if d_x is not None:
                live = in_cols[:, None] & in_rows[None, :]
                tl.store(d_x + rows.to(tl.int64)[None, :] * cols + c[:, None], narrow(-ratio, d_x), live)
    at = split.to(tl.int64) * cols + c
    if d_weight is not None:
        j = tl.arange(0, HP)
        tl.store(d_weight + at[:, None] * width + j[None, :], narrow(grad, d_weight), in_cols[:, None] & (j < width)[None, :])
    if d_bias is not None:
        tl.store(d_bias + at, narrow(total, d_bias), in_cols)
    if d_var is not None:
        slope = slope * 0.5
        if KIND == COLUMNS:
            tl.store(d_var + at, narrow(slope, d_var), in_cols)
        else:
            tl.store(d_var + pid, tl.sum(tl.where(in_cols, slope, 0.0)))


# ---- the host side ---------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Of `rows_kernel`, of `columns_kernel`, and of `rows_kernel` where it samples."""

    rows: Tile
    columns: Tile
    sampled: Tile


# By the kind of products and the width of h, padded: what fits in the registers of every target of `benchmarks/codegen.py` and in
# 99 KiB of shared memory. Products of tf32x3 hold each operand in two parts; those of ieee are multiply-adds, which hold both
# factors in registers. Sampling and the KL work on all of a block's mu and logvar at once.
_HALF = Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)
_TF32 = Tile(64, 32, 4, 3), Tile(64, 32, 8, 2)
_WIDE = Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)
_TF32X3 = Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)
_AMD = Tile(64, 32, 4, 2), Tile(64, 16, 4, 2)
_OF_HALF = {
    16: Tiles(*_HALF, _HALF[0]),
    32: Tiles(*_HALF, _HALF[0]),
    64: Tiles(*_HALF, Tile(64, 32, 8, 3)),
    128: Tiles(*_HALF, Tile(32, 64, 8, 3)),
}
_OF_TF32 = {
    16: Tiles(*_TF32, _TF32[0]),
    32: Tiles(*_TF32, _TF32[0]),
    64: Tiles(*_TF32, Tile(64, 32, 8, 2)),
    128: Tiles(Tile(64, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 32, 8, 2)),
}
_OF_AMD = dict.fromkeys((16, 32, 64, 128), Tiles(*_AMD, Tile(32, 32, 4, 2)))
TILES: dict[str, dict[str, dict[int, Tiles]]] = {
    "cuda": {
        "bf16": _OF_HALF,
        "fp16": _OF_TF32,
        "tf32": _OF_TF32,
        "tf32x3": dict.fromkeys((16, 32, 64), Tiles(*_TF32X3, _TF32X3[0]))
        | {128: Tiles(Tile(32, 16, 8, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2))},
        "ieee": dict.fromkeys((16, 32, 64), Tiles(*_WIDE, _WIDE[0]))
        | {128: Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2))},
    },
    "hip": {"bf16": _OF_AMD, "fp16": _OF_AMD, "ieee": _OF_AMD},
}

_PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def _products(operands: torch.dtype, precision: str | None, backend: str) -> str:
    """Kind of products: a row of `TILES`."""
    if operands != torch.float32:
        return "bf16" if operands == torch.bfloat16 else "fp16"
    if backend == "hip":
        return "ieee"  # in matrix instructions, which take float32; tf32 exists on one of the architectures only
    return precision or _PRECISIONS[torch.get_float32_matmul_precision()]


def _dot(products: str, backend: str) -> tuple[tl.dtype, tl.dtype, str]:
    """Dtypes of the operands that make the reconstruction and of those that use the residual up; and `tl.dot`'s precision.

    A residual over a small variance leaves float16's range. tf32 has float16's digits and float32's range.
    """
    if products == "fp16":
        return tl.float16, tl.float32, "ieee" if backend == "hip" else "tf32"
    return (tl.bfloat16, tl.bfloat16, "ieee") if products == "bf16" else (tl.float32, tl.float32, products)


def _split(owners: int, tiles: int) -> tuple[int, int]:
    """(parts of a walk, tiles of a part) for so many walks of so many tiles."""
    parts = max(1, min(WANTED // owners, tiles // SHORTEST))
    walk = -(-tiles // parts)
    return -(-tiles // walk), walk


def _rows_dense(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


class Latent(NamedTuple):
    """What h is sampled from, what of the KL is to come, and which gradients are wanted."""

    mu: Tensor
    logvar: Tensor
    prior_mu: Tensor | None
    prior_logvar: Tensor | None
    eps: Tensor | None
    seed: Tensor | None
    kl_scale: float | Tensor
    beta: float | Tensor
    needs: tuple[bool, ...]


class Layer(NamedTuple):
    """What both kernels are told: dense rows, how they are multiplied, and the factors of every gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    var: Tensor | None  # None where it is fixed
    level: float  # then the log-variance
    kind: tl.constexpr
    samples: int
    tiles: Tiles
    products: tuple[tl.dtype, tl.dtype, str]
    padded: int
    scale: float | Tensor
    up: Tensor | None  # of each row of h
    gain: float | Tensor  # or of them all

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.var, self.up

    @property
    def factors(self) -> tuple[float | Tensor, ...]:
        return inverse_variance(self.level), self.scale, self.gain


def _layer(x, weight, bias, var, of_h, samples, keep, scale, up, precision) -> Layer:
    backend, operands = launch_module.backend(), torch.promote_types(of_h, weight.dtype)
    products, padded = _products(operands, precision, backend), max(16, triton.next_power_of_2(weight.shape[1]))
    learned = var.contiguous() if isinstance(var, Tensor) else None
    return Layer(
        _rows_dense(x), _rows_dense(weight), bias if bias is None else bias.contiguous(), learned,
        0.0 if learned is not None else var, FIXED if learned is None else SCALAR if learned.numel() == 1 else COLUMNS, samples,
        TILES[backend][products][padded], _dot(products, backend), padded, scale, up if keep else None,
        1.0 if up is None or keep else up,
    )  # fmt: skip


def _launch(kernel, programs, sizes, layer, h, outs, extra, more_factors, flags, tile, by_rows) -> None:
    """Of either kernel, whose arguments begin and end alike. `extra` is what `rows_kernel` samples from."""
    x, weight, bias, var, up = layer.tensors
    device, (cols, width) = x.device, weight.shape
    strides = [0 if t is None else t.stride(0) for t in (h, x, weight, up, *extra[:4])]
    scalars = tuple(scalar(f, torch.float32, device) for f in (*layer.factors, *more_factors))
    blocks = (tile.own, tile.step) if by_rows else (tile.step, tile.own)
    launch(
        kernel, programs, device, *sizes, (h, x, weight, bias, var, up, *outs), *((extra,) if by_rows else ()), tuple(strides),
        cols, width, scalars, (layer.kind.value, *flags, *layer.products, *blocks, layer.padded), tuned=tile.tuned,
    )  # fmt: skip


def _rows(layer, h, latent, full, keep, need_h, want_terms):
    """(nll, kl), what of them is still to be added up, and the gradients of h, mu, logvar and the prior, in parts where split."""
    x, samples, (cols, width) = layer.x, layer.samples, layer.weight.shape
    batch, device, tile = len(x), x.device, layer.tiles.rows if latent is None else layer.tiles.sampled
    blocks = -(-batch // tile.own)
    splits, walk = _split(samples * blocks, -(-cols // tile.step))
    empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
    sink, nll, kl, parts, kl_parts, terms, kls = NOTHING, None, None, None, None, None, None
    if want_terms:
        # A row of x has the terms of all its samples. But rows of an h that is not sampled here are told apart.
        kept, outer = (batch, samples) if latent is not None else (samples * batch, 1)
        sink, nll = (EACH, empty(kept)) if keep else (TOTAL, empty(()))
        parts = nll
        if not keep or splits * outer > 1:
            parts = empty(samples * batch * splits if keep else samples * blocks * splits)
            terms = Segments(parts, nll, *((outer, kept, splits) if keep else (1, 1, parts.numel())))
        if latent is not None:
            kl = empty(batch if keep else ())
            kl_parts = kl if keep else empty(blocks)
            kls = None if keep else Segments(kl_parts, kl, 1, 1, blocks)

    slopes: list[Tensor | None] = [None] * 5
    noise, extra, factors = NO_NOISE, (None,) * 11, (1.0, 1.0)
    whole, shares = samples * splits == 1, (samples * splits, batch, width)
    if latent is not None:
        for i, (t, need) in enumerate(zip(latent[:4], latent.needs, strict=True)):
            if need:
                # The prior's have no parts: they are of the KL alone.
                slopes[i + 1] = empty(t.shape, dtype=t.dtype) if whole or i > 1 else empty(shares)
        eps = None if latent.eps is None else latent.eps.contiguous()
        noise = GIVEN if eps is not None else ALIGNED if width % 4 == 0 else UNALIGNED
        extra = *latent[:4], eps, latent.seed, *slopes[1:], kl_parts
        factors = latent.kl_scale, latent.beta
    elif need_h:
        slopes[0] = empty(h.shape, dtype=h.dtype) if splits == 1 else empty((samples, splits, batch, width))
    constant = 0.5 * layer.level + (0.5 * LOG_2PI if full else 0.0)
    flags = sink.value, noise.value, any(s is not None for s in slopes[:3])
    _launch(
        rows_kernel, samples * blocks * splits, (batch, splits, walk), layer, h, (slopes[0], parts), extra, (constant, *factors),
        flags, tile, True,
    )  # fmt: skip
    return (nll, kl), (terms, kls), slopes


def _columns(layer, h, needs):
    """The gradients of x, weight (in parts where split), bias and variance, and what of the last two is still to be added up."""
    need_x, need_weight, need_bias, need_var = needs
    x, bias, var, (cols, width) = layer.x, layer.bias, layer.var, layer.weight.shape
    tile, batch = layer.tiles.columns, len(x)
    owners = -(-cols // tile.own)
    splits, walk = _split(owners, -(-(batch if need_x else layer.samples * batch) // tile.step))
    empty = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    d_x = d_weight = d_bias = d_var = of_bias = of_var = None
    if need_x:
        d_x = empty(x.shape, dtype=x.dtype)
    if need_weight:
        d_weight = empty((splits, cols, width)) if splits > 1 else empty((cols, width), dtype=layer.weight.dtype)
    if need_bias:
        d_bias = empty(bias.shape, dtype=bias.dtype)
        of_bias = Segments(empty((splits, cols)), d_bias, splits, cols, 1) if splits > 1 else None
    if need_var:
        d_var = empty(var.shape, dtype=var.dtype)
        if layer.kind is SCALAR:
            of_var = Segments(empty(owners * splits), d_var, 1, 1, owners * splits)
        elif splits > 1:
            of_var = Segments(empty((splits, cols)), d_var, splits, cols, 1)
    outs = d_x, d_weight, *(d if s is None else s.parts for d, s in ((d_bias, of_bias), (d_var, of_var)))
    sizes = layer.samples * batch, batch, splits, walk
    _launch(columns_kernel, owners * splits, sizes, layer, h, outs, (), (), (layer.samples > 1,), tile, False)
    return (d_x, d_weight, d_bias, d_var), (of_bias, of_var)


def _tiles(h, x, weight, bias, var, full, keep, scale, up, precision, needs, want_terms, latent=None, samples=1):
    """(loss, nll, kl), the gradients of h, mu, logvar and the prior, and those of x and the layer, by the two kernels.

    `up` is None for an upstream gradient of 1. With `latent` h is None, and otherwise nll is the loss.
    """
    need_h, *needs_columns = needs
    if latent is None:
        h, samples = _rows_dense(h), len(h) // len(x)
    else:
        latent = Latent(*(t if t is None else _rows_dense(t) for t in latent[:4]), *latent[4:])
        if any(needs_columns):
            h = torch.empty(samples * len(x), weight.shape[1], dtype=latent.mu.dtype, device=x.device)
    layer = _layer(x, weight, bias, var, h.dtype if latent is None else latent.mu.dtype, samples, keep, scale, up, precision)
    nll = kl = terms = kls = of_bias = of_var = None
    slopes, grads = [None] * 5, (None,) * 4
    if need_h or want_terms or latent is not None:
        (nll, kl), (terms, kls), slopes = _rows(layer, h, latent, full, keep, need_h, want_terms)
    if any(needs_columns):
        grads, (of_bias, of_var) = _columns(layer, h, needs_columns)

    loss = None if kls is None else torch.empty((), dtype=torch.float32, device=x.device)
    # One launch adds up three families at most.
    second, third, *more = (*(s for s in (kls, of_var, of_bias) if s is not None), None, None)
    finish(torch.float32, a=terms, b=second, v=third, loss=loss, beta=1.0 if latent is None else latent.beta)
    finish(torch.float32, v=more[0] if more else None)
    if latent is not None and want_terms and keep:
        loss = nll + latent.beta * kl

    def whole(parts: Tensor | None, t: Tensor | None) -> Tensor | None:
        return parts if parts is None or parts.ndim == 2 else parts.sum(-3).view(-1, parts.shape[-1]).to(t.dtype)

    of_latent = (None,) * 4 if latent is None else latent[:4]
    slopes = [whole(g, t) for g, t in zip(slopes, (h, *of_latent), strict=True)]
    d_x, d_weight, *rest = grads
    return (loss, nll, kl), slopes, (d_x, whole(d_weight, weight), *rest)


_MOST = 2**31 - 2**10


def _fits(x, weight, *others) -> bool:
    """Whether the kernels can number rows and columns, in int32 and up to the end of a tile, and hold a row of h."""
    small = 0 < weight.shape[1] <= WIDEST and 0 < x.shape[0] < _MOST and 0 < x.shape[1] < _MOST
    return small and accumulate_dtype(x, weight, *others) == torch.float32


def linear_nll_forward(h, x, weight, bias, var, full, keep, scale, precision, needs):
    if len(h) >= _MOST or not _fits(x, weight, h, bias, var):
        return eager.linear_nll_forward(h, x, weight, bias, var, full, keep, scale, precision, needs)
    needs = needs if eager.writes_ahead(keep, needs, h, x, weight, bias, var) else (False,) * 5
    (_, nll, _), (d_h, *_), grads = _tiles(h, x, weight, bias, var, full, keep, scale, None, precision, needs, True)
    return nll, (d_h, *grads) if any(needs) else None


def linear_nll_backward(h, x, weight, bias, var, keep, scale, grad, precision, needs):
    if len(h) >= _MOST or not _fits(x, weight, h, bias, var):
        return eager.linear_nll_backward(h, x, weight, bias, var, keep, scale, grad, precision, needs)
    _, (d_h, *_), grads = _tiles(h, x, weight, bias, var, False, keep, scale, grad, precision, needs, False)
    return d_h, *grads


def linear_elbo_forward(
    x, mu, logvar, weight, bias, var, prior_mu, prior_logvar, eps, seed, samples, full, keep, nll_scale, kl_scale, beta, precision,
    needs,
):  # fmt: skip
    inputs = x, mu, logvar, weight, bias, var, prior_mu, prior_logvar
    rest = eps, seed, samples, full, keep, nll_scale, kl_scale, beta, precision
    if not _samples_here(eps, samples, *inputs):
        return eager.linear_elbo_forward(*inputs, *rest, needs, backend=fastelbo.kernels)
    needs = needs if eager.writes_ahead(keep, needs, *inputs) else (False,) * 8
    outs, grads = _elbo(*inputs, *rest, None, needs, True)
    return *outs, grads if any(needs) else None


def linear_elbo_backward(
    x, mu, logvar, weight, bias, var, prior_mu, prior_logvar, eps, seed, samples, keep, nll_scale, kl_scale, beta, grad, precision,
    needs,
):  # fmt: skip
    inputs = x, mu, logvar, weight, bias, var, prior_mu, prior_logvar
    if not _samples_here(eps, samples, *inputs):
        rest = eps, seed, samples, keep, nll_scale, kl_scale, beta, grad, precision, needs
        return eager.linear_elbo_backward(*inputs, *rest, backend=fastelbo.kernels)
    if keep and samples is not None:
        grad = grad.repeat(samples)  # of each row of z
    rest = eps, seed, samples, False, keep, nll_scale, kl_scale, beta, precision
    return _elbo(*inputs, *rest, grad, needs, False)[1]


def _samples_here(eps: Tensor | None, samples: int | None, x, mu, logvar, weight, *others) -> bool:
    """Whether `rows_kernel` samples. Where rows do not start at a multiple of four elements, wide ones spill."""
    width = weight.shape[1]
    drawn = eps is not None or width % 4 == 0 or width <= 16
    return drawn and (samples or 1) * len(x) < _MOST and _fits(x, weight, mu, logvar, *others)


def _elbo(
    x, mu, logvar, weight, bias, var, prior_mu, prior_logvar, eps, seed, samples, full, keep, nll_scale, kl_scale, beta, precision,
    up, needs, want_terms,
):  # fmt: skip
    need_x, need_mu, need_logvar, *need_layer, need_prior_mu, need_prior_logvar = needs
    of_latent = need_mu, need_logvar, need_prior_mu, need_prior_logvar
    latent = Latent(mu, logvar, prior_mu, prior_logvar, eps, seed, kl_scale, beta, of_latent)
    outs, (_, d_mu, d_logvar, *d_prior), (d_x, *d_layer) = _tiles(
        None, x, weight, bias, var, full, keep, nll_scale, up, precision, (False, need_x, *need_layer), want_terms, latent,
        samples or 1,
    )  # fmt: skip
    return outs, (d_x, d_mu, d_logvar, *d_layer, *d_prior)
