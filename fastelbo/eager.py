"""The plain-PyTorch backend: analytic gradients, in blocks that stay in cache.

On a CPU a large loss is bound by memory, and by the faulting in of fresh pages above all. So each pass walks its inputs in blocks
of `BLOCK` bytes whose temporaries are reused from cache, and writes gradients straight into their final buffers. On other
devices, and under torch.compile (where Inductor fuses the expressions itself), a pass is one block: the same lines, no loop.

`fastelbo.kernels` has the same functions with the same signatures. Their arguments mean the same everywhere:

    var       what the variance is given by: a tensor that broadcasts to `recon`, or a float, which is always a log-variance
    kind      what a tensor `var` holds: "logvar", "std" or "var"
    eps       lower bound of a "var"
    clamp     (lo, hi) for logvar, or None
    weight    bool or floating, broadcastable to the terms, or None; where it is 0 the term is absent
    keep      how many leading dimensions the sum leaves: 0 is a total, ndim sums nothing
    scale     factor of the result and of its gradients, a float or a 0-d tensor
    grad      upstream gradient of a result, of its shape, with any strides
    needs     which inputs want a gradient, in the order of the arguments; the others get None

A forward pass may return these gradients with its results, for an upstream gradient of 1 of each result, or what they are multiples
of; `scale_gradients` finishes them. None stands for a forward pass that leaves them to the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .noise import sample_noise
from .reference import LOG_2PI, accumulate_dtype

# Bytes of one temporary: enough to amortise starting the threads, few enough for a handful of them to stay in the outer caches.
BLOCK = 1 << 21

# Squares are summed in runs of this many, and the runs in float64: one float32 sum over millions would lose digits.
RUN = 256

_MAX = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}

Factor = float | Tensor
Sums = float | Tensor
Grads = tuple[Tensor | None, ...]
Dims = tuple[int, ...] | None


# ---- walking the inputs in blocks ------------------------------------------------------------------------------------------------


class _Blocks:
    """How to walk terms of `shape` in blocks of `size` elements, when a sum keeps their first `keep` dimensions.

    Dense tensors, with or without one value per row, are seen as (rows of the result, elements of a row), so that a block is any
    run of memory; anything strided or broadcast otherwise keeps its shape and is split along its first dimension.
    """

    def __init__(self, shape: torch.Size, keep: int, size: int, tensors: Sequence[Tensor | None]):
        count = math.prod(shape)
        rows = 1 if keep in (0, len(shape)) else math.prod(shape[:keep])
        per_row = torch.Size(tuple(shape[:keep]) + (1,) * (len(shape) - keep))
        self.dense = all(t is None or t.ndim == 0 or (t.shape in (shape, per_row) and t.is_contiguous()) for t in tensors)
        self.tall, self.across = max(1, size * shape[0] // count), 1
        self.view, self.kept = shape, keep
        if self.dense:
            cols = count // rows
            self.tall, self.wide, self.across = max(1, size // cols), size, -(-cols // size)
            self.view, self.kept = torch.Size((rows, cols)), {0: 0, len(shape): 2}.get(keep, 1)
        self.down = -(-self.view[0] // self.tall)
        self.dims = tuple(range(self.kept, len(self.view)))

    def see(self, t: Tensor | None) -> Tensor | None:
        if t is None or t.ndim == 0:
            return t
        if self.dense:
            return t.view(1, 1) if t.numel() == 1 else t.view(self.view[0], -1)
        return t.expand(self.view)

    def cut(self, t: Tensor | None) -> Sequence[Tensor | None]:
        """The block of `t`, as `see` shows it or broadcasting against that, for each block."""
        if t is None or t.ndim == 0:
            return (t,) * (self.down * self.across)
        parts = t.split(self.tall) if self.down > 1 and t.shape[0] > 1 else (t,) * self.down
        if self.across == 1:
            return parts
        return [piece for part in parts for piece in (part.split(self.wide, 1) if t.shape[1] > 1 else (part,) * self.across)]


_NO_OUTS = (None,) * 4


def _run(
    block: Callable[..., tuple[Sums | None, Sequence[Tensor | None]]],
    inputs: Sequence[Tensor | None],
    constants: Sequence[Tensor | None],
    needs: Sequence[bool],
    keep: int,
    size: int,
    acc: torch.dtype,
    host: bool,
    buffers: Sequence[Tensor | None] | None = None,
) -> tuple[Sums | None, Grads]:
    """Run `block(*inputs, *constants, outs, dims)` over blocks of `size` elements, and put the results together.

    A block returns its terms summed over `dims` (or None) and, for each input that `needs` names, the gradient of the block's
    shape. `dims` is None for a total that can be read, which is then a number. `outs` has a buffer in which a gradient may be made
    from what leads to it (a page that is not touched is time that is not spent), or None; `buffers` has the caller's own. The
    gradient of an input that broadcasts is summed to its own shape here. `host` says whether the inputs are readable.
    """
    shape = inputs[0].shape
    dims = None if host and keep == 0 else tuple(range(keep, len(shape)))
    if not host or inputs[0].numel() <= size:
        if buffers is None:
            total, shares = block(*inputs, *constants, _NO_OUTS[: len(inputs)], dims)
        else:
            total, shares = block(*inputs, *constants, [_usable(b, acc) for b in buffers], dims)
            shares = [g if b is None or g is b else b.copy_(g) for g, b in zip(shares, buffers, strict=True)]
        return total, tuple([g if g is None else _like(g, t) for g, t in zip(shares, inputs, strict=True)])

    full = [w and t.shape == shape for t, w in zip(inputs, needs, strict=True)]
    buffers = buffers or (None,) * len(inputs)
    blocks = _Blocks(shape, keep, size, (*inputs, *constants, *buffers))
    grads = [
        b if b is not None else torch.empty_like(t) if f else _zeros_to_sum(t, blocks) if w else None
        for t, f, w, b in zip(inputs, full, needs, buffers, strict=True)
    ]
    seen = [blocks.cut(blocks.see(t)) for t in (*inputs, *constants)]
    outs = [blocks.cut(blocks.see(g) if f else None) for g, f in zip(grads, full, strict=True)]
    ready = [f and _usable(g, acc) is not None for g, f in zip(grads, full, strict=True)]
    shared = {i: blocks.cut(g) for i, (g, f, w) in enumerate(zip(grads, full, needs, strict=True)) if w and not f}
    sums: list[Any] = []
    for at, (args, out) in enumerate(zip(zip(*seen, strict=True), zip(*outs, strict=True), strict=True)):
        part, shares = block(*args, [o if r else None for o, r in zip(out, ready, strict=True)], blocks.dims if dims else dims)
        sums.append(part)
        for g, o in zip(shares, out, strict=True):
            if o is not None and g is not o:
                o.copy_(g)
        for i, parts in shared.items():
            here = parts[at]
            here += shares[i].sum_to_size(here.shape)
    grads = [g if f else g.to(t.dtype).view(t.shape) if w else None for g, t, f, w in zip(grads, inputs, full, needs, strict=True)]
    return None if sums[0] is None else _join(sums, blocks, shape[:keep]), tuple(grads)


def _zeros_to_sum(t: Tensor, blocks: _Blocks) -> Tensor:
    """A float64 buffer for the gradient of an input that broadcasts, padded to the blocks' rank (0-d stays 0-d)."""
    padded = t.shape if not t.ndim else (t.numel(), 1) if blocks.dense else (1,) * (len(blocks.view) - t.ndim) + tuple(t.shape)
    return torch.zeros(padded, dtype=torch.float64)


