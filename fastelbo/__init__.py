"""The loss of a variational autoencoder as fused kernels: sampling and KL before the decoder, the ELBO after it."""

from . import schedules
from .counts import negative_binomial_nll, poisson_nll, zero_inflated_negative_binomial_nll
from .densities import gaussian_log_prob, sample_kl
from .distributions import DiagonalGaussian
from .drop_in import gaussian_nll_loss
from .estimators import effective_beta, sgvb_loss
from .foreach import foreach_gaussian_kl, foreach_reparameterize_kl
from .functional import (
    elbo_loss,
    elbo_terms,
    gaussian_nll,
)
from .latent import gaussian_kl, kl_divergence, reparameterize, reparameterize_kl
from .latent_diffusion import AutoencoderKLLoss
from .likelihoods import bernoulli_nll, discretized_logistic_nll, laplace_nll
from .linear import linear_elbo_loss, linear_gaussian_nll
from .modules import ELBOLoss, GaussianNLLLoss, LinearELBO, Reparameterize
from .numerics.compare import compare
from .numerics.verify import NumericsMismatch, verify

__version__ = "0.1.0"

__all__ = [
    "AutoencoderKLLoss",
    "DiagonalGaussian",
    "ELBOLoss",
    "GaussianNLLLoss",
    "LinearELBO",
    "NumericsMismatch",
    "Reparameterize",
    "bernoulli_nll",
    "compare",
    "discretized_logistic_nll",
    "effective_beta",
    "elbo_loss",
    "elbo_terms",
    "foreach_gaussian_kl",
    "foreach_reparameterize_kl",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_nll",
    "gaussian_nll_loss",
    "kl_divergence",
    "laplace_nll",
    "linear_elbo_loss",
    "linear_gaussian_nll",
    "negative_binomial_nll",
    "poisson_nll",
    "reparameterize",
    "reparameterize_kl",
    "sample_kl",
    "schedules",
    "sgvb_loss",
    "verify",
    "zero_inflated_negative_binomial_nll",
]
