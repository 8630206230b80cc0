"""Whole estimators, decoder included, and the beta that a hand-written one has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import arguments, checks
from .densities import gaussian_log_prob
from .dtypes import accumulate_dtype, plain
from .functional import observed
from .latent import reparameterize_kl
from .optimal import optimum
from .tracing import is_transformed, one_node
from .types import Clamp, Family, Impl, Int, Number, Objective, Reduction, Seed, SgvbOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


# A single node for Dynamo, as the public functions are.
_observed = one_node(observed)

Decoder = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


@overload
def sgvb_loss(
    decoder: Decoder, x: Tensor, mu: Tensor, logvar: Tensor, *, return_terms: Literal[False] = False, **options: Unpack[SgvbOptions]
) -> Tensor: ...


@overload
def sgvb_loss(
    decoder: Decoder, x: Tensor, mu: Tensor, logvar: Tensor, *, return_terms: Literal[True], **options: Unpack[SgvbOptions]
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def sgvb_loss(
    decoder: Decoder, x: Tensor, mu: Tensor, logvar: Tensor, *, return_terms: bool, **options: Unpack[SgvbOptions]
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...


def sgvb_loss(
    decoder: Decoder,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    objective: Objective = "elbo",
    num_samples: Int = 1,
    likelihood: Family = "gaussian",
    recon_logvar: Tensor | Number | Literal["optimal"] | None = None,
    recon_logscale: Tensor | Number | None = None,
    prior_mu: Tensor | Number | None = None,
    prior_logvar: Tensor | Number | None = None,
    beta: Tensor | Number = 1.0,
    full: bool = True,
    logvar_clamp: Clamp | None = None,
    weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    x_scale: Number | None = None,
    x_shift: Number | None = None,
    reduction: Reduction = "batchmean",
    return_terms: bool = False,
    eps: Tensor | None = None,
    seed: Seed | None = None,
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The SGVB estimate of the negative ELBO, -(1/L) sum_l log p(x|z_l) + beta * KL: Kingma & Welling 2014, equation 10.

    Samples z and computes the KL in one pass, calls the decoder once on all samples, and evaluates the likelihood in another pass.

    With `objective="iwae"` it is the negative importance-weighted bound, -log (1/L) sum_l w_l with w_l = p(x|z_l) p(z_l) / q(z_l|x)
    (Burda et al. 2016, equation 8): it takes the KL at the samples and not in closed form. "dreg" has its value, and the doubly
    reparameterised gradient in the posterior (Tucker et al. 2019, equation 8), whose signal-to-noise ratio does not fall with L.

    Args:
        decoder: Maps z of shape `(num_samples * batch, ...)` to recon, or to (recon, recon_logvar), of shape
            `(num_samples * batch, *x.shape[1:])`; a returned recon_logvar may also be anything that broadcasts to that. With
            `likelihood="laplace"` the second is recon_logscale, and with "bernoulli" recon is the logits.
        x: Data, `(batch, ...)`.
        mu, logvar: The posterior, `(batch, ...)`.
        objective: "elbo", "iwae" or "dreg". A beta multiplies log q(z) - log p(z) in the weights of the last two. "dreg" needs an
            ordinary backward pass: neither a transform of torch.func nor torch.compile.
        num_samples: L, samples of z per data point.
        recon_logvar, recon_logscale: The spread of the likelihood where the decoder returns none, as in `elbo_loss`. An "optimal"
            one is that of all samples together.
        eps, seed, generator: The noise, as in `reparameterize`. eps has the shape `(L, *mu.shape)`; for L = 1 mu's shape will do.
        likelihood, prior_mu, prior_logvar, beta, full, logvar_clamp: As in `elbo_loss`.
        weight, kl_weight, x_scale, x_shift, reduction, return_terms, impl: As in `elbo_loss`.

    Returns:
        The loss in nats, reduced over the batch as in `elbo_loss` and averaged over the samples; with `return_terms`
        (loss, nll, kl), the terms without gradient; of "iwae" and "dreg" these are means over the samples, and kl the one at them.

    Raises:
        TypeError, ValueError: An argument, or what the decoder returned, has the wrong type, dtype, shape or device.
    """
    name, spread = arguments.spread_of(likelihood, recon_logvar, recon_logscale)
    checks.tensor("x", x, is_image=checks.image(x, x_scale, x_shift))
    count: int = plain(num_samples)
    checks.samples(count)
    if not callable(decoder):
        raise TypeError(f"decoder must be callable, got {type(decoder).__name__}")
    if eps is not None:
        checks.tensor("eps", eps, x.device)
    checks.kept_dims(reduction, 1, 1)
    checks.tensor("mu", mu, x.device)
    if x.ndim == 0 or mu.ndim == 0 or x.shape[0] != mu.shape[0]:
        raise ValueError(f"x has shape {tuple(x.shape)} and mu {tuple(mu.shape)}: their first dimensions, the batch, must be equal")
    factor = arguments.factor("beta", beta, (x, mu, logvar), x.device, x.shape[0])
    if weight is not None:
        weight = arguments.weight_of("weight", weight, "x", x)
    if kl_weight is not None:
        kl_weight = arguments.weight_of("kl_weight", kl_weight, "mu", mu)
    if count == 1 and (eps is None or eps.shape == mu.shape):
        samples = None  # the same noise as one call of `reparameterize`
    else:
        samples = count
    decoding = _Decoding(decoder, x, samples, likelihood, (name, "logvar", spread), full, weight, (x_scale, x_shift), impl)
    noise: dict[str, Any] = {"num_samples": samples, "eps": eps, "seed": seed, "generator": generator, "weight": kl_weight}
    if objective != "elbo":
        posterior = mu, logvar, prior_mu, prior_logvar, logvar_clamp
        terms = _importance_weighted(objective, decoding, posterior, noise, factor, reduction)
        return (terms[0], terms[1].detach(), terms[2].detach()) if return_terms else terms[0]
    each = arguments.is_per_sample(factor) and reduction != "none"
    z, kl = reparameterize_kl(
        mu, logvar, prior_mu, prior_logvar, logvar_clamp=logvar_clamp, reduction="none" if each else reduction, impl=impl, **noise
    )
    nll = decoding.nll(z, reduction)
    if reduction == "none":
        nll = nll.mean(0)
    elif reduction == "sum":
        nll = nll / count
    weighed = factor * kl
    if each:
        scale = arguments.scale_of(reduction, 1, mu.shape, kl_weight, (mu, logvar))
        weighed, kl = weighed.sum() * scale, kl.sum() * scale
    loss = nll + weighed
    return (loss, nll.detach(), kl.detach()) if return_terms else loss


