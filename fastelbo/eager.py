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

A forward pass may return these gradients with its results, for an upstream gradient of 1 of each result; `scale_gradients` finishes
them. None stands for a forward pass that leaves them to the backward pass.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
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


def _run(
    block: Callable[..., tuple[Sums | None, list[Tensor | None]]],
    inputs: Sequence[Tensor | None],
    constants: Sequence[Tensor | None],
    needs: Sequence[bool],
    shape: torch.Size,
    keep: int,
    size: int,
    buffers: Sequence[Tensor | None],
) -> tuple[Sums | None, Grads]:
    """Run `block(*inputs, *constants, outs, dims)` over blocks of `size` elements, and put the results together.

    A block returns its terms summed over `dims` (or None) and, for each input that `needs` names, the gradient of the block's
    shape: written to the buffer in `outs` where there is one (`buffers` has the caller's own). An input that broadcasts has none;
    its shares are summed to its own shape here.
    """
    if inputs[0].numel() <= size or not inputs[0].is_cpu or torch.compiler.is_compiling():
        total, shares = block(*inputs, *constants, buffers, tuple(range(keep, len(shape))))
        return total, tuple([_like(g, t) if w else None for g, t, w in zip(shares, inputs, needs, strict=True)])

    blocks = _Blocks(shape, keep, size, (*inputs, *constants, *buffers))
    full = [w and t.shape == shape for t, w in zip(inputs, needs, strict=True)]
    grads = [
        b if b is not None else torch.empty_like(t) if f else _zeros_to_sum(t, blocks) if w else None
        for t, f, w, b in zip(inputs, full, needs, buffers, strict=True)
    ]
    seen = [blocks.cut(blocks.see(t)) for t in (*inputs, *constants)]
    outs = [blocks.cut(blocks.see(g) if f else None) for g, f in zip(grads, full, strict=True)]
    shared = {i: blocks.cut(g) for i, (g, f, w) in enumerate(zip(grads, full, needs, strict=True)) if w and not f}
    sums: list[Any] = []
    for at, (args, out) in enumerate(zip(zip(*seen, strict=True), zip(*outs, strict=True), strict=True)):
        part, shares = block(*args, out, blocks.dims)
        sums.append(part)
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


def _sum(terms: Tensor, dims: tuple[int, ...]) -> Sums:
    """The sum over the last dimensions `dims`. A total is a number where reading it is free: operations on 0-d tensors are not."""
    if not dims:
        return terms
    if len(dims) < terms.ndim or not _readable(terms):
        return terms.sum(dims)
    return float(terms.sum())


def _sum_squares(t: Tensor, dims: tuple[int, ...]) -> Sums:
    """As `_sum`, of t^2, reading t once and writing nothing where t is dense."""
    if not dims or not t.is_contiguous() or not _readable(t):
        return _sum(t * t, dims)
    if len(dims) == t.ndim:
        if t.numel() <= 16 * RUN:
            norm = float(torch.linalg.vector_norm(t))
            return norm * norm
        flat, over = t.view(-1), t.numel() % RUN
        norms = torch.linalg.vector_norm((flat[:-over] if over else flat).view(-1, RUN), dim=1).double()
        return float(torch.dot(norms, norms)) + (_sum_squares(flat[-over:], (0,)) if over else 0.0)
    rows = t.flatten(dims[0])
    whole = rows.shape[-1] // RUN * RUN
    norms = torch.linalg.vector_norm(rows[..., :whole].unflatten(-1, (-1, RUN)), dim=-1).double()
    rest = rows[..., whole:].double()
    return (norms * norms).sum(-1) + (rest * rest).sum(-1)


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
    if not BLOCK // 16 <= size <= BLOCK or not _readable(like):
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


def _mul(a: Tensor, b: Factor, out: Tensor | None) -> Tensor:
    """a * b, straight into its final buffer in one pass where the dtype allows. Without a buffer, a, a temporary, becomes it."""
    if out is None or out is a:
        return a if isinstance(b, float) and b == 1.0 else a.mul_(_factor(b, a))
    b = _factor(b, a)
    return torch.mul(a, b, out=out) if out.dtype == a.dtype else out.copy_(a.mul_(b))


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


def _factor(value: Factor, like: Tensor) -> Factor:
    """A factor for `like` as a kept 0-d tensor, which costs an operation less than a Python number does."""
    return _constant(value, like.dtype) if isinstance(value, float) and _readable(like) else value


