"""How far a result may be from the truth: the one rule, and the bound of `fastelbo compare` beside eager PyTorch.

**The rule.** An element may differ from the truth by the sum of four allowances, each of which has its own cause:

    arithmetic   rtol * size. Where the terms that make an element cancel, its value says nothing about their errors (oracle.py).
    output       eps * |value|, the rounding to the result's dtype: a whole unit in the last place, since Triton's interpreter cuts
                 bfloat16 off. Twice that for gradients that the forward pass made: the upstream gradient multiplies them later.
    operands     what was rounded on its way into the arithmetic, relative to the size: factors of matrix products in half precision
                 and in tf32, a sample in its dtype. It follows from those dtypes, and rtol has no part in it.
    underflow    what may vanish on its way: the smallest normal number for each term, and the dtype's smallest step.

rtol is 2e-5 by default, and 1e-11 for float64 results. That is over a hundred roundings of the arithmetic: right results stay far
below it, in sums of millions of terms and where a float32 difference of log-variances is exponentiated. A gradient that is wrong
by a part in a thousand is fifty times above it, though it be a single element among larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..specs import DIFFERENTIABLE

ARITHMETIC = {torch.float64: 1e-11, torch.float32: 2e-5}  # half precision is float32 arithmetic
TF32 = 2.0**-10  # the rounding of a factor, which hardware may cut off


class Truth(NamedTuple):
    """What a result is held to, in float64."""

    value: Tensor
    size: Tensor  # the magnitudes of the terms that are added to give each element
    dtype: torch.dtype  # of the result
    underflow: float = 0.0  # what may have vanished on its way to it
    operands: float = 0.0  # what its operands lost by rounding, relative to the size


def arithmetic_of(dtypes: Sequence[torch.dtype | None]) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def widened(t: Tensor) -> Tensor:
    """A float64 copy without history."""
    t = t.detach()
    return (t.cpu() if t.device.type == "mps" else t).to(torch.float64, copy=True)  # MPS has no float64


def allowance(truth: Truth, rtol: float | None = None, roundings: float = 1) -> Tensor:
    """The rule, for a result that was rounded to its dtype so many times."""
    info = torch.finfo(truth.dtype)
    rtol = ARITHMETIC[arithmetic_of([truth.dtype])] if rtol is None else rtol
    of_size = (rtol + truth.operands) * truth.size
    of_value = roundings * info.eps * truth.value.abs()
    # What is NaN, from inf - inf, allows nothing.
    relative = of_size.nan_to_num(nan=0.0, posinf=math.inf) + of_value.nan_to_num(nan=0.0, posinf=math.inf)
    return relative + truth.underflow + roundings * info.eps * info.tiny


def is_right_at_the_edge(got: Tensor, value: Tensor, margin: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Where a result is equal to the truth or as little finite: inf for what overflows its dtype within `margin`, NaN for NaN.

    inf is right for NaN too: at a standard deviation of 0 the slope is -inf, of which autograd makes inf - inf.
    """
    overflows = got.isinf() & (got.sign() == value.sign()) & (value.abs() + margin >= torch.finfo(dtype).max)
    return (got == value) | overflows | (value.isnan() & ~got.isfinite())


