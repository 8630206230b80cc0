"""-log N(x; recon, variance): Kingma & Welling 2014, appendix C.2.

With the residual d = recon - x, an element's term and slopes are

    term          1/2 (d^2 / variance + log variance + log 2 pi)
    in recon      d / variance                in x    -d / variance
    in logvar     1/2 (1 - d^2 / variance)    in std  1/std (1 - d^2 / variance)    in var  1/2 / variance (1 - d^2 / variance)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import LOG_2PI, accumulate_dtype, on_host
from ..specs import Factor, Gradients, Likelihood, Needs, NLLInputs, Op
from . import walk as w


def forward(
    inputs: NLLInputs, spec: Likelihood, needs: Needs, acc: torch.dtype | None = None
) -> tuple[tuple[Tensor], Gradients | None]:
    """The gradients are made along with the terms, for an upstream gradient of 1, where backward can scale them as they are."""
    acc = acc or accumulate_dtype(*inputs[:3])
    ready = writes_gradients(inputs, needs, spec.keep, acc)
    nll, gradients = nll_pass(inputs, spec, needs if ready else (False,) * 3, spec.scale, acc)
    return (w.widen(nll, acc),), gradients if ready else None


def backward(
    inputs: NLLInputs,
    spec: Likelihood,
    grad_outputs: Gradients,
    needs: Needs,
    kept: Gradients | None,
    acc: torch.dtype | None = None,
) -> Gradients:
    (grad_output,) = grad_outputs
    assert grad_output is not None
    if kept is not None:
        return scaled(kept, grad_output)
    acc = acc or accumulate_dtype(*inputs[:3])
    rate = w.against(w.widen(grad_output, acc) * spec.scale, inputs.recon.ndim, spec.keep)
    return nll_pass(inputs, spec, needs, rate, acc, want_terms=False)[1]


OP = Op(forward, backward)


def writes_gradients(inputs: Any, needs: Needs, keep: int, acc: torch.dtype) -> bool:
    """Whether a forward pass may write gradients that backward only scales: by a number, or by one for each row.

    Gradients in half precision would be rounded twice, and those of inputs that broadcast hold a sum over rows.
    """
    shape = inputs[0].shape
    if True not in needs or keep == len(shape) or not on_host(inputs[0]):
        return False
    return not any(need and (t.dtype != acc or (keep and t.shape != shape)) for t, need in zip(inputs, needs, strict=False))


def scaled(gradients: Gradients, grad_output: Tensor) -> Gradients:
    """Gradients that nobody has seen yet times the upstream gradient, which has a number for each row or one for all."""
    if grad_output.ndim == 0 and grad_output.is_cpu and float(grad_output) == 1.0:  # a CPU tensor is read without waiting
        return gradients
    return tuple([g if g is None else g.mul_(w.against(grad_output, g.ndim, grad_output.ndim)) for g in gradients])


def nll_pass(
    inputs: NLLInputs, spec: Likelihood, needs: Needs, rate: Factor, acc: torch.dtype, want_terms: bool = True
) -> tuple[Any, Gradients]:
    """The scaled sums of the terms, and `rate` times the gradients that are needed."""
    recon, x, variance, weight = inputs
    shape, ndim = recon.shape, recon.ndim
    shared = weight is None and spec.parameter == "logvar" and (variance is None or not variance.ndim)
    given: Any = spec.logvar if variance is None else variance
    if not shared:
        given = torch.full((), spec.logvar, dtype=acc, device=recon.device) if variance is None else variance
        given = w.against(given if given.ndim else given.reshape((1,) * ndim), ndim)
    whole = not shared and given.shape == shape
    likes = recon if needs[0] else None, x if needs[1] else None, given if whole and needs[2] else None
    sums = shape[: spec.keep] if want_terms else None, (() if shared else given.shape) if needs[2] and not whole else None
    tile = partial(_shared if shared else _general, spec, needs, acc, want_terms, whole)
    arrays = 1 / 16 if shared and needs[0] else 1.0  # with a gradient to work in, squared residuals need no other memory
    each = recon, x, given, w.against(weight, ndim), rate
    (nll, d_shared), (d_recon, d_x, d_variance) = w.walk(tile, each, likes, sums, acc, arrays)
    if needs[2]:
        d_variance = (d_variance if whole else d_shared).reshape(variance.shape)  # type: ignore[union-attr]
    gradients = zip((d_recon, d_x, d_variance), inputs, strict=False)
    return nll, tuple([g if g is None or t is None else w.widen(g, t.dtype) for g, t in gradients])


def _shared(
    spec: Likelihood, needs: Needs, acc: torch.dtype, want_terms: bool, _whole: bool,
    recon: Tensor, x: Tensor, logvar: Any, _: None, rate: Any, d_recon: Any, d_x: Any, d_logvar: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """One log-variance for all elements, a number or a 0-d tensor, and no weights: squared residuals, and numbers beside them."""
    nll = d_shared = None
    logvar = w.widen(logvar, acc) if isinstance(logvar, Tensor) else logvar
    inverse = torch.exp(-logvar) if isinstance(logvar, Tensor) else _exp(-logvar)
    d = torch.sub(w.widen(recon, acc), w.widen(x, acc), out=w.usable(d_recon, acc))
    if want_terms or needs[2]:
        squares, count = w.sum_of_squares(d, spec.keep), math.prod(d.shape[spec.keep :])
        if needs[2]:
            rows = rate.reshape(squares.shape) if isinstance(rate, Tensor) and rate.ndim else rate
            d_shared = ((count - squares * inverse) * (0.5 * rows)).sum()
        if want_terms:
            nll = squares.mul_(0.5 * inverse * spec.scale)
            if spec.full or isinstance(logvar, Tensor) or logvar:
                nll = nll.add_((logvar + (LOG_2PI if spec.full else 0.0)) * (0.5 * count * spec.scale))
    if needs[1]:
        d_x = torch.mul(d, -inverse * rate, out=w.usable(d_x, acc))
    if needs[0]:
        d_recon = d.mul_(inverse * rate)
    return (nll, d_shared), (d_recon, d_x, None)


def _general(
    spec: Likelihood, needs: Needs, acc: torch.dtype, want_terms: bool, whole: bool,
    recon: Tensor, x: Tensor, given: Tensor, weight: Any, rate: Any, d_recon: Any, d_x: Any, d_given: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Any variance that broadcasts, in any parameter, and weights."""
    nll = d_shared = None
    shape, recon, x = given.shape, w.widen(recon, acc), w.widen(x, acc)
    given = w.present(weight, w.widen(given, acc), 0.0 if spec.parameter == "logvar" else 1.0)
    d = torch.sub(w.present(weight, recon), w.present(weight, x), out=w.usable(d_given, acc))
    ratio, logvar, slope = _over_variance(d, given, spec, w.usable(d_recon, acc))
    rate = rate if weight is None else w.widen(weight, acc) * rate
    square = torch.mul(d, ratio, out=d)
    if want_terms:
        nll = _sum_of_terms(square, logvar, weight, spec)
    if needs[2]:
        half = 0.5 * rate if slope is None else rate * slope
        slopes = square.mul_(-half).add_(half) if whole or not isinstance(half, Tensor) else half - square * half
        d_given, d_shared = (slopes, None) if whole else (None, slopes.sum_to_size(shape))
    if needs[1]:
        d_x = torch.mul(ratio, -rate, out=w.usable(d_x, acc))
    if needs[0]:
        d_recon = ratio.mul_(rate)
    return (nll, d_shared), (d_recon, d_x, d_given)


