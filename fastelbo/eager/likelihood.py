"""The negative log-likelihood of an observation, of one family or another: what has no formula in it.

Each family has a file with its tile: terms, their sums and the gradients of a run of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype, on_host, widen
from ..specs import COUNTS, Factor, Gradients, Likelihood, Needs, NLLInputs, Op
from . import bernoulli_nll, counts, discretized_logistic_nll, gaussian_nll, laplace_nll
from . import walk as w

TILES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "gaussian": gaussian_nll.tile,
    "laplace": laplace_nll.tile,
    "bernoulli": bernoulli_nll.tile,
    "discretized_logistic": discretized_logistic_nll.tile,
    **counts.TILES,
}


def forward(
    inputs: NLLInputs, spec: Likelihood, needs: Needs, acc: torch.dtype | None = None
) -> tuple[tuple[Tensor], Gradients | None]:
    """The gradients are made along with the terms, for an upstream gradient of 1, where backward can scale them as they are."""
    acc = acc or accumulate_dtype(*inputs[:4])
    each = _of_each_element(inputs, needs, spec)
    ready = _backward_only_scales(each, needs, spec.keep, acc)
    nll, gradients = nll_pass(each, spec, needs if ready else (False,) * 4, spec.scale, acc)
    return (widen(nll, acc),), gradients if ready else None


def backward(
    inputs: NLLInputs, spec: Likelihood, grad_outputs: Gradients, needs: Needs, kept: Gradients | None,
    acc: torch.dtype | None = None,
) -> Gradients:  # fmt: skip
    (grad_output,) = grad_outputs
    assert grad_output is not None
    acc = acc or accumulate_dtype(*inputs[:4])
    if kept is None and _backward_only_scales(inputs, needs, spec.keep, acc):
        kept = nll_pass(inputs, spec, needs, spec.scale, acc, want_terms=False)[1]
    if kept is not None:
        d_recon, d_x, d_variance, d_zi_logits = w.scaled(kept, grad_output)
        if d_variance is not None and inputs.variance is not None:
            d_variance = d_variance.sum_to_size(inputs.variance.shape)
        return d_recon, d_x, d_variance, d_zi_logits
    rate = w.against(w.times(widen(grad_output, acc), spec.scale), inputs.recon.ndim, spec.keep)
    return nll_pass(inputs, spec, needs, rate, acc, want_terms=False)[1]


OP = Op(forward, backward)


def _of_each_element(inputs: NLLInputs, needs: Needs, spec: Likelihood) -> NLLInputs:
    """Where rows have upstream gradients, theta's is summed after them: counts cost more to compute twice than slopes to keep."""
    if inputs.variance is None or not (needs[2] and spec.keep and spec.family in COUNTS):
        return inputs
    return inputs._replace(variance=inputs.variance.expand(inputs.recon.shape))


def _backward_only_scales(inputs: NLLInputs, needs: Needs, keep: int, acc: torch.dtype) -> bool:
    """Whether gradients for an upstream gradient of 1 need no more than its factor, one for all or for each row.

    Gradients in half precision would be rounded twice, and those of inputs that broadcast hold a sum over rows.
    """
    shape = inputs.recon.shape
    if True not in needs or keep == len(shape) or not on_host(inputs.recon):
        return False
    asked = [t for t, need in zip(inputs, needs, strict=False) if need and t is not None]
    return not any(t.dtype != acc or (keep and t.shape != shape) for t in asked)


def nll_pass(
    inputs: NLLInputs, spec: Likelihood, needs: Needs, rate: Factor, acc: torch.dtype, want_terms: bool = True
) -> tuple[Any, Gradients]:
    """The scaled sums of the terms, and `rate` times the gradients that are needed."""
    recon, x, variance, zi_logits, weight = inputs
    rate = w.rate_of_some(rate, spec.scale)
    shape, ndim, sums = recon.shape, recon.ndim, recon.shape[: spec.keep] if want_terms else None
    likes = recon if needs[0] else None, x if needs[1] else None
    wider = sum(t.dtype != acc for t in (recon, x))
    if weight is None and gaussian_nll.is_of_one_variance(inputs, spec):
        level = gaussian_nll.level(inputs, spec, acc)
        tile = partial(gaussian_nll.tile_of_one_variance, spec, acc, want_terms, needs[2])
        sums_of, temporaries = (sums, () if needs[2] else None), wider + (not (needs[0] or needs[1]))
        (nll, d_variance), gradients = w.walk(tile, (recon, x, level, rate), likes, sums_of, acc, temporaries)
    else:
        given = torch.full((1,) * ndim, spec.logvar, dtype=acc, device=recon.device) if variance is None else variance
        given = w.against(given if given.ndim else given.view((1,) * ndim), ndim)
        whole = needs[2] and given.shape == shape
        each, shared = [recon, x, given, w.against(weight, ndim), rate], given.shape if needs[2] and not whole else None
        memory = [*likes, given if whole else None]
        if zi_logits is not None:
            each.append(zi_logits)
            memory.append(recon if needs[3] else None)
        tile = partial(TILES[spec.family], spec, acc, want_terms, needs[2])
        # For sums, the residual and its ratio, what is widened, and what weights and other parameters need.
        temporaries = 1 + wider + (not needs[0]) + (not whole) + (given.dtype != acc)
        temporaries += 3 * (weight is not None) + 2 * (spec.parameter != "logvar")
        temporaries += 6 * (spec.family == "discretized_logistic")  # both edges of a bin, and what is made of each
        found, gradients = w.walk(tile, each, memory, (sums, shared), acc, temporaries)
        nll, d_variance = found[0], gradients[2] if whole else found[1]
    if needs[2] and variance is not None:
        d_variance = d_variance.reshape(variance.shape)
    d_zi_logits = None if zi_logits is None else gradients[3]
    return nll, w.rounded((*gradients[:2], d_variance, d_zi_logits), inputs)
