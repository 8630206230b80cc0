"""Both sides of the ELBO in one launch: the first programs walk recon and x, the others mu and logvar.

The forward of `elbo` writes the loss's gradients in the pass that reads the inputs. So a training step moves five elements' worth
of memory per element of x, where separate forward and backward passes move eight. A second launch of one program adds the partial
sums up. Backward then only multiplies the gradients by the upstream scalar, and returns at once if that is 1.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
import triton.language.core as core
from torch import Tensor

from fastelbo.dtypes import accumulate_dtype
from fastelbo.specs import Elbo, ElboInputs, Gradients, Latent, Needs

from .latent import LatentWanted, latent_tiles, plan_latent
from .launch import launch, made
from .likelihood import nll_gradients, nll_tiles, plan_nll
from .op import op_of
from .reduction import finish, nothing
from .tile import Grid


def _run(
    inputs: ElboInputs, spec: Elbo, needs: Needs, grads: Gradients | None, is_loss: bool
) -> tuple[tuple[Tensor | None, ...], Gradients]:
    """A forward pass launches both sides, a backward pass those that have an upstream gradient and owe one."""
    acc, device = accumulate_dtype(*inputs[:7]), inputs.recon.device
    of_nll, of_kl = (*needs[:3], False), needs[3:]
    grad_nll, grad_kl = (None, None) if grads is None else (grads[0], grads[0]) if is_loss else grads
    if grads is None or (grad_nll is not None and any(of_nll)):
        nll = plan_nll(inputs.nll, spec.likelihood, of_nll, None if grads is None else (grad_nll,), acc)
    else:
        nll = nothing(of_nll)
    if grads is None or (grad_kl is not None and any(of_kl)):
        beta = spec.beta if is_loss else 1.0
        wanted = LatentWanted(of_kl, None if grads is None else (None, grad_kl), beta)
        kl = plan_latent(inputs.latent, Latent(spec.kl), wanted, acc)
    else:
        kl = nothing(of_kl)
    if nll.programs and kl.programs:
        args = *nll.sizes, *kl.sizes[:4], nll.args, kl.args, nll.flags, kl.flags
        launch(elbo_kernel, nll.programs + kl.programs, device, args)
    else:
        nll.launch(device)
        kl.launch(device)
    loss = made((torch.Size(), (), acc), device) if is_loss and grads is None else None
    finish(acc, nll.terms, kl.terms, nll.of_variance, loss=loss, beta=spec.beta)
    terms = nll.terms.result(), kl.terms.result()
    outputs = terms if not is_loss else (loss, *terms) if spec.return_terms else (loss,)
    return outputs, (*nll_gradients(nll, inputs.variance)[:3], *kl.gradients)


elbo = op_of(partial(_run, is_loss=True), early=lambda spec: True)
elbo_terms = op_of(partial(_run, is_loss=False))


@triton.jit(do_not_specialize=["nll_programs", "nll_rows", "nll_r1", "nll_r2", "kl_programs", "kl_rows", "kl_r1", "kl_r2"])
def elbo_kernel(
    nll_programs, nll_rows, nll_r1, nll_r2, kl_programs, kl_rows, kl_r1, kl_r2, nll, kl, NLL: tl.constexpr, KL: tl.constexpr
):  # fmt: skip
    """Takes the fields of two `Grid`s, `NLLArgs`, `LatentArgs`, `NLLFlags` and `LatentFlags`."""
    pid = tl.program_id(0)
    if pid < nll_programs:
        nll_tiles(pid, Grid(nll_programs, nll_rows, nll_r1, nll_r2, core.to_tensor(nll.cols)), nll, NLL)
    else:
        grid = Grid(kl_programs, kl_rows, kl_r1, kl_r2, core.to_tensor(kl.cols))
        latent_tiles(pid - nll_programs, grid, None, None, kl, KL)
