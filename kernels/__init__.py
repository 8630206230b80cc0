"""The Triton backend, installed as ``fastelbo.kernels``: the functions of ``fastelbo.eager``, with the same signatures."""

# A well-known distribution owns the top-level name `kernels`, and two copies of these modules under two names would
# compile and cache everything twice: so this directory answers to one name only.
if __name__ != "fastelbo.kernels":
    raise ImportError(
        f"the Triton kernels of fastelbo were imported as {__name__!r}; import them as 'fastelbo.kernels' "
        "(from a source checkout, install it first: python -m pip install -e .)"
    )

from .elbo import elbo_forward, elbo_terms_backward, elbo_terms_forward, scale_gradients
from .gaussian_nll import nll_backward, nll_forward
from .launch import INTERPRETED
from .linear_elbo import linear_elbo_backward, linear_elbo_forward, linear_nll_backward, linear_nll_forward
from .reparameterize import latent_backward, latent_forward

__all__ = [
    "INTERPRETED",
    "elbo_forward",
    "elbo_terms_backward",
    "elbo_terms_forward",
    "latent_backward",
    "latent_forward",
    "linear_elbo_backward",
    "linear_elbo_forward",
    "linear_nll_backward",
    "linear_nll_forward",
    "nll_backward",
    "nll_forward",
    "scale_gradients",
]
