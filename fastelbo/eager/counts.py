"""Likelihoods of counts: Poisson, and the negative binomial of a mean and an inverse dispersion theta, which may have added zeros.

The form is Loader's (2000, "Fast and accurate computation of binomial probabilities"): deviances and remainders of Stirling's
series, none of which cancels another. With t = (x - mean) / (mean + theta), n = x + theta, gap(u) = u - log(1 + u), and the
remainders S of lgamma and R of digamma, an element's term and slopes are

    poisson(x, rate)    x gap(rate / x - 1) + log(2 pi x) / 2 + S(x)      in rate     1 - x / rate
    term                poisson(x, mean (1 + t)) + theta gap(t) + log(n / theta) / 2 + S(theta) - S(n)
    in mean             -theta t / mean
    in theta            gap(t) - (x / (2 theta n) + R(theta) - R(n))

and for a zero, which most counts of a cell are, the rate, theta L, e^-L and L + e^-L - 1, with L = log(1 + mean / theta). So what
x enters is computed only where x is not 0. With inflated zeros of logits l, a zero has probability 1 - q, where
q = (1 - e^-term) sigmoid(-l):

    term                -log(1 - q) at 0, otherwise log(1 + e^l) more
    in l                -q sigmoid(l + term) at 0, otherwise sigmoid(l)
    in mean, theta      at 0 those above times sigmoid(-l - term)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dtypes import LOG_2PI, image, on_host, widen
from ..specs import Likelihood
from . import walk as w

# (atanh(w) - w) / w^3 in powers of w^2, the highest first: its Taylor series, of which float32 needs the last five.
GAP = tuple(1 / k for k in range(27, 1, -2))

# (L + e^-L - 1) / L^2 in powers of L, the highest first: its Taylor series, of which float32 needs the last eight up to L = NEAR.
GAP_OF_LOG = tuple((-1) ** k / math.factorial(k + 2) for k in range(14, -1, -1))
NEAR = 0.7

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


def _polynomial(x: Tensor, coefficients: Sequence[float], out: Any = None) -> Tensor:
    p = torch.mul(x, coefficients[0], out=out).add_(coefficients[1])
    for c in coefficients[2:]:
        p.mul_(x).add_(c)
    return p


def _replace(results: Sequence[Any], mask: Tensor, other: Callable[..., Sequence[Any]], *tensors: Tensor) -> None:
    """Write `other(*tensors)` to the results, or None, where the mask holds. If it can be read, `other` sees no other elements.

    torch.where takes a CPU longer than a formula does, and so does torch's way to find where a mask holds.
    """
    tensors = tuple(t.expand(mask.shape) for t in tensors)
    at = torch.from_numpy(np.flatnonzero(mask.numpy())) if on_host(mask) else None
    for result, value in zip(results, other(*(t if at is None else t.take(at) for t in tensors)), strict=True):
        if result is None:
            continue
        if at is None:
            result.copy_(torch.where(mask, value, result))
            continue
        flat = result.reshape(-1).scatter_(0, at, value)  # put_, which knows every layout, is no deterministic algorithm
        if not result.is_contiguous():
            result.copy_(flat.view(result.shape))


def gap(u: Tensor, v: Tensor) -> Tensor:
    """u - log(1 + u), never negative, for v = 1 + u, which the caller may know better than u."""
    half = u / (u + 2.0)
    square = half * half
    series = _polynomial(square, GAP if u.dtype == torch.float64 else GAP[-5:]).mul_(square).mul_(-2.0).add_(u).mul_(half)
    _replace([series], u.abs() >= 0.4, lambda u, v: [u - torch.log(v)], u, v)
    return series


def gap_of_log(log: Tensor, exp: Tensor, near: Any = None, out: Any = None) -> Tensor:
    """log + exp - 1 for a log >= 0 and exp = e^-log: the series up to NEAR, and what is more beyond it. `near` is memory to use."""
    near, edge = torch.clamp(log, max=NEAR, out=near), math.exp(-NEAR)
    more = exp.clamp(max=edge).sub_(edge).add_(log).sub_(near)
    return _polynomial(near, GAP_OF_LOG if log.dtype == torch.float64 else GAP_OF_LOG[-8:], out).mul_(near).mul_(near).add_(more)


def remainders(z: Tensor, want_s: bool = True, want_r: bool = False) -> list[Any]:
    """S and R, if they are wanted. Below where the fits hold, the recurrence of the gamma function leads there."""
    least, of_lgamma, of_digamma = REMAINDERS[z.dtype]

    def fits(z: Tensor) -> list[Any]:
        u = torch.reciprocal(z)
        square = u * u
        s = _polynomial(square, of_lgamma).mul_(u) if want_s else None
        return [s, _polynomial(square, of_digamma).mul_(square) if want_r else None]

    def recurrences(z: Tensor) -> list[Any]:
        s, r = fits(z + least)
        log_ratio = torch.log1p(least / z)
        steps = [z + i for i in range(least)]
        if want_s:
            s.add_((z - 0.5) * log_ratio - least + sum(torch.log1p((least - i) / step) for i, step in enumerate(steps)))
        if want_r:
            r.add_(0.5 / (z + least) - 0.5 / z - log_ratio + sum(1.0 / step for step in steps))
        return [s, r]

    found = fits(z)
    _replace(found, z < least, recurrences, z)
    return found


def _poisson(x: Tensor, rate: Tensor, excess: Tensor, of_x: Tensor | None) -> Tensor:
    """Where x is not 0; with lgamma(x + 1) if x has a remainder. The excess, rate - x, may be known better than the difference."""
    if of_x is None:
        return rate - x * torch.log(rate)
    return x * gap(excess / x, rate / x) + (0.5 * torch.log(x) + 0.5 * LOG_2PI + of_x)


def _negative_binomial(want: Sequence[bool], full: bool, x: Tensor, mean: Tensor, theta: Tensor) -> list[Any]:
    """What is wanted of the term and its slopes in mean and theta, where x is not 0."""
    want_term, want_mean, want_theta = want
    term = in_mean = in_theta = None
    total, n = mean + theta, x + theta
    t, ratio = (x - mean) / total, n / total
    excess = -theta * t
    if want_mean:
        in_mean = excess / mean
    if want_term or want_theta:
        apart = gap(t, ratio)
        # Together: on these few elements, calls cost more than they compute.
        s, r = remainders(torch.stack((theta, n, x) if full and want_term else (theta, n)), want_term, want_theta)
        if want_term:
            of_poisson = _poisson(x, mean * ratio, excess, s[2] if full else None)
            term = theta * apart + (0.5 * torch.log(n / theta) + (s[0] - s[1])) + of_poisson
        if want_theta:
            in_theta = apart - (0.5 * (x / theta) / n + (r[0] - r[1]))
    return [term, in_mean, in_theta]


def _zeros(want: Sequence[bool], mean: Tensor, theta: Tensor, d_mean: Any, d_theta: Any) -> list[Any]:
    """What is wanted of a negative binomial at x = 0: term, slopes in mean and theta, which go to memory if there is any."""
    want_term, want_mean, want_theta = want
    in_mean = in_theta = None
    ratio = mean / theta
    log = torch.log1p(ratio)
    if want_mean or want_theta:
        in_mean = torch.reciprocal(ratio.add_(1.0), out=d_mean)
        if want_theta:
            in_theta = gap_of_log(log, in_mean, ratio, d_theta)
    return [log.mul_(theta) if want_term else None, in_mean if want_mean else None, in_theta]


def _replace_counts(x: Tensor, zeros: Sequence[Any], counted: Callable[..., Sequence[Any]], *tensors: Tensor) -> None:
    """Write `counted(x, *tensors)` to the results for zeros where x is not 0."""
    mask = x.bool()
    _replace(zeros, mask, counted, x if on_host(x) else torch.where(mask, x, 1.0), *tensors)


# ---- the tiles -------------------------------------------------------------------------------------------------------------------


def poisson_tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    mean: Tensor, x: Tensor, _: Any, weight: Any, rate: Any, d_mean: Any, d_x: Any, __: Any,
) -> tuple[Any, Any]:  # fmt: skip
    mean, x = (w.present(weight, t) for t in (widen(mean, acc), image(x, spec.x_scale, spec.x_shift, acc)))

    def counted(x: Tensor, mean: Tensor) -> tuple[Any, Any]:
        excess = mean - x
        term = _poisson(x, mean, excess, remainders(x)[0] if spec.full else None) if want_terms else None
        return term, excess / mean

    found = mean.clone() if want_terms else None, None if d_mean is None else d_mean.fill_(1.0)
    _replace_counts(x, found, counted, mean)
    return _finished(spec, acc, weight, rate, *found), None


def negative_binomial_tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    mean: Tensor, x: Tensor, theta: Tensor, weight: Any, rate: Any, d_mean: Any, d_x: Any, d_theta: Any,
) -> tuple[Any, Any]:  # fmt: skip
    want = want_terms, d_mean is not None, want_slope
    x, mean, given = _ready(spec, acc, x, mean, theta, weight)
    found = _zeros(want, mean, given, d_mean, d_theta)
    _replace_counts(x, found, partial(_negative_binomial, want, spec.full), mean, given)
    nll = _finished(spec, acc, weight, rate, *found)
    return nll, found[2].sum_to_size(theta.shape) if want_slope and d_theta is None else None


def zero_inflated_tile(
    spec: Likelihood, acc: torch.dtype, want_terms: bool, want_slope: bool,
    mean: Tensor, x: Tensor, theta: Tensor, weight: Any, rate: Any, logits: Tensor, d_mean: Any, d_x: Any, d_theta: Any,
    d_logits: Any,
) -> tuple[Any, Any]:  # fmt: skip
    want = want_terms, d_mean is not None, want_slope
    x, mean, given = _ready(spec, acc, x, mean, theta, weight)
    logits = w.present(weight, widen(logits, acc))
    term, *slopes = _zeros((True, *want[1:]), mean, given, d_mean, d_theta)
    both = logits + term
    minus_q = term.neg().expm1_().mul_(logits.neg().sigmoid_())
    if d_logits is not None:
        torch.sigmoid(both, out=d_logits).mul_(minus_q)
    if want_terms:
        # Where more than half of 1 is taken away, log(1 - q) cancels, and another form does not.
        far, either = minus_q < -0.5, minus_q.log1p_().neg_()
        _replace([either], far, _far_from_0, term, logits, both)
    share = both.neg_().sigmoid_()
    for slope in slopes:
        if slope is not None:
            slope.mul_(share)

    def counted(x: Tensor, mean: Tensor, theta: Tensor, logits: Tensor) -> list[Any]:
        term, *slopes = _negative_binomial(want, spec.full, x, mean, theta)
        if want_terms:
            term = term + (logits.clamp(min=0.0) + _log1p_exp(logits))
        return [term, *slopes, torch.sigmoid(logits)]

    found = [either if want_terms else None, *slopes, d_logits]
    _replace_counts(x, found, counted, mean, given, logits)
    nll = _finished(spec, acc, weight, rate, *found)
    return nll, found[2].sum_to_size(theta.shape) if want_slope and d_theta is None else None


def _far_from_0(term: Tensor, logits: Tensor, both: Tensor) -> list[Tensor]:
    return [torch.minimum(term, -logits) + _log1p_exp(logits) - _log1p_exp(both)]


def _log1p_exp(t: Tensor) -> Tensor:
    """log(1 + e^-|t|)"""
    return t.abs().neg_().exp_().log1p_()


def _ready(
    spec: Likelihood, acc: torch.dtype, x: Tensor, mean: Tensor, theta: Tensor, weight: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """x, mean and theta for arithmetic."""
    mean, x = (w.present(weight, t) for t in (widen(mean, acc), image(x, spec.x_scale, spec.x_shift, acc)))
    return x, mean, w.present(weight, widen(theta, acc), 1.0)


def _finished(spec: Likelihood, acc: torch.dtype, weight: Any, rate: Any, terms: Any, *slopes: Any) -> Any:
    """The sums of the terms, if there are any. The slopes are multiplied by the rate where they are."""
    rate = rate if weight is None else widen(weight, acc) * rate
    for slope in slopes:
        if slope is not None:
            w.times(slope, rate, out=slope)
    if terms is None:
        return None
    return w.sum_over(terms if weight is None else terms.mul_(weight), spec.keep).mul_(spec.scale)


TILES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "poisson": poisson_tile,
    "negative_binomial": negative_binomial_tile,
    "zero_inflated_negative_binomial": zero_inflated_tile,
}
