"""The ops that `fastelbo compare` compares, and their peers: what users write for the same quantities, and what torch has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Laplace,
    NegativeBinomial,
    Normal,
    Poisson,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
    kl_divergence,
)

from .. import counts, drop_in, functional, latent, likelihoods, linear, specs
from ..arguments import bin_of
from ..dtypes import LOG_2PI, accumulate_dtype
from ..reference import reparameterize
from .oracle import Oracle

Values = dict[str, Tensor]
Formulas = dict[str, Callable[..., Tensor]]

FIXED = -2.0  # the log-variance of the ops with a fixed variance
FLOOR = 1e-6  # of gaussian_nll_loss
ZERO, ONE = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in (0.0, 1.0))
CONSTANTS = ("eps",)  # what gets no gradient
# The likelihoods that are not Gaussian, and the module of each; those of counts, and of bins, have constant data.
COUNTED = ("poisson_nll", "negative_binomial_nll", "zero_inflated_negative_binomial_nll")
FAMILIES: dict[str, Any] = {
    **dict.fromkeys(("laplace_nll", "bernoulli_nll", "discretized_logistic_nll"), likelihoods), **dict.fromkeys(COUNTED, counts),
}  # fmt: skip
HIDDEN = 20  # the width of a linear layer's input, which no shape says, except for WEIGHTS
WEIGHTS = 2**20  # the most elements that a weight has without being larger than x

# ---- the formulas, per element: as users write them, and as torch has them -------------------------------------------------------


def with_floor(var: Tensor) -> Tensor:
    return var + (var.clamp(min=FLOOR) - var).detach()  # the gradient passes through, as in torch


def normal(mean: Tensor, logvar: Tensor) -> Normal:
    # Unchecked: where the standard deviation underflows, its error is of interest and not an exception.
    return Normal(mean, torch.exp(0.5 * logvar), validate_args=False)


def std_of(form: str, spread: Tensor) -> Tensor:
    return {"logvar": lambda t: torch.exp(0.5 * t), "logstd": torch.exp, "std": lambda t: t, "var": torch.sqrt}[form](spread)


def kl_of_normals(form: str, mu: Tensor, spread: Tensor, prior_mu: Tensor | None = None, prior: Tensor | None = None) -> Tensor:
    zero, one = torch.zeros_like(mu), torch.ones_like(mu)
    q, p = (std_of(form, t) if t is not None else one for t in (spread, prior))
    return kl_divergence(Normal(mu, q, validate_args=False), Normal(zero if prior_mu is None else prior_mu, p, validate_args=False))


def bins_of_pixelcnn(recon: Tensor, x: Tensor, logscale: Tensor) -> Tensor:
    """As PixelCNN++ has it: the density stands in for the mass of a bin where that is small."""
    d, inverse = x - recon, torch.exp(-logscale)
    a, b, middle = inverse * (d + 1 / 255), inverse * (d - 1 / 255), inverse * d
    mass = torch.sigmoid(a) - torch.sigmoid(b)
    density = middle - logscale - 2 * F.softplus(middle) - math.log(127.5)
    inner = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), density)
    return -torch.where(x < -0.999, a - F.softplus(a), torch.where(x > 0.999, -F.softplus(b), inner))


def bins_of_logistic(recon: Tensor, x: Tensor, logscale: Tensor) -> Tensor:
    """Of the logistic distribution that torch's documentation makes of a uniform one."""
    uniform = Uniform(torch.zeros_like(recon), torch.ones_like(recon), validate_args=False)
    steps = [SigmoidTransform().inv, AffineTransform(recon, torch.exp(logscale))]
    logistic = TransformedDistribution(uniform, steps, validate_args=False)
    upto = torch.where(x > 0.999, 1.0, logistic.cdf(x + 1 / 255))
    return -torch.log(upto - torch.where(x < -0.999, 0.0, logistic.cdf(x - 1 / 255)))


