"""z = mu + sigma eps and the KL between diagonal Gaussians: Kingma & Welling 2014, section 2.4 and appendix B.

With v = logvar - prior_logvar, d = mu - prior_mu and p = d / prior variance, an element's term and slopes are

    term             1/2 (d p + e^v - 1 - v)
    in mu            p                          in prior_mu      -p
    in logvar        1/2 (e^v - 1)              in prior_logvar  -1/2 (d p + e^v - 1)

and through z, whose upstream gradient is g: g in mu, 1/2 g sigma eps in logvar. The prior's variance or its inverse leaves
float32's range long before their roots do, so p is d over the prior's std, twice; and 1/2 e^v fits a little longer than e^v.

What is given need not be a logvar. Then slopes in logvar are multiplied by dlogvar / dlogstd = 2, dlogvar / dstd = 2 / std or
dlogvar / dvar = 1 / var, and v is 2 log(std / prior std) or log(var / prior var).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype, on_host, widen
from ..noise import sample_noise
from ..specs import KL, Factor, Gradients, Latent, LatentInputs, Needs, Op
from . import walk as w

Clamp = tuple[float, float] | None

# What is given as itself and not as its logarithm; and how many times the logarithm of each is a logvar.
RATIOS = ("std", "var")
PER_LOG = {"logvar": 1.0, "logstd": 2.0, "std": 2.0, "var": 1.0}


class Kept(NamedTuple):
    """What forward keeps for backward, in the dtype of the arithmetic."""

    of_kl: Gradients = (None,) * 4  # for an upstream gradient of 1
    slope: Tensor | None = None  # of z in the spread


def forward(
    inputs: LatentInputs, spec: Latent, needs: Needs, acc: torch.dtype | None = None
) -> tuple[tuple[Tensor | None, ...], Kept | None]:
    """Nothing is kept where the noise comes from a seed: backward makes it again."""
    needs = needs if _keeps(inputs) else (False,) * 4
    z = slope = kl = noise = None
    of_kl: Gradients = (None,) * 4
    if inputs.eps is not None or inputs.seed is not None:
        z, slope, noise = sample(inputs, spec, needs[1])
    if spec.want_kl:
        acc = acc or accumulate_dtype(*inputs[:4])
        kl, of_kl = kl_pass(inputs, spec.kl, needs, spec.kl.scale, acc)
        kl = widen(kl, acc)
    outputs = (z, kl) if noise is None or not spec.want_squares else (z, kl, _squares(noise, inputs, spec))
    return outputs, Kept(of_kl, slope) if True in needs else None


def backward(
    inputs: LatentInputs, spec: Latent, grad_outputs: Gradients, needs: Needs, kept: Kept | None,
    out: tuple[Tensor, Tensor] | None = None, acc: torch.dtype | None = None,
) -> Gradients:  # fmt: skip
    """`out` has memory of any strides for the gradients of mu and the spread."""
    grad_z, grad_kl = grad_outputs[:2]
    acc = acc or accumulate_dtype(*inputs[:4])
    if kept is None and _keeps(inputs):
        kept = forward(inputs, spec, needs, acc)[1]
    gradients: list[Any] = [None] * 4
    if grad_kl is not None:
        grad_kl = widen(grad_kl, acc)
        if kept is not None:
            gradients = list(w.scaled(kept.of_kl, grad_kl))
        else:
            rate = w.against(w.times(grad_kl, spec.kl.scale), inputs.mu.ndim, spec.kl.keep)
            gradients = list(kl_pass(inputs, spec.kl, needs, rate, acc)[1])
    if grad_z is not None:
        slope = sample(inputs, spec, needs[1])[1] if kept is None else kept.slope
        through = [widen(grad_z, acc), None if slope is None else w.times(grad_z * slope, _OF_SLOPE[spec.kl.parameter])]
        for i, g in enumerate(through):
            if needs[i] and g is not None:
                g = g if grad_z.ndim == inputs.mu.ndim else g.sum(0)
                gradients[i] = g if gradients[i] is None else gradients[i].add_(g)
    for i, place in enumerate(out or ()):
        gradients[i] = place.copy_(gradients[i])
    return w.rounded(gradients, inputs)


OP = Op(forward, backward)


def _keeps(inputs: LatentInputs) -> bool:
    return inputs.seed is None and on_host(inputs.mu)


# ---- the sample ------------------------------------------------------------------------------------------------------------------

# What dz / dspread is, over the factor that `sample` makes: sigma eps of logarithms, eps of a std, eps / sigma of a var.
_OF_SLOPE = {"logvar": 0.5, "logstd": 1.0, "std": 1.0, "var": 0.5}


def sample(inputs: LatentInputs, spec: Latent, want_slope: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """z in mu's dtype, rounded once; its slope in the spread, over a constant factor; and the noise."""
    acc = accumulate_dtype(inputs.mu, inputs.spread)
    mu, spread = widen(inputs.mu, acc), widen(inputs.spread, acc)
    sigma = _sigma(spread, spec.kl)
    noise: Any = inputs.eps if inputs.seed is None else sample_noise(inputs.mu, inputs.seed, spec.num_samples, acc)
    noise = widen(noise, acc)
    if not want_slope or spec.kl.parameter in ("std", "var"):
        z = widen(torch.addcmul(mu, sigma, noise), inputs.mu.dtype)
        return z, None if not want_slope else noise if spec.kl.parameter == "std" else noise / sigma, noise
    slope = sigma * noise
    z = widen(mu + slope, inputs.mu.dtype)
    return z, _cut(slope, spread, spec.kl.clamp), noise


