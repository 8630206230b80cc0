"""Likelihoods of counts, as models of single cells decode them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, checks
from .functional import observed
from .tracing import one_node
from .types import CountFamily, Impl, Number, Reduction


def _counted(
    family: CountFamily, name: str, mean: Any, x: Any, theta: Any, full: bool, weight: Any, reduction: Reduction, batch_dims: int,
    impl: Impl | None, zi_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    checks.tensor(name, mean)
    checks.constant_data(x, "counts are constants")
    if theta is None and family != "poisson":
        raise TypeError("theta must be a number or a torch.Tensor, got NoneType")
    # Bytes are counts as they are.
    image = (1.0, None) if isinstance(x, Tensor) and x.dtype == torch.uint8 else (None, None)
    spread = ("theta", "theta", theta)
    return observed(family, (mean, x), spread, full, weight, reduction, batch_dims, image, impl, name=name, zi_logits=zi_logits)


@one_node
def poisson_nll(
    rate: Tensor,
    x: Tensor,
    *,
    full: bool = True,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> Tensor:
    """-log Poisson(x; rate), in nats: rate - x log rate + lgamma(x + 1) for each element.

    Computed as Loader (2000, "Fast and accurate computation of binomial probabilities") does, as a deviance and a remainder of
    Stirling's series: the three terms above cancel beside large counts.

    Args:
        rate: Means, of any shape and floating dtype; not checked for sign.
        x: Counts, of rate's shape, or of rate's shape without its first dimension, which holds samples: x is not copied then.
            A floating tensor (whole numbers are not asked for), or torch.uint8, which is read as it is. A constant.
        full: Include lgamma(x + 1), which depends on the data alone, so that the value is the likelihood's.
        weight, reduction, batch_dims, impl: As in `gaussian_nll`.

    Returns:
        The negative log-likelihood, differentiable in rate.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or x requires grad.
    """
    return _counted("poisson", "rate", rate, x, None, full, weight, reduction, batch_dims, impl)


@one_node
def negative_binomial_nll(
    mean: Tensor,
    x: Tensor,
    *,
    theta: Tensor | Number,
    full: bool = True,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> Tensor:
    """-log NB(x; mean, theta), in nats, with variance mean + mean^2 / theta: Lopez et al. 2018 (scVI).

    For each element lgamma(theta) + lgamma(x + 1) - lgamma(x + theta) + theta log(1 + mean / theta) + x log(1 + theta / mean). That
    is the density of scvi-tools' `log_nb_positive` without that function's eps, and computed as Loader (2000) does: the terms above
    cancel beside a large theta, where the distribution tends to Poisson's.

    Args:
        mean: Means, of any shape and floating dtype; not checked for sign.
        x: Counts, as in `poisson_nll`.
        theta: Inverse dispersion: a positive number, or a tensor (0-d, per gene, per sample, per element) that broadcasts to mean.
            A tensor is not checked for sign.
        full: Include lgamma(x + 1), which depends on the data alone, so that the value is the likelihood's.
        weight, reduction, batch_dims, impl: As in `gaussian_nll`.

    Returns:
        The negative log-likelihood, differentiable in mean and a tensor theta (whose gradient has its own shape).

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or x requires grad.
    """
    return _counted("negative_binomial", "mean", mean, x, theta, full, weight, reduction, batch_dims, impl)


@one_node
def zero_inflated_negative_binomial_nll(
    mean: Tensor,
    x: Tensor,
    *,
    theta: Tensor | Number,
    zi_logits: Tensor,
    full: bool = True,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> Tensor:
    """-log p(x) with p(x) = s [x = 0] + (1 - s) NB(x; mean, theta) and s = sigmoid(zi_logits), in nats: Lopez et al. 2018 (scVI).

    The density of scvi-tools' `log_zinb_positive`, without that function's eps.

    Args:
        mean, x, theta, full: As in `negative_binomial_nll`.
        zi_logits: Logits of the zeros that are added (of "dropout"): a tensor that broadcasts to mean.
        weight, reduction, batch_dims, impl: As in `gaussian_nll`.

    Returns:
        The negative log-likelihood, differentiable in mean, a tensor theta and zi_logits (whose gradients have their own shapes).

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or x requires grad.
    """
    checks.tensor("mean", mean)
    checks.tensor("zi_logits", zi_logits, mean.device)
    checks.broadcast("zi_logits", zi_logits, "mean", mean.shape)
    # Expanding is autograd's business, as it is for priors: logits that are shared get their summed gradient.
    if zi_logits.ndim != mean.ndim or zi_logits.shape != mean.shape:
        zi_logits = arguments.expanded(zi_logits, mean.shape)
    family: CountFamily = "zero_inflated_negative_binomial"
    return _counted(family, "mean", mean, x, theta, full, weight, reduction, batch_dims, impl, zi_logits)
