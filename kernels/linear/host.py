"""The ops across a linear layer: which of the two kernels a call needs, how it is cut into programs, what is left to add up.

What these kernels cannot serve (see `tiles.Limits`) never gets here: `fastelbo.backend` sends it elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastelbo.specs import KL, Gradients, LatentInputs, Linear, LinearElbo, LinearElboInputs, LinearInputs, Needs

from .. import launch as launch_module
from ..latent import ALIGNED, GIVEN, NO_NOISE, UNALIGNED
from ..launch import launch, scalars
from ..likelihood import inverse_and_constant
from ..op import op_of
from ..reduction import EACH, FAMILIES, TOTAL, Sums, finish, partial
from ..tile import Operand
from .device import COLUMNS, FIXED, SCALAR, ColumnsOut, Factors, Flags, Layer, Posterior, RowsOut, columns_kernel, rows_kernel
from .tiles import TILES, Tiles, dot_of, products_of, split_walk

_F32 = torch.float32
_NO_LATENT = LatentInputs(None, None)

Outputs = tuple[Tensor | None, ...]


def _run_nll(inputs: LinearInputs, spec: Linear, needs: Needs, grads: Gradients | None) -> tuple[Outputs, Gradients]:
    work = _work(inputs, LinearElbo(spec, KL(), inputs.h.shape[0] // inputs.x.shape[0]), needs, grads)
    (_, nll, _), of_rows, of_columns = _run(work)
    return (nll,), (of_rows[0], *of_columns)


def _run_elbo(inputs: LinearElboInputs, spec: LinearElbo, needs: Needs, grads: Gradients | None) -> tuple[Outputs, Gradients]:
    need_x, need_mu, need_logvar, *of_layer, need_prior_mu, need_prior_logvar = needs
    z = None
    if need_x or any(of_layer):
        rows = (spec.num_samples or 1) * inputs.x.shape[0]
        z = torch.empty(rows, inputs.weight.shape[1], dtype=inputs.mu.dtype, device=inputs.x.device)
    if grads is not None and spec.linear.likelihood.keep and spec.num_samples is not None:
        grads = (grads[0].repeat(spec.num_samples),)  # of each row of z
    of_latent = need_mu, need_logvar, need_prior_mu, need_prior_logvar
    work = _work(inputs.linear(z), spec, (False, need_x, *of_layer), grads, inputs.latent, of_latent)
    outputs, (_, d_mu, d_logvar, *d_prior), (d_x, *d_layer) = _run(work)
    return outputs if spec.return_terms else outputs[:1], (d_x, d_mu, d_logvar, *d_layer, *d_prior)


linear_nll = op_of(_run_nll, early=lambda spec: spec.likelihood.keep == 0)
linear_elbo = op_of(_run_elbo, early=lambda spec: spec.linear.likelihood.keep == 0)


class Work(NamedTuple):
    """One call, as both kernels are told of it."""

    inputs: LinearInputs  # with dense rows; where h is sampled, it is what the columns want of z, or None
    spec: LinearElbo
    needs: Needs  # of h, x, weight, bias, variance
    wants_terms: bool
    latent: LatentInputs  # with dense rows: what h is sampled from
    of_latent: Needs  # of mu, logvar, prior_mu, prior_logvar
    samples: int
    layer: Layer
    factors: Factors
    flags: Flags  # those of both kernels
    tiles: Tiles

    @property
    def is_sampled(self) -> bool:
        return self.latent.mu is not None


def _work(
    inputs: LinearInputs, spec: LinearElbo, needs: Needs, grads: Gradients | None, latent: LatentInputs = _NO_LATENT,
    of_latent: Needs = (False,) * 4,
) -> Work:  # fmt: skip
    """The upstream gradient is one number, or one for each row of h."""
    h, x, weight, bias, variance = inputs = LinearInputs(*map(_dense_rows, inputs))
    likelihood, up = spec.linear.likelihood, None if grads is None else grads[0]
    of_row, gain = (up, 1.0) if likelihood.keep else (None, 1.0 if up is None else up)
    factors = *inverse_and_constant(likelihood, variance), likelihood.scale, gain, spec.kl.scale, spec.beta
    inverse, constant, scale, gain, kl_scale, beta = scalars(factors, _F32, x.device)
    backend, padded = launch_module.backend(), max(16, triton.next_power_of_2(weight.shape[1]))
    operands = torch.promote_types((h if latent.mu is None else latent.mu).dtype, weight.dtype)
    products = products_of(operands, spec.linear.precision, backend)
    kind = FIXED if variance is None else SCALAR if variance.numel() == 1 else COLUMNS
    eps = None if latent.eps is None else latent.eps.contiguous()
    return Work(
        inputs, spec, needs, grads is None, LatentInputs(*map(_dense_rows, latent[:4]), None, eps, latent.seed), of_latent,
        spec.num_samples or 1,
        Layer(_rows(h), _rows(x), _rows(weight), bias, variance, _rows(of_row)),
        Factors(inverse, scale, gain, constant, kl_scale, beta),
        Flags(kind.value, *dot_of(products, backend), HP=padded),
        TILES[backend][products][padded],
    )  # fmt: skip


def _dense_rows(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.ndim == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _rows(t: Tensor | None) -> Operand | None:
    return None if t is None else Operand(t, (t.stride(0),))


def _run(work: Work) -> tuple[Outputs, Gradients, Gradients]:
    """(loss, nll, kl), and gradients: of h, mu, logvar, prior_mu, prior_logvar; and of x, weight, bias, variance."""
    nll = kl = Sums()
    of_rows, of_columns, left = (None,) * 5, (None,) * 4, []
    if work.needs[0] or work.wants_terms or work.is_sampled:
        nll, kl, of_rows = _launch_rows(work)
    if any(work.needs[1:]):
        of_columns, left = _launch_columns(work)
    left = [s for s in (nll, kl, *left) if s.is_partial]
    loss = torch.empty((), dtype=_F32, device=work.inputs.x.device) if kl.is_partial else None
    finish(_F32, *left[:FAMILIES], loss=loss, beta=work.spec.beta)
    finish(_F32, *left[FAMILIES:])
    if loss is None and kl.out is not None:
        loss = nll.out + work.spec.beta * kl.out
    own = work.inputs.h, *work.latent[:4]
    of_rows = tuple(_whole(g, t) for g, t in zip(of_rows, own, strict=True))
    d_x, d_weight, d_bias, d_variance = of_columns
    return (loss, nll.out, kl.out), of_rows, (d_x, _whole(d_weight, work.inputs.weight), d_bias, d_variance)


def _whole(parts: Tensor | None, of: Tensor | None) -> Tensor | None:
    """The sum of a gradient's parts, in the dtype of what it is the gradient of."""
    return parts if parts is None or parts.ndim == 2 else parts.sum(-3).view(-1, parts.shape[-1]).to(of.dtype)


