"""Likelihoods of counts: Poisson, and the negative binomial of a mean and an inverse dispersion theta, which may have added zeros.

The form is Loader's (2000, "Fast and accurate computation of binomial probabilities"): deviances and remainders of Stirling's
series, none of which cancels another. With t = (x - mean) / (mean + theta), n = x + theta, gap(u) = u - log(1 + u), and the
remainders S of lgamma and R of digamma, an element's term and slopes are

    poisson(x, rate)    x gap(rate / x - 1) + log(2 pi x) / 2 + S(x)      in rate     1 - x / rate
    term                poisson(x, mean (1 + t)) + theta gap(t) + log(n / theta) / 2 + S(theta) - S(n)
    in mean             -theta t / mean
    in theta            gap(t) - (x / (2 theta n) + R(theta) - R(n))

and for a zero, which most counts of a cell are, the rate, theta (gap(t) - t), theta / (mean + theta) and gap(t). So what x enters
is computed only where x is not 0. With inflated zeros of logits l, a zero has probability 1 - q, q = (1 - e^-term) sigmoid(-l):

    term                -log(1 - q) at 0, otherwise log(1 + e^l) more
    in l                -q sigmoid(l + term) at 0, otherwise sigmoid(l)
    in mean, theta      at 0 those above times sigmoid(-l - term)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import LOG_2PI, image, on_host, widen
from ..specs import Likelihood
from . import walk as w

# (atanh(w) - w) / w^3 in powers of w^2, the highest first: its Taylor series, of which float32 needs the last five.
GAP = tuple(1 / k for k in range(27, 1, -2))

# Fits in powers of 1 / z^2 of z S(z) and z^2 R(z), the highest first, and the z from which they hold.
REMAINDERS = {
    torch.float32: (
        1,
        (3.676352935144678e-05, -0.00018581465701572597, 0.0004167917068116367, -0.0005674052517861128, 0.0005717761814594269,
         -0.0005568209453485906, 0.0007905138772912323, -0.0027776702772825956, 0.0833333358168602),
        (0.0003417524858377874, -0.001704357098788023, 0.0037383465096354485, -0.004885561764240265, 0.004539948422461748,
         -0.003750551026314497, 0.003934965934604406, -0.008332203142344952, 0.0833333283662796),
    ),
    torch.float64: (
        4,
        (-0.17390223978422367, 0.08600886915362022, -0.02431970081518216, 0.006210992276421007, -0.0019125368108574897,
         0.0008416721483780579, -0.0005952373672607474, 0.0007936507901805894, -0.002777777777771288, 0.08333333333333333),
        (16.272492444252475, -7.874672567242462, 2.0004758503978333, -0.3992958066655563, 0.08204835156459736,
         -0.021067490343790643, 0.007575437694477858, -0.004166664261695412, 0.003968253958849537, -0.008333333333318827,
         0.08333333333333333),
    ),
}  # fmt: skip


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    p = (x * coefficients[0]).add_(coefficients[1])
    for c in coefficients[2:]:
        p.mul_(x).add_(c)
    return p


def gap(u: Tensor, v: Tensor) -> Tensor:
    """u - log(1 + u), never negative, for v = 1 + u, which the caller may know better than u."""
    half = u / (u + 2.0)
    square = half * half
    series = _polynomial(square, GAP if u.dtype == torch.float64 else GAP[-5:]).mul_(square).mul_(-2.0).add_(u).mul_(half)
    return torch.where(u.abs() < 0.4, series, u - torch.log(v))


def remainders(z: Tensor) -> tuple[Tensor, Tensor]:
    """S and R. Below where the fits hold, the recurrence of the gamma function leads there."""
    least, of_lgamma, of_digamma = REMAINDERS[z.dtype]
    small = z < least
    u = torch.reciprocal(torch.where(small, z + least, z))
    square = u * u
    s, r = _polynomial(square, of_lgamma).mul_(u), _polynomial(square, of_digamma).mul_(square)
    log_ratio = torch.log1p(least / z)
    steps = [z + i for i in range(least)]
    lost = (z - 0.5) * log_ratio - least + sum(torch.log1p((least - i) / step) for i, step in enumerate(steps))
    lost_slope = 0.5 / (z + least) - 0.5 / z - log_ratio + sum(1.0 / step for step in steps)
    return s + torch.where(small, lost, 0.0), r + torch.where(small, lost_slope, 0.0)


def _poisson(x: Tensor, rate: Tensor, excess: Tensor, of_x: Tensor | None) -> Tensor:
    """Where x is not 0; with lgamma(x + 1) if x has a remainder. The excess, rate - x, may be known better than the difference."""
    if of_x is None:
        return rate - x * torch.log(rate)
    return x * gap(excess / x, rate / x) + (0.5 * torch.log(x) + 0.5 * LOG_2PI + of_x)


def _negative_binomial(x: Tensor, mean: Tensor, theta: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The term and its slopes in mean and theta, where x is not 0."""
    total, n = mean + theta, x + theta
    t, ratio = (x - mean) / total, n / total
    apart = gap(t, ratio)
    # Together: on these few elements, calls cost more than they compute.
    s, r = remainders(torch.stack((theta, n, x) if full else (theta, n)))
    term = (
        theta * apart + (0.5 * torch.log(n / theta) + (s[0] - s[1])) + _poisson(x, mean * ratio, -theta * t, s[2] if full else None)
    )
    return term, -theta * t / mean, apart - (0.5 * (x / theta) / n + (r[0] - r[1]))


