"""-log p(x; recon, variance): terms, sums and gradients in one pass over recon, x and the variance.

One tile function serves the forward, the backward and the fused pass of `elbo.py`: a launch computes the outputs that it is given
somewhere to write.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

from fastelbo.dtypes import LOG_2PI, OPEN, accumulate_dtype
from fastelbo.specs import Gradients, Likelihood, Needs, NLLInputs

from .counts import negative_binomial_math, poisson_math, poisson_slope, zero_inflated_math
from .launch import LAYOUTS, PROGRAMS, Fold, Form, fold, forms, imagined, imagined_like, made, scalars, views
from .math import divide, exp, log, log1p_exp_and_sigmoid, minus_log1m_exp_and_ratio
from .op import op_of
from .reduction import COLS, EACH, NO_SUMS, ROWS, TOTAL, Plan, Sums, collect, finish, partial, put_total, sums_of_terms, total_of
from .tile import Block, Grid, chunks_of, load, read, store, tile_at, tiles_of, zeros

# What p is: a Gaussian whose variance is a number, or a tensor of one of three kinds; a Laplace distribution whose scale is a
# number, or a tensor of its logarithm; a Bernoulli distribution of logits; the bins of a logistic distribution, whose scale is
# given as Laplace's; or, last, a distribution of counts.
FIXED, LOGVAR, STD, VAR, LAPLACE_FIXED, LAPLACE, BERNOULLI, BINS_FIXED, BINS, POISSON, NEGATIVE_BINOMIAL, ZERO_INFLATED = (
    tl.constexpr(i) for i in range(12)
)
COUNTS = {"poisson": POISSON, "negative_binomial": NEGATIVE_BINOMIAL, "zero_inflated_negative_binomial": ZERO_INFLATED}
PARAMETERS = {"logvar": LOGVAR, "std": STD, "var": VAR}
FAR = tl.constexpr(OPEN)

# Groups of rows whose sums over columns are partial, in the gradient of a per-dimension variance: few, since each writes a row of
# partial sums, but enough for as many programs as fill a chip.
GROUPS = 64
GROUP_PROGRAMS = 1024


# ---- on the host -----------------------------------------------------------------------------------------------------------------


def _run(inputs: NLLInputs, spec: Likelihood, needs: Needs, grads: Gradients | None) -> tuple[tuple[Tensor | None], Gradients]:
    acc = accumulate_dtype(*inputs[:4])
    plan = plan_nll(inputs, spec, needs, grads, acc)
    plan.launch(inputs.recon.device)
    finish(acc, plan.terms, plan.of_variance)
    return (plan.terms.result(),), nll_gradients(plan, inputs.variance)


likelihood = op_of(_run)


def plan_nll(inputs: NLLInputs, spec: Likelihood, needs: Needs, grads: Gradients | None, acc: torch.dtype) -> Plan:
    """Plan a launch that reads and writes tensors as they lie. Without `grads` it computes the terms, whose gradient is then 1.

    If they have no common view, or a variance broadcasts in a pattern that no sink sums, then what is not contiguous is copied,
    and the gradient of the variance is written for each element: `nll_gradients` sums it.
    """
    device, variance = inputs.recon.device, inputs.variance
    given = (*inputs, None if grads is None else grads[0])
    flags = kind_of(spec, variance is not None).value, spec.full and spec.family in COUNTS
    layout = _layout(forms(given), spec.keep, flags, spec.family in COUNTS, needs, grads is None, acc)
    if layout.is_dense:
        given = views(given, inputs.recon.shape, dense=True)
    gradients, each = [made(form, device) for form in layout.gradients], made(layout.each, device)
    terms, of_variance = layout.terms.on(device, spec.scale, each), layout.of_variance.on(device, out=gradients[2])
    written = list(gradients)
    if of_variance.sink is not EACH:
        written[2] = None  # its place was needed for its strides
    operands = NLLTensors(*layout.view.operands((*given, *written, each)))
    factors = spec.scale, *inverse_and_constant(spec, variance), spec.floor
    is_image = inputs.x.dtype == torch.uint8
    image = tuple(scalars((spec.x_scale, spec.x_shift), acc, device)) if is_image else None
    bin = None
    if spec.bin is not None:
        bin = tuple(scalars((*spec.bin, minus_log1m_exp(2 * spec.bin[0] * factors[1])), acc, device))
    factors = scalars(factors, acc, device)
    args = NLLArgs(operands, layout.view.cols, terms.parts, of_variance.parts, *factors, image, bin)
    return Plan(nll_kernel, layout.sizes, args, layout.flags, terms, tuple(gradients), of_variance)


class _Layout(NamedTuple):
    """What a plan has that follows from the forms of its tensors, and from what is computed."""

    view: Fold
    is_dense: bool  # what is not contiguous is copied first
    gradients: tuple[Form | None, ...]  # of recon, x, the variance, the logits
    each: Form | None  # of the terms, where none are summed
    sizes: tuple[int, ...]
    flags: NLLFlags
    terms: Sums
    of_variance: Sums


@lru_cache(maxsize=LAYOUTS)
def _layout(
    given: tuple[Form | None, ...], keep: int, kind: tuple[int, bool], is_of_counts: bool, needs: Needs, is_forward: bool,
    acc: torch.dtype, dense: bool = False,
) -> _Layout:  # fmt: skip
    as_given = imagined(given)
    shape, given_variance = as_given[0].shape, as_given[2]
    recon, x, variance, zi_logits, weight, grad_output = views(as_given, shape, dense)
    d_variance = None
    if needs[2]:
        is_summed = given_variance.shape != shape
        if is_summed and dense and any(variance.stride()):
            d_variance = torch.empty(shape, dtype=acc, device="meta")
        else:
            d_variance = imagined_like(given_variance if is_summed else variance)
    tensors = NLLTensors(
        recon, x, variance, zi_logits, weight, grad_output,
        d_recon=imagined_like(recon) if needs[0] else None,
        d_x=imagined_like(x) if needs[1] else None,
        d_variance=None if d_variance is None else d_variance.expand(shape),
        d_zi_logits=imagined_like(recon, zi_logits.dtype) if needs[3] else None,
        terms=imagined_like(recon, acc) if is_forward and 0 < keep == len(shape) else None,
    )  # fmt: skip
    # The terms of counts take four times the registers of the others.
    view = fold(shape, keep, tensors, acc, share=4 if is_of_counts else 1)
    of_variance = None if view is None else _sums_of_variance(view, d_variance, shape, acc)
    if of_variance is None:
        return _layout(given, keep, kind, is_of_counts, needs, is_forward, acc, dense=True)
    programs = of_variance.outer * view.chunks if of_variance.sink is COLS else view.programs
    terms = sums_of_terms(keep, view, programs, recon, tensors.terms, acc) if is_forward else NO_SUMS
    return _Layout(
        view, dense, forms((tensors.d_recon, tensors.d_x, d_variance, tensors.d_zi_logits)), *forms((tensors.terms,)),
        view.grid(programs), NLLFlags(*kind, terms.sink.value, of_variance.sink.value, view.block), terms, of_variance,
    )  # fmt: skip


def nll_gradients(plan: Plan, variance: Tensor | None) -> Gradients:
    """The gradients of recon, x, the variance and the logits, once the plan has run."""
    d_recon, d_x, d_variance, d_zi_logits = plan.gradients
    if d_variance is not None and d_variance.shape != variance.shape:
        d_variance = d_variance.sum_to_size(variance.shape).to(variance.dtype)
    return d_recon, d_x, d_variance, d_zi_logits


def _sums_of_variance(view: Fold, gradient: Tensor | None, shape: torch.Size, acc: torch.dtype) -> Sums | None:
    """Where the gradient of the variance goes; None if it varies in a pattern that no sink sums."""
    if gradient is None:
        return NO_SUMS
    if gradient.shape == shape:
        return Sums(EACH, gradient)
    dims = view.block.DIMS
    strides = view.strides[NLLTensors._fields.index("d_variance")]
    steps = strides[:dims]
    varied, by_column = [i for i, step in enumerate(steps) if step], len(strides) > dims
    if not varied and by_column:
        groups = max(1, min(max(GROUPS, GROUP_PROGRAMS // view.chunks), PROGRAMS // view.chunks, view.tiles // view.chunks))
        return partial(COLS, gradient, groups, view.cols, 1, acc)
    if not varied:
        return total_of(gradient, view.programs, acc)
    if len(varied) > 1 or by_column:
        return None
    (i,) = varied
    sizes = (view.rows // (view.r1 * view.r2), view.r1, view.r2)[3 - dims :]
    return partial(ROWS, gradient, math.prod(sizes[:i]), sizes[i], math.prod(sizes[i + 1 :]) * view.chunks, acc, step=steps[i])


def kind_of(spec: Likelihood, has_variance: bool) -> tl.constexpr:
    if spec.family in COUNTS:
        return COUNTS[spec.family]
    if spec.family == "bernoulli":
        return BERNOULLI
    if spec.family == "laplace":
        return LAPLACE if has_variance else LAPLACE_FIXED
    if spec.family == "discretized_logistic":
        return BINS if has_variance else BINS_FIXED
    return PARAMETERS[spec.parameter] if has_variance else FIXED


def inverse_and_constant(spec: Likelihood, variance: Tensor | None) -> tuple[float, float]:
    """1 / std, or 1 / scale or its root, and what is added to each term; what a tensor holds, the kernel takes from there."""
    if spec.family == "bernoulli" or spec.family in COUNTS:
        return 1.0, 0.0
    logvar = spec.logvar if variance is None else 0.0
    is_binned = spec.family == "discretized_logistic"
    try:
        inverse = math.exp(-logvar if is_binned else -0.5 * logvar)
    except OverflowError:
        inverse = math.inf
    if spec.family == "laplace":
        return inverse, (math.log(2.0) if spec.full else 0.0) + logvar
    if is_binned:
        return inverse, 0.0
    return inverse, (0.5 * LOG_2PI if spec.full else 0.0) + 0.5 * logvar


def minus_log1m_exp(w: float) -> float:
    """-log(1 - e^-w), free of cancellation."""
    return math.log1p(math.exp(-w) / -math.expm1(-w)) if w else math.inf


# ---- on the device ---------------------------------------------------------------------------------------------------------------


class NLLTensors(NamedTuple):
    """On the host tensors, for a kernel an `Operand` of each, all of recon's shape."""

    recon: Any
    x: Any
    variance: Any
    zi_logits: Any
    weight: Any
    grad_output: Any
    d_recon: Any
    d_x: Any
    d_variance: Any
    d_zi_logits: Any
    terms: Any


