"""-log N(x; h weight^T + bias, exp(logvar)) tile by tile: neither the reconstruction nor its gradient is ever in memory.

With the residual d = h weight^T + bias - x, the inverse variance p of a column, and the rate r of a row (its upstream gradient
times the scale), a row's term and the slopes are

    term       1/2 sum over columns of (p d^2 + logvar + log 2 pi)
    in h       r (p d) weight                in weight  (p d)^T (r h)
    in x       -r p d, over the samples      in bias    p sum over rows of r d
    in logvar  1/2 sum of r - r p d^2, over the rows, or over all elements where there is one variance

A tile holds d alone. p and r scale not the tile, but the narrow factor of a product with it, or what comes of it. On other devices
than a CPU this serves what is too wide or too precise for the Triton kernels.
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
from .gaussian_nll import scaled

# Bytes of a tile on a CPU, and how many rows it has where there are so many: products of lower matrices are slower. Products of
# very low ones also add one number after the other: over as many columns as TILE_COLUMNS they still lose no digits.
TILE = 1 << 22
TILE_ROWS = 1 << 12
TILE_COLUMNS = 1 << 8
# Elsewhere a tile's products must fill the device.
DEVICE_TILE = 1 << 25


def forward(inputs: LinearInputs, spec: Linear, needs: Needs) -> tuple[tuple[Tensor], Gradients | None]:
    """The gradients are made along with a total, for an upstream gradient of 1: then each product is taken once."""
    likelihood = spec.likelihood
    ready = likelihood.keep == 0 and any(needs) and not has_float16(inputs)
    with _matmul_precision(spec.precision, inputs):
        nll, gradients = _walk(inputs, likelihood, needs if ready else (False,) * 5, likelihood.scale, want_terms=True)
    assert nll is not None
    return (nll,), gradients if ready else None


def backward(inputs: LinearInputs, spec: Linear, grad_outputs: Gradients, needs: Needs, kept: Gradients | None) -> Gradients:
    (grad_output,) = grad_outputs
    assert grad_output is not None
    if kept is not None:
        return scaled(kept, grad_output)
    rate = grad_output.to(accumulate_dtype(*inputs)) * spec.likelihood.scale
    with _matmul_precision(spec.precision, inputs):
        return _walk(inputs, spec.likelihood, needs, rate, want_terms=False)[1]


linear_nll = Op(forward, backward)


def _walk(
    inputs: LinearInputs, likelihood: Likelihood, needs: Needs, rate: Factor, want_terms: bool
) -> tuple[Tensor | None, Gradients]:
    """The scaled sums of the terms, if they are wanted, and the gradients for a rate, () or (rows,)."""
    x, count, width, acc = inputs.x, inputs.h.shape[0], inputs.x.shape[1], accumulate_dtype(*inputs)
    exact = torch.float64 if on_host(x) else acc
    given = torch.tensor(likelihood.logvar, dtype=exact, device=x.device) if inputs.variance is None else inputs.variance.to(exact)
    level = given.reshape(()) if given.numel() == 1 else given
    inverse = torch.exp(-level)
    rate = torch.as_tensor(rate, dtype=acc, device=x.device)
    rate = rate if x.numel() else torch.zeros_like(rate)  # the mean of no terms is NaN, but has no slopes
    # Squared residuals, summed over the rows at their rates, or over the columns at their inverse variances.
    by_column = level.ndim == 1 and not (want_terms and likelihood.keep)
    squares = torch.zeros(width if by_column else count, dtype=exact, device=x.device)
    slopes = _Slopes(inputs, needs, inverse.to(acc), rate)
    for here, rows, at, d in _residuals(inputs, acc):
        rated = slopes.add(here, rows, at, d)  # from here on nobody needs d itself
        if not (want_terms or needs[4]):
            continue
        if by_column:
            squares[at].add_(d.mul_(rated).sum(0))
        else:
            squares[here].add_(w.sum_over(d.mul_(inverse[at].sqrt().to(acc)) if level.ndim else d, 1, squares=True))

    nll = d_variance = None
    if want_terms:
        constant = level + LOG_2PI if likelihood.full else level
        constant = constant.sum() if level.ndim else width * constant
        each = squares if level.ndim and not by_column else squares * inverse
        nll = (0.5 * likelihood.scale * (each + constant if likelihood.keep else each.sum() + count * constant)).to(acc)
    if needs[4]:
        rates = rate.to(exact).expand(count)
        of_squares = squares * (rate if by_column and not rate.ndim else 1.0 if by_column else rates)
        of_squares, columns = (of_squares, 1) if by_column else (of_squares.sum(), width)
        d_variance = 0.5 * (columns * rates.sum() - inverse * of_squares).reshape(given.shape)
    return nll, slopes.finish(d_variance)


class _Slopes:
    """The gradients of h, x, weight and bias, tile by tile."""

    def __init__(self, inputs: LinearInputs, needs: Needs, inverse: Tensor, rate: Tensor):
        h, x, weight, bias, _ = self.inputs = inputs
        acc, operands = inverse.dtype, _operands(inputs, inverse.dtype)
        # A residual over a small variance leaves float16's range. tf32 has float16's digits and float32's range.
        self.operands = acc if operands == torch.float16 else operands
        self.rate = rate.unsqueeze(1) if rate.ndim else None  # of each row
        self.h = (h * self.rate if self.rate is not None and needs[2] else h).to(self.operands)
        self.weight = (weight * inverse.unsqueeze(1) if inverse.ndim and needs[0] else weight).to(self.operands)
        # What is left for the results to be multiplied by.
        self.of_rows = inverse * rate if not inverse.ndim else rate
        self.of_columns = (inverse if rate.ndim else inverse * rate).expand(weight.shape[0])
        self.need_rated = needs[1] or needs[3] or (needs[4] and inverse.ndim == 1)
        new = partial(torch.empty if x.numel() else torch.zeros, dtype=acc, device=x.device)  # the first product is not added
        self.d_h, self.d_weight = new(h.shape) if needs[0] else None, new(weight.shape) if needs[2] else None
        self.d_bias = torch.zeros_like(bias, dtype=acc) if bias is not None and needs[3] else None
        self.d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[1] else None

    def add(self, here: slice, rows: slice, at: slice, d: Tensor) -> Tensor:
        """Returns the residuals at their rows' rates."""
        factor = d.to(self.operands)
        if self.d_h is not None:
            _product(self.d_h[here], factor, self.weight[at], 1 if at.start else 0)
        if self.d_weight is not None:
            _product(self.d_weight[at], factor.T, self.h[here], 1 if here.start else 0)
        rated = d * self.rate[here] if self.rate is not None and self.need_rated else d
        if self.d_x is not None:
            if here.start == rows.start:  # the other samples of these rows follow
                self.of_x = self.d_x[rows, at] if self.d_x.dtype == d.dtype else torch.empty_like(d)
                torch.mul(rated, -self.of_columns[at], out=self.of_x)
            else:
                self.of_x.addcmul_(rated, self.of_columns[at], value=-1)
            if self.of_x.dtype != self.d_x.dtype:
                self.d_x[rows, at] = self.of_x
        if self.d_bias is not None:
            self.d_bias[at].add_(rated.sum(0))
        return rated

    def finish(self, d_variance: Tensor | None) -> Gradients:
        for g, factor in ((self.d_h, self.of_rows), (self.d_weight, self.of_columns)):
            if g is not None:
                g *= factor.unsqueeze(-1)
        if self.d_bias is not None:
            self.d_bias *= self.of_columns
        gradients = self.d_h, self.d_x, self.d_weight, self.d_bias, d_variance
        return tuple([None if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, self.inputs, strict=True)])


