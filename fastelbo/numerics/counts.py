"""The terms of likelihoods of counts for the oracle: Loader's deviances, in whose float64 gradients little cancels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dtypes import LOG_2PI
from ..specs import Likelihood


def gap(u: Tensor, log: Tensor) -> Tensor:
    """u - log(1 + u) for that logarithm, which autograd may know more of than of u; a series where they cancel."""
    small = u.clamp(-0.4, 0.4)
    half = small / (2 + small)
    series = sum(half ** (2 * k) / (2 * k + 3) for k in range(16))
    return torch.where(u.abs() < 0.4, half * (small - 2 * half**2 * series), u - log)


def remainder(z: Tensor) -> Tensor:
    """What Stirling's formula leaves out of lgamma(z): a difference where it is no small one, otherwise the asymptotic series."""
    near, far = z.clamp(max=10.0), z.clamp(min=10.0)
    series = (
        1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - (1 / 1188 - 691 / 360360 / far**2) / far**2) / far**2) / far**2) / far**2
    ) / far
    return torch.where(z < 10.0, torch.lgamma(near) - (near - 0.5) * torch.log(near) + near - 0.5 * LOG_2PI, series)


def poisson(x: Tensor, rate: Tensor, excess: Tensor, log: Tensor, full: bool) -> list[Tensor]:
    """Terms at x > 0, for excess = rate / x - 1 and its log(rate / x)."""
    if not full:
        return [rate, -x * (torch.log(x) + log)]
    return [x * gap(excess, log), 0.5 * torch.log(2 * math.pi * x) + remainder(x)]


def terms(
    mean: Tensor, x: Tensor, theta: Tensor | None, zi_logits: Tensor | None, weight: Tensor | None, spec: Likelihood
) -> list[Tensor]:
    """What is added to give the nll of each element; the tensors have 0 under a weight of 0, theta has 1."""
    if weight is not None:
        mean = torch.where(weight == 0, 1.0, mean)
        zi_logits = zi_logits if zi_logits is None else torch.where(weight == 0, 0.0, zi_logits)
    some = torch.where(x == 0, 1.0, x)
    # A zero reads no mean in the terms of other counts: at a mean of 0 those have no slope.
    own = torch.where(x == 0, 1.0, mean)
    if spec.family == "poisson":
        zero, counted = mean, poisson(some, own, (own - some) / some, torch.log(own) - torch.log(some), spec.full)
    else:
        assert theta is not None
        # theta log(1 + mean / theta), of terms whose slopes in theta do not cancel where that is large.
        zero = mean / (1 + mean / theta) + theta * gap(-mean / (mean + theta), torch.log(theta) - torch.log(mean + theta))
        t, excess = (some - own) / (own + theta), (own - some) / (some * (1 + own / theta))
        # log(1 + t): of the two the slope in theta does not cancel.
        in_t = torch.where(t.abs() < 0.4, torch.log1p(t), torch.log(some + theta) - torch.log(own + theta))
        rate = own * (some + theta) / (own + theta)
        counted = poisson(some, rate, excess, torch.log(own) + in_t - torch.log(some), spec.full)
        counted += [theta * gap(t, in_t), 0.5 * torch.log1p(some / theta), remainder(theta) - remainder(some + theta)]
    if zi_logits is not None:
        inflated = torch.logaddexp(zi_logits, torch.zeros_like(zi_logits))
        counted.append(inflated)
        # Autograd has the slope of expm1 as expm1 + 1, which loses what is small, and that of a sigmoid as s (1 - s).
        counted_share = torch.where(zero < 1, -torch.expm1(-zero), 1 - torch.exp(-zero))
        q = counted_share * torch.exp(-inflated)
        far = (
            torch.minimum(zero, -zi_logits)
            + torch.log1p(torch.exp(zi_logits.clamp(max=0.0)))  # which are not positive where this form serves
            - torch.log1p(torch.exp(-(zi_logits + zero).abs()))
        )
        zero = torch.where(q < 0.5, -torch.log1p(-q.clamp(max=0.5)), far)
    return [torch.where(x == 0, zero, 0.0), *(torch.where(x == 0, 0.0, t) for t in counted)]