class NLLArgs(NamedTuple):
    tensors: NLLTensors
    cols: Any
    parts: Any  # of the terms' sums. TOTAL: (programs,). ROWS: (rows, chunks)
    variance_parts: Any  # of the variance's gradient. TOTAL: (programs,). ROWS: (rows, chunks). COLS: (groups of programs, cols)
    # Numbers, or pointers to one:
    gain: Any  # of every gradient
    inverse: Any  # 1 / std, or 1 / scale or its root, where that is fixed
    constant: Any  # added to each term
    floor: Any  # of a VAR
    image: Any  # (scale, shift) of an x of uint8, otherwise None
    bin: Any  # (half a bin, the first's end, the last's start, -log(1 - e^-w) where that is fixed) of BINS, otherwise None


class NLLFlags(NamedTuple):
    KIND: int  # FIXED, LOGVAR, STD, VAR, LAPLACE_FIXED, ..., ZERO_INFLATED
    FULL: bool  # of counts: with lgamma(x + 1)
    TERMS: int  # where the terms go: NOTHING, TOTAL, ROWS, EACH
    D_VARIANCE: int  # and the variance's gradient: one of these, or COLS
    BLOCK: Block


@triton.jit
def scaled(x, scale, shift):
    """x * scale + shift, rounded once: left to itself, a compiler may join the product with whatever sum follows."""
    if x.dtype == tl.float64:
        return x * scale + shift  # tl.fma takes a Python float for float32
    else:
        return tl.fma(x, scale, shift)


