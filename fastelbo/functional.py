"""What stands after the decoder: check the arguments, make the records, call autograd.

Conventions of every function here. Tensors are `(batch, ...)` of any rank. Losses are in nats, in float32 (float64 if any input
is). Half precision is widened before any arithmetic. No input is written to. Gradients have their input's dtype and shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import arguments, autograd, backend, checks
from .dtypes import accumulate_dtype, plain
from .optimal import Optimum, optimum
from .specs import Backend, Elbo, ElboInputs, Likelihood, NLLInputs
from .tracing import one_node
from .types import Clamp, ElboOptions, Family, Impl, Number, Reduction

if TYPE_CHECKING:
    from typing_extensions import Unpack


def nll_of(inputs: NLLInputs, spec: Likelihood, impl: Impl | None) -> Tensor:
    """The negative log-likelihood of checked inputs."""
    chosen = backend.choose(impl, inputs.recon.device, not inputs.recon.numel())
    if torch.compiler.is_compiling():
        (nll,) = autograd.call(autograd.NLL, chosen, spec._replace(scale=1.0), inputs)
        return nll * spec.scale
    (nll,) = autograd.call(autograd.NLL, chosen, spec, inputs)
    return nll


def observed(
    family: str, tensors: tuple[Any, Any], spread: tuple[str, str, Any], full: bool, weight: Any, reduction: Reduction,
    batch_dims: int, image: tuple[Any, Any], impl: Impl | None, name: str = "recon", zi_logits: Tensor | None = None,
    bins: tuple[Any, Any, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Check the arguments of a negative log-likelihood, and return it.

    `tensors` are recon, which the user knows by `name`, and x; `spread` is a name, what it holds, and a value. `zi_logits` have
    recon's shape already. `bins` are those of x: how many, and the centres of the first and the last.
    """
    recon = tensors[0]
    x = arguments.below_samples(tensors[1], recon)
    is_image = checks.image(x, *image)
    checks.pair(name, recon, "x", x, is_image=is_image)
    variance, parameter, number = arguments.variance(*spread, recon, name)
    if weight is not None:
        weight = arguments.weight_of("weight", weight, name, recon)
    keep = checks.kept_dims(reduction, batch_dims, recon.ndim)
    scale = arguments.scale_of(reduction, batch_dims, recon.shape, weight, (recon, x, variance, zi_logits))
    spec = Likelihood(keep, scale, parameter, number, bool(full), family=family)
    if is_image:
        spec = arguments.of_image(spec, *image, accumulate_dtype(recon, variance, zi_logits))
    if bins is not None:
        spec = spec._replace(bin=arguments.bin_of(*bins, accumulate_dtype(recon, x, variance)))
    return nll_of(NLLInputs(recon, x, variance, zi_logits, weight), spec, impl)


