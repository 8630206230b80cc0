"""torch's own Gaussian loss, fused: its arguments, its broadcasting, its errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import arguments
from .dtypes import on_host
from .functional import nll_of
from .specs import Likelihood, NLLInputs
from .tracing import FLOAT, is_transformed, one_node
from .types import Reduction


def _promote(a: Tensor, b: Tensor) -> torch.dtype:
    """`torch.result_type`, which does not trace, for floating a and any real b."""
    if a.ndim and not b.ndim:
        return a.dtype
    return b.dtype if b.ndim and not a.ndim and b.is_floating_point() else torch.promote_types(a.dtype, b.dtype)


@one_node
def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: Reduction = "mean"
) -> Tensor:
    """`torch.nn.functional.gaussian_nll_loss`, fused: the same values, gradients, broadcasting and errors.

    Args:
        input: Expectation of the Gaussian.
        target: Sample; broadcasts against input.
        var: Positive variance: a float, or a tensor of input's shape, of input's shape except for one dimension of size 1, or of
            input's shape without its last dimension.
        full: Include the constant (1/2) log 2 pi.
        eps: Lower bound of var. The gradient passes through the clamp, as torch's does.
        reduction: "none" (every element), "mean" or "sum".

    Returns:
        The loss in the dtype that torch would return; half precision is rounded once, at the end. Differentiable in input,
        target and var, twice. One deliberate difference: a negative var raises ValueError for CPU tensors as in torch, while on a
        GPU, where finding it would cost a host synchronisation, and under torch.compile its terms are NaN.

    Raises:
        ValueError: var has a negative entry or the wrong size, or reduction is unknown.
        RuntimeError: input and target do not broadcast.
    """
    if isinstance(var, FLOAT):
        if var < 0:
            raise ValueError("var has negative entry/entries")
    elif not isinstance(var, Tensor):
        raise TypeError(f"var must be a float or a torch.Tensor, got {type(var).__name__}")
    elif on_host(var) and not is_transformed() and torch.any(var < 0):
        raise ValueError("var has negative entry/entries")
    dtype = _promote(input, target)
    kind, number = "logvar", 0.0
    if isinstance(var, Tensor):
        if var.shape != input.shape:
            if input.shape[:-1] == var.shape:
                var = var.unsqueeze(-1)
            elif input.ndim != var.ndim or sum(n for m, n in zip(input.shape, var.shape, strict=True) if m != n) != 1:
                raise ValueError("var is of incorrect size")
        dtype, kind = torch.promote_types(dtype, _promote(input, var)), "var"
    elif torch.compiler.is_compiling():
        var, kind = torch.log(torch.clamp(arguments.symbolic(var, input), min=eps)), "logvar"
    else:
        # The float's clamp, and its logarithm in double precision.
        var = max(var, eps)
        number = math.log(var) if var > 0 else -math.inf
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid")
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    if not target.is_floating_point():
        target = target.to(dtype)
    variance = var if isinstance(var, Tensor) else None
    scale = arguments.scale_of(reduction, input.ndim, input.shape)
    spec = Likelihood(input.ndim if reduction == "none" else 0, scale, kind, number, full, eps)
    return nll_of(NLLInputs(input, target, variance, None, None), spec, None).to(dtype)
