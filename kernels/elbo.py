"""Both sides of the ELBO in one launch: the first programs walk recon and x, the others mu and logvar.

The forward of `elbo` writes the loss's gradients in the pass that reads the inputs. So a training step moves five elements' worth
of memory per element of x, where separate forward and backward passes move eight. A second launch of one program adds the partial
sums up. Backward then only multiplies the gradients by the upstream scalar, and returns at once if that is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

from fastelbo.dtypes import accumulate_dtype, has_float16
from fastelbo.specs import Elbo, ElboInputs, Factor, Gradients, Latent, Needs, Op

from .gaussian_nll import NLLPlan, NLLWanted, nll_kernel, nll_tiles, plan_nll
from .latent import LatentPlan, LatentWanted, latent_kernel, latent_tiles, plan_latent
from .launch import PROGRAMS, TILE, Grid, launch
from .reduction import finish

_OF_NLL = 3  # the differentiable inputs of the likelihood come first; the others are of the KL
_NOTHING: Needs = (False,) * 7


# ---- on the device ---------------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["nll_programs", "nll_rows", "nll_r1", "nll_r2", "kl_programs", "kl_rows", "kl_r1", "kl_r2"]
)  # fmt: skip
def elbo_kernel(
    nll_programs, nll_rows, nll_r1, nll_r2, kl_programs, kl_rows, kl_r1, kl_r2, nll, kl, NLL: tl.constexpr, KL: tl.constexpr
):  # fmt: skip
    """Takes the fields of two `Grid`s, `NLLArgs`, `LatentArgs`, `NLLFlags` and `LatentFlags`."""
    pid = tl.program_id(0)
    if pid < nll_programs:
        nll_tiles(pid, Grid(nll_programs, nll_rows, nll_r1, nll_r2, core.to_tensor(nll.cols)), nll, NLL)
    else:
        grid = Grid(kl_programs, kl_rows, kl_r1, kl_r2, core.to_tensor(kl.cols))
        latent_tiles(pid - nll_programs, grid, None, kl, KL)


@triton.jit
def _scale(gradient, count, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    whole = count // BLOCK
    for block in range(tl.program_id(0), whole, tl.num_programs(0)):
        here = gradient + core.to_tensor(block).to(tl.int64) * BLOCK + at
        tl.store(here, (tl.load(here).to(factor.dtype) * factor).to(gradient.dtype.element_ty))
    if tl.program_id(0) == whole % tl.num_programs(0):
        here = gradient + core.to_tensor(whole).to(tl.int64) * BLOCK + at
        mask = at < count - whole * BLOCK
        tl.store(here, (tl.load(here, mask, other=0.0).to(factor.dtype) * factor).to(gradient.dtype.element_ty), mask)


# Buffers that one launch scales, at most: the gradients of an ELBO.
_SCALED = 7


@triton.jit(do_not_specialize=[f"n{i}" for i in range(_SCALED)])
def scale_kernel(gradients, n0, n1, n2, n3, n4, n5, n6, grad_output, BLOCK: tl.constexpr):
    """Multiply dense buffers of n0, n1, ... elements by a scalar, unless it is 1."""
    factor = tl.load(grad_output)
    counts = (n0, n1, n2, n3, n4, n5, n6)
    if factor != 1.0:
        for i in tl.static_range(len(gradients)):
            _scale(gradients[i], counts[i], factor, BLOCK)


# ---- on the host -----------------------------------------------------------------------------------------------------------------


def scale_gradients(gradients: Sequence[Tensor | None], grad_output: Tensor) -> Gradients:
    """Multiply gradients that nobody has seen yet by the upstream scalar, in place and without reading it on the host."""
    given = [g for g in gradients if g is not None]
    for start in range(0, len(given), _SCALED):
        some = given[start : start + _SCALED]
        counts = [g.numel() for g in some]
        programs = min(PROGRAMS, max(1, -(-max(counts) // TILE)))
        unused = (0,) * (_SCALED - len(some))
        launch(scale_kernel, programs, grad_output.device, tuple(some), *counts, *unused, grad_output, TILE)
    return tuple(gradients)


def _launch(nll: NLLPlan, kl: LatentPlan, device: torch.device) -> None:
    launch(elbo_kernel, nll.programs + kl.programs, device, *nll.grid, *kl.grid, nll.args, kl.args, nll.flags, kl.flags)


def _run_both(inputs: ElboInputs, spec: Elbo, needs: Needs, acc: torch.dtype) -> tuple[NLLPlan, LatentPlan]:
    """Launch both sides: the terms, and the gradients that the loss has for an upstream gradient of 1."""
    nll = plan_nll(inputs.nll, spec.likelihood, NLLWanted(True, needs[:_OF_NLL]), acc)
    wanted = LatentWanted(kl=True, terms=True, needs=needs[_OF_NLL:], beta=spec.beta)
    kl = plan_latent(inputs.latent, Latent(spec.kl), wanted, acc)
    _launch(nll, kl, inputs.recon.device)
    return nll, kl


def _forward(inputs: ElboInputs, spec: Elbo, needs: Needs) -> tuple[tuple[Tensor, ...], Gradients | None]:
    differentiable = inputs[: inputs.differentiable]
    acc = accumulate_dtype(*differentiable)
    # A float16 gradient written before GradScaler's factor is known, and already divided by the batch, would underflow.
    early = any(needs) and not has_float16(differentiable)
    nll, kl = _run_both(inputs, spec, needs if early else _NOTHING, acc)
    loss = torch.empty((), dtype=acc, device=inputs.recon.device)
    finish(acc, nll.terms.segments, kl.terms.segments, nll.variance_segments, loss=loss, beta=spec.beta)
    outputs = (loss, nll.terms.out, kl.terms.out) if spec.return_terms else (loss,)
    return outputs, (*nll.finished_gradients(inputs.variance), *kl.gradients) if early else None


def _backward(inputs: ElboInputs, spec: Elbo, grad_outputs: Gradients, needs: Needs, kept: Gradients | None) -> Gradients:
    grad_loss = grad_outputs[0]
    if kept is not None:
        return scale_gradients(kept, grad_loss)
    return _backward_of_terms(inputs, spec, (grad_loss, grad_loss), needs, spec.beta)


def _terms_forward(inputs: ElboInputs, spec: Elbo, needs: Needs) -> tuple[tuple[Tensor, Tensor], None]:
    acc = accumulate_dtype(*inputs[: inputs.differentiable])
    nll, kl = _run_both(inputs, spec, _NOTHING, acc)
    finish(acc, nll.terms.segments, kl.terms.segments)
    return (nll.terms.result(), kl.terms.result()), None


def _terms_backward(inputs: ElboInputs, spec: Elbo, grad_outputs: Gradients, needs: Needs, kept: None) -> Gradients:
    return _backward_of_terms(inputs, spec, grad_outputs, needs)


def _backward_of_terms(inputs: ElboInputs, spec: Elbo, grad_outputs: Gradients, needs: Needs, beta: Factor = 1.0) -> Gradients:
    """Gradients from the inputs, for an upstream gradient of each term."""
    acc, device = accumulate_dtype(*inputs[: inputs.differentiable]), inputs.recon.device
    grad_nll, grad_kl = grad_outputs
    nll = kl = None
    if grad_nll is not None and any(needs[:_OF_NLL]):
        nll = plan_nll(inputs.nll, spec.likelihood, NLLWanted(False, needs[:_OF_NLL], grad_nll), acc)
    if grad_kl is not None and any(needs[_OF_NLL:]):
        wanted = LatentWanted(kl=True, needs=needs[_OF_NLL:], grad_kl=grad_kl, beta=beta)
        kl = plan_latent(inputs.latent, Latent(spec.kl), wanted, acc)
    if nll is not None and kl is not None:
        _launch(nll, kl, device)
    elif nll is not None:
        launch(nll_kernel, nll.programs, device, *nll.grid, nll.args, nll.flags)
    elif kl is not None:
        launch(latent_kernel, kl.programs, device, *kl.grid, *kl.samples, kl.args, kl.flags)
    of_nll: Gradients = (None,) * _OF_NLL
    if nll is not None:
        finish(acc, nll.variance_segments)
        of_nll = nll.finished_gradients(inputs.variance)
    return *of_nll, *((None,) * len(needs[_OF_NLL:]) if kl is None else kl.gradients)


elbo = Op(_forward, _backward)
elbo_terms = Op(_terms_forward, _terms_backward)
