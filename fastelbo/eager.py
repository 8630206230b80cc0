"""The plain-PyTorch backend: analytic gradients, in blocks that stay in cache.

On a CPU a large loss is bound by memory, and by the faulting in of fresh pages above all. So each pass walks its inputs in blocks
of `BLOCK` elements whose temporaries are reused from cache, and writes gradients straight into their final buffers. On other
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
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .noise import sample_noise
from .reference import LOG_2PI, accumulate_dtype

# A quarter of a million float32 elements: enough to amortise starting the threads, few enough for a handful of temporaries to
# stay in the outer caches (64 K to 512 K measured: smaller blocks lose to thread start-up, larger ones gain little).
BLOCK = 1 << 18

Factor = float | Tensor
Grads = tuple[Tensor | None, ...]


# ---- walking the inputs in blocks ------------------------------------------------------------------------------------------------


def _plan(shape: torch.Size, keep: int, tensors: Sequence[Tensor | None]) -> tuple[torch.Size, int, list[tuple[slice, ...]]]:
    """The shape to see the terms in, how many of its dimensions the sum keeps, and the blocks' indices into it.

    Dense tensors, with or without one value per row, are seen as (rows of the result, elements of a row), so that a block is any
    run of memory; anything strided or broadcast otherwise keeps its shape and is split along its first dimension.
    """
    count = math.prod(shape)
    rows = 1 if keep in (0, len(shape)) else math.prod(shape[:keep])
    per_row = torch.Size(tuple(shape[:keep]) + (1,) * (len(shape) - keep))
    if all(t is None or t.ndim == 0 or (t.shape in (shape, per_row) and t.is_contiguous()) for t in tensors):
        cols = count // rows
        tall, wide = max(1, BLOCK // cols), min(cols, BLOCK)
        index: list[tuple[slice, ...]] = [
            (slice(r, r + tall), slice(c, c + wide)) for r in range(0, rows, tall) for c in range(0, cols, wide)
        ]
        return torch.Size((rows, cols)), {0: 0, len(shape): 2}.get(keep, 1), index
    tall = max(1, BLOCK * shape[0] // count)
    return shape, keep, [(slice(r, r + tall),) for r in range(0, shape[0], tall)]


def _run(
    block: Callable[..., tuple[Tensor | None, list[Tensor | None]]],
    inputs: Sequence[Tensor | None],
    constants: Sequence[Tensor | None],
    needs: Sequence[bool],
    shape: torch.Size,
    keep: int,
    acc: torch.dtype,
    buffers: Sequence[Tensor | None],
) -> tuple[Tensor | None, Grads]:
    """Run `block(*inputs, *constants, outs)` over the blocks; put the sums of its terms and the gradients of its inputs together.

    A block returns its terms (or None) and, for each input that `needs` names, the gradient of the block's shape: written to the
    buffer in `outs` where there is one (`buffers` has the caller's own). An input that broadcasts has none; its shares are summed
    to its own shape here.
    """
    if torch.compiler.is_compiling() or inputs[0].numel() <= BLOCK or inputs[0].device.type != "cpu":
        terms, grads = block(*inputs, *constants, buffers)
        if terms is not None and keep < len(shape):
            terms = terms.sum(tuple(range(keep, len(shape)))) if keep else terms.sum()
        return terms, tuple([_like(g, t) if w else None for g, t, w in zip(grads, inputs, needs, strict=True)])

    view, kept, indices = _plan(shape, keep, (*inputs, *constants, *buffers))
    dims = tuple(range(kept, len(view)))
    dense = len(indices[0]) == 2

    def see(t: Tensor | None) -> Tensor | None:
        if t is None or t.ndim == 0:
            return t
        if dense:
            return t.view(1, 1) if t.numel() == 1 else t.view(view[0], -1)
        return t.expand(view)

    def cut(t: Tensor | None, index: tuple[slice, ...]) -> Tensor | None:
        if t is None or t.ndim == 0:
            return t
        return t[index[0]] if dense and t.shape[1] == 1 else t[index]

    seen = [see(t) for t in (*inputs, *constants)]
    full = [w and t.shape == shape for t, w in zip(inputs, needs, strict=True)]
    grads = [
        b if b is not None else torch.empty_like(t) if f else _zeros_to_sum(t, len(view), dense) if w else None
        for t, f, w, b in zip(inputs, full, needs, buffers, strict=True)
    ]
    outs = [see(g) if f else None for g, f in zip(grads, full, strict=True)]
    sums: list[Tensor] = []
    for index in indices:
        at = [cut(t, index) for t in seen]
        terms, shares = block(*at, [cut(o, index) for o in outs])
        if terms is not None:
            sums.append(terms.sum(dims) if dims else terms)
        for total, share, f, w in zip(grads, shares, full, needs, strict=True):
            if w and not f:
                here = total[index[0]] if total.ndim and total.shape[0] != 1 else total
                here += share.sum_to_size(here.shape)
    grads = [g if f else g.to(t.dtype).view(t.shape) if w else None for g, t, f, w in zip(grads, inputs, full, needs, strict=True)]
    return _join(sums, indices, view, kept, shape[:keep], acc) if sums else None, tuple(grads)


def _zeros_to_sum(t: Tensor, ndim: int, dense: bool) -> Tensor:
    """A float64 buffer for the gradient of an input that broadcasts, padded to the blocks' rank (0-d stays 0-d)."""
    padded = t.shape if not t.ndim else (t.numel(), 1) if dense else (1,) * (ndim - t.ndim) + tuple(t.shape)
    return torch.zeros(padded, dtype=torch.float64, device=t.device)


def _join(sums: list[Tensor], indices: list, view: torch.Size, kept: int, shape: torch.Size, acc: torch.dtype) -> Tensor:
    """Put the blocks' sums together, in float64 where blocks share an output: it costs nothing at this size."""
    if kept == 0:
        return torch.stack(sums).sum(dtype=torch.float64).to(acc).view(shape)
    if kept == len(view):
        out = torch.empty(view, dtype=acc, device=sums[0].device)
        for index, part in zip(indices, sums, strict=True):
            out[index] = part
    else:
        out = torch.zeros(view[:kept], dtype=torch.float64, device=sums[0].device)
        for index, part in zip(indices, sums, strict=True):
            out[index[:kept]] += part
    return out.to(acc).view(shape)


def _like(grad: Tensor, t: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its input."""
    if grad.shape != t.shape:
        grad = grad.sum_to_size(t.shape) if grad.numel() else torch.zeros_like(t)
    return grad if grad.dtype == t.dtype else grad.to(t.dtype)


_held = threading.local()


def _scratch(like: Tensor) -> Tensor | None:
    """A block's worth of memory that this thread keeps, shaped like a temporary; None where a fresh tensor is as good.

    Between two calls the allocator may return a temporary's pages, and faulting them in again takes longer than filling them.
    """
    n = like.numel()
    if not BLOCK // 2 <= n <= BLOCK or torch.compiler.is_compiling():
        return None
    if type(like) not in (Tensor, torch.nn.Parameter) or like.device.type != "cpu":
        return None
    held = getattr(_held, "by_dtype", None)
    if held is None:
        held = _held.by_dtype = {}
    buffer = held.get(like.dtype)
    if buffer is None or buffer.numel() < n:
        with torch.inference_mode(False):
            buffer = held[like.dtype] = torch.empty(BLOCK, dtype=like.dtype)
    return buffer[:n].view(like.shape)


def _factor(value: Factor, acc: torch.dtype) -> Tensor:
    """A factor as a 0-d tensor, which costs an operation half of what a Python number does; on the CPU it serves every device."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=acc)


def _mul(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """a * b, straight into its final buffer in one pass where the dtype allows. Without a buffer, a, a temporary, becomes it."""
    if out is None:
        return a.mul_(b)
    return torch.mul(a, b, out=out) if out.dtype == a.dtype else out.copy_(a.mul_(b))


def _upstream(grad: Tensor, scale: Factor, shape: torch.Size, keep: int, acc: torch.dtype) -> Tensor:
    """The upstream gradient times the scale, of a shape that broadcasts against the terms."""
    up = grad.to(acc)
    if isinstance(scale, Tensor) or scale != 1.0:
        up = up * scale
    return up.reshape(up.shape + (1,) * (len(shape) - keep)) if keep else up


def _weigh(values: Tensor | None, weight: Tensor, absent: Tensor) -> Tensor | None:
    if values is None:
        return None
    return (values if weight.dtype == torch.bool else values * weight.to(values.dtype)).masked_fill(absent, 0.0)


# ---- Gaussian negative log-likelihood --------------------------------------------------------------------------------------------


def _nll(recon, x, var, weight, kind, full, eps, keep, scale, up, needs, want_terms, acc) -> tuple[Tensor | None, Grads]:
    """One pass: the scaled sums of the terms, and `up` times the gradients, `up` being a factor or a tensor like the terms."""
    fixed = not isinstance(var, Tensor)
    factor, constant = 0.5, 0.5 * LOG_2PI if full else 0.0
    if fixed:
        factor, constant = 0.5 * _exp(-var), constant + 0.5 * var
    # terms = factor * (core + shift), and the factor is left to the sums. The shift is not: where the parts of the likelihood
    # cancel, sums without it would be far larger than the result, and so would their rounding errors. With weights, or a variance
    # so extreme that there is no such shift, terms are finished one by one.
    shift = constant / factor if 1e-30 < factor < 1e30 and weight is None else None
    need_recon, need_x, need_var = needs
    # Terms that are summed at once may lie in memory that the next block, or the next call, takes again.
    summed = keep < recon.ndim
    rate = half_up = None
    if need_recon or need_x:
        rate = (up if isinstance(up, Tensor) else _factor(up, acc)) if not fixed else _factor(up * (2 * factor), acc)
    half = None
    if need_var:
        half_up = _factor(up if kind == "std" else up * 0.5, acc)
        if kind == "logvar" and weight is None and not isinstance(up, Tensor):
            half = 0.5 * up  # (1 - square) * half in one operation

    def block(recon, x, var, weight, rate, half_up, outs):
        # The gradients' own buffers hold what leads to them: a page that is not touched is time that is not spent.
        of_recon = outs[0] if outs[0] is not None and outs[0].dtype == acc else None
        of_var = outs[2] if outs[2] is not None and outs[2].dtype == acc else None
        if recon.dtype != acc or x.dtype != acc:
            recon, x = recon.to(acc), x.to(acc)
        if fixed:
            ratio = torch.sub(recon, x, out=of_recon)
            core = torch.mul(ratio, ratio, out=_scratch(ratio) if summed else None) if want_terms else None
            level = None
        elif kind == "logvar":
            lv = var.to(acc)
            d = torch.sub(recon, x, out=of_var)
            precision = torch.neg(lv, out=_scratch(lv)).exp_()
            ratio = torch.mul(d, precision, out=of_recon)
            square = torch.mul(d, ratio, out=of_var)
            core, level = square, lv
        elif kind == "std":
            std = var.to(acc)
            r = (recon - x) / std
            ratio, square = r / std, r * r
            core, level = square, 2 * torch.log(std) if want_terms else None
        else:
            # Raised to eps, but a negative variance is an error, and NaN shows it where no check can.
            raw = var.to(acc)
            variance = torch.clamp(raw, min=eps).masked_fill(raw < 0, math.nan)
            d = recon - x
            ratio = d / variance
            square = d * ratio
            core, level = square, torch.log(variance) if want_terms else None
        if not want_terms:
            core = None
        elif shift is None:
            core = (core if level is None else core + level) * factor + constant
        elif level is not None and level.shape != core.shape:
            core = core + (level + shift)
        else:
            core = core if level is None else torch.add(core, level, out=_scratch(core) if summed else None)
            core = core.add_(shift) if shift else core
        g_recon = g_x = g_var = slope = None
        at_once = need_var and half is not None
        if need_var and not at_once:
            slope = square.neg_().add_(1.0)
            if kind != "logvar":
                slope /= std if kind == "std" else variance
        if weight is not None:
            absent = ~weight if weight.dtype == torch.bool else weight == 0
            core = None if core is None else _weigh(core, weight, absent)
            ratio, slope = _weigh(ratio, weight, absent), _weigh(slope, weight, absent)
        if at_once:
            g_var = torch.sub(half_up, square, alpha=half, out=square)
            g_var = g_var if outs[2] is None or g_var is outs[2] else outs[2].copy_(g_var)
        elif need_var:
            g_var = _mul(slope, half_up, outs[2])
        if need_x:
            # Not from recon's gradient, which may have been rounded to recon's dtype.
            g_x = ratio * -rate
            if outs[1] is not None:
                g_x = outs[1].copy_(g_x)
        if need_recon:
            g_recon = _mul(ratio, rate, outs[0])
        return core, [g_recon, g_x, g_var]

    inputs, constants = (recon, x, None if fixed else var), (weight, rate, half_up)
    core, grads = _run(block, inputs, constants, needs, recon.shape, keep, acc, (None,) * 3)
    return None if core is None else core * _factor(scale if shift is None else factor * scale, acc), grads


def _exp(value: float) -> float:
    """exp of a Python float that overflows to inf, as tensors do."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def nll_forward(recon, x, var, weight, kind, full, eps, keep, scale) -> Tensor:
    acc = accumulate_dtype(recon, x, var)
    return _nll(recon, x, var, weight, kind, full, eps, keep, scale, 1.0, (False,) * 3, True, acc)[0]


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


def expm1_and_rest(v: Tensor) -> tuple[Tensor, Tensor]:
    """e^v - 1, and e^v - 1 - v without the cancellation that makes a float32 KL negative near its prior.

    On a CPU in float64, where float32 inputs leave the cancellation below 3e-9 of the result but for the smallest v: it takes fewer
    operations than the series, and their number is what a small latent costs. Elsewhere float64 is slow or missing: a series, in
    v's dtype.
    """
    if v.dtype == torch.float32 and v.device.type == "cpu":
        wide = v.double()
        expm1, square = torch.expm1(wide), wide * wide
        rest = expm1 - wide
        if torch.compiler.is_compiling() or (v.numel() and float(square.min()) < 1e-14):
            rest = torch.where(square < 1e-14, 0.5 * square, rest)
        return expm1.float(), rest.float()
    expm1 = torch.expm1(v)
    *coefficients, last = _REST[v.dtype]
    series = torch.full_like(v, last)
    for c in reversed(coefficients):
        series = series * v + c
    return expm1, torch.where(v.abs() < 1, series * v * v, expm1 - v)


def _kl(mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, up, grad_z, grad_z_eps, needs, want_terms, acc, out=None):
    """One pass: the scaled sums of the KL terms, and the gradients of `up * KL` plus those that reach mu and logvar through z."""
    need_mu, need_logvar, need_prior_mu, need_prior_logvar = needs
    rate = half = None
    if up is not None and any(needs):
        rate, half = _factor(up, acc), _factor(0.5 * up, acc)

    def block(mu, logvar, prior_mu, prior_logvar, weight, rate, half, grad_z, grad_z_eps, outs):
        lv = wide = logvar.to(acc)
        if clamp is not None:
            lv = torch.clamp(wide, *clamp)
        core = g_mu = g_logvar = g_prior_mu = g_prior_logvar = None
        if rate is not None or want_terms:
            v = lv if prior_logvar is None else lv - prior_logvar.to(acc)
            d = mu.to(acc) if prior_mu is None else mu.to(acc) - prior_mu.to(acc)
            pull = d if prior_logvar is None else d * torch.exp(-prior_logvar.to(acc))
            expm1, rest = expm1_and_rest(v) if want_terms else (torch.expm1(v), None)
            if want_terms:
                core = torch.addcmul(rest, d, pull)
            curve = torch.addcmul(expm1, d, pull) if need_prior_logvar else None
            if weight is not None:
                absent = ~weight if weight.dtype == torch.bool else weight == 0
                core, pull, expm1, curve = (_weigh(t, weight, absent) for t in (core, pull, expm1, curve))
            if rate is not None:
                g_mu = pull * rate if need_mu or need_prior_mu else None
                g_logvar = expm1 * half if need_logvar else None
                g_prior_mu = -g_mu if need_prior_mu else None
                g_prior_logvar = -curve * half if need_prior_logvar else None
        if grad_z is not None:
            if need_mu:
                g_mu = grad_z if g_mu is None else g_mu + grad_z
            if need_logvar:
                through = torch.mul(lv, 0.5).exp_().mul_(grad_z_eps).mul_(0.5)
                g_logvar = through if g_logvar is None else through.add_(g_logvar)
        if clamp is not None and g_logvar is not None:
            g_logvar = g_logvar.masked_fill((wide < clamp[0]) | (wide > clamp[1]), 0.0)
        grads = [g_mu, g_logvar, g_prior_mu, g_prior_logvar]
        return core, [g if g is None or out is None else out.copy_(g) for g, out in zip(grads, outs, strict=True)]

    inputs, constants = (mu, logvar, prior_mu, prior_logvar), (weight, rate, half, grad_z, grad_z_eps)
    buffers = (None,) * 4 if out is None else (*out, None, None)
    core, grads = _run(block, inputs, constants, needs, mu.shape, keep, acc, buffers)
    return None if core is None else core * _factor(0.5 * scale, acc), grads


def latent_forward(
    mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, want_kl
) -> tuple[Tensor | None, Tensor | None]:
    """z (None without eps and seed) in mu's dtype, of shape (samples, *mu.shape) if samples is given; and the KL if wanted."""
    z = kl = None
    acc = accumulate_dtype(mu, logvar, prior_mu, prior_logvar)
    if want_kl:
        kl = _kl(mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, None, None, None, (False,) * 4, True, acc)[0]
    if eps is not None or seed is not None:
        wide = logvar.to(acc) if clamp is None else torch.clamp(logvar.to(acc), *clamp)
        std = torch.mul(wide, 0.5).exp_()
        normals = sample_noise(mu, seed, samples, acc) if eps is None else eps.to(acc)
        # In the one-sample case sigma's buffer becomes z: no other page is touched.
        z = (std.mul_(normals) if samples is None else std * normals).add_(mu).to(mu.dtype)
    return z, kl


def latent_backward(
    mu, logvar, prior_mu, prior_logvar, weight, clamp, keep, scale, eps, seed, samples, grad_z, grad_kl, needs, out=None
) -> Grads:
    """Gradients of mu, logvar and the prior. `out` holds buffers for those of mu and logvar, of any strides."""
    acc = accumulate_dtype(mu, logvar, prior_mu, prior_logvar)
    up = None if grad_kl is None else _upstream(grad_kl, scale, mu.shape, keep, acc)
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
) -> tuple[Tensor, Tensor, Tensor, Grads]:
    """loss = nll + beta * kl, both terms (scaled totals), and the loss's gradients, written in the pass that reads the inputs."""
    acc = accumulate_dtype(recon, x, var, mu, logvar, prior_mu, prior_logvar)
    nll, of_nll = _nll(recon, x, var, weight, "logvar", full, 0.0, 0, nll_scale, nll_scale, needs[:3], True, acc)
    prior = prior_mu, prior_logvar
    kl, of_kl = _kl(mu, logvar, *prior, None, clamp, 0, kl_scale, kl_scale * beta, None, None, needs[3:], True, acc)
    loss = nll + beta.to(acc) * kl if isinstance(beta, Tensor) else torch.add(nll, kl, alpha=beta)
    return loss, nll, kl, (*of_nll, *of_kl)


def elbo_terms_forward(
    recon, x, var, mu, logvar, prior_mu, prior_logvar, weight, full, clamp, keep, nll_scale, kl_scale
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(recon, x, var, mu, logvar, prior_mu, prior_logvar)
    nll, _ = _nll(recon, x, var, weight, "logvar", full, 0.0, keep, nll_scale, 1.0, (False,) * 3, True, acc)
    prior = prior_mu, prior_logvar
    kl, _ = _kl(mu, logvar, *prior, None, clamp, keep, kl_scale, None, None, None, (False,) * 4, True, acc)
    return nll, kl


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


def scale_gradients(grads: Grads, grad: Tensor) -> None:
    """Multiply gradients that nobody has seen yet by the upstream scalar, in place."""
    # Reading the scalar is free on a CPU and would be a synchronisation anywhere else.
    if grad.device.type == "cpu" and float(grad) == 1.0:
        return
    for g in grads:
        if g is not None:
            g.mul_(grad)
