"""-log Bernoulli(x; sigmoid(recon)) for logits and targets from 0 to 1: Kingma & Welling 2014, appendix C.1.

An element's term and slopes are

    term          log(1 + e^recon) - recon x
    in recon      sigmoid(recon) - x          in x    -recon
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import image, widen
from ..specs import Likelihood
from . import walk as w


def tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    recon: Tensor, x: Tensor, _: Any, weight: Any, rate: Any, d_recon: Any, d_x: Any, __: Any,
) -> tuple[Any, Any]:  # fmt: skip
    nll = None
    recon, x = (w.present(weight, t) for t in (widen(recon, acc), image(x, spec.x_scale, spec.x_shift, acc)))
    if want_terms:
        # With log(1 + e^m) as max(m, 0) + log1p(e^-|m|), nothing cancels beside a target near 0 or 1.
        terms = recon.abs().neg_().exp_().log1p_().addcmul_(recon.clamp(min=0.0), 1 - x)
        terms.addcmul_(recon.neg().clamp_(min=0.0), x)
        nll = w.sum_over(terms if weight is None else terms.mul_(weight), spec.keep).mul_(spec.scale)
    rate = rate if weight is None else widen(weight, acc) * rate
    if d_recon is not None:
        torch.sigmoid(recon, out=d_recon).sub_(x).mul_(rate)
    if d_x is not None:
        torch.mul(recon, -rate, out=d_x)
    return nll, None
