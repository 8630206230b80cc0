"""What stands before the decoder: samples of a diagonal Gaussian posterior, and its KL. The conventions are those of `functional`.

The spread of a posterior, and that of a prior, is given in one of four forms: logvar, logstd, std or var. Each is read as it is,
and gets its own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from . import arguments, autograd, backend
from .dtypes import plain
from .specs import KL, Latent, LatentInputs
from .tracing import one_node
from .types import Clamp, Impl, Int, Number, Reduction, Seed


def reparameterised(
    inputs: LatentInputs, spec: Latent, impl: Impl | None, packed: tuple[Tensor, int] | None = None
) -> tuple[Any, Any]:
    """(z or None, kl or None) of checked inputs. `packed` is (moments, dim) where mu and a logvar are the halves of moments."""
    chosen = backend.choose(impl, inputs.mu.device, not inputs.mu.numel())
    traced = torch.compiler.is_compiling()
    scale = spec.kl.scale
    if traced:
        spec = spec._replace(kl=spec.kl._replace(scale=1.0))
    if packed is None or chosen is None:
        z, kl = autograd.call(autograd.Latent, chosen, spec, inputs)
    else:
        z, kl = autograd.call_packed(chosen, spec, packed[1], packed[0], inputs)
    return z, kl * scale if traced and spec.want_kl else kl


@one_node
def reparameterize(
    mu: Tensor,
    logvar: Tensor | None = None,
    num_samples: Int | None = None,
    *,
    logstd: Tensor | None = None,
    std: Tensor | None = None,
    var: Tensor | None = None,
    eps: Tensor | None = None,
    seed: Seed | None = None,
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Sample z = mu + exp(logvar / 2) * eps, eps ~ N(0, I): Kingma & Welling 2014, section 2.4.

    Args:
        mu: Means, of any shape and floating dtype.
        logvar, logstd, std, var: The spread, in exactly one of four forms, of mu's shape. Values are not checked for sign.
        num_samples: None for one sample of mu's shape; L for samples of shape `(L, *mu.shape)`.
        eps: The noise itself, of z's shape; a constant.
        seed: An int or a 0-d int64 tensor on mu's device: counter-based Philox4x32-10 noise, the same on every device. Nothing is
            stored for backward, which regenerates it.
        generator: Source of the noise (CPU) or of a fresh seed (GPU). At most one of eps, seed and generator may be given. With
            none, the CPU draws what `torch.randn_like(mu)` would, and a GPU draws a seed without a host synchronisation.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        z in mu's dtype, differentiable in mu and the spread.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two sources of noise or two forms of the
            spread are given.
    """
    parameter, spread = arguments.posterior_spread(mu, logvar, logstd, std, var)
    samples: int | None = None if num_samples is None else plain(num_samples)
    noise = arguments.noise(mu, samples, eps, seed, generator)
    inputs = LatentInputs(mu, spread, None, None, None, *noise)
    return reparameterised(inputs, Latent(KL(parameter=parameter), want_kl=False, num_samples=samples), impl)[0]


