"""How far a result may be from the truth: the one rule, and the bound of `fastelbo compare` beside it.

**The rule.** An element may differ from the truth by the sum of four allowances, each of which has its own cause:

    arithmetic   rtol * size. Where the terms that make an element cancel, the element says nothing about their errors, so these are
                 measured by its size (see oracle.py).
    output       eps * |value|, the rounding to the result's dtype: one unit in the last place, since Triton's interpreter cuts
                 bfloat16 off where a GPU rounds. Twice that for gradients that the forward pass made: they are rounded there, and
                 again when they are multiplied by the upstream gradient.
    operands     what was rounded on its way into the arithmetic: factors of matrix products in half precision and in tf32, a
                 sample in its dtype. It follows from those dtypes, and rtol has no part in it.
    underflow    What may vanish on its way: the smallest normal number for each term, and the dtype's smallest step.

rtol is 2e-5 by default, and 1e-11 for float64 results. That is over a hundred roundings of the arithmetic: right results stay far
below it, in sums of millions of terms and where a float32 difference of log-variances is exponentiated. A gradient that is wrong
by a part in a thousand is fifty times above it, though it be a single element among larger ones.

Where the truth overflows the result's dtype, inf must come out, with its sign. An inf or NaN where the truth is finite is wrong,
and so is a finite number where the truth is NaN. (inf is right there too: at a standard deviation of 0 the slope is -inf, of which
autograd makes inf - inf.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ARITHMETIC = {torch.float64: 1e-11, torch.float32: 2e-5}  # half precision is float32 arithmetic


class Truth(NamedTuple):
    """What a result is held to, in float64."""

    value: Tensor
    size: Tensor  # the magnitudes of the terms that are added to give each element
    dtype: torch.dtype  # of the result
    underflow: float  # what may have vanished on its way to it
    operands: float  # what its operands lost by rounding, relative to the size


class Allowance(NamedTuple):
    """How far each element of a result may be from the truth, by cause."""

    arithmetic: Tensor
    output: Tensor
    operands: Tensor
    underflow: float

    @property
    def total(self) -> Tensor:
        # A size that is NaN, from inf - inf, allows nothing.
        arithmetic, output, operands = (part.nan_to_num(nan=0.0, posinf=math.inf) for part in self[:3])
        return arithmetic + output + operands + self.underflow


def widened(t: Tensor) -> Tensor:
    """A float64 copy without history."""
    t = t.detach()
    return (t.cpu() if t.device.type == "mps" else t).to(torch.float64, copy=True)  # MPS has no float64


def allowance(truth: Truth, rtol: float | None = None, roundings: int = 1) -> Allowance:
    """The rule, for a result that was rounded to its dtype so many times."""
    info = torch.finfo(truth.dtype)
    rtol = ARITHMETIC[arithmetic_of([truth.dtype])] if rtol is None else rtol
    return Allowance(
        arithmetic=rtol * truth.size,
        output=roundings * info.eps * truth.value.abs(),
        operands=truth.operands * truth.size,
        underflow=truth.underflow + roundings * info.eps * info.tiny,
    )


def is_right_at_the_edge(got: Tensor, value: Tensor, margin: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Where a result is equal to the truth or as little finite: inf for what overflows its dtype within `margin`, NaN for NaN."""
    overflows = got.isinf() & (got.sign() == value.sign()) & (value.abs() + margin >= torch.finfo(dtype).max)
    return (got == value) | overflows | (value.isnan() & ~got.isfinite())