def _residuals(inputs: LinearInputs, acc: torch.dtype) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Tiles (rows of h, rows of x, columns, d), each in the memory of the one before."""
    h, x, weight, bias, _ = inputs
    batch, width = x.shape
    size = (TILE if on_host(x) else DEVICE_TILE) // acc.itemsize
    height = max(1, min(batch, max(TILE_ROWS, size // max(1, width))))
    span = max(1, min(width, size // height if height >= 64 or not on_host(x) else TILE_COLUMNS))
    memory = torch.empty(height * span, dtype=acc, device=x.device)
    operands = _operands(inputs, acc)
    left, right = h.to(operands), weight.to(operands).T
    for column in range(0, width, span):
        at = slice(column, min(column + span, width))
        for first in range(0, batch, height):
            rows = slice(first, min(first + height, batch))
            shape = rows.stop - rows.start, at.stop - at.start
            for top in range(0, h.shape[0], batch):
                here = slice(top + rows.start, top + rows.stop)
                d = memory[: shape[0] * shape[1]].view(shape).copy_(x[rows, at])
                _product(d, left[here], right[:, at], -1)
                yield here, rows, at, d if bias is None else d.add_(bias[at])


def _operands(inputs: LinearInputs, acc: torch.dtype) -> torch.dtype:
    """The dtype in which h and weight are multiplied."""
    return torch.promote_types(inputs.h.dtype, inputs.weight.dtype) if _multiplies_halves(inputs.x, acc) else acc


def _multiplies_halves(x: Tensor, acc: torch.dtype) -> bool:
    """Whether halves multiply into acc without being rounded in between: since torch 2.8, into float32 on CUDA."""
    return acc == torch.float32 and x.is_cuda and torch.version.cuda is not None and hasattr(torch.ops.aten.addmm, "dtype_out")


def _product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a b. On a CPU addmm_ would go on adding one number after the other, so what adds up is made apart."""
    if beta == 1 and on_host(total):
        total += a @ b
    elif a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)


@contextlib.contextmanager
def _matmul_precision(precision: str | None, inputs: LinearInputs) -> Iterator[None]:
    """torch's setting for float32 products on a GPU; the products of "tf32x3" are nearer to float32's than to tf32's."""
    h, _, weight, _, _ = inputs
    if torch.promote_types(h.dtype, weight.dtype) == torch.float16:
        precision = "tf32"  # of what is float32 in order not to overflow
    if precision is None or h.device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