def _scaled(sums: Sums, factor: Factor) -> Sums:
    return sums * (_factor(factor, sums) if isinstance(sums, Tensor) else factor)


def _number(value: Factor) -> Factor:
    """A factor as a number, where reading it is free."""
    return float(value) if isinstance(value, Tensor) and _readable(value) else value


def _wide_weight(weight: Tensor | None, acc: torch.dtype) -> Tensor | None:
    """A bool or half-precision weight as numbers of the terms' dtype: multiplying by it would convert what it broadcasts to."""
    return weight if weight is None or weight.dtype.itemsize >= 4 else weight.to(acc)


def _weigh(t: Tensor, weight: Tensor | None, fill: bool) -> Tensor:
    """A temporary times the weights, in place. With `fill`, NaN under a weight of 0 vanishes, which takes much longer."""
    if weight is None:
        return t
    t.mul_(weight)
    return t.masked_fill_(weight == 0, 0.0) if fill else t


def _weighed_sum(terms: Tensor, weight: Tensor | None, dims: tuple[int, ...]) -> tuple[Sums, bool]:
    """The sum of weighed terms, and whether what lies under a weight of 0 must be filled: a sum that is finite has seen no NaN."""
    sums = _sum(_weigh(terms, weight, fill=not dims), dims)
    if weight is None or not dims:
        return sums, weight is not None
    if math.isfinite(sums) if isinstance(sums, float) else _readable(sums) and bool(sums.isfinite().all()):
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
    if not any(needs) or keep == len(shape):
        return False
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    return _readable(wanted[0]) and all(t.dtype == acc and (keep == 0 or t.shape == shape) for t in wanted)


# ---- Gaussian negative log-likelihood --------------------------------------------------------------------------------------------