def _over_variance(d: Tensor, given: Tensor, spec: Likelihood, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """d / variance; the log-variance; and its derivative in the parameter, halved (None: 1/2)."""
    if spec.parameter == "logvar":
        variance = torch.exp(given, out=out if given.shape == d.shape else None)
        return torch.div(d, variance, out=out), given, None
    if spec.parameter == "std":
        return torch.div(d / given, given, out=out), 2 * torch.log(given), 1 / given
    # Raised to the floor; a negative variance is an error, and NaN shows it where no check can.
    raised = torch.clamp(given, min=spec.floor).masked_fill(given < 0, math.nan)
    return torch.div(d, raised, out=out), torch.log(raised), 0.5 / raised


def _sum_of_terms(square: Tensor, logvar: Tensor, weight: Tensor | None, spec: Likelihood) -> Tensor:
    """scale * sums of weight / 2 (r^2 + log variance + log 2 pi)."""
    constant, keep = LOG_2PI if spec.full else 0.0, spec.keep
    if weight is not None or keep == square.ndim or not on_host(square):
        terms = (square + logvar).add_(constant)
        terms = terms if weight is None else terms.mul_(weight)
        return w.sum_over(terms, keep).mul_(0.5 * spec.scale)
    # Each by itself: what cancels in their sum, the sums in float64 still hold.
    shape = square.shape
    repeats = math.prod([n // max(1, m) for n, m in zip(shape[keep:], logvar.shape[keep:], strict=True)])
    total = w.sum_over(square, keep).add_(w.sum_over(logvar, keep), alpha=repeats)
    return total.add_(constant * math.prod(shape[keep:])).mul_(0.5 * spec.scale)


def _exp(value: float) -> float:
    """exp of a Python float that overflows to inf, as tensors do."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
