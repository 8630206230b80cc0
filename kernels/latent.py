"""The latent side: z = mu + sigma * eps and the KL, and their gradients, in one pass over mu and logvar.

As in `likelihood.py`, one tile function serves forward, backward and the fused pass. Noise comes from a tensor or, in registers,
from a seed. Backward draws it again and never uses z - mu, which cancels.
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

from fastelbo.dtypes import accumulate_dtype
from fastelbo.specs import Factor, Gradients, Latent, LatentInputs, Needs

from .kl import LOGSTD, LOGVAR, PARAMETERS, kl_math, sigma_of, through_sigma
from .launch import LAYOUTS, Fold, Form, fold, forms, imagined, imagined_like, made, scalars, views
from .op import op_of
from .philox import normal_rows
from .reduction import NO_SUMS, ROWS, TOTAL, Plan, Sums, collect, finish, partial, put_total, sums_of_terms
from .tile import Block, Grid, load, read, store, tile_at, tiles_of, zeros

# Where the noise comes from: nowhere (no sampling), a tensor, a seed with tiles that start at a multiple of four, any other tiles.
NO_NOISE, GIVEN, ALIGNED, UNALIGNED = (tl.constexpr(i) for i in range(4))


# ---- on the host -----------------------------------------------------------------------------------------------------------------


def _run(
    inputs: LatentInputs, spec: Latent, needs: Needs, grads: Gradients | None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[tuple[Tensor | None, ...], Gradients]:
    """The gradients of mu and the spread end up in `out`, tensors of any strides, where that is given."""
    plan, acc = planned(inputs, spec, needs, grads, out)
    plan.launch(inputs.mu.device)
    finish(acc, plan.terms, plan.squares)
    if out is not None:
        for buffer, gradient in zip(out, plan.gradients, strict=False):
            if gradient is not buffer:
                buffer.copy_(gradient)
    outputs = plan.z, plan.terms.result()
    return (*outputs, plan.squares.out) if spec.want_squares and grads is None else outputs, plan.gradients


latent = op_of(_run)


def planned(
    inputs: LatentInputs, spec: Latent, needs: Needs, grads: Gradients | None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Plan, torch.dtype]:
    """The plan of a pass, without what serves an output that has no upstream gradient; and the dtype of its arithmetic."""
    acc = accumulate_dtype(*inputs[:4])
    if grads is not None and grads[0] is None and (inputs.eps is not None or inputs.seed is not None):
        inputs, spec = inputs._replace(eps=None, seed=None), spec._replace(num_samples=None)
    if grads is not None and grads[1] is None:
        inputs, needs = inputs._replace(prior_mu=None, prior_spread=None, weight=None), (*needs[:2], False, False)
    return plan_latent(inputs, spec, LatentWanted(needs, grads and grads[:2], out=out), acc), acc


class LatentWanted(NamedTuple):
    """What one pass computes. Without `grads` that is z and the terms too, and 1 is taken for the gradient of the terms."""

    needs: Needs
    grads: Gradients | None = None  # upstream, of z and of the terms' sums
    beta: Factor = 1.0  # a factor of the KL's gradients
    out: tuple[Tensor, Tensor] | None = None  # for the gradients of mu and the spread


def plan_latent(inputs: LatentInputs, spec: Latent, wanted: LatentWanted, acc: torch.dtype) -> Plan:
    """Plan a launch that reads and writes tensors as they lie, or copies them if they have no common view."""
    *read_from, eps, seed = inputs
    kl, device, is_forward = spec.kl, inputs.mu.device, wanted.grads is None
    grad_z, grad_kl = (None, None) if is_forward else wanted.grads
    given = *read_from, grad_kl, eps, grad_z, *(wanted.out or ())
    traits = _Traits(
        is_forward, wanted.needs, acc, seed is not None, spec.num_samples, spec.want_kl, spec.want_squares, kl.keep,
        kl.clamp is not None, kl.parameter,
    )  # fmt: skip
    layout = _layout(forms(given), traits)
    if layout.is_dense:
        *read_from, grad_kl = views((*read_from, grad_kl), inputs.mu.shape, dense=True)
        eps, grad_z = (None if t is None else t.contiguous() for t in (eps, grad_z))
    gradients = [made(form, device) for form in layout.gradients]
    if wanted.out is not None and not layout.is_dense:
        gradients[:2] = wanted.out
    each, z = made(layout.each, device), made(layout.z, device)
    terms, squares = layout.terms.on(device, kl.scale, each), layout.squares.on(device)
    operands = layout.view.operands((*read_from, grad_kl, *gradients, each, eps, grad_z, z))
    factors = scalars((kl.scale, wanted.beta, *(kl.clamp or (0.0, 0.0)), kl.balance), acc, device)
    args = LatentArgs(LatentTensors(*operands), layout.steps, layout.view.cols, terms.parts, squares.parts, seed, *factors)
    return Plan(latent_kernel, layout.sizes, args, layout.flags, terms, tuple(gradients), z=z, squares=squares)


class _Traits(NamedTuple):
    """What a launch is made of, beside the forms of its tensors: see `Latent`, `KL` and `LatentWanted`."""

    is_forward: bool
    needs: Needs
    acc: torch.dtype
    is_seeded: bool
    samples: int | None
    want_kl: bool
    want_squares: bool
    keep: int
    is_clamped: bool
    parameter: str


class _Layout(NamedTuple):
    """What a plan has that follows from the forms of its tensors, and from what is computed."""

    view: Fold
    is_dense: bool  # what is not contiguous is copied first
    gradients: tuple[Form | None, ...]  # of mu, the spread and the prior's
    each: Form | None  # of the terms, where none are summed
    z: Form | None
    steps: SampleSteps
    sizes: tuple[int, ...]
    flags: LatentFlags
    terms: Sums
    squares: Sums


@lru_cache(maxsize=LAYOUTS)
def _layout(given: tuple[Form | None, ...], traits: _Traits, dense: bool = False) -> _Layout:
    is_forward, needs, acc, is_seeded, samples, want_kl, want_squares, keep, is_clamped, parameter = traits
    # Noise from a seed is numbered by the logical order of the elements: moments in channels_last are copied there.
    (*read_from, eps, grad_z), out = imagined(given[:8]), imagined(given[8:])
    shape = read_from[0].shape
    read_from = views(read_from, shape, dense)
    mu, grad_kl, has_terms = read_from[0], read_from[-1], is_forward and want_kl
    if dense:
        eps, grad_z = (None if t is None else t.contiguous() for t in (eps, grad_z))
    gradients = [imagined_like(t) if need else None for t, need in zip(read_from[:4], needs, strict=True)]
    if out and not dense:
        gradients[:2] = out
    each = imagined_like(mu, acc) if has_terms and 0 < keep == len(shape) else None
    z = None
    if is_forward and (is_seeded or (eps is not None and samples is not None)):
        z = torch.empty(shape if samples is None else (samples, *shape), dtype=mu.dtype, device="meta")
    elif is_forward and eps is not None:
        z = imagined_like(mu)
    firsts, steps = (eps, grad_z, z), ONE_SAMPLE
    if samples is not None:
        steps = SampleSteps(*[0 if t is None else t.stride(0) for t in firsts])
        firsts = [t if t is None else t[0] for t in firsts]
    tensors = LatentTensors(*read_from, *gradients, each, *firsts)

    view = fold(shape, keep, tensors, acc, is_seeded)
    if view is None:
        return _layout(given, traits, dense=True)
    elements, noise = math.prod(shape), NO_NOISE if eps is None else GIVEN
    if is_seeded:
        # The tiles of a first sample start at a multiple of four.
        noise = ALIGNED if samples is None or elements % 4 == 0 else UNALIGNED
        if noise is UNALIGNED:
            # A Philox call for each element fills the registers at half the tile.
            view = fold(shape, keep, tensors, acc, True, share=2)
    terms = sums_of_terms(keep, view, view.programs, mu, each, acc) if has_terms else NO_SUMS
    most = max((samples or 1) * elements, view.reach + ((samples or 1) - 1) * max(steps))
    block = view.block if most < 2**31 else view.block._replace(INDEX=tl.int64)
    has_kl = has_terms or grad_kl is not None
    flags = LatentFlags(noise.value, has_kl, terms.sink.value, is_clamped, PARAMETERS[parameter].value, block)
    if out and not dense:
        gradients[:2] = None, None  # they are there
    return _Layout(
        view, dense, forms(gradients), *forms((each, z)), steps, (*view.grid(view.programs), samples, elements), flags, terms,
        _sums_of_squares(view, shape[:keep], samples, mu, acc) if is_forward and want_squares else NO_SUMS,
    )  # fmt: skip


def _sums_of_squares(view: Fold, kept: torch.Size, samples: int | None, like: Tensor, acc: torch.dtype) -> Sums:
    """Where the sums of eps^2 go: of each sample, row and chunk one partial sum."""
    out = torch.empty(kept if samples is None else (samples, *kept), dtype=acc, device=like.device)
    rows = (samples or 1) * (math.prod(kept) if kept else 1)
    return partial(ROWS, out, 1, rows, (samples or 1) * view.rows * view.chunks // rows, acc)


# ---- on the device ---------------------------------------------------------------------------------------------------------------


class LatentTensors(NamedTuple):
    """On the host tensors, for a kernel an `Operand` of each, of mu's shape: of several samples the first (see `SampleSteps`)."""

    mu: Any
    spread: Any
    prior_mu: Any
    prior_spread: Any
    weight: Any
    grad_kl: Any
    d_mu: Any
    d_spread: Any
    d_prior_mu: Any
    d_prior_spread: Any
    terms: Any
    eps: Any
    grad_z: Any
    z: Any


