"""The equations, line by line, in differentiable PyTorch: the oracle of every test.

Nothing here is fast or fused. Run in float64 it is the truth that the backends are held to; in the caller's dtype it is
`impl="reference"`, and it is what double backward (`create_graph=True`) differentiates, where an expression that autograd
can take apart again is worth more than speed. Half precision is widened before any arithmetic.

Source: [KW14] Kingma & Welling 2014, "Auto-Encoding Variational Bayes": equation 10, section 2.4, appendices B and C.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import LOG_2PI, OPEN, accumulate_dtype, image
from .noise import sample_noise
from .specs import (
    COUNTS,
    KL,
    Elbo,
    ElboInputs,
    Latent,
    LatentInputs,
    Likelihood,
    Linear,
    LinearElbo,
    LinearElboInputs,
    LinearInputs,
    NLLInputs,
)

# ---- per element -----------------------------------------------------------------------------------------------------------------


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mu + sigma * eps, eps ~ N(0, I) ([KW14] section 2.4)."""
    return mu + torch.exp(0.5 * logvar) * eps


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(x; mean, exp(logvar)) per element, in nats ([KW14] appendix C.2).

    The log-determinant of a diagonal covariance is the sum of the *log* variances, hence `logvar` and not `exp(logvar)`.
    """
    return -0.5 * (LOG_2PI + logvar + ((x - mean) * torch.exp(-0.5 * logvar)) ** 2)


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """-log Bernoulli(x; sigmoid(logits)) per element, in nats ([KW14] appendix C.1), for x from 0 to 1.

    As log(1 + e^m) = m + log(1 + e^-m), it is a sum of two terms that are never negative.
    """
    zero = torch.zeros_like(logits)
    return x * torch.logaddexp(-logits, zero) + (1 - x) * torch.logaddexp(logits, zero)


def counts_nll(mean: Tensor, x: Tensor, theta: Tensor | None, zi_logits: Tensor | None, full: bool) -> Tensor:
    """-log of Poisson(x; mean), of NB(x; mean, theta), or of that with zeros added, per element, in nats (Lopez et al. 2018)."""
    if theta is None:
        nll = mean - torch.xlogy(x, mean)
    else:
        total = torch.log(mean + theta)
        nll = theta * torch.log1p(mean / theta) + x * total - torch.xlogy(x, mean)
        nll = nll + torch.lgamma(theta) - torch.lgamma(x + theta)
    if zi_logits is not None:
        inflated = torch.logaddexp(zi_logits, torch.zeros_like(zi_logits))
        nll = inflated + torch.where(x == 0, -torch.logaddexp(zi_logits, -nll), nll)
    return nll + torch.lgamma(x + 1) if full else nll


def discretized_logistic_terms(recon: Tensor, x: Tensor, logscale: Tensor, bin: tuple[float, float, float]) -> list[Tensor]:
    """Terms per element, in nats and never negative, whose sum is -log of a logistic distribution's mass in the bin around x.

    Salimans et al. 2017, "PixelCNN++", section 2.1. With the edges a and b of the bin in units of the scale, and w = a - b,

        sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^-w)        -log(1 - e^-w) = log(1 + e^-w / (1 - e^-w))
    """
    half, first, last = bin
    inverse = torch.exp(-logscale)
    a = torch.where(x > last, OPEN, (x - recon + half) * inverse)
    b = torch.where(x < first, -OPEN, (x - recon - half) * inverse)
    w = 2 * half * inverse
    of_width = torch.log1p(torch.exp(-w) / -torch.expm1(-w))
    return [-F.logsigmoid(a), -F.logsigmoid(-b), torch.where((x < first) | (x > last), 0.0, of_width)]


def gaussian_kl(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))) per element, in nats ([KW14] appendix B is the N(0, 1) case).

    With v = logvar - prior_logvar: 1/2 [ (mu - prior_mu)^2 / prior_var + (e^v - 1) - v ].
    """
    v = logvar - prior_logvar
    return 0.5 * (((mu - prior_mu) * torch.exp(-0.5 * prior_logvar)) ** 2 + (torch.expm1(v) - v))


