"""KL between diagonal Gaussians, element by element and without cancellation near the prior."""

import triton
import triton.language as tl  # noqa: F401 -- Triton looks for it beside every kernel

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
    quad = d * pull
    return 0.5 * (quad + rest), pull, 0.5 * expm1, -0.5 * (quad + expm1)