def _nll(recon, x, var, weight, kind, full, eps, keep, scale, up, needs, want_terms, acc) -> tuple[Sums | None, Grads]:
    """One pass: the scaled sums of the terms, and `up` times the gradients, `up` being a factor or a tensor like the terms."""
    learned = var if isinstance(var, Tensor) else None
    if learned is not None and learned.numel() == 1 and kind == "logvar" and weight is None and _readable(learned):
        var = float(learned) if 1e-30 < 0.5 * _exp(-float(learned)) < 1e30 else learned
    fixed = not isinstance(var, Tensor)
    factor, constant = 0.5, 0.5 * LOG_2PI if full else 0.0
    if fixed:
        factor, constant = 0.5 * _exp(-var), constant + 0.5 * var
    # terms = factor * (core + shift), and the factor is left to the sums. With weights, or a variance so extreme that there is no
    # such shift, terms are finished one by one.
    shift = constant / factor if 1e-30 < factor < 1e30 and weight is None else None
    need_recon, need_x, need_var = needs

    def block(recon, x, var, weight, factors, outs, dims):
        # The gradients' own buffers hold what leads to them: a page that is not touched is time that is not spent.
        of_recon, of_var = _usable(outs[0], acc), _usable(outs[2], acc)
        recon, x = _as(recon, acc), _as(x, acc)
        rate = up if factors is None else factors
        sums = g_recon = g_x = g_var = None
        # Where nothing shows that there is no NaN under a weight of 0, there may be one.
        fill = True

        # The residual d, and ratio = d / variance.
        if fixed:
            d = ratio = torch.sub(recon, x, out=of_recon if need_recon else _scratch(recon, acc, 1))
        else:
            d = torch.sub(recon, x, out=of_var if need_var else _scratch(recon, acc, 0))
            if kind == "logvar":
                level = _as(var, acc)
                if level.shape == d.shape:
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

        # Terms that are summed at once may lie in memory that the next block, or the next call, takes again.
        where = _scratch(d, acc, 0) if dims else None
        count = math.prod([d.shape[i] for i in dims])
        if fixed and shift is not None:
            # Squares are summed apart from what they are added to, which is a matter of numbers: unless the two cancel.
            squares = _sum_squares(d, dims) if want_terms or need_var else None
            if want_terms:
                sums = squares + shift * count
                if shift < 0.0 and not _holds(sums, squares, count):
                    sums = _sum(torch.mul(d, d, out=where).add_(shift), dims)
            if need_var:
                slope = count - 2 * factor * squares
                if not _holds(slope, 2 * factor * squares, count):
                    slope = _sum(torch.mul(d, d, out=where).mul_(-2 * factor).add_(1.0), dims)
                # An upstream gradient is the same all along `dims`.
                each: Any = rate
                for _ in dims if isinstance(rate, Tensor) and rate.ndim else ():
                    each = each.select(-1, 0)
                g_var = _tensor(slope * (0.5 * each), torch.float64)
        elif want_terms:
            if fixed:
                core = torch.mul(d, d, out=where)
            elif shift and level.shape != d.shape:
                core = torch.addcmul(level + shift, d, ratio, out=where)
            else:
                core = torch.addcmul(level, d, ratio, out=where)
            if shift is None:
                core.mul_(factor).add_(constant)
            elif shift and level.shape == d.shape:
                core.add_(shift)
            sums, fill = _weighed_sum(core, weight, dims)

        if need_var and not fixed:
            if kind == "logvar" and weight is None and factors is None:
                half = d.new_full((), 0.5 * rate)
                g_var = torch.addcmul(half, d, ratio, value=-0.5 * rate, out=d)
                g_var = g_var if outs[2] is None or g_var is outs[2] else outs[2].copy_(g_var)
            else:
                slope = d.mul_(ratio).neg_().add_(1.0)
                if kind != "logvar":
                    slope /= std if kind == "std" else variance
                    fill = True  # of a variance that is next to 0 the terms may be finite
                g_var = _mul(_weigh(slope, weight, fill), rate if kind == "std" else rate * 0.5, outs[2])
        if need_recon or need_x:
            ratio = _weigh(ratio, weight, fill)
            rate = rate * (2 * factor) if fixed else rate
        if need_x:
            # Not from recon's gradient, which may have been rounded to recon's dtype.
            g_x = ratio * -rate
            if outs[1] is not None:
                g_x = outs[1].copy_(g_x)
        if need_recon:
            g_recon = _mul(ratio, rate, outs[0])
        return sums, [g_recon, g_x, g_var]

    inputs = recon, x, None if learned is None else learned.reshape(()) if fixed else var
    constants = _wide_weight(weight, acc), up if isinstance(up, Tensor) else None
    # Squares under a gradient need no temporary, and so little is done with each block that fewer are better.
    size = BLOCK // acc.itemsize * (8 if fixed and shift is not None and need_recon else 1)
    sums, grads = _run(block, inputs, constants, needs, recon.shape, keep, size, (None,) * 3)
    if need_var and learned is not None:
        grads = (*grads[:2], grads[2].reshape(learned.shape))
    return None if sums is None else _scaled(sums, scale if shift is None else factor * scale), grads


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

# (e^v - 1 - v) / v^2 on [-1, 1] as a polynomial in v, constant first: near-minimax (Chebyshev), exact to float32 or float64.
# fmt: off
_REST = {
    torch.float32: (
        0.499999998, 0.166666666, 0.0416667366, 0.00833333968, 0.00138853969,
        0.00019838102, 2.53585122e-5, 2.80628026e-6,
    ),
    torch.float64: (
        0.5, 0.16666666666666667, 0.041666666666666667, 0.0083333333333332362, 0.0013888888888888835,
        0.00019841269841374739, 2.4801587301645516e-5, 2.7557319174051554e-6, 2.7557319196273279e-7, 2.505212058452295e-8,
        2.0876763758519632e-9, 1.6057448519013339e-10, 1.1469860083749004e-11, 7.7532899090613013e-13, 4.8383974908301086e-14,
    ),
}

# fmt: on