@one_node
def gaussian_nll(
    recon: Tensor,
    x: Tensor,
    *,
    logvar: Tensor | Number | None = None,
    std: Tensor | Number | None = None,
    var: Tensor | Number | None = None,
    full: bool = True,
    weight: Tensor | None = None,
    reduction: Reduction = "none",
    batch_dims: int = 1,
    x_scale: Number | None = None,
    x_shift: Number | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """-log N(x; recon, var) of a diagonal Gaussian, in nats: Kingma & Welling 2014, appendix C.2.

    Args:
        recon: Means, of any shape and floating dtype.
        x: Data, of recon's shape, or of recon's shape without its first dimension, which holds samples: x is not copied then. An
            image in torch.uint8 is read as it is, see `x_scale`.
        logvar, std, var: The variance, in at most one of three forms: a number, or a tensor (0-d, per channel, per sample, per
            element) that broadcasts to recon. With none of them it is 1. Tensors are not checked for sign.
        full: Include the constant (1/2) log 2 pi per element, so that the value is the likelihood's.
        weight: A bool mask or weights that broadcast to recon; a constant. Where it is 0 the element is absent: a NaN under it
            reaches neither loss nor gradient. A "mean" over nothing, as under a mask that is all False, is NaN.
        reduction: "none" sums all but the first `batch_dims` dimensions; "batchmean" is the mean of those sums over the batch;
            "sum" sums everything; "mean" divides by the number of elements, or by the sum of the weights.
        batch_dims: How many leading dimensions are the batch. With "none" and `batch_dims=recon.ndim` nothing is summed.
        x_scale, x_shift: A uint8 x counts as x * x_scale + x_shift (1 / 255 and 0 for values in [0, 1], 1 / 127.5 and -1
            for [-1, 1]), rounded once, and no float copy of it is in memory. Numbers; not for an x of another dtype.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The negative log-likelihood, differentiable in recon, x and a tensor variance (whose gradient has its own shape). It is
        a density's, so it can be negative.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or two forms of variance are given.
    """
    given = {k: v for k, v in (("logvar", logvar), ("std", std), ("var", var)) if v is not None}
    if len(given) > 1:
        raise ValueError(f"give at most one of logvar, std and var, got {' and '.join(given)}")
    form, value = next(iter(given.items()), ("logvar", None))
    spread, image = (form, form, value), (x_scale, x_shift)
    return observed("gaussian", (recon, x), spread, full, weight, reduction, batch_dims, image, impl)


class _Call(NamedTuple):
    """What elbo_loss and elbo_terms share."""

    tensors: tuple[Any, ...]  # recon, x, mu, logvar
    family: Family
    spreads: tuple[Any, Any]  # recon_logvar, recon_logscale
    prior: tuple[Any, Any]
    weights: tuple[Any, Any]
    scales: tuple[Any, Any]  # of nll, of kl
    image: tuple[Any, Any]
    full: bool
    logvar_clamp: Any
    reduction: Reduction
    batch_dims: int


def _elbo(call: _Call) -> tuple[ElboInputs, Elbo, Optimum | None]:
    """Check it, and return it as records."""
    name, spread = arguments.spread_of(call.family, *call.spreads)
    (recon, x, mu, logvar), (weight, kl_weight), batch_dims = call.tensors, call.weights, plain(call.batch_dims)
    is_optimal = isinstance(spread, str) and spread == "optimal" and call.family == "gaussian"
    samples = 1
    if arguments.below_samples(x, recon) is not x:
        checks.kept_dims(call.reduction, batch_dims, recon.ndim - 1)
        samples = recon.shape[0]
        recon, x, spread, weight = arguments.samples_within(batch_dims, recon, x, spread, weight)
    is_image = checks.image(x, *call.image)
    checks.pair("recon", recon, "x", x, is_image=is_image)
    checks.pair("mu", mu, "logvar", logvar, recon.device)
    if not recon.ndim or not mu.ndim:
        raise ValueError(f"{'mu' if recon.ndim else 'recon'} must have a batch dimension, got a 0-d tensor")
    keep = checks.kept_dims(call.reduction, batch_dims, min(recon.ndim, mu.ndim))
    if recon.shape[:batch_dims] != mu.shape[:batch_dims]:
        (of_mu, of_recon), which = (", ".join(map(str, t.shape[:batch_dims])) for t in (mu, recon)), "the first dimension"
        which = f"{which} of all inputs is" if batch_dims == 1 else f"the first {batch_dims} dimensions of all inputs are"
        raise ValueError(f"mu has a batch of {of_mu}, but recon has {of_recon}: {which} the batch")
    variance, _, number = arguments.variance(name, "logvar", None if is_optimal else spread, recon)
    if weight is not None:
        weight = arguments.weight_of("weight", weight, "recon", recon)
    latent = arguments.posterior(mu, logvar, call.prior[0], ("prior_logvar", call.prior[1]), kl_weight, "kl_weight")
    inputs = ElboInputs(recon, x, variance, *latent[:4], weight, latent.weight)
    of_nll, of_kl = [
        arguments.term_scale(which, value, inputs[:7], recon.device)
        for which, value in zip(("nll_scale", "kl_scale"), call.scales, strict=True)
    ]
    kl = arguments.kl_of(latent, call.reduction, batch_dims, call.logvar_clamp)
    if call.scales[1] is not None:
        kl = kl._replace(scale=kl.scale * of_kl)
    scale = arguments.scale_of(call.reduction, batch_dims, recon.shape, weight, inputs[:7])
    if call.reduction != "mean":
        scale = scale / samples
    spec = Likelihood(keep, scale * of_nll, logvar=number, full=bool(call.full), family=call.family)
    if is_image:
        spec = arguments.of_image(spec, *call.image, accumulate_dtype(*inputs[:7]))
    optimal = None
    if is_optimal:
        optimal = optimum(recon.shape, keep, weight, spec.scale, spec.full, accumulate_dtype(*inputs[:7]))
        spec = spec._replace(scale=1.0, full=False)
    return inputs, Elbo(spec, kl), optimal


def _terms(chosen: Backend | None, spec: Elbo, inputs: ElboInputs, optimal: Optimum | None) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        nll, kl = autograd.call(autograd.ElboTerms, chosen, spec, inputs)
        return nll if optimal is None else optimal.nll(nll), kl
    unscaled = spec._replace(likelihood=spec.likelihood._replace(scale=1.0), kl=spec.kl._replace(scale=1.0))
    nll, kl = autograd.call(autograd.ElboTerms, chosen, unscaled, inputs)
    return nll * spec.likelihood.scale if optimal is None else optimal.nll(nll), kl * spec.kl.scale


@one_node
def elbo_terms(
    recon: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    likelihood: Family = "gaussian",
    recon_logvar: Tensor | Number | Literal["optimal"] | None = None,
    recon_logscale: Tensor | Number | None = None,
    prior_mu: Tensor | Number | None = None,
    prior_logvar: Tensor | Number | None = None,
    full: bool = True,
    logvar_clamp: Clamp | None = None,
    weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    nll_scale: Tensor | Number | None = None,
    kl_scale: Tensor | Number | None = None,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
    x_scale: Number | None = None,
    x_shift: Number | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """The two terms of the negative ELBO, each differentiable by itself: (nll, kl).

    `elbo_loss` with the same arguments is `nll + beta * kl`. Use this where the terms are logged, weighted or scheduled apart.
    See `elbo_loss` for the arguments; with "none" both terms are `(batch,)`.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """
    call = _Call(
        (recon, x, mu, logvar), likelihood, (recon_logvar, recon_logscale), (prior_mu, prior_logvar), (weight, kl_weight),
        (nll_scale, kl_scale), (x_scale, x_shift), full, logvar_clamp, reduction, batch_dims,
    )  # fmt: skip
    inputs, spec, optimal = _elbo(call)
    return _terms(backend.choose(impl, recon.device, not (recon.numel() and mu.numel())), spec, inputs, optimal)


@overload
def elbo_loss(
    recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, *, return_terms: Literal[False] = False, **options: Unpack[ElboOptions]
) -> Tensor: ...


@overload
def elbo_loss(
    recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, *, return_terms: Literal[True], **options: Unpack[ElboOptions]
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def elbo_loss(
    recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, *, return_terms: bool, **options: Unpack[ElboOptions]
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...


@one_node
def elbo_loss(
    recon: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
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
    nll_scale: Tensor | Number | None = None,
    kl_scale: Tensor | Number | None = None,
    reduction: Reduction = "batchmean",
    batch_dims: int = 1,
    return_terms: bool = False,
    x_scale: Number | None = None,
    x_shift: Number | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The negative ELBO of a VAE, -log p(x; recon) + beta * KL(N(mu, exp(logvar)) || prior), in nats, with p a Gaussian by default.

    Kingma & Welling 2014, equation 10 with one sample (`sgvb_loss` takes more). The gradients are written in the pass that reads
    the inputs, so a training step reads and writes the least that it can.

    Args:
        recon: The decoder's mean (its logits, if `likelihood` is "bernoulli"), `(batch, ...)`; or one for each of L samples of z,
            `(L, batch, ...)`, over which the likelihood is averaged (equation 10 with L samples).
        x: Data, `(batch, ...)`; an image may be in torch.uint8, see `x_scale`.
        mu: Means of the posterior, `(batch, ...)`, with any latent shape.
        logvar: Log-variances of the posterior, of mu's shape.
        likelihood: "gaussian"; "laplace", whose nll is that of `laplace_nll`; or "bernoulli", whose nll is that of `bernoulli_nll`.
        recon_logvar: Log-variance of a Gaussian likelihood: None is unit variance; a number; or a tensor, learned or not, that
            broadcasts to recon (0-d, per channel, per dimension, per sample, per element). "optimal" is the one value that is most
            likely for the batch, the logarithm of the mean square, with the gradient through it (Rybkin et al. 2021, sigma-VAE,
            section 3.2); where recon is x throughout it is -inf.
        recon_logscale: Logarithm of the scale of a Laplace likelihood, likewise.
        prior_mu, prior_logvar: The prior: numbers or tensors that broadcast to mu; None is 0. They may be learned.
        beta: Weight of the KL: a number, or a tensor of one value or of one for each sample, `(batch,)`, learned or not. A run-time
            value: changing it does not synchronise, and torch.compile compiles once more, at most, when a number changes first.
        full: Include the constant (1/2) log 2 pi per element, so that the value is in nats.
        logvar_clamp: (lo, hi) to clamp logvar to, with zero gradient outside; None for one of the two is no bound.
        weight: A bool mask or weights of the likelihood terms, broadcastable to recon; a constant. Where it is 0 the element is
            absent, NaN or not.
        kl_weight: The same of the KL's terms, broadcastable to mu, as for the steps of a sequence.
        nll_scale, kl_scale: What each term is multiplied by after its reduction: a number or a constant tensor of one value, such
            as 1 / mask.sum(); None is 1.
        reduction: "batchmean" is the mean over samples of the per-sample loss (the ELBO's own convention); "none" is per sample,
            `(batch,)`; "sum" sums everything; "mean" averages each term over its own elements (or weights), which makes the
            effective beta depend on the sizes: see `effective_beta`.
        batch_dims: How many leading dimensions of recon and mu are the batch, as of sequences `(batch, steps, ...)`. With more than
            one, beta is one value.
        return_terms: Return (loss, nll, kl), the two terms reduced likewise, without gradient and without beta, for logging.
        x_scale, x_shift: What a uint8 x counts as, x * x_scale + x_shift, as in `gaussian_nll`.
        impl: None or "auto", "triton", "torch", "reference".

    Returns:
        The loss, differentiable in recon, x, mu, logvar, recon_logvar, the prior and beta.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
    """
    call = _Call(
        (recon, x, mu, logvar), likelihood, (recon_logvar, recon_logscale), (prior_mu, prior_logvar), (weight, kl_weight),
        (nll_scale, kl_scale), (x_scale, x_shift), full, logvar_clamp, reduction, batch_dims,
    )  # fmt: skip
    inputs, spec, optimal = _elbo(call)
    factor = arguments.factor("beta", beta, inputs[:7], recon.device, mu.shape[0] if plain(batch_dims) == 1 else 1)
    chosen = backend.choose(impl, recon.device, not (recon.numel() and mu.numel()))
    # Per-sample losses meet upstream gradients that vary by row, a trace keeps no state, and beta may want a gradient: all these go
    # through the terms.
    by_terms = reduction == "none" or torch.compiler.is_compiling() or not arguments.is_constant(factor)
    if by_terms or optimal is not None:
        nll, kl = _terms(chosen, spec._replace(kl=arguments.before_beta(factor, spec.kl)), inputs, optimal)
        weighed, kl = arguments.weighed(factor, kl, spec.kl)
        loss = nll + weighed
        return (loss, nll.detach(), kl.detach()) if return_terms else loss
    spec = Elbo(spec.likelihood, spec.kl, factor, bool(return_terms))
    outputs = autograd.call(autograd.Elbo, chosen, spec, inputs)
    return outputs if return_terms else outputs[0]