def _join(sums: list[Any], blocks: _Blocks, shape: torch.Size) -> Sums:
    """Put the blocks' sums together, in float64 where blocks share an output: it costs nothing at this size."""
    if blocks.kept == 0:
        return sum(sums)
    if blocks.dims:
        out = torch.zeros(blocks.view[: blocks.kept] + (1,) * blocks.dense, dtype=torch.float64)
        for piece, part in zip(blocks.cut(out), sums, strict=True):
            piece += part.view(piece.shape)
    else:
        out = torch.empty(blocks.view, dtype=sums[0].dtype)
        for piece, part in zip(blocks.cut(out), sums, strict=True):
            piece.copy_(part)
    return out.view(shape)


def _sum(terms: Tensor, dims: Dims) -> Sums:
    """The sum over the last dimensions `dims`, or, for None, over all as a number: operations on 0-d tensors are not free."""
    if dims is None:
        return terms.sum().item()
    return terms.sum(dims) if dims else terms


def _sum_squares(t: Tensor, dims: Dims, host: bool) -> Sums:
    """As `_sum`, of t^2, reading t once and writing nothing where t is dense."""
    if not host or dims == () or not t.is_contiguous():
        return _sum(t * t, dims)
    if dims is None:
        if t.numel() <= 1 << 17:
            return torch.mul(t, t).sum().item()  # the call that is not made is worth more than the reading
        over = t.numel() % RUN
        if over:
            t, last = t.view(-1).split((t.numel() - over, over))
            return _sum_squares(t, dims, host) + _sum_squares(last, dims, host)
        norms = torch.linalg.vector_norm(t.view(-1, RUN), dim=1).double()
        return torch.dot(norms, norms).item()
    rows = t.flatten(dims[0])
    whole = rows.shape[-1] // RUN * RUN
    norms = torch.linalg.vector_norm(rows[..., :whole].unflatten(-1, (-1, RUN)), dim=-1).double()
    rest = rows[..., whole:].double()
    return (norms * norms).sum(-1) + (rest * rest).sum(-1)


def _count(t: Tensor, dims: Dims) -> int:
    return t.numel() if dims is None else math.prod(t.shape[dims[0] :]) if dims else 1


def _readable(t: Tensor) -> bool:
    """Whether a value can be read at no cost: not from a device, and not while tracing."""
    return t.is_cpu and type(t) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in float32 or float64, without a call where there is nothing to do."""
    return t if t.dtype == dtype else t.float() if dtype == torch.float32 else t.double()


def _like(grad: Tensor, t: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its input."""
    if grad.shape != t.shape:
        grad = grad.sum_to_size(t.shape) if grad.numel() else torch.zeros_like(t)
    return grad if grad.dtype == t.dtype else grad.to(t.dtype)


_held = threading.local()


def _scratch(like: Tensor, dtype: torch.dtype, slot: int = 0) -> Tensor | None:
    """A block's worth of memory that this thread keeps, shaped like a temporary; None where a fresh tensor is as good.

    Between two calls the allocator may return a temporary's pages, and faulting them in again takes longer than filling them.
    """
    size = like.numel() * dtype.itemsize
    if not BLOCK // 16 < size <= 2 * BLOCK or not _readable(like):
        return None
    held = getattr(_held, "slots", None)
    if held is None:
        held = _held.slots = {}
    buffer = held.get(slot)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = held[slot] = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype).view(like.shape)