def _squares(noise: Tensor, inputs: LatentInputs, spec: Latent) -> Tensor:
    acc = accumulate_dtype(*inputs[:4])
    keep, noise, weight = noise.ndim - inputs.mu.ndim + spec.kl.keep, widen(noise, acc), inputs.weight
    if weight is None:
        return widen(w.squares_over(noise, keep), acc)
    return widen(w.sum_over(w.present(w.against(weight, noise.ndim), noise).square().mul_(weight), keep), acc)


def _sigma(spread: Tensor, spec: KL) -> Tensor:
    if spec.parameter == "logvar":
        return torch.mul(spread if spec.clamp is None else torch.clamp(spread, *spec.clamp), 0.5).exp_()
    if spec.parameter == "logstd":
        return torch.exp(spread)
    return spread if spec.parameter == "std" else torch.sqrt(spread)


def _cut(slope: Tensor, logvar: Tensor, clamp: Clamp) -> Tensor:
    """The slope in logvar, in place, which is 0 outside the clamp."""
    if clamp is None:
        return slope
    if on_host(logvar) and logvar.numel():  # where nothing lies outside, as is usual, one look is cheaper than a mask
        least, most = torch.aminmax(logvar)
        if float(least) >= clamp[0] and float(most) <= clamp[1]:
            return slope
    return slope.masked_fill_((logvar < clamp[0]) | (logvar > clamp[1]), 0.0)


# ---- the KL ----------------------------------------------------------------------------------------------------------------------


