"""The two kernels across a linear layer, and the records that they take.

Neither the reconstruction nor its gradient is ever in memory. Each kernel has a product that makes a tile of the reconstruction and
one that uses it up. `rows_kernel` owns rows of h, which it reads or samples in registers, and walks the columns of x: the terms,
the KL and the gradients of h, or of mu and logvar. `columns_kernel` owns columns of x and walks the rows: the gradients of weight,
bias, variance and x. In one kernel, programs would have to share each other's sums; making the tile twice is cheaper, since h and
weight are narrow. Drawing noise twice is not, so the rows leave z, of mu's size, to the columns where these have work. Where
owners alone are too few to fill a chip, walks are split, and the parts are added in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
import triton.language.core as core

from ..latent import ALIGNED, GIVEN, NO_NOISE, kl_math
from ..launch import INTERPRETED, narrow, read
from ..math import exp
from ..philox import normal_at, normal_tile_aligned
from ..reduction import EACH, NOTHING

# What the variance is: a number, a tensor of one value, or one of a value for each column.
FIXED, SCALAR, COLUMNS = (tl.constexpr(i) for i in range(3))

# The interpreter multiplies the bit patterns of bfloat16.
_WIDEN = tl.constexpr(INTERPRETED)


# ---- what the kernels take: None where an input does not exist, or where an output is not wanted ---------------------------------


class Rows(NamedTuple):
    """A tensor whose rows lie `stride` elements apart, each of them dense."""

    pointer: Any  # on the host the tensor itself
    stride: Any


class Layer(NamedTuple):
    h: Any  # Rows (samples * batch, width); or, where z is sampled and the columns want it, an output (samples * batch, width)
    x: Any  # Rows (batch, cols)
    weight: Any  # Rows (cols, width)
    bias: Any  # (cols,)
    variance: Any  # the log-variance: (1,) or (cols,); None where it is fixed
    up: Any  # Rows (samples * batch,): the upstream gradient of each row of h; None where it is one for all


class Posterior(NamedTuple):
    mu: Any  # Rows (batch, width)
    logvar: Any  # Rows (batch, width)
    prior_mu: Any  # Rows (batch, width)
    prior_logvar: Any  # Rows (batch, width)
    eps: Any  # (samples * batch, width)
    seed: Any  # ()


class RowsOut(NamedTuple):
    """What `rows_kernel` writes. Where there are several samples, or `splits` of a walk, each has a part of a gradient."""

    terms: Any  # for NOTHING: None; for EACH: (samples * batch, splits); for TOTAL: (programs,)
    kls: Any  # for NOTHING: None; for EACH: (batch,); for TOTAL: (blocks of rows of x,)
    d_h: Any  # (samples, splits, batch, width)
    d_mu: Any  # (samples, splits, batch, width)
    d_logvar: Any  # (samples, splits, batch, width)
    d_prior_mu: Any  # (batch, width)
    d_prior_logvar: Any  # (batch, width)


class ColumnsOut(NamedTuple):
    """What `columns_kernel` writes, with a part for each of the `splits` of a walk."""

    d_x: Any  # (batch, cols)
    d_weight: Any  # (splits, cols, width)
    d_bias: Any  # (splits, cols)
    d_variance: Any  # for COLUMNS: (splits, cols); for SCALAR: (programs,)


class Factors(NamedTuple):
    """Numbers, or pointers to one float32."""

    inverse: Any  # 1 / variance where that is fixed
    scale: Any  # of the terms and of every gradient
    gain: Any  # the upstream gradient where it is one for all rows


class RowsFactors(NamedTuple):
    inverse: Any
    scale: Any
    gain: Any
    constant: Any  # added to the terms for each column
    kl_scale: Any
    beta: Any


class RowsFlags(NamedTuple):
    KIND: Any  # of the variance
    TERMS: Any  # where their sums go: NOTHING, TOTAL, EACH
    NOISE: Any  # where it comes from
    SLOPES: Any  # whether a gradient of h, mu or logvar is wanted
    OPERAND: Any  # the dtypes and the precision of `tiles.Dot`
    SLOPE: Any
    PRECISION: Any
    BM: Any  # rows of a tile
    BN: Any  # columns of a tile
    HP: Any  # width, padded to a power of two


class ColumnsFlags(NamedTuple):
    KIND: Any
    SHARED: Any  # whether a row of x belongs to several rows of h
    OPERAND: Any
    SLOPE: Any
    PRECISION: Any
    BM: Any
    BN: Any
    HP: Any


# ---- tiles -----------------------------------------------------------------------------------------------------------------------


@triton.jit
def operand(value, OP: tl.constexpr):
    """A factor of a product, rounded to the dtype in which the product is taken."""
    value = value.to(OP)
    if _WIDEN:
        value = value.to(tl.float32)
    return value


@triton.jit
def rows_of(matrix, rows, width, HP: tl.constexpr):
    """Rows of a matrix, as wide as the next power of two."""
    j = tl.arange(0, HP)
    at = rows.to(tl.int64)[:, None] * matrix.stride + j[None, :]
    return tl.load(matrix.pointer + at, (j < width)[None, :], other=0.0)


@triton.jit
def noise_of(posterior, rows, width, HP: tl.constexpr, NOISE: tl.constexpr):
    """The noise of rows of z: read, or drawn by the elements' numbers (beyond the last column as well, which nobody uses)."""
    start = rows.to(tl.int64) * width
    if NOISE == GIVEN:
        j = tl.arange(0, HP)
        noise = tl.load(posterior.eps + start[:, None] + j[None, :], (j < width)[None, :], other=0.0).to(tl.float32)
    elif NOISE == ALIGNED:
        noise = normal_tile_aligned(tl.load(posterior.seed), (start >> 2)[:, None] + tl.arange(0, HP // 4)[None, :])
    else:
        noise = normal_at(tl.load(posterior.seed), start[:, None] + tl.arange(0, HP)[None, :])
    return noise


@triton.jit
def shift_and_level(layer, inverse, gain, cols, live, KIND: tl.constexpr):
    """For a block of columns: bias, log-variance (0 if it is fixed: the host adds it) and gain / variance; 0 where not live.

    A mean's 1 / batch belongs here: sums that it multiplies later may overflow.
    """
    shift = tl.zeros(cols.shape, tl.float32)
    if layer.bias is not None:
        shift = tl.load(layer.bias + cols, live, other=0.0).to(tl.float32)
    level = tl.zeros(cols.shape, tl.float32)
    factor = level + inverse * gain
    if KIND != FIXED:
        level = tl.load(layer.variance + (cols if KIND == COLUMNS else cols * 0), live, other=0.0).to(tl.float32)
        factor = exp(-level) * gain
    # An infinite factor times the residual of 0 beyond the last column would be NaN.
    return shift, level, tl.where(live, factor, 0.0)


# ---- the rows --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["batch", "splits", "walk"])
def rows_kernel(batch, splits, walk, layer, posterior, out, cols, width, factors, C: tl.constexpr):
    """Program (sample, block of rows of x, part of the columns): the terms' sums, and the gradient of h or what z is made from.

    Takes Layer, Posterior, RowsOut, RowsFactors, RowsFlags. Walks `walk` tiles of columns, a `splits`-th of them all.
    """
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    HP: tl.constexpr = C.HP
    inverse = read(factors.inverse, tl.float32)
    scale = read(factors.scale, tl.float32)
    rate = read(factors.gain, tl.float32)
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
    if C.NOISE == NO_NOISE:
        mine = operand(rows_of(layer.h, rows, width, HP), C.OPERAND)
    else:
        sigma = exp(0.5 * rows_of(posterior.logvar, row, width, HP).to(tl.float32))
        noise = noise_of(posterior, rows, width, HP, C.NOISE)
        z = rows_of(posterior.mu, row, width, HP).to(tl.float32) + sigma * noise
        z = narrow(z, posterior.mu.pointer)
        if layer.h is not None:
            if split == 0:
                tl.store(layer.h.pointer + rows.to(tl.int64)[:, None] * width + j[None, :], z, live)
        mine = operand(z, C.OPERAND)

    of_x = row.to(tl.int64) * layer.x.stride
    squares = tl.zeros((BM,), tl.float32)
    levels = tl.zeros((BN,), tl.float32)
    grad = tl.zeros((BM, HP), tl.float32)
    first = split * walk
    last = tl.minimum(first + walk, tl.cdiv(cols, BN))
    if C.SLOPES or C.TERMS != NOTHING:
        for tile in range(first, last):
            c = tile * BN + tl.arange(0, BN)
            in_cols = c < cols
            w = operand(rows_of(layer.weight, tl.minimum(c, cols - 1), width, HP), C.OPERAND)
            target = tl.load(layer.x.pointer + of_x[:, None] + c[None, :], in_cols[None, :], other=0.0).to(tl.float32)
            shift, level, factor = shift_and_level(layer, inverse, scale * rate, c, in_cols, C.KIND)
            d = tl.dot(mine, tl.trans(w), input_precision=C.PRECISION) + shift[None, :] - target
            ratio = d * factor[None, :]
            if C.TERMS != NOTHING:
                squares += tl.sum(d * ratio, 1)
                if C.KIND != FIXED:
                    levels += level
            if C.SLOPES:
                grad = tl.dot(operand(ratio, C.SLOPE), operand(w, C.SLOPE), grad, input_precision=C.PRECISION)

    if C.TERMS != NOTHING:
        # Terms are asked for with an upstream gradient of 1, so the squares have their scale.
        constant = (tl.minimum(last * BN, cols) - first * BN).to(tl.float32) * read(factors.constant, tl.float32)
        terms = 0.5 * squares + (0.5 * tl.sum(levels) + constant) * scale
        if C.TERMS == EACH:
            tl.store(out.terms + rows.to(tl.int64) * splits + split, terms, in_rows)
        else:
            tl.store(out.terms + pid, tl.sum(tl.where(in_rows, terms, 0.0)))
    if layer.up is not None:
        of_row = tl.load(layer.up.pointer + rows.to(tl.int64) * layer.up.stride).to(tl.float32)[:, None]
        rate = rate * of_row
        grad *= of_row
    at = ((sample * splits + split).to(tl.int64) * batch + row)[:, None] * width + j[None, :]
    if out.d_h is not None:
        tl.store(out.d_h + at, narrow(grad, out.d_h), live)
    if C.NOISE != NO_NOISE:
        # Read and drawn again: over the walk they would fill the registers.
        lv = rows_of(posterior.logvar, row, width, HP).to(tl.float32)
        through = grad
        if C.SLOPES:
            through = 0.5 * exp(0.5 * lv) * noise_of(posterior, rows, width, HP, C.NOISE) * grad
        # The KL of a row belongs to one of the programs that share it.
        if (split == 0) & (sample == 0):
            m = rows_of(posterior.mu, row, width, HP).to(tl.float32)
            pm = None
            if posterior.prior_mu is not None:
                pm = rows_of(posterior.prior_mu, row, width, HP).to(tl.float32)
            plv = None
            if posterior.prior_logvar is not None:
                plv = rows_of(posterior.prior_logvar, row, width, HP).to(tl.float32)
            term, of_mu, of_lv, of_plv = kl_math(m, lv, pm, plv)
            kl_scale = read(factors.kl_scale, tl.float32)
            if C.TERMS != NOTHING:
                term = tl.where(live, term, 0.0)
                if C.TERMS == EACH:
                    tl.store(out.kls + row, tl.sum(term, 1) * kl_scale, in_rows)
                else:
                    tl.store(out.kls + owner, tl.sum(term) * kl_scale)
            of_kl = rate * (kl_scale * read(factors.beta, tl.float32))
            grad += of_mu * of_kl
            through += of_lv * of_kl
            if out.d_prior_mu is not None:
                tl.store(out.d_prior_mu + at, narrow(-of_mu * of_kl, out.d_prior_mu), live)
            if out.d_prior_logvar is not None:
                tl.store(out.d_prior_logvar + at, narrow(of_plv * of_kl, out.d_prior_logvar), live)
        if out.d_mu is not None:
            tl.store(out.d_mu + at, narrow(grad, out.d_mu), live)
        if out.d_logvar is not None:
            tl.store(out.d_logvar + at, narrow(through, out.d_logvar), live)


# ---- the columns -----------------------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """What a program of `columns_kernel` knows of its columns."""

    weight: Any  # (BN, HP), an operand
    shift: Any  # (BN,): the bias
    factor: Any  # (BN,): gain / variance
    gain: Any  # ()


class Sums(NamedTuple):
    """What it adds up over the rows."""

    weight: Any  # (BN, HP)
    bias: Any  # (BN,)
    variance: Any  # (BN,): twice the gradient


@triton.jit
def rated_residual(layer, out, mine, target, rows, in_rows, width, sums, C: tl.constexpr):
    """One tile, (columns, rows): the residual over its variance times its row's upstream gradient, and the three sums with it."""
    other = operand(rows_of(layer.h, rows, width, C.HP), C.OPERAND)
    d = tl.dot(mine.weight, tl.trans(other), input_precision=C.PRECISION) + mine.shift[:, None] - target
    ratio = tl.where(in_rows[None, :], d * mine.factor[:, None], 0.0)
    share = ratio
    if out.d_variance is not None:
        share = tl.where(in_rows[None, :], mine.gain - d * ratio, 0.0)
    if layer.up is not None:
        rate = tl.load(layer.up.pointer + rows.to(tl.int64) * layer.up.stride).to(tl.float32)[None, :]
        ratio *= rate
        share *= rate
    of_weight = sums.weight
    of_bias = sums.bias
    of_variance = sums.variance
    if out.d_variance is not None:
        of_variance += tl.sum(share, 1)
    if out.d_bias is not None:
        of_bias += tl.sum(ratio, 1)
    if out.d_weight is not None:
        of_weight = tl.dot(operand(ratio, C.SLOPE), operand(other, C.SLOPE), of_weight, input_precision=C.PRECISION)
    return ratio, Sums(of_weight, of_bias, of_variance)


@triton.jit(do_not_specialize=["count", "batch", "splits", "walk"])
def columns_kernel(count, batch, splits, walk, layer, out, cols, width, factors, C: tl.constexpr):
    """Program (block of columns, part of the rows): the gradients of weight, bias, variance and x.

    Takes Layer, ColumnsOut, Factors, ColumnsFlags. h has `count` rows; walks `walk` tiles of rows, a `splits`-th of them all.
    """
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    HP: tl.constexpr = C.HP
    cols = core.to_tensor(cols)
    gain = read(factors.scale, tl.float32) * read(factors.gain, tl.float32)
    pid = tl.program_id(0)
    split = pid % splits
    c = (pid // splits) * BN + tl.arange(0, BN)
    in_cols = c < cols
    weight = operand(rows_of(layer.weight, tl.minimum(c, cols - 1), width, HP), C.OPERAND)
    shift, _, factor = shift_and_level(layer, read(factors.inverse, tl.float32), gain, c, in_cols, C.KIND)
    mine = Columns(weight, shift, factor, gain)
    sums = Sums(tl.zeros((BN, HP), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32))
    first = split * walk
    if C.SHARED and out.d_x is not None:
        # The rows of x are walked, and for each block of them its samples, whose gradients add up.
        last = tl.minimum(first + walk, tl.cdiv(batch, BM))
        for tile in range(first, last):
            r = tile * BM + tl.arange(0, BM)
            in_rows = r < batch
            r = tl.minimum(r, batch - 1)
            of_x = r.to(tl.int64)[None, :] * layer.x.stride + c[:, None]
            target = tl.load(layer.x.pointer + of_x, in_cols[:, None], other=0.0).to(tl.float32)
            sum_x = tl.zeros((BN, BM), tl.float32)
            for sample in range(count // batch):
                ratio, sums = rated_residual(layer, out, mine, target, sample * batch + r, in_rows, width, sums, C)
                sum_x += ratio
            live = in_cols[:, None] & in_rows[None, :]
            tl.store(out.d_x + r.to(tl.int64)[None, :] * cols + c[:, None], narrow(-sum_x, out.d_x), live)
    else:
        last = tl.minimum(first + walk, tl.cdiv(count, BM))
        for tile in range(first, last):
            rows = tile * BM + tl.arange(0, BM)
            in_rows = rows < count
            rows = tl.minimum(rows, count - 1)
            r = rows
            if C.SHARED:
                r = rows % batch
            of_x = r.to(tl.int64)[None, :] * layer.x.stride + c[:, None]
            target = tl.load(layer.x.pointer + of_x, in_cols[:, None], other=0.0).to(tl.float32)
            ratio, sums = rated_residual(layer, out, mine, target, rows, in_rows, width, sums, C)
            if out.d_x is not None:
                live = in_cols[:, None] & in_rows[None, :]
                tl.store(out.d_x + rows.to(tl.int64)[None, :] * cols + c[:, None], narrow(-ratio, out.d_x), live)
    at = split.to(tl.int64) * cols + c
    if out.d_weight is not None:
        j = tl.arange(0, HP)
        live = in_cols[:, None] & (j < width)[None, :]
        tl.store(out.d_weight + at[:, None] * width + j[None, :], narrow(sums.weight, out.d_weight), live)
    if out.d_bias is not None:
        tl.store(out.d_bias + at, narrow(sums.bias, out.d_bias), in_cols)
    if out.d_variance is not None:
        slope = sums.variance * 0.5
        if C.KIND == COLUMNS:
            tl.store(out.d_variance + at, narrow(slope, out.d_variance), in_cols)
        else:
            tl.store(out.d_variance + pid, tl.sum(tl.where(in_cols, slope, 0.0)))
