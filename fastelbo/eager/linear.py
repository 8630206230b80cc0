"""-log N(x; h weight^T + bias, exp(logvar)) tile by tile: neither the reconstruction nor its gradient is ever in memory.

With s = 1 / std of a column, d = s (h weight^T + bias - x), and the rate r of a row (its upstream gradient times the scale), a
row's term and the slopes are

    term       1/2 sum over columns of (d^2 + logvar + log 2 pi)
    in h       r d (s weight)                 in weight  s (d^T (r h))
    in x       -s r d, over the samples       in bias    s sum over rows of r d
    in logvar  1/2 sum of r - r d^2, over the rows, or over all elements where there is one variance

On other devices than a CPU this serves what is too wide or too precise for the Triton kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..dtypes import LOG_2PI, accumulate_dtype, has_float16, on_host
from ..specs import Factor, Gradients, Likelihood, Linear, LinearInputs, Needs, Op
from . import walk as w

# Bytes of a tile of d and of one of r p d on a CPU, and how many rows it has where there are so many: products of lower matrices
# are slower. Products of very low ones also add one number after the other: over TILE_COLUMNS they still lose no digits.
TILE = 1 << 22
TILE_ROWS = 1 << 12
TILE_COLUMNS = 1 << 8
# Elsewhere a tile's products must fill the device.
DEVICE_TILE = 1 << 25

# The largest factor of a residual, whose inverse is the smallest: in float32's range squares of 1 stay.
FACTOR = 1e18


def forward(inputs: LinearInputs, spec: Linear, needs: Needs) -> tuple[tuple[Tensor], Gradients | None]:
    """The gradients are made along with a total, for an upstream gradient of 1: then each product is taken once."""
    likelihood = spec.likelihood
    ready = _backward_only_scales(inputs, likelihood, needs)
    with _products(spec.precision, inputs):
        nll, gradients = _walk(inputs, likelihood, needs if ready else (False,) * 5, likelihood.scale, want_terms=True)
    assert nll is not None
    return (nll,), gradients if ready else None


def backward(inputs: LinearInputs, spec: Linear, grad_outputs: Gradients, needs: Needs, kept: Gradients | None) -> Gradients:
    (grad_output,) = grad_outputs
    assert grad_output is not None
    if kept is None and _backward_only_scales(inputs, spec.likelihood, needs):
        kept = forward(inputs, spec, needs)[1]
    if kept is not None:
        return w.scaled(kept, grad_output)
    rate = grad_output.to(accumulate_dtype(*inputs)) * spec.likelihood.scale
    with _products(spec.precision, inputs):
        return _walk(inputs, spec.likelihood, needs, rate, want_terms=False)[1]


linear_nll = Op(forward, backward)


def _backward_only_scales(inputs: LinearInputs, likelihood: Likelihood, needs: Needs) -> bool:
    return likelihood.keep == 0 and any(needs) and not has_float16(inputs)


def _walk(
    inputs: LinearInputs, likelihood: Likelihood, needs: Needs, rate: Factor, want_terms: bool
) -> tuple[Tensor | None, Gradients]:
    """The scaled sums of the terms, if they are wanted, and the gradients for a rate, () or (rows,)."""
    h, x, weight, _, variance = inputs
    count, width, acc = h.shape[0], x.shape[1], accumulate_dtype(*inputs)
    exact = torch.float64 if on_host(x) else acc
    given = torch.full((), likelihood.logvar, dtype=exact, device=x.device) if variance is None else variance.to(exact)
    rate = torch.as_tensor(w.rate_of_some(rate, likelihood.scale), dtype=acc, device=x.device)
    # The tiles are multiplied by as much of s as float32 surely bears. The rest of 1 / variance, and a common rate, multiply a
    # narrow factor or the sums. Below a log-variance of about -130 that rest is infinite, and NaN beside a residual of 0.
    one, common = given.numel() == 1, torch.ones((), dtype=acc, device=x.device) if rate.ndim else rate
    s = torch.exp(-0.5 * (given.reshape(()) if one else given))
    early = s.clamp(1 / FACTOR, FACTOR)
    more = s / early
    late, more, of_columns = s * more, more * more, s * more * common

    operands = _operands(inputs, acc)
    # A residual over a small variance leaves float16's range. tf32 has float16's digits and float32's range.
    operands = acc if operands == torch.float16 else operands
    left, right = h.to(operands), (weight if one else weight * late.to(acc).unsqueeze(1)).to(operands)
    new = partial(torch.zeros, dtype=acc, device=x.device)
    zeros = [new(t.shape) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)]
    d_h, d_x, d_weight, d_bias, _ = zeros
    each_row = want_terms and likelihood.keep > 0
    squares = torch.zeros(count if each_row else width, dtype=exact, device=x.device)  # summed over the others
    for here, rows, at, d, spare in _residuals(inputs, acc, 2 if rate.ndim else 1):
        if variance is not None or likelihood.logvar:
            d.mul_((early if one else early[at]).to(acc))
        g = torch.mul(d, rate[here].unsqueeze(1), out=spare) if rate.ndim else d
        factor = g.to(operands)
        if d_h is not None:
            _product(d_h[here], factor, right[at], 1 if at.start else 0)
        if d_weight is not None:
            _product(d_weight[at], factor.T, left[here], 1 if here.start else 0)
        if d_x is not None:
            d_x[rows, at] -= g
        if d_bias is not None:
            d_bias[at] += g.sum(0)
        if each_row:
            squares[here] += (g.mul_(d) if one else g.mul_(d).mul_(more[at])).sum(1)
        elif want_terms or needs[4]:
            squares[at] += g.mul_(d).sum(0)
    for gradient, factor in (
        (d_h, of_columns if one else common),
        (d_x, of_columns),
        (d_weight, of_columns.unsqueeze(-1)),
        (d_bias, of_columns),
    ):
        if gradient is not None:
            gradient *= factor.to(acc)

    nll = d_variance = None
    squares = squares * (common if each_row and not one else common * more)
    if want_terms:
        constant = (given + LOG_2PI if likelihood.full else given).expand(width).sum() * likelihood.scale
        nll = (0.5 * (squares + constant if each_row else squares.sum() + count * constant)).to(acc)
    if needs[4]:
        slope = rate.to(exact).expand(count).sum() - squares
        d_variance = 0.5 * (slope.sum() if one else slope).reshape(given.shape)
    return nll, w.rounded((d_h, d_x, d_weight, d_bias, d_variance), inputs)


def _residuals(inputs: LinearInputs, acc: torch.dtype, buffers: int) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
    """Tiles (rows of h, rows of x, columns, d, spare memory of d's shape), each in the memory of the one before.

    With one of `buffers` the spare memory is that of d.
    """
    h, x, weight, bias, _ = inputs
    batch, width = x.shape
    size = (TILE if on_host(x) else DEVICE_TILE) // (2 * acc.itemsize)
    height = max(1, min(batch, max(TILE_ROWS, size // max(1, width))))
    span = max(1, min(width, size // height if height >= 64 or not on_host(x) else TILE_COLUMNS))
    memory = torch.empty(buffers, height * span, dtype=acc, device=x.device)
    operands = _operands(inputs, acc)
    left, right = h.to(operands), weight.to(operands).T
    for column in range(0, width, span):
        at = slice(column, min(column + span, width))
        for first in range(0, batch, height):
            rows = slice(first, min(first + height, batch))
            shape = rows.stop - rows.start, at.stop - at.start
            for top in range(0, h.shape[0], batch):
                here = slice(top + rows.start, top + rows.stop)
                d, spare = (memory[i, : shape[0] * shape[1]].view(shape) for i in (0, -1))
                _product(d.copy_(x[rows, at]), left[here], right[:, at], -1)
                yield here, rows, at, d if bias is None else d.add_(bias[at]), spare


def _operands(inputs: LinearInputs, acc: torch.dtype) -> torch.dtype:
    """The dtype in which h and weight are multiplied."""
    return torch.promote_types(inputs.h.dtype, inputs.weight.dtype) if _multiplies_halves(inputs.x, acc) else acc


def _multiplies_halves(x: Tensor, acc: torch.dtype) -> bool:
    """Whether halves multiply into acc without being rounded in between: since torch 2.8, into float32 on CUDA."""
    return acc == torch.float32 and x.is_cuda and torch.version.cuda is not None and hasattr(torch.ops.aten.addmm, "dtype_out")


def _product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a b, whatever total holds where beta is 0.

    On a CPU addmm_ would go on adding one number after the other, so what adds up is made apart.
    """
    if beta == 1 and on_host(total):
        total += a @ b
    elif a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)


@contextlib.contextmanager
def _products(precision: str | None, inputs: LinearInputs) -> Iterator[None]:
    """Products in the dtype of their factors, autocast or not.

    On a GPU float32 products follow torch's setting; those of "tf32x3" are nearer to float32's than to tf32's.
    """
    h, _, weight, _, _ = inputs
    if torch.promote_types(h.dtype, weight.dtype) == torch.float16:
        precision = "tf32"  # of what is float32 in order not to overflow
    with torch.autocast(h.device.type, enabled=False):
        if precision is None or h.device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
