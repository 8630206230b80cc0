"""Both sides of the ELBO in one launch: the first programs walk recon and x, the others mu and logvar.

`elbo_forward` writes the loss's gradients in the pass that reads the inputs, so a training step moves five elements' worth of
memory per element of x where separate forward and backward passes move eight. A second launch of one program adds the partial
sums up. Backward then only multiplies the gradients by the upstream scalar, and returns at once when that is 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
import triton.language.core as core

from fastelbo.reference import accumulate_dtype

from . import gaussian_nll, reparameterize
from .gaussian_nll import nll_tiles
from .launch import PROGRAMS, TILE, Call, launch
from .reduction import finish
from .reparameterize import latent_tiles


@triton.jit(
    do_not_specialize=[
        "nll_programs",
        "nll_rows",
        "nll_r1",
        "nll_r2",
        "kl_programs",
        "kl_rows",
        "kl_r1",
        "kl_r2",
        "kl_samples",
        "kl_count",
    ]
)
def elbo_kernel(
    nll_programs, nll_rows, nll_r1, nll_r2, nll_tensors, nll_strides, nll_cols, nll_scalars, NLL: tl.constexpr,
    kl_programs, kl_rows, kl_r1, kl_r2, kl_samples, kl_count, kl_tensors, kl_strides, kl_cols, kl_scalars, KL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < nll_programs:
        nll_tiles(pid, nll_programs, nll_rows, nll_r1, nll_r2, nll_tensors, nll_strides, nll_cols, nll_scalars, NLL)
    else:
        latent_tiles(
            pid - nll_programs,
            kl_programs,
            kl_rows,
            kl_r1,
            kl_r2,
            kl_samples,
            kl_count,
            kl_tensors,
            kl_strides,
            kl_cols,
            kl_scalars,
            KL,
        )


def _launch(nll: Call, kl: Call, device: torch.device) -> None:
    launch(elbo_kernel, nll.programs + kl.programs, device, *nll.args, *kl.args)


def elbo_forward(recon, x, var, mu, logvar, prior_mu, prior_logvar, weight, full, clamp, nll_scale, kl_scale, beta, needs):
    acc = accumulate_dtype(recon, x, var, mu, logvar, prior_mu, prior_logvar)
    nll = gaussian_nll.plan(recon, x, var, weight, "logvar", full, 0.0, 0, nll_scale, None, nll_scale, needs[:3], True, acc)
    kl = reparameterize.plan(
        mu, logvar, prior_mu, prior_logvar, None, clamp, 0, kl_scale, None, kl_scale, None, None, None, None, needs[3:],
        False, True, True, acc, beta=beta,
    )  # fmt: skip
    _launch(nll, kl, recon.device)
    loss = torch.empty((), dtype=acc, device=recon.device)
    finish(acc, a=nll.terms, b=kl.terms, v=nll.var, loss=loss, beta=beta)
    return loss, nll.out, kl.out, (*nll.gradients(var), *kl.grads)


def elbo_terms_forward(recon, x, var, mu, logvar, prior_mu, prior_logvar, weight, full, clamp, keep, nll_scale, kl_scale, needs):
    acc = accumulate_dtype(recon, x, var, mu, logvar, prior_mu, prior_logvar)
    nll = gaussian_nll.plan(recon, x, var, weight, "logvar", full, 0.0, keep, nll_scale, None, 1.0, (False,) * 3, True, acc)
    kl = reparameterize.plan(
        mu, logvar, prior_mu, prior_logvar, None, clamp, keep, kl_scale, None, 1.0, None, None, None, None, (False,) * 4,
        False, True, True, acc,
    )  # fmt: skip
    _launch(nll, kl, recon.device)
    finish(acc, a=nll.terms, b=kl.terms)
    return nll.out, kl.out, None


def elbo_terms_backward(
    recon, x, var, mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, nll_scale, kl_scale, grad_nll, grad_kl, needs
):
    acc = accumulate_dtype(recon, x, var, mu, logvar, prior_mu, prior_logvar)
    of_nll, of_kl = grad_nll is not None and any(needs[:3]), grad_kl is not None and any(needs[3:])
    nll = kl = None
    if of_nll:
        nll = gaussian_nll.plan(recon, x, var, weight, "logvar", False, 0.0, keep, 1.0, grad_nll, nll_scale, needs[:3], False, acc)
    if of_kl:
        kl = reparameterize.plan(
            mu, logvar, prior_mu, prior_logvar, None, clamp, keep, 1.0, grad_kl, kl_scale, None, None, None, None, needs[3:],
            False, True, False, acc,
        )  # fmt: skip
    if of_nll and of_kl:
        _launch(nll, kl, recon.device)
    elif of_nll:
        launch(gaussian_nll.nll_kernel, nll.programs, recon.device, *nll.args)
    elif of_kl:
        launch(reparameterize.latent_kernel, kl.programs, recon.device, *kl.args)
    if of_nll:
        finish(nll.acc, v=nll.var)
    return (*(nll.gradients(var) if of_nll else (None,) * 3), *(kl.grads if of_kl else (None,) * 4))


@triton.jit
def _scale(grad, count, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    whole = count // BLOCK
    for block in range(tl.program_id(0), whole, tl.num_programs(0)):
        here = grad + core.to_tensor(block).to(tl.int64) * BLOCK + at
        tl.store(here, (tl.load(here).to(factor.dtype) * factor).to(grad.dtype.element_ty))
    if tl.program_id(0) == whole % tl.num_programs(0):
        here = grad + core.to_tensor(whole).to(tl.int64) * BLOCK + at
        live = at < count - whole * BLOCK
        tl.store(here, (tl.load(here, live, other=0.0).to(factor.dtype) * factor).to(grad.dtype.element_ty), live)


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "n4", "n5", "n6"])
def scale_kernel(g0, g1, g2, g3, g4, g5, g6, n0, n1, n2, n3, n4, n5, n6, grad, BLOCK: tl.constexpr):
    """Multiply dense buffers by a scalar, unless it is 1."""
    factor = tl.load(grad)
    if factor != 1.0:
        if g0 is not None:
            _scale(g0, n0, factor, BLOCK)
        if g1 is not None:
            _scale(g1, n1, factor, BLOCK)
        if g2 is not None:
            _scale(g2, n2, factor, BLOCK)
        if g3 is not None:
            _scale(g3, n3, factor, BLOCK)
        if g4 is not None:
            _scale(g4, n4, factor, BLOCK)
        if g5 is not None:
            _scale(g5, n5, factor, BLOCK)
        if g6 is not None:
            _scale(g6, n6, factor, BLOCK)


def scale_gradients(grads, grad):
    """Multiply gradients that nobody has seen yet by the upstream scalar, in place and without reading it on the host."""
    given = [g for g in grads if g is not None]
    for start in range(0, len(given), 7):
        some = given[start : start + 7]
        counts = [g.numel() for g in some]
        programs = min(PROGRAMS, max(1, -(-max(counts) // TILE)))
        rest = 7 - len(some)
        launch(scale_kernel, programs, grad.device, *some, *(None,) * rest, *counts, *(0,) * rest, grad, TILE)
    return grads