@triton.jit
def nll_math(m, y, v, inverse, floor, KIND: tl.constexpr):
    """The term of recon m and x y without its constants, and its derivatives in m, in y, and in the variance's parameter v."""
    if KIND == BERNOULLI:
        # With log(1 + e^m) as max(m, 0) + log1p(e^-|m|), nothing cancels beside a target near 0 or 1.
        small, sigmoid = log1p_exp_and_sigmoid(m)
        return tl.abs(m) * tl.where(m < 0.0, y, 1.0 - y) + small, sigmoid - y, -m, m
    elif (KIND == LAPLACE) | (KIND == LAPLACE_FIXED):
        term, in_m, in_v = laplace_math(m - y, v, inverse, KIND)
        return term, in_m, -in_m, in_v
    else:
        term, in_m, in_v = gaussian_math(m - y, v, inverse, floor, KIND)
        return term, in_m, -in_m, in_v


@triton.jit
def counts_math(x, mean, theta, zi_logits, KIND: tl.constexpr, FULL: tl.constexpr):
    """The term, and its derivatives in the mean, in theta and in the logits."""
    if KIND == POISSON:
        return poisson_math(x, mean, mean - x, FULL), poisson_slope(x, mean), mean, mean
    else:
        term, in_mean, in_theta = negative_binomial_math(x, mean, theta, FULL)
        if KIND == NEGATIVE_BINOMIAL:
            return term, in_mean, in_theta, mean
        else:
            return zero_inflated_math(x, term, in_mean, in_theta, zi_logits)


