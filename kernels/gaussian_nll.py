"""-log N(x; recon, var): terms, sums and gradients in one pass over recon, x and var.

One tile function serves the forward, the backward and the fused pass of `elbo.py`: what a launch computes is what its output
pointers ask for.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

from fastelbo.reference import LOG_2PI, accumulate_dtype

from .launch import PROGRAMS, TYPES, Call, divide, fold, launch, load, read, scalar, store, tile_size
from .math import exp, log
from .reduction import COLS, EACH, NOTHING, ROWS, TOTAL, Segments, finish, sums

FIXED, LOGVAR, STD, VAR = (tl.constexpr(i) for i in range(4))
KINDS = {"logvar": 1, "std": 2, "var": 3}

# Groups of rows whose sums over columns are partial, in the gradient of a per-dimension variance: few, since each writes a row of
# partial sums, but enough for as many programs as fill a chip.
GROUPS = 64
GROUP_PROGRAMS = 1024


@triton.jit
def nll_math(d, v, factor, eps, KIND: tl.constexpr):
    """For d = recon - x: the term but for constants, its derivative in recon, and its derivative in the variance's parameter."""
    if KIND == FIXED:
        ratio = d * factor
        return 0.5 * d * ratio, ratio, d
    elif KIND == LOGVAR:
        ratio = d * exp(-v)
        square = d * ratio
        return 0.5 * (square + v), ratio, 0.5 * (1.0 - square)
    elif KIND == STD:
        r = divide(d, v)
        square = r * r
        return 0.5 * square + log(v), divide(r, v), divide(1.0 - square, v)
    else:
        # Below eps it is raised to eps, but a negative variance is an error, and NaN shows it without a host synchronisation.
        v = tl.where(v < eps, eps, v) + tl.where(v < 0.0, float("nan"), 0.0)
        ratio = divide(d, v)
        square = d * ratio
        return 0.5 * (square + log(v)), ratio, 0.5 * divide(1.0 - square, v)


