"""The ops that `fastelbo compare` compares, and their peers: what users write for the same quantities, and what torch has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from .. import functional, linear, specs
from ..dtypes import LOG_2PI
from .oracle import Oracle

Values = dict[str, Tensor]

FIXED = -2.0  # the log-variance of the ops with a fixed variance
FLOOR = 1e-6  # of gaussian_nll_loss
CONSTANTS = ("eps",)  # what gets no gradient
LATENT = ("mu", "logvar", "prior_mu", "prior_logvar", "eps")  # what has mu's shape, where there is a mu
HIDDEN = 20  # the width of a linear layer's input, which no shape says, except for WEIGHTS
WEIGHTS = 2**20  # the most elements that a weight has without being larger than x
# Of what a linear layer takes: batch, elements and hidden width.
AXES = {"x": "be", "weight": "eh", "bias": "e", "h": "bh", "mu": "bh", "logvar": "bh", "eps": "bh", "recon_logvar": "e"}

# ---- the formulas, per element: as users write them, and as torch has them -------------------------------------------------------

Formula = Callable[..., Tensor]


def usual_sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * eps


def with_floor(var: Tensor) -> Tensor:
    return var + (var.clamp(min=FLOOR) - var).detach()  # the gradient passes through, as in torch


def normal(mean: Tensor, logvar: Tensor) -> Normal:
    # Unchecked: where the standard deviation underflows, its error is of interest and not an exception.
    return Normal(mean, torch.exp(0.5 * logvar), validate_args=False)


# The KL, and the likelihood by what its variance is.
USUAL: dict[str, Formula] = {
    "kl": lambda mu, logvar: -0.5 * (1 + logvar - mu**2 - logvar.exp()),
    "kl/prior": lambda mu, logvar, prior_mu, prior_logvar: (
        0.5 * (prior_logvar - logvar - 1 + (logvar.exp() + (mu - prior_mu) ** 2) / prior_logvar.exp())
    ),
    "fixed": lambda recon, x: 0.5 * (LOG_2PI + FIXED + (x - recon) ** 2 / math.exp(FIXED)),
    "logvar": lambda recon, x, logvar: 0.5 * (LOG_2PI + logvar + (x - recon) ** 2 / logvar.exp()),
    "std": lambda recon, x, std: 0.5 * LOG_2PI + torch.log(std) + 0.5 * ((x - recon) / std) ** 2,
    "var": lambda recon, x, var: 0.5 * (LOG_2PI + torch.log(var) + (x - recon) ** 2 / var),
    "loss": lambda input, target, var: 0.5 * (torch.log(with_floor(var)) + (input - target) ** 2 / with_floor(var)),
}
TORCH: dict[str, Formula] = {
    "kl": lambda mu, logvar: kl_divergence(normal(mu, logvar), normal(torch.zeros_like(mu), torch.zeros_like(mu))),
    "kl/prior": lambda mu, logvar, prior_mu, prior_logvar: kl_divergence(normal(mu, logvar), normal(prior_mu, prior_logvar)),
    "fixed": lambda recon, x: -normal(recon, torch.full_like(recon, FIXED)).log_prob(x),
    "logvar": lambda recon, x, logvar: -normal(recon, logvar).log_prob(x),
    "std": lambda recon, x, std: -Normal(recon, std, validate_args=False).log_prob(x),
    "var": lambda recon, x, var: F.gaussian_nll_loss(recon, x, var, full=True, eps=0.0, reduction="none"),
    "loss": lambda input, target, var: F.gaussian_nll_loss(input, target, var, reduction="none"),
}


def decoded(v: Values) -> Tensor:
    """The reconstruction of a linear layer, whose input is h or a sample. `z`, if given, is that sample's value."""
    h = v["h"] if "h" in v else usual_sample(v["mu"], v["logvar"], v["eps"])
    if "z" in v:
        # A gradient through z's dtype is rounded to it, as the value was.
        h = (h + (v["z"].to(h.dtype) - h).detach()).to(v["z"].dtype).to(h.dtype)
    weight, bias = v["weight"], v["bias"]
    dtype = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), bias.dtype)  # products alone do not promote
    return F.linear(h.to(dtype), weight.to(dtype), bias.to(dtype))


