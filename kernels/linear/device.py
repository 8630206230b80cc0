"""The two kernels across a linear layer, and the records that they take.

Neither the reconstruction nor its gradient is ever in memory. Each kernel has a product that makes a tile of the reconstruction and
one that uses it up. `rows_kernel` owns rows of h, which it reads or samples in registers, and walks the columns of x: the terms,
the KL and the gradients of h, or of mu and logvar. `columns_kernel` owns columns of x and walks the rows: the gradients of weight,
bias, variance and x. In one kernel, programs would have to share each other's sums; making the tile twice is cheaper, since h and
weight are narrow. Drawing noise twice is not, so the rows leave z, of mu's size, to the columns where these have work. Where
owners alone are too few to fill a chip, walks are split, and the parts are added in a fixed order.

In the records `Rows` are an `Operand` whose rows lie one stride apart, each of them dense. None stands for an input that does not
exist and for an output that is not wanted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
import triton.language.core as core

from ..kl import LOGVAR, kl_math, sigma_of, through_sigma
from ..latent import ALIGNED, GIVEN, NO_NOISE
from ..launch import INTERPRETED
from ..math import exp
from ..philox import normal_rows
from ..reduction import EACH, NOTHING
from ..tile import narrow, put, read

# What the variance is: a number, a tensor of one value, or one of a value for each column.
FIXED, SCALAR, COLUMNS = (tl.constexpr(i) for i in range(3))

# The interpreter multiplies the bit patterns of bfloat16.
_WIDEN = tl.constexpr(INTERPRETED)


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
    """Numbers, or pointers to one float32; `columns_kernel` takes the first three."""

    inverse: Any  # 1 / std where that is fixed
    scale: Any  # of the terms and of every gradient
    gain: Any  # the upstream gradient where it is one for all rows
    constant: Any = None  # added to the terms for each column
    kl_scale: Any = None
    beta: Any = None


class Flags(NamedTuple):
    KIND: Any  # of the variance
    OPERAND: Any  # the dtypes and the precision of `tiles.dot_of`
    SLOPE: Any
    PRECISION: Any
    HP: Any  # width, padded to a power of two
    BM: Any = None  # rows of a tile
    BN: Any = None  # columns of a tile
    # Of `rows_kernel`:
    TERMS: Any = None  # where their sums go: NOTHING, TOTAL, EACH
    NOISE: Any = None  # where it comes from
    SLOPES: Any = None  # whether a gradient of h, mu or logvar is wanted
    # Of `columns_kernel`:
    SHARED: Any = None  # whether a row of x belongs to several rows of h


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
    at = rows.to(tl.int64)[:, None] * matrix.strides[0] + j[None, :]
    return tl.load(matrix.pointer + at, (j < width)[None, :], other=0.0)


@triton.jit
def noise_of(posterior, rows, width, HP: tl.constexpr, NOISE: tl.constexpr):
    """The noise of rows of z: read, or drawn by the elements' numbers (beyond the last column as well, which nobody uses)."""
    start = rows.to(tl.int64) * width
    if NOISE == GIVEN:
        j = tl.arange(0, HP)
        return tl.load(posterior.eps + start[:, None] + j[None, :], (j < width)[None, :], other=0.0).to(tl.float32)
    else:
        return normal_rows(tl.load(posterior.seed), start, HP, NOISE == ALIGNED)


@triton.jit
def shift_and_level(layer, inverse, cols, live, KIND: tl.constexpr):
    """For a block of columns: bias, log-variance (0 if it is fixed: the host adds it) and 1 / std; 0 where not live."""
    shift = tl.zeros(cols.shape, tl.float32)
    if layer.bias is not None:
        shift = tl.load(layer.bias + cols, live, other=0.0).to(tl.float32)
    level = tl.zeros(cols.shape, tl.float32)
    root = level + inverse
    if KIND != FIXED:
        level = tl.load(layer.variance + (cols if KIND == COLUMNS else cols * 0), live, other=0.0).to(tl.float32)
        root = exp(-0.5 * level)
    # An infinite factor times the residual of 0 beyond the last column would be NaN.
    return shift, level, tl.where(live, root, 0.0)