@one_node
def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | Number | None = None,
    prior_logvar: Tensor | Number | None = None,
    *,
    logstd: Tensor | None = None,
    std: Tensor | None = None,
    var: Tensor | None = None,
    prior_logstd: Tensor | Number | None = None,
    prior_std: Tensor | Number | None = None,
    prior_var: Tensor | Number | None = None,
    num_samples: Int | None = None,
    eps: Tensor | None = None,
    seed: Seed | None = None,
    generator: torch.Generator | None = None,
    logvar_clamp: Clamp | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample z and compute KL(N(mu, exp(logvar)) || prior) in one pass over mu and the spread.

    The two are those of `reparameterize` and `gaussian_kl`, whose arguments it takes; `logvar_clamp` bounds logvar for both, with
    zero gradient outside. The KL does not depend on `num_samples`.

    Returns:
        (z, kl): z in mu's dtype, kl in nats, both differentiable in mu and the spread, kl in the prior too.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two sources of noise or two forms of a
            spread are given.
    """
    parameter, spread = arguments.posterior_spread(mu, logvar, logstd, std, var)
    prior = arguments.prior_spread(mu, parameter, prior_logvar, prior_logstd, prior_std, prior_var)
    inputs = arguments.posterior(mu, spread, prior_mu, prior, weight)
    kl = arguments.kl_of(inputs, reduction, batch_dims, logvar_clamp, parameter)
    samples: int | None = None if num_samples is None else plain(num_samples)
    noise = arguments.noise(mu, samples, eps, seed, generator)  # drawn when nothing is left that could be refused
    return reparameterised(LatentInputs(*inputs[:5], *noise), Latent(kl, num_samples=samples), impl)


@one_node
def gaussian_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | Number | None = None,
    prior_logvar: Tensor | Number | None = None,
    *,
    logstd: Tensor | None = None,
    std: Tensor | None = None,
    var: Tensor | None = None,
    prior_logstd: Tensor | Number | None = None,
    prior_std: Tensor | Number | None = None,
    prior_var: Tensor | Number | None = None,
    logvar_clamp: Clamp | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))), in nats: Kingma & Welling 2014, appendix B.

    Computed as 1/2 [ (mu - prior_mu)^2 / prior_var + (e^v - 1 - v) ] with v = logvar - prior_logvar and a series for small v, so
    that it does not cancel near the prior: it is never negative. Of a std or a var, e^v is a ratio and v its logarithm.

    Args:
        mu: Means, of any shape and floating dtype.
        logvar, logstd, std, var: The spread, in exactly one of four forms, of mu's shape. Values are not checked for sign.
        prior_mu: Mean of the prior: a number or a tensor; None is 0. mu and the prior's tensors broadcast against each other, so
            that mu `(batch, 1, latents)` and prior_mu `(components, latents)` give the KL to each component.
        prior_logvar, prior_logstd, prior_std, prior_var: The prior's spread, likewise, in at most one form; with none the prior
            has unit variance. One in another form than the posterior's is converted first.
        logvar_clamp: (lo, hi) to clamp logvar to, with zero gradient outside, as latent-diffusion code does; an edge of
            None is no bound. Not for another form.
        weight: A bool mask or weights that broadcast to mu; a constant. Where it is 0 the element is absent: a NaN under it reaches
            neither loss nor gradient. A "mean" over nothing, as under a mask that is all False, is NaN.
        reduction: "none" sums all but the first `batch_dims` dimensions; "batchmean" is the mean of those sums over the batch;
            "sum" sums everything; "mean" divides by the number of elements, or by the sum of the weights.
        batch_dims: How many leading dimensions are the batch. With "none" and `batch_dims=mu.ndim` nothing is summed.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The KL, differentiable in mu, the spread and the prior.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two forms of a spread are given.
    """
    parameter, spread = arguments.posterior_spread(mu, logvar, logstd, std, var)
    prior = arguments.prior_spread(mu, parameter, prior_logvar, prior_logstd, prior_std, prior_var)
    mu, spread = arguments.against_priors((mu, spread), prior_mu, prior[1])
    inputs = arguments.posterior(mu, spread, prior_mu, prior, weight)
    return reparameterised(inputs, Latent(arguments.kl_of(inputs, reduction, batch_dims, logvar_clamp, parameter)), impl)[1]


def kl_divergence(q: Distribution, p: Distribution, *, impl: Impl | None = None) -> Tensor:
    """KL(q || p) of torch's Normal distributions in one pass, in nats, where `torch.distributions.kl_divergence` makes nine.

    Args:
        q, p: `torch.distributions.Normal`, or `Independent` of it with equally many dimensions, whose shapes broadcast.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The KL of each element, or of an Independent the sum over its event's dimensions, as torch has it, except that the dtype
        is float32 for half precision; differentiable in the loc and scale of both.

    Raises:
        TypeError, ValueError: q or p is no such distribution, their shapes do not broadcast, or their events differ.
    """
    (q_normal, q_dims), (p_normal, p_dims) = (_normal("q", q), _normal("p", p))
    if q_dims != p_dims:
        raise ValueError(f"the event of q has {q_dims} dimensions and that of p {p_dims}: they must be equal")
    batch_dims = max(q_normal.loc.ndim, p_normal.loc.ndim) - q_dims
    return gaussian_kl(
        q_normal.loc, std=q_normal.scale, prior_mu=p_normal.loc, prior_std=p_normal.scale, batch_dims=batch_dims, impl=impl
    )


def _normal(name: str, given: Any) -> tuple[Normal, int]:
    """A Normal, and how many dimensions of it are one event."""
    dims, inner = 0, given
    while isinstance(inner, Independent):
        dims, inner = dims + inner.reinterpreted_batch_ndims, inner.base_dist
    if not isinstance(inner, Normal):
        raise TypeError(
            f"{name} must be a torch.distributions.Normal or an Independent of one, got {type(given).__name__}: "
            "torch.distributions.kl_divergence takes others"
        )
    return inner, dims