def sgvb(x: Tensor, means: Tensor, logvars: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The ELBO of each x, estimated with L samples, whose decoded means and logvars lie along dimension 0 ([KW14] equation 10)."""
    likelihood = gaussian_log_prob(x, means, logvars).flatten(2).sum(-1).mean(0)
    zero = torch.zeros_like(mu)
    return likelihood - gaussian_kl(mu, logvar, zero, zero).flatten(1).sum(-1)


# ---- weighed and summed ----------------------------------------------------------------------------------------------------------


def present(weight: Tensor | None, *tensors: Tensor) -> Sequence[Tensor]:
    """Replace what lies under a weight of 0 *before* any arithmetic: masking afterwards leaves 0 * NaN in the gradients."""
    return tensors if weight is None else [torch.where(weight == 0, torch.zeros_like(t), t) for t in tensors]


def _reduce(terms: Tensor, weight: Tensor | None, keep: int) -> Tensor:
    """Weigh, then sum all but the first `keep` dimensions."""
    if weight is not None:
        terms = terms * weight
        terms = torch.where(weight == 0, torch.zeros_like(terms), terms)
    dims = tuple(range(keep, terms.ndim))
    return terms.sum(dims) if dims else terms


def nll(inputs: NLLInputs, spec: Likelihood) -> Tensor:
    recon, x, variance, zi_logits, weight = inputs
    acc = accumulate_dtype(*inputs[:4])
    recon, x = recon.to(acc), image(x, spec.x_scale, spec.x_shift, acc)
    if variance is None:
        given = torch.full((), spec.logvar, dtype=acc, device=recon.device)
    else:
        given = variance.to(acc)
    recon, x, given = present(weight, recon, x, given.expand(recon.shape)) if weight is not None else (recon, x, given)
    if spec.family == "bernoulli":
        return spec.scale * _reduce(bernoulli_nll(recon, x), weight, spec.keep)
    if spec.family in COUNTS:
        mean, theta = (t if weight is None else torch.where(weight == 0, 1.0, t) for t in (recon, given))
        logits = None if zi_logits is None else present(weight, zi_logits.to(acc))[0]
        terms = counts_nll(mean, x, None if variance is None else theta, logits, spec.full)
        return spec.scale * _reduce(terms, weight, spec.keep)
    if spec.family == "laplace":
        root = torch.exp(-0.5 * given)
        terms = (recon - x).abs() * root * root + given + (math.log(2.0) if spec.full else 0.0)
        return spec.scale * _reduce(terms, weight, spec.keep)
    if spec.family == "discretized_logistic":
        assert spec.bin is not None
        a, b, of_width = discretized_logistic_terms(recon, x, given, spec.bin)
        return spec.scale * _reduce(a + b + of_width, weight, spec.keep)
    if spec.parameter == "var":
        given = given.clone()
        with torch.no_grad():
            given.clamp_(min=spec.floor)
        if weight is not None:
            given = torch.where(weight == 0, torch.ones_like(given), given)
        logvar, square = torch.log(given), (recon - x) ** 2 / given
    elif spec.parameter == "std":
        if weight is not None:
            given = torch.where(weight == 0, torch.ones_like(given), given)
        logvar, square = 2 * torch.log(given), ((recon - x) / given) ** 2
    else:
        logvar, square = given, ((recon - x) * torch.exp(-0.5 * given)) ** 2
    terms = 0.5 * (logvar + square) + (0.5 * LOG_2PI if spec.full else 0.0)
    return spec.scale * _reduce(terms, weight, spec.keep)


def logvar_of(spread: Tensor, spec: KL, weight: Tensor | None = None) -> Tensor:
    """The log-variance of a posterior or a prior whose spread is given in any form; that of what is absent is 0."""
    if spec.parameter in ("std", "var"):
        if weight is not None:
            spread = torch.where(weight == 0, torch.ones_like(spread), spread)
        spread = torch.log(spread)
    (spread,) = present(weight, spread)
    return spread if spec.parameter in ("logvar", "var") else 2.0 * spread


def kl(inputs: LatentInputs, spec: KL) -> Tensor:
    acc, weight = accumulate_dtype(*inputs[:4]), inputs.weight
    mu, logvar = inputs.mu.to(acc), logvar_of(inputs.spread.to(acc), spec, weight)
    prior_mu = torch.zeros_like(mu) if inputs.prior_mu is None else inputs.prior_mu.to(acc)
    prior_logvar = torch.zeros_like(mu) if inputs.prior_spread is None else logvar_of(inputs.prior_spread.to(acc), spec, weight)
    mu, prior_mu = present(weight, mu, prior_mu)
    if spec.clamp is not None:
        logvar = torch.clamp(logvar, *spec.clamp)
    if spec.balance is None:
        terms = gaussian_kl(mu, logvar, prior_mu, prior_logvar)
    else:
        of_prior = gaussian_kl(mu.detach(), logvar.detach(), prior_mu, prior_logvar)
        of_posterior = gaussian_kl(mu, logvar, prior_mu.detach(), prior_logvar.detach())
        terms = spec.balance * of_prior + (1 - spec.balance) * of_posterior
    return spec.scale * _reduce(terms, weight, spec.keep)


def sample(inputs: LatentInputs, spec: KL, num_samples: int | None) -> Tensor | None:
    """z in mu's dtype, of the noise's shape; None where the inputs have no noise. The clamp and the parameter are the KL's."""
    mu, spread = inputs.mu, inputs.spread
    eps = inputs.eps if inputs.seed is None else sample_noise(mu, inputs.seed, num_samples)
    if eps is None:
        return None
    acc = accumulate_dtype(mu, spread)
    wide, noise = spread.to(acc), eps.to(acc)
    if spec.parameter == "std":
        return (mu.to(acc) + wide * noise).to(mu.dtype)
    logvar = logvar_of(wide, spec)
    return reparameterize(mu.to(acc), logvar if spec.clamp is None else torch.clamp(logvar, *spec.clamp), noise).to(mu.dtype)


# ---- the ops: what `specs.Backend` lists, with the same outputs ------------------------------------------------------------------


def likelihood(inputs: NLLInputs, spec: Likelihood) -> tuple[Tensor]:
    return (nll(inputs, spec),)


def latent(inputs: LatentInputs, spec: Latent) -> tuple[Tensor | None, ...]:
    outputs = sample(inputs, spec.kl, spec.num_samples), kl(inputs, spec.kl) if spec.want_kl else None
    return (*outputs, squares(inputs, spec)) if spec.want_squares else outputs


def squares(inputs: LatentInputs, spec: Latent) -> Tensor:
    """The sums of eps^2 of each sample."""
    eps = inputs.eps if inputs.seed is None else sample_noise(inputs.mu, inputs.seed, spec.num_samples)
    assert eps is not None
    each = eps.to(accumulate_dtype(*inputs[:4])) ** 2
    return _reduce(each, inputs.weight, spec.kl.keep + (spec.num_samples is not None))


def elbo_terms(inputs: ElboInputs, spec: Elbo) -> tuple[Tensor, Tensor]:
    return nll(inputs.nll, spec.likelihood), kl(inputs.latent, spec.kl)


def elbo(inputs: ElboInputs, spec: Elbo) -> tuple[Tensor, ...]:
    return _loss(*elbo_terms(inputs, spec), spec)


def linear_nll(inputs: LinearInputs, spec: Linear) -> tuple[Tensor]:
    """`nll` of recon = h weight^T + bias, of shape `(rows, elements)`; row n belongs to row n % batch of x."""
    h, x, weight, bias, variance = inputs
    acc = accumulate_dtype(*inputs)
    with torch.autocast(h.device.type, enabled=False):
        recon = h.to(acc) @ weight.to(acc).T
    recon = recon if bias is None else recon + bias.to(acc)
    if recon.shape[0] != x.shape[0]:
        x = x.expand(recon.shape[0] // x.shape[0], *x.shape).flatten(0, 1)
    return (nll(NLLInputs(recon, x, variance, None, None), spec.likelihood),)


def linear_elbo(inputs: LinearElboInputs, spec: LinearElbo) -> tuple[Tensor, ...]:
    z = sample(inputs.latent, spec.kl, spec.num_samples)
    assert z is not None
    (each,) = linear_nll(inputs.linear(z if spec.num_samples is None else z.flatten(0, 1)), spec.linear)
    if spec.linear.likelihood.keep and spec.num_samples is not None:
        each = each.view(spec.num_samples, -1).sum(0)
    return _loss(each, kl(inputs.latent, spec.kl), spec)


def _loss(nll: Tensor, kl: Tensor, spec: Elbo | LinearElbo) -> tuple[Tensor, ...]:
    loss = nll + spec.beta * kl
    return (loss, nll.detach(), kl.detach()) if spec.return_terms else (loss,)