@triton.jit(do_not_specialize=["batch", "splits", "walk"])
def rows_kernel(batch, splits, walk, layer, posterior, out, cols, width, factors, C: tl.constexpr):
    """Program (sample, block of rows of x, part of the columns): the terms' sums, and the gradient of h or what z is made from.

    Takes Layer, Posterior, RowsOut, Factors, Flags. Walks `walk` tiles of columns, a `splits`-th of them all.
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
        sigma = sigma_of(rows_of(posterior.logvar, row, width, HP).to(tl.float32), LOGVAR)
        noise = noise_of(posterior, rows, width, HP, C.NOISE)
        z = rows_of(posterior.mu, row, width, HP).to(tl.float32) + sigma * noise
        z = narrow(z, posterior.mu.pointer)
        if layer.h is not None:
            if split == 0:
                tl.store(layer.h.pointer + rows.to(tl.int64)[:, None] * width + j[None, :], z, live)
        mine = operand(z, C.OPERAND)

    of_x = row.to(tl.int64) * layer.x.strides[0]
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
            shift, level, root = shift_and_level(layer, inverse, c, in_cols, C.KIND)
            d = tl.dot(mine, tl.trans(w), input_precision=C.PRECISION) + shift[None, :] - target
            # A mean's 1 / batch belongs here: sums that it multiplies later may overflow.
            ratio = d * root[None, :] * (root * (scale * rate))[None, :]
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
        of_row = tl.load(layer.up.pointer + rows.to(tl.int64) * layer.up.strides[0]).to(tl.float32)[:, None]
        rate = rate * of_row
        grad *= of_row
    at = ((sample * splits + split).to(tl.int64) * batch + row)[:, None] * width + j[None, :]
    put(grad, out.d_h, at, live)
    if C.NOISE != NO_NOISE:
        # Read and drawn again: over the walk they would fill the registers.
        lv = rows_of(posterior.logvar, row, width, HP).to(tl.float32)
        through = grad
        if C.SLOPES:
            noise = noise_of(posterior, rows, width, HP, C.NOISE)
            through = through_sigma(grad * noise, sigma_of(lv, LOGVAR), LOGVAR)
        # The KL of a row belongs to one of the programs that share it.
        if (split == 0) & (sample == 0):
            m = rows_of(posterior.mu, row, width, HP).to(tl.float32)
            pm = None
            if posterior.prior_mu is not None:
                pm = rows_of(posterior.prior_mu, row, width, HP).to(tl.float32)
            plv = None
            if posterior.prior_logvar is not None:
                plv = rows_of(posterior.prior_logvar, row, width, HP).to(tl.float32)
            term, of_mu, of_lv, of_plv = kl_math(m, lv, pm, plv, LOGVAR)
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
            put(-of_mu * of_kl, out.d_prior_mu, at, live)
            put(of_plv * of_kl, out.d_prior_logvar, at, live)
        put(grad, out.d_mu, at, live)
        put(through, out.d_logvar, at, live)


@triton.jit
def rated_residual(layer, out, weight, shift, root, gain, target, rows, in_rows, width, sums, C: tl.constexpr):
    """One tile, (columns, rows): the residual over its variance times its row's upstream gradient, and the three sums with it."""
    of_weight, of_bias, of_variance = sums
    other = operand(rows_of(layer.h, rows, width, C.HP), C.OPERAND)
    d = tl.dot(weight, tl.trans(other), input_precision=C.PRECISION) + shift[:, None] - target
    ratio = tl.where(in_rows[None, :], d * root[:, None] * (root * gain)[:, None], 0.0)
    share = ratio
    if out.d_variance is not None:
        share = tl.where(in_rows[None, :], gain - d * ratio, 0.0)
    if layer.up is not None:
        rate = tl.load(layer.up.pointer + rows.to(tl.int64) * layer.up.strides[0]).to(tl.float32)[None, :]
        ratio *= rate
        share *= rate
    if out.d_variance is not None:
        of_variance += tl.sum(share, 1)
    if out.d_bias is not None:
        of_bias += tl.sum(ratio, 1)
    if out.d_weight is not None:
        of_weight = tl.dot(operand(ratio, C.SLOPE), operand(other, C.SLOPE), of_weight, input_precision=C.PRECISION)
    return ratio, (of_weight, of_bias, of_variance)


@triton.jit(do_not_specialize=["count", "batch", "splits", "walk"])
def columns_kernel(count, batch, splits, walk, layer, out, cols, width, factors, C: tl.constexpr):
    """Program (block of columns, part of the rows): the gradients of weight, bias, variance and x.

    Takes Layer, ColumnsOut, Factors, Flags. h has `count` rows; walks `walk` tiles of rows, a `splits`-th of them all.
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
    shift, _, root = shift_and_level(layer, read(factors.inverse, tl.float32), c, in_cols, C.KIND)
    # The gradients of weight and bias, and twice that of the variance.
    sums = (tl.zeros((BN, HP), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32))
    # For the gradient of an x that is shared, its rows are walked, and for each block of them the samples; otherwise the rows of h.
    walks_x: tl.constexpr = C.SHARED and out.d_x is not None
    end = count
    if walks_x:
        end = batch
    first = split * walk
    last = tl.minimum(first + walk, tl.cdiv(end, BM))
    for tile in range(first, last):
        rows = tile * BM + tl.arange(0, BM)
        in_rows = rows < end
        rows = tl.minimum(rows, end - 1)
        r = rows
        if C.SHARED and not walks_x:
            r = rows % batch
        of_x = r.to(tl.int64)[None, :] * layer.x.strides[0] + c[:, None]
        target = tl.load(layer.x.pointer + of_x, in_cols[:, None], other=0.0).to(tl.float32)
        if walks_x:
            ratio = tl.zeros((BN, BM), tl.float32)
            for sample in range(count // batch):
                of_h = sample * batch + r
                one, sums = rated_residual(layer, out, weight, shift, root, gain, target, of_h, in_rows, width, sums, C)
                ratio += one
        else:
            ratio, sums = rated_residual(layer, out, weight, shift, root, gain, target, rows, in_rows, width, sums, C)
        if out.d_x is not None:
            live = in_cols[:, None] & in_rows[None, :]
            tl.store(out.d_x + rows.to(tl.int64)[None, :] * cols + c[:, None], narrow(-ratio, out.d_x), live)
    of_weight, of_bias, of_variance = sums
    at = split.to(tl.int64) * cols + c
    if out.d_weight is not None:
        j = tl.arange(0, HP)
        live = in_cols[:, None] & (j < width)[None, :]
        tl.store(out.d_weight + at[:, None] * width + j[None, :], narrow(of_weight, out.d_weight), live)
    put(of_bias, out.d_bias, at, in_cols)
    slope = of_variance * 0.5
    if C.KIND == COLUMNS:
        put(slope, out.d_variance, at, in_cols)
    elif out.d_variance is not None:
        tl.store(out.d_variance + pid, tl.sum(tl.where(in_cols, slope, 0.0)))
