"""z = mu + sigma eps and the KL between diagonal Gaussians: Kingma & Welling 2014, section 2.4 and appendix B.

With v = logvar - prior_logvar, d = mu - prior_mu and p = d / prior variance, an element's term and slopes are

    term             1/2 (d p + e^v - 1 - v)
    in mu            p                          in prior_mu      -p
    in logvar        1/2 (e^v - 1)              in prior_logvar  -1/2 (d p + e^v - 1)

and through z, whose upstream gradient is g: g in mu, 1/2 g sigma eps in logvar.
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


class Slopes(NamedTuple):
    """What the gradients are multiples of, in the dtype of the arithmetic; None where nothing asks for it."""

    p: Any = None
    expm1: Any = None  # e^v - 1, and 0 where logvar is clamped
    curve: Any = None  # d p + e^v - 1
    spread: Any = None  # sigma eps, and 0 where logvar is clamped


def forward(
    inputs: LatentInputs, spec: Latent, needs: Needs, acc: torch.dtype | None = None
) -> tuple[tuple[Tensor | None, Tensor | None], Slopes | None]:
    """The slopes are kept for backward, except those of noise from a seed, which backward makes again."""
    if inputs.seed is not None or not on_host(inputs.mu):
        needs = (False,) * 4
    z = spread = kl = None
    slopes = Slopes()
    if inputs.eps is not None or inputs.seed is not None:
        z, spread = sample(inputs, spec, needs[1])
    if spec.want_kl:
        acc = acc or accumulate_dtype(*inputs[:4])
        kl, slopes = kl_pass(inputs, spec.kl, needs, acc)
        kl = widen(kl, acc)
    if True not in needs:
        return (z, kl), None
    return (z, kl), slopes if spread is None else slopes._replace(spread=spread)


def backward(
    inputs: LatentInputs, spec: Latent, grad_outputs: Gradients, needs: Needs, kept: Slopes | None,
    out: tuple[Tensor, Tensor] | None = None, acc: torch.dtype | None = None,
) -> Gradients:  # fmt: skip
    """`out` has memory of any strides for the gradients of mu and logvar."""
    grad_z, grad_kl = grad_outputs
    acc = acc or accumulate_dtype(*inputs[:4])
    if kept is None:
        kept = Slopes() if grad_kl is None else kl_pass(inputs, spec.kl, needs, acc)[1]
        kept = kept._replace(spread=None if grad_z is None or not needs[1] else sample(inputs, spec, True)[1])
    rate = None if grad_kl is None else w.against(w.times(widen(grad_kl, acc), spec.kl.scale), inputs.mu.ndim, spec.kl.keep)
    gradients = gradients_of(kept, inputs, rate, needs, acc, None if grad_z is None else widen(grad_z, acc))
    if out is not None:
        gradients = (*[g if g is None else place.copy_(g) for g, place in zip(gradients, out, strict=False)], *gradients[2:])
    return gradients


OP = Op(forward, backward)


def gradients_of(
    slopes: Slopes, inputs: LatentInputs, rate: Factor | None, needs: Needs, acc: torch.dtype, grad_z: Any = None
) -> Gradients:
    """`rate` times the slopes of the KL, whose memory is used up (None: no KL), plus what comes through samples."""
    p, expm1, curve, spread = slopes
    found: list[Any] = [None] * 4
    through_mu = through_logvar = None
    if grad_z is not None:
        through_mu, through_logvar = grad_z, grad_z * spread if needs[1] else None
        if grad_z.ndim > inputs.mu.ndim:
            through_mu, through_logvar = through_mu.sum(0), None if through_logvar is None else through_logvar.sum(0)
        found[:2] = through_mu, through_logvar if rate is not None or through_logvar is None else through_logvar.mul_(0.5)
    if rate is not None:
        rate = rate if inputs.weight is None else widen(w.against(inputs.weight, inputs.mu.ndim), acc) * rate
        if needs[0]:
            # Without a prior p may be mu itself, and a gradient of prior_mu needs it once more.
            is_free = (inputs.prior_mu is not None or inputs.prior_logvar is not None) and not needs[2]
            found[0] = torch.mul(p, rate, out=p if is_free else None)
            if through_mu is not None:
                found[0].add_(through_mu)
        if needs[1]:
            found[1] = expm1.mul_(0.5 * rate)
            if through_logvar is not None:
                found[1].add_(through_logvar, alpha=0.5)
        if needs[2]:
            found[2] = p.mul_(-rate)
        if needs[3]:
            found[3] = curve.mul_(-0.5 * rate)
    each: Any = zip(found, needs, inputs, strict=False)
    return tuple([widen(g, t.dtype) if need and g is not None else None for g, need, t in each])


# ---- the sample ------------------------------------------------------------------------------------------------------------------


def sample(inputs: LatentInputs, spec: Latent, want_spread: bool) -> tuple[Tensor, Tensor | None]:
    """z in mu's dtype, rounded once, and its spread."""
    acc = accumulate_dtype(inputs.mu, inputs.logvar)
    mu, logvar = widen(inputs.mu, acc), widen(inputs.logvar, acc)
    sigma = torch.mul(logvar if spec.kl.clamp is None else torch.clamp(logvar, *spec.kl.clamp), 0.5).exp_()
    noise: Any = inputs.eps if inputs.seed is None else sample_noise(inputs.mu, inputs.seed, spec.num_samples, acc)
    if not want_spread:
        return widen(torch.addcmul(mu, sigma, widen(noise, acc)), inputs.mu.dtype), None
    spread = sigma * widen(noise, acc)
    z = widen(mu + spread, inputs.mu.dtype)
    return z, _cut(spread, logvar, spec.kl.clamp)


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


