"""-log N(x; recon, variance): terms, sums and gradients in one pass over recon, x and the variance.

One tile function serves the forward, the backward and the fused pass of `elbo.py`: a launch computes the outputs that it is given
somewhere to write.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

from fastelbo.dtypes import LOG_2PI, accumulate_dtype
from fastelbo.specs import Gradients, Likelihood, Needs, NLLInputs, Op

from .launch import (
    PROGRAMS,
    Block,
    Fold,
    Grid,
    Operand,
    chunks_of,
    densified,
    divide,
    expanded,
    fold,
    launch,
    load,
    read,
    scalar,
    store,
    tile_at,
    tile_size,
    tiles_of,
    trailing,
    zeros,
)
from .math import exp, log
from .reduction import COLS, EACH, NOTHING, ROWS, TOTAL, Segments, Terms, finish, sums

# What the variance is: a number, or a tensor of these.
FIXED, LOGVAR, STD, VAR = (tl.constexpr(i) for i in range(4))
PARAMETERS = {"logvar": LOGVAR, "std": STD, "var": VAR}

# Groups of rows whose sums over columns are partial, in the gradient of a per-dimension variance: few, since each writes a row of
# partial sums, but enough for as many programs as fill a chip.
GROUPS = 64
GROUP_PROGRAMS = 1024


# ---- on the device ---------------------------------------------------------------------------------------------------------------


class NLLTensors(NamedTuple):
    """On the host tensors, for a kernel an `Operand` of each, all of recon's shape."""

    recon: Any
    x: Any
    variance: Any
    weight: Any
    grad_output: Any
    d_recon: Any
    d_x: Any
    d_variance: Any
    terms: Any


class NLLArgs(NamedTuple):
    tensors: NLLTensors
    cols: Any
    parts: Any  # of the terms' sums. TOTAL: (programs,). ROWS: (rows, chunks)
    variance_parts: Any  # of the variance's gradient. TOTAL: (programs,). ROWS: (rows, chunks). COLS: (groups of programs, cols)
    # Numbers, or pointers to one:
    gain: Any  # of every gradient
    inverse: Any  # 1 / variance where that is fixed
    constant: Any  # added to each term
    floor: Any  # of a VAR


class NLLFlags(NamedTuple):
    VARIANCE: int  # FIXED, LOGVAR, STD, VAR
    TERMS: int  # where the terms go: NOTHING, TOTAL, ROWS, EACH
    D_VARIANCE: int  # and the variance's gradient: one of these, or COLS
    BLOCK: Block


@triton.jit
def nll_math(d, v, inverse, floor, VARIANCE: tl.constexpr):
    """For d = recon - x: the term without its constants, its derivative in recon, and the one in the variance's parameter v."""
    if VARIANCE == FIXED:
        ratio = d * inverse
        return 0.5 * d * ratio, ratio, d
    elif VARIANCE == LOGVAR:
        ratio = d * exp(-v)
        square = d * ratio
        return 0.5 * (square + v), ratio, 0.5 * (1.0 - square)
    elif VARIANCE == STD:
        r = divide(d, v)
        square = r * r
        return 0.5 * square + log(v), divide(r, v), divide(1.0 - square, v)
    else:
        # A variance below the floor is raised to it. A negative one is an error, and NaN shows that without a host synchronisation.
        v = tl.where(v < floor, floor, v) + tl.where(v < 0.0, float("nan"), 0.0)
        ratio = divide(d, v)
        square = d * ratio
        return 0.5 * (square + log(v)), ratio, 0.5 * divide(1.0 - square, v)