class SampleSteps(NamedTuple):
    """How far apart the samples lie, in elements."""

    eps: Any
    grad_z: Any
    z: Any


ONE_SAMPLE = SampleSteps(0, 0, 0)


class LatentArgs(NamedTuple):
    tensors: LatentTensors
    steps: SampleSteps
    cols: Any
    parts: Any  # of the terms' sums. TOTAL: (programs,). ROWS: (rows, chunks)
    squares: Any  # of the sums of eps^2: (samples, rows, chunks)
    seed: Any  # ()
    # Numbers, or pointers to one:
    gain: Any  # of every gradient of the KL
    beta: Any  # likewise
    low: Any  # where logvar is clamped
    high: Any
    balance: Any  # the prior's share of the gradients; None is no such thing


class LatentFlags(NamedTuple):
    NOISE: int  # NO_NOISE, GIVEN, ALIGNED, UNALIGNED
    KL: bool  # whether it or its gradient is computed
    TERMS: int  # where its terms go: NOTHING, TOTAL, ROWS, EACH
    CLAMP: bool  # of a logvar
    PARAMETER: int  # LOGVAR, LOGSTD, STD, VAR
    BLOCK: Block


@triton.jit
def kl_tile(tile, mu, spread, gain, args, C: tl.constexpr):
    """The weighted terms of a tile, and the gradients in mu and the spread; those of the prior are stored."""
    t = args.tensors
    B: tl.constexpr = C.BLOCK
    prior_mu = None
    if t.prior_mu is not None:
        prior_mu = load(t.prior_mu, tile, B)
    prior_spread = None
    if t.prior_spread is not None:
        prior_spread = load(t.prior_spread, tile, B)
    term, d_mu, d_spread, d_prior_spread = kl_math(mu, spread, prior_mu, prior_spread, C.PARAMETER)
    g = gain
    if t.grad_kl is not None:
        g = gain * load(t.grad_kl, tile, B)
    d_mu, d_spread, d_prior_spread = d_mu * g, d_spread * g, d_prior_spread * g
    if t.weight is not None:
        w = load(t.weight, tile, B)
        present = tile.mask & (w != 0.0)
        term = tl.where(present, term * w, 0.0)
        d_mu, d_spread = tl.where(present, d_mu * w, 0.0), tl.where(present, d_spread * w, 0.0)
        d_prior_spread = tl.where(present, d_prior_spread * w, 0.0)
    else:
        # What does not exist reads as 0, the standard prior's own mean and logarithm, whose KL is 0; except where a row has one
        # value for all of its columns.
        by_element: tl.constexpr = len(t.mu.strides) > B.DIMS and len(t.spread.strides) > B.DIMS
        of_logarithm: tl.constexpr = C.PARAMETER == LOGVAR or C.PARAMETER == LOGSTD
        if C.CLAMP or not by_element or not of_logarithm or t.prior_mu is not None or t.prior_spread is not None:
            term = tl.where(tile.mask, term, 0.0)
    d_prior_mu = -d_mu
    if args.balance is not None:
        of_prior = read(args.balance, B.ACC)
        d_prior_mu, d_prior_spread = of_prior * d_prior_mu, of_prior * d_prior_spread
        d_mu, d_spread = (1.0 - of_prior) * d_mu, (1.0 - of_prior) * d_spread
    store(t.d_prior_mu, d_prior_mu, tile, B)
    store(t.d_prior_spread, d_prior_spread, tile, B)
    return term, d_mu, d_spread