def _usable(out: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient's buffer, where intermediate values may lie in it. (Tracers want no strided tensor that is written to.)"""
    return out if out is not None and out.dtype == dtype and _readable(out) else None


def _times(t: Tensor, factor: Factor, host: bool) -> Tensor:
    """A temporary times a factor, in place."""
    return t if type(factor) is float and factor == 1.0 else t.mul_(_factor(factor, t, host))


def _upstream(grad: Tensor, scale: Factor, shape: torch.Size, keep: int, acc: torch.dtype) -> Factor:
    """The upstream gradient times the scale: of a shape that broadcasts against the terms, or a number where reading it is free."""
    if keep == 0 and _readable(grad):
        return float(grad) * float(scale)
    up = grad.to(acc)
    if isinstance(scale, Tensor) or scale != 1.0:
        up = up * scale
    return up.reshape(up.shape + (1,) * (len(shape) - keep)) if keep else up


def _tensor(value: Sums, acc: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return _as(value, acc)
    if abs(value) > _MAX[acc]:
        value = math.copysign(math.inf, value)  # as arithmetic in acc would, where torch.full raises
    return torch.full((), value, dtype=acc)


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return _tensor(value, dtype)


def _factor(value: Factor, like: Tensor, host: bool) -> Factor:
    """A factor for `like`: on a host as a kept 0-d tensor, which costs less than a Python number does."""
    return _constant(value, like.dtype) if host and type(value) is float else value


def _number(value: Factor) -> Factor:
    """A factor as a number, where reading it is free."""
    return float(value) if isinstance(value, Tensor) and _readable(value) else value


def _wide_weight(weight: Tensor | None, acc: torch.dtype) -> Tensor | None:
    """A half-precision weight in the terms' dtype: multiplying by it would convert what it broadcasts to. On a CPU also a bool."""
    if weight is None or weight.dtype.itemsize >= 4 or (weight.dtype == torch.bool and not _readable(weight)):
        return weight
    return weight.to(acc)


def _weigh(t: Tensor, weight: Tensor | None, fill: bool) -> Tensor:
    """A temporary times the weights, in place. With `fill`, NaN under a weight of 0 vanishes, which takes much longer on a CPU."""
    if weight is None:
        return t
    if weight.dtype == torch.bool:
        return torch.where(weight, t, 0.0)
    t.mul_(weight)
    return t.masked_fill_(weight == 0, 0.0) if fill else t


def _weighed_sum(terms: Tensor, weight: Tensor | None, dims: Dims) -> tuple[Sums, bool]:
    """The sum of weighed terms, and whether what lies under a weight of 0 must be filled: a sum that is finite has seen no NaN."""
    if weight is None:
        return _sum(terms, dims), False
    host = _readable(weight)
    sums = _sum(_weigh(terms, weight, fill=dims == () or not host), dims)
    if dims == () or not host:
        return sums, True
    if math.isfinite(sums) if isinstance(sums, float) else bool(sums.isfinite().all()):
        return sums, False
    return _sum(terms.masked_fill_(weight == 0, 0.0), dims), True


def _holds(total: Any, parts: Any, count: int) -> bool:
    """Whether a total of parts that were summed apart is as exact as a sum of whole terms, however much the parts cancel in it.

    The roundings of the parts' runs are random, so they are worth about eps / 2 / sqrt(runs) of the parts.
    """
    gain = math.sqrt(max(1.0, count / RUN))
    if isinstance(total, float):
        return abs(total) * gain >= abs(parts) or math.isnan(total)
    return _readable(total) and bool((total.abs() * gain >= abs(parts)).all())


def _early(inputs: Sequence[Any], needs: Sequence[bool], shape: torch.Size, keep: int, acc: torch.dtype) -> bool:
    """Whether a forward pass may write gradients that a backward only scales: by a number, or by one for each row.

    Those of half-precision inputs would be rounded twice, and those of inputs that broadcast hold a sum over rows.
    """
    if True not in needs or keep == len(shape) or not _readable(inputs[0]):
        return False
    return not any(need and (t.dtype != acc or (keep and t.shape != shape)) for t, need in zip(inputs, needs, strict=True))


# ---- Gaussian negative log-likelihood --------------------------------------------------------------------------------------------


def _nll(recon, x, var, weight, kind, full, eps, keep, scale, up, needs, want_terms, acc) -> tuple[Sums | None, Grads]:
    """One pass: the scaled sums of the terms, and `up` times the gradients, `up` being a factor or a tensor like the terms."""
    fixed, host = not isinstance(var, Tensor), _readable(recon)
    constant = 0.5 * LOG_2PI if full else 0.0
    if weight is None and (fixed or (host and var.numel() == 1 and kind == "logvar" and _readable(var))):
        value = var if fixed else float(var)
        factor = 0.5 * _exp(-value)
        if 1e-30 < factor < 1e30:
            learned, shift = None if fixed else var, (constant + 0.5 * value) / factor
            return _squares(recon, x, learned, factor, shift, keep, scale, up, needs, want_terms, acc, host)
    factor = 0.5
    if fixed:
        factor, constant = 0.5 * _exp(-var), constant + 0.5 * var
    need_recon, need_x, need_var = needs
    traced = not host and torch.compiler.is_compiling()

    def block(recon, x, var, weight, factors, outs, dims):
        of_recon, of_x, of_var = outs
        recon, x = _as(recon, acc), _as(x, acc)
        rate = up if factors is None else factors
        sums = g_recon = g_x = g_var = None
        # Where nothing shows that there is no NaN under a weight of 0, there may be one.
        fill = True

        # The residual d, and ratio = d / variance.
        if fixed:
            d = ratio = torch.sub(recon, x, out=of_recon)
        else:
            d = torch.sub(recon, x, out=of_var if need_var else _scratch(recon, acc, 0))
            if kind == "logvar":
                level = _as(var, acc)
                if traced:
                    ratio = d * torch.exp(-level)  # what is one pass anyway takes no division
                elif level.shape == d.shape:
                    ratio = torch.exp(level, out=of_recon if need_recon else _scratch(recon, acc, 1))
                    ratio = torch.div(d, ratio, out=ratio)
                else:
                    ratio = torch.div(d, torch.exp(level), out=of_recon)
            elif kind == "std":
                std = _as(var, acc)
                ratio, level = d / std / std, 2 * torch.log(std) if want_terms else None
            else:
                # Raised to eps, but a negative variance is an error, and NaN shows it where no check can.
                raw = _as(var, acc)
                variance = torch.clamp(raw, min=eps).masked_fill(raw < 0, math.nan)
                ratio, level = d / variance, torch.log(variance) if want_terms else None

        if want_terms:
            # Terms that are summed at once may lie in memory that the next block, or the next call, takes again.
            where = _scratch(d, acc, 0) if dims != () else None
            if fixed:
                core = torch.mul(d, d, out=where).mul_(factor).add_(constant)
            elif weight is not None:
                core = torch.addcmul(level, d, ratio, out=where).mul_(factor).add_(constant)
            else:
                shift, narrow = constant / factor, level.shape != d.shape
                core = torch.addcmul(level + shift if narrow else level, d, ratio, out=where)
                if dims is not None and shift and not narrow:
                    core = core.add_(shift)
            sums, fill = _weighed_sum(core, weight, dims)
            if isinstance(sums, float) and not fixed and weight is None and shift and not narrow:
                # One addition to the sum instead of one to each term, unless the two cancel.
                apart = shift * core.numel()
                sums = sums + apart if abs(sums + apart) >= 0.5 * apart else _sum(core.add_(shift), dims)

        if need_var:
            if kind == "logvar" and weight is None and factors is None:
                half = _factor(0.5 * rate, d, host)
                half = half if isinstance(half, Tensor) else d.new_full((), half)
                g_var = torch.addcmul(half, d, ratio, value=-0.5 * rate, out=d)
            else:
                slope = d.mul_(ratio).neg_().add_(1.0)
                if kind != "logvar":
                    slope /= std if kind == "std" else variance
                    fill = True  # of a variance that is next to 0 the terms may be finite
                g_var = _times(_weigh(slope, weight, fill), rate if kind == "std" else rate * 0.5, host)
            if var.shape != d.shape:
                g_var = g_var.sum_to_size(var.shape)  # before other gradients, so that Inductor may write one of them over d
        if need_recon or need_x:
            ratio = _weigh(ratio, weight, fill)
            rate = rate * (2 * factor) if fixed else rate
        if need_x:
            g_x = torch.mul(ratio, -rate, out=of_x)
        if need_recon:
            g_recon = _times(ratio, rate, host)
        return sums, (g_recon, g_x, g_var)

    inputs = recon, x, None if fixed else var
    constants = _wide_weight(weight, acc), up if isinstance(up, Tensor) else None
    size = BLOCK // acc.itemsize
    if recon.numel() <= size + size // 2:
        size = recon.numel()  # not a block and a bit: a pass of its own costs more than is gained
    sums, grads = _run(block, inputs, constants, needs, keep, size, acc, host)
    # Without weights, terms lack the factor.
    return None if sums is None else sums * (scale if fixed or weight is not None else factor * scale), grads


def _squares(recon, x, learned, factor, shift, keep, scale, up, needs, want_terms, acc, host) -> tuple[Sums | None, Grads]:
    """`_nll` of one variance for all, without weights: factor * (d^2 + shift), with d^2 summed by itself, and the rest is numbers.

    `learned` is the variance where it is a tensor, of one element.
    """
    need_recon, need_x, need_var = needs

    def block(recon, x, learned, factors, outs, dims):
        rate = up if factors is None else factors
        sums = g_recon = g_x = g_var = None
        d = torch.sub(_as(recon, acc), _as(x, acc), out=outs[0] if need_recon else _scratch(recon, acc, 1))
        if want_terms or need_var:
            squares, count = _sum_squares(d, dims, host), _count(d, dims)
            if want_terms:
                sums = squares + shift * count
                # What is summed apart is exact, unless the two cancel.
                if shift < 0.0 and not _holds(sums, squares, count):
                    sums = _sum((d * d).add_(shift), dims)
            if need_var:
                slope = count - 2 * factor * squares
                if not _holds(slope, 2 * factor * squares, count):
                    slope = _sum((d * d).mul_(-2 * factor).add_(1.0), dims)
                # An upstream gradient is the same all along `dims`.
                each: Any = rate
                for _ in (dims or ()) if isinstance(rate, Tensor) and rate.ndim else ():
                    each = each.select(-1, 0)
                g_var = _tensor(slope * (0.5 * each), torch.float64)
        if need_x:
            g_x = torch.mul(d, -2 * factor * rate, out=outs[1])
        if need_recon:
            g_recon = _times(d, 2 * factor * rate, host)
        return sums, (g_recon, g_x, g_var)

    inputs = recon, x, None if learned is None else learned.reshape(())
    # Squares under a gradient need no temporary, and so little is done with each block that fewer are better.
    size = BLOCK // acc.itemsize * (8 if need_recon else 1)
    sums, grads = _run(block, inputs, (up if isinstance(up, Tensor) else None,), needs, keep, size, acc, host)
    if need_var:
        grads = (*grads[:2], grads[2].reshape(learned.shape))
    return None if sums is None else sums * (factor * scale), grads


def _exp(value: float) -> float:
    """exp of a Python float that overflows to inf, as tensors do."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def nll_forward(recon, x, var, weight, kind, full, eps, keep, scale, needs) -> tuple[Tensor, Grads | None]:
    acc = accumulate_dtype(recon, x, var)
    early = _early((recon, x, var), needs, recon.shape, keep, acc)
    scale = _number(scale)
    up, wanted = (scale, needs) if early else (None, (False,) * 3)
    sums, grads = _nll(recon, x, var, weight, kind, full, eps, keep, scale, up, wanted, True, acc)
    return _tensor(sums, acc), grads if early else None


def nll_backward(recon, x, var, weight, kind, eps, keep, scale, grad, needs) -> Grads:
    acc = accumulate_dtype(recon, x, var)
    up = _upstream(grad, scale, recon.shape, keep, acc)
    return _nll(recon, x, var, weight, kind, False, eps, keep, 1.0, up, needs, False, acc)[1]


# ---- the latent side: sampling and KL --------------------------------------------------------------------------------------------

# fmt: off

def _rest_over_square(v: Tensor) -> Tensor:
    """(e^v - 1 - v) / v^2 on [-1, 1], as a polynomial that is near-minimax (Chebyshev): exact to float32 or float64."""
    # Literals, since a traced function checks each value that it reads from elsewhere before each call.
    if v.dtype == torch.float32:
        coefficients: tuple[float, ...] = (
            2.80628026e-6, 2.53585122e-5, 0.00019838102, 0.00138853969, 0.00833333968, 0.0416667366, 0.166666666, 0.499999998,
        )
    else:
        coefficients = (
            4.8383974908301086e-14, 7.7532899090613013e-13, 1.1469860083749004e-11, 1.6057448519013339e-10,
            2.0876763758519632e-9, 2.505212058452295e-8, 2.7557319196273279e-7, 2.7557319174051554e-6, 2.4801587301645516e-5,
            0.00019841269841374739, 0.0013888888888888835, 0.0083333333333332362, 0.041666666666666667, 0.16666666666666667, 0.5,
        )
    series: Any = coefficients[0]
    for c in coefficients[1:]:
        series = series * v + c
    return series

# fmt: on


def exact_parts(
    logvar: Tensor, prior_logvar: Tensor | None, expm1: Tensor | None = None, rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """e^v - 1 and e^v - 1 - v for v = logvar - prior_logvar, without what float32 loses near the prior and far from it.

    On a CPU in float64 for float32, where the cancellation near the prior stays below 2e-8 of the result but for the smallest v: it
    takes fewer operations than a series. Elsewhere float64 is slow or missing: a series, in logvar's dtype. `expm1` and `rest` are
    memory for the results, which is used where there is much to do.
    """
    if logvar.dtype == torch.float32 and _readable(logvar):
        many = max(1, BLOCK // 60)
        if logvar.numel() <= many:
            return _wide_parts(logvar, prior_logvar, None, None)
        expm1 = torch.empty_like(logvar) if expm1 is None else expm1
        rest = torch.empty_like(logvar) if rest is None else rest
        tensors = logvar, prior_logvar, expm1, rest
        blocks = _Blocks(logvar.shape, 0, many, tensors)
        for pieces in zip(*(blocks.cut(blocks.see(t)) for t in tensors), strict=True):
            _wide_parts(*pieces)
        return expm1, rest
    v = logvar if prior_logvar is None else logvar - prior_logvar
    series, near = _rest_over_square(v) * v * v, v.abs() < 1
    exp = torch.exp(v)  # the series gives expm1 too, where exp - 1 differs from it
    if prior_logvar is not None and not torch.compiler.is_compiling():
        # Far from the prior the rounding of v moves e^v by many times its own: `low` is what v lost (Knuth's two-sum). In a traced
        # function that is too much for Inductor to keep in one loop.
        back = v - logvar
        more = exp * ((logvar - (v - back)) - (prior_logvar + back))
        exp = torch.where(more.abs() < math.inf, exp + more, exp)
    return torch.where(near, series + v, exp - 1.0), torch.where(near, series, exp - 1.0 - v)


def _wide_parts(
    logvar: Tensor, prior_logvar: Tensor | None, of_expm1: Tensor | None, of_rest: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`exact_parts` of float32 tensors by way of float64, in scratch."""
    v, spare = _scratch(logvar, torch.float64, 4), _scratch(logvar, torch.float64, 5)
    v = logvar.double() if v is None else v.copy_(logvar)
    if prior_logvar is not None:
        v.sub_(prior_logvar if spare is None else spare.copy_(prior_logvar))
    expm1 = torch.expm1(v, out=spare)
    narrow = expm1.float() if of_expm1 is None else of_expm1.copy_(expm1)
    rest = expm1.sub_(v)
    if v.numel() and rest.min().item() < 1e-16:
        rest = torch.where(rest < 1e-16, v.mul_(v).mul_(0.5), rest, out=v)
    return narrow, rest.float() if of_rest is None else of_rest.copy_(rest)


def _reaching(clamp: tuple[float, float] | None, logvar: Tensor) -> tuple[float, float] | None:
    """The clamp, or None where nothing lies outside of it, which is soon seen on a CPU."""
    if clamp is None or not _readable(logvar) or not logvar.numel():
        return clamp
    least, most = torch.aminmax(logvar)
    return None if least.item() >= clamp[0] and most.item() <= clamp[1] else clamp


def _greatest(v: Tensor, weight: Tensor | None) -> float:
    """The largest v; where the largest of all is too large, what is absent does not count."""
    if not v.numel():
        return 0.0
    most = v.max().item()
    return most if weight is None or most <= 4.0 else v.masked_fill(weight == 0, 0.0).max().item()


def _is_exact(total: Sums, count: int) -> bool:
    """Whether sums of `count` KL terms whose e^v - 1 - v was computed in float32 are as exact as they should be.

    With eps = 2^-24 such a term is off by eps |v|. The sum of |v| is at most sqrt(2 count total), as e^v - 1 - v is about v^2 / 2
    where that matters. Asked for is an error of 6 eps of the total, 3 ulp or less, with all errors going the same way, as they do
    where all v are equal.
    """
    least = total if isinstance(total, float) else total.min().item()
    return least >= count / 18


class _Slopes(NamedTuple):
    """What the gradients of a KL that is summed by rows are multiples of: their factors wait for the upstream gradient."""

    pull: Tensor | None  # of mu, or of prior_mu alone: the one is the negative of the other
    expm1: Tensor | None
    curve: Tensor | None
    scale: Factor
    needs: Sequence[bool]

    def times(self, grad: Tensor) -> Grads:
        """The gradients, in this memory as far as it goes."""
        pull, expm1, curve, scale, (need_mu, need_logvar, need_prior_mu, need_prior_logvar) = self
        g_mu = g_logvar = g_prior_mu = g_prior_logvar = None
        some: Any = pull if pull is not None else expm1 if expm1 is not None else curve
        if grad.ndim:
            rate = grad.reshape(grad.shape + (1,) * (some.ndim - grad.ndim))
            rate = rate if type(scale) is float and scale == 1.0 else rate * scale
        else:
            rate = _constant(grad.item() * scale, some.dtype)
        if need_logvar:
            g_logvar = expm1.mul_(rate * _constant(0.5, some.dtype))
        if need_prior_logvar:
            g_prior_logvar = curve.mul_(rate * _constant(-0.5, some.dtype))
        if need_mu:
            g_mu = pull.mul_(rate)
            g_prior_mu = torch.neg(g_mu) if need_prior_mu else None
        elif need_prior_mu:
            g_prior_mu = pull.mul_(rate)
        return g_mu, g_logvar, g_prior_mu, g_prior_logvar


def _slope(slope: Tensor, factor: Factor, out: Tensor | None, weight: Tensor | None, fill: bool, host: bool) -> Tensor:
    """The slope times the factor and the weights, in `out`."""
    if weight is not None and weight.dtype == slope.dtype and 4 * weight.numel() <= slope.numel():
        slope = torch.mul(slope, weight * factor, out=out)  # one pass instead of two
        return slope.masked_fill_(weight == 0, 0.0) if fill else slope
    slope = _times(slope, factor, host) if out is slope else torch.mul(slope, _factor(factor, slope, host), out=out)
    return slope if weight is None else _weigh(slope, weight, fill)


def _kl(mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, up, grad_z, grad_z_eps, needs, want_terms, acc, out=None):
    """One pass: the scaled sums of the KL terms, and the gradients of `up * KL` plus those that reach mu and logvar through z.

    With terms and without `up`, gradients lack their factors.
    """
    need_mu, need_logvar, need_prior_mu, need_prior_logvar = needs
    clamp = _reaching(clamp, logvar)
    bare = want_terms and up is None
    want_slopes = (bare or up is not None) and True in needs
    plain = weight is None or weight.dtype == torch.bool
    host = _readable(mu)
    quick = host and acc == torch.float32
    # Gradients alone take no series where they are traced: Inductor does not have it for nothing.
    traced = not host and torch.compiler.is_compiling()

    def block(mu, logvar, prior_mu, prior_logvar, weight, factors, grad_z, grad_z_eps, outs, dims):
        of_mu, of_logvar, of_prior_mu, of_prior_logvar = outs
        lv = wide = _as(logvar, acc)
        if clamp is not None:
            lv = torch.clamp(wide, *clamp)
        prior_logvar = None if prior_logvar is None else _as(prior_logvar, acc)
        rate = up if factors is None else factors
        sums = g_mu = g_logvar = g_prior_mu = g_prior_logvar = None
        rest = None
        fill = True
        if want_slopes or want_terms:
            v, spare = lv, _scratch(lv, acc, 0) if dims != () else None
            if prior_logvar is not None:
                v = spare = torch.sub(lv, prior_logvar, out=spare)
            of_expm1 = of_logvar if need_logvar else _scratch(lv, acc, 1)
            d = pull = _as(mu, acc)
            if prior_mu is not None:
                of_d = of_prior_logvar if need_prior_logvar else of_prior_mu if need_prior_mu else _scratch(lv, acc, 2)
                mu_first = need_mu or not need_prior_mu  # the sign of what comes first
                d = torch.sub(d, _as(prior_mu, acc), out=of_d) if mu_first else torch.sub(_as(prior_mu, acc), d, out=of_d)
                pull = d
            if prior_logvar is not None:
                of_pull = of_prior_mu if need_prior_logvar else None  # unless d lies there
                of_pull = of_mu if need_mu else of_pull if need_prior_mu else _scratch(lv, acc, 3)
                if traced:
                    pull = d * torch.exp(-prior_logvar)  # what is one pass anyway takes no division
                else:
                    pull = torch.exp(prior_logvar, out=of_pull)
                    pull = torch.div(d, pull, out=pull)
            # In float32 e^v - 1 - v is good enough for sums, unless the posterior lies near its prior, which they show themselves
            # (of rows that are very short one always does), and rounding v = logvar - prior_logvar moves e^v by up to v / 2 ulp.
            near = quick and (prior_logvar is None or _greatest(v, weight) <= 4.0)
            count = _count(lv, dims)
            fast = near and plain and count >= 16
            if (near and fast) or (not want_terms and (near or traced)):
                expm1 = torch.expm1(v, out=of_expm1)
                rest = torch.sub(expm1, v, out=spare) if want_terms else None
            else:
                exact, rest = exact_parts(lv, prior_logvar, of_expm1, spare)
                expm1 = exact if of_expm1 is None or exact is of_expm1 else of_expm1.copy_(exact)
            while want_terms:
                sums, fill = _weighed_sum(rest.addcmul_(d, pull), weight, dims)
                if not fast or _is_exact(sums, count):
                    break
                fast, (exact, rest) = False, exact_parts(lv, prior_logvar, expm1, spare)
                expm1 = exact if exact is expm1 else expm1.copy_(exact)
            if want_slopes:
                if need_prior_logvar:
                    curve = torch.addcmul(expm1, d, pull, out=of_prior_logvar if prior_mu is None else d)
                    g_prior_logvar = _slope(curve, 1.0 if bare else -0.5 * rate, curve, weight, fill, host)
                if need_mu or need_prior_mu:
                    # Divided by a prior's variance it lies in memory of its own, otherwise in an input or in scratch.
                    of_pulled = of_mu if pull is d and need_mu else pull
                    pulled = _slope(pull, 1.0 if bare else rate, of_pulled, weight, fill, host)
                    if need_mu:
                        g_mu, g_prior_mu = pulled, torch.neg(pulled, out=of_prior_mu) if need_prior_mu else None
                    else:
                        g_prior_mu = pulled
                if need_logvar:
                    g_logvar = _slope(expm1, 1.0 if bare else 0.5 * rate, expm1, weight, fill, host)
        if grad_z is not None:
            if need_mu:
                g_mu = grad_z if g_mu is None else g_mu.add_(grad_z)
            if need_logvar:
                std = torch.mul(lv, 0.5).exp_()
                g_logvar = std.mul_(grad_z_eps).mul_(0.5) if g_logvar is None else g_logvar.addcmul_(std, grad_z_eps, value=0.5)
        if clamp is not None and g_logvar is not None:
            g_logvar.masked_fill_((wide < clamp[0]) | (wide > clamp[1]), 0.0)
        return sums, (g_mu if need_mu else None, g_logvar, g_prior_mu if need_prior_mu else None, g_prior_logvar)

    inputs = mu, logvar, prior_mu, prior_logvar
    constants = _wide_weight(weight, acc), up if isinstance(up, Tensor) else None, grad_z, grad_z_eps
    buffers = None if out is None else (*out, None, None)
    size = BLOCK // 8
    if mu.numel() > size:
        # What a block has beside its gradients takes two BLOCKs together: these share 107/64, 17/60 are for `exact_parts`.
        temporaries = 1 + (not need_logvar) + 2 * (clamp is not None) + 2 * (grad_z is not None)
        if prior_mu is not None and not (need_prior_mu or need_prior_logvar):
            temporaries += 1
        if prior_logvar is not None and not (need_mu or need_prior_mu):
            temporaries += 1
        size = max(1, BLOCK * 107 // 64 // acc.itemsize // temporaries)
    sums, grads = _run(block, inputs, constants, needs, keep, size, acc, host, buffers)
    return None if sums is None else sums * (0.5 * scale), grads


def latent_forward(
    mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, want_kl, needs
) -> tuple[Tensor | None, Tensor | None, Grads | _Slopes | None]:
    """z (None without eps and seed) in mu's dtype, of shape (samples, *mu.shape) if samples is given; and the KL if wanted."""
    z = kl = None
    ready: Grads | _Slopes | None = None
    acc = accumulate_dtype(mu, logvar, prior_mu, prior_logvar)
    sampled = eps is not None or seed is not None
    if want_kl:
        prior, scale = (prior_mu, prior_logvar), _number(scale)
        early = not sampled and _early((mu, logvar, *prior), needs, mu.shape, keep, acc)
        need_mu, need_logvar, need_prior_mu, need_prior_logvar = needs
        up, wanted = scale, needs if early else (False,) * 4
        if keep:
            # Not for an upstream gradient of 1, which rows seldom get.
            up, wanted = None, (need_mu, need_logvar, need_prior_mu and not need_mu, need_prior_logvar) if early else wanted
        sums, grads = _kl(mu, logvar, *prior, weight, clamp, keep, scale, up, None, None, wanted, True, acc)
        if early:
            ready = _Slopes(grads[0] if need_mu else grads[2], grads[1], grads[3], scale, needs) if keep else grads
        kl = _tensor(sums, acc)
    if sampled:
        wide = _as(logvar, acc) if clamp is None else torch.clamp(_as(logvar, acc), *clamp)
        std = torch.mul(wide, 0.5).exp_()
        normals = sample_noise(mu, seed, samples, acc) if eps is None else _as(eps, acc)
        # In the one-sample case sigma's buffer becomes z: no other page is touched.
        z = (std.mul_(normals) if samples is None else std * normals).add_(mu).to(mu.dtype)
    return z, kl, ready


def latent_backward(
    mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, grad_z, grad_kl, needs, out=None
) -> Grads:
    """Gradients of mu, logvar and the prior. `out` holds buffers for those of mu and logvar, of any strides."""
    acc = accumulate_dtype(mu, logvar, prior_mu, prior_logvar)
    up = None if grad_kl is None else _upstream(grad_kl, scale, mu.shape, keep, acc)
    if grad_kl is None:
        needs = (*needs[:2], False, False)
    grad_z_eps = None
    if grad_z is not None:
        grad_z = grad_z.to(acc)
        if needs[1]:
            grad_z_eps = grad_z * (sample_noise(mu, seed, samples, acc) if eps is None else eps.to(acc))
        if samples is not None:
            grad_z = grad_z.sum(0)
            grad_z_eps = None if grad_z_eps is None else grad_z_eps.sum(0)
    return _kl(mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, 1.0, up, grad_z, grad_z_eps, needs, False, acc, out)[1]


# ---- both sides at once ----------------------------------------------------------------------------------------------------------


def elbo_forward(
    recon, x, var, mu, logvar, prior_mu, prior_logvar, weight, full, clamp, nll_scale, kl_scale, beta, needs
) -> tuple[Tensor, Sums, Sums, Grads]:
    """loss = nll + beta * kl, both terms (scaled totals), and the loss's gradients, written in the pass that reads the inputs."""
    acc = accumulate_dtype(recon, x, var, mu, logvar, prior_mu, prior_logvar)
    nll_scale, beta, prior = _number(nll_scale), _number(beta), (prior_mu, prior_logvar)
    beta = _as(beta, acc) if isinstance(beta, Tensor) else beta  # not a product in half precision
    nll, of_nll = _nll(recon, x, var, weight, "logvar", full, 0.0, 0, nll_scale, nll_scale, needs[:3], True, acc)
    kl, of_kl = _kl(mu, logvar, *prior, None, clamp, 0, kl_scale, kl_scale * beta, None, None, needs[3:], True, acc)
    return _tensor(nll + beta * kl, acc), nll, kl, (*of_nll, *of_kl)


def elbo_terms_forward(
    recon, x, var, mu, logvar, prior_mu, prior_logvar, weight, full, clamp, keep, nll_scale, kl_scale, needs
) -> tuple[Tensor, Tensor, Grads | None]:
    acc = accumulate_dtype(recon, x, var, mu, logvar, prior_mu, prior_logvar)
    nll_scale, prior, none = _number(nll_scale), (prior_mu, prior_logvar), (False,) * 7
    early = _early((recon, x, var), needs[:3], recon.shape, keep, acc)
    early = early and _early((mu, logvar, *prior), needs[3:], mu.shape, keep, acc)
    wanted, nll_up, kl_up = (needs, nll_scale, kl_scale) if early else (none, None, None)
    nll, of_nll = _nll(recon, x, var, weight, "logvar", full, 0.0, keep, nll_scale, nll_up, wanted[:3], True, acc)
    kl, of_kl = _kl(mu, logvar, *prior, None, clamp, keep, kl_scale, kl_up, None, None, wanted[3:], True, acc)
    return _tensor(nll, acc), _tensor(kl, acc), (*of_nll, *of_kl) if early else None


def elbo_terms_backward(
    recon, x, var, mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, nll_scale, kl_scale, grad_nll, grad_kl, needs
) -> Grads:
    acc = accumulate_dtype(recon, x, var, mu, logvar, prior_mu, prior_logvar)
    of_nll: Grads = (None,) * 3
    of_kl: Grads = (None,) * 4
    if grad_nll is not None:
        up = _upstream(grad_nll, nll_scale, recon.shape, keep, acc)
        _, of_nll = _nll(recon, x, var, weight, "logvar", False, 0.0, keep, 1.0, up, needs[:3], False, acc)
    if grad_kl is not None:
        up = _upstream(grad_kl, kl_scale, mu.shape, keep, acc)
        prior = prior_mu, prior_logvar
        _, of_kl = _kl(mu, logvar, *prior, None, clamp, keep, 1.0, up, None, None, needs[3:], False, acc)
    return (*of_nll, *of_kl)


# ---- across a linear decoder -----------------------------------------------------------------------------------------------------

# Bytes of a tile of recon on a CPU, and how many rows it has where there are so many: products of lower matrices are slower. Those
# of very low ones also add one number after the other: over as many columns as this they still lose no digits, and what adds to a
# product that is there (addmm_) would go on where that one ended.
TILE = 1 << 22
TILE_ROWS = 1 << 12
TILE_COLUMNS = 1 << 8
# Elsewhere a tile's products must fill the device.
DEVICE_TILE = 1 << 25


def _multiplies_halves(x: Tensor) -> bool:
    """Whether halves multiply into float32 without being rounded in between: since torch 2.8, on CUDA."""
    return x.is_cuda and torch.version.cuda is not None and hasattr(torch.ops.aten.addmm, "dtype_out")


def _in_range(factor: Factor, acc: torch.dtype) -> Factor:
    """A factor that products take as a number; beyond acc, where they would raise or make NaN of it, a tensor."""
    return factor if isinstance(factor, Tensor) or abs(factor) <= _MAX[acc] else _tensor(factor, acc)


def _linear_nll(h, x, weight, bias, var, full, keep, scale, up, needs, want_terms, acc) -> tuple[Tensor | None, Grads]:
    """Tile by tile of recon = h weight^T + bias: the scaled sums of the terms, and `up` times the gradients.

    A column's variance and a row's upstream gradient scale not the tile, but the other factor of a product with it or its result.
    """
    need_h, need_x, need_weight, need_bias, need_var = needs if up is not None else (False,) * 5
    (count, _), (batch, width), host = h.shape, x.shape, _readable(x)
    operands = torch.promote_types(h.dtype, weight.dtype)
    if acc != torch.float32 or not _multiplies_halves(x):
        operands = acc
    # A residual over a small variance leaves float16's range. tf32 has float16's digits and float32's range.
    slopes = acc if operands == torch.float16 else operands
    wide_bias = None if bias is None else _as(bias, acc)
    level: Any = var
    if isinstance(var, Tensor):
        level = _as(var, acc).reshape(()) if var.numel() == 1 else _as(var, acc)
        level = level.item() if host and not level.ndim else level
    inverse: Any = torch.exp(-level) if isinstance(level, Tensor) else _exp(-level)
    by_column = isinstance(level, Tensor) and level.ndim == 1
    rate: Any = 1.0 if up is None else up
    by_row = isinstance(rate, Tensor) and rate.ndim > 0  # it is (N, 1)
    each_rate: Any = _in_range(inverse if by_row else inverse * rate, acc)
    # What is left of a gradient's factors: where it is a number, products are scaled as they are made.
    h_factor = _in_range(rate if by_column else inverse * rate, acc)
    weight_factor = each_rate.unsqueeze(1) if by_column else each_rate
    rated_h = (h * rate).to(slopes) if by_row and need_weight else h.to(slopes)
    rated_weight = (weight * inverse.unsqueeze(1)).to(slopes) if by_column and need_h else weight.to(slopes)
    left_factor, right_factor = h.to(operands), weight.to(operands).T

    size = (TILE if host else DEVICE_TILE) // acc.itemsize
    height = max(1, min(batch, max(TILE_ROWS, size // max(1, width))))
    span = max(1, min(width, size // height if height >= 64 or not host else TILE_COLUMNS))
    memory = torch.empty(height * span, dtype=acc, device=x.device)
    zeros = functools.partial(torch.zeros, dtype=acc, device=x.device)
    unwritten = functools.partial(torch.empty, dtype=acc, device=x.device) if x.numel() and count else zeros
    d_h, d_x = unwritten(h.shape) if need_h else None, zeros(x.shape).to(x.dtype) if need_x else None
    d_weight, d_bias = unwritten(weight.shape) if need_weight else None, zeros(width) if need_bias else None
    exact = torch.float64 if host else acc
    # Of the residuals: summed over all rows, with the weight that an upstream gradient gives them, or over the columns.
    squares: Any = None
    if need_var or (want_terms and not keep):
        squares = 0.0 if host and not by_column else torch.zeros(width if by_column else (), dtype=exact, device=x.device)
    of_rows = torch.zeros(count, dtype=exact, device=x.device) if want_terms and keep else None

    def add_product(total: Tensor, a: Tensor, b: Tensor, factor: Any, first: bool) -> None:
        """total += factor * a b, without the factor if it is a tensor; total = ... for the first."""
        gain = factor if type(factor) is float else 1.0
        if host and not first:
            total.add_(a @ b, alpha=gain)
        else:
            _product(total, a, b, 0 if first else 1, gain)

    for left in range(0, width, span):
        at = slice(left, min(left + span, width))
        for first in range(0, batch, height):
            rows = slice(first, min(first + height, batch))
            shape = rows.stop - first, at.stop - left
            of_x = None if d_x is None else d_x[rows, at] if x.dtype == acc else zeros(shape)
            for top in range(0, count, max(1, batch)):
                here = slice(top + first, top + rows.stop)
                d = memory[: math.prod(shape)].view(shape).copy_(x[rows, at])
                _product(d, left_factor[here], right_factor[:, at], -1, 1.0)
                if wide_bias is not None:
                    d += wide_bias[at]
                factor = d.to(slopes) if need_h or need_weight else d
                if need_h:
                    add_product(d_h[here], factor, rated_weight[at], h_factor, left == 0)
                if need_weight:
                    add_product(d_weight[at], factor.T, rated_h[here], weight_factor, top == first == 0)
                # From here on nobody needs d itself.
                rated = d * rate[here] if by_row and (need_x or need_bias or need_var) else d
                if need_x:
                    if isinstance(each_rate, Tensor):
                        of_x.addcmul_(rated, each_rate[at] if by_column else each_rate, value=-1)
                    else:
                        of_x.sub_(rated, alpha=each_rate)
                if need_bias:
                    d_bias[at] += rated.sum(0)
                if squares is not None and by_column:
                    squares[at] += (rated if need_var else d).mul_(d).sum(0)
                elif rated is not d and need_var:
                    squares += _sum(rated.mul_(d), None if host else (0, 1))
                elif squares is not None:
                    squares += _sum_squares(d, None if host else (0, 1), host)
                if of_rows is not None:
                    d = d.mul_(inverse[at].sqrt()) if by_column else d
                    of_rows[here] += _sum_squares(d, (1,), host)
            if need_x and x.dtype != acc:
                d_x[rows, at] = of_x

    sums: Any = None
    if want_terms:
        each = (level.to(exact) if isinstance(level, Tensor) else level) + (LOG_2PI if full else 0.0)
        constant = each.sum() if by_column else each * width
        if of_rows is not None:
            sums = of_rows * (1.0 if by_column else inverse) + constant
        else:
            squared = squares * inverse
            sums = (squared.sum() if by_column else squared) + count * constant
        sums = _tensor(sums * (0.5 * scale), acc)
    if need_h and isinstance(h_factor, Tensor):
        d_h *= h_factor
    if need_weight and isinstance(weight_factor, Tensor):
        d_weight *= weight_factor
    if need_bias:
        d_bias *= each_rate
    d_var = None
    if need_var:
        total = rate.sum() if by_row else count * rate
        d_var = 0.5 * (total * (1 if by_column else width) - squares * each_rate)
        d_var = _tensor(d_var, acc).reshape(var.shape)
    grads = d_h, d_x, d_weight, d_bias, d_var
    return sums, tuple([None if g is None else g.to(t.dtype) for g, t in zip(grads, (h, x, weight, bias, var), strict=True)])


def _product(total: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float) -> None:
    """total = beta * total + alpha * a b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta, alpha=alpha)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)


@contextlib.contextmanager
def _matmul_precision(precision: str | None, h: Tensor, weight: Tensor) -> Iterator[None]:
    """torch's setting for float32 products on a GPU; the products of "tf32x3" are nearer to float32's than to tf32's."""
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


def writes_ahead(keep: int, needs: Sequence[bool], *inputs: Any) -> bool:
    """Whether forward writes gradients: of float16 not before the upstream gradient is known, or they would underflow."""
    return keep == 0 and any(needs) and torch.float16 not in [t.dtype for t in inputs if isinstance(t, Tensor)]


def linear_nll_forward(h, x, weight, bias, var, full, keep, scale, precision, needs) -> tuple[Tensor, Grads | None]:
    acc = accumulate_dtype(h, x, weight, bias, var)
    scale = _number(scale)
    early = writes_ahead(keep, needs, h, x, weight, bias, var)
    with _matmul_precision(precision, h, weight):
        nll, grads = _linear_nll(h, x, weight, bias, var, full, keep, scale, scale if early else None, needs, True, acc)
    assert nll is not None
    return nll, grads if early else None


def linear_nll_backward(h, x, weight, bias, var, keep, scale, grad, precision, needs) -> Grads:
    acc = accumulate_dtype(h, x, weight, bias, var)
    up = _upstream(grad, scale, x.shape, keep, acc)
    with _matmul_precision(precision, h, weight):
        return _linear_nll(h, x, weight, bias, var, False, keep, 1.0, up, needs, False, acc)[1]


def linear_elbo_forward(
    x, mu, logvar, weight, bias, var, prior_mu, prior_logvar, eps, seed, samples, full, keep, nll_scale, kl_scale, beta, precision,
    needs, backend=None,
) -> tuple[Tensor, Tensor, Tensor, Grads | None]:  # fmt: skip
    """loss = nll + beta * kl, with z sampled and decoded on the way, both terms, and the loss's gradients where they are ready.

    By the passes of `backend`, which may be another module than this.
    """
    own = backend or sys.modules[__name__]
    of_prior, none = (prior_mu, prior_logvar, None, None), (False,) * 4
    z, kl, _ = own.latent_forward(mu, logvar, *of_prior, keep, kl_scale, eps, seed, samples, True, none)
    need_x, need_mu, need_logvar, *need_layer, _, _ = needs
    needs_nll = need_mu or need_logvar, need_x, *need_layer
    if not writes_ahead(keep, needs, x, mu, logvar, weight, bias, var, prior_mu, prior_logvar):
        needs_nll = (False,) * 5
    rows = z if samples is None else z.flatten(0, 1)
    nll, ready = own.linear_nll_forward(rows, x, weight, bias, var, full, keep, nll_scale, precision, needs_nll)
    if keep and samples is not None:
        nll = nll.view(samples, -1).sum(0)
    wide_beta = torch.as_tensor(beta, dtype=kl.dtype, device=kl.device)
    loss = nll + wide_beta * kl
    if ready is None:
        return loss, nll, kl, None
    d_z, d_x, *d_layer = ready
    d_z = None if d_z is None else d_z.view(z.shape)
    needs_latent = need_mu, need_logvar, *needs[6:]
    d_mu, d_logvar, *d_prior = own.latent_backward(
        mu, logvar, *of_prior, keep, kl_scale, eps, seed, samples, d_z, wide_beta, needs_latent
    )
    return loss, nll, kl, (d_x, d_mu, d_logvar, *d_layer, *d_prior)


def linear_elbo_backward(
    x, mu, logvar, weight, bias, var, prior_mu, prior_logvar, eps, seed, samples, keep, nll_scale, kl_scale, beta, grad, precision,
    needs, backend=None,
) -> Grads:  # fmt: skip
    own = backend or sys.modules[__name__]
    of_prior = prior_mu, prior_logvar, None, None
    need_x, need_mu, need_logvar, *need_layer, _, _ = needs
    needs_nll = need_mu or need_logvar, need_x, *need_layer
    d_z, d_x, *d_layer = (None,) * 5
    if any(needs_nll):
        z, _, _ = own.latent_forward(mu, logvar, *of_prior, keep, kl_scale, eps, seed, samples, False, (False,) * 4)
        rows = z if samples is None else z.flatten(0, 1)
        up = grad.repeat(samples) if keep and samples is not None else grad
        d_z, d_x, *d_layer = own.linear_nll_backward(rows, x, weight, bias, var, keep, nll_scale, up, precision, needs_nll)
        d_z = None if d_z is None else d_z.view(z.shape)
    d_latent: Grads = (None,) * 4
    needs_latent = need_mu, need_logvar, *needs[6:]
    if any(needs_latent):
        grad_kl = grad * (beta.to(grad.dtype) if isinstance(beta, Tensor) else beta)
        d_latent = own.latent_backward(mu, logvar, *of_prior, keep, kl_scale, eps, seed, samples, d_z, grad_kl, needs_latent)
    d_mu, d_logvar, *d_prior = d_latent
    return d_x, d_mu, d_logvar, *d_layer, *d_prior


def scale_gradients(grads: Grads | _Slopes, grad: Tensor | None) -> Grads:
    """Multiply gradients that nobody has seen yet by the upstream gradient of their result, in place."""
    if grad is None:
        return (None,) * len(grads.needs if isinstance(grads, _Slopes) else grads)
    if grad.ndim and not any(grad.stride()):
        grad = grad[(0,) * grad.ndim]  # one number for all rows, as sums and means send it
    if isinstance(grads, _Slopes):
        return grads.times(grad)
    # Reading a scalar is free on a CPU and would be a synchronisation anywhere else.
    if grad.ndim == 0 and grad.is_cpu and float(grad) == 1.0:
        return grads
    rows = grad
    for g in grads:
        if g is not None:
            if grad.ndim and rows.ndim != g.ndim:
                rows = grad.reshape(grad.shape + (1,) * (g.ndim - grad.ndim))
            g.mul_(rows)
    return grads