@triton.jit
def nll_tiles(pid, grid, args, C: tl.constexpr):
    """The tiles pid, pid + programs, ... of one call. `programs` is a multiple of the chunks of a row where COLS are summed."""
    t = args.tensors
    B: tl.constexpr = C.BLOCK
    gain = read(args.gain, B.ACC)
    inverse = read(args.inverse, B.ACC)
    constant = read(args.constant, B.ACC)
    floor = read(args.floor, B.ACC)
    chunks = chunks_of(grid.cols, B.BN)
    sum_terms = zeros(B)
    sum_variance = zeros(B)
    for index in range(pid, tiles_of(grid, B), grid.programs):
        tile = tile_at(index, grid, B)
        m = load(t.recon, tile, B)
        y = load(t.x, tile, B)
        v = m
        if C.VARIANCE != FIXED:
            v = load(t.variance, tile, B)
        term, d_recon, d_variance = nll_math(m - y, v, inverse, floor, C.VARIANCE)
        term += constant
        g = gain
        if t.grad_output is not None:
            g = gain * load(t.grad_output, tile, B)
        d_recon = d_recon * g
        d_variance = d_variance * g
        present = tile.mask
        if t.weight is not None:
            w = load(t.weight, tile, B)
            present = tile.mask & (w != 0.0)
            term, d_recon, d_variance = term * w, d_recon * w, d_variance * w
            d_recon = tl.where(present, d_recon, 0.0)
        if t.d_recon is not None:
            store(t.d_recon, d_recon, tile, B)
        if t.d_x is not None:
            store(t.d_x, (-d_recon), tile, B)
        if C.D_VARIANCE != NOTHING:
            d_variance = tl.where(present, d_variance, 0.0)
            if C.D_VARIANCE == EACH:
                store(t.d_variance, d_variance, tile, B)
            elif C.D_VARIANCE == ROWS:
                at = tile.rows.to(tl.int64) * chunks + tile.chunk
                tl.store(args.variance_parts + at, tl.sum(d_variance, 1), tile.in_rows)
            else:
                sum_variance += d_variance
        if C.TERMS != NOTHING:
            term = tl.where(present, term, 0.0)
            if C.TERMS == EACH:
                store(t.terms, term, tile, B)
            elif C.TERMS == ROWS:
                tl.store(args.parts + tile.rows.to(tl.int64) * chunks + tile.chunk, tl.sum(term, 1), tile.in_rows)
            else:
                sum_terms += term
    if C.TERMS == TOTAL:
        tl.store(args.parts + pid, tl.sum(sum_terms))
    if C.D_VARIANCE == TOTAL:
        tl.store(args.variance_parts + pid, tl.sum(sum_variance))
    elif C.D_VARIANCE == COLS:
        c = (pid % chunks).to(tl.int64) * B.BN + tl.arange(0, B.BN)
        at = (pid // chunks).to(tl.int64) * grid.cols + c
        tl.store(args.variance_parts + at, tl.sum(sum_variance, 0), c < grid.cols)


@triton.jit(do_not_specialize=["programs", "rows", "r1", "r2"])
def nll_kernel(programs, rows, r1, r2, args, C: tl.constexpr):
    """Takes the fields of a `Grid`, `NLLArgs` and `NLLFlags`."""
    grid = Grid(programs, rows, r1, r2, core.to_tensor(args.cols))
    nll_tiles(tl.program_id(0), grid, args, C)


# ---- on the host -----------------------------------------------------------------------------------------------------------------


class NLLWanted(NamedTuple):
    """What one pass computes."""

    terms: bool
    needs: Needs = (False, False, False)
    grad_output: Tensor | None = None  # of the sums; None is 1


class NLLPlan(NamedTuple):
    """A launch, what remains to be added up after it, and what it yields."""

    grid: tuple[int, ...]
    args: NLLArgs
    flags: NLLFlags
    terms: Terms
    variance_segments: Segments | None
    gradients: Gradients
    shares: Tensor | None  # the elementwise gradient of a variance that broadcasts, still to be summed

    @property
    def programs(self) -> int:
        return self.grid[0]

    def finished_gradients(self, variance: Tensor | None) -> Gradients:
        if self.shares is None:
            return self.gradients
        d_recon, d_x, _ = self.gradients
        return d_recon, d_x, self.shares.sum_to_size(variance.shape).to(variance.dtype)


class _Layout(NamedTuple):
    """How the tensors of a launch lie, and how its view sums the variance's gradient."""

    fold: Fold
    tensors: NLLTensors
    operands: NLLTensors
    d_variance: Tensor | None  # of the variance's shape
    shares: Tensor | None
    sink: tl.constexpr  # of the variance's gradient


class _VarianceSums(NamedTuple):
    programs: int
    parts: Tensor | None = None
    segments: Segments | None = None


def plan_nll(inputs: NLLInputs, spec: Likelihood, wanted: NLLWanted, acc: torch.dtype) -> NLLPlan:
    """Plan a launch that reads and writes tensors as they lie.

    If they have no common view, or a variance broadcasts in a pattern that no sink sums, then what is not contiguous is copied, and
    the gradient of the variance is written for each element and summed by torch.
    """
    layout = _lay_out(inputs, spec.keep, wanted, acc) or _lay_out(inputs, spec.keep, wanted, acc, dense=True)
    device = inputs.recon.device
    empty = functools.partial(torch.empty, dtype=acc, device=device)
    variance = _sum_variance(layout, empty)
    terms, each = Terms(), layout.tensors.terms
    if each is not None:
        terms = Terms(EACH, out=each, factor=spec.scale)
    elif wanted.terms:
        terms = sums(layout.fold, inputs.recon.shape[: spec.keep], spec.scale, variance.programs, empty)
    fixed = inputs.variance is None
    factors = (
        spec.scale,
        inverse_variance(spec.logvar) if fixed else 1.0,
        (0.5 * LOG_2PI if spec.full else 0.0) + (0.5 * spec.logvar if fixed else 0.0),
        spec.floor,
    )
    operands = layout.operands
    if layout.sink is not EACH and operands.d_variance is not None:
        operands = operands._replace(d_variance=None)
    return NLLPlan(
        layout.fold.grid(variance.programs),
        NLLArgs(operands, layout.fold.cols, terms.parts, variance.parts, *(scalar(f, acc, device) for f in factors)),
        NLLFlags(
            FIXED.value if fixed else PARAMETERS[spec.parameter].value, terms.sink.value, layout.sink.value, layout.fold.block(acc)
        ),
        terms,
        variance.segments,
        (layout.tensors.d_recon, layout.tensors.d_x, layout.d_variance),
        layout.shares,
    )


def _lay_out(inputs: NLLInputs, keep: int, wanted: NLLWanted, acc: torch.dtype, dense: bool = False) -> _Layout | None:
    """None if a tensor must be copied for a view that serves; `dense` copies."""
    shape, device = inputs.recon.shape, inputs.recon.device
    read_from = [expanded(t, shape) for t in (*inputs, trailing(wanted.grad_output, len(shape)))]
    if dense:
        read_from = [densified(t) for t in read_from]
    recon, x, variance, _, _ = read_from
    need_recon, need_x, need_variance = wanted.needs
    d_variance = shares = None
    is_summed = need_variance and inputs.variance.shape != shape
    if is_summed and dense and any(variance.stride()):
        d_variance = shares = torch.empty(shape, dtype=acc, device=device)
    elif need_variance:
        d_variance = torch.empty_like(inputs.variance if is_summed else variance)
    tensors = NLLTensors(
        *read_from,
        d_recon=torch.empty_like(recon) if need_recon else None,
        d_x=torch.empty_like(x) if need_x else None,
        d_variance=expanded(d_variance, shape),
        terms=torch.empty_like(recon, dtype=acc) if wanted.terms and 0 < keep == len(shape) else None,
    )
    view = fold(shape, keep, tensors, tile=tile_size(acc))
    if view is None:
        return None
    operands = NLLTensors(*view.operands(tensors))
    sink = EACH if shares is not None or (need_variance and not is_summed) else _sink(operands.d_variance, view.dims)
    return None if sink is None else _Layout(view, tensors, operands, d_variance, shares, sink)


def _sink(summed: Operand | None, dims: int) -> tl.constexpr | None:
    """Where a variance's gradient goes that broadcasts; None if it varies in a pattern that has no sink."""
    if summed is None:
        return NOTHING
    varied, by_column = sum(step != 0 for step in summed.strides[:dims]), len(summed.strides) > dims
    if varied == 0:
        return COLS if by_column else TOTAL
    return ROWS if varied == 1 and not by_column else None


def _sum_variance(layout: _Layout, empty: Any) -> _VarianceSums:
    """The number of programs, which depends on it, and the partial sums of the variance's gradient."""
    view, d_variance = layout.fold, layout.d_variance
    if layout.sink is COLS:
        groups = max(1, min(max(GROUPS, GROUP_PROGRAMS // view.chunks), PROGRAMS // view.chunks, view.tiles // view.chunks))
        parts = empty(groups, view.cols)
        return _VarianceSums(groups * view.chunks, parts, Segments(parts, d_variance, groups, view.cols, 1))
    if layout.sink is TOTAL:
        parts = empty(view.programs)
        return _VarianceSums(view.programs, parts, Segments(parts, d_variance, 1, 1, view.programs))
    if layout.sink is ROWS:
        parts = empty(view.rows, view.chunks)
        strides = layout.operands.d_variance.strides
        sizes = (view.rows // (view.r1 * view.r2), view.r1, view.r2)[3 - view.dims :]
        i = next(i for i, step in enumerate(strides) if step)
        inner = math.prod(sizes[i + 1 :]) * view.chunks
        segments = Segments(parts, d_variance, math.prod(sizes[:i]), sizes[i], inner, step=strides[i])
        return _VarianceSums(view.programs, parts, segments)
    return _VarianceSums(view.programs)


def inverse_variance(logvar: float) -> float:
    try:
        return math.exp(-logvar)
    except OverflowError:
        return math.inf


def _launch(planned: NLLPlan, acc: torch.dtype, device: torch.device) -> None:
    launch(nll_kernel, planned.programs, device, *planned.grid, planned.args, planned.flags)
    finish(acc, planned.terms.segments, planned.variance_segments)


def _forward(inputs: NLLInputs, spec: Likelihood, needs: Needs) -> tuple[tuple[Tensor], None]:
    acc = accumulate_dtype(*inputs[: inputs.differentiable])
    planned = plan_nll(inputs, spec, NLLWanted(terms=True), acc)
    _launch(planned, acc, inputs.recon.device)
    return (planned.terms.result(),), None


def _backward(inputs: NLLInputs, spec: Likelihood, grad_outputs: Gradients, needs: Needs, kept: None) -> Gradients:
    acc = accumulate_dtype(*inputs[: inputs.differentiable])
    planned = plan_nll(inputs, spec, NLLWanted(False, needs, grad_outputs[0]), acc)
    _launch(planned, acc, inputs.recon.device)
    return planned.finished_gradients(inputs.variance)


gaussian_nll = Op(_forward, _backward)
