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

from ..dtypes import accumulate_dtype, on_host
from ..noise import sample_noise
from ..specs import KL, Factor, Gradients, Latent, LatentInputs, Needs, Op
from . import walk as w
from .gaussian_nll import scaled, writes_gradients

Clamp = tuple[float, float] | None


def forward(
    inputs: LatentInputs, spec: Latent, needs: Needs, acc: torch.dtype | None = None
) -> tuple[tuple[Tensor | None, Tensor | None], Any]:
    """The KL's gradients are made along with its terms, where there is no sample whose gradient would have to be added."""
    z = sample(inputs, spec)
    if not spec.want_kl:
        return (z, None), None
    acc = acc or accumulate_dtype(*inputs[:4])
    if z is not None or not writes_gradients(inputs, needs, spec.kl.keep, acc):
        return (z, w.widen(kl_pass(inputs, spec.kl, (False,) * 4, None, acc)[0], acc)), None
    if spec.kl.keep and inputs.weight is None:
        # An upstream gradient for each row is not known yet, and multiplies what its slope lacks in the same pass.
        asked = needs[0] or needs[2], needs[1], False, needs[3]
        kl, (p, expm1, _, curve) = kl_pass(inputs, spec.kl, asked, None, acc)
        return (None, w.widen(kl, acc)), _Slopes(p, expm1, curve)
    kl, gradients = kl_pass(inputs, spec.kl, needs, spec.kl.scale, acc)
    return (None, w.widen(kl, acc)), gradients


class _Slopes(NamedTuple):
    """What the gradients of rows are multiples of: see the head of this file."""

    p: Tensor | None
    expm1: Tensor | None
    curve: Tensor | None  # d p + e^v - 1

    def times(self, rate: Any, needs: Needs) -> Gradients:
        d_logvar = self.expm1.mul_(0.5 * rate) if self.expm1 is not None else None
        d_prior_logvar = self.curve.mul_(-0.5 * rate) if self.curve is not None else None
        d_mu = self.p.mul_(rate if needs[0] else -rate) if self.p is not None else None
        if not needs[0]:
            return None, d_logvar, d_mu, d_prior_logvar
        return d_mu, d_logvar, torch.neg(d_mu) if needs[2] else None, d_prior_logvar  # type: ignore[arg-type]


def backward(
    inputs: LatentInputs, spec: Latent, grad_outputs: Gradients, needs: Needs, kept: Any,
    out: tuple[Tensor, Tensor] | None = None, acc: torch.dtype | None = None,
) -> Gradients:  # fmt: skip
    """`out` has memory of any strides for the gradients of mu and logvar."""
    grad_z, grad_kl = grad_outputs
    acc = acc or accumulate_dtype(*inputs[:4])
    rate = None if grad_kl is None else w.against(w.widen(grad_kl, acc) * spec.kl.scale, inputs.mu.ndim, spec.kl.keep)
    if kept is not None:
        assert grad_kl is not None
        return kept.times(rate, needs) if isinstance(kept, _Slopes) else scaled(kept, grad_kl)
    through = None if grad_z is None else _through(inputs, spec, w.widen(grad_z, acc), needs)
    if rate is not None:
        d_mu, d_logvar, *of_prior = kl_pass(inputs, spec.kl, needs, rate, acc, False, through)[1]
    else:
        assert through is not None
        (d_mu, d_logvar), of_prior = through, [None, None]
        if d_logvar is not None:
            d_logvar = _sigma(inputs.logvar, spec.kl.clamp, acc).mul_(0.5).mul_(d_logvar)
            d_logvar = w.widen(_cut(d_logvar, inputs.logvar, spec.kl.clamp), inputs.logvar.dtype)
        d_mu = None if d_mu is None else w.widen(d_mu, inputs.mu.dtype)
    if out is not None:
        d_mu, d_logvar = (g if g is None else place.copy_(g) for g, place in zip((d_mu, d_logvar), out, strict=True))
    return d_mu, d_logvar, *of_prior


OP = Op(forward, backward)


# ---- the sample ------------------------------------------------------------------------------------------------------------------


