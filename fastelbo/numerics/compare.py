"""Fused against reference numerics: `fastelbo.compare()` in Python, `fastelbo compare` on the command line.

Every op runs on the same inputs fused; as users write it in eager PyTorch, in the inputs' dtype; so written on half precision that
is first widened to float32; and with `torch.distributions` or `F.gaussian_nll_loss` where they have it. Errors of the value and of
each gradient are taken against the float64 oracle, on the inputs as rounded to their dtype.

**Unit.** Errors are in ulp, units in the last place of the fused result's dtype (float32 for losses even of bfloat16 inputs, the
input's own for a gradient), and relative, both at the *size* of each element, which oracle.py defines. Elements below the smallest
normal number take that number's ulp. Elements that become inf or NaN though the truth is finite in the result's dtype are counted
as lost. A fused result may lose what eager loses; what eager alone loses is not compared.

**Bound.** In every case the largest and the mean error of the fused result may be `LUCK` times eager's, plus `SLACK` ulp; in half
precision eager means the formula on widened inputs, which is the better one. `LUCK`: two correct roundings of an expression differ,
and which has the worse extreme is chance. `SLACK`: eager may be exact by chance, while a right result has half an ulp from its own
rounding, or one where Triton's interpreter cuts bfloat16 off, and as much from the arithmetic before it. Two things add to `SLACK`:

- A sum of n terms: log2(n) / 2 ulp, the bound of pairwise summation. A total is one number, for which eager may be exact.
- float64: `ORACLE_SLACK`. There the oracle takes half a dozen roundings too, mostly eager's own, whose error is then 0. So it is
  with matrix products, which may add their n terms one after the other: n roundings of half an ulp and of either sign are
  sqrt(n) / 2 in the oracle and as much in the fused result, for the residual and for a gradient that is a product with it.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import backend, checks
from ..dtypes import accumulate_dtype
from ..types import Impl
from .objectives import OBJECTIVES
from .peers import OPS as SUMS
from .peers import Op, Values
from .report import Comparison, Errors, Row, Worst
from .tolerance import ORACLE_SLACK, SLACK, bound_beside, dtype_name, is_right_at_the_edge

OPS: tuple[Op, ...] = (*SUMS, *OBJECTIVES)
DTYPES = {dtype_name(t): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
# Log-variances less the prior's: near it, wide, and to where float32 still holds 1 / s^3, which the gradient of s takes.
RANGES = ((-0.01, 0.01), (-10.0, 10.0), (-50.0, 50.0))
SHAPES = ((2000, 1), (64, 784), (3, 5, 17, 9))  # one element per sample, a matrix, an image of odd sizes
INTERPRETED_SHAPES = ((97, 1), (8, 300), (3, 5, 7, 3))  # a launch takes Triton's interpreter milliseconds
# More than the CPU backend takes in one run. That is not a question of rounding: float32 and one range will do.
LARGE = (2, 540_001)
MAX_ELEMENTS = 2**24  # the oracle holds some twenty float64 tensors of that size
POINTS = 16  # of a profile
SPREADS = ("logvar", "recon_logvar", "logscale", "theta", "logstd", "std", "var")
# Of a log-variance, what it is as each.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "logscale": lambda t: 0.5 * t, "logstd": lambda t: 0.5 * t, "std": lambda t: torch.exp(0.5 * t), "var": torch.exp,
    "theta": lambda t: torch.exp(0.2 * t),
}  # fmt: skip
# Data that is not drawn from a normal distribution, of numbers from 0 to 1. Counts are mostly small.
DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli_nll": lambda t: t, "discretized_logistic_nll": lambda t: (256 * t).floor() / 127.5 - 1,
    **dict.fromkeys(
        ("poisson_nll", "negative_binomial_nll", "zero_inflated_negative_binomial_nll"), lambda t: (-3 * torch.log1p(-t)).floor()
    ),
}  # fmt: skip
CPU = torch.device("cpu")

# ---- what is compared ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An op on a backend, and how its inputs come about."""

    impl: Impl
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
        options: Any = {"generator": torch.Generator().manual_seed(self.seed), "dtype": torch.float64, "device": CPU}
        lo, hi = self.logvar_range
        v: Values = {}
        for name in self.op.args:
            size = self.op.size(name, self.shape)
            v[name] = lo + (hi - lo) * torch.rand(size, **options) if name in SPREADS else torch.randn(size, **options)
            if name == "x" and self.op.function in DATA:
                v[name] = DATA[self.op.function](torch.rand(size, **options))
            elif name in ("rate", "mean"):
                v[name] = torch.exp(v[name])
            elif name == "mu":
                v[name] *= min(1.0, max(abs(lo), abs(hi)))  # near the prior its means are near too
            elif name == "weight":
                v[name] *= size[1] ** -0.5  # each column of the reconstruction is about as large as x
        if "prior_mu" in v:
            v["mu"] += v["prior_mu"]
            v[self.op.form] += v[f"prior_{self.op.form}"]
        info = torch.finfo(self.dtype)
        for name, t in v.items():
            form = name.removeprefix("prior_")
            t = FORMS[form](t) if form in FORMS else t
            lowest = info.smallest_normal if form in ("std", "var", "theta", "rate", "mean") else info.min
            # z in mu's dtype is decoded. An infinite one leaves nothing to compare.
            highest = 2 * math.log(info.max / 8) if self.op.decodes and name == "logvar" else info.max
            v[name] = t.clamp(lowest, highest).to(self.dtype)
        return v

    def is_served(self) -> bool:
        """gaussian_nll_loss takes no impl: it can be compared on the backend that it gets, and on no other."""
        free = self.op.function == "gaussian_nll_loss"
        return not free or backend.choose(None, self.device) is backend.choose(self.impl, self.device)