def exact_parts(logvar: Tensor, prior_logvar: Tensor | None) -> tuple[Tensor, Tensor]:
    """e^v - 1 and e^v - 1 - v for v = logvar - prior_logvar, without what float32 loses near the prior and far from it.

    On a CPU in float64 for float32, where the cancellation near the prior stays below 2e-8 of the result but for the smallest v: it
    takes fewer operations than a series. Elsewhere float64 is slow or missing: a series, in logvar's dtype.
    """
    if logvar.dtype == torch.float32 and _readable(logvar):
        v = _scratch(logvar, torch.float64, 4)
        v = logvar.double() if v is None else v.copy_(logvar)
        if prior_logvar is not None:
            v.sub_(prior_logvar)
        expm1 = torch.expm1(v, out=_scratch(logvar, torch.float64, 5))
        rest = torch.sub(expm1, v, out=v)
        if v.numel() and float(rest.min()) < 1e-16:
            v = logvar.double() if prior_logvar is None else logvar.double().sub_(prior_logvar)
            rest = torch.where(rest < 1e-16, v.mul_(v).mul_(0.5), rest)
        return expm1, rest
    v = logvar if prior_logvar is None else logvar - prior_logvar
    *coefficients, last = _REST[v.dtype]
    series = torch.full_like(v, last)
    for c in reversed(coefficients):
        series = series * v + c
    expm1 = torch.expm1(v)
    rest = torch.where(v.abs() < 1, series * v * v, expm1 - v)
    if prior_logvar is not None:
        # Far from the prior the rounding of v moves e^v by many times its own: `low` is what v lost (Knuth's two-sum).
        back = v - logvar
        low = (logvar - (v - back)) - (prior_logvar + back)
        more = (expm1 + 1.0) * low
        finite = more.abs() < math.inf
        expm1, rest = torch.where(finite, expm1 + more, expm1), torch.where(finite, rest + expm1 * low, rest)
    return expm1, rest


def _is_exact(rest: Any, total: Any, count: int) -> bool:
    """Whether sums of `count` terms e^v - 1 - v, computed in float32, are exact enough for the totals that they are a part of.

    With eps = 2^-24 a term is off by eps |v|. The sum of |v| is at most sqrt(2 count rest), as rest is about v^2 / 2 where that
    matters, and a little more for what is wrong with `rest` itself. Asked for is an error of 2 eps of the total.
    """
    floor = 2**-23 * count
    if isinstance(total, float):
        return floor + math.sqrt(2 * count * max(rest, 0.0)) <= 2 * total
    # One number for each row: numpy's operations on a few cost less than torch's.
    return bool((0.5 * floor + math.sqrt(0.5 * count) * np.sqrt(np.maximum(rest.numpy(), 0.0)) <= total.numpy()).all())


def _is_near(v: Tensor) -> bool:
    """Whether float32 holds v = logvar - prior_logvar well enough: rounding it moves e^v by up to |v| / 2 ulp."""
    if not v.numel():
        return True
    low, high = torch.aminmax(v)
    return float(low) >= -4.0 and float(high) <= 4.0