def sample(inputs: LatentInputs, spec: Latent) -> Tensor | None:
    """z in mu's dtype, rounded once; None where there is no noise."""
    if inputs.eps is None and inputs.seed is None:
        return None
    acc = accumulate_dtype(inputs.mu, inputs.logvar)
    sigma = _sigma(inputs.logvar, spec.kl.clamp, acc)
    return w.widen(torch.addcmul(w.widen(inputs.mu, acc), sigma, _noise(inputs, spec, acc)), inputs.mu.dtype)


def _through(inputs: LatentInputs, spec: Latent, grad_z: Tensor, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """What z hands down to mu, and to sigma: g and g eps, each summed over the samples."""
    to_mu = grad_z if needs[0] else None
    to_sigma = grad_z * _noise(inputs, spec, grad_z.dtype) if needs[1] else None
    if spec.num_samples is None:
        return to_mu, to_sigma
    return None if to_mu is None else to_mu.sum(0), None if to_sigma is None else to_sigma.sum(0)


def _sigma(logvar: Tensor, clamp: Clamp, acc: torch.dtype) -> Tensor:
    return torch.mul(_clamped(w.widen(logvar, acc), clamp), 0.5).exp_()


def _noise(inputs: LatentInputs, spec: Latent, acc: torch.dtype) -> Tensor:
    if inputs.eps is not None:
        return w.widen(inputs.eps, acc)
    assert inputs.seed is not None
    return sample_noise(inputs.mu, inputs.seed, spec.num_samples, acc)


def _clamped(logvar: Tensor, clamp: Clamp) -> Tensor:
    return logvar if clamp is None else torch.clamp(logvar, *clamp)


def _reaching(clamp: Clamp, logvar: Tensor) -> Clamp:
    """The clamp, or None where nothing lies outside, which one look shows on a CPU."""
    if clamp is None or not on_host(logvar) or not logvar.numel():
        return clamp
    least, most = torch.aminmax(logvar)
    return None if float(least) >= clamp[0] and float(most) <= clamp[1] else clamp


def _cut(gradient: Tensor, logvar: Tensor, clamp: Clamp) -> Tensor:
    """The gradient of logvar, which is 0 outside the clamp."""
    return gradient if clamp is None else gradient.masked_fill_((logvar < clamp[0]) | (logvar > clamp[1]), 0.0)


# ---- the KL ----------------------------------------------------------------------------------------------------------------------


def kl_pass(
    inputs: LatentInputs, spec: KL, needs: Needs, rate: Factor | None, acc: torch.dtype, want_terms: bool = True,
    through: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Any, Gradients]:  # fmt: skip
    """The scaled sums of the terms, and `rate` times the gradients (None: the slopes), plus what comes `through` a sample.

    Sums are taken in float32 first, and once more in float64 where they show that this is not exact enough.
    """
    *moments, weight, _, _ = inputs
    mu, keep = inputs.mu, spec.keep
    spec = spec._replace(clamp=_reaching(spec.clamp, inputs.logvar))
    likes = [t if need else None for t, need in zip(moments, needs, strict=True)]
    each = (*moments, w.against(weight, mu.ndim), rate, *(through or (None, None)))
    sums = (mu.shape[:keep] if want_terms else None,)

    def run(exact: bool, hide: bool) -> tuple[Any, Any]:
        return w.walk(
            partial(_tile, spec, needs, acc, want_terms, exact, hide), each, likes, sums, acc, arrays=4.0 if exact else 2.0
        )

    exact = acc == torch.float64 or not on_host(mu) or (weight is not None and weight.dtype != torch.bool)
    exact = exact or (keep == mu.ndim if want_terms else inputs.prior_logvar is not None)
    (kl,), gradients = run(exact, exact or not want_terms)
    if want_terms and not exact and weight is not None and not math.isfinite(float(kl.sum())):
        del gradients  # their memory is free for the second pass, which hides what lies under a weight of 0
        (kl,), gradients = run(exact, True)
    if want_terms and not exact and not _is_exact(kl, math.prod(mu.shape[keep:])):
        del gradients
        (kl,), gradients = run(True, True)
    return kl if kl is None else kl.mul_(0.5 * spec.scale), tuple(
        [g if g is None or t is None else w.widen(g, t.dtype) for g, t in zip(gradients, moments, strict=True)]
    )


def _is_exact(total: Tensor, count: int) -> bool:
    """Whether sums of `count` terms, doubled, in which e^v - 1 - v was computed in float32, are off by 3 ulp or less.

    With eps = 2^-24 such a term is off by eps |v|. The sum of |v| is at most sqrt(2 count total), since e^v - 1 - v is about
    v^2 / 2 where that matters, so the terms may not be too small. Nor may they be too large: beside a prior's log-variance v itself
    is rounded, which moves e^v by eps |v|.
    """
    if not total.numel():
        return True
    least, most = map(float, torch.aminmax(total)) if total.ndim else (float(total),) * 2
    return least >= count / 18 and most <= 20.0 * count


def _tile(
    spec: KL, needs: Needs, acc: torch.dtype, want_terms: bool, exact: bool, hide: bool,
    mu: Tensor, logvar: Tensor, prior_mu: Any, prior_logvar: Any, weight: Any, rate: Any, to_mu: Any, to_sigma: Any,
    d_mu: Any, d_logvar: Any, d_prior_mu: Any, d_prior_logvar: Any,
) -> tuple[Any, Any]:  # fmt: skip
    raw = w.widen(logvar, acc)
    clamped = _clamped(raw, spec.clamp)
    absent = weight if hide else None
    lv, d = w.present(absent, clamped), w.present(absent, w.widen(mu, acc))
    if prior_mu is not None:
        d = d - w.present(absent, w.widen(prior_mu, acc))
    p = d
    if prior_logvar is not None:
        prior_logvar = w.present(absent, w.widen(prior_logvar, acc))
        p = torch.div(d, torch.exp(prior_logvar), out=w.usable(d_mu, acc))
    expm1, rest = expm1_and_rest(lv, prior_logvar, exact, w.usable(d_logvar, acc))
    weight = None if weight is None else w.widen(weight, acc)
    kl = None
    if want_terms:
        terms = rest.addcmul_(d, p)
        kl = w.sum_over(terms if weight is None else terms.mul_(weight), spec.keep)
    if needs[3]:
        d_prior_logvar = torch.addcmul(expm1, d, p, out=w.usable(d_prior_logvar, acc))
    if rate is None:
        d_logvar = _cut(expm1, raw, spec.clamp) if needs[1] else None
        d_mu = None if not needs[0] else p.clone() if p is mu else p  # what backward writes to is not the input
        return (kl,), (d_mu, d_logvar, None, d_prior_logvar)
    rate = rate if weight is None else weight * rate
    if needs[3]:
        d_prior_logvar.mul_(-0.5 * rate)
    if needs[1]:
        d_logvar = expm1.mul_(0.5 * rate)
        if to_sigma is not None:
            d_logvar.addcmul_(torch.mul(clamped, 0.5).exp_(), to_sigma, value=0.5)
        d_logvar = _cut(d_logvar, raw, spec.clamp)
    if needs[2]:
        d_prior_mu = torch.mul(p, -rate, out=w.usable(d_prior_mu, acc))
    if needs[0]:
        d_mu = torch.mul(p, rate, out=w.usable(d_mu, acc))
        d_mu = d_mu if to_mu is None else d_mu.add_(to_mu)
    found = d_mu, d_logvar, d_prior_mu, d_prior_logvar
    return (kl,), tuple([g if need else None for g, need in zip(found, needs, strict=True)])


def expm1_and_rest(logvar: Tensor, prior_logvar: Tensor | None, exact: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e^v - 1 and e^v - 1 - v for v = logvar - prior_logvar.

    The second cancels near the prior. If it is to be `exact`, float32 on a CPU goes through float64, where it keeps its digits down
    to |v| = 1e-8. Elsewhere float64 is slow or missing, and its own digits go near the prior: there a polynomial stands in for
    |v| < 1.
    """
    if not exact:
        v = logvar if prior_logvar is None else logvar - prior_logvar
        expm1 = torch.expm1(v, out=out)
        return expm1, expm1 - v
    if logvar.dtype == torch.float32 and on_host(logvar):
        v = logvar.double()
        v = v if prior_logvar is None else v.sub_(prior_logvar)
        expm1 = torch.expm1(v)
        narrow, rest = expm1.float(), expm1.sub_(v)
        if rest.numel() and float(rest.min()) < 1e-16:
            rest = torch.where(rest < 1e-16, 0.5 * v * v, rest)
        return narrow, rest.float()
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
    return torch.where(near, series + v, exp - 1.0), torch.where(near, series, exp - 1.0 - v)
