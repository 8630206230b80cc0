"""The latent side: z = mu + sigma * eps and the KL, and their gradients, in one pass over mu and logvar.

As in `gaussian_nll.py`, one tile function serves forward, backward and the fused pass: a launch computes the outputs that it is
given somewhere to write. Noise comes from a tensor or, in registers, from a seed. Backward draws it again and never uses z - mu,
which cancels.
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

from fastelbo.dtypes import accumulate_dtype
from fastelbo.specs import Factor, Gradients, Latent, LatentInputs, Needs, Op

from .launch import (
    Block,
    Fold,
    Grid,
    chunks_of,
    densified,
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
from .math import exp, expm1_and_remainder
from .philox import normal_at, normal_tile_aligned
from .reduction import EACH, ROWS, TOTAL, Terms, finish, sums

# Where the noise comes from: nowhere (no sampling), a tensor, a seed with rows that start at a multiple of four, any other rows.
NO_NOISE, GIVEN, ALIGNED, UNALIGNED = (tl.constexpr(i) for i in range(4))


# ---- on the device ---------------------------------------------------------------------------------------------------------------


class LatentTensors(NamedTuple):
    """On the host tensors, for a kernel an `Operand` of each, all of mu's shape.

    Of a tensor with several samples, the first sample stands here for all: see `SampleSteps`.
    """

    mu: Any
    logvar: Any
    prior_mu: Any
    prior_logvar: Any
    weight: Any
    grad_kl: Any
    d_mu: Any
    d_logvar: Any
    d_prior_mu: Any
    d_prior_logvar: Any
    terms: Any
    eps: Any
    grad_z: Any
    z: Any


class SampleSteps(NamedTuple):
    """How far apart the samples lie, in elements."""

    eps: Any
    grad_z: Any
    z: Any


class Samples(NamedTuple):
    """What is drawn for each element, made on the device of arguments that do not specialise."""

    number: Any
    elements: Any  # of one sample


class LatentArgs(NamedTuple):
    tensors: LatentTensors
    steps: SampleSteps
    cols: Any
    parts: Any  # of the terms' sums. TOTAL: (programs,). ROWS: (rows, chunks)
    seed: Any  # ()
    # Numbers, or pointers to one:
    gain: Any  # of every gradient of the KL
    beta: Any  # likewise
    low: Any  # where logvar is clamped
    high: Any


class LatentFlags(NamedTuple):
    NOISE: int  # NO_NOISE, GIVEN, ALIGNED, UNALIGNED
    KL: bool  # whether it or its gradient is computed
    TERMS: int  # where its terms go: NOTHING, TOTAL, ROWS, EACH
    CLAMP: bool  # of logvar
    BLOCK: Block


@triton.jit
def kl_math(mu, logvar, prior_mu, prior_logvar):
    """The KL and its derivatives: (kl, in mu, in logvar, in prior_logvar). The derivative in prior_mu is minus the one in mu.

    A prior of None is N(0, 1). With v = logvar - prior_logvar: 1/2 [ (mu - prior_mu)^2 / prior_var + (e^v - 1 - v) ].
    """
    d = mu
    if prior_mu is not None:
        d = mu - prior_mu
    v = logvar
    d_mu = d
    if prior_logvar is not None:
        v = logvar - prior_logvar
        d_mu = d * exp(-prior_logvar)
    expm1, remainder = expm1_and_remainder(v)
    if prior_logvar is not None:
        # Far from the prior the rounding of v moves e**v by many times its own: `low` is what v lost (Knuth's two-sum).
        back = v - logvar
        low = (logvar - (v - back)) - (prior_logvar + back)
        more = (expm1 + 1.0) * low
        finite = tl.abs(more) < float("inf")
        remainder = tl.where(finite, remainder + expm1 * low, remainder)
        expm1 = tl.where(finite, expm1 + more, expm1)
    square = d * d_mu
    return 0.5 * (square + remainder), d_mu, 0.5 * expm1, -0.5 * (square + expm1)


@triton.jit
def noise_at(tile, sample, samples, args, cols, C: tl.constexpr):
    """The noise of a tile of the sample of that number (int64)."""
    B: tl.constexpr = C.BLOCK
    if C.NOISE == GIVEN:
        noise = load(args.tensors.eps, tile, B, sample * args.steps.eps)
    else:
        start = sample * samples.elements + tile.rows.to(tl.int64) * cols + tile.first
        seed = tl.load(args.seed)
        if C.NOISE == ALIGNED:
            noise = normal_tile_aligned(seed, (start >> 2)[:, None] + tl.arange(0, B.BN // 4)[None, :]).to(B.ACC)
        else:
            noise = normal_at(seed, start[:, None] + tl.arange(0, B.BN)[None, :]).to(B.ACC)
    return noise


@triton.jit
def kl_tile(tile, mu, logvar, gain, args, C: tl.constexpr):
    """The weighted terms of a tile, and the gradients in mu and logvar; those of the prior are stored."""
    t = args.tensors
    B: tl.constexpr = C.BLOCK
    prior_mu = None
    if t.prior_mu is not None:
        prior_mu = load(t.prior_mu, tile, B)
    prior_logvar = None
    if t.prior_logvar is not None:
        prior_logvar = load(t.prior_logvar, tile, B)
    term, d_mu, d_logvar, d_prior_logvar = kl_math(mu, logvar, prior_mu, prior_logvar)
    g = gain
    if t.grad_kl is not None:
        g = gain * load(t.grad_kl, tile, B)
    d_mu, d_logvar, d_prior_logvar = d_mu * g, d_logvar * g, d_prior_logvar * g
    present = tile.mask
    if t.weight is not None:
        w = load(t.weight, tile, B)
        present = tile.mask & (w != 0.0)
        term = term * w
        d_mu, d_logvar = tl.where(present, d_mu * w, 0.0), tl.where(present, d_logvar * w, 0.0)
        d_prior_logvar = tl.where(present, d_prior_logvar * w, 0.0)
    if t.d_prior_mu is not None:
        store(t.d_prior_mu, (-d_mu), tile, B)
    if t.d_prior_logvar is not None:
        store(t.d_prior_logvar, d_prior_logvar, tile, B)
    return tl.where(present, term, 0.0), d_mu, d_logvar


@triton.jit
def latent_tiles(pid, grid, samples, args, C: tl.constexpr):
    """The tiles pid, pid + programs, ... of one call; the samples of an element are drawn by the program that owns it."""
    t = args.tensors
    B: tl.constexpr = C.BLOCK
    gain = read(args.gain, B.ACC) * read(args.beta, B.ACC)
    low = read(args.low, B.ACC)
    high = read(args.high, B.ACC)
    chunks = chunks_of(grid.cols, B.BN)
    sum_terms = zeros(B)
    for index in range(pid, tiles_of(grid, B), grid.programs):
        tile = tile_at(index, grid, B)
        mu = load(t.mu, tile, B)
        given = load(t.logvar, tile, B)
        logvar = given
        if C.CLAMP:
            logvar = tl.where(given < low, low, tl.where(given > high, high, given))
        d_mu = zeros(B)
        d_logvar = zeros(B)
        if C.KL:
            term, of_mu, of_logvar = kl_tile(tile, mu, logvar, gain, args, C)
            d_mu += of_mu
            d_logvar += of_logvar
            if C.TERMS == EACH:
                store(t.terms, term, tile, B)
            elif C.TERMS == ROWS:
                tl.store(args.parts + tile.rows.to(tl.int64) * chunks + tile.chunk, tl.sum(term, 1), tile.in_rows)
            elif C.TERMS == TOTAL:
                sum_terms += term
        if C.NOISE != NO_NOISE:
            sigma = exp(0.5 * logvar)
            d_sigma = zeros(B)
            for number in range(samples.number):
                sample = core.to_tensor(number).to(tl.int64)
                noise = noise_at(tile, sample, samples, args, grid.cols, C)
                if t.z is not None:
                    store(t.z, mu + sigma * noise, tile, B, sample * args.steps.z)
                if t.grad_z is not None:
                    grad_z = load(t.grad_z, tile, B, sample * args.steps.grad_z)
                    d_mu += grad_z
                    d_sigma += grad_z * noise
            d_logvar += 0.5 * sigma * d_sigma
        if t.d_mu is not None:
            store(t.d_mu, d_mu, tile, B)
        if t.d_logvar is not None:
            if C.CLAMP:
                d_logvar = tl.where((given < low) | (given > high), 0.0, d_logvar)
            store(t.d_logvar, d_logvar, tile, B)
    if C.TERMS == TOTAL:
        tl.store(args.parts + pid, tl.sum(sum_terms))


@triton.jit(do_not_specialize=["programs", "rows", "r1", "r2", "samples", "elements"])
def latent_kernel(programs, rows, r1, r2, samples, elements, args, C: tl.constexpr):
    """Takes the fields of a `Grid` and of `Samples`, `LatentArgs` and `LatentFlags`."""
    grid = Grid(programs, rows, r1, r2, core.to_tensor(args.cols))
    latent_tiles(tl.program_id(0), grid, Samples(samples, elements), args, C)


# ---- on the host -----------------------------------------------------------------------------------------------------------------


class LatentWanted(NamedTuple):
    """What one pass computes."""

    z: bool = False
    kl: bool = False  # the KL's terms or gradients
    terms: bool = False
    needs: Needs = (False, False, False, False)
    grad_z: Tensor | None = None
    grad_kl: Tensor | None = None  # of the sums; None is 1
    beta: Factor = 1.0  # a factor of the KL's gradients
    out: tuple[Tensor, Tensor] | None = None  # for the gradients of mu and logvar


class LatentPlan(NamedTuple):
    """A launch, what remains to be added up after it, and what it yields."""

    grid: tuple[int, ...]
    samples: tuple[int, int]
    args: LatentArgs
    flags: LatentFlags
    terms: Terms
    z: Tensor | None
    gradients: Gradients

    @property
    def programs(self) -> int:
        return self.grid[0]


class _Layout(NamedTuple):
    """How the tensors of a launch lie, and where the noise comes from."""

    fold: Fold
    tensors: LatentTensors
    operands: LatentTensors
    steps: SampleSteps
    z: Tensor | None  # with all of its samples
    noise: tl.constexpr


def plan_latent(inputs: LatentInputs, spec: Latent, wanted: LatentWanted, acc: torch.dtype) -> LatentPlan:
    """Plan a launch that reads and writes tensors as they lie, or copies if they have no common view."""
    layout = _lay_out(inputs, spec, wanted, acc) or _lay_out(inputs, spec, wanted, acc, dense=True)
    shape, device, view, kl = inputs.mu.shape, inputs.mu.device, layout.fold, spec.kl
    terms, each = Terms(), layout.tensors.terms
    if each is not None:
        terms = Terms(EACH, out=each, factor=kl.scale)
    elif wanted.terms:
        terms = sums(view, shape[: kl.keep], kl.scale, view.programs, functools.partial(torch.empty, dtype=acc, device=device))
    factors = kl.scale, wanted.beta, *((0.0, 0.0) if kl.clamp is None else kl.clamp)
    of = layout.tensors
    return LatentPlan(
        view.grid(view.programs),
        (1 if spec.num_samples is None else spec.num_samples, math.prod(shape)),
        LatentArgs(layout.operands, layout.steps, view.cols, terms.parts, inputs.seed, *(scalar(f, acc, device) for f in factors)),
        LatentFlags(layout.noise.value, wanted.kl, terms.sink.value, kl.clamp is not None, view.block(acc)),
        terms,
        layout.z,
        (of.d_mu, of.d_logvar, of.d_prior_mu, of.d_prior_logvar),
    )


def _lay_out(inputs: LatentInputs, spec: Latent, wanted: LatentWanted, acc: torch.dtype, dense: bool = False) -> _Layout | None:
    """None if a tensor must be copied for a common view; `dense` copies.

    Noise from a seed is numbered by the logical order of the elements, so it needs a view that keeps it: mu and logvar in
    channels_last are copied there.
    """
    shape, samples, seeded = inputs.mu.shape, spec.num_samples, inputs.seed is not None
    *read_from, eps, _ = inputs
    read_from = [expanded(t, shape) for t in (*read_from, trailing(wanted.grad_kl, len(shape)))]
    grad_z = wanted.grad_z
    if dense:
        read_from = [densified(t) for t in read_from]
        eps, grad_z = (None if t is None else t.contiguous() for t in (eps, grad_z))
    gradients = [torch.empty_like(t) if need else None for t, need in zip(read_from[:4], wanted.needs, strict=True)]
    if wanted.out is not None and not dense:
        gradients[:2] = wanted.out
    keeps_all = wanted.terms and 0 < spec.kl.keep == len(shape)
    terms = torch.empty_like(read_from[0], dtype=acc) if keeps_all else None
    z = None
    if wanted.z and (seeded or samples is not None):
        z = inputs.mu.new_empty(shape if samples is None else (samples, *shape))
    elif wanted.z:
        z = torch.empty_like(read_from[0])
    sampled = eps, grad_z, z
    firsts = [t if t is None or samples is None else t[0] for t in sampled]
    steps = SampleSteps(*(0 if t is None or samples is None else t.stride(0) for t in sampled))
    tensors = LatentTensors(*read_from, *gradients, terms, *firsts)

    view = fold(shape, spec.kl.keep, tensors, seeded, tile_size(acc))
    if view is None:
        return None
    noise = NO_NOISE if eps is None else GIVEN
    if seeded:
        starts_aligned = view.rows == 1 or view.cols % 4 == 0
        noise = ALIGNED if starts_aligned and (samples is None or math.prod(shape) % 4 == 0) else UNALIGNED
        if noise is UNALIGNED:
            # A Philox call for each element fills the registers at half the tile.
            view = fold(shape, spec.kl.keep, tensors, True, tile_size(acc) // 2)
    return _Layout(view, tensors, LatentTensors(*view.operands(tensors)), steps, z, noise)


def _launch(planned: LatentPlan, acc: torch.dtype, device: torch.device) -> None:
    launch(latent_kernel, planned.programs, device, *planned.grid, *planned.samples, planned.args, planned.flags)
    finish(acc, planned.terms.segments)


def _forward(inputs: LatentInputs, spec: Latent, needs: Needs) -> tuple[tuple[Tensor | None, Tensor | None], None]:
    want_z = inputs.eps is not None or inputs.seed is not None
    acc = accumulate_dtype(*inputs[: inputs.differentiable])
    planned = plan_latent(inputs, spec, LatentWanted(z=want_z, kl=spec.want_kl, terms=spec.want_kl), acc)
    _launch(planned, acc, inputs.mu.device)
    return (planned.z, planned.terms.result()), None


def _backward(
    inputs: LatentInputs, spec: Latent, grad_outputs: Gradients, needs: Needs, kept: None, out: tuple[Tensor, Tensor] | None = None
) -> Gradients:
    """The gradients of mu and logvar end up in `out`, tensors of any strides, where that is given."""
    acc = accumulate_dtype(*inputs[: inputs.differentiable])
    grad_z, grad_kl = grad_outputs
    if grad_z is None:
        inputs, spec = inputs._replace(eps=None, seed=None), spec._replace(num_samples=None)
    if grad_kl is None:
        inputs, needs = inputs._replace(prior_mu=None, prior_logvar=None, weight=None), (*needs[:2], False, False)
    wanted = LatentWanted(kl=grad_kl is not None, needs=needs, grad_z=grad_z, grad_kl=grad_kl, out=out)
    planned = plan_latent(inputs, spec, wanted, acc)
    _launch(planned, acc, inputs.mu.device)
    if out is not None:
        for buffer, gradient in zip(out, planned.gradients[:2], strict=True):
            if gradient is not buffer:
                buffer.copy_(gradient)
    return planned.gradients


latent = Op(_forward, _backward)
