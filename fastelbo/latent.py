"""What stands before the decoder: samples of a diagonal Gaussian posterior, and its KL. The conventions are those of `functional`.

The spread of a posterior, and that of a prior, is given in one of four forms: logvar, logstd, std or var. Each is read as it is,
and gets its own gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from . import arguments, autograd, backend
from .dtypes import LOG_2PI, plain
from .objectives import Objective
from .specs import KL, Latent, LatentInputs
from .tracing import one_node
from .types import Clamp, FreeBitsOver, Impl, Int, KLOptions, Number, Reduction, Seed

if TYPE_CHECKING:
    from typing_extensions import Unpack


def reparameterised(
    inputs: LatentInputs, spec: Latent, impl: Impl | None, packed: tuple[Tensor, int] | None = None
) -> tuple[Any, ...]:
    """(z or None, kl or None), and the sums of eps^2 if they are wanted, of checked inputs.

    `packed` is (moments, dim) where mu and a logvar are the halves of moments.
    """
    chosen = backend.choose(impl, inputs.mu.device, not inputs.mu.numel())
    traced = torch.compiler.is_compiling()
    scale = spec.kl.scale
    if traced:
        spec = spec._replace(kl=spec.kl._replace(scale=1.0))
    if packed is None or chosen is None:
        z, kl, *squares = autograd.call(autograd.Latent, chosen, spec, inputs)
    else:
        z, kl, *squares = autograd.call_packed(chosen, spec, packed[1], packed[0], inputs)
    return z, kl * scale if traced and spec.want_kl else kl, *squares


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


@overload
def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | Number | None = None,
    prior_logvar: Tensor | Number | None = None,
    *,
    log_prob: Literal[False] = False,
    **options: Unpack[KLOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | Number | None = None,
    prior_logvar: Tensor | Number | None = None,
    *,
    log_prob: Literal[True],
    **options: Unpack[KLOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...


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
    log_prob: bool = False,
    logvar_clamp: Clamp | None = None,
    weight: Tensor | None = None,
    kl_balance: Number | None = None,
    free_bits: Number | None = None,
    free_bits_over: FreeBitsOver = "batch",
    capacity: Number | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Sample z and compute KL(N(mu, exp(logvar)) || prior) in one pass over mu and the spread.

    The two are those of `reparameterize` and `gaussian_kl`, whose arguments it takes; `logvar_clamp` bounds logvar for both, with
    zero gradient outside. The KL does not depend on `num_samples`.

    Args:
        log_prob: Return log q(z|x) too, the log density of each sample, summed over all but the batch dimensions: what a prior
            without a closed form takes in place of the KL. It is made of the noise, -(eps^2 + logvar + log 2 pi) / 2 for each
            latent, and so does not cancel; its gradient is the one along with z, in the spread alone. For `reduction="none"`.

    Returns:
        (z, kl), or with `log_prob` (z, kl, log_q). z is in mu's dtype, the others are in nats. All are differentiable in mu and the
        spread, kl in the prior too.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two sources of noise or two forms of a
            spread are given.
    """
    parameter, spread = arguments.posterior_spread(mu, logvar, logstd, std, var)
    prior = arguments.prior_spread(mu, parameter, prior_logvar, prior_logstd, prior_std, prior_var)
    inputs = arguments.posterior(mu, spread, prior_mu, prior, weight)
    objective = Objective(kl_balance, free_bits, free_bits_over, capacity)
    kl = _kl_of(inputs, reduction, batch_dims, logvar_clamp, parameter, objective)
    if log_prob and (reduction != "none" or free_bits is not None or not 0 <= plain(batch_dims) < mu.ndim):
        raise ValueError(
            "log_prob=True gives values of each sample: it takes reduction='none', fewer batch_dims than mu has dimensions, and no "
            f"free_bits, got {reduction!r}, {batch_dims} and {free_bits}"
        )
    samples: int | None = None if num_samples is None else plain(num_samples)
    noise = arguments.noise(mu, samples, eps, seed, generator)  # drawn when nothing is left that could be refused
    spec = Latent(kl, num_samples=samples, want_squares=bool(log_prob))
    z, value, *squares = reparameterised(LatentInputs(*inputs[:5], *noise), spec, impl)
    value = objective.of(value, inputs.weight, reduction, batch_dims)
    return (z, value, _log_prob(squares[0], inputs, kl)) if log_prob else (z, value)


_NO_OBJECTIVE = Objective()


def _kl_of(
    inputs: LatentInputs, reduction: Reduction, batch_dims: int, logvar_clamp: Any, parameter: str, objective: Objective
) -> KL:
    """Check the options of a KL, and return its record: that of each latent where some nats are free."""
    spec = arguments.kl_of(inputs, reduction, batch_dims, logvar_clamp, parameter)
    if objective == _NO_OBJECTIVE:
        return spec
    objective.check(reduction, inputs.weight)
    if objective.free_bits is not None:
        spec = spec._replace(keep=inputs.mu.ndim, scale=1.0)
    return spec._replace(balance=plain(objective.kl_balance))


def _log_prob(squares: Tensor, inputs: LatentInputs, spec: KL) -> Tensor:
    """log q of each sample, by the sums of its squared noise."""
    logvar = arguments.logvar_of(inputs.spread, spec.parameter, inputs.mu).to(squares.dtype)
    if spec.clamp is not None:
        logvar = torch.clamp(logvar, *spec.clamp)
    each = logvar + LOG_2PI
    if inputs.weight is not None:
        each = torch.where(inputs.weight == 0, 0.0, each) * inputs.weight
    return -0.5 * (squares + each.sum(tuple(range(spec.keep, each.ndim))))


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
    kl_balance: Number | None = None,
    free_bits: Number | None = None,
    free_bits_over: FreeBitsOver = "batch",
    capacity: Number | None = None,
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
        kl_balance: a of a KL between two learned distributions, whose value stays: the prior's gradient is a times its own, and the
            posterior's 1 - a times (Hafner et al. 2021, DreamerV2, algorithm 2, with a = 0.8).
        free_bits: Nats that each latent has for free: below them its KL counts as so many, with zero gradient (Kingma et al. 2016,
            equation 15). Of a latent that a mask leaves out nothing counts.
        free_bits_over: "batch" compares the mean over the batch of each latent's KL with them, as the paper does, and gives one
            value, for `reduction="batchmean"`; "sample" compares each KL.
        capacity: C of |KL - C|, taken of the reduced KL (Burgess et al. 2018, equation 8).
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
    objective = Objective(kl_balance, free_bits, free_bits_over, capacity)
    spec = _kl_of(inputs, reduction, batch_dims, logvar_clamp, parameter, objective)
    kl = reparameterised(inputs, Latent(spec), impl)[1]
    return objective.of(kl, inputs.weight, reduction, batch_dims)


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