def backends() -> list[tuple[Impl, torch.device]]:
    found: list[tuple[Impl, torch.device]] = [("torch", CPU)]
    gpu = torch.cuda.is_available()
    if backend.has_triton() and (gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        found.append(("triton", torch.device("cuda" if gpu else "cpu")))
    return found


def plan(
    op: str | None = None, dtype: str | torch.dtype | None = None, shape: Sequence[int] | None = None,
    logvar_range: tuple[float, float] | None = None, seed: int = 0, tensors: Mapping[str, Tensor] | None = None,
) -> list[Case]:  # fmt: skip
    """The cases that `compare` runs, and every check of its arguments."""
    ops = [o for o in OPS if op is None or op in (o.name, o.function)]
    name = str(dtype).removeprefix("torch.")
    if not ops:
        raise ValueError(f"op {op!r} is unknown: choose one of {', '.join(dict.fromkeys(o.function for o in OPS))}")
    if dtype is not None and name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown: choose one of {', '.join(DTYPES)}")
    if not 0 <= seed < 2**63 - 1:
        raise ValueError(f"seed must be from 0 to 2^63 - 2, got {seed}")
    if tensors is not None and not (shape is None and logvar_range is None):
        raise ValueError("shape and logvar_range are of drawn inputs, and tensors are given: leave out the one or the other")
    if shape is not None and (not shape or any(type(n) is not int or n < 1 for n in shape)):
        raise ValueError(f"shape {tuple(shape)} is impossible: give the batch and any more dimensions, each at least 1")
    check_size("shape", shape or ())
    if logvar_range is not None and not -math.inf < logvar_range[0] <= logvar_range[1] < math.inf:
        raise ValueError(f"logvar_range must be two finite numbers, the smaller first, got {tuple(logvar_range)}")
    ranges = RANGES if logvar_range is None else [(logvar_range[0], logvar_range[1])]
    given = [] if tensors is None else own_values(ops, tensors, every=op is None)
    dtypes = [] if tensors is not None else DTYPES.values() if dtype is None else [DTYPES[name]]

    cases = []
    for impl, device in backends():
        cases += [Case(impl, device, o, seed, DTYPES.get(name), own=v) for o, v in given]
        interpreted = impl == "triton" and device.type == "cpu"
        shapes = [tuple(shape)] if shape is not None else INTERPRETED_SHAPES if interpreted else SHAPES
        for t in dtypes:
            sizes = [(s, r) for s in shapes for r in ranges]
            if t == torch.float32 and shapes is SHAPES:
                sizes.append((LARGE, ranges[len(ranges) // 2]))
            cases += [Case(impl, device, o, seed, t, s, r) for o in ops for s, r in sizes]
    cases = [case for case in cases if case.is_served()]
    if not cases:
        raise ValueError(f"{op} takes no impl, and FASTELBO_IMPL={backend.DEFAULT} keeps it from the backends that are compared")
    return cases


def check_size(name: str, shape: Sequence[int]) -> None:
    if math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"{name} {tuple(shape)} has {math.prod(shape):,} elements, which is more than {MAX_ELEMENTS:,}")


def own_values(ops: Sequence[Op], tensors: Mapping[str, Tensor], every: bool) -> list[tuple[Op, Values]]:
    """The ops whose arguments are all given, with their tensors, checked by the ops themselves.

    With `every` op, no tensor may be left over, and a logvar beside a mu is the posterior's and not a likelihood's.
    """
    if not (ops := [o for o in ops if o.takes_own]):
        raise ValueError("sgvb_loss is compared with a decoder that is the identity, on drawn inputs: give it no tensors")
    known = dict.fromkeys(name for o in OPS for name in o.args)
    if unknown := [str(name) for name in tensors if name not in known]:
        raise ValueError(f"no op takes a tensor named {', '.join(unknown)}: names are those of arguments, {', '.join(known)}")
    lacking = {o.name: [name for name in o.args if name not in tensors] for o in ops}

    def needs_more(ops: Iterable[Op]) -> str:
        closest = min((o.name for o in ops), key=lambda name: len(lacking[name]))
        return f"{closest} needs {', '.join(lacking[closest])} too"

    complete = [o for o in ops if not lacking[o.name] and not (every and "mu" in tensors and o.variance == "logvar")]
    if not complete:
        raise ValueError(f"{needs_more(ops)}: given are {', '.join(tensors) or 'no tensors'}")
    if every and (unused := [name for name in tensors if not any(name in o.args for o in complete)]):
        raise ValueError(f"{unused[0]} is of no use alone: {needs_more(o for o in ops if unused[0] in o.args)}")

    found = []
    for o in complete:
        for name in o.args:
            checks.tensor(name, tensors[name])
        v = {name: tensors[name].detach().cpu() for name in o.args}
        if any(v[name].ndim for name, axes in o.args.items() if not axes):
            continue  # that is the op with a variance for each element
        o.fused("reference", v)
        for name, t in v.items():
            side = next(other for other in o.args if o.args[other] == o.args[name])
            checks.broadcast(name, t, side, v[side].shape)
            if not t.numel():
                raise ValueError(f"{name} has shape {tuple(t.shape)}: there is nothing to compare")
            check_size(name, t.shape)
        found.append((o, v))
    if not found:
        raise ValueError(f"{complete[0].name} takes {complete[0].variance} as one number, a 0-d tensor")
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------------------


def run_case(case: Case) -> list[Row]:
    op, v = case.op, case.values()
    ups = upstream(op, v, case.seed + 1)
    here = {name: t.to(case.device) for name, t in v.items()}
    halves = [name for name, t in v.items() if t.dtype.itemsize == 2]
    held: Values = {}
    if op.decodes:
        # The truth is of the z that was decoded. The formula that judges has that z too, and rounds its gradient: in half precision
        # z's gradient comes back in its dtype.
        held = {"z": op.sample(case.impl, leaves_of(here, op.learned)).detach()}
    beside = {} if halves else held
    calls: dict[str, Callable[[Values], list[Tensor]]] = {
        "fused": functools.partial(op.fused, case.impl),
        "eager": lambda v: op.usual(v | beside),
    }
    if halves:
        calls["widened"] = lambda v: op.usual(v | {name: v[name].float() for name in halves} | held)
    if op.results != ["z"] and op.has_library:
        calls["library"] = lambda v: op.library(v | beside)
    found = {who: differentiate(call, here, op.learned, ups) for who, call in calls.items()}
    truths = op.truth(v | {name: t.cpu() for name, t in held.items()}, ups)
    names = [*op.results, *(f"d {name}" for name in op.learned)]
    return [
        row_of(case, v, name, {who: results[i].detach().cpu() for who, results in found.items()}, *truths[i])
        for i, name in enumerate(names)
    ]


def upstream(op: Op, v: Values, seed: int) -> list[Tensor]:
    """A gradient for each result, the same for everyone: 1 of a total, else random, of values that every input's dtype can hold."""
    with torch.no_grad():
        shapes = [out.shape for out in op.usual(v)]
    options: Any = {"dtype": torch.float64, "device": CPU}
    generator = torch.Generator().manual_seed(seed)
    ups = [torch.randn(s, generator=generator, **options) if s else torch.ones(s, **options) for s in shapes]
    for t in v.values():
        ups = [up.to(t.dtype).double() for up in ups]
    return ups


def leaves_of(v: Values, learned: Sequence[str]) -> Values:
    return {name: t.detach().requires_grad_(name in learned) for name, t in v.items()}


def differentiate(call: Callable[[Values], list[Tensor]], v: Values, learned: Sequence[str], ups: Sequence[Tensor]) -> list[Tensor]:
    """The results of `call`, and the gradients in what is learned under the upstream gradients."""
    leaves = leaves_of(v, learned)
    outs = call(leaves)
    grads = torch.autograd.grad(outs, [leaves[name] for name in learned], [up.to(o) for up, o in zip(ups, outs, strict=True)])
    return [*outs, *grads]


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
    allowed = bound_beside(ulp["fused"], ulp[judging], slack(case.op, v, name, truth.numel()))

    at = int(torch.where(ulp[judging].isfinite(), ulp["fused"], 0.0).argmax())
    index = tuple(int(n) for n in np.unravel_index(at, truth.shape))
    fused, eager, exact = (float(t.flatten()[at]) for t in (found["fused"], found[judging], truth))
    inputs = {n: float(v[n].flatten()[at]) for n in case.op.sources(name) if v[n].numel() == truth.numel() > 1}
    worst = Worst(index, fused, eager, exact, float(ulp["fused"][at]), float(ulp[judging][at]), inputs)
    dtypes = "+".join(sorted({dtype_name(t.dtype) for t in v.values()}))
    shape = tuple(v["x" if case.op.is_linear else next(iter(v))].shape)
    return Row(
        case.impl, case.device.type, case.op.name, name, dtypes, shape, None if case.own else case.logvar_range, truth.numel(),
        of["fused"], of["eager"], of.get("widened"), of.get("library"), *allowed, worst,
        profile(case.op, v, name, ulp["fused"], ulp["eager"]),
    )  # fmt: skip


def ulp_of(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at `size`."""
    return torch.finfo(dtype).eps * torch.exp2((torch.frexp(size).exponent - 1).double())


def errors(got: Tensor, truth: Tensor, dtype: torch.dtype, tiny: float) -> Tensor:
    """Absolute errors in `dtype`, infinite where an element is lost. What is below `tiny` may be flushed to 0."""
    info = torch.finfo(dtype)
    got = got.to(dtype).double()
    flushed = (truth.abs() < tiny) & (got.abs() < tiny)
    # inf is right where the truth overflows, or would except for its last digits.
    right = flushed | is_right_at_the_edge(got, truth, 8 * info.eps * info.max, dtype)
    return torch.where(right, 0.0, (got - truth).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def slack(op: Op, v: Values, result: str, count: int) -> float:
    """What one of `count` elements of a result may be off by where eager is exact, in ulp."""
    allowed = SLACK + 0.5 * math.log2(max(t.numel() for t in v.values()) / count)
    if accumulate_dtype(*v.values()) == torch.float64:
        allowed += ORACLE_SLACK
        if op.is_linear:
            hidden = v["weight"].shape[1]
            allowed += math.sqrt(hidden)
            if "h" in op.args.get(result[2:], ""):
                allowed += math.sqrt(v["x"].numel() * hidden / count)
    return allowed


def profile(op: Op, v: Values, result: str, fused: Tensor, eager: Tensor) -> list[tuple[float, float, float]]:
    """Median log-variance (less the prior's) and largest errors of POINTS groups, where each element has one of its own."""
    spreads = [name for name in op.sources(result) if name in SPREADS]
    if len(spreads) != 1:
        return []
    (name,) = spreads
    at = v[name].double()
    if name in ("std", "var", "theta"):
        at = torch.log(at / v[f"prior_{name}"].double() if f"prior_{name}" in v else at)
    elif f"prior_{name}" in v:
        at = at - v[f"prior_{name}"].double()
    at = 2 * at if name in ("logscale", "logstd", "std") else at
    if at.numel() != fused.numel():
        return []
    # What is drawn has no order, so that any few thousand elements are a fair sample.
    at, fused, eager = (t.flatten()[:: 1 + at.numel() // 4096] for t in (at, fused, eager))
    order = at.argsort()
    groups = zip(*(t[order].tensor_split(POINTS) for t in (at, fused, eager)), strict=True)
    return [(float(a.median()), float(f.max()), float(e.max())) for a, f, e in groups if len(a)]


# ---- the two ways in -------------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote of a dict; OSError or ValueError for any other. Nothing in it is run."""
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
    op: str | None = None, dtype: str | torch.dtype | None = None, shape: Sequence[int] | None = None,
    logvar_range: tuple[float, float] | None = None, seed: int = 0, tensors: Mapping[str, Tensor] | None = None,
) -> Comparison:  # fmt: skip
    """Compare fused and eager numerics with the float64 truth, on the backends that are present, as `fastelbo compare` does.

    The head of `fastelbo/numerics/compare.py` defines the errors and their bound.

    Args:
        op: A public function, or one way to call it such as "gaussian_kl/prior"; None is all of them.
        dtype: "float32", "bfloat16", "float16" or "float64" (or the torch.dtype) of all tensors; None is each of them for drawn
            tensors, and leaves your own as they are.
        shape: Shape of every drawn tensor, batch first; None is a few. Of the ops across a linear layer it is x's, with the
            dimensions after the batch made one; the layer's input is 20 wide, less where its weight would be large.
        logvar_range: (lo, hi) of drawn log-variances, less the prior's; None is near the prior, wide and extreme.
        seed: Seed of inputs and upstream gradients.
        tensors: Your own tensors by argument name, in place of drawn ones. Every op runs whose arguments are all there.

    Returns:
        A `Comparison` with `rows`, `failures`, `ok` and `to_json()`. `print` gives its verdict, `rich.print` the table.

    Raises:
        TypeError, ValueError: An argument is unknown or impossible, or a tensor is missing or unfit.
    """
    return run(plan(op, dtype, shape, logvar_range, seed, tensors), seed)