# ---- the ops ---------------------------------------------------------------------------------------------------------------------

# Of everything except z.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sample": lambda t: t.reshape(t.shape[0], -1).sum(1),
    "batchmean": lambda t: t.reshape(t.shape[0], -1).sum(1).mean(),
    "mean": lambda t: t.mean(),
}


@dataclass(frozen=True)
class Op:
    """A public function called in one way."""

    name: str  # of the function, and the way
    args: list[str]
    results: list[str]
    reduction: str
    fixed: dict[str, float] = field(default_factory=dict)  # arguments that are numbers
    scalar: str = ""  # the argument that is a 0-d tensor

    @property
    def function(self) -> str:
        return self.name.split("/")[0]

    @property
    def is_linear(self) -> bool:
        """Whether it has a linear layer inside: its tensors differ in shape, and what its products add up may cancel."""
        return self.function.startswith("linear_")

    @property
    def learned(self) -> list[str]:
        return [name for name in self.args if name not in CONSTANTS]

    @property
    def variance(self) -> str:
        """The argument that is the likelihood's variance, or "fixed"."""
        names = ("std", "var", "recon_logvar") if "mu" in self.args else ("std", "var", "logvar")
        return next((name for name in names if name in self.args), "fixed")

    def axes(self, name: str) -> str:
        """Of an argument of a linear op."""
        return "" if name == self.scalar else "e" if name == self.variance else AXES[name]

    def size(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which an argument is drawn."""
        if name == self.scalar:
            return ()
        if not self.is_linear:
            return shape
        batch, elements = shape[0], math.prod(shape[1:])
        lengths = {"b": batch, "e": elements, "h": max(1, min(HIDDEN, WEIGHTS // max(batch, elements)))}
        return tuple(lengths[axis] for axis in self.axes(name))

    def side(self, name: str) -> str:
        """The argument whose shape `name` broadcasts to."""
        if self.is_linear:
            return name
        return "mu" if "mu" in self.args and name in LATENT else self.args[0]

    def sources(self, result: str) -> list[str]:
        """The arguments that a result, or the gradient "d name" in an argument, is computed from element by element."""
        of = result.removeprefix("d ")
        if self.is_linear:
            return [name for name in self.args if result != of and self.axes(name) == self.axes(of)]
        if result == "loss":
            return list(self.args)
        on_mu = of in ("z", "kl") or self.side(of) == "mu"
        return [name for name in self.args if (self.side(name) == "mu") == on_mu and not (of == "kl" and name in CONSTANTS)]

    def fused(self, impl: str, v: Values) -> list[Tensor]:
        options: dict[str, Any] = dict(self.fixed)
        if self.function != "gaussian_nll_loss":  # which has torch's arguments and no other
            options["impl"] = impl
        out = getattr(linear if self.is_linear else functional, self.function)(**v, **options)
        return list(out) if isinstance(out, tuple) else [out]

    def usual(self, v: Values) -> list[Tensor]:
        return self._written(v, USUAL)

    def library(self, v: Values) -> list[Tensor]:
        return self._written(v, TORCH)

    @property
    def has_library(self) -> bool:
        return self.results != ["z"]

    def _written(self, v: Values, formulas: dict[str, Formula]) -> list[Tensor]:
        def quantity(name: str) -> Tensor:
            if name == "z":
                return usual_sample(v["mu"], v["logvar"], v["eps"])
            if name == "loss":
                return quantity("nll") + quantity("kl")
            if name == "kl":
                prior = [v[n] for n in ("prior_mu", "prior_logvar") if n in v]
                each = formulas["kl/prior" if prior else "kl"](v["mu"], v["logvar"], *prior)
            else:
                recon, x = (decoded(v), v["x"]) if self.is_linear else (v[n] for n in self.args[:2])
                kind = "loss" if self.function == "gaussian_nll_loss" else self.variance.removeprefix("recon_")
                each = formulas[kind](recon, x, *(v[n] for n in (self.variance,) if n in v))
            return REDUCTIONS[self.reduction](each)

        return [quantity(name) for name in self.results]

    def truth(self, v: Values, ups: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Results, and the gradients in what is learned, in float64, each with its size."""
        first = v[self.args[0]]
        op, record, spec = self._of_backend(len(first), first.numel())
        given = {self._field(name): t for name, t in v.items()}
        oracle = Oracle(op, record(*(given.get(name) for name in record._fields)), spec, z=v.get("z"))
        values, each = oracle.values(), iter(ups)
        gradients = oracle.gradients(tuple(None if t is None else next(each) for t in values))
        assert gradients is not None
        by_field = dict(zip(record._fields, gradients, strict=False))
        found = [*values, *(by_field[self._field(name)] for name in self.learned)]
        return [(t.value, t.size) for t in found if t is not None]

    def _field(self, name: str) -> str:
        """An argument as a record of inputs has it."""
        return {"input": "recon", "target": "x", self.variance: "variance"}.get(name, name)

    def _of_backend(self, batch: int, count: int) -> tuple[str, type[Any], Any]:
        """The op of a backend that this calls, the record of its inputs, and its spec."""
        keep, scale = {"batchmean": (0, 1 / batch), "mean": (0, 1 / count)}.get(self.reduction, (1, 1.0))
        kl = specs.KL(keep, scale)
        likelihood = specs.Likelihood(keep, scale, self.variance if self.variance in ("std", "var") else "logvar", FIXED)
        if self.function == "gaussian_nll_loss":
            return "gaussian_nll", specs.NLLInputs, likelihood._replace(full=False, floor=FLOOR)
        if self.function == "gaussian_nll":
            return "gaussian_nll", specs.NLLInputs, likelihood
        if self.function in ("elbo_terms", "elbo_loss"):
            return self.function.removesuffix("_loss"), specs.ElboInputs, specs.Elbo(likelihood, kl)
        if self.function == "linear_gaussian_nll":
            return "linear_nll", specs.LinearInputs, specs.Linear(likelihood)
        if self.function == "linear_elbo_loss":
            return "linear_elbo", specs.LinearElboInputs, specs.LinearElbo(specs.Linear(likelihood), kl)
        return "latent", specs.LatentInputs, specs.Latent(kl, "kl" in self.results)


def _op(name: str, args: str, results: str, reduction: str, scalar: str = "", **fixed: float) -> Op:
    return Op(name, args.split(), results.split(), reduction, fixed, scalar)


OPS = (
    _op("reparameterize", "mu logvar eps", "z", "sample"),
    _op("reparameterize_kl", "mu logvar eps", "z kl", "sample"),
    _op("gaussian_kl/standard", "mu logvar", "kl", "sample"),
    _op("gaussian_kl/prior", "mu logvar prior_mu prior_logvar", "kl", "sample"),
    _op("gaussian_nll/fixed", "recon x", "nll", "sample", logvar=FIXED),
    _op("gaussian_nll/logvar", "recon x logvar", "nll", "sample"),
    _op("gaussian_nll/std", "recon x std", "nll", "sample"),
    _op("gaussian_nll/var", "recon x var", "nll", "sample"),
    _op("gaussian_nll_loss", "input target var", "nll", "mean"),
    _op("elbo_terms", "recon x recon_logvar mu logvar", "nll kl", "batchmean"),
    _op("elbo_loss/fixed", "recon x mu logvar", "loss", "batchmean", recon_logvar=FIXED),
    _op("elbo_loss/element", "recon x recon_logvar mu logvar", "loss", "batchmean"),
    _op("elbo_loss/scalar", "recon x recon_logvar mu logvar", "loss", "batchmean", "recon_logvar"),
    _op("linear_gaussian_nll/fixed", "h weight bias x", "nll", "sample", logvar=FIXED),
    _op("linear_gaussian_nll/element", "h weight bias x logvar", "nll", "sample"),
    _op("linear_gaussian_nll/scalar", "h weight bias x logvar", "nll", "sample", "logvar"),
    _op("linear_elbo_loss/fixed", "mu logvar eps weight bias x", "loss", "batchmean", recon_logvar=FIXED),
    _op("linear_elbo_loss/element", "mu logvar eps weight bias x recon_logvar", "loss", "batchmean"),
    _op("linear_elbo_loss/scalar", "mu logvar eps weight bias x recon_logvar", "loss", "batchmean", "recon_logvar"),
)
