"""The negative ELBO, nll + beta * kl: Kingma & Welling 2014, equation 10 with one sample.

Its upstream gradient is 1 in normal use. So the forward pass makes the gradients along with the terms, and backward hands them
over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype, has_float16, on_host, widen
from ..specs import Elbo, ElboInputs, Gradients, Latent, Needs, Op
from . import latent, likelihood, walk


def forward(inputs: ElboInputs, spec: Elbo, needs: Needs) -> tuple[tuple[Tensor, ...], Gradients | None]:
    ready = _backward_only_scales(inputs, needs)
    asked = needs if ready else (False,) * 7
    acc, posterior, beta = accumulate_dtype(*inputs[:7]), inputs.latent, spec.beta
    nll, of_nll = likelihood.nll_pass(inputs.nll, spec.likelihood, (*asked[:3], False), spec.likelihood.scale, acc)
    kl, of_kl = latent.kl_pass(posterior, spec.kl, asked[3:], spec.kl.scale * beta, acc)
    loss = widen(nll + beta * kl if isinstance(beta, Tensor) else torch.add(nll, kl, alpha=beta), acc)
    outputs = (loss, widen(nll, acc), widen(kl, acc)) if spec.return_terms else (loss,)
    return outputs, (*of_nll[:3], *walk.rounded(of_kl, posterior)) if ready else None


def backward(inputs: ElboInputs, spec: Elbo, grad_outputs: Gradients, needs: Needs, kept: Gradients | None) -> Gradients:
    grad_output = grad_outputs[0]
    assert grad_output is not None
    if kept is None and _backward_only_scales(inputs, needs):
        kept = forward(inputs, spec, needs)[1]
    if kept is not None:
        return walk.scaled(kept, grad_output)
    return terms_backward(inputs, spec, (grad_output, grad_output * spec.beta), needs, None)


OP = Op(forward, backward)


def _backward_only_scales(inputs: ElboInputs, needs: Needs) -> bool:
    """A float16 gradient written before GradScaler's factor is known, and already divided by the batch, would underflow."""
    return True in needs and on_host(inputs.recon) and not has_float16(inputs[:7])


def terms_forward(inputs: ElboInputs, spec: Elbo, needs: Needs) -> tuple[tuple[Tensor, ...], tuple[Any, Any]]:
    """The two terms by themselves: each keeps for backward what it would keep alone."""
    acc = accumulate_dtype(*inputs[:7])
    (nll,), kept_nll = likelihood.forward(inputs.nll, spec.likelihood, (*needs[:3], False), acc)
    (_, kl), kept_kl = latent.forward(inputs.latent, Latent(spec.kl), needs[3:], acc)
    assert kl is not None
    return (nll, kl), (kept_nll, kept_kl)


def terms_backward(
    inputs: ElboInputs, spec: Elbo, grad_outputs: Gradients, needs: Needs, kept: tuple[Any, Any] | None
) -> Gradients:
    (grad_nll, grad_kl), (kept_nll, kept_kl) = grad_outputs, kept or (None, None)
    acc = accumulate_dtype(*inputs[:7])
    of_nll: Gradients = (None,) * 4
    of_kl: Gradients = (None,) * 4
    if grad_nll is not None and True in needs[:3]:
        of_nll = likelihood.backward(inputs.nll, spec.likelihood, (grad_nll,), (*needs[:3], False), kept_nll, acc)
    if grad_kl is not None and True in needs[3:]:
        of_kl = latent.backward(inputs.latent, Latent(spec.kl), (None, grad_kl), needs[3:], kept_kl, acc=acc)
    return *of_nll[:3], *of_kl


TERMS_OP = Op(terms_forward, terms_backward)
