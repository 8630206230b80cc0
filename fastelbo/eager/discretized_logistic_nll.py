"""-log of the mass that a logistic distribution has in the bin around x: Salimans et al. 2017, section 2.1.

With the scale s, half a bin h, the edges a = (x + h - recon) / s and b = (x - h - recon) / s of the bin, and w = a - b, an inner
bin's term and slopes are

    term          softplus(-a) + softplus(b) - log(1 - e^-w)
    in recon      (sigmoid(-a) - sigmoid(b)) / s
    in log s      a sigmoid(-a) - b sigmoid(b) + w / (e^w - 1)

The first bin has only what is of a, and the last bin only what is of b: the other edge is at infinity, and w with it. The terms are
never negative, and as -log(1 - e^-w) is log(1 + q) with q = 1 / (e^w - 1), none of them cancels inside, however wide the bin.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import OPEN, image, widen
from ..specs import Likelihood
from . import walk as w


def tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    recon: Tensor, x: Tensor, logscale: Tensor, weight: Any, rate: Any, d_recon: Any, d_x: Any, d_logscale: Any,
) -> tuple[Any, Any]:  # fmt: skip
    nll = slopes = None
    shape, recon, x = logscale.shape, widen(recon, acc), image(x, spec.x_scale, spec.x_shift, acc)
    recon, x, logscale = (w.present(weight, t) for t in (recon, x, widen(logscale, acc)))
    assert spec.bin is not None
    half, first, last = spec.bin
    is_first, is_last = x < first, x > last
    inverse, d = torch.exp(-logscale), x - recon
    a = (d + half).mul_(inverse).masked_fill_(is_last, OPEN)
    b = d.sub_(half).mul_(inverse).masked_fill_(is_first, -OPEN)
    width, is_open = 2 * half * inverse, is_first.logical_or_(is_last)
    q = torch.expm1(width).reciprocal_()
    if want_terms:
        terms = torch.where(is_open, 0.0, torch.log1p(q)).sub_(F.logsigmoid(a)).sub_(F.logsigmoid(-b))
        nll = w.sum_over(terms if weight is None else terms.mul_(weight), spec.keep).mul_(spec.scale)
    if d_recon is None and not want_slope:
        return nll, None
    rate = rate if weight is None else widen(weight, acc) * rate
    of_a, of_b = torch.sigmoid(-a), torch.sigmoid(b)
    if d_recon is not None:
        torch.sub(of_a, of_b, out=d_recon).mul_(inverse).mul_(rate)
    if want_slope:
        slope = torch.mul(a, of_a, out=d_logscale).sub_(b.mul_(of_b)).add_(torch.where(is_open, 0.0, q.mul_(width))).mul_(rate)
        slopes = None if d_logscale is not None else slope.sum_to_size(shape)
    return nll, slopes
