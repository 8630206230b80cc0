"""The Gaussian likelihood at the variance that maximises it over the batch: arithmetic on sums of squares, which autograd sees."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import arguments
from .dtypes import LOG_2PI
from .specs import Factor


class Optimum(NamedTuple):
    """What makes an nll of sums of weighted squares: Rybkin, Daniilidis & Levine 2021 (sigma-VAE), section 3.2.

    With row sums S_i of w d^2 and W_i of w, and sigma^2 = sum S / sum W, a row's nll is 1/2 [ S_i / sigma^2 + W_i (log sigma^2 +
    log 2 pi) ].
    """

    total: Factor  # sum W
    of_rows: Factor  # W, of each row that is kept, or of all
    constant: float  # log 2 pi, or 0
    scale: Factor

    def nll(self, half_squares: Tensor) -> Tensor:
        """Of half the sums of squares, of each row or of all: differentiable through sigma^2 too."""
        squares, scale = 2.0 * half_squares.sum(), self.scale
        if isinstance(self.total, Tensor):  # where no element is present, 1 keeps the rows and the slopes 0
            nothing = self.total == 0
            variance = torch.where(nothing, 1.0, squares / torch.where(nothing, 1.0, self.total))
        else:
            variance = squares / self.total
        nll = half_squares / variance + (0.5 * self.of_rows) * (torch.log(variance) + self.constant)
        if isinstance(scale, Tensor):  # a mean over nothing is NaN, and has no slopes
            return torch.where(scale.isfinite(), nll * torch.where(scale.isfinite(), scale, 0.0), math.nan)
        return nll * scale


def optimum(shape: torch.Size, keep: int, weight: Tensor | None, scale: Factor, full: bool, acc: torch.dtype) -> Optimum:
    """For residuals of that shape, whose sums keep the first `keep` dimensions, and a weight that broadcasts to them."""
    constant = LOG_2PI if full else 0.0
    if weight is None:
        return Optimum(math.prod(shape), math.prod(shape[keep:]), constant, scale)
    rows = arguments.summed(weight.to(acc), shape, keep)
    return Optimum(rows.sum(), rows, constant, scale)