def kl_pass(inputs: LatentInputs, spec: KL, needs: Needs, acc: torch.dtype) -> tuple[Any, Slopes]:
    """The scaled sums of the terms, and the slopes that the gradients need.

    Sums are taken in float32 first, and once more without what lies under a weight of 0 where they show a NaN, or in float64 where
    they show that float32 was not exact enough. With eps = 2^-24, a term e^v - 1 - v is off by eps |v| in float32.
    The sum of |v| is at most sqrt(2 count total), since the term is about v^2 / 2 where that matters. So a total of count / 18 is
    off by 3 ulp at most. Nor may the terms be large: beside a prior's log-variance v is rounded, which moves e^v by eps |v|.
    """
    mu, logvar, prior_mu, prior_logvar, weight, _, _ = inputs
    shape, count = mu.shape[: spec.keep], math.prod(mu.shape[spec.keep :])
    masks = weight is None or weight.dtype == torch.bool
    weight = None if weight is None else widen(w.against(weight, mu.ndim), acc)

    def run(exact: bool, hide: bool) -> tuple[Any, Slopes]:
        p_is_mu = prior_mu is None and prior_logvar is None and mu.dtype == acc and not hide
        wanted = (needs[0] or needs[2]) and not p_is_mu, needs[1], needs[3]
        likes = [t if want else None for t, want in zip((mu, logvar, mu), wanted, strict=True)]
        tile = partial(_tile, spec, acc, exact, hide)
        runs = 0.25 if exact else 0.5  # for the temporaries of a tile, which in float64 are twice as large
        (kl,), (p, *others) = w.walk(tile, (mu, logvar, prior_mu, prior_logvar, weight), likes, (shape,), acc, runs)
        return kl, Slopes(mu if p_is_mu else p, *others)

    exact = acc == torch.float64 or not on_host(mu) or spec.keep == mu.ndim or not masks
    hide = exact and weight is not None
    kl, slopes = run(exact, hide)
    if not exact and kl.numel():
        if weight is not None and not math.isfinite(float(kl.sum())):
            del slopes  # whose memory the next pass can take
            kl, slopes = run(exact, hide=True)
        least, most = map(float, torch.aminmax(kl) if kl.ndim else (kl, kl))
        if not (least >= count / 18 and most <= 20 * count):
            del slopes
            kl, slopes = run(True, weight is not None)
    return kl.mul_(0.5 * spec.scale), slopes


def _tile(
    spec: KL, acc: torch.dtype, exact: bool, hide: bool,
    mu: Any, logvar: Any, prior_mu: Any, prior_logvar: Any, weight: Any, of_p: Any, of_expm1: Any, of_curve: Any,
) -> tuple[Tensor]:  # fmt: skip
    raw = widen(logvar, acc)
    moments: list[Any] = [widen(mu, acc), raw if spec.clamp is None else torch.clamp(raw, *spec.clamp)]
    moments += [t if t is None else widen(t, acc) for t in (prior_mu, prior_logvar)]
    if hide:
        moments = [t if t is None else w.present(weight, t) for t in moments]
    d, level, prior_mu, prior_logvar = moments
    if prior_mu is not None:
        d = d - prior_mu
    p = d
    if prior_logvar is not None:
        p = torch.div(d, torch.exp(prior_logvar), out=of_p)
    elif of_p is not None:
        of_p.copy_(d)
    expm1, rest = expm1_and_rest(level, prior_logvar, exact, of_expm1)
    if of_curve is not None:
        torch.addcmul(expm1, d, p, out=of_curve)
    if of_expm1 is not None:
        _cut(of_expm1, raw, spec.clamp)
    terms = rest.addcmul_(d, p)
    return (w.sum_over(terms if weight is None else terms.mul_(weight), spec.keep),)


def expm1_and_rest(logvar: Tensor, prior_logvar: Tensor | None, exact: bool, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """e^v - 1, and e^v - 1 - v in logvar's dtype, for v = logvar - prior_logvar.

    The second cancels near the prior. If it is to be `exact`, float32 on a CPU goes through float64, which keeps its digits down to
    |v| = 1e-8, where it is v^2 / 2. Elsewhere float64 is slow or missing, and its own digits go near the prior: there a polynomial
    stands in for |v| < 1.
    """
    if not exact:
        v = logvar if prior_logvar is None else logvar - prior_logvar
        expm1 = torch.expm1(v, out=out)
        return expm1, expm1 - v
    if logvar.dtype == torch.float32 and on_host(logvar):
        v = logvar.double()
        v = v if prior_logvar is None else v.sub_(prior_logvar)
        expm1 = torch.expm1(v)
        rest = expm1 - v
        if rest.numel() and float(rest.min()) < 1e-16:
            rest = torch.where(rest < 1e-16, 0.5 * v * v, rest)
        return expm1 if out is None else out.copy_(expm1), rest.float()
    v = logvar if prior_logvar is None else logvar - prior_logvar
    near, series = v.abs() < 1, torch.zeros_like(v)
    for k in range(11 if v.dtype == torch.float32 else 20, 1, -1):
        series = (series + 1 / math.factorial(k)) * v
    series = series * v
    exp = torch.exp(v)
    if prior_logvar is not None and not torch.compiler.is_compiling():
        # Far from the prior the rounding of v moves e^v by many times its own: `low` is what v lost (Knuth's two-sum). In a traced
        # function that is too much for Inductor to keep in one loop.
        back = v - logvar
        low = (logvar - (v - back)) - (prior_logvar + back)
        exp = torch.where((exp * low).abs() < torch.inf, exp + exp * low, exp)
    expm1 = torch.where(near, series + v, exp - 1.0)
    return expm1 if out is None else out.copy_(expm1), torch.where(near, series, exp - 1.0 - v)