def _launch_rows(work: Work) -> tuple[Sums, Sums, Gradients]:
    """The sums of the terms and of the KL; the gradients of h, mu, logvar and the prior, which have parts where a walk is split."""
    (batch, cols), width, samples = work.inputs.x.shape, work.inputs.weight.shape[1], work.samples
    tile = work.tiles.sampled if work.is_sampled else work.tiles.rows
    blocks = -(-batch // tile.own)
    splits, walk = split_walk(samples * blocks, -(-cols // tile.step))
    nll = kl = Sums()
    if work.wants_terms and work.is_sampled:
        # A row of x has the terms of all its samples. But rows of an h that is not sampled here are told apart.
        nll, kl = _sums(work, samples, batch, splits, blocks * samples * splits), _sums(work, 1, batch, 1, blocks)
    elif work.wants_terms:
        nll = _sums(work, 1, samples * batch, splits, blocks * samples * splits)
    # A sample or a split of a walk has a part of each gradient, except the prior's, which are of the KL alone.
    gradients = [
        _gradient(t, need, batch, 1 if i > 2 else samples * splits)
        for i, (t, need) in enumerate(zip((work.inputs.h, *work.latent[:4]), (work.needs[0], *work.of_latent), strict=True))
    ]
    mu, logvar, prior_mu, prior_logvar, _, eps, seed = work.latent
    noise = NO_NOISE if mu is None else GIVEN if eps is not None else ALIGNED if width % 4 == 0 else UNALIGNED
    flags = work.flags._replace(
        BM=tile.own, BN=tile.step, TERMS=nll.sink.value, NOISE=noise.value, SLOPES=any(g is not None for g in gradients[:3])
    )
    args = (
        batch, splits, walk, work.layer, Posterior(_rows(mu), _rows(logvar), _rows(prior_mu), _rows(prior_logvar), eps, seed),
        RowsOut(nll.parts, kl.parts, *gradients), cols, width, work.factors, flags,
    )  # fmt: skip
    launch(rows_kernel, samples * blocks * splits, work.inputs.x.device, args, tile.tuned)
    return nll, kl, tuple(gradients)


def _sums(work: Work, outer: int, kept: int, inner: int, programs: int) -> Sums:
    """For a term of each kept row, which has (outer, inner) parts, or a total, of which each program has one."""
    keep = work.spec.linear.likelihood.keep
    out = torch.empty(kept if keep else (), dtype=_F32, device=work.inputs.x.device)
    if not keep:
        return partial(TOTAL, out, 1, 1, programs, _F32)
    return Sums(EACH, out, out) if outer * inner == 1 else partial(EACH, out, outer, kept, inner, _F32)


def _gradient(t: Tensor | None, need: bool, rows: int, parts: int) -> Tensor | None:
    """A buffer for the gradient of t, with `parts` for each of `rows`; those of the same row of t are still to be added up."""
    if not need:
        return None
    if parts * rows == t.shape[0]:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)
    return torch.empty((t.shape[0] // rows, parts * rows // t.shape[0], rows, t.shape[1]), dtype=_F32, device=t.device)


def _launch_columns(work: Work) -> tuple[Gradients, list[Sums]]:
    """The gradients of x, weight (in parts where a walk is split), bias and variance, and how the last two are summed."""
    _, x, weight, bias, variance = work.inputs
    _, need_x, need_weight, need_bias, need_variance = work.needs
    (batch, cols), width, rows, tile = x.shape, weight.shape[1], work.samples * x.shape[0], work.tiles.columns
    owners = -(-cols // tile.own)
    splits, walk = split_walk(owners, -(-(batch if need_x else rows) // tile.step))

    def sums(of: Tensor, is_needed: bool, is_total: bool = False) -> Sums:
        if not is_needed:
            return Sums()
        out = torch.empty(of.shape, dtype=of.dtype, device=x.device)
        if is_total:
            return partial(TOTAL, out, 1, 1, owners * splits, _F32)
        return partial(EACH, out, splits, cols, 1, _F32) if splits > 1 else Sums(EACH, out, out)

    d_x, d_weight = _gradient(x, need_x, batch, 1), _gradient(weight, need_weight, cols, splits)
    of_bias, of_variance = sums(bias, need_bias), sums(variance, need_variance, variance is not None and variance.numel() == 1)
    args = (
        rows, batch, splits, walk, work.layer, ColumnsOut(d_x, d_weight, of_bias.parts, of_variance.parts), cols, width,
        Factors(*work.factors[:3]), work.flags._replace(BM=tile.step, BN=tile.own, SHARED=work.samples > 1),
    )  # fmt: skip
    launch(columns_kernel, owners * splits, x.device, args, tile.tuned)
    return (d_x, d_weight, of_bias.out, of_variance.out), [of_variance, of_bias]
