"""The float64 truth of every output and gradient of an op, with the size of each element.

The **size** of an element is the sum of the magnitudes of the terms that are added to give it. Where they cancel, the element says
nothing about the error: the slope of a log-variance, (1 - d^2 / s^2) / 2, is 0 wherever the variance fits, and there a single
correct rounding is off by any multiple of the result. The size of a gradient adds the magnitudes of the gradients of single terms
and elements, before a shared input sums them. So the equations of `fastelbo.reference` stand here taken apart into terms: of forms
that do not cancel without need, so that a KL near its prior is held to its own size, and not to that of the numbers of size 1 which
its usual formula subtracts.

Across a linear layer, and over several samples of one posterior, sums inside a term cancel too. There sizes come from a second
pass through the same expressions, of magnitudes: a residual's size is that of x, of the bias and of every product, and the size of
what the residual enters follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import specs
from ..dtypes import LOG_2PI, image
from ..noise import sample_noise
from ..reference import discretized_logistic_terms, logvar_of, present
from ..specs import COUNTS, DIFFERENTIABLE, KL, Gradients, Likelihood, Needs
from . import counts
from .tolerance import Truth, arithmetic_of, arithmetic_of_layer, rounding_of_operands, widened

OUTPUTS = {
    "likelihood": ("nll",),
    "latent": ("z", "kl", "squares"),
    "elbo": ("loss", "nll", "kl"),
    "elbo_terms": ("nll", "kl"),
    "linear_nll": ("nll",),
    "linear_elbo": ("loss", "nll", "kl"),
}
LAYERS = (specs.LinearInputs, specs.LinearElboInputs)

# ---- quantities per element, as their terms --------------------------------------------------------------------------------------


def nll_terms(inputs: specs.NLLInputs, spec: Likelihood) -> list[Tensor]:
    recon, x, variance, zi_logits, weight = inputs
    variance = torch.full_like(recon, spec.logvar) if variance is None else variance.expand(recon.shape)
    recon, x, variance = present(weight, recon, x, variance)
    if weight is not None and spec.parameter != "logvar":
        variance = torch.where(weight == 0, 1.0, variance)
    if spec.family in COUNTS:
        terms = counts.terms(recon, x, variance, zi_logits, weight, spec)
        return terms if weight is None else [t * weight for t in terms]
    if spec.family == "bernoulli":
        zero = torch.zeros_like(recon)
        terms = [x * torch.logaddexp(-recon, zero), (1 - x) * torch.logaddexp(recon, zero)]
        return terms if weight is None else [t * weight for t in terms]
    if spec.family == "laplace":
        terms = [variance, (recon - x).abs() * torch.exp(-variance)]
        terms += [torch.full_like(recon, math.log(2.0))] if spec.full else []
        return terms if weight is None else [t * weight for t in terms]
    if spec.family == "discretized_logistic":
        assert spec.bin is not None
        terms = discretized_logistic_terms(recon, x, variance, spec.bin)
        return terms if weight is None else [t * weight for t in terms]
    if spec.parameter == "logvar":
        log, square = variance, (x - recon) ** 2 * torch.exp(-variance)
    elif spec.parameter == "std":
        log, square = 2 * torch.log(variance), ((x - recon) / variance) ** 2
    else:
        # The gradient passes through the floor. A negative variance is an error, which shows as NaN where no check can look.
        raised = variance + (variance.clamp(min=spec.floor) - variance + torch.where(variance < 0, math.nan, 0.0)).detach()
        log, square = torch.log(raised), (x - recon) ** 2 / raised
    terms = [0.5 * log, 0.5 * square]
    if spec.full:
        terms.insert(0, torch.full_like(recon, 0.5 * LOG_2PI))
    return terms if weight is None else [t * weight for t in terms]


def kl_terms(inputs: specs.LatentInputs, spec: KL) -> list[Tensor]:
    """Two that are never negative; e^v - 1 - v by its Taylor series, to the last bit for |v| < 1/2, where it would cancel."""
    mu, spread, prior_mu, prior_spread, weight, _, _ = inputs
    prior_mu = torch.zeros_like(mu) if prior_mu is None else prior_mu
    if prior_spread is None:
        prior_spread = torch.full_like(mu, 1.0 if spec.parameter in ("std", "var") else 0.0)
    mu, prior_mu = present(weight, mu, prior_mu)
    logvar, prior_logvar = (logvar_of(t, spec, weight) for t in (spread, prior_spread))
    v = _clamped(logvar, spec) - prior_logvar
    if spec.parameter in ("std", "var"):
        # The slopes of one logarithm of a ratio do not cancel, as those of two would; a difference near the prior is exact.
        spread, prior_spread = (t if weight is None else torch.where(weight == 0, 1.0, t) for t in (spread, prior_spread))
        beyond = (spread - prior_spread) / prior_spread
        v = torch.where(beyond.abs() < 0.5, torch.log1p(beyond.clamp(min=-0.9)), torch.log(spread / prior_spread))
        v = v if spec.parameter == "var" else 2 * v
    small = v.clamp(-0.5, 0.5)
    series = torch.zeros_like(v)
    for k in range(19, 1, -1):
        series = series * small + 1 / math.factorial(k)
    rest = torch.where(v.abs() < 0.5, small * small * series, torch.expm1(v) - v)
    terms = [0.5 * (mu - prior_mu) ** 2 * torch.exp(-prior_logvar), 0.5 * rest]
    return terms if weight is None else [t * weight for t in terms]


def balanced_terms(inputs: specs.LatentInputs, spec: KL) -> list[Tensor]:
    """Those of the KL: with a balance twice, of constant posteriors and of constant priors."""
    if spec.balance is None:
        return kl_terms(inputs, spec)
    posterior, prior = ("mu", "spread"), ("prior_mu", "prior_spread")
    found = []
    for share, constant in ((spec.balance, posterior), (1 - spec.balance, prior)):
        held = {name: getattr(inputs, name).detach() for name in constant if getattr(inputs, name) is not None}
        found += [share * t for t in kl_terms(inputs._replace(**held), spec)]
    return found


def sample_terms(inputs: specs.LatentInputs, spec: KL) -> list[Tensor]:
    assert inputs.eps is not None
    if spec.parameter == "std":
        sigma = inputs.spread
    else:
        sigma = torch.exp(0.5 * _clamped(logvar_of(inputs.spread, spec), spec))
    return [inputs.mu.expand(inputs.eps.shape), sigma * inputs.eps]


def layer_terms(inputs: specs.LinearInputs, spec: Likelihood) -> list[Tensor]:
    """Of the reconstruction of each row of h, beside its row of x."""
    h, x, weight, bias, variance = inputs
    recon = h @ weight.T if bias is None else h @ weight.T + bias
    x = x.expand(len(h) // max(len(x), 1), *x.shape).flatten(0, 1)
    return nll_terms(specs.NLLInputs(recon, x, variance, None, None), spec)


def decoded_terms(inputs: specs.LinearElboInputs, spec: Likelihood, z: Tensor | None = None) -> list[Tensor]:
    """Of all samples of a row together. They have the value of z, with the gradient of what it was made from."""
    h = torch.add(*sample_terms(inputs.latent, KL()))
    h = h if z is None else h + (z - h).detach()
    each = layer_terms(inputs.linear(h.flatten(0, -2)), spec)
    return [t.unflatten(0, h.shape[:-1]).transpose(0, -2) for t in each]


def _clamped(logvar: Tensor, spec: KL) -> Tensor:
    return logvar if spec.clamp is None else torch.clamp(logvar, *spec.clamp)


# ---- what each output adds up ----------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """What each element adds to an output, times `factor`; the output sums it over all except the first `keep` dimensions."""

    each: Tensor
    size: Tensor  # the same of magnitudes; `each` itself where nothing cancels inside
    keep: int
    factor: Any


Terms = list[Term]


def _terms(spec: Likelihood | KL, each: list[Tensor], sizes: list[Tensor] | None = None) -> Terms:
    return [Term(*pair, spec.keep, spec.scale) for pair in zip(each, sizes or each, strict=True)]


def terms_of(op: str, v: Any, sizes: Any, spec: Any, z: Tensor | None) -> list[Terms | None]:
    """Of each output, for inputs and their magnitudes; None where the op returns none."""
    if op == "likelihood":
        return [_terms(spec, nll_terms(v, spec))]
    if op == "linear_nll":
        return [_terms(spec.likelihood, *(layer_terms(inputs, spec.likelihood) for inputs in (v, sizes)))]
    if op == "latent":
        sample = None if v.eps is None else KL(keep=v.eps.ndim)
        z_terms = sample and _terms(sample, sample_terms(v, spec.kl), sample_terms(sizes, spec.kl))
        terms = [z_terms, _terms(spec.kl, balanced_terms(v, spec.kl)) if spec.want_kl else None]
        if spec.want_squares:
            keep = v.eps.ndim - v.mu.ndim + spec.kl.keep
            each = v.eps**2 if v.weight is None else present(v.weight, v.eps)[0] ** 2 * v.weight
            terms.append([Term(each, each, keep, 1.0)])
        return terms
    kl = _terms(spec.kl, kl_terms(v.latent, spec.kl))
    if op == "linear_elbo":
        likelihood = spec.linear.likelihood
        nll = _terms(likelihood, decoded_terms(v, likelihood, z), decoded_terms(sizes, likelihood))
    else:
        nll = _terms(spec.likelihood, nll_terms(v.nll, spec.likelihood))
    if op == "elbo_terms":
        return [nll, kl]
    loss = [*nll, *(t._replace(factor=t.factor * spec.beta) for t in kl)]
    return [loss, nll, kl] if spec.return_terms else [loss]


# ---- the oracle ------------------------------------------------------------------------------------------------------------------


class Oracle:
    """The truth of one call of an op. It holds copies, so that it does not see what becomes of the call's own tensors.

    Args:
        op: A field of `specs.Backend`.
        inputs, spec: As the op takes them.
        needs: Which gradients will be asked for; None for those of all differentiable inputs that there are.
        z: The sample that `linear_elbo` drew, whose own error is then not at issue; None is mu + sigma eps, rounded to mu's dtype.
    """

    def __init__(self, op: str, inputs: Any, spec: Any, needs: Needs | None = None, z: Tensor | None = None) -> None:
        self.op, self.needs = op, needs or tuple(t is not None for t in inputs[: DIFFERENTIABLE[type(inputs)]])
        self.shapes: list[Any] = [None if t is None else t.shape for t in inputs]
        self.dtypes = inputs._make(None if t is None else t.dtype for t in inputs)
        self.acc = arithmetic_of(self.dtypes[: DIFFERENTIABLE[type(inputs)]])
        seeded = getattr(inputs, "seed", None) is not None
        self.operands = rounding_of_operands(op, self.dtypes, spec, seeded)
        kl = getattr(spec, "kl", None)
        if kl is not None and kl.clamp is not None:
            # As the backends hold it: a float32 logvar that was clamped before lies on its edge, not outside.
            edges = torch.tensor(kl.clamp, dtype=self.acc, device="cpu").tolist()
            spec = spec._replace(kl=kl._replace(clamp=tuple(edges)))
        if getattr(self.dtypes, "x", None) == torch.uint8:
            of_x = getattr(spec, "likelihood", spec)
            inputs = inputs._replace(x=image(inputs.x, of_x.x_scale, of_x.x_shift, self.acc))
        with _apart():
            if seeded:
                inputs = inputs._replace(eps=sample_noise(inputs.mu, inputs.seed, spec.num_samples), seed=None)
            self.inputs, self.spec, self.z = _broadcast(_copied(inputs)), _copied(spec), _copied(z)
            if op == "linear_elbo" and z is None:
                self.z = torch.add(*sample_terms(self.inputs.latent, KL()))
                self.z = self.z if self.dtypes.mu == self.acc else self.z.to(self.dtypes.mu).double()

    def values(self) -> list[Truth | None]:
        """Of each output; None where the op returns none."""
        dtypes = {"z": getattr(self.dtypes, "mu", self.acc)}
        if self.op == "linear_elbo":
            dtypes |= {"nll": arithmetic_of_layer(self.dtypes), "kl": arithmetic_of(self.dtypes.latent[:4])}
        found: list[Truth | None] = []
        with _apart(), torch.no_grad():
            outputs = terms_of(self.op, self.inputs, _magnitudes(self.inputs), self.spec, self.z)
            for name, terms in zip(OUTPUTS[self.op], outputs, strict=False):
                if terms is None:
                    found.append(None)
                    continue
                value = torch.stack([t.factor * _sum(t.each, t.keep) for t in terms]).sum(0)
                size = torch.stack([abs(t.factor) * _sum(t.size.abs(), t.keep) for t in terms]).sum(0)
                found.append(self._truth(name, value, size, dtypes.get(name, self.acc)))
        return found

    def gradients(self, grad_outputs: Gradients) -> list[Truth | None] | None:
        """Of each differentiable input that needs one; None if an upstream gradient is not finite, and there is no truth."""
        asked = [i for i, need in enumerate(self.needs) if need]
        with _apart():
            v, sizes = (
                inputs._make(t.detach().requires_grad_() if i in asked else t for i, t in enumerate(inputs))
                for inputs in (self.inputs, _magnitudes(self.inputs))
            )
            pairs = zip(terms_of(self.op, v, sizes, self.spec, self.z), grad_outputs, strict=True)
            rated = [(t, widened(up) * t.factor) for terms, up in pairs if up is not None for t in terms or ()]
            if not all(bool(rate.isfinite().all()) for _, rate in rated):
                return None
            slopes, steepness = ([torch.zeros_like(v[i]) for i in asked] for _ in range(2))
            for term, rate in rated:
                shares = _differentiate(term.each, [v[i] for i in asked], rate)
                most = shares if term.size is term.each else _differentiate(term.size, [sizes[i] for i in asked], rate.abs())
                for k, (share, full) in enumerate(zip(shares, most, strict=True)):
                    slopes[k] += share
                    steepness[k] += full.abs()
            found: list[Truth | None] = [None] * len(self.needs)
            rate = max([1.0, *(float(torch.linalg.vector_norm(rate)) for _, rate in rated)])
            for i, slope, size in zip(asked, slopes, steepness, strict=True):
                slope, size = (t.sum_to_size(self.shapes[i]) for t in (slope, size))
                found[i] = self._truth(v._fields[i], slope, size, self.dtypes[i], rate)
            return found

    def _truth(self, name: str, value: Tensor, size: Tensor, dtype: torch.dtype, rate: float = 1.0) -> Truth:
        # What may vanish is the smallest normal number of the arithmetic, for each number that is added.
        underflow = rate * torch.finfo(arithmetic_of([dtype])).tiny * max(t.numel() for t in self.inputs if t is not None)
        if self.op == "linear_elbo" and name in ("mu", "logvar") and self.inputs.eps.numel():
            # And of z's gradient in half precision, on its way to this one, its dtype's smallest step for each sample.
            info, (_, spread) = torch.finfo(self.dtypes.mu), sample_terms(self.inputs.latent, KL())
            each = torch.ones_like(spread) if name == "mu" else 0.5 * spread.abs()
            underflow += info.eps * info.tiny * float((each if self.spec.num_samples is None else each.sum(0)).max())
        return Truth(value, size, dtype, underflow, self.operands.get(name, 0.0))


@contextmanager
def _apart() -> Iterator[None]:
    """Autograd is on, whatever the caller's mode, and keeps what it saves from the caller's hooks on saved tensors.

    torch.utils.checkpoint counts what its hooks see, and would not find the oracle's tensors again when it recomputes.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield


def _copied(value: Any) -> Any:
    """A record with its tensors in float64, without history."""
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(_copied, value))
    return widened(value) if isinstance(value, Tensor) else value


def _broadcast(inputs: Any) -> Any:
    """With variance, weight and prior in the shape of what they broadcast to, so that each element has terms of its own."""
    if isinstance(inputs, LAYERS):
        return inputs  # where sums are inside the terms anyway
    names = ("variance", "weight", "prior_mu", "prior_logvar", "prior_spread")
    given = {name: t for name, t in inputs._asdict().items() if name in names and t is not None}
    return inputs._replace(**{name: t.expand_as(inputs.mu if "prior" in name else inputs[0]) for name, t in given.items()})


def _magnitudes(inputs: Any) -> Any:
    """Of inputs inside whose terms there are sums, with the sign that lets x add to its residual. Log-variances stay."""
    names = ("h", "x", "mu", "weight", "bias", "eps") if isinstance(inputs, LAYERS) else ("eps",)
    given = {name: t.abs() for name, t in inputs._asdict().items() if name in names and t is not None}
    return inputs._replace(**{name: -t if name == "x" else t for name, t in given.items()})


def _sum(each: Tensor, keep: int) -> Tensor:
    return each.flatten(keep).sum(-1) if each.ndim > keep else each


def _differentiate(each: Tensor, inputs: Sequence[Tensor], rate: Tensor) -> Sequence[Tensor]:
    """The gradients of the sum of a term's elements, times the rate of each kept dimension."""
    if not each.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    rate = rate.reshape(rate.shape + (1,) * (each.ndim - rate.ndim)).expand(each.shape)
    return torch.autograd.grad(each, inputs, rate, retain_graph=True, allow_unused=True, materialize_grads=True)