class _Decoding(NamedTuple):
    """What makes a likelihood of samples."""

    decoder: Decoder
    x: Tensor
    samples: int | None  # None: one, without a dimension of its own
    likelihood: Family
    spread: tuple[str, str, Any]  # its name, what it holds, and its value
    full: bool
    weight: Tensor | None
    image: tuple[Any, Any]
    impl: Impl | None

    def nll(self, z: Tensor, reduction: Reduction) -> Tensor:
        """Of the samples z, each by itself for "none", `(samples, batch)`: decoded at once, and checked."""
        x, likelihood, count, (name, holds, spread) = self.x, self.likelihood, self.samples or 1, self.spread
        out = self.decoder(z if self.samples is None else z.flatten(0, 1))
        if isinstance(out, tuple):
            if likelihood == "bernoulli":
                raise ValueError(f"decoder(z) must be the logits for likelihood='bernoulli', got a tuple of {len(out)}")
            if spread is not None:
                raise ValueError(f"{name} is given, but the decoder returns one too")
            if len(out) != 2:
                raise ValueError(f"decoder(z) must be recon or (recon, {name}), got a tuple of {len(out)}")
            recon, spread = out
        else:
            recon = out
        checks.tensor("decoder(z)", recon, x.device)
        expected = (count * x.shape[0], *x.shape[1:])
        if tuple(recon.shape) != expected:
            raise ValueError(f"decoder(z) has shape {tuple(recon.shape)}, but (num_samples * batch, *x.shape[1:]) is {expected}")
        # Samples become a leading dimension, over which x and the weights are read again and not copied.
        lead = (count, *x.shape)
        if isinstance(spread, Tensor) and spread.ndim == recon.ndim and spread.shape[0] == expected[0]:
            spread = spread.view(count, x.shape[0], *spread.shape[1:])
        both, options = (recon.view(lead), x.expand(lead)), (2, self.image, self.impl)
        if not (isinstance(spread, str) and spread == "optimal" and likelihood == "gaussian"):
            return _observed(likelihood, both, (name, holds, spread), self.full, self.weight, reduction, *options)
        half_squares = _observed(likelihood, both, (name, holds, None), False, self.weight, "none", *options)
        acc = accumulate_dtype(recon, x)
        nll = optimum(both[0].shape, 2, self.weight, 1.0, self.full, acc).nll(half_squares)
        return nll if reduction == "none" else nll.sum() * arguments.scale_of(reduction, 2, both[0].shape, self.weight, both)


