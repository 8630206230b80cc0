"""Fused against reference numerics: `fastelbo.compare()` in Python, `fastelbo compare` on the command line.

Every op runs on the same inputs fused; as users write it in eager PyTorch, in the inputs' dtype; so written on half precision that
is first widened to float32; and with `torch.distributions` or `F.gaussian_nll_loss` where they have it. Errors of the value and of
each gradient are taken against the equations of `fastelbo.reference` in float64, on the inputs as rounded to their dtype.

**Unit.** Errors are in ulp, units in the last place of the fused result's dtype (float32 for losses even of bfloat16 inputs, the
input's own for a gradient), and relative, both at the *size* of each element: the sum of the magnitudes of the terms that are added
to give it. Where the terms have one sign that is the element itself. Where they cancel it is more: the slope of a log-variance,
(1 - d^2 / s^2) / 2, is 0 wherever the variance fits, and there a single correct rounding is off by any multiple of the result. The
terms are those of forms that do not cancel without need, so the KL near its prior, whose usual formula subtracts numbers of size 1,
is held to its own size. Across a linear layer a residual's size is that of x, bias and every product that is added to it, and the
size of what the residual enters follows. Elements below the smallest normal number take that number's ulp.

**Bound.** In every case the largest and the mean error of the fused result may be `LUCK` times eager's, plus `SLACK` ulp; in half
precision eager means the formula on widened inputs, which is the better one. `LUCK`: two correct roundings of an expression differ,
and which has the worse extreme is chance. `SLACK`: eager may be exact by chance, while a right result has half an ulp from its own
rounding, or one where Triton's interpreter cuts bfloat16 off, and as much from the arithmetic before it. Both are those of
tests/test_numerics.py, whose ulp are of the largest element where these are of each element's size. Two things add to `SLACK`:

- A sum of n terms: log2(n) / 2 ulp, the bound of pairwise summation. A total is one number, for which eager may be exact.
- float64: `ORACLE_SLACK`. There the oracle takes half a dozen roundings too, mostly eager's own, whose error is then 0. So it is
  with matrix products, which may add their n terms one after the other: n roundings of half an ulp and of either sign are
  sqrt(n) / 2 in the oracle and as much in the fused result, for the residual and for a gradient that is a product with it.

In half precision `linear_elbo_loss` multiplies z in mu's dtype, and z's gradient comes back in it. Its truth is of the z that
`reparameterize` gives, where z's own error is compared; the formula on widened inputs has that z too, and rounds its gradient.

Elements that become inf or NaN though the truth is finite in the result's dtype are counted as lost. A fused result may lose what
eager loses; what eager alone loses is not compared. Where the truth overflows the dtype, inf is right.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from . import backend, functional, linear
from .reference import LOG_2PI, accumulate_dtype

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

# The bound's: see above.
LUCK = 1.5
SLACK = 2.0
ORACLE_SLACK = 6.0

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
# Log-variances less the prior's: near it, wide, and to where float32 still holds 1 / s^3, which the gradient of s takes.
RANGES = ((-0.01, 0.01), (-10.0, 10.0), (-50.0, 50.0))
# One element per sample, a matrix, an image of odd sizes.
SHAPES = ((2000, 1), (64, 784), (3, 5, 17, 9))
# More than the CPU backend takes in one block. That is not a question of rounding: float32 and one range will do.
LARGE = (2, 270_001)
# Triton's interpreter takes milliseconds for a launch.
INTERPRETED_SHAPES = ((97, 1), (8, 300), (3, 5, 7, 3))
MAX_ELEMENTS = 2**24  # the oracle holds some twenty float64 tensors of that size
FIXED = -2.0  # the log-variance of the ops with a fixed variance
CONSTANTS = ("eps",)  # what gets no gradient
LATENT = ("mu", "logvar", "prior_mu", "prior_logvar", "eps")  # what has mu's shape, where there is a mu
HIDDEN = 20  # the width of a linear layer's input, which no shape says, but for WEIGHTS
WEIGHTS = 2**20  # the most elements that a weight has without being larger than x
# Of what a linear layer takes: batch, elements and hidden width.
AXES = {"x": "be", "weight": "eh", "bias": "e", "h": "bh", "mu": "bh", "logvar": "bh", "eps": "bh", "recon_logvar": "e"}
POINTS = 16  # of a profile
TOLD = 10  # failures that are printed

Values = dict[str, Tensor]

# ---- the formulas, per element: as users write them, as torch has them, and the oracle's terms ----------------------------------


def usual_sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * eps


def usual_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu**2 - logvar.exp())


def usual_kl_prior(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    return 0.5 * (prior_logvar - logvar - 1 + (logvar.exp() + (mu - prior_mu) ** 2) / prior_logvar.exp())


def usual_nll(recon: Tensor, x: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (LOG_2PI + logvar + (x - recon) ** 2 / logvar.exp())


def usual_nll_fixed(recon: Tensor, x: Tensor) -> Tensor:
    return 0.5 * (LOG_2PI + FIXED + (x - recon) ** 2 / math.exp(FIXED))


def usual_nll_std(recon: Tensor, x: Tensor, std: Tensor) -> Tensor:
    return 0.5 * LOG_2PI + torch.log(std) + 0.5 * ((x - recon) / std) ** 2


def usual_nll_var(recon: Tensor, x: Tensor, var: Tensor) -> Tensor:
    return 0.5 * (LOG_2PI + torch.log(var) + (x - recon) ** 2 / var)


def usual_nll_loss(input: Tensor, target: Tensor, var: Tensor) -> Tensor:
    clamped = var + (var.clamp(min=1e-6) - var).detach()  # the gradient passes through, as in torch
    return 0.5 * (torch.log(clamped) + (input - target) ** 2 / clamped)


def normal(mean: Tensor, logvar: Tensor) -> Normal:
    # Unchecked: where the standard deviation underflows, its error is of interest and not an exception.
    return Normal(mean, torch.exp(0.5 * logvar), validate_args=False)


def torch_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return kl_divergence(normal(mu, logvar), normal(torch.zeros_like(mu), torch.zeros_like(mu)))


def torch_kl_prior(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    return kl_divergence(normal(mu, logvar), normal(prior_mu, prior_logvar))


def torch_nll(recon: Tensor, x: Tensor, logvar: Tensor) -> Tensor:
    return -normal(recon, logvar).log_prob(x)


def torch_nll_fixed(recon: Tensor, x: Tensor) -> Tensor:
    return torch_nll(recon, x, torch.full_like(recon, FIXED))


def torch_nll_std(recon: Tensor, x: Tensor, std: Tensor) -> Tensor:
    return -Normal(recon, std, validate_args=False).log_prob(x)


def torch_nll_var(recon: Tensor, x: Tensor, var: Tensor) -> Tensor:
    return F.gaussian_nll_loss(recon, x, var, full=True, eps=0.0, reduction="none")


def torch_nll_loss(input: Tensor, target: Tensor, var: Tensor) -> Tensor:
    return F.gaussian_nll_loss(input, target, var, reduction="none")


def terms_of_sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> list[Tensor]:
    return [mu, torch.exp(0.5 * logvar) * eps]


def terms_of_kl(mu: Tensor, logvar: Tensor, prior_mu: Tensor | float = 0.0, prior_logvar: Tensor | float = 0.0) -> list[Tensor]:
    """Two that are never negative; e^v - 1 - v by its Taylor series, to the last bit for |v| < 1/2, where it would cancel."""
    v = logvar - prior_logvar
    small = v.clamp(-0.5, 0.5)
    series = torch.zeros_like(v)
    for k in range(19, 1, -1):
        series = series * small + 1 / math.factorial(k)
    rest = torch.where(v.abs() < 0.5, small * small * series, torch.expm1(v) - v)
    return [0.5 * (mu - prior_mu) ** 2 * torch.exp(torch.zeros_like(v) - prior_logvar), 0.5 * rest]


def terms_of_nll(recon: Tensor, x: Tensor, logvar: Tensor | float) -> list[Tensor]:
    logvar = torch.zeros_like(recon) + logvar
    return [torch.full_like(recon, 0.5 * LOG_2PI), 0.5 * logvar, 0.5 * (x - recon) ** 2 * torch.exp(-logvar)]


def terms_of_nll_fixed(recon: Tensor, x: Tensor) -> list[Tensor]:
    return terms_of_nll(recon, x, FIXED)


def terms_of_nll_std(recon: Tensor, x: Tensor, std: Tensor) -> list[Tensor]:
    return [torch.full_like(recon, 0.5 * LOG_2PI), torch.log(std), 0.5 * ((x - recon) / std) ** 2]


def terms_of_nll_var(recon: Tensor, x: Tensor, var: Tensor) -> list[Tensor]:
    return [torch.full_like(recon, 0.5 * LOG_2PI), 0.5 * torch.log(var), 0.5 * (x - recon) ** 2 / var]


def terms_of_nll_loss(input: Tensor, target: Tensor, var: Tensor) -> list[Tensor]:
    clamped = var + (var.clamp(min=1e-6) - var).detach()
    return [0.5 * torch.log(clamped), 0.5 * (input - target) ** 2 / clamped]


def across(nll: Callable[..., Any]) -> Callable[..., Any]:
    """A formula of a reconstruction, as one of the linear layer that makes it."""

    def formula(h: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Any:
        dtype = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), bias.dtype)  # products alone do not promote
        return nll(F.linear(h.to(dtype), weight.to(dtype), bias.to(dtype)), *rest)

    return formula


def sampled(nll: Callable[..., Any]) -> Callable[..., Any]:
    """A formula of a layer's input, as one of the posterior that it is drawn from. `z`, if given, is the value of that input."""

    def formula(mu: Tensor, logvar: Tensor, eps: Tensor, z: Tensor | None, *rest: Tensor) -> Any:
        h = usual_sample(mu, logvar, eps)
        # A gradient through z's dtype is rounded to it, as the value was.
        return nll(h if z is None else (h + (z.to(h.dtype) - h).detach()).to(z.dtype).to(h.dtype), *rest)

    return formula