def mismatch(name: str, got: Tensor | None, truth: Truth, rtol: float | None = None, roundings: int = 1) -> str | None:
    """What is wrong with a result (None is a gradient of 0), or None."""
    value, dtype = truth.value, truth.dtype
    if got is None:
        got = torch.zeros(value.shape, dtype=dtype, device=value.device)
    if got.shape != value.shape or got.dtype != dtype:
        return f"{name} is {shown(got)}, expected {tuple(value.shape)} {dtype_name(dtype)}"
    bound = allowance(truth, rtol, roundings).total
    seen = widened(got).to(value.device)
    error = (seen - value).abs()
    fine = ((error <= bound) & value.isfinite()) | is_right_at_the_edge(seen, value, bound, dtype)
    if bool(fine.all()):
        return None
    excess = torch.where(fine, -1.0, torch.nan_to_num(error / bound, nan=math.inf, posinf=math.inf))
    at = torch.unravel_index(excess.argmax(), value.shape)
    digits = ".17g" if dtype == torch.float64 else ".9g"
    wrong, right = (f"{t[at].item():{digits}}" for t in (seen, value))
    far = f", an error of {error[at].item():.3g} where {bound[at].item():.3g} is allowed" if bool(value[at].isfinite()) else ""
    return (
        f"{name} is off at {tuple(int(i) for i in at)}: {wrong} where the oracle has {right}{far}; {int((~fine).sum())} of "
        f"{fine.numel()} elements are off in {shown(got)}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shown(t: Tensor) -> str:
    """Shape, dtype and strides of a tensor, for messages; of one number its value."""
    what = str(tuple(t.shape)) if t.ndim else repr(t.item())
    return f"{what} {dtype_name(t.dtype)}" + ("" if t.is_contiguous() else f" with strides {t.stride()}")


# ---- operands --------------------------------------------------------------------------------------------------------------------

TF32 = 2.0**-10  # the rounding of a factor, which hardware may cut off


def arithmetic_of(dtypes: Sequence[torch.dtype | None]) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def arithmetic_of_layer(dtypes: Any) -> torch.dtype:
    """The likelihood's across a linear layer, which a posterior in float64 does not widen."""
    return arithmetic_of([dtypes.mu if hasattr(dtypes, "mu") else dtypes.h, dtypes.x, dtypes.weight, dtypes.bias, dtypes.variance])


def rounding_of_operands(op: str, dtypes: Any, spec: Any, seeded: bool) -> dict[str, float]:
    """Of each output and gradient, relative to its size, for the dtypes of the inputs in their record; 0 where not named.

    - Factors of matrix products are rounded: in float32 with tf32 asked for, all of them. In half precision the inputs are factors
      as they are, and the residual is rounded, or h and the weight once an upstream gradient or a variance multiplied them: to
      bfloat16, and for float16 to tf32.
    - The sample of `linear_elbo`: z has mu's dtype, and its gradient may come back in it.
    - Beside float64, whatever is float32's nevertheless: noise from a seed, and a posterior that is.
    """
    acc = arithmetic_of(dtypes[: dtypes.differentiable])
    narrow_noise = ARITHMETIC[torch.float32] if seeded and acc == torch.float64 else 0.0
    if op == "latent":
        return {"z": narrow_noise, "logvar": narrow_noise}
    if op not in ("linear_nll", "linear_elbo"):
        return {}
    of_h, linear = (dtypes.h, spec) if op == "linear_nll" else (dtypes.mu, spec.linear)
    z = 0.0
    if op == "linear_elbo":
        z = torch.finfo(of_h).eps if of_h.itemsize == 2 else ARITHMETIC[torch.float32] if of_h != acc else narrow_noise
    in_mean, in_slope = _rounding_of_products(of_h, dtypes.weight, arithmetic_of_layer(dtypes), linear.precision)
    residual = in_mean + z
    return {
        **dict.fromkeys(("nll", "loss", "variance"), 2 * residual),  # which add up squares of residuals
        **dict.fromkeys(("x", "bias"), residual),
        "h": residual + in_slope,
        **dict.fromkeys(("weight", "mu", "logvar"), residual + in_slope + z),
    }


def _rounding_of_products(h: torch.dtype, weight: torch.dtype, acc: torch.dtype, precision: str | None) -> tuple[float, float]:
    """Of both factors of a product together: in those that make the mean, and in those with the residual."""
    factors = torch.promote_types(h, weight)
    if acc == torch.float64:
        return 0.0, 0.0
    if factors == torch.bfloat16:
        return 0.0, torch.finfo(factors).eps  # half of it for each of two, or all of it for one that is cut off
    if factors == torch.float16:
        return 0.0, 2 * TF32
    # "high" is tf32 to cuBLAS, where nobody asks for more.
    tf32 = precision == "tf32" or (precision is None and torch.get_float32_matmul_precision() != "highest")
    return (2 * TF32, 2 * TF32) if tf32 else (0.0, 0.0)


# ---- beside eager PyTorch --------------------------------------------------------------------------------------------------------

# The bound of `fastelbo compare`, which compare.py explains.
LUCK = 1.5
SLACK = 2.0
ORACLE_SLACK = 6.0


def bound_beside(ours: Tensor, peer: Tensor, slack: float) -> tuple[float, float, bool]:
    """The largest and the mean error that are allowed, in ulp; and whether they are kept, and no more is lost than by the peer."""
    held = peer.isfinite()
    if not bool(held.any()):
        return math.inf, math.inf, True
    allowed_max = LUCK * float(peer[held].max()) + slack
    allowed_mean = LUCK * float(peer[held].mean()) + slack
    return allowed_max, allowed_mean, float(ours[held].max()) <= allowed_max and float(ours[held].mean()) <= allowed_mean
