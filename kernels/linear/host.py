"""The ops across a linear layer: which of the two kernels a call needs, how it is cut into programs, what is left to add up.

What these kernels cannot serve (see `tiles.Limits`) never gets here: `fastelbo.backend` sends it elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastelbo.dtypes import LOG_2PI, has_float16
from fastelbo.specs import (
    KL,
    Factor,
    Gradients,
    LatentInputs,
    Likelihood,
    Linear,
    LinearElbo,
    LinearElboInputs,
    LinearInputs,
    Needs,
    Op,
)

from .. import launch as launch_module
from ..elbo import scale_gradients
from ..gaussian_nll import inverse_variance
from ..latent import ALIGNED, GIVEN, NO_NOISE, UNALIGNED
from ..launch import launch, scalar
from ..reduction import EACH, NOTHING, TOTAL, Segments, finish
from .device import (
    COLUMNS,
    FIXED,
    SCALAR,
    ColumnsFlags,
    ColumnsOut,
    Factors,
    Layer,
    Posterior,
    Rows,
    RowsFactors,
    RowsFlags,
    RowsOut,
    columns_kernel,
    rows_kernel,
)
from .tiles import TILES, Dot, Tile, Tiles, dot_of, products_of, split_walk

_F32 = torch.float32


class Sampled(NamedTuple):
    """What h is sampled from, and the KL that comes with it."""

    latent: LatentInputs  # with dense rows
    needs: Needs  # of mu, logvar, prior_mu, prior_logvar
    kl: KL
    beta: Factor


class Work(NamedTuple):
    """One call, as both kernels are told of it."""

    inputs: LinearInputs  # with dense rows; where h is sampled, it is what the columns want of z, or None
    likelihood: Likelihood
    needs: Needs  # of h, x, weight, bias, variance
    want_terms: bool
    sampled: Sampled | None
    samples: int
    up: Tensor | None  # the upstream gradient of each row of h
    gain: Factor  # or the one of them all
    kind: tl.constexpr  # of the variance
    tiles: Tiles
    dot: Dot
    padded: int  # the width of h, as a power of two


class Terms(NamedTuple):
    """Where `rows_kernel` puts the sums of the terms, and what is left to add up there."""

    sink: tl.constexpr = NOTHING
    nll: Tensor | None = None
    kl: Tensor | None = None
    of_nll: Tensor | None = None  # what the kernel writes: the results themselves, or their parts
    of_kl: Tensor | None = None
    nll_left: Segments | None = None
    kl_left: Segments | None = None


def _work(
    inputs: LinearInputs, spec: Linear, needs: Needs, want_terms: bool, up: Tensor | None, samples: int,
    sampled: Sampled | None = None,
) -> Work:  # fmt: skip
    """`up` is the upstream gradient: one number, one for each row of h, or None for 1."""
    h, x, weight, bias, variance = inputs
    backend = launch_module.backend()
    operands = torch.promote_types((sampled.latent.mu if sampled else h).dtype, weight.dtype)
    products, padded = products_of(operands, spec.precision, backend), max(16, triton.next_power_of_2(weight.shape[1]))
    dense = LinearInputs(
        h if h is None or sampled else _dense_rows(h), _dense_rows(x), _dense_rows(weight),
        bias if bias is None else bias.contiguous(), variance if variance is None else variance.contiguous(),
    )  # fmt: skip
    keep = spec.likelihood.keep
    return Work(
        dense, spec.likelihood, needs, want_terms, sampled, samples, up if keep else None, 1.0 if up is None or keep else up,
        FIXED if variance is None else SCALAR if variance.numel() == 1 else COLUMNS,
        TILES[backend][products][padded], dot_of(products, backend), padded,
    )  # fmt: skip


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _rows(t: Tensor | None) -> Rows | None:
    return None if t is None else Rows(t, t.stride(0))


def _layer(work: Work) -> Layer:
    h, x, weight, bias, variance = work.inputs
    return Layer(_rows(h), _rows(x), _rows(weight), bias, variance, _rows(work.up))


def _factors(work: Work, *factors: Factor) -> list[Any]:
    fixed = inverse_variance(work.likelihood.logvar) if work.inputs.variance is None else 1.0
    return [scalar(f, _F32, work.inputs.x.device) for f in (fixed, work.likelihood.scale, work.gain, *factors)]


# ---- the rows --------------------------------------------------------------------------------------------------------------------


def _terms(work: Work, blocks: int, splits: int) -> Terms:
    """For so many blocks of rows of x and parts of a walk."""
    if not work.want_terms:
        return Terms()
    empty = functools.partial(torch.empty, dtype=_F32, device=work.inputs.x.device)
    samples, batch, keep = work.samples, work.inputs.x.shape[0], work.likelihood.keep
    # A row of x has the terms of all its samples. But rows of an h that is not sampled here are told apart.
    kept, outer = (batch, samples) if work.sampled else (samples * batch, 1)
    nll = empty(kept if keep else ())
    of_nll, nll_left = nll, None
    if not keep or splits * outer > 1:
        of_nll = empty(samples * batch * splits if keep else samples * blocks * splits)
        nll_left = Segments(of_nll, nll, *((outer, kept, splits) if keep else (1, 1, of_nll.numel())))
    kl = of_kl = kl_left = None
    if work.sampled:
        kl = empty(batch if keep else ())
        of_kl = kl if keep else empty(blocks)
        kl_left = None if keep else Segments(of_kl, kl, 1, 1, blocks)
    return Terms(EACH if keep else TOTAL, nll, kl, of_nll, of_kl, nll_left, kl_left)


def _gradients_of_rows(work: Work, splits: int) -> Gradients:
    """Buffers for the gradients of h, mu, logvar, prior_mu and prior_logvar, with a dimension of parts where there are several."""
    h, x, weight, _, _ = work.inputs
    samples, batch, width = work.samples, x.shape[0], weight.shape[1]
    parts = functools.partial(torch.empty, (samples * splits, batch, width), dtype=_F32, device=x.device)
    if work.sampled is None:
        if not work.needs[0]:
            return (None,) * 5
        d_h = torch.empty(h.shape, dtype=h.dtype, device=x.device) if splits == 1 else parts().view(samples, splits, batch, width)
        return d_h, *(None,) * 4
    grads: list[Tensor | None] = [None]
    for i, (t, need) in enumerate(zip(work.sampled.latent[:4], work.sampled.needs, strict=True)):
        # The prior's have no parts: they are of the KL alone.
        whole = samples * splits == 1 or i > 1
        grads.append(None if not need else torch.empty(t.shape, dtype=t.dtype, device=x.device) if whole else parts())
    return tuple(grads)


def _launch_rows(work: Work) -> tuple[Terms, Gradients]:
    """The terms, and the gradients of h, mu, logvar and the prior, which have parts where a walk is split."""
    (batch, _), (cols, width) = work.inputs.x.shape, work.inputs.weight.shape
    tile = work.tiles.sampled if work.sampled else work.tiles.rows
    blocks = -(-batch // tile.own)
    splits, walk = split_walk(work.samples * blocks, -(-cols // tile.step))
    terms, grads = _terms(work, blocks, splits), _gradients_of_rows(work, splits)
    noise, posterior, kl_factors = NO_NOISE, Posterior(*(None,) * 6), (1.0, 1.0)
    if work.sampled:
        latent = work.sampled.latent
        eps = None if latent.eps is None else latent.eps.contiguous()
        noise = GIVEN if eps is not None else ALIGNED if width % 4 == 0 else UNALIGNED
        posterior = Posterior(*(_rows(t) for t in latent[:4]), eps, latent.seed)
        kl_factors = work.sampled.kl.scale, work.sampled.beta
    level = work.likelihood.logvar if work.inputs.variance is None else 0.0
    constant = 0.5 * level + (0.5 * LOG_2PI if work.likelihood.full else 0.0)
    slopes = any(g is not None for g in grads[:3])
    flags = RowsFlags(work.kind.value, terms.sink.value, noise.value, slopes, *work.dot, BM=tile.own, BN=tile.step, HP=work.padded)
    launch(
        rows_kernel, work.samples * blocks * splits, work.inputs.x.device, batch, splits, walk, _layer(work), posterior,
        RowsOut(terms.of_nll, terms.of_kl, *grads), cols, width, RowsFactors(*_factors(work, constant, *kl_factors)), flags,
        tuned=tile.tuned,
    )  # fmt: skip
    return terms, grads


# ---- the columns -----------------------------------------------------------------------------------------------------------------


def _launch_columns(work: Work) -> tuple[Gradients, list[Segments]]:
    """The gradients of x, weight (in parts where a walk is split), bias and variance, and what is left to add up of those two."""
    _, x, weight, bias, variance = work.inputs
    _, need_x, need_weight, need_bias, need_variance = work.needs
    (batch, _), (cols, width) = x.shape, weight.shape
    tile: Tile = work.tiles.columns
    owners = -(-cols // tile.own)
    splits, walk = split_walk(owners, -(-(batch if need_x else work.samples * batch) // tile.step))
    empty = functools.partial(torch.empty, dtype=_F32, device=x.device)
    d_x = d_weight = d_bias = d_variance = of_bias = of_variance = None
    if need_x:
        d_x = empty(x.shape, dtype=x.dtype)
    if need_weight:
        d_weight = empty((splits, cols, width)) if splits > 1 else empty((cols, width), dtype=weight.dtype)
    if need_bias:
        d_bias = empty(bias.shape, dtype=bias.dtype)
        of_bias = Segments(empty((splits, cols)), d_bias, splits, cols, 1) if splits > 1 else None
    if need_variance:
        d_variance = empty(variance.shape, dtype=variance.dtype)
        if work.kind is SCALAR:
            of_variance = Segments(empty(owners * splits), d_variance, 1, 1, owners * splits)
        elif splits > 1:
            of_variance = Segments(empty((splits, cols)), d_variance, splits, cols, 1)
    out = ColumnsOut(d_x, d_weight, *(d if s is None else s.parts for d, s in ((d_bias, of_bias), (d_variance, of_variance))))
    flags = ColumnsFlags(work.kind.value, work.samples > 1, *work.dot, BM=tile.step, BN=tile.own, HP=work.padded)
    launch(
        columns_kernel, owners * splits, x.device, work.samples * batch, batch, splits, walk, _layer(work), out, cols, width,
        Factors(*_factors(work)), flags, tuned=tile.tuned,
    )  # fmt: skip
    return (d_x, d_weight, d_bias, d_variance), [s for s in (of_variance, of_bias) if s is not None]


# ---- both ------------------------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    nll: Tensor | None
    kl: Tensor | None
    loss: Tensor | None  # where h is sampled
    of_rows: Gradients  # of h, mu, logvar, prior_mu, prior_logvar
    of_columns: Gradients  # of x, weight, bias, variance


def _run(work: Work) -> Result:
    terms, of_rows, of_columns, left = Terms(), (None,) * 5, (None,) * 4, []
    if work.needs[0] or work.want_terms or work.sampled:
        terms, of_rows = _launch_rows(work)
    if any(work.needs[1:]):
        of_columns, left = _launch_columns(work)
    beta = work.sampled.beta if work.sampled else 1.0
    loss = None if terms.kl_left is None else torch.empty((), dtype=_F32, device=work.inputs.x.device)
    segments = [s for s in (terms.nll_left, terms.kl_left, *left) if s is not None]
    # One launch adds up three families at most.
    finish(_F32, *segments[:3], loss=loss, beta=beta)
    finish(_F32, *segments[3:])
    if loss is None and terms.kl is not None:
        loss = terms.nll + beta * terms.kl
    own = (work.inputs.h, *(work.sampled.latent[:4] if work.sampled else (None,) * 4))
    of_rows = tuple(_whole(g, t) for g, t in zip(of_rows, own, strict=True))
    d_x, d_weight, d_bias, d_variance = of_columns
    return Result(terms.nll, terms.kl, loss, of_rows, (d_x, _whole(d_weight, work.inputs.weight), d_bias, d_variance))


def _whole(parts: Tensor | None, of: Tensor | None) -> Tensor | None:
    """The sum of a gradient's parts, in the dtype of what it is the gradient of."""
    return parts if parts is None or parts.ndim == 2 else parts.sum(-3).view(-1, parts.shape[-1]).to(of.dtype)