# ---- the ops ---------------------------------------------------------------------------------------------------------------------


class Formula(NamedTuple):
    """One quantity per element, in three writings that take the same tensors."""

    usual: Callable[..., Tensor]
    library: Callable[..., Tensor] | None
    terms: Callable[..., list[Tensor]]


SAMPLE = Formula(usual_sample, None, terms_of_sample)
KL = Formula(usual_kl, torch_kl, terms_of_kl)
KL_PRIOR = Formula(usual_kl_prior, torch_kl_prior, terms_of_kl)
NLL = Formula(usual_nll, torch_nll, terms_of_nll)
NLL_FIXED = Formula(usual_nll_fixed, torch_nll_fixed, terms_of_nll_fixed)
NLL_STD = Formula(usual_nll_std, torch_nll_std, terms_of_nll_std)
NLL_VAR = Formula(usual_nll_var, torch_nll_var, terms_of_nll_var)
NLL_LOSS = Formula(usual_nll_loss, torch_nll_loss, terms_of_nll_loss)
LINEAR = Formula(*(across(writing) for writing in (usual_nll, torch_nll, terms_of_nll)))
LINEAR_FIXED = Formula(*(across(writing) for writing in (usual_nll_fixed, torch_nll_fixed, terms_of_nll_fixed)))
SAMPLED = Formula(*(sampled(across(writing)) for writing in (usual_nll, torch_nll, terms_of_nll)))
SAMPLED_FIXED = Formula(*(sampled(across(writing)) for writing in (usual_nll_fixed, torch_nll_fixed, terms_of_nll_fixed)))