def _importance_weighted(
    objective: str, decoding: _Decoding, posterior: tuple[Any, ...], noise: dict[str, Any], factor: Any, reduction: Reduction
) -> tuple[Tensor, Tensor, Tensor]:
    """The negative bound, and the means over the samples of nll and of log q(z) - log p(z), all reduced.

    With w = p(x, z) / q(z|x) and u_l = w_l / sum of w, the gradient of log mean w is that of sum u_l log w_l for constant u_l. The
    doubly reparameterised one takes q's parameters in log w for constant, and multiplies what comes through z by u_l once more.
    """
    if objective not in ("iwae", "dreg"):
        raise ValueError(f"objective must be one of 'elbo', 'iwae', 'dreg', got {objective!r}")
    if reduction == "mean":
        raise ValueError(f"reduction must be 'batchmean', 'sum' or 'none' for objective={objective!r}, got 'mean'")
    if objective == "dreg" and (torch.compiler.is_compiling() or is_transformed()):
        raise ValueError("objective='dreg' needs an ordinary backward pass, and torch.compile and torch.func have none: use 'iwae'")
    mu, logvar, prior_mu, prior_logvar, clamp = posterior
    impl = decoding.impl
    z, _, log_q = reparameterize_kl(mu, logvar, logvar_clamp=clamp, log_prob=True, impl=impl, **noise)
    at_z: dict[str, Any] = {"weight": noise["weight"], "batch_dims": z.ndim - mu.ndim + 1, "impl": impl}
    if objective == "dreg":
        held = logvar.detach() if clamp is None else torch.clamp(logvar.detach(), *checks.clamp(clamp))
        log_q = gaussian_log_prob(z, mu.detach(), held, **at_z)
    kl = log_q - gaussian_log_prob(z, prior_mu, prior_logvar, **at_z)
    kl = kl[None] if decoding.samples is None else kl
    nll = decoding.nll(z, "none")
    log_w = -(nll + factor * kl)
    if objective == "dreg" and z.requires_grad:
        share = torch.softmax(log_w.detach(), 0).to(z.dtype).view(*z.shape[: z.ndim - mu.ndim + 1], *(1,) * (mu.ndim - 1))
        z.register_hook(lambda gradient: gradient * share)
    # Logsumexp's own gradient is exp(log_w - its value): beside a large value the rounding of that moves every weight.
    most = torch.nan_to_num(log_w.detach().amax(0), nan=0.0, posinf=0.0, neginf=0.0)
    loss = math.log(decoding.samples or 1) - (torch.logsumexp(log_w - most, 0) + most)
    terms = loss, nll.mean(0), kl.mean(0)
    if reduction == "none":
        return terms
    scale = arguments.scale_of(reduction, 1, mu.shape)
    loss, nll, kl = (t.sum() * scale for t in terms)
    return loss, nll, kl


def effective_beta(
    kl_weight: float,
    *,
    elements: int,
    latents: int | None = None,
    recon_reduction: Reduction = "mean",
    kl_reduction: Reduction = "batchmean",
    variance: float = 1.0,
    batch_size: int | None = None,
) -> float:
    """The beta of the beta-VAE that `mse(recon, x, recon_reduction) + kl_weight * KL(kl_reduction)` really trains.

    With a fixed variance s^2, -log p(x|z) = SSE / (2 s^2) + const, so any such loss is, up to a factor, SSE / (2 s^2) + beta * KL.
    `mse(reduction="mean") + w * KL(batchmean)` is beta = w * D / 2 at s^2 = 1; `mse(reduction="sum") + KL(sum)` is the ELBO at
    s^2 = 1/2.

    Args:
        kl_weight: The factor of the KL in that loss.
        elements: D, elements of x per sample.
        latents: J, latents per sample; needed for `kl_reduction="mean"`.
        recon_reduction: How the squared error is reduced: "mean" (over everything), "batchmean" or "sum".
        kl_reduction: How the KL is reduced, likewise.
        variance: s^2, the fixed variance of the likelihood that the loss is read with.
        batch_size: B; needed where one term is summed over the batch and the other averaged.

    Raises:
        ValueError: A reduction is unknown, a size that it needs is missing, or a size or variance is not positive.
    """
    for name, value in (("recon_reduction", recon_reduction), ("kl_reduction", kl_reduction)):
        if value not in checks.REDUCTIONS[1:]:
            raise ValueError(f"{name} must be one of 'batchmean', 'sum', 'mean', got {value!r}")
    if kl_reduction == "mean" and latents is None:
        raise ValueError("latents is needed for kl_reduction='mean'")
    mixed = (recon_reduction == "sum") != (kl_reduction == "sum")
    if mixed and batch_size is None:
        raise ValueError("batch_size is needed where one reduction is 'sum' and the other is not")
    for name, size in (("elements", elements), ("latents", latents), ("variance", variance), ("batch_size", batch_size)):
        if size is not None and not size > 0:
            raise ValueError(f"{name} must be positive, got {size}")
    batch = batch_size or 1
    squares_over = {"sum": 1, "batchmean": batch, "mean": batch * elements}[recon_reduction]
    kl_over = {"sum": 1, "batchmean": batch, "mean": batch * (latents or 1)}[kl_reduction]
    return kl_weight * squares_over / (2 * variance * kl_over)