@triton.jit
def laplace_math(d, s, root, KIND: tl.constexpr):
    """For d = recon - x and the logarithm s of the scale b: the term, its derivative in recon, and the one in s.

    The root of 1 / b stays in float32's range where 1 / b does not.
    """
    if KIND == LAPLACE:
        root = exp(-0.5 * s)
    r = tl.abs(d) * root * root
    inverse = root * root
    if KIND == LAPLACE:
        inverse = exp(-s)  # rounded once; where it overflows, so does the slope
    slope = tl.where(d > 0.0, inverse, tl.where(d < 0.0, -inverse, d))  # NaN stays NaN
    if KIND == LAPLACE:
        return r + s, slope, 1.0 - r
    else:
        return r, slope, d


@triton.jit
def bins_math(m, y, s, inverse, bin, KIND: tl.constexpr):
    """For recon m and a bin around y, and the logarithm s of the scale: the term, its derivative in recon, and the one in s."""
    half, first, last = read(bin[0], m.dtype), read(bin[1], m.dtype), read(bin[2], m.dtype)
    if KIND == BINS:
        inverse = exp(-s)
    d = y - m
    # The open side of the first and the last bin is far away.
    a = tl.where(y > last, FAR, (d + half) * inverse)
    b = tl.where(y < first, -FAR, (d - half) * inverse)
    is_open = (y < first) | (y > last)
    small_a, of_a = log1p_exp_and_sigmoid(-a)
    small_b, of_b = log1p_exp_and_sigmoid(b)
    term = tl.maximum(-a, 0.0) + tl.maximum(b, 0.0) + (small_a + small_b)
    slope = (of_a - of_b) * inverse
    if KIND == BINS:
        w = 2.0 * half * inverse
        of_width, q = minus_log1m_exp_and_ratio(w)
        return term + tl.where(is_open, 0.0, of_width), slope, a * of_a - b * of_b + tl.where(is_open, 0.0, w * q)
    else:
        return term + tl.where(is_open, 0.0, read(bin[3], m.dtype)), slope, d