@triton.jit
def nll_tiles(pid, programs, rows, r1, r2, tensors, strides, cols, scalars, C: tl.constexpr):
    """The tiles pid, pid + programs, ... of one call. `programs` is a multiple of the chunks of a row where COLS are summed."""
    recon, x, var, weight, up, d_recon, d_x, d_var, terms, var_parts, parts = tensors
    COL: tl.constexpr = C[0]
    KIND: tl.constexpr = C[1]
    TERMS: tl.constexpr = C[2]
    VAR_GRAD: tl.constexpr = C[3]
    DIMS: tl.constexpr = C[4]
    BM: tl.constexpr = C[5]
    BN: tl.constexpr = C[6]
    ACC: tl.constexpr = C[7]
    gain = read(scalars[0], ACC)
    factor = read(scalars[1], ACC)
    constant = read(scalars[2], ACC)
    eps = read(scalars[3], ACC)
    cols = core.to_tensor(cols)
    chunks = (cols - 1) // BN + 1  # tl.cdiv overflows just below 2**31
    tiles = ((rows - 1) // BM + 1) * chunks
    sum_terms = tl.zeros((BM, BN), ACC)
    sum_var = tl.zeros((BM, BN), ACC)
    for tile in range(pid, tiles, programs):
        r = (tile // chunks) * BM + tl.arange(0, BM)
        chunk = tile % chunks
        first = chunk.to(cols.dtype) * BN
        in_rows = r < rows
        live = in_rows[:, None] & (tl.arange(0, BN) < cols - first)[None, :]
        m = load(recon, r, in_rows, first, live, BN, r1, r2, strides[0], COL[0], DIMS, ACC)
        y = load(x, r, in_rows, first, live, BN, r1, r2, strides[1], COL[1], DIMS, ACC)
        v = m
        if KIND != FIXED:
            v = load(var, r, in_rows, first, live, BN, r1, r2, strides[2], COL[2], DIMS, ACC)
        term, ratio, slope = nll_math(m - y, v, factor, eps, KIND)
        term += constant
        g = gain
        if up is not None:
            g = gain * load(up, r, in_rows, first, live, BN, r1, r2, strides[4], COL[4], DIMS, ACC)
        ratio = ratio * g
        slope = slope * g
        present = live
        if weight is not None:
            w = load(weight, r, in_rows, first, live, BN, r1, r2, strides[3], COL[3], DIMS, ACC)
            present = live & (w != 0.0)
            term, ratio, slope = term * w, ratio * w, slope * w
            ratio = tl.where(present, ratio, 0.0)
        if d_recon is not None:
            store(d_recon, ratio, r, first, live, BN, r1, r2, strides[5], DIMS)
        if d_x is not None:
            store(d_x, (-ratio), r, first, live, BN, r1, r2, strides[6], DIMS)
        if VAR_GRAD != NOTHING:
            slope = tl.where(present, slope, 0.0)
            if VAR_GRAD == EACH:
                store(d_var, slope, r, first, live, BN, r1, r2, strides[7], DIMS)
            elif VAR_GRAD == ROWS:
                tl.store(var_parts + r.to(tl.int64) * chunks + chunk, tl.sum(slope, 1), in_rows)
            else:
                sum_var += slope
        if TERMS != NOTHING:
            term = tl.where(present, term, 0.0)
            if TERMS == EACH:
                store(terms, term, r, first, live, BN, r1, r2, strides[8], DIMS)
            elif TERMS == ROWS:
                tl.store(parts + r.to(tl.int64) * chunks + chunk, tl.sum(term, 1), in_rows)
            else:
                sum_terms += term
    if TERMS == TOTAL:
        tl.store(parts + pid, tl.sum(sum_terms))
    if VAR_GRAD == TOTAL:
        tl.store(var_parts + pid, tl.sum(sum_var))
    elif VAR_GRAD == COLS:
        c = (pid % chunks).to(tl.int64) * BN + tl.arange(0, BN)
        tl.store(var_parts + (pid // chunks).to(tl.int64) * cols + c, tl.sum(sum_var, 0), c < cols)


@triton.jit(do_not_specialize=["programs", "rows", "r1", "r2"])
def nll_kernel(programs, rows, r1, r2, tensors, strides, cols, scalars, C: tl.constexpr):
    nll_tiles(tl.program_id(0), programs, rows, r1, r2, tensors, strides, cols, scalars, C)


# ---- the host side ---------------------------------------------------------------------------------------------------------------


def plan(
    recon: Tensor, x: Tensor, var: Tensor | float, weight: Tensor | None, kind: str, full: bool, eps: float, keep: int,
    scale: float | Tensor, up: Tensor | None, gain: float | Tensor, needs: tuple[bool, ...], want_terms: bool, acc: torch.dtype,
    dense: bool = False,
) -> Call:  # fmt: skip
    """Plan a launch. `scale` is the terms' factor; `up` an upstream gradient of shape[:keep]; `gain` a factor of all gradients.

    Tensors are read and written as they lie. Where they have no common view, or a variance broadcasts in a pattern that no sink
    below sums, the plan is made again with `dense` copies of what is not contiguous and an elementwise gradient of the variance.
    """
    shape, device = recon.shape, recon.device
    lead = None if up is None else up.reshape(up.shape + (1,) * (len(shape) - up.ndim))
    inputs = [t.expand(shape) if isinstance(t, Tensor) else None for t in (recon, x, var, weight, lead)]
    if dense:
        inputs = [t if t is None or not any(t.stride()) else t.contiguous() for t in inputs]
    summed_var = needs[2] and var.shape != shape
    d_recon, d_x = (torch.empty_like(t) if need else None for t, need in zip(inputs[:2], needs[:2], strict=True))
    each = torch.empty_like(inputs[0], dtype=acc) if want_terms and 0 < keep == len(shape) else None
    d_var = shares = None
    if summed_var and dense and any(inputs[2].stride()):
        d_var = shares = torch.empty(shape, dtype=acc, device=device)
    elif needs[2]:
        d_var = torch.empty_like(var if summed_var else inputs[2])
    outputs = [d_recon, d_x, None if d_var is None else d_var.expand(shape), each]
    f = fold(shape, keep, [*inputs, *outputs], tile=tile_size(acc))

    sink, var_parts, var_segments = NOTHING, None, None
    if f is not None and d_var is not None:
        steps, col = f.strides[7], f.col_strides[7]
        varied = [i for i, step in enumerate(steps) if step]
        if shares is not None or not summed_var:
            sink = EACH
        elif not varied:
            sink = COLS if col else TOTAL
        elif len(varied) == 1 and not col:
            sink = ROWS
        else:
            f = None
    if f is None:
        return plan(recon, x, var, weight, kind, full, eps, keep, scale, up, gain, needs, want_terms, acc, dense=True)

    programs = min(f.tiles, PROGRAMS)
    if sink == COLS:
        groups = max(1, min(max(GROUPS, GROUP_PROGRAMS // f.chunks), PROGRAMS // f.chunks, f.tiles // f.chunks))
        programs = groups * f.chunks
        var_parts = torch.empty(groups, f.cols, dtype=acc, device=device)
        var_segments = Segments(var_parts, d_var, groups, f.cols, 1)
    elif sink == TOTAL:
        var_parts = torch.empty(programs, dtype=acc, device=device)
        var_segments = Segments(var_parts, d_var, 1, 1, programs)
    elif sink == ROWS:
        var_parts = torch.empty(f.rows, f.chunks, dtype=acc, device=device)
        sizes = (f.rows // (f.r1 * f.r2), f.r1, f.r2)[3 - f.dims :]
        i = varied[0]
        var_segments = Segments(
            var_parts, d_var, math.prod(sizes[:i]), sizes[i], math.prod(sizes[i + 1 :]) * f.chunks, step=steps[i]
        )

    out, parts, term_sink, term_segments = each, None, EACH if want_terms else NOTHING, None
    if want_terms and each is None:
        term_sink, parts, term_segments, out = sums(f, shape[:keep], scale, programs, acc, device)

    fixed = None if isinstance(var, Tensor) else var
    factor = 1.0 if fixed is None else inverse_variance(fixed)
    constant = (0.5 * LOG_2PI if full else 0.0) + (0.0 if fixed is None else 0.5 * fixed)
    return Call(
        programs=programs,
        sizes=(f.rows, f.r1, f.r2),
        tensors=(*inputs, d_recon, d_x, d_var if sink is EACH else None, each, var_parts, parts),
        strides=f.strides,
        cols=f.cols,
        scalars=tuple(scalar(value, acc, device) for value in (gain, factor, constant, eps)),
        constants=(
            f.col_strides, FIXED.value if fixed is not None else KINDS[kind], term_sink.value, sink.value, f.dims,
            f.bm, f.bn, TYPES[acc],
        ),
        acc=acc, terms=term_segments, var=var_segments, out=out, grads=(d_recon, d_x, d_var), shares=shares,
    )  # fmt: skip


def inverse_variance(logvar: float) -> float:
    try:
        return math.exp(-logvar)
    except OverflowError:
        return math.inf


def _run(call: Call, device: torch.device) -> None:
    launch(nll_kernel, call.programs, device, *call.args)
    finish(call.acc, a=call.terms, v=call.var)


def nll_forward(recon, x, var, weight, kind, full, eps, keep, scale, needs):
    call = plan(recon, x, var, weight, kind, full, eps, keep, scale, None, 1.0, (False,) * 3, True, accumulate_dtype(recon, x, var))
    _run(call, recon.device)
    return call.out, None


def nll_backward(recon, x, var, weight, kind, eps, keep, scale, grad, needs):
    call = plan(recon, x, var, weight, kind, False, eps, keep, 1.0, grad, scale, needs, False, accumulate_dtype(recon, x, var))
    _run(call, recon.device)
    return call.gradients(var)