def negative_binomial(mean: Tensor, x: Tensor, theta: Tensor) -> Tensor:
    """As scvi-tools has it, without the eps inside its logarithms."""
    total = torch.log(theta + mean)
    nll = -theta * (torch.log(theta) - total) - x * (torch.log(mean) - total)
    return nll - torch.lgamma(x + theta) + torch.lgamma(theta) + torch.lgamma(x + 1)


def zero_inflated(mean: Tensor, x: Tensor, theta: Tensor, zi_logits: Tensor) -> Tensor:
    """Likewise."""
    softplus, total = F.softplus(-zi_logits), torch.log(theta + mean)
    at_zero = -zi_logits + theta * (torch.log(theta) - total)
    others = at_zero - softplus + x * (torch.log(mean) - total)
    others = others + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return -torch.where(x == 0, F.softplus(at_zero) - softplus, others)


# The KL by the form of its spreads, and the likelihood by what its variance is.
USUAL: Formulas = {
    "kl": lambda mu, logvar: -0.5 * (1 + logvar - mu**2 - logvar.exp()),
    "kl/prior": lambda mu, logvar, prior_mu, prior_logvar: (
        0.5 * (prior_logvar - logvar - 1 + (logvar.exp() + (mu - prior_mu) ** 2) / prior_logvar.exp())
    ),
    "kl/logstd": lambda mu, logstd, prior_mu=0.0, prior=ZERO: (
        -0.5 + prior - logstd + 0.5 * (logstd.exp() ** 2 + (mu - prior_mu) ** 2) / prior.exp() ** 2
    ),
    "kl/std": lambda mu, std, prior_mu=0.0, prior=ONE: (
        prior.log() - std.log() + 0.5 * (std**2 + (mu - prior_mu) ** 2) / prior**2 - 0.5
    ),
    "kl/var": lambda mu, var, prior_mu=0.0, prior=ONE: 0.5 * (prior.log() - var.log() + (var + (mu - prior_mu) ** 2) / prior - 1),
    "log_prob": lambda z, mu, logvar: -0.5 * (LOG_2PI + logvar + (z - mu) ** 2 / logvar.exp()),
    "fixed": lambda recon, x: 0.5 * (LOG_2PI + FIXED + (x - recon) ** 2 / math.exp(FIXED)),
    "logvar": lambda recon, x, logvar: 0.5 * (LOG_2PI + logvar + (x - recon) ** 2 / logvar.exp()),
    "std": lambda recon, x, std: 0.5 * LOG_2PI + torch.log(std) + 0.5 * ((x - recon) / std) ** 2,
    "var": lambda recon, x, var: 0.5 * (LOG_2PI + torch.log(var) + (x - recon) ** 2 / var),
    "laplace": lambda recon, x, logscale: (x - recon).abs() / logscale.exp() + logscale + math.log(2.0),
    "bernoulli": lambda logits, x: F.softplus(logits) - x * logits,
    "poisson": lambda rate, x: rate - x * torch.log(rate) + torch.lgamma(x + 1),
    "negative_binomial": negative_binomial,
    "zero_inflated_negative_binomial": zero_inflated,
    "discretized_logistic": bins_of_pixelcnn,
    "loss": lambda input, target, var: 0.5 * (torch.log(with_floor(var)) + (input - target) ** 2 / with_floor(var)),
}
TORCH: Formulas = {
    "kl": partial(kl_of_normals, "logvar"),
    "kl/prior": partial(kl_of_normals, "logvar"),
    **{f"kl/{form}": partial(kl_of_normals, form) for form in ("logstd", "std", "var")},
    "log_prob": lambda z, mu, logvar: normal(mu, logvar).log_prob(z),
    "fixed": lambda recon, x: -normal(recon, torch.full_like(recon, FIXED)).log_prob(x),
    "logvar": lambda recon, x, logvar: -normal(recon, logvar).log_prob(x),
    "std": lambda recon, x, std: -Normal(recon, std, validate_args=False).log_prob(x),
    "var": lambda recon, x, var: F.gaussian_nll_loss(recon, x, var, full=True, eps=0.0, reduction="none"),
    "laplace": lambda recon, x, logscale: -Laplace(recon, torch.exp(logscale), validate_args=False).log_prob(x),
    "bernoulli": lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none"),
    "poisson": lambda rate, x: -Poisson(rate, validate_args=False).log_prob(x),
    "negative_binomial": lambda mean, x, theta: (
        -NegativeBinomial(theta, logits=torch.log(mean / theta), validate_args=False).log_prob(x)
    ),
    "discretized_logistic": bins_of_logistic,
    "loss": lambda input, target, var: F.gaussian_nll_loss(input, target, var, reduction="none"),
}