@triton.jit
def gaussian_math(d, v, inverse, floor, KIND: tl.constexpr):
    """For d = recon - x: the term without its constants, its derivative in recon, and the one in the variance's parameter v.

    Beside a log-variance it is r = d / std that is squared, since the variance or its inverse leaves float32's range long before
    their roots do.
    """
    if KIND == FIXED:
        r = d * inverse
        return 0.5 * r * r, r * inverse, d
    elif KIND == LOGVAR:
        inverse = exp(-0.5 * v)
        r = d * inverse
        square = r * r
        return 0.5 * (square + v), r * inverse, 0.5 * (1.0 - square)
    elif KIND == STD:
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
    sum_terms = zeros(B)
    sum_variance = zeros(B)
    for index in range(pid, tiles_of(grid, B), grid.programs):
        tile = tile_at(index, grid, B)
        m = load(t.recon, tile, B)
        y = load(t.x, tile, B)
        if args.image is not None:
            y = scaled(y, read(args.image[0], B.ACC), read(args.image[1], B.ACC))
        v = m
        if t.variance is not None:
            v = load(t.variance, tile, B)
        d_zi_logits = m
        if C.KIND >= POISSON:
            zi_logits = m
            if t.zi_logits is not None:
                zi_logits = load(t.zi_logits, tile, B)
            term, d_recon, d_variance, d_zi_logits = counts_math(y, m, v, zi_logits, C.KIND, C.FULL)
            d_x = d_recon
        elif args.bin is None:
            term, d_recon, d_x, d_variance = nll_math(m, y, v, inverse, floor, C.KIND)
        else:
            term, d_recon, d_variance = bins_math(m, y, v, inverse, args.bin, C.KIND)
            d_x = m  # which nobody asks for
        term += constant
        g = gain
        if t.grad_output is not None:
            g = gain * load(t.grad_output, tile, B)
        d_recon = d_recon * g
        d_x = d_x * g
        d_variance = d_variance * g
        present = tile.mask
        if t.weight is not None:
            w = load(t.weight, tile, B)
            present = tile.mask & (w != 0.0)
            term, d_recon, d_x, d_variance = term * w, d_recon * w, d_x * w, d_variance * w
            d_recon, d_x = tl.where(present, d_recon, 0.0), tl.where(present, d_x, 0.0)
        store(t.d_recon, d_recon, tile, B)
        store(t.d_x, d_x, tile, B)
        if t.d_zi_logits is not None:
            d_zi_logits = d_zi_logits * g
            if t.weight is not None:
                d_zi_logits = tl.where(present, d_zi_logits * w, 0.0)
            store(t.d_zi_logits, d_zi_logits, tile, B)
        d_variance = tl.where(present, d_variance, 0.0)
        sum_variance = collect(d_variance, sum_variance, t.d_variance, args.variance_parts, tile, C.D_VARIANCE, B)
        sum_terms = collect(tl.where(present, term, 0.0), sum_terms, t.terms, args.parts, tile, C.TERMS, B)
    if C.TERMS == TOTAL:
        put_total(sum_terms, args.parts, pid, grid, gain)
    if C.D_VARIANCE == TOTAL:
        put_total(sum_variance, args.variance_parts, pid, grid, 1.0)
    elif C.D_VARIANCE == COLS:
        chunks = chunks_of(grid.cols, B)
        c = (pid % chunks).to(tl.int64) * B.BN + tl.arange(0, B.BN)
        at = (pid // chunks).to(tl.int64) * grid.cols + c
        tl.store(args.variance_parts + at, tl.sum(sum_variance, 0), c < grid.cols)


@triton.jit(do_not_specialize=["programs", "rows", "r1", "r2"])
def nll_kernel(programs, rows, r1, r2, args, C: tl.constexpr):
    """Takes the fields of a `Grid`, `NLLArgs` and `NLLFlags`."""
    grid = Grid(programs, rows, r1, r2, core.to_tensor(args.cols))
    nll_tiles(tl.program_id(0), grid, args, C)
