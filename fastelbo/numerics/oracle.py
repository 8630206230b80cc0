"""The float64 truth of every output and gradient of an op, with the size of each element.

The **size** of an element is the sum of the magnitudes of the terms that are added to give it. Where the terms have one sign it is
the element itself. Where they cancel, the element says nothing about the error: the slope of a log-variance, (1 - d^2 / s^2) / 2,
is 0 wherever the variance fits, and there a single correct rounding is off by any multiple of the result. The size of a gradient
adds the magnitudes of the gradients of single terms and elements, before a shared input sums them. So the equations of
`fastelbo.reference` stand here taken apart into terms: of forms that do not cancel without need, so that a KL near its prior, whose
usual formula subtracts numbers of size 1, is held to its own size.

Across a linear layer, and over several samples of one posterior, there are sums inside a term, which cancel too. There sizes come
from a second pass, through the same expressions of magnitudes, in which nothing cancels: a residual's size is that of x, of the
bias and of every product, and the size of what the residual enters follows. (Products of magnitudes, written out for each
gradient, would give the same sizes. They would also be a second definition of each op, which has to be kept right by hand.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import specs
from ..dtypes import LOG_2PI
from ..noise import sample_noise
from ..reference import present
from ..specs import KL, Gradients, Likelihood, Needs
from .tolerance import Truth, arithmetic_of, arithmetic_of_layer, rounding_of_operands, widened

Terms = list[Tensor]
Clamp = tuple[float, float] | None

OUTPUTS = {
    "gaussian_nll": ("nll",),
    "latent": ("z", "kl"),
    "elbo": ("loss", "nll", "kl"),
    "elbo_terms": ("nll", "kl"),
    "linear_nll": ("nll",),
    "linear_elbo": ("loss", "nll", "kl"),
}

# ---- quantities per element, as their terms --------------------------------------------------------------------------------------


def nll_terms(inputs: specs.NLLInputs, spec: Likelihood) -> Terms:
    recon, x, variance, weight = inputs
    if variance is None:
        variance = torch.full((), spec.logvar, dtype=recon.dtype, device=recon.device)
    recon, x, variance = present(weight, recon, x, variance.expand(recon.shape))
    if weight is not None and spec.parameter != "logvar":
        variance = torch.where(weight == 0, 1.0, variance)
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


def kl_terms(inputs: specs.LatentInputs, spec: KL) -> Terms:
    """Two that are never negative; e^v - 1 - v by its Taylor series, to the last bit for |v| < 1/2, where it would cancel."""
    mu, logvar, prior_mu, prior_logvar, weight, *_ = inputs
    zero = torch.zeros_like(mu)
    prior = zero if prior_mu is None else prior_mu, zero if prior_logvar is None else prior_logvar
    mu, logvar, prior_mu, prior_logvar = present(weight, mu, logvar, *prior)
    v = clamped(logvar, spec.clamp) - prior_logvar
    small = v.clamp(-0.5, 0.5)
    series = torch.zeros_like(v)
    for k in range(19, 1, -1):
        series = series * small + 1 / math.factorial(k)
    rest = torch.where(v.abs() < 0.5, small * small * series, torch.expm1(v) - v)
    terms = [0.5 * (mu - prior_mu) ** 2 * torch.exp(-prior_logvar), 0.5 * rest]
    return terms if weight is None else [t * weight for t in terms]


def sample_terms(inputs: specs.LatentInputs, clamp: Clamp) -> Terms:
    assert inputs.eps is not None
    return [inputs.mu.expand(inputs.eps.shape), torch.exp(0.5 * clamped(inputs.logvar, clamp)) * inputs.eps]


def clamped(logvar: Tensor, clamp: Clamp) -> Tensor:
    return logvar if clamp is None else torch.clamp(logvar, *clamp)


def decoded(inputs: specs.LinearInputs) -> specs.NLLInputs:
    """The reconstruction of each row of h, beside its row of x."""
    h, x, weight, bias, variance = inputs
    recon = h @ weight.T
    recon = recon if bias is None else recon + bias
    if recon.shape[0] != x.shape[0]:
        x = x.expand(recon.shape[0] // x.shape[0], *x.shape).flatten(0, 1)
    return specs.NLLInputs(recon, x, variance, None)


# ---- what each output adds up ----------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    each: Tensor  # per element
    size: Tensor  # the same of magnitudes; `each` itself where nothing cancels inside
    factor: Any


class Sum(NamedTuple):
    """An output: terms, summed over all except the first `keep` dimensions."""

    keep: int
    terms: list[Term]

    @classmethod
    def of(cls, spec: Likelihood | KL, each: Terms, sizes: Terms | None = None) -> Sum:
        return cls(spec.keep, [Term(*pair, spec.scale) for pair in zip(each, sizes or each, strict=True)])


Sums = list[Sum | None]


def _latent(v: specs.LatentInputs, sizes: specs.LatentInputs, spec: specs.Latent) -> Sums:
    z = None
    if v.eps is not None:
        z = Sum.of(KL(keep=v.eps.ndim), sample_terms(v, spec.kl.clamp), sample_terms(sizes, spec.kl.clamp))
    return [z, Sum.of(spec.kl, kl_terms(v, spec.kl)) if spec.want_kl else None]


def _elbo_terms(v: specs.ElboInputs, sizes: specs.ElboInputs, spec: specs.Elbo) -> Sums:
    return [Sum.of(spec.likelihood, nll_terms(v.nll, spec.likelihood)), Sum.of(spec.kl, kl_terms(v.latent, spec.kl))]


def _linear_nll(v: specs.LinearInputs, sizes: specs.LinearInputs, spec: specs.Linear) -> Sums:
    each, magnitudes = (nll_terms(decoded(inputs), spec.likelihood) for inputs in (v, sizes))
    return [Sum.of(spec.likelihood, each, magnitudes)]


def _linear_elbo(v: specs.LinearElboInputs, sizes: specs.LinearElboInputs, spec: specs.LinearElbo, z: Tensor) -> Sums:
    likelihood, terms = spec.linear.likelihood, []
    for inputs in (v, sizes):
        h = torch.add(*sample_terms(inputs.latent, None))
        h = h + (z - h).detach() if inputs is v else h  # z's value, with the gradient of what it was made from
        each = nll_terms(decoded(inputs.linear(h if spec.num_samples is None else h.flatten(0, 1))), likelihood)
        if likelihood.keep and spec.num_samples is not None:  # all samples of a row are added up too
            each = [t.unflatten(0, z.shape[:2]).transpose(0, 1) for t in each]
        terms.append(each)
    return _loss([Sum.of(likelihood, *terms), Sum.of(spec.kl, kl_terms(v.latent, spec.kl))], spec)


def _loss(terms: Sums, spec: specs.Elbo | specs.LinearElbo) -> Sums:
    nll, kl = terms
    assert nll is not None
    assert kl is not None
    loss = Sum(nll.keep, [*nll.terms, *(t._replace(factor=t.factor * spec.beta) for t in kl.terms)])
    return [loss, nll, kl] if spec.return_terms else [loss]


_SUMS: dict[str, Callable[..., Sums]] = {
    "gaussian_nll": lambda v, _, spec: [Sum.of(spec, nll_terms(v, spec))],
    "latent": _latent,
    "elbo": lambda v, sizes, spec: _loss(_elbo_terms(v, sizes, spec), spec),
    "elbo_terms": _elbo_terms,
    "linear_nll": _linear_nll,
    "linear_elbo": _linear_elbo,
}


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
        self.op, self.needs = op, needs or tuple(t is not None for t in inputs[: inputs.differentiable])
        self.shapes: list[Any] = [None if t is None else t.shape for t in inputs]
        self.dtypes = inputs._make(None if t is None else t.dtype for t in inputs)
        self.acc = arithmetic_of(self.dtypes[: inputs.differentiable])
        seeded = getattr(inputs, "seed", None) is not None
        self.operands = rounding_of_operands(op, self.dtypes, spec, seeded)
        with _apart():
            if seeded:
                inputs = inputs._replace(eps=sample_noise(inputs.mu, inputs.seed, spec.num_samples), seed=None)
            self.inputs, self.spec = _broadcast(_copied(inputs)), _with_edges(_copied(spec), self.acc)
            self.z = () if op != "linear_elbo" else (self._sample() if z is None else widened(z),)

    def values(self) -> list[Truth | None]:
        """Of each output; None where the op returns none."""
        dtypes = {"z": getattr(self.dtypes, "mu", self.acc)}
        if self.op == "linear_elbo":
            dtypes |= {"nll": arithmetic_of_layer(self.dtypes), "kl": arithmetic_of(self.dtypes.latent[:4])}

        def truth(name: str, total: Sum) -> Truth:
            dtype = dtypes.get(name, self.acc)
            return Truth(*_added(total), dtype, self._underflow(dtype), self.operands.get(name, 0.0))

        with _apart(), torch.no_grad():
            named = zip(OUTPUTS[self.op], self._sums(self.inputs, _magnitudes(self.inputs)), strict=False)
            return [None if total is None else truth(name, total) for name, total in named]

    def gradients(self, grad_outputs: Gradients) -> list[Truth | None] | None:
        """Of each differentiable input that needs one; None if an upstream gradient is not finite, and there is no truth."""
        with _apart():
            v, sizes = (self._leaves(inputs) for inputs in (self.inputs, _magnitudes(self.inputs)))
            pairs = zip(self._sums(v, sizes), grad_outputs, strict=True)
            terms = [(term, up) for total, up in pairs if total is not None and up is not None for term in total.terms]
            rated = [(term, widened(up) * term.factor) for term, up in terms]
            if not all(bool(rate.isfinite().all()) for _, rate in rated):
                return None
            asked = [i for i, need in enumerate(self.needs) if need]
            slopes, steepness = ([torch.zeros_like(v[i]) for i in asked] for _ in range(2))
            for term, rate in rated:
                shares = _differentiate(term.each, [v[i] for i in asked], rate)
                most = shares if term.size is term.each else _differentiate(term.size, [sizes[i] for i in asked], rate.abs())
                slopes = [slope + share for slope, share in zip(slopes, shares, strict=True)]
                steepness = [full + share.abs() for full, share in zip(steepness, most, strict=True)]
            rate = max([1.0, *(float(torch.linalg.vector_norm(rate)) for _, rate in rated)])
            found: list[Truth | None] = [None] * len(self.needs)
            for i, slope, size in zip(asked, slopes, steepness, strict=True):
                name, shape, dtype = v._fields[i], self.shapes[i], self.dtypes[i]
                underflow, operands = rate * self._underflow(dtype) + self._steps_of_z(name), self.operands.get(name, 0.0)
                found[i] = Truth(slope.sum_to_size(shape), size.sum_to_size(shape), dtype, underflow, operands)
            return found

    def _sums(self, v: Any, sizes: Any) -> Sums:
        return _SUMS[self.op](v, sizes, self.spec, *self.z)

    def _leaves(self, inputs: Any) -> Any:
        needs = self.needs + (False,) * (len(inputs) - len(self.needs))
        return inputs._make(t.detach().requires_grad_() if need else t for t, need in zip(inputs, needs, strict=True))

    def _sample(self) -> Tensor:
        z: Tensor = torch.add(*sample_terms(self.inputs.latent, None))
        return z.to(self.dtypes.mu).to(z.dtype) if self.dtypes.mu != self.acc else z

    def _underflow(self, dtype: torch.dtype) -> float:
        """The smallest normal number of the arithmetic, for each number that is added."""
        return torch.finfo(arithmetic_of([dtype])).tiny * max(t.numel() for t in self.inputs if t is not None)

    def _steps_of_z(self, name: str) -> float:
        """What z's gradient in half precision loses on its way to a gradient: its dtype's smallest step for each sample."""
        if self.op != "linear_elbo" or name not in ("mu", "logvar") or not self.inputs.eps.numel():
            return 0.0
        info, (_, spread) = torch.finfo(self.dtypes.mu), sample_terms(self.inputs.latent, None)
        each = torch.ones_like(spread) if name == "mu" else 0.5 * spread.abs()
        return info.eps * info.tiny * float((each if self.spec.num_samples is None else each.sum(0)).max())


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
    if isinstance(inputs, (specs.LinearInputs, specs.LinearElboInputs)):
        return inputs  # where sums are inside the terms anyway
    given: dict[str, Any] = {n: getattr(inputs, n, None) for n in ("variance", "weight", "prior_mu", "prior_logvar")}
    like = {name: inputs.mu if "prior" in name else inputs[0] for name, t in given.items() if t is not None}
    return inputs._replace(**{name: given[name].expand(of.shape) for name, of in like.items()})


def _with_edges(spec: Any, acc: torch.dtype) -> Any:
    """With the clamp as the backends hold it: a float32 logvar that was clamped before lies on its edge, not outside."""
    kl = getattr(spec, "kl", None)
    if kl is None or kl.clamp is None:
        return spec
    return spec._replace(kl=kl._replace(clamp=tuple(torch.tensor(kl.clamp, dtype=acc, device="cpu").tolist())))


def _magnitudes(inputs: Any) -> Any:
    """Of inputs inside whose terms there are sums, with the sign that lets x add to its residual. Log-variances stay."""
    of_layer = isinstance(inputs, (specs.LinearInputs, specs.LinearElboInputs))
    kept = ("logvar", "variance", "prior_mu", "prior_logvar")

    def magnitude(name: str, t: Tensor | None) -> Tensor | None:
        if t is None or name in kept or not (of_layer or name == "eps"):
            return t
        return -t.abs() if name == "x" else t.abs()

    return inputs._make(magnitude(*pair) for pair in zip(inputs._fields, inputs, strict=True))


def _added(total: Sum) -> tuple[Tensor, Tensor]:
    """The sum of the terms, and that of their magnitudes."""

    def add(each: Tensor) -> Tensor:
        return each.flatten(total.keep).sum(-1) if each.ndim > total.keep else each

    pairs = [(term.factor * add(term.each), abs(term.factor) * add(term.size.abs())) for term in total.terms]
    value, size = (torch.stack(parts).sum(0) for parts in zip(*pairs, strict=True))
    return value, size


def _differentiate(each: Tensor, inputs: Sequence[Tensor], rate: Tensor) -> Sequence[Tensor]:
    """The gradients of the sum of a term's elements, times the rate of each kept dimension."""
    if not each.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    rate = rate.reshape(rate.shape + (1,) * (each.ndim - rate.ndim)).expand(each.shape)
    return torch.autograd.grad(each, inputs, rate, retain_graph=True, allow_unused=True, materialize_grads=True)