def sampled(v: Values) -> Tensor:
    """A sample. `z`, if given, is its value."""
    z = reparameterize(v["mu"], v["logvar"], v["eps"])
    if "z" not in v:
        return z
    # A gradient through z's dtype is rounded to it, as the value was.
    return (z + (v["z"].to(z.dtype) - z).detach()).to(v["z"].dtype).to(z.dtype)


def decoded(v: Values) -> Tensor:
    """The reconstruction of a linear layer, whose input is h or a sample."""
    h = v["h"] if "h" in v else sampled(v)
    weight, bias = v["weight"], v["bias"]
    dtype = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), bias.dtype)  # products alone do not promote
    return F.linear(h.to(dtype), weight.to(dtype), bias.to(dtype))


# ---- the ops ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """A public function called in one way."""

    name: str  # of the function, and the way: "fixed" is with a number for the variance
    args: dict[str, str]  # of each its axes: all of x's or of z's; of a layer the batch, the elements, the hidden width
    results: list[str]
    reduction: str

    @property
    def function(self) -> str:
        return self.name.split("/")[0]

    @property
    def is_linear(self) -> bool:
        """Whether it has a linear layer inside: its tensors differ in shape, and what its products add up may cancel."""
        return "weight" in self.args

    @property
    def decodes(self) -> bool:
        """Whether it makes a reconstruction of a sample by itself."""
        return "x" in self.args and "eps" in self.args

    @property
    def takes_own(self) -> bool:
        """Whether a user's tensors can be given to it."""
        return self.is_linear or not self.decodes

    @property
    def learned(self) -> list[str]:
        constants = (*CONSTANTS, "x") if self.function in ("discretized_logistic_nll", *COUNTED) else CONSTANTS
        return [name for name in self.args if name not in constants]

    @property
    def family(self) -> str:
        """The likelihood's."""
        return self.function.removesuffix("_nll") if self.function in FAMILIES else "gaussian"

    @property
    def has_library(self) -> bool:
        """Whether torch has it: no zero-inflated distribution."""
        return self.family in TORCH or self.family == "gaussian"

    @property
    def variance(self) -> str:
        """The argument that is the likelihood's variance, or "fixed"."""
        names = ("std", "var", "logscale", "theta", "recon_logvar" if "mu" in self.args else "logvar")
        return next((name for name in names if name in self.args), "fixed")

    @property
    def form(self) -> str:
        """The form of the posterior's spread."""
        return next((form for form in ("logstd", "std", "var") if "mu" in self.args and form in self.args), "logvar")

    def size(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which an argument is drawn."""
        batch, elements = shape[0], math.prod(shape[1:])
        hidden = max(1, min(HIDDEN, WEIGHTS // max(batch, elements)))
        lengths = {"x": shape, "z": shape, "b": (batch,), "e": (elements,), "h": (hidden,)}
        return tuple(length for axis in self.args[name] for length in lengths[axis])

    def sources(self, result: str) -> list[str]:
        """The arguments that a result, or the gradient "d name" in an argument, is computed from element by element."""
        axes = {"z": "z", "kl": "z", "nll": "x", **{f"d {name}": axes for name, axes in self.args.items()}}.get(result)
        return [name for name in self.args if self.args[name] == axes and not (result == "kl" and name in CONSTANTS)]

    def fused(self, impl: str, v: Values) -> list[Tensor]:
        options: dict[str, Any] = {} if self.function == "gaussian_nll_loss" else {"impl": impl}  # that has torch's arguments only
        if self.name.endswith("/fixed"):
            options["recon_logvar" if "mu" in self.args else "logvar"] = FIXED
        homes = {"gaussian_nll_loss": drop_in, "gaussian_kl": latent, "reparameterize": latent, "reparameterize_kl": latent}
        homes |= FAMILIES
        home = linear if self.is_linear else homes.get(self.function, functional)
        out = getattr(home, self.function)(**v, **options)
        return list(out) if isinstance(out, tuple) else [out]

    def sample(self, impl: Any, v: Values) -> Tensor:
        """What it decodes. z's own error is compared where z is the result."""
        return latent.reparameterize(v["mu"], v["logvar"], eps=v["eps"], impl=impl)

    def written(self, formulas: Formulas, v: Values) -> list[Tensor]:
        def quantity(name: str) -> Tensor:
            if name == "z":
                return v["mu"] + std_of(self.form, v[self.form]) * v["eps"]
            if name == "loss":
                return quantity("nll") + quantity("kl")
            if name == "kl":
                args = [v[n] for n in ("mu", self.form, "prior_mu", f"prior_{self.form}") if n in v]
                kind = f"kl/{self.form}" if self.form != "logvar" else "kl" if len(args) == 2 else "kl/prior"
                each = formulas[kind](*args)
            else:
                recon, x = (decoded(v), v["x"]) if self.is_linear else (v[n] for n in list(self.args)[:2])
                kind = "loss" if self.function == "gaussian_nll_loss" else self.variance.removeprefix("recon_")
                kind = kind if self.family == "gaussian" else self.family
                each = formulas[kind](recon, x, *(v[n] for n in (self.variance, "zi_logits") if n in v))
            if self.reduction == "mean":
                return each.mean()
            total = each.reshape(len(each), -1).sum(1)
            return total.mean() if self.reduction == "batchmean" else total

        return [quantity(name) for name in self.results]

    def usual(self, v: Values) -> list[Tensor]:
        return self.written(USUAL, v)

    def library(self, v: Values) -> list[Tensor]:
        return self.written(TORCH, v)

    def truth(self, v: Values, ups: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Results, and the gradients in what is learned, in float64, each with its size."""
        first = next(iter(v.values()))
        keep, scale = {"sample": (1, 1.0), "batchmean": (0, 1 / len(first)), "mean": (0, 1 / first.numel())}[self.reduction]
        kl = specs.KL(keep, scale, parameter=self.form)
        nll = specs.Likelihood(keep, scale, self.variance if self.variance in ("std", "var") else "logvar", FIXED)
        nll = nll._replace(family=self.family)
        if self.family == "discretized_logistic":
            nll = nll._replace(bin=bin_of(256, -1, 1, accumulate_dtype(*v.values())))
        record: Any
        op, record, spec = {
            **dict.fromkeys(("gaussian_nll", *FAMILIES), ("likelihood", specs.NLLInputs, nll)),
            "gaussian_nll_loss": ("likelihood", specs.NLLInputs, nll._replace(full=False, floor=FLOOR)),
            "elbo_terms": ("elbo_terms", specs.ElboInputs, specs.Elbo(nll, kl)),
            "elbo_loss": ("elbo", specs.ElboInputs, specs.Elbo(nll, kl)),
            "linear_gaussian_nll": ("linear_nll", specs.LinearInputs, specs.Linear(nll)),
            "linear_elbo_loss": ("linear_elbo", specs.LinearElboInputs, specs.LinearElbo(specs.Linear(nll), kl)),
        }.get(self.function, ("latent", specs.LatentInputs, specs.Latent(kl, "kl" in self.results)))

        names = {**dict.fromkeys(("input", "logits", "rate", "mean"), "recon"), "target": "x", self.variance: "variance"}
        if op == "latent":
            names = {self.form: "spread", f"prior_{self.form}": "prior_spread"}
        fields = {name: names.get(name, name) for name in v}
        given = {fields[name]: t for name, t in v.items()}
        oracle = Oracle(op, record(*(given.get(field) for field in record._fields)), spec, z=v.get("z"))
        values, each = oracle.values(), iter(ups)
        gradients = oracle.gradients(tuple(None if t is None else next(each) for t in values))
        assert gradients is not None
        by_field = dict(zip(record._fields, gradients, strict=False))
        found = [*values, *(by_field[fields[name]] for name in self.learned)]
        return [(t.value, t.size) for t in found if t is not None]


def arguments_of(words: str) -> dict[str, str]:
    return {name: axes for name, _, axes in (word.partition(":") for word in words.split())}


OPS = tuple(
    Op(name, arguments_of(args), results.split(), reduction)
    for name, args, results, reduction in (
        ("reparameterize", "mu:z logvar:z eps:z", "z", "sample"),
        ("reparameterize_kl", "mu:z logvar:z eps:z", "z kl", "sample"),
        ("gaussian_kl/standard", "mu:z logvar:z", "kl", "sample"),
        ("gaussian_kl/prior", "mu:z logvar:z prior_mu:z prior_logvar:z", "kl", "sample"),
        *((f"reparameterize_kl/{form}", f"mu:z {form}:z eps:z", "z kl", "sample") for form in ("logstd", "std", "var")),
        *((f"gaussian_kl/{form}", f"mu:z {form}:z prior_mu:z prior_{form}:z", "kl", "sample") for form in ("logstd", "std", "var")),
        ("gaussian_nll/fixed", "recon:x x:x", "nll", "sample"),
        ("gaussian_nll/logvar", "recon:x x:x logvar:x", "nll", "sample"),
        ("gaussian_nll/std", "recon:x x:x std:x", "nll", "sample"),
        ("gaussian_nll/var", "recon:x x:x var:x", "nll", "sample"),
        ("laplace_nll", "recon:x x:x logscale:x", "nll", "sample"),
        ("bernoulli_nll", "logits:x x:x", "nll", "sample"),
        ("poisson_nll", "rate:x x:x", "nll", "sample"),
        ("negative_binomial_nll", "mean:x x:x theta:x", "nll", "sample"),
        ("zero_inflated_negative_binomial_nll", "mean:x x:x theta:x zi_logits:x", "nll", "sample"),
        ("discretized_logistic_nll", "recon:x x:x logscale:x", "nll", "sample"),
        ("gaussian_nll_loss", "input:x target:x var:x", "nll", "mean"),
        ("elbo_terms", "recon:x x:x recon_logvar:x mu:z logvar:z", "nll kl", "batchmean"),
        ("elbo_loss/fixed", "recon:x x:x mu:z logvar:z", "loss", "batchmean"),
        ("elbo_loss/element", "recon:x x:x recon_logvar:x mu:z logvar:z", "loss", "batchmean"),
        ("elbo_loss/scalar", "recon:x x:x recon_logvar: mu:z logvar:z", "loss", "batchmean"),
        ("linear_gaussian_nll/fixed", "h:bh weight:eh bias:e x:be", "nll", "sample"),
        ("linear_gaussian_nll/element", "h:bh weight:eh bias:e x:be logvar:e", "nll", "sample"),
        ("linear_gaussian_nll/scalar", "h:bh weight:eh bias:e x:be logvar:", "nll", "sample"),
        ("linear_elbo_loss/fixed", "mu:bh logvar:bh eps:bh weight:eh bias:e x:be", "loss", "batchmean"),
        ("linear_elbo_loss/element", "mu:bh logvar:bh eps:bh weight:eh bias:e x:be recon_logvar:e", "loss", "batchmean"),
        ("linear_elbo_loss/scalar", "mu:bh logvar:bh eps:bh weight:eh bias:e x:be recon_logvar:", "loss", "batchmean"),
    )
)
