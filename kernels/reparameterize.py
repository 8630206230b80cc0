"""The latent side: z = mu + sigma * eps and the KL, and their gradients, in one pass over mu and logvar.

As in `gaussian_nll.py`, one tile function serves forward, backward and the fused pass: a launch computes what its output pointers
ask for. Noise comes from a tensor or, in registers, from a seed; backward draws it again and never uses z - mu, which cancels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

from fastelbo.reference import accumulate_dtype

from .gaussian_kl import kl_math
from .launch import PROGRAMS, TYPES, Call, fold, launch, load, read, scalar, store, tile_size
from .math import exp
from .philox import normal_at, normal_tile_aligned
from .reduction import EACH, NOTHING, ROWS, TOTAL, finish, sums

# Where the noise comes from: nowhere (no sampling), a tensor, a seed with rows that start at a multiple of four, any other rows.
NO_NOISE, GIVEN, ALIGNED, UNALIGNED = (tl.constexpr(i) for i in range(4))


@triton.jit
def latent_tiles(pid, programs, rows, r1, r2, samples, count, tensors, strides, cols, scalars, C: tl.constexpr):
    """The tiles pid, pid + programs, ... of one call; the samples of an element are drawn by the program that owns it."""
    mu, logvar, prior_mu, prior_logvar, weight, up, d_mu, d_logvar, d_prior_mu, d_prior_logvar, terms = tensors[:11]
    eps, grad_z, z, parts, seed = tensors[11:]
    COL: tl.constexpr = C[0]
    NOISE: tl.constexpr = C[1]
    KL: tl.constexpr = C[2]
    TERMS: tl.constexpr = C[3]
    CLAMP: tl.constexpr = C[4]
    DIMS: tl.constexpr = C[5]
    BM: tl.constexpr = C[6]
    BN: tl.constexpr = C[7]
    ACC: tl.constexpr = C[8]
    gain = read(scalars[0], ACC) * read(scalars[3], ACC)
    lo = read(scalars[1], ACC)
    hi = read(scalars[2], ACC)
    # The strides from sample to sample; `count` is the elements of one.
    eps_step, grad_z_step, z_step = strides[14]
    cols = core.to_tensor(cols)
    chunks = (cols - 1) // BN + 1  # tl.cdiv overflows just below 2**31
    tiles = ((rows - 1) // BM + 1) * chunks
    sum_terms = tl.zeros((BM, BN), ACC)
    for tile in range(pid, tiles, programs):
        r = (tile // chunks) * BM + tl.arange(0, BM)
        chunk = tile % chunks
        first = chunk.to(cols.dtype) * BN
        in_rows = r < rows
        live = in_rows[:, None] & (tl.arange(0, BN) < cols - first)[None, :]
        m = load(mu, r, in_rows, first, live, BN, r1, r2, strides[0], COL[0], DIMS, ACC)
        raw = load(logvar, r, in_rows, first, live, BN, r1, r2, strides[1], COL[1], DIMS, ACC)
        lv = raw
        if CLAMP:
            lv = tl.where(raw < lo, lo, tl.where(raw > hi, hi, raw))
        g_mu = tl.zeros((BM, BN), ACC)
        g_lv = tl.zeros((BM, BN), ACC)
        if KL:
            pm = None
            if prior_mu is not None:
                pm = load(prior_mu, r, in_rows, first, live, BN, r1, r2, strides[2], COL[2], DIMS, ACC)
            plv = None
            if prior_logvar is not None:
                plv = load(prior_logvar, r, in_rows, first, live, BN, r1, r2, strides[3], COL[3], DIMS, ACC)
            term, of_mu, of_lv, of_plv = kl_math(m, lv, pm, plv)
            g = gain
            if up is not None:
                g = gain * load(up, r, in_rows, first, live, BN, r1, r2, strides[5], COL[5], DIMS, ACC)
            of_mu, of_lv, of_plv = of_mu * g, of_lv * g, of_plv * g
            present = live
            if weight is not None:
                w = load(weight, r, in_rows, first, live, BN, r1, r2, strides[4], COL[4], DIMS, ACC)
                present = live & (w != 0.0)
                term = term * w
                of_mu, of_lv = tl.where(present, of_mu * w, 0.0), tl.where(present, of_lv * w, 0.0)
                of_plv = tl.where(present, of_plv * w, 0.0)
            g_mu += of_mu
            g_lv += of_lv
            if d_prior_mu is not None:
                store(d_prior_mu, (-of_mu), r, first, live, BN, r1, r2, strides[8], DIMS)
            if d_prior_logvar is not None:
                store(d_prior_logvar, of_plv, r, first, live, BN, r1, r2, strides[9], DIMS)
            if TERMS != NOTHING:
                term = tl.where(present, term, 0.0)
                if TERMS == EACH:
                    store(terms, term, r, first, live, BN, r1, r2, strides[10], DIMS)
                elif TERMS == ROWS:
                    tl.store(parts + r.to(tl.int64) * chunks + chunk, tl.sum(term, 1), in_rows)
                else:
                    sum_terms += term
        if NOISE != NO_NOISE:
            sigma = exp(0.5 * lv)
            through = tl.zeros((BM, BN), ACC)
            for sample in range(samples):
                step = core.to_tensor(sample).to(tl.int64)
                if NOISE == GIVEN:
                    e = load(eps + step * eps_step, r, in_rows, first, live, BN, r1, r2, strides[11], COL[11], DIMS, ACC)
                else:
                    start = step * count + r.to(tl.int64) * cols + first
                    key = tl.load(seed)
                    if NOISE == ALIGNED:
                        e = normal_tile_aligned(key, (start >> 2)[:, None] + tl.arange(0, BN // 4)[None, :]).to(ACC)
                    else:
                        e = normal_at(key, start[:, None] + tl.arange(0, BN)[None, :]).to(ACC)
                if z is not None:
                    store(z + step * z_step, m + sigma * e, r, first, live, BN, r1, r2, strides[13], DIMS)
                if grad_z is not None:
                    step *= grad_z_step
                    gz = load(grad_z + step, r, in_rows, first, live, BN, r1, r2, strides[12], COL[12], DIMS, ACC)
                    g_mu += gz
                    through += gz * e
            g_lv += 0.5 * sigma * through
        if d_mu is not None:
            store(d_mu, g_mu, r, first, live, BN, r1, r2, strides[6], DIMS)
        if d_logvar is not None:
            if CLAMP:
                g_lv = tl.where((raw < lo) | (raw > hi), 0.0, g_lv)
            store(d_logvar, g_lv, r, first, live, BN, r1, r2, strides[7], DIMS)
    if TERMS == TOTAL:
        tl.store(parts + pid, tl.sum(sum_terms))


@triton.jit(do_not_specialize=["programs", "rows", "r1", "r2", "samples", "count"])
def latent_kernel(programs, rows, r1, r2, samples, count, tensors, strides, cols, scalars, C: tl.constexpr):
    latent_tiles(tl.program_id(0), programs, rows, r1, r2, samples, count, tensors, strides, cols, scalars, C)


# ---- the host side ---------------------------------------------------------------------------------------------------------------


def plan(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, weight: Tensor | None,
    clamp: tuple[float, float] | None, keep: int, scale: float | Tensor, up: Tensor | None, gain: float | Tensor,
    eps: Tensor | None, seed: Tensor | None, samples: int | None, grad_z: Tensor | None, needs: tuple[bool, ...],
    want_z: bool, want_kl: bool, want_terms: bool, acc: torch.dtype, out: tuple[Tensor, Tensor] | None = None,
    beta: float | Tensor = 1.0, dense: bool = False,
) -> Call:  # fmt: skip
    """Plan a launch. `scale` is the KL's factor; `up` the KL's upstream gradient of shape[:keep], `gain` and `beta` factors of it.

    Tensors are read and written as they lie, or from `dense` copies where they have no common view. Noise from a seed is numbered
    by the logical order of the elements, so it needs a view that keeps it: mu and logvar in channels_last are copied there.
    """
    shape, device = mu.shape, mu.device
    lead = None if up is None else up.reshape(up.shape + (1,) * (len(shape) - up.ndim))
    inputs = [t.expand(shape) if t is not None else None for t in (mu, logvar, prior_mu, prior_logvar, weight, lead)]
    if dense:
        inputs = [t if t is None or not any(t.stride()) else t.contiguous() for t in inputs]
        eps, grad_z = (None if t is None else t.contiguous() for t in (eps, grad_z))
    grads = [torch.empty_like(t) if need else None for t, need in zip(inputs[:4], needs, strict=True)]
    if out is not None and not dense:
        grads[:2] = out
    each = torch.empty_like(inputs[0], dtype=acc) if want_terms and 0 < keep == len(shape) else None
    z = None
    if want_z:
        plain = seed is not None or samples is not None
        lead_shape = shape if samples is None else (samples, *shape)
        z = torch.empty(lead_shape, dtype=mu.dtype, device=device) if plain else torch.empty_like(inputs[0])
    # Of what carries a dimension of samples, the first sample stands for all: the others lie a fixed stride apart.
    firsts = [t if t is None or samples is None else t[0] for t in (eps, grad_z, z)]
    operands = [*inputs, *grads, each, *firsts]
    f = fold(shape, keep, operands, seed is not None, tile_size(acc))
    if f is None:
        return plan(
            mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, up, gain, eps, seed, samples, grad_z, needs, want_z,
            want_kl, want_terms, acc, out, beta, dense=True,
        )  # fmt: skip

    count = math.prod(shape)
    noise = NO_NOISE if eps is None else GIVEN
    if seed is not None:
        noise = ALIGNED if (f.rows == 1 or f.cols % 4 == 0) and (samples is None or count % 4 == 0) else UNALIGNED
        if noise is UNALIGNED:
            # A Philox call for each element fills the registers at half the tile.
            f = fold(shape, keep, operands, True, tile_size(acc) // 2)
    programs = min(f.tiles, PROGRAMS)
    term_sink, parts, segments, result = EACH if want_terms else NOTHING, None, None, each
    if want_terms and each is None:
        term_sink, parts, segments, result = sums(f, shape[:keep], scale, programs, acc, device)
    apart = tuple(0 if t is None or samples is None else t.stride(0) for t in (eps, grad_z, z))
    lo, hi = (0.0, 0.0) if clamp is None else clamp
    return Call(
        programs=programs,
        sizes=(f.rows, f.r1, f.r2, 1 if samples is None else samples, count),
        tensors=(*inputs, *grads, each, eps, grad_z, z, parts, seed),
        strides=(*f.strides, apart),
        cols=f.cols,
        scalars=tuple(scalar(value, acc, device) for value in (gain, lo, hi, beta)),
        constants=(
            f.col_strides, noise.value, want_kl, term_sink.value, clamp is not None, f.dims, f.bm, f.bn, TYPES[acc],
        ),
        acc=acc, terms=segments, out=result, grads=tuple(grads), z=z,
    )  # fmt: skip


def _run(call: Call, device: torch.device) -> None:
    launch(latent_kernel, call.programs, device, *call.args)
    finish(call.acc, a=call.terms)


def latent_forward(mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, want_kl, needs):
    want_z = eps is not None or seed is not None
    call = plan(
        mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, None, 1.0, eps, seed, samples, None, (False,) * 4, want_z,
        want_kl, want_kl, accumulate_dtype(mu, logvar, prior_mu, prior_logvar),
    )  # fmt: skip
    _run(call, mu.device)
    return call.z, call.out, None


def latent_backward(
    mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, grad_z, grad_kl, needs, out=None
):
    acc = accumulate_dtype(mu, logvar, prior_mu, prior_logvar)
    if grad_z is None:
        eps = seed = samples = None
    if grad_kl is None:
        prior_mu = prior_logvar = weight = None
        needs = (*needs[:2], False, False)
    call = plan(
        mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, 1.0, grad_kl, scale, eps, seed, samples, grad_z, needs, False,
        grad_kl is not None, False, acc, out,
    )  # fmt: skip
    _run(call, mu.device)
    if out is not None:
        for buffer, grad in zip(out, call.grads[:2], strict=True):
            if grad is not buffer:
                buffer.copy_(grad)
    return call.grads