@triton.jit
def _store_squares(noise, sample, grid, tile, args, B: tl.constexpr):
    """The weighted sums of eps^2 of a tile's rows."""
    present = tile.mask
    each = noise * noise
    if args.tensors.weight is not None:
        w = load(args.tensors.weight, tile, B)
        present = tile.mask & (w != 0.0)
        each = each * w
    at = (sample * grid.rows + tile.rows.to(tl.int64)) * tile.chunks + tile.chunk
    tl.store(args.squares + at, tl.sum(tl.where(present, each, 0.0), 1), tile.in_rows)


@triton.jit
def sample_tile(number, elements, grid, tile, mu, sigma, args, C: tl.constexpr):
    """Draw, and store, the tile of one sample; and the gradients that come through it, in mu and sigma."""
    t = args.tensors
    B: tl.constexpr = C.BLOCK
    sample = core.to_tensor(number).to(B.INDEX)
    if C.NOISE == GIVEN:
        noise = load(t.eps, tile, B, sample * args.steps.eps)
    else:
        first = sample * elements + tile.rows.to(B.INDEX) * grid.cols + tile.first
        noise = normal_rows(tl.load(args.seed), first, B.BN, C.NOISE == ALIGNED).to(B.ACC)
    store(t.z, mu + sigma * noise, tile, B, sample * args.steps.z)
    if args.squares is not None:
        _store_squares(noise, sample, grid, tile, args, B)
    if t.grad_z is not None:
        grad_z = load(t.grad_z, tile, B, sample * args.steps.grad_z)
        return grad_z, grad_z * noise
    else:
        return zeros(B), zeros(B)