def kl_pass(inputs: LatentInputs, spec: KL, needs: Needs, rate: Factor, acc: torch.dtype) -> tuple[Any, Gradients]:
    """The scaled sums of the terms, and `rate` times the gradients that are needed, in the dtype of the arithmetic.

    Sums are taken in float32 first, and once more without what lies under a weight of 0 where they show a NaN, or in float64 where
    they show that float32 was not exact enough. With eps = 2^-24, e^v - 1 - v is off by eps |v| in float32. The sum of |v| is
    at most sqrt(2 count total), since it is about v^2 / 2 where that matters. So a total of count / 18 is off by 3 ulp at most.
    Nor may the terms be large: beside a prior's log-variance v is rounded, which moves e^v by eps |v|. Beside a prior's std the
    ratio is rounded, which moves v by 2 eps, either way.
    """
    rate = w.rate_of_some(rate, spec.scale)
    mu, weight, count = inputs.mu, inputs.weight, math.prod(inputs.mu.shape[spec.keep :])
    masks = weight is None or weight.dtype == torch.bool
    weight = None if weight is None else widen(w.against(weight, mu.ndim), acc)
    likes = [t if need else None for t, need in zip(inputs, needs, strict=False)]

    def run(exact: bool, hide: bool) -> tuple[Any, Gradients]:
        tile = partial(_tile, spec, acc, exact, hide)
        temporaries = 16 if exact else 2 + (not (needs[0] or needs[2])) + (not needs[1])
        (kl,), gradients = w.walk(tile, (*inputs[:4], weight, rate), likes, (mu.shape[: spec.keep],), acc, temporaries)
        return kl, tuple(gradients)

    exact = acc == torch.float64 or not on_host(mu) or spec.keep == mu.ndim or not masks
    hide = exact and weight is not None
    kl, gradients = run(exact, hide)
    if not exact and kl.numel():
        if weight is not None and not math.isfinite(float(kl.sum())):
            del gradients  # whose memory the next pass can take
            kl, gradients = run(exact, hide=True)
        least, most = [float(t) for t in torch.aminmax(kl)] if kl.ndim else [float(kl)] * 2
        if not (least >= count / 18 and most <= 20 * count):
            del gradients
            exact = True
            kl, gradients = run(exact, weight is not None)
    return kl.mul_(spec.scale if exact else 0.5 * spec.scale), gradients


def _tile(
    spec: KL, acc: torch.dtype, exact: bool, hide: bool,
    mu: Any, spread: Any, prior_mu: Any, prior_spread: Any, weight: Any, rate: Any,
    d_mu: Any, d_spread: Any, d_prior_mu: Any, d_prior_spread: Any,
) -> tuple[Tensor]:  # fmt: skip
    raw = widen(spread, acc)
    moments: list[Any] = [widen(mu, acc), raw if spec.clamp is None else torch.clamp(raw, *spec.clamp)]
    moments += [t if t is None else widen(t, acc) for t in (prior_mu, prior_spread)]
    if hide:
        absent = 0.0, 1.0 if spec.parameter in RATIOS else 0.0
        moments = [t if t is None else w.present(weight, t, value) for t, value in zip(moments, absent * 2, strict=True)]
    d, spread, prior_mu, prior_spread = moments
    d = d if prior_mu is None else d - prior_mu
    d_mean = d_prior_mu if d_mu is None else d_mu
    p = d if prior_spread is None else _over_variance(d, prior_spread, spec.parameter, d_mean)
    expm1, rest = expm1_and_rest(spread, prior_spread, spec.parameter, exact, d_spread)
    half = 1.0 if exact else 0.5  # of the two, where it is not taken yet
    rate = rate if weight is None else weight * rate
    of_prior, of_posterior = (rate, rate) if spec.balance is None else (spec.balance * rate, (1 - spec.balance) * rate)
    per_log = half * PER_LOG[spec.parameter]
    if d_prior_spread is not None:
        torch.addcmul(expm1, d, p, value=0.5 / half, out=d_prior_spread).mul_(-per_log * of_prior)
    terms = rest.addcmul_(d, p, value=0.5 / half)
    if d_prior_mu is not None:
        torch.mul(p, -of_prior, out=d_prior_mu)
    if d_mu is not None:
        torch.mul(p, of_posterior, out=d_mu)
    if d_spread is not None:
        _cut(d_spread.mul_(per_log * of_posterior), raw, spec.clamp)
    if spec.parameter in RATIOS:
        for slope, divisor in ((d_spread, spread), (d_prior_spread, prior_spread)):
            if slope is not None:
                slope.div_(divisor)
    return (w.sum_over(terms if weight is None else terms.mul_(weight), spec.keep),)