def _where_counted(x: Tensor, zeros: Sequence[Tensor], math: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> list[Tensor]:
    """The results for zeros, with those of `math(x, *tensors)` where x is not 0; it sees no other elements if x can be read."""
    if on_host(x):
        at = x.nonzero(as_tuple=True)
        for zero, value in zip(zeros, math(x[at], *(t.expand(x.shape)[at] for t in tensors)), strict=True):
            zero[at] = value
        return list(zeros)
    is_zero = x == 0
    found = math(torch.where(is_zero, 1.0, x), *(t.expand(x.shape) for t in tensors))
    return [torch.where(is_zero, zero, value) for zero, value in zip(zeros, found, strict=True)]


# ---- the tiles -------------------------------------------------------------------------------------------------------------------


def poisson_tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    mean: Tensor, x: Tensor, _: Any, weight: Any, rate: Any, d_mean: Any, d_x: Any, __: Any,
) -> tuple[Any, Any]:  # fmt: skip
    mean, x = (w.present(weight, t) for t in (widen(mean, acc), image(x, spec.x_scale, spec.x_shift, acc)))

    def math(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        excess = mean - x
        return _poisson(x, mean, excess, remainders(x)[0] if spec.full else None), excess / mean

    terms, slope = _where_counted(x, [mean.clone(), torch.ones_like(mean)], math, mean)
    rate = rate if weight is None else widen(weight, acc) * rate
    if d_mean is not None:
        torch.mul(slope, rate, out=d_mean)
    return _summed(terms, weight, spec) if want_terms else None, None


def negative_binomial_tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    mean: Tensor, x: Tensor, theta: Tensor, weight: Any, rate: Any, d_mean: Any, d_x: Any, d_theta: Any,
) -> tuple[Any, Any]:  # fmt: skip
    zeros, (x, mean, given) = _zeros(spec, acc, x, mean, theta, weight)
    math = partial(_negative_binomial, full=spec.full)
    terms, *slopes = _where_counted(x, zeros, math, mean, given)
    return _finished(spec, acc, want_terms, weight, rate, terms, slopes, (d_mean, d_theta), theta.shape if want_slope else None)


def zero_inflated_tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    mean: Tensor, x: Tensor, theta: Tensor, weight: Any, rate: Any, logits: Tensor, d_mean: Any, d_x: Any, d_theta: Any,
    d_logits: Any,
) -> tuple[Any, Any]:  # fmt: skip
    (term, in_mean, in_theta), (x, mean, given) = _zeros(spec, acc, x, mean, theta, weight)
    logits = w.present(weight, widen(logits, acc))
    both = logits + term
    q = torch.expm1(-term).neg_().mul_(torch.sigmoid(-logits))
    # Of two forms the one that does not cancel.
    far = torch.minimum(term, -logits).add_(_log1p_exp(logits)).sub_(_log1p_exp(both))
    term = torch.where(q < 0.5, torch.log1p(-q).neg_(), far)
    share = torch.sigmoid(-both)
    zeros = [term, in_mean * share, in_theta * share, -q * torch.sigmoid(both)]

    def math(x: Tensor, mean: Tensor, theta: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        term, in_mean, in_theta = _negative_binomial(x, mean, theta, spec.full)
        return term + (logits.clamp(min=0.0) + _log1p_exp(logits)), in_mean, in_theta, torch.sigmoid(logits)

    terms, *slopes = _where_counted(x, zeros, math, mean, given, logits)
    memory, shape = (d_mean, d_theta, d_logits), theta.shape if want_slope else None
    return _finished(spec, acc, want_terms, weight, rate, terms, slopes, memory, shape)


def _log1p_exp(t: Tensor) -> Tensor:
    """log(1 + e^-|t|)"""
    return t.abs().neg_().exp_().log1p_()


def _zeros(
    spec: Likelihood, acc: torch.dtype, x: Tensor, mean: Tensor, theta: Tensor, weight: Any
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The term of a negative binomial at x = 0 and its slopes in mean and theta; and x, mean and theta, ready for arithmetic."""
    mean, x = (w.present(weight, t) for t in (widen(mean, acc), image(x, spec.x_scale, spec.x_shift, acc)))
    theta = w.present(weight, widen(theta, acc), 1.0)
    total = mean + theta
    t, in_mean = -mean / total, theta / total
    apart = gap(t, in_mean)
    return [(apart - t).mul_(theta), in_mean, apart], (x, mean, theta)


def _summed(terms: Tensor, weight: Any, spec: Likelihood) -> Tensor:
    return w.sum_over(terms if weight is None else terms.mul_(weight), spec.keep).mul_(spec.scale)


def _finished(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, weight: Any, rate: Any, terms: Tensor, slopes: Sequence[Tensor],
    memory: Sequence[Any], shape: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The sums of the terms and, if it has a shape, of the slopes in theta; the other slopes go to their memory."""
    rate = rate if weight is None else widen(weight, acc) * rate
    for slope, out in zip(slopes, memory, strict=True):
        if out is not None:
            torch.mul(slope, rate, out=out)
    of_theta = None if shape is None or memory[1] is not None else (slopes[1] * rate).sum_to_size(shape)
    return _summed(terms, weight, spec) if want_terms else None, of_theta


TILES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "poisson": poisson_tile,
    "negative_binomial": negative_binomial_tile,
    "zero_inflated_negative_binomial": zero_inflated_tile,
}