def per_element(t: Tensor) -> Tensor:
    return t


def per_sample(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], -1).sum(1)


def batchmean(t: Tensor) -> Tensor:
    return per_sample(t).mean()


def mean(t: Tensor) -> Tensor:
    return t.mean()


Addends = tuple[tuple[Formula, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Op:
    """A public function called in one way. Each result is a reduction of formulas of its arguments, added up."""

    name: str  # of the function, and the way
    results: dict[str, tuple[Callable[[Tensor], Tensor], Addends]]
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
    def args(self) -> list[str]:
        every = dict.fromkeys(name for _, addends in self.results.values() for _, names in addends for name in names)
        return [name for name in every if name != "z"]  # the sample is no argument

    @property
    def learned(self) -> list[str]:
        return [name for name in self.args if name not in CONSTANTS]

    def axes(self, name: str) -> str:
        """Of an argument of a linear op."""
        return "" if name == self.scalar else "e" if name == "logvar" and "mu" not in self.args else AXES[name]

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
        if self.is_linear:
            return [name for name in self.args if result not in self.results and self.axes(name) == self.axes(result[2:])]
        every = [addend for _, addends in self.results.values() for addend in addends]
        addends = self.results[result][1] if result in self.results else [a for a in every if result[2:] in a[1]]
        return list(dict.fromkeys(name for _, names in addends for name in names))

    @property
    def has_library(self) -> bool:
        return any(formula.library for _, addends in self.results.values() for formula, _ in addends)

    def fused(self, impl: str, v: Values) -> list[Tensor]:
        options: dict[str, Any] = dict(self.fixed)
        if self.function != "gaussian_nll_loss":  # which has torch's arguments and no other
            options["impl"] = impl
        out = getattr(linear if self.is_linear else functional, self.function)(**v, **options)
        return list(out) if isinstance(out, tuple) else [out]

    def usual(self, v: Values) -> list[Tensor]:
        return self._reduced(v, lambda formula: formula.usual)

    def library(self, v: Values) -> list[Tensor]:
        return self._reduced(v, lambda formula: formula.library or formula.usual)

    def _reduced(self, v: Values, pick: Callable[[Formula], Callable[..., Tensor]]) -> list[Tensor]:
        return [
            functools.reduce(torch.add, [reduce(pick(formula)(*[v.get(name) for name in names])) for formula, names in addends])
            for reduce, addends in self.results.values()
        ]


_NLL = (NLL, ("recon", "x", "recon_logvar"))
_NLL_FIXED = (NLL_FIXED, ("recon", "x"))
_KL = (KL, ("mu", "logvar"))
_SAMPLE = (SAMPLE, ("mu", "logvar", "eps"))
_LAYER = ("h", "weight", "bias", "x")
_SAMPLED = ("mu", "logvar", "eps", "z", *_LAYER[1:])
_LINEAR = (LINEAR, (*_LAYER, "logvar"))
_LINEAR_ELBO = ((SAMPLED, (*_SAMPLED, "recon_logvar")), _KL)

OPS = (
    Op("reparameterize", {"z": (per_element, (_SAMPLE,))}),
    Op("reparameterize_kl", {"z": (per_element, (_SAMPLE,)), "kl": (per_sample, (_KL,))}),
    Op("gaussian_kl/standard", {"kl": (per_sample, (_KL,))}),
    Op("gaussian_kl/prior", {"kl": (per_sample, ((KL_PRIOR, ("mu", "logvar", "prior_mu", "prior_logvar")),))}),
    Op("gaussian_nll/fixed", {"nll": (per_sample, (_NLL_FIXED,))}, fixed={"logvar": FIXED}),
    Op("gaussian_nll/logvar", {"nll": (per_sample, ((NLL, ("recon", "x", "logvar")),))}),
    Op("gaussian_nll/std", {"nll": (per_sample, ((NLL_STD, ("recon", "x", "std")),))}),
    Op("gaussian_nll/var", {"nll": (per_sample, ((NLL_VAR, ("recon", "x", "var")),))}),
    Op("gaussian_nll_loss", {"nll": (mean, ((NLL_LOSS, ("input", "target", "var")),))}),
    Op("elbo_terms", {"nll": (batchmean, (_NLL,)), "kl": (batchmean, (_KL,))}),
    Op("elbo_loss/fixed", {"loss": (batchmean, (_NLL_FIXED, _KL))}, fixed={"recon_logvar": FIXED}),
    Op("elbo_loss/element", {"loss": (batchmean, (_NLL, _KL))}),
    Op("elbo_loss/scalar", {"loss": (batchmean, (_NLL, _KL))}, scalar="recon_logvar"),
    Op("linear_gaussian_nll/fixed", {"nll": (per_sample, ((LINEAR_FIXED, _LAYER),))}, fixed={"logvar": FIXED}),
    Op("linear_gaussian_nll/element", {"nll": (per_sample, (_LINEAR,))}),
    Op("linear_gaussian_nll/scalar", {"nll": (per_sample, (_LINEAR,))}, scalar="logvar"),
    Op("linear_elbo_loss/fixed", {"loss": (batchmean, ((SAMPLED_FIXED, _SAMPLED), _KL))}, fixed={"recon_logvar": FIXED}),
    Op("linear_elbo_loss/element", {"loss": (batchmean, _LINEAR_ELBO)}),
    Op("linear_elbo_loss/scalar", {"loss": (batchmean, _LINEAR_ELBO)}, scalar="recon_logvar"),
)


# ---- what is compared ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An op on a backend, and how its inputs come about."""

    impl: str
    device: torch.device
    op: Op
    seed: int
    dtype: torch.dtype | None  # None: as the user's own tensors are
    shape: tuple[int, ...] = ()
    logvar_range: tuple[float, float] = (0.0, 0.0)
    own: Values | None = None

    def values(self) -> Values:
        """The inputs by name, on the CPU, rounded to their dtype."""
        if self.own is not None:
            return {name: t if self.dtype is None else t.to(self.dtype) for name, t in self.own.items()}
        assert self.dtype is not None
        generator = torch.Generator().manual_seed(self.seed)
        lo, hi = self.logvar_range
        near = min(1.0, max(abs(lo), abs(hi)))
        v: Values = {}
        for name in self.op.args:
            size = self.op.size(name, self.shape)
            if name in ("logvar", "recon_logvar", "std", "var"):
                v[name] = lo + (hi - lo) * torch.rand(size, generator=generator, dtype=torch.float64)
            else:
                v[name] = torch.randn(size, generator=generator, dtype=torch.float64)
            if name in ("std", "var"):
                v[name] = torch.exp(v[name] * (0.5 if name == "std" else 1.0))
            elif name == "mu":
                v[name] *= near  # near the prior its means are near too
            elif name == "weight":
                v[name] *= size[1] ** -0.5  # each column of the reconstruction is about as large as x
        if "prior_mu" in v:
            v["mu"] += v["prior_mu"]
            v["logvar"] += v["prior_logvar"]
        info = torch.finfo(self.dtype)
        for name, t in v.items():
            lowest = info.smallest_normal if name in ("std", "var") else info.min
            # z in mu's dtype goes into the products. An infinite one leaves nothing to compare.
            highest = 2 * math.log(info.max / 8) if self.op.is_linear and name == "logvar" and "mu" in v else info.max
            v[name] = t.clamp(lowest, highest).to(self.dtype)
        return v


def backends() -> list[tuple[str, torch.device]]:
    found = [("torch", torch.device("cpu"))]
    gpu = torch.cuda.is_available()
    if backend.has_triton() and (gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        found.append(("triton", torch.device("cuda" if gpu else "cpu")))
    return found


def serves(op: Op, impl: str, device: torch.device) -> bool:
    """gaussian_nll_loss takes no impl: it can be compared on the backend that it gets, and on no other."""
    if op.function != "gaussian_nll_loss":
        return True
    chosen = backend.choose(None, device)
    return chosen is not None and chosen is backend.choose(impl, device)


def plan(
    op: str | None = None,
    dtype: str | torch.dtype | None = None,
    shape: Sequence[int] | None = None,
    logvar_range: tuple[float, float] | None = None,
    seed: int = 0,
    tensors: Mapping[str, Tensor] | None = None,
) -> list[Case]:
    """The cases that `compare` runs, and every check of its arguments."""
    ops = [o for o in OPS if op is None or op in (o.name, o.function)]
    if not ops:
        raise ValueError(f"op {op!r} is unknown: choose one of {', '.join(dict.fromkeys(o.function for o in OPS))}")
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown: choose one of {', '.join(DTYPES)}")
    if not 0 <= seed < 2**63 - 1:
        raise ValueError(f"seed must be from 0 to 2^63 - 2, got {seed}")
    if tensors is not None:
        if shape is not None or logvar_range is not None:
            raise ValueError("shape and logvar_range are of drawn inputs, and tensors are given: leave out the one or the other")
        given = own_values(ops, tensors, every=op is None)
    elif shape is not None:
        shape = tuple(shape)
        if not shape or any(type(n) is not int or n < 1 for n in shape):
            raise ValueError(f"shape {shape} is impossible: give the batch and any more dimensions, each at least 1")
        check_size("shape", shape)
    if logvar_range is not None and not -math.inf < logvar_range[0] <= logvar_range[1] < math.inf:
        raise ValueError(f"logvar_range must be two finite numbers, the smaller first, got {tuple(logvar_range)}")

    cases = []
    for impl, device in backends():
        if tensors is not None:
            cases += [Case(impl, device, o, seed, DTYPES.get(name), own=v) for o, v in given if serves(o, impl, device)]
            continue
        interpreted = impl == "triton" and device.type == "cpu"
        shapes = [shape] if shape is not None else INTERPRETED_SHAPES if interpreted else SHAPES
        ranges = RANGES if logvar_range is None else [(logvar_range[0], logvar_range[1])]
        for t in DTYPES.values() if dtype is None else [DTYPES[name]]:
            sizes = [(s, r) for s in shapes for r in ranges]
            if t == torch.float32 and shape is None and not interpreted:
                sizes.append((LARGE, ranges[len(ranges) // 2]))
            cases += [Case(impl, device, o, seed, t, s, r) for o in ops if serves(o, impl, device) for s, r in sizes]
    if not cases:
        raise ValueError(f"{op} takes no impl, and FASTELBO_IMPL={backend._DEFAULT} keeps it from the backends that are compared")
    return cases


def check_size(name: str, shape: Sequence[int]) -> None:
    if math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"{name} {tuple(shape)} has {math.prod(shape):,} elements, which is more than {MAX_ELEMENTS:,}")


def own_values(ops: Sequence[Op], tensors: Mapping[str, Tensor], every: bool) -> list[tuple[Op, Values]]:
    """The ops whose arguments are all given, with their tensors, checked by the ops themselves.

    With `every` op, no tensor may be left over, and a logvar beside a mu is the posterior's and not a likelihood's.
    """
    known = list(dict.fromkeys(name for o in OPS for name in o.args))
    if unknown := [str(name) for name in tensors if name not in known]:
        raise ValueError(f"no op takes a tensor named {', '.join(unknown)}: names are those of arguments, {', '.join(known)}")
    lacking = {o.name: [name for name in o.args if name not in tensors] for o in ops}
    taken = every and "mu" in tensors
    complete = [o for o in ops if not lacking[o.name] and not (taken and "logvar" in o.args and "mu" not in o.args)]
    if not complete:
        closest = min(lacking, key=lambda o: len(lacking[o]))
        raise ValueError(f"{closest} needs {', '.join(lacking[closest])} too: given are {', '.join(tensors) or 'no tensors'}")
    if every and (unused := [name for name in tensors if not any(name in o.args for o in complete)]):
        short = min((o for o in ops if unused[0] in o.args), key=lambda o: len(lacking[o.name]))
        raise ValueError(f"{unused[0]} is of no use alone: {short.name} needs {', '.join(lacking[short.name])} too")

    found = []
    for o in complete:
        v = {}
        for name in o.args:
            functional._check_tensor(name, tensors[name])
            v[name] = tensors[name].detach().cpu()
        if o.scalar and v[o.scalar].ndim:
            continue  # that is the op with one for each element
        o.fused("reference", v)
        for name, t in v.items():
            functional._check_broadcast(name, t, o.side(name), v[o.side(name)].shape)
            if not t.numel():
                raise ValueError(f"{name} has shape {tuple(t.shape)}: there is nothing to compare")
            check_size(name, t.shape)
        found.append((o, v))
    if not found:
        raise ValueError(f"{complete[0].name} takes {complete[0].scalar} as one number, a 0-d tensor")
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Errors of one result over its elements. Those that are lost, inf or NaN where the truth is finite, are only counted."""

    max_ulp: float
    p99_ulp: float
    mean_ulp: float
    max_relative: float
    p99_relative: float
    mean_relative: float
    lost: int

    @classmethod
    def of(cls, ulp: Tensor, relative: Tensor) -> Errors:
        kept = ulp.isfinite()

        def figures(error: Tensor) -> tuple[float, float, float]:
            if not len(error):
                return math.nan, math.nan, math.nan
            # NumPy's percentile selects where torch's quantile sorts.
            return float(error.max()), float(np.percentile(error.numpy(), 99)), float(error.mean())

        return cls(*figures(ulp[kept]), *figures(relative[kept]), int((~kept).sum()))


@dataclass(frozen=True)
class Worst:
    """The element with the largest fused error, of those that eager does not lose."""

    index: tuple[int, ...]
    fused: float
    eager: float  # of the formula that judges
    exact: float
    fused_ulp: float
    eager_ulp: float
    inputs: dict[str, float]  # those that have one value for each element of the result


@dataclass(frozen=True)
class Row:
    """One result of one case. `eager` is the formula in the inputs' dtype, `widened` the same on half precision made float32."""

    backend: str
    device: str
    op: str
    result: str  # "kl" is a value, "d mu" the gradient in mu
    dtype: str
    shape: tuple[int, ...]
    logvar_range: tuple[float, float] | None
    elements: int
    fused: Errors
    eager: Errors
    widened: Errors | None
    library: Errors | None
    allowed_max_ulp: float
    allowed_mean_ulp: float
    ok: bool
    worst: Worst
    profile: list[tuple[float, float, float]]  # log-variance, and the largest fused and eager error about there, in ulp


def ulp_of(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at `size`."""
    return torch.finfo(dtype).eps * torch.exp2((torch.frexp(size).exponent - 1).double())


def errors(got: Tensor, truth: Tensor, dtype: torch.dtype, tiny: float) -> Tensor:
    """Absolute errors in `dtype`, infinite where an element is lost. What is below `tiny` may be flushed to 0."""
    info = torch.finfo(dtype)
    got = got.to(dtype).double()
    infinite = torch.copysign(torch.full_like(truth, math.inf), truth)
    # inf is right where the truth overflows, or would but for its last digits.
    overflows = (got == infinite) & (truth.abs() >= info.max * (1 - 8 * info.eps))
    flushed = (truth.abs() < tiny) & (got.abs() < tiny)
    right = overflows | flushed | (got.isnan() & truth.isnan())
    return torch.where(right, 0.0, (got - truth).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def differentiate(call: Callable[[Values], list[Tensor]], v: Values, learned: Sequence[str], ups: Sequence[Tensor]) -> list[Tensor]:
    """The results of `call`, and the gradients in what is learned under the upstream gradients."""
    leaves = {name: t.detach().requires_grad_(name in learned) for name, t in v.items()}
    outs = call(leaves)
    grads = torch.autograd.grad(outs, [leaves[name] for name in learned], [up.to(o) for up, o in zip(ups, outs, strict=True)])
    return [*outs, *grads]


def oracle(op: Op, v: Values, ups: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Results and gradients in float64, each with its size: the sum of its terms, and of their magnitudes."""
    wide = {name: t.double().expand(v[op.side(name)].shape).clone().requires_grad_(name in op.learned) for name, t in v.items()}
    # A layer's terms have sums inside, which may cancel too. The same terms of magnitudes have none that does.
    grown = {name: magnitude_of(name, t) for name, t in wide.items() if name != "z"} if op.is_linear else wide
    asked, sized = ([of[name] for name in op.learned] for of in (wide, grown))
    values = []
    slopes = [(torch.zeros_like(t), torch.zeros_like(t)) for t in asked]
    for (reduce, addends), up in zip(op.results.values(), ups, strict=True):
        value, size = torch.zeros_like(up), torch.zeros_like(up)
        for formula, names in addends:
            terms = formula.terms(*[wide.get(name) for name in names])
            large = formula.terms(*[grown.get(name) for name in names]) if op.is_linear else terms
            for term, magnitude in zip(terms, large, strict=True):
                value += reduce(term.detach())
                size += reduce(magnitude.detach().abs())
                if term.requires_grad:
                    shares = torch.autograd.grad(reduce(term), asked, up, retain_graph=True, allow_unused=True)
                    most = shares
                    if op.is_linear:
                        most = torch.autograd.grad(reduce(magnitude), sized, up.abs(), retain_graph=True, allow_unused=True)
                    for (slope, steepness), share, full in zip(slopes, shares, most, strict=True):
                        if share is not None:
                            slope += share
                            steepness += full.abs()
        values.append((value, size))
    shapes = [v[name].shape for name in op.learned]
    return values + [(slope.sum_to_size(s), size.sum_to_size(s)) for (slope, size), s in zip(slopes, shapes, strict=True)]


def magnitude_of(name: str, t: Tensor) -> Tensor:
    """The magnitude of a linear op's argument, with the sign that adds it to the residual. A log-variance stays as it is."""
    t = t.detach()
    return (t.clone() if name.endswith("logvar") else -t.abs() if name == "x" else t.abs()).requires_grad_(name not in CONSTANTS)


def log_variance(op: Op, v: Values, result: str) -> Tensor | None:
    """What a result is plotted against: the log-variance, less the prior's, that it is computed from, if there is one."""
    found = [name for name in op.sources(result) if name in ("logvar", "recon_logvar", "std", "var")]
    if len(found) != 1:
        return None
    spread = v[found[0]].double()
    if found[0] in ("std", "var"):
        return torch.log(spread) * (2 if found[0] == "std" else 1)
    return spread - v["prior_logvar"].double() if "prior_logvar" in v else spread


def profile(at: Tensor | None, fused: Tensor, eager: Tensor) -> list[tuple[float, float, float]]:
    """Of a result that has an element for each log-variance: median log-variance and largest errors in POINTS groups of them."""
    if at is None or at.numel() != fused.numel():
        return []
    # What is drawn has no order, so that any few thousand elements are a fair sample.
    step = 1 + at.numel() // 4096
    at, fused, eager = at.flatten()[::step], fused[::step], eager[::step]
    order = at.argsort()
    groups = [t[order].tensor_split(POINTS) for t in (at, fused, eager)]
    return [(float(a.median()), float(f.max()), float(e.max())) for a, f, e in zip(*groups, strict=True) if len(a)]


def slack(op: Op, v: Values, result: str, count: int) -> float:
    """What one of `count` elements of a result may be off by where eager is exact, in ulp."""
    allowed = SLACK + 0.5 * math.log2(max(t.numel() for t in v.values()) / count)
    if accumulate_dtype(*v.values()) != torch.float64:
        return allowed
    allowed += ORACLE_SLACK
    if op.is_linear:
        hidden = v["weight"].shape[1]
        allowed += math.sqrt(hidden)
        if result not in op.results and "h" in op.axes(result[2:]):
            allowed += math.sqrt(v["x"].numel() * hidden / count)
    return allowed


def judge(ours: Tensor, eager: Tensor, slack: float) -> tuple[float, float, bool]:
    """The largest and the mean error that are allowed, in ulp, and whether they are kept and nothing more is lost than by eager."""
    held = eager.isfinite()
    if not bool(held.any()):
        return math.inf, math.inf, True
    allowed_max = LUCK * float(eager[held].max()) + slack
    allowed_mean = LUCK * float(eager[held].mean()) + slack
    return allowed_max, allowed_mean, float(ours[held].max()) <= allowed_max and float(ours[held].mean()) <= allowed_mean


def upstream(op: Op, v: Values, seed: int) -> list[Tensor]:
    """A gradient for each result, the same for everyone: 1 of a total, else random, of values that every input's dtype can hold."""
    with torch.no_grad():
        shapes = [out.shape for out in op.usual(v)]
    generator = torch.Generator().manual_seed(seed)
    ups = [torch.randn(s, generator=generator, dtype=torch.float64) if s else torch.ones(s, dtype=torch.float64) for s in shapes]
    for t in v.values():
        ups = [up.to(t.dtype).double() for up in ups]
    return ups


def run_case(case: Case) -> list[Row]:
    op, v = case.op, case.values()
    ups = upstream(op, v, case.seed + 1)
    calls: dict[str, Callable[[Values], list[Tensor]]] = {"fused": functools.partial(op.fused, case.impl), "eager": op.usual}
    here = {name: t.to(case.device) for name, t in v.items()}
    # z has mu's dtype. In half precision all that follows is of that z, whose own error is compared as reparameterize's.
    held: Values = {}
    if op.is_linear and "mu" in v and v["mu"].dtype.itemsize == 2:
        held = {"z": functional.reparameterize(here["mu"], here["logvar"], eps=here["eps"], impl=case.impl)}
    if any(t.dtype.itemsize == 2 for t in v.values()):
        calls["widened"] = lambda v: op.usual({name: t.float() if t.dtype.itemsize == 2 else t for name, t in v.items()} | held)
    if op.has_library:
        calls["library"] = op.library
    found = {who: differentiate(call, here, op.learned, ups) for who, call in calls.items()}
    names = [*op.results, *(f"d {name}" for name in op.learned)]
    return [
        row_of(case, v, name, {who: results[i].detach().cpu() for who, results in found.items()}, truth, size)
        for i, (name, (truth, size)) in enumerate(
            zip(names, oracle(op, v | {name: t.cpu() for name, t in held.items()}, ups), strict=True)
        )
    ]


def row_of(case: Case, v: Values, name: str, found: dict[str, Tensor], truth: Tensor, size: Tensor) -> Row:
    """Measure one result as everyone found it."""
    dtype, tiny = found["fused"].dtype, torch.finfo(accumulate_dtype(*v.values())).smallest_normal
    # Where every term is 0, and any error infinite relative to it, the smallest of the other elements stands in.
    size = size.nan_to_num(nan=0.0)
    size = torch.where(size == 0, size[size > 0].min() if bool((size > 0).any()) else 0.0, size)
    size = size.clamp(torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max)
    off = {who: errors(result, truth, dtype, tiny) for who, result in found.items()}
    ulp = {who: (error / ulp_of(size, dtype)).flatten() for who, error in off.items()}
    of = {who: Errors.of(ulp[who], (error / size).flatten()) for who, error in off.items()}
    judging = "widened" if "widened" in found else "eager"
    allowed_max, allowed_mean, ok = judge(ulp["fused"], ulp[judging], slack(case.op, v, name, truth.numel()))

    at = int(torch.where(ulp[judging].isfinite(), ulp["fused"], 0.0).argmax())
    fused, eager, exact = (float(t.flatten()[at]) for t in (found["fused"], found[judging], truth))
    worst = Worst(
        index=tuple(int(n) for n in np.unravel_index(at, truth.shape)),
        fused=fused,
        eager=eager,
        exact=exact,
        fused_ulp=float(ulp["fused"][at]),
        eager_ulp=float(ulp[judging][at]),
        inputs={n: float(v[n].flatten()[at]) for n in case.op.sources(name) if v[n].numel() == truth.numel() > 1},
    )
    return Row(
        backend=case.impl,
        device=case.device.type,
        op=case.op.name,
        result=name,
        dtype="+".join(sorted({str(t.dtype).removeprefix("torch.") for t in v.values()})),
        shape=tuple(v["x" if case.op.is_linear else case.op.args[0]].shape),
        logvar_range=None if case.own is not None else case.logvar_range,
        elements=truth.numel(),
        fused=of["fused"],
        eager=of["eager"],
        widened=of.get("widened"),
        library=of.get("library"),
        allowed_max_ulp=allowed_max,
        allowed_mean_ulp=allowed_mean,
        ok=ok,
        worst=worst,
        profile=profile(log_variance(case.op, v, name), ulp["fused"], ulp["eager"]),
    )


# ---- what it says ----------------------------------------------------------------------------------------------------------------

BOUND = (
    f"Bound: in every case the largest and the mean fused error are at most {LUCK} times eager's (in float32, where the inputs are "
    f"half precision) plus {SLACK:g} ulp; log2(n)/2 more for a sum of n terms; {ORACLE_SLACK:g} more in float64, where the oracle "
    "rounds too, and sqrt(n) for each matrix product there."
)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `print` gives the verdict, rich's `print` the table."""

    rows: list[Row] = field(repr=False)
    seed: int

    @property
    def ok(self) -> bool:
        """Whether every fused error is within its bound."""
        return not self.failures

    @property
    def failures(self) -> list[Row]:
        """The rows out of bounds, the worst first."""
        return sorted((row for row in self.rows if not row.ok), key=lambda row: -row.worst.fused_ulp / row.allowed_max_ulp)

    def to_json(self) -> str:
        """Everything but the profiles. JSON has no inf or NaN: they become "inf", "-inf" and "nan"."""
        rows = [{key: value for key, value in asdict(row).items() if key != "profile"} for row in self.rows]
        bound = {"luck": LUCK, "slack_ulp": SLACK, "oracle_slack_ulp": ORACLE_SLACK, "words": BOUND}
        facts = {"torch": torch.__version__, "seed": self.seed, "bound": bound, "ok": self.ok, "rows": rows}
        return json.dumps(_without_inf(facts), allow_nan=False)

    def __str__(self) -> str:
        lines = [f"{len(self.rows)} results, seed {self.seed}. {BOUND}"]
        if self.ok:
            return "\n".join([*lines, "All are within it."])
        worst: dict[tuple[str, ...], Row] = {}
        for row in self.failures:
            worst.setdefault((row.backend, row.op, row.result), row)
        told = [_tell(row) for row in worst.values()]
        more = [f"and {len(told) - TOLD} more kinds"] if len(told) > TOLD else []
        return "\n".join([*lines, f"{len(self.failures)} are NOT within it. The worst of each kind:", *told[:TOLD], *more])

    def __rich__(self) -> Group:
        from rich.console import Group

        kinds = dict.fromkeys((row.backend, row.device, row.dtype) for row in self.rows)
        return Group(*(_table(kind, [r for r in self.rows if (r.backend, r.device, r.dtype) == kind]) for kind in kinds))


def _without_inf(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_inf(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_inf(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _tell(row: Row) -> str:
    """A failure and its worst element, in a line."""
    w = row.worst
    where = f"logvar in {list(row.logvar_range)}" if row.logvar_range else "your tensors"
    inputs = "".join(f", {name} {value:.9g}" for name, value in w.inputs.items())
    off = f"{row.fused.max_ulp:.3g} ulp at most, {row.fused.mean_ulp:.3g} in the mean"
    if row.fused.lost:
        off = f"{row.fused.lost} of {row.elements} lost to inf or NaN" + (f", {off}" if row.fused.lost < row.elements else "")
    at = f"element {list(w.index)}" if w.index else "the value"
    return (
        f"{row.op}, {row.result}, {row.dtype} on {row.backend}, shape {row.shape}, {where}: {off}, where {row.allowed_max_ulp:.3g} "
        f"and {row.allowed_mean_ulp:.3g} are allowed. Worst, {at}: {w.fused:.9g} for {w.exact:.9g}, off by {w.fused_ulp:.3g} ulp; "
        f"eager {w.eager:.9g}, off by {w.eager_ulp:.3g}{inputs}"
    )


def _digits(x: float) -> str:
    """Two digits, in three characters if it may be."""
    return f"{x:.1f}" if x < 9.95 else f"{x:.0f}" if x < 999.5 else _power(x)


def _power(x: float) -> str:
    mantissa, _, exponent = f"{x:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _largest(found: Iterable[float]) -> float:
    """The largest that is a number; of elements that are all lost there is none."""
    return max((x for x in found if not math.isnan(x)), default=math.inf)


def _table(kind: tuple[str, str, str], rows: list[Row]) -> Table:
    """A line for each result: the largest among its cases of the largest error, of the 99th percentile and of the mean."""
    from rich import box
    from rich.table import Table

    name, device, dtype = kind
    title = f"{dtype}, backend {name}, {device}: largest error, 99th percentile and mean, in ulp"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    heads = {"fused": "fused", "eager": "eager", "widened": "eager float32", "library": "torch's own"}
    shown = {key: head for key, head in heads.items() if any(getattr(row, key) for row in rows)}
    for head in ("", *shown.values(), "relative:\nfused eager"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)

    for op in dict.fromkeys(row.op for row in rows):
        table.add_row(op, style="cyan")
        for result in dict.fromkeys(row.result for row in rows if row.op == op):
            cases = [row for row in rows if (row.op, row.result) == (op, result)]
            of = {key: [e for row in cases if (e := getattr(row, key)) is not None] for key in shown}
            cells = [_cell(of[key]) for key in shown]
            relative = " ".join(_power(_largest(e.max_relative for e in of[key])) for key in ("fused", "eager"))
            table.add_row(f"  {result}", *cells, relative, style=None if all(row.ok for row in cases) else "bold red")
    return table


def _cell(found: list[Errors]) -> str:
    if not found:
        return ""
    largest = math.inf if any(e.lost for e in found) else max(e.max_ulp for e in found)
    p99, average = _largest(e.p99_ulp for e in found), _largest(e.mean_ulp for e in found)
    return f"{_digits(largest)} {_digits(p99):>3} {_digits(average):>3}"


def plot(rows: list[Row], path: Path) -> None:
    """Draw every elementwise error against its log-variance: a row for each function, a column for each dtype.

    Raises:
        ValueError: No result has an element for each log-variance.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.profile]
    if not rows:
        raise ValueError("nothing to plot: no result that was compared has an element for each log-variance")
    panels: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row in rows:
        panels.setdefault((row.op.split("/")[0], row.dtype), []).extend(row.profile)
    functions, dtypes = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))

    ink, grey, accent = "#222222", "#9a9a9a", "#d1495b"
    lowest, highest = 0.1, 1e9
    figure: Any = Figure(figsize=(1.2 + 3.1 * len(dtypes), 1.2 + 1.6 * len(functions)), dpi=110, layout="constrained")
    figure.suptitle("Largest errors of values and gradients against the log-variance (less the prior's)", fontsize=10, color=ink)
    grid = figure.subplots(len(functions), len(dtypes), sharex=True, sharey=True, squeeze=False)
    for (function, dtype), points in panels.items():
        axis = grid[functions.index(function), dtypes.index(dtype)]
        at = [p[0] for p in points]
        for column, colour, size, label in ((2, grey, 5, "eager"), (1, accent, 3, "fused")):
            # No error and an infinite one have no place on a logarithmic axis: they are drawn on its edges.
            heights = [min(max(p[column], lowest), highest) for p in points]
            axis.plot(at, heights, ".", color=colour, markersize=size, markeredgewidth=0, label=label)
        axis.set_xscale("symlog", linthresh=0.01, linscale=0.5)
        axis.set(yscale="log", ylim=(lowest / 2, highest * 2), xticks=[-10, -0.1, 0, 0.1, 10], yticks=[1, 1e3, 1e6])
        axis.minorticks_off()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis, dtype in zip(grid[0], dtypes, strict=True):
        axis.set_title(dtype, fontsize=9, color=ink)
    for axis, function in zip(grid[:, 0], functions, strict=True):
        axis.set_ylabel(f"{function}\nulp", fontsize=8, color=ink)
    grid[0, 0].legend(frameon=False, fontsize=8, markerscale=3, loc="upper left", ncols=2)
    figure.savefig(path)


# ---- the two ways in -------------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote of a dict. Nothing in the file is run.

    Raises:
        OSError, ValueError: The file cannot be read, or holds something else.
    """
    with path.open("rb") as file:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file raises whatever its reader trips over, and torch's words advise to trust it
            raise ValueError(f"{path} is damaged, or holds more than tensors, which could run code and is not loaded") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}: expected a dict of tensors by argument name")
    return found


def run(cases: Iterable[Case], seed: int) -> Comparison:
    threads = torch.get_num_threads()
    # Tensors are small: a second thread would save little, and on a busy machine waiting for that thread costs fivefold.
    torch.set_num_threads(1)
    try:
        # Triton's interpreter computes in NumPy, which warns of each overflow.
        with np.errstate(all="ignore"):
            return Comparison([row for case in cases for row in run_case(case)], seed)
    finally:
        torch.set_num_threads(threads)


def compare(
    op: str | None = None,
    dtype: str | torch.dtype | None = None,
    shape: Sequence[int] | None = None,
    logvar_range: tuple[float, float] | None = None,
    seed: int = 0,
    tensors: Mapping[str, Tensor] | None = None,
) -> Comparison:
    """Compare fused and eager numerics with the float64 truth, on the backends that are present.

    The module's docstring defines the errors and their bound. `fastelbo compare` is the same.

    Args:
        op: A public function, or one way to call it such as "gaussian_kl/prior"; None is all of them.
        dtype: "float32", "bfloat16", "float16" or "float64" (or the torch.dtype); None is all. Your own tensors are taken as they
            are unless it is given.
        shape: Shape of every drawn tensor, batch first; None is a few. Of the ops across a linear layer it is x's, with the
            dimensions after the batch made one; the layer's input is 20 wide, less where its weight would be large.
        logvar_range: (lo, hi) of drawn log-variances, less the prior's; None is near the prior, wide and extreme.
        seed: Seed of inputs and upstream gradients.
        tensors: Your own tensors by argument name, in place of drawn ones. Every op runs whose arguments are all there.

    Returns:
        A `Comparison`: `rows`, `failures`, `ok`, `to_json()`. `print` gives its verdict, `rich.print` the table.

    Raises:
        TypeError, ValueError: An argument is unknown or impossible, or a tensor is missing or unfit.

    Example:
        >>> result = fastelbo.compare("gaussian_kl", dtype="float32", shape=(8, 20))
        >>> result.ok
        True
    """
    return run(plan(op, dtype, shape, logvar_range, seed, tensors), seed)