def _kl(mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, up, grad_z, grad_z_eps, needs, want_terms, acc, out=None):
    """One pass: the scaled sums of the KL terms, and the gradients of `up * KL` plus those that reach mu and logvar through z."""
    need_mu, need_logvar, need_prior_mu, need_prior_logvar = needs
    want_slopes = up is not None and any(needs)
    plain = weight is None or weight.dtype == torch.bool

    def block(mu, logvar, prior_mu, prior_logvar, weight, factors, grad_z, grad_z_eps, outs, dims):
        of_mu, of_logvar, of_prior_mu, of_prior_logvar = (_usable(o, acc) for o in outs)
        lv = wide = _as(logvar, acc)
        if clamp is not None:
            lv = torch.clamp(wide, *clamp)
        prior_logvar = None if prior_logvar is None else _as(prior_logvar, acc)
        rate = up if factors is None else factors
        sums = g_mu = g_logvar = g_prior_mu = g_prior_logvar = None
        fill = True
        rest: Any = None
        if want_slopes or want_terms:
            spare = _scratch(lv, acc, 0) if dims else None
            v = lv if prior_logvar is None else torch.sub(lv, prior_logvar, out=_scratch(lv, acc, 1))
            of_expm1 = of_logvar if want_slopes and need_logvar else None if want_slopes else _scratch(lv, acc, 2)
            d = pull = _as(mu, acc)
            if prior_mu is not None:
                of_d = of_prior_mu if want_slopes and need_prior_mu else _scratch(lv, acc, 3)
                d = pull = torch.sub(d, _as(prior_mu, acc), out=of_d)
            if prior_logvar is not None:
                of_pull = of_mu if want_slopes and need_mu else None
                pull = torch.exp(prior_logvar, out=of_pull)
                pull = torch.div(d, pull, out=pull)
            on_host = acc == torch.float32 and _readable(lv)
            near = on_host and (prior_logvar is None or _is_near(v))
            if on_host and not near and weight is not None:
                near = _is_near(v.masked_fill(weight == 0, 0.0))  # what is absent decides nothing
            count = math.prod([lv.shape[i] for i in dims])
            # Sums in float32 are good unless the posterior lies too near its prior, which they show themselves. Of many short rows
            # one always does.
            fast = near and plain and count >= RUN
            if near and (fast or not want_terms):
                expm1 = torch.expm1(v, out=of_expm1)
            else:
                exact, rest = exact_parts(lv, prior_logvar)
                expm1 = _as(exact, acc) if of_expm1 is None else of_expm1.copy_(exact)
            if want_terms and not fast:
                core = torch.addcmul(rest, d, pull) if rest.dtype == acc else rest.add_(d * pull)
                sums, fill = _weighed_sum(core, weight, dims)
                sums = sums if dims else core.to(acc)
            elif want_terms:
                # No part is negative: summed apart, they lose nothing.
                if pull is d and weight is None:
                    quad, fill = _sum_squares(d, dims), False
                else:
                    quad, fill = _weighed_sum(torch.mul(d, pull, out=spare), weight, dims)
                rest, filled = _weighed_sum(torch.sub(expm1, v, out=spare), weight, dims)
                if not _is_exact(rest, rest + quad, count):
                    rest = exact_parts(lv, prior_logvar)[1]
                    rest, filled = _weighed_sum(rest, weight, dims)
                fill = fill or filled
                sums = rest + quad
            if want_slopes:
                if need_prior_logvar:
                    curve = torch.addcmul(expm1, d, pull, out=of_prior_logvar)
                    g_prior_logvar = _mul(_weigh(curve, weight, fill), -0.5 * rate, None)
                if need_mu or need_prior_mu:
                    # Divided by a prior's variance it lies in memory of its own, otherwise in an input or in scratch.
                    g_mu = _mul(pull, rate, None) if pull is not d else torch.mul(pull, _factor(rate, pull), out=of_mu)
                    g_mu = _weigh(g_mu, weight, fill)
                    g_prior_mu = torch.neg(g_mu, out=of_prior_mu) if need_prior_mu else None
                if need_logvar:
                    g_logvar = _mul(_weigh(expm1, weight, fill), 0.5 * rate, None)
        if grad_z is not None:
            if need_mu:
                g_mu = grad_z if g_mu is None else g_mu + grad_z
            if need_logvar:
                through = torch.mul(lv, 0.5).exp_().mul_(grad_z_eps).mul_(0.5)
                g_logvar = through if g_logvar is None else through.add_(g_logvar)
        if clamp is not None and g_logvar is not None:
            g_logvar = g_logvar.masked_fill((wide < clamp[0]) | (wide > clamp[1]), 0.0)
        grads = [g_mu, g_logvar, g_prior_mu, g_prior_logvar]
        return sums, [g if g is None or o is None or g is o else o.copy_(g) for g, o in zip(grads, outs, strict=True)]

    inputs = mu, logvar, prior_mu, prior_logvar
    constants = _wide_weight(weight, acc), up if isinstance(up, Tensor) else None, grad_z, grad_z_eps
    buffers = (None,) * 4 if out is None else (*out, None, None)
    sums, grads = _run(block, inputs, constants, needs, mu.shape, keep, BLOCK // 8, buffers)
    return None if sums is None else _scaled(sums, 0.5 * scale), grads


def latent_forward(
    mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, want_kl, needs
) -> tuple[Tensor | None, Tensor | None, Grads | None]:
    """z (None without eps and seed) in mu's dtype, of shape (samples, *mu.shape) if samples is given; and the KL if wanted."""
    z = kl = ready = None
    acc = accumulate_dtype(mu, logvar, prior_mu, prior_logvar)
    sampled = eps is not None or seed is not None
    if want_kl:
        prior, scale = (prior_mu, prior_logvar), _number(scale)
        early = not sampled and _early((mu, logvar, *prior), needs, mu.shape, keep, acc)
        up, wanted = (scale, needs) if early else (None, (False,) * 4)
        sums, grads = _kl(mu, logvar, *prior, weight, clamp, keep, scale, up, None, None, wanted, True, acc)
        kl, ready = _tensor(sums, acc), grads if early else None
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


def scale_gradients(grads: Grads, grad: Tensor | None) -> Grads:
    """Multiply gradients that nobody has seen yet by the upstream gradient of their result, in place."""
    if grad is None:
        return (None,) * len(grads)
    if grad.ndim and not any(grad.stride()):
        grad = grad[(0,) * grad.ndim]  # one number for all rows, as sums and means send it
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