@triton.jit
def latent_tiles(pid, grid, samples, elements, args, C: tl.constexpr):
    """The tiles pid, pid + programs, ... of one call. Who owns an element draws its `samples` (None is one) of `elements` each."""
    t = args.tensors
    B: tl.constexpr = C.BLOCK
    gain = read(args.gain, B.ACC) * read(args.beta, B.ACC)
    low = read(args.low, B.ACC)
    high = read(args.high, B.ACC)
    sum_terms = zeros(B)
    for index in range(pid, tiles_of(grid, B), grid.programs):
        tile = tile_at(index, grid, B)
        mu = load(t.mu, tile, B)
        given = load(t.spread, tile, B)
        spread = given
        if C.CLAMP:
            spread = tl.where(given < low, low, tl.where(given > high, high, given))
        d_mu = zeros(B)
        d_spread = zeros(B)
        if C.KL:
            term, d_mu, d_spread = kl_tile(tile, mu, spread, gain, args, C)
            sum_terms = collect(term, sum_terms, t.terms, args.parts, tile, C.TERMS, B)
        if C.NOISE != NO_NOISE:
            sigma = sigma_of(spread, C.PARAMETER)
            if samples is None:
                of_mu, of_sigma = sample_tile(0, elements, grid, tile, mu, sigma, args, C)
            else:
                of_mu = zeros(B)
                of_sigma = zeros(B)
                for number in range(samples):
                    one_mu, one_sigma = sample_tile(number, elements, grid, tile, mu, sigma, args, C)
                    of_mu += one_mu
                    of_sigma += one_sigma
            d_mu += of_mu
            d_spread += through_sigma(of_sigma, sigma, C.PARAMETER)
        if C.CLAMP:
            d_spread = tl.where((given < low) | (given > high), 0.0, d_spread)
        store(t.d_mu, d_mu, tile, B)
        store(t.d_spread, d_spread, tile, B)
    if C.TERMS == TOTAL:
        put_total(sum_terms, args.parts, pid, grid, read(args.gain, B.ACC))


@triton.jit(do_not_specialize=["programs", "rows", "r1", "r2", "samples", "elements"])
def latent_kernel(programs, rows, r1, r2, samples, elements, args, C: tl.constexpr):
    """Takes the fields of a `Grid`, the number of samples and of elements of each, `LatentArgs` and `LatentFlags`."""
    grid = Grid(programs, rows, r1, r2, core.to_tensor(args.cols))
    latent_tiles(tl.program_id(0), grid, samples, elements, args, C)
