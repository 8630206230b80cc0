"""Likelihoods of counts, per element: Poisson, and the negative binomial with and without zero inflation.

The form is Loader's (2000, "Fast and accurate computation of binomial probabilities"): deviances and remainders of Stirling's
series, none of which cancels another, where the usual difference of log-gammas loses everything beside a large theta. Most counts
of a cell are 0, and a zero has a form of its own: it is what the general one tends to, with nothing left to cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import log, log1p_exp_and_sigmoid, log1p_gap, sigma_expm1_remainder, stirling_remainders


@triton.jit
def poisson_math(x, rate, excess, FULL: tl.constexpr):
    """-log Poisson(x; rate), if FULL with lgamma(x + 1). The excess, rate - x, may be known better than the difference."""
    if FULL:
        some = tl.where(x == 0.0, 1.0, x)
        remainder, _ = stirling_remainders(some)
        value = some * log1p_gap(excess / some, rate / some) + (0.5 * log(6.283185307179586 * some) + remainder)
    else:
        value = rate - x * log(rate)
    return tl.where(x == 0.0, rate, value)


@triton.jit
def poisson_slope(x, rate):
    return tl.where(x == 0.0, 1.0, (rate - x) / rate)


@triton.jit
def negative_binomial_math(x, mean, theta, FULL: tl.constexpr):
    """-log NB(x; mean, theta), and its derivatives in the mean and in theta.

    With n = x + theta and t = (x - mean) / (mean + theta), it is the term of a Poisson distribution of rate mean (1 + t), plus
    theta (t - log(1 + t)), plus half the logarithm of n / theta, plus the difference of two remainders.
    """
    total = mean + theta
    n = x + theta
    t = (x - mean) / total
    ratio = n / total
    gap = log1p_gap(t, ratio)
    of_n, slope_of_n = stirling_remainders(n)
    of_theta, slope_of_theta = stirling_remainders(theta)
    term = theta * gap + (0.5 * log(n / theta) + (of_theta - of_n)) + poisson_math(x, mean * ratio, -theta * t, FULL)
    term = tl.where(x == 0.0, theta * (gap - t), term)
    in_mean = tl.where(x == 0.0, theta / total, -theta * t / mean)
    return term, in_mean, gap - (0.5 * (x / theta) / n + (slope_of_theta - slope_of_n))


@triton.jit
def zero_inflated_math(x, term, in_mean, in_theta, logits):
    """What becomes of the term of a negative binomial and its derivatives, and the derivative in the logits.

    A zero has probability 1 - q with q = (1 - e**-term) sigmoid(-logits).
    """
    _, expm1, _ = sigma_expm1_remainder(-term)
    small, inflated = log1p_exp_and_sigmoid(logits)
    _, counted = log1p_exp_and_sigmoid(-logits)
    small_of_both, of_zero = log1p_exp_and_sigmoid(logits + term)
    _, of_count = log1p_exp_and_sigmoid(-logits - term)
    q = -2.0 * expm1 * counted
    zero = tl.where(q < 0.5, q + log1p_gap(-q, 1.0 - q), tl.minimum(term, -logits) + small - small_of_both)
    is_zero = x == 0.0
    share = tl.where(is_zero, of_count, 1.0)
    value = tl.where(is_zero, zero, term + (tl.maximum(logits, 0.0) + small))
    return value, in_mean * share, in_theta * share, tl.where(is_zero, -q * of_zero, inflated)
