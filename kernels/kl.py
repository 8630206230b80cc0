"""The mathematics of a diagonal Gaussian's KL on the device: values and derivatives by spreads in four forms."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import divide, exp, log1p_gap, sigma_expm1_remainder, sqrt

# What the spreads of posterior and prior are.
LOGVAR, LOGSTD, STD, VAR = (tl.constexpr(i) for i in range(4))
PARAMETERS = {"logvar": LOGVAR, "logstd": LOGSTD, "std": STD, "var": VAR}


@triton.jit
def kl_math(mu, spread, prior_mu, prior_spread, PARAMETER: tl.constexpr):
    """The KL and its derivatives: (kl, in mu, in spread, in prior_spread). The derivative in prior_mu is minus the one in mu.

    A prior of None is N(0, 1). With v = logvar - prior logvar: 1/2 [ (mu - prior_mu)^2 / prior_var + (e^v - 1 - v) ].
    """
    d = mu
    if prior_mu is not None:
        d = mu - prior_mu
    if (PARAMETER == STD) | (PARAMETER == VAR):
        square, d_mu, expm1, remainder = _of_ratio(d, spread, prior_spread, PARAMETER)
    else:
        square, d_mu, expm1, remainder = _of_logarithms(d, spread, prior_spread, PARAMETER)
    d_spread = expm1
    d_prior_spread = -(square + expm1)
    if PARAMETER == LOGSTD:
        d_spread, d_prior_spread = 2.0 * d_spread, 2.0 * d_prior_spread
    elif PARAMETER == STD:
        d_spread = divide(2.0 * d_spread, spread)
        if prior_spread is not None:
            d_prior_spread = divide(2.0 * d_prior_spread, prior_spread)
    elif PARAMETER == VAR:
        d_spread = divide(d_spread, spread)
        if prior_spread is not None:
            d_prior_spread = divide(d_prior_spread, prior_spread)
    return square + remainder, d_mu, d_spread, d_prior_spread


@triton.jit
def _of_logarithms(d, spread, prior_spread, PARAMETER: tl.constexpr):
    """1/2 d^2 / prior_var, d / prior_var, and half of (e^v - 1, e^v - 1 - v)."""
    v = spread
    d_mu = d
    if PARAMETER == LOGSTD:
        v = 2.0 * spread
    if prior_spread is not None:
        prior = prior_spread
        root = exp(-prior) if PARAMETER == LOGSTD else exp(-0.5 * prior)  # in range where the variance or its inverse is not
        if PARAMETER == LOGSTD:
            prior = 2.0 * prior
        logvar = v
        v = logvar - prior
        d_mu = d * root * root
    _, expm1, remainder = sigma_expm1_remainder(v)
    if prior_spread is not None:
        # Far from the prior the rounding of v moves e**v by many times its own: `low` is what v lost (Knuth's two-sum).
        back = v - logvar
        low = (logvar - (v - back)) - (prior + back)
        more = (expm1 + 0.5) * low
        finite = tl.abs(more) < float("inf")
        remainder = tl.where(finite, remainder + expm1 * low, remainder)
        expm1 = tl.where(finite, expm1 + more, expm1)
    return 0.5 * d * d_mu, d_mu, expm1, remainder


@triton.jit
def _of_ratio(d, spread, prior_spread, PARAMETER: tl.constexpr):
    """As `_of_logarithms`, by e^v as a ratio or its square: near the prior the ratio is rounded, where the difference is not."""
    ratio = spread
    beyond = spread - 1.0
    square = 0.5 * d * d
    d_mu = d
    if prior_spread is not None:
        ratio = divide(spread, prior_spread)
        beyond = tl.where(tl.abs(ratio - 1.0) < 1.0, divide(spread - prior_spread, prior_spread), ratio - 1.0)
        d_mu = divide(d, prior_spread)
        square = 0.5 * d * d_mu
        if PARAMETER == STD:
            square = 0.5 * d_mu * d_mu
            d_mu = divide(d_mu, prior_spread)
    lost = log1p_gap(beyond, ratio)
    if PARAMETER == STD:
        expm1 = beyond + 0.5 * beyond * beyond
        return square, d_mu, tl.where(ratio < 0.5, 0.5 * ratio * ratio - 0.5, expm1), 0.5 * beyond * beyond + lost
    else:
        return square, d_mu, 0.5 * beyond, 0.5 * lost


@triton.jit
def sigma_of(spread, PARAMETER: tl.constexpr):
    """The standard deviation."""
    if PARAMETER == LOGVAR:
        return sigma_expm1_remainder(spread)[0]
    elif PARAMETER == LOGSTD:
        return sigma_expm1_remainder(2.0 * spread)[0]
    elif PARAMETER == STD:
        return spread
    else:
        return sqrt(spread)


@triton.jit
def through_sigma(d_sigma, sigma, PARAMETER: tl.constexpr):
    """The derivative in the spread, given the one in the standard deviation."""
    if PARAMETER == LOGVAR:
        return 0.5 * sigma * d_sigma
    elif PARAMETER == LOGSTD:
        return sigma * d_sigma
    elif PARAMETER == STD:
        return d_sigma
    else:
        return divide(0.5 * d_sigma, sigma)
