"""KL between diagonal Gaussians, element by element and without cancellation near the prior."""

import triton
import triton.language as tl

from .math import exp, expm1_and_rest


@triton.jit
def kl_math(mu, logvar, prior_mu, prior_logvar):
    """The KL and its derivatives: (kl, in mu, in logvar, in prior_logvar); the one in prior_mu is minus the one in mu.

    A prior of None is N(0, 1). With v = logvar - prior_logvar: 1/2 [ (mu - prior_mu)^2 / prior_var + (e^v - 1 - v) ].
    """
    d = mu
    if prior_mu is not None:
        d = mu - prior_mu
    v = logvar
    pull = d
    if prior_logvar is not None:
        v = logvar - prior_logvar
        pull = d * exp(-prior_logvar)
    expm1, rest = expm1_and_rest(v)
    if prior_logvar is not None:
        # Far from the prior the rounding of v moves e**v by many times its own: `low` is what v lost (Knuth's two-sum).
        back = v - logvar
        low = (logvar - (v - back)) - (prior_logvar + back)
        more = (expm1 + 1.0) * low
        finite = tl.abs(more) < float("inf")
        rest = tl.where(finite, rest + expm1 * low, rest)
        expm1 = tl.where(finite, expm1 + more, expm1)
    quad = d * pull
    return 0.5 * (quad + rest), pull, 0.5 * expm1, -0.5 * (quad + expm1)
