"""Densities at given points: what a prior without a closed form, an importance weight or a mixture is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, checks
from .functional import observed
from .tracing import NUMBER, one_node
from .types import Impl, Number, Reduction


def _density(
    names: tuple[str, str], z: Tensor, mean: Any, spread: Any, shape: torch.Size, weight: Any, reduction: Reduction,
    batch_dims: int, impl: Impl | None, full: bool,
) -> Tensor:  # fmt: skip
    """-log N(z; mean, spread) over `shape`; names are those of mean and spread, which are numbers, tensors or None."""
    if not isinstance(mean, Tensor):
        mean = arguments.prior(names[0], 0.0 if mean is None else mean, z.expand(shape))
    recon, x = (arguments.expanded(t, shape) for t in (mean, z))
    form = names[1].removeprefix("prior_")
    if form == "logstd" and spread is not None:
        form, spread = "logvar", 2 * (spread.float() if isinstance(spread, Tensor) and spread.dtype.itemsize < 4 else spread)
    given = names[1], form, spread
    return observed("gaussian", (recon, x), given, full, weight, reduction, batch_dims, (None, None), impl, name=names[0])


def _shape(z: Tensor, others: dict[str, Any]) -> torch.Size:
    """Check the tensors beside z, and return the shape to which all broadcast."""
    checks.tensor("z", z)
    shape = z.shape
    for name, t in others.items():
        if t is None or (isinstance(t, NUMBER) and not isinstance(t, bool)):
            continue
        checks.tensor(name, t, z.device)
        try:
            shape = torch.broadcast_shapes(shape, t.shape)
        except RuntimeError:
            raise ValueError(
                f"{name} has shape {checks.shape_of(t)}, which does not broadcast with {tuple(shape)}, that of the others before it"
            ) from None
    return shape


@one_node
def gaussian_log_prob(
    z: Tensor,
    mu: Tensor | Number | None = None,
    logvar: Tensor | Number | None = None,
    *,
    logstd: Tensor | Number | None = None,
    std: Tensor | Number | None = None,
    var: Tensor | Number | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> Tensor:
    """log N(z; mu, exp(logvar)) in nats: Kingma & Welling 2014, appendix C.2.

    z, mu and the spread broadcast against each other without a copy. So z `(batch, 1, latents)` against mu `(components, latents)`
    gives `(batch, components)` with `batch_dims=2`: a mixture's log density (VampPrior: Tomczak & Welling 2018, equation 9) is a
    logsumexp over it; and against mu `(batch, latents)`, with `batch_dims=3`, what beta-TCVAE is made of (Chen et al. 2018).

    Args:
        z: Points, of any shape and floating dtype.
        mu: Means: a number or a tensor; None is 0.
        logvar, logstd, std, var: The spread, in at most one of four forms, a number or a tensor; with none the variance is 1.
        weight: A bool mask or weights that broadcast to the shape of all; a constant. Where it is 0 the element is absent.
        reduction: As in `gaussian_nll`.
        batch_dims: How many leading dimensions of the common shape are the batch.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The log density, differentiable in z, mu and a tensor spread.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two forms of the spread are given.
    """
    name, spread = arguments.one_form("", logvar, logstd, std, var)
    shape = _shape(z, {"mu": mu, name: spread})
    return -_density(("mu", name), z, mu, spread, shape, weight, reduction, batch_dims, impl, full=True)


@one_node
def sample_kl(
    z: Tensor,
    mu: Tensor | Number | None = None,
    logvar: Tensor | Number | None = None,
    prior_mu: Tensor | Number | None = None,
    prior_logvar: Tensor | Number | None = None,
    *,
    logstd: Tensor | Number | None = None,
    std: Tensor | Number | None = None,
    var: Tensor | Number | None = None,
    prior_logstd: Tensor | Number | None = None,
    prior_std: Tensor | Number | None = None,
    prior_var: Tensor | Number | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> Tensor:
    """log N(z; mu, exp(logvar)) - log N(z; prior_mu, exp(prior_logvar)), in nats: the KL estimated at samples z of the posterior.

    Its mean over samples is the KL (Kingma & Welling 2014, equation 8), and it may be negative. Where the closed form will do,
    `gaussian_kl` has no variance.

    Args:
        z: Samples, `(..., latents)`, with dimensions of samples or components in front or between: z, the posterior and the prior
            broadcast against each other without a copy.
        mu, logvar, logstd, std, var: The posterior, as in `gaussian_log_prob`.
        prior_mu, prior_logvar, prior_logstd, prior_std, prior_var: The prior, likewise.
        weight, reduction, batch_dims, impl: As in `gaussian_log_prob`.

    Returns:
        The estimate, differentiable in z, the posterior and the prior.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two forms of a spread are given.
    """
    name, spread = arguments.one_form("", logvar, logstd, std, var)
    prior_name, prior_spread = arguments.one_form("prior_", prior_logvar, prior_logstd, prior_std, prior_var)
    shape = _shape(z, {"mu": mu, name: spread, "prior_mu": prior_mu, prior_name: prior_spread})
    options = shape, weight, reduction, batch_dims, impl, False  # what is constant is the same in both
    of_prior = _density(("prior_mu", prior_name), z, prior_mu, prior_spread, *options)
    return of_prior - _density(("mu", name), z, mu, spread, *options)
