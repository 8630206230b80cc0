"""-log N(x; recon, variance): Kingma & Welling 2014, appendix C.2.

With the residual d = recon - x, an element's term and slopes are

    term          1/2 (r^2 + log variance + log 2 pi), r = d / std
    in recon      r / std             in x    -r / std
    in logvar     1/2 (1 - r^2)       in std  1/std (1 - r^2)       in var  1/2 / variance (1 - r^2)

Beside a log-variance it is r that is squared, since the variance or its inverse leaves float32's range long before their roots do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..dtypes import LOG_2PI, image, on_host, widen
from ..specs import Likelihood, NLLInputs
from ..tracing import is_watched
from . import walk as w

# A log-variance whose inverse variance is in float32's range, with room for residuals and factors.
NEAR = 60.0


def is_of_one_variance(inputs: NLLInputs, spec: Likelihood) -> bool:
    """Whether one log-variance serves all elements."""
    return spec.family == "gaussian" and spec.parameter == "logvar" and (inputs.variance is None or not inputs.variance.ndim)


def level(inputs: NLLInputs, spec: Likelihood, acc: torch.dtype) -> float | Tensor:
    """That log-variance: a number where it is known to be near 0, and a 0-d tensor elsewhere.

    Only a CPU's tensor is read, which waits for nothing.
    """
    given = inputs.variance
    value = spec.logvar if given is None else given.item() if on_host(given) and not is_watched(given) else given
    if isinstance(value, Tensor) or not abs(value) <= NEAR:
        return torch.as_tensor(value, dtype=acc, device=inputs.recon.device)
    return value


def tile_of_one_variance(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    recon: Tensor, x: Tensor, logvar: Any, rate: Any, d_recon: Any, d_x: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """One log-variance for all elements, and no weights: squared residuals, and numbers beside them.

    A log-variance that may be far from 0 is a 0-d tensor. One near 0 is a number: there one factor does, along with the rate.
    """
    nll = slope = None
    d = torch.sub(widen(recon, acc), image(x, spec.x_scale, spec.x_shift, acc), out=d_x if d_recon is None else d_recon)
    then: Any
    if isinstance(logvar, float):
        of_squares = then = math.exp(-logvar)
    else:
        of_squares, then = 1.0, torch.exp(-0.5 * logvar)
        d.mul_(then)
    if want_terms or want_slope:
        squares, count = w.squares_over(d, spec.keep), math.prod(d.shape[spec.keep :])
        if want_slope:
            rows = rate.reshape(squares.shape) if isinstance(rate, Tensor) and rate.ndim else rate
            slope = ((count - squares * of_squares) * (0.5 * rows)).sum()
        nll = squares.mul_(0.5 * of_squares * spec.scale)
        if spec.full or isinstance(logvar, Tensor) or logvar:
            nll.add_((logvar + (LOG_2PI if spec.full else 0.0)) * (0.5 * count * spec.scale))
    if d_recon is not None:
        w.times(d, then * rate, out=d)
    if d_x is not None:
        torch.neg(d, out=d_x) if d_recon is not None else w.times(d, -then * rate, out=d)
    return nll, slope


def tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    recon: Tensor, x: Tensor, given: Tensor, weight: Any, rate: Any, d_recon: Any, d_x: Any, d_given: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Any variance that broadcasts, in any parameter, and weights."""
    nll = slopes = None
    shape, recon, x = given.shape, widen(recon, acc), image(x, spec.x_scale, spec.x_shift, acc)
    given = w.present(weight, widen(given, acc), 0.0 if spec.parameter == "logvar" else 1.0)
    d = torch.sub(w.present(weight, recon), w.present(weight, x), out=d_given)
    square, ratio, logvar, divisor = _over_variance(d, given, spec, d_recon)
    if want_terms:
        nll = _sum_of_terms(square, logvar, weight, spec)
    rate = rate if weight is None else widen(weight, acc) * rate
    if want_slope:
        half = 0.5 * rate if divisor is None else rate
        if isinstance(half, Tensor):
            square.neg_().add_(1.0).mul_(half)
        else:
            torch.sub(torch.full((), half, dtype=acc, device=d.device), square, alpha=half, out=square)
        if divisor is not None:
            square.div_(divisor)
        slopes = None if d_given is not None else square.sum_to_size(shape)
    if d_x is not None:
        torch.mul(ratio, -rate, out=d_x)
    if d_recon is not None:
        ratio.mul_(rate)
    return nll, slopes


def _sum_of_terms(square: Tensor, logvar: Tensor, weight: Tensor | None, spec: Likelihood) -> Tensor:
    """scale * sums of weight / 2 (r^2 + log variance + log 2 pi)."""
    constant, keep, shape = LOG_2PI if spec.full else 0.0, spec.keep, square.shape
    if weight is not None or keep == len(shape) or not on_host(square):
        terms = (square + logvar).add_(constant)
        return w.sum_over(terms if weight is None else terms.mul_(weight), keep).mul_(0.5 * spec.scale)
    # Each by itself needs no memory for the terms. What cancels in their sum, the sums in float64 still hold.
    repeats = math.prod(shape[keep:]) // max(1, math.prod(logvar.shape[keep:]))
    total = w.exact_sum_over(square, keep).add_(w.exact_sum_over(logvar, keep), alpha=repeats)
    return total.add_(constant * math.prod(shape[keep:])).mul_(0.5 * spec.scale)


def _over_variance(d: Tensor, given: Tensor, spec: Likelihood, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """r^2 in the memory of d; d / variance; the log-variance; and what divides 1 - r^2 in the parameter's slope (None: 2)."""
    if spec.parameter == "logvar":
        inverse = torch.mul(given, -0.5, out=out if given.shape == d.shape else None).exp_()
        ratio = torch.mul(d.mul_(inverse), inverse, out=out)
        return torch.mul(d, d, out=d), ratio, given, None
    if spec.parameter == "std":
        ratio = torch.div(d.div_(given), given, out=out)
        return torch.mul(d, d, out=d), ratio, 2 * torch.log(given), given
    raised = torch.clamp(given, min=spec.floor)
    if spec.floor == -math.inf or not on_host(given):
        # A negative variance is an error. With a floor it has been refused on a host; NaN shows it where no check looked.
        raised = raised.masked_fill(given < 0, math.nan)
    ratio = torch.div(d, raised, out=out)
    return torch.mul(d, ratio, out=d), ratio, torch.log(raised), 2 * raised