def mismatch(name: str, got: Tensor | None, truth: Truth, rtol: float | None = None, roundings: float = 1) -> str | None:
    """What is wrong with a result (None is a gradient of 0), or None."""
    value, dtype = truth.value, truth.dtype
    if got is None:
        got = torch.zeros(value.shape, dtype=dtype, device=value.device)
    if got.shape != value.shape or got.dtype != dtype:
        return f"{name} is {shown(got)}, expected {tuple(value.shape)} {dtype_name(dtype)}"
    bound, seen = allowance(truth, rtol, roundings), widened(got).to(value.device)
    error = (seen - value).abs()
    fine = ((error <= bound) & value.isfinite()) | is_right_at_the_edge(seen, value, bound, dtype)
    if bool(fine.all()):
        return None
    excess = torch.where(fine, -1.0, torch.nan_to_num(error / bound, nan=math.inf, posinf=math.inf))
    at = torch.unravel_index(excess.argmax(), value.shape)
    wrong, right = (f"{t[at].item():{'.17g' if dtype == torch.float64 else '.9g'}}" for t in (seen, value))
    far = f", an error of {error[at].item():.3g} where {bound[at].item():.3g} is allowed" if bool(value[at].isfinite()) else ""
    return (
        f"{name} is off at {tuple(int(i) for i in at)}: {wrong} where the oracle has {right}{far}; {int((~fine).sum())} of "
        f"{fine.numel()} elements are off in {shown(got)}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shown(value: Any) -> str:
    """For messages: of a tensor its shape, dtype and strides; of one number the value; of a record its fields."""
    if isinstance(value, Tensor):
        what = str(tuple(value.shape)) if value.ndim else repr(value.item())
        return f"{what} {dtype_name(value.dtype)}" + ("" if value.is_contiguous() else f" with strides {value.stride()}")
    return f"{type(value).__name__}({shown_fields(value._asdict())})" if hasattr(value, "_asdict") else repr(value)


def shown_fields(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items() if value is not None)


def rounding_of_operands(op: str, dtypes: Any, spec: Any, seeded: bool) -> dict[str, float]:
    """Of each output and gradient, relative to its size, for the dtypes of the inputs in their record; 0 where not named.

    - Factors of matrix products are rounded: in float32 with tf32 asked for, all of them. In half precision the inputs are factors
      as they are, and the residual is rounded, or h and the weight once an upstream gradient or a variance multiplied them: to
      bfloat16, and for float16 to tf32.
    - The sample of `linear_elbo`: z has mu's dtype, and its gradient may come back in it.
    - Beside float64, whatever is float32's nevertheless: noise from a seed, and a posterior that is.
    """
    acc = arithmetic_of(dtypes[: DIFFERENTIABLE[type(dtypes)]])
    z = ARITHMETIC[torch.float32] if seeded and acc == torch.float64 else 0.0
    if op not in ("linear_nll", "linear_elbo"):
        return {"z": z, "spread": z}
    h, linear = (dtypes.h, spec) if op == "linear_nll" else (dtypes.mu, spec.linear)
    if op == "linear_elbo" and h.itemsize == 2:
        z = torch.finfo(h).eps
    elif op == "linear_elbo" and h != acc:
        z = ARITHMETIC[torch.float32]

    # Of both factors of a product together: in those that make the mean, and in those with the residual.
    in_mean = in_slope = 0.0
    factors = torch.promote_types(h, dtypes.weight)
    # "high" is tf32 to cuBLAS, where nobody asks for more.
    asked = linear.precision or ("ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32")
    if arithmetic_of_layer(dtypes) == torch.float32:
        if factors.itemsize == 2:  # half of bfloat16's eps for each of two, or all of it for one that is cut off
            in_slope = torch.finfo(factors).eps if factors == torch.bfloat16 else 2 * TF32
        elif asked == "tf32":
            in_mean = in_slope = 2 * TF32
    residual = in_mean + z
    return {
        **dict.fromkeys(("nll", "loss", "variance"), 2 * residual),  # which add up squares of residuals
        **dict.fromkeys(("x", "bias"), residual),
        "h": residual + in_slope,
        **dict.fromkeys(("weight", "mu", "logvar"), residual + in_slope + z),
    }


def arithmetic_of_layer(dtypes: Any) -> torch.dtype:
    """The likelihood's across a linear layer, which a posterior in float64 does not widen."""
    return arithmetic_of([dtypes.mu if hasattr(dtypes, "mu") else dtypes.h, dtypes.x, dtypes.weight, dtypes.bias, dtypes.variance])


# The bound of `fastelbo compare`, which compare.py explains.
LUCK = 1.5
SLACK = 2.0
ORACLE_SLACK = 6.0


def bound_beside(ours: Tensor, peer: Tensor, slack: float) -> tuple[float, float, bool]:
    """The largest and the mean error that are allowed, in ulp; and whether they are kept, and no more is lost than by the peer."""
    held = peer.isfinite()
    if not bool(held.any()):
        return math.inf, math.inf, True
    most, mean = (LUCK * float(error) + slack for error in (peer[held].max(), peer[held].mean()))
    return most, mean, float(ours[held].max()) <= most and float(ours[held].mean()) <= mean