# ---- the ops ---------------------------------------------------------------------------------------------------------------------


def _linear_nll_forward(inputs: LinearInputs, spec: Linear, needs: Needs) -> tuple[tuple[Tensor], Gradients | None]:
    early = spec.likelihood.keep == 0 and any(needs) and not has_float16(inputs)
    samples = inputs.h.shape[0] // inputs.x.shape[0]
    result = _run(_work(inputs, spec, needs if early else (False,) * 5, True, None, samples))
    return (result.nll,), (result.of_rows[0], *result.of_columns) if early else None


def _linear_nll_backward(
    inputs: LinearInputs, spec: Linear, grad_outputs: Gradients, needs: Needs, kept: Gradients | None
) -> Gradients:
    (grad_output,) = grad_outputs
    if kept is not None:
        return scale_gradients(kept, grad_output)
    samples = inputs.h.shape[0] // inputs.x.shape[0]
    result = _run(_work(inputs, spec, needs, False, grad_output, samples))
    return result.of_rows[0], *result.of_columns


def _linear_elbo(
    inputs: LinearElboInputs, spec: LinearElbo, needs: Needs, want_terms: bool, up: Tensor | None
) -> tuple[Result, Gradients]:
    """The result, and all gradients in the order of the inputs."""
    need_x, need_mu, need_logvar, *of_layer, need_prior_mu, need_prior_logvar = needs
    samples, batch = spec.num_samples or 1, inputs.x.shape[0]
    latent = inputs.latent
    latent = latent._replace(**{n: t if t is None else _dense_rows(t) for n, t in zip(latent._fields[:4], latent[:4], strict=True)})
    sampled = Sampled(latent, (need_mu, need_logvar, need_prior_mu, need_prior_logvar), spec.kl, spec.beta)
    z = None
    if need_x or any(of_layer):
        z = torch.empty(samples * batch, inputs.weight.shape[1], dtype=inputs.mu.dtype, device=inputs.x.device)
    if up is not None and spec.linear.likelihood.keep and spec.num_samples is not None:
        up = up.repeat(samples)  # of each row of z
    work = _work(inputs.linear(z), spec.linear, (False, need_x, *of_layer), want_terms, up, samples, sampled)
    result = _run(work)
    (_, d_mu, d_logvar, *d_prior), (d_x, *d_layer) = result.of_rows, result.of_columns
    return result, (d_x, d_mu, d_logvar, *d_layer, *d_prior)


def _linear_elbo_forward(
    inputs: LinearElboInputs, spec: LinearElbo, needs: Needs
) -> tuple[tuple[Tensor | None, ...], Gradients | None]:
    early = spec.linear.likelihood.keep == 0 and any(needs) and not has_float16(inputs[: inputs.differentiable])
    result, grads = _linear_elbo(inputs, spec, needs if early else (False,) * len(needs), True, None)
    outputs = (result.loss, result.nll, result.kl) if spec.return_terms else (result.loss,)
    return outputs, grads if early else None


def _linear_elbo_backward(
    inputs: LinearElboInputs, spec: LinearElbo, grad_outputs: Gradients, needs: Needs, kept: Gradients | None
) -> Gradients:
    grad_loss = grad_outputs[0]
    if kept is not None:
        return scale_gradients(kept, grad_loss)
    return _linear_elbo(inputs, spec, needs, False, grad_loss)[1]


linear_nll = Op(_linear_nll_forward, _linear_nll_backward)
linear_elbo = Op(_linear_elbo_forward, _linear_elbo_backward)
