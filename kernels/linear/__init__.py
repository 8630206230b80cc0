"""Where a decoder ends in a linear layer: -log N(x; h weight^T + bias, variance), and the whole ELBO where h is a sample z."""

from .host import linear_elbo, linear_nll
from .tiles import linear_limits

__all__ = ["linear_elbo", "linear_limits", "linear_nll"]
