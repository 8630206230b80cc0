"""Likelihoods other than the Gaussian, by themselves; `elbo_loss` takes them by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import arguments, checks
from .dtypes import accumulate_dtype, plain
from .functional import observed
from .tracing import one_node
from .types import Impl, Int, Number, Reduction


@one_node
def laplace_nll(
    recon: Tensor,
    x: Tensor,
    *,
    logscale: Tensor | Number | None = None,
    offset: Tensor | None = None,
    full: bool = True,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    x_scale: Number | None = None,
    x_shift: Number | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """-log Laplace(x; recon, exp(logscale)), in nats: |recon - x| / b + log b + log 2 for each element, with b = exp(logscale).

    What an L1 loss is the likelihood of. With one learned logscale s it is |recon - x| / exp(s) + s, the reconstruction term of
    latent-diffusion autoencoders (Rombach et al. 2022, without its constant).

    Args:
        recon: Medians, of any shape and floating dtype.
        x: Data, as in `gaussian_nll`.
        logscale: Logarithm of the scale: a number, or a tensor (0-d, per channel, per sample, per element) that broadcasts to
            recon. None is 0.
        offset: What is added to |recon - x| under the same scale, as latent-diffusion code adds a perceptual distance, so that each
            element has (|recon - x| + offset) / b + log b + log 2: a tensor that broadcasts to recon, such as `(batch, 1, 1, 1)`.
        full: Include the constant log 2 per element, so that the value is the likelihood's.
        weight, reduction, batch_dims, x_scale, x_shift, impl: As in `gaussian_nll`.

    Returns:
        The negative log-likelihood, differentiable in recon, x, offset and a tensor logscale (whose gradient has its own shape).
        Where recon is x, the gradient in both is 0.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """
    spread, image = ("logscale", "logvar", logscale), (x_scale, x_shift)
    nll = observed("laplace", (recon, x), spread, full, weight, reduction, batch_dims, image, impl)
    if offset is None:
        return nll
    checks.tensor("offset", offset, recon.device)
    checks.broadcast("offset", offset, "recon", recon.shape)
    acc, (scale, _, number) = accumulate_dtype(nll, offset), arguments.variance("logscale", "logvar", logscale, recon)
    inverse = math.exp(-number) if scale is None else torch.exp(-_present(weight, scale.to(acc)))
    each = _present(weight, offset.to(acc)) * inverse
    keep = plain(batch_dims) if reduction == "none" else 0
    added = arguments.summed(each if weight is None else _present(weight, each) * weight, recon.shape, keep)
    return nll + added * arguments.scale_of(reduction, plain(batch_dims), recon.shape, weight, (nll, offset))


def _present(weight: Tensor | None, t: Tensor) -> Tensor:
    return t if weight is None else torch.where(weight == 0, 0.0, t)


@one_node
def bernoulli_nll(
    logits: Tensor,
    x: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    x_scale: Number | None = None,
    x_shift: Number | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """-log Bernoulli(x; sigmoid(logits)), in nats: Kingma & Welling 2014, appendix C.1.

    The cross entropy of `torch.nn.functional.binary_cross_entropy_with_logits`, without cancellation: log(1 + e^m) - m x as a sum
    of terms that are never negative for x from 0 to 1.

    Args:
        logits: Of any shape and floating dtype.
        x: Data from 0 to 1, which is not checked, as in `gaussian_nll`; a mask of bytes is an image with `x_scale=1`.
        weight, reduction, batch_dims, x_scale, x_shift, impl: As in `gaussian_nll`.

    Returns:
        The negative log-likelihood, differentiable in logits and x.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """
    none, image = ("logvar", "logvar", None), (x_scale, x_shift)
    return observed("bernoulli", (logits, x), none, False, weight, reduction, batch_dims, image, impl, name="logits")


@one_node
def discretized_logistic_nll(
    recon: Tensor,
    x: Tensor,
    *,
    logscale: Tensor | Number | None = None,
    bins: Int = 256,
    low: Number = -1.0,
    high: Number = 1.0,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    x_scale: Number | None = None,
    x_shift: Number | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """-log of the mass that a logistic distribution has in the bin around x, in nats: Salimans et al. 2017, section 2.1.

    The likelihood of 8-bit images in PixelCNN++ and in NVAE (Vahdat & Kautz 2020): with s = exp(logscale) and half a bin
    h = (high - low) / (2 (bins - 1)), -log[sigmoid((x + h - recon) / s) - sigmoid((x - h - recon) / s)]. The first bin is open
    below and the last one above, so that the probabilities of all bins add up to 1. The usual code approximates where that
    difference is small; here it is a sum of terms that are never negative, at any scale and any distance.

    Args:
        recon: Centres of the distributions, of any shape and floating dtype.
        x: Data, as in `gaussian_nll`, each the centre of a bin, which is not checked; a constant. Of an 8-bit image p it is
            p / 127.5 - 1, or p itself in uint8 with `x_scale=1 / 127.5, x_shift=-1`.
        logscale: Logarithm of the scale: a number, or a tensor (0-d, per channel, per sample, per element) that broadcasts to
            recon. None is 0. In float32 from -80 to 80.
        bins: How many bins there are, 2 or more.
        low, high: The centres of the first and the last bin: numbers.
        weight, reduction, batch_dims, x_scale, x_shift, impl: As in `gaussian_nll`.

    Returns:
        The negative log-likelihood, differentiable in recon and a tensor logscale (whose gradient has its own shape).

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or value, or x requires grad.
    """
    checks.constant_data(x, "the bin around it is a constant")
    spread, image = ("logscale", "logvar", logscale), (x_scale, x_shift)
    return observed(
        "discretized_logistic", (recon, x), spread, True, weight, reduction, batch_dims, image, impl, bins=(bins, low, high)
    )
