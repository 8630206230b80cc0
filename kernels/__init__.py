"""The Triton backend, installed as ``fastelbo.kernels``: an `Op` for each fused operation, as ``fastelbo.specs`` describes it.

`likelihood`, `latent` and `elbo` are such ops here and not the modules of the same names, which hold the kernels. The modules are
reached by `from fastelbo.kernels.likelihood import ...`.
"""

# A well-known distribution owns the top-level name `kernels`, and two copies of these modules under two names would
# compile and cache everything twice: so this directory answers to one name only.
if __name__ != "fastelbo.kernels":
    raise ImportError(
        f"the Triton kernels of fastelbo were imported as {__name__!r}; import them as 'fastelbo.kernels' "
        "(from a source checkout, install it first: python -m pip install -e .)"
    )

from .elbo import elbo, elbo_terms
from .latent import latent
from .latents import latents
from .launch import INTERPRETED
from .likelihood import likelihood
from .linear import linear_elbo, linear_limits, linear_nll

__all__ = ["INTERPRETED", "elbo", "elbo_terms", "latent", "latents", "likelihood", "linear_elbo", "linear_limits", "linear_nll"]