def _over_variance(d: Tensor, spread: Tensor, parameter: str, out: Tensor | None) -> Tensor:
    if parameter == "var":
        return torch.div(d, spread, out=out)
    if parameter == "std":
        return torch.div(d, spread, out=out).div_(spread)
    root = torch.mul(spread, -0.5).exp_() if parameter == "logvar" else torch.neg(spread).exp_()
    return torch.mul(d, root, out=out).mul_(root)


def expm1_and_rest(
    spread: Tensor, prior_spread: Tensor | None, parameter: str, exact: bool, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """e^v - 1, and e^v - 1 - v in the spread's dtype, for v = logvar - prior logvar; if they are to be `exact`, half of each.

    Exact they fit where e^v overflows and its half does not. The second cancels near the prior. Float32 on a CPU goes through
    float64 for it, which keeps its digits down to |v| = 1e-8, where it is v^2 / 2. Elsewhere float64 is slow or missing, and its
    own digits go near the prior: there a polynomial stands in for |v| < 1.
    """
    if not exact:
        v = _log_ratio(spread, prior_spread, parameter)
        if parameter in RATIOS:
            expm1 = _beyond(spread, prior_spread, out)
            expm1 = expm1 if parameter == "var" else expm1.mul_(expm1 + 2.0)
        else:
            expm1 = torch.expm1(v, out=out)
        return expm1, torch.sub(expm1, v, out=v if v is not spread else None)
    if spread.dtype == torch.float32 and on_host(spread):
        v = _log_ratio(spread.double(), prior_spread, parameter)
        expm1 = torch.expm1(v).mul_(0.5)
        rest = torch.sub(expm1, v, alpha=0.5)
        if rest.numel() and float(rest.min()) < 5e-17:
            rest = torch.where(rest < 5e-17, 0.25 * v * v, rest)
        return expm1 if out is None else out.copy_(expm1), rest.float()
    v = _log_ratio(spread, prior_spread, parameter)
    if parameter in RATIOS:
        ratio, beyond = _ratio(spread, prior_spread), _beyond(spread, prior_spread)
        v = torch.where(beyond.abs() < 0.5, PER_LOG[parameter] * torch.log1p(beyond), v)
        exp = 0.5 * ratio * ratio if parameter == "std" else 0.5 * ratio
    else:
        exp = torch.exp(v - 1.0) * (0.5 * math.e)  # that of v may overflow where its half fits
    near, series = v.abs() < 1, torch.zeros_like(v)
    for k in range(11 if v.dtype == torch.float32 else 20, 1, -1):
        series = (series + 0.5 / math.factorial(k)) * v
    series = series * v
    if parameter == "logvar" and prior_spread is not None and not torch.compiler.is_compiling():
        # Far from the prior the rounding of v moves e^v by many times its own: `low` is what v lost (Knuth's two-sum). In a traced
        # function that is too much for Inductor to keep in one loop.
        back = v - spread
        low = (spread - (v - back)) - (prior_spread + back)
        exp = torch.where((exp * low).abs() < torch.inf, exp + exp * low, exp)
    expm1 = torch.where(near, series + 0.5 * v, exp - 0.5)
    return expm1 if out is None else out.copy_(expm1), torch.where(near, series, exp - 0.5 - 0.5 * v)


def _ratio(spread: Tensor, prior_spread: Tensor | None) -> Tensor:
    return spread if prior_spread is None else spread / prior_spread


def _beyond(spread: Tensor, prior_spread: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The ratio less 1. Near the prior the ratio is rounded, where the difference is not."""
    if prior_spread is None:
        return torch.sub(spread, 1.0, out=out)
    return torch.sub(spread, prior_spread, out=out).div_(prior_spread)


def _log_ratio(spread: Tensor, prior_spread: Tensor | None, parameter: str) -> Tensor:
    """v, logvar - prior logvar."""
    if parameter in RATIOS:
        v = torch.log(_ratio(spread, prior_spread))
    else:
        v = spread if prior_spread is None else spread - prior_spread
    return w.times(v, PER_LOG[parameter])
