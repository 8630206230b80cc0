"""-log Laplace(x; recon, b), where b is the scale, and its logarithm is given.

With the residual d = recon - x and r = |d| / b, an element's term and slopes are

    term          r + log b + log 2
    in recon      sign(d) / b         in x    -sign(d) / b
    in log b      1 - r
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..dtypes import image, widen
from ..specs import Likelihood
from . import walk as w


def tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    recon: Tensor, x: Tensor, logscale: Tensor, weight: Any, rate: Any, d_recon: Any, d_x: Any, d_logscale: Any,
) -> tuple[Any, Any]:  # fmt: skip
    nll = slopes = None
    shape, recon, x = logscale.shape, widen(recon, acc), image(x, spec.x_scale, spec.x_shift, acc)
    logscale = w.present(weight, widen(logscale, acc))
    d = torch.sub(w.present(weight, recon), w.present(weight, x), out=d_logscale)
    root = torch.exp(-0.5 * logscale)  # of 1 / b, which leaves float32's range before its root does
    rate = rate if weight is None else widen(weight, acc) * rate
    if d_recon is not None or d_x is not None:
        slope = torch.sign(d, out=d_x if d_recon is None else d_recon).mul_(root).mul_(root * rate)
        if d_x is not None:
            torch.neg(slope, out=d_x)
    r = d.abs_().mul_(root).mul_(root)
    if want_terms:
        terms = (r + logscale).add_(math.log(2.0) if spec.full else 0.0)
        nll = w.sum_over(terms if weight is None else terms.mul_(weight), spec.keep).mul_(spec.scale)
    if want_slope:
        slope = r.neg_().add_(1.0).mul_(rate)
        slopes = None if d_logscale is not None else slope.sum_to_size(shape)
    return nll, slopes
