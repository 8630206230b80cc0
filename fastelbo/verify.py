"""`fastelbo.verify`: inside it, fused calls of a user's own program are also run through the oracle, forward and backward.

Every fused call asks `backend.choose` for its backend once and keeps the answer for its backward. So inside the context `choose`
answers with an object that has the backend's functions, runs them, and compares what they returned with the equations of
`fastelbo.reference` in float64, on the same inputs, noise and upstream gradients. No other module knows of it.

**Tolerance.** An element of a result may differ from the oracle's by the sum of

    rtol * size       the arithmetic. The *size* of an element is the sum of the magnitudes of the terms that are added to give it,
                      in nats for a loss. Where they have one sign that is the element itself. Where they cancel, the element says
                      nothing about the error: the slope of a log-variance, (1 - d^2 / s^2) / 2, is 0 wherever the variance fits.
    eps * |value|     the rounding to the result's dtype: one unit in the last place, since Triton's interpreter cuts bfloat16 off
                      where a GPU rounds. Two for gradients that the forward pass writes, as that of `elbo_loss` does: they are
                      rounded there, and again when they are multiplied by the upstream gradient.
    a floor           what underflows on its way: the smallest normal number for each term, and the dtype's smallest step.

rtol is 2e-5 by default, and 1e-11 for float64 results (2e-5 where they hold noise from a seed, which is float32 everywhere). That
is over a hundred roundings of the arithmetic: right results stay far below it, in sums of millions of terms and where a float32
difference of log-variances is exponentiated. A gradient that is wrong by a part in a thousand is fifty times above it, though it be
a single element among larger ones.

Where the truth overflows the result's dtype, inf must come out, with its sign. An inf or NaN where the truth is finite is a
mismatch, and so is a finite number where the truth is NaN. (But not inf there: at a standard deviation of 0 the slope is -inf, of
which autograd makes inf - inf.) Gradients are not compared where the upstream gradient is not finite.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, eager, reference
from .noise import sample_noise
from .reference import accumulate_dtype

__all__ = ["NumericsMismatch", "verify"]


class NumericsMismatch(AssertionError):
    """A fused result differs from the float64 oracle by more than `fastelbo.verify` allows.

    Not a RuntimeError: training loops catch those to survive running out of memory.
    """


# ---- the context -----------------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_active: list[verify] = []


class verify:
    """Check fused calls against the float64 oracle, forward and backward: for the first day in a training loop.

        with fastelbo.verify(every=100) as report:
            train()
        print(report.calls, report.checked, report.backwards, report.mismatches)

    A call is one that reaches a backend, in eager mode and on whichever thread: the context is the whole process's. The backward of
    a checked call is checked too, even after the context was left. Contexts nest, and each counts for itself.

    Not checked: what torch.compile traces or a CUDA graph captures, calls with impl="reference", and backwards with
    `create_graph=True`, which differentiate the reference anyway. Results are not touched: they have the same bits with and
    without the context. A checked call reads values back to the host and takes several float64 copies of its inputs. One whose
    forward pass writes the gradients, as that of `elbo_loss` does, keeps a copy until its first backward hands them over: that is
    where they are compared, multiplied by the upstream gradient, as the caller gets them.

    Args:
        every: N >= 1. Of each N consecutive calls one is checked: of the first N the first, of the next the second, and so on. (A
            fixed step of 100 would only ever meet one of the two calls that a training step makes.)
        rtol: Tolerance relative to the size of a result, at least 0; None is 2e-5, and 1e-11 for float64. One rounding to the
            result's dtype is allowed on top. The head of fastelbo/verify.py has the whole rule.
        on_mismatch: "raise" raises NumericsMismatch, out of the call or out of its backward; "warn" issues a RuntimeWarning for
            each result that differs.

    Attributes:
        calls: Fused calls inside the context.
        checked: Those whose values were compared.
        backwards: Backward passes whose gradients were compared.
        mismatches: Results, of either, that differ.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value.
    """

    def __init__(self, *, every: int = 1, rtol: float | None = None, on_mismatch: str = "raise") -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if rtol is not None:
            if isinstance(rtol, bool) or not isinstance(rtol, (int, float)):
                raise TypeError(f"rtol must be a number or None, got {type(rtol).__name__}")
            if not 0 <= rtol < math.inf:
                raise ValueError(f"rtol must be finite and not negative, got {rtol}")
        if on_mismatch not in ("raise", "warn"):
            raise ValueError(f"on_mismatch must be 'raise' or 'warn', got {on_mismatch!r}")
        self.every, self.rtol, self.on_mismatch = every, rtol, on_mismatch
        self.calls = self.checked = self.backwards = self.mismatches = 0

    def __enter__(self) -> verify:
        with _lock:
            _active.append(self)
            backend.watcher = _watch
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # Not whichever is last: contexts of several threads need not be left in the order of their entry.
        with _lock:
            _active.remove(self)
            backend.watcher = _watch if _active else None

    def _is_due(self) -> bool:
        with _lock:
            block, place = divmod(self.calls, self.every)
            self.calls += 1
        return block % self.every == place

    def _count(self, what: str) -> None:
        with _lock:
            setattr(self, what, getattr(self, what) + 1)

    def _report(self, message: str) -> None:
        self._count("mismatches")
        if self.on_mismatch == "raise":
            raise NumericsMismatch(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _watch(chosen: ModuleType) -> Any:
    """What `backend.choose` returns for a fused call inside a context."""
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return chosen
    served: Any = chosen
    for context in tuple(_active):
        if context._is_due():
            served = _Checked(served, context, _caller())
    return served


def _caller() -> str:
    """The public function that asked for a backend: the outermost of the frames that are this package's own."""
    frame: FrameType | None = sys._getframe(3)  # past this function, _watch and choose
    name = ""
    while frame is not None and frame.f_globals.get("__name__", "").startswith("fastelbo."):
        owner = frame.f_locals.get("self")
        name = frame.f_code.co_name if owner is None else f"{type(owner).__name__}.{frame.f_code.co_name}"
        frame = frame.f_back
    return name


# ---- the oracle: float64 truth, and the sizes that errors are measured by --------------------------------------------------------


@contextmanager
def _oracle() -> Iterator[None]:
    """Autograd is on, whatever the caller's mode, and keeps what it saves from the caller's hooks on saved tensors.

    torch.utils.checkpoint counts what its hooks see, and would not find the oracle's again when it recomputes.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield


def _wide(value: Any) -> Any:
    """A tensor as a float64 copy of its own, without history; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return (value.cpu() if value.device.type == "mps" else value).to(torch.float64, copy=True)  # MPS has no float64


def _noise(mu: Tensor, eps: Tensor | None, seed: Any, samples: int | None) -> Any:
    return _wide(sample_noise(mu, seed, samples) if eps is None else eps)


def _edges(clamp: tuple[float, float] | None, acc: torch.dtype) -> Any:
    """The clamp as the backends hold it: a float32 logvar that was clamped to the same edge before lies on it, not outside."""
    return None if clamp is None else torch.tensor(clamp, dtype=acc).tolist()


class _Terms(NamedTuple):
    """A sum of terms, and the parts that are added up to it: elementwise, under the magnitudes of the weights."""

    total: Tensor
    parts: list[Tensor]


def _nll(inputs: Sequence[Any], weight: Tensor | None, kind: str, full: bool, eps: float, keep: int) -> _Terms:
    recon, x, var = inputs
    if kind == "var" and isinstance(var, Tensor):
        # The reference raises it to eps; to the backends it is an error, which torch's contract has on the CPU alone.
        var = var + torch.where(var.detach() < 0, math.nan, 0.0)
    total = reference.nll(recon, x, var, weight, kind, full, eps, keep)
    weight = None if weight is None else weight.abs()
    # Without residual and constant only the logarithm is left: together the two are as large as what may cancel in the first.
    pairs = (x, full), (recon, False)
    return _Terms(total, [reference.nll(recon, mean, var, weight, kind, with_it, eps, recon.ndim) for mean, with_it in pairs])


def _kl(inputs: Sequence[Any], weight: Tensor | None, clamp: Any, keep: int) -> _Terms:
    mu, logvar, prior_mu, prior_logvar = inputs
    total = reference.kl(mu, logvar, prior_mu, prior_logvar, weight, clamp, keep)
    weight = None if weight is None else weight.abs()
    centre = torch.zeros_like(mu) if prior_mu is None else prior_mu
    parts = [reference.kl(mean, logvar, prior_mu, prior_logvar, weight, clamp, mu.ndim) for mean in (mu, centre)]
    # What the oracle itself loses of expm1(v) - v near 0: a rounding of v, which is 1e-11 of this.
    level = torch.zeros_like(logvar) if prior_logvar is None else prior_logvar
    logvar, level = reference._present(weight, logvar, level)
    v = (logvar if clamp is None else torch.clamp(logvar, *clamp)) - level
    parts.append(1e-4 * v.abs() * (1.0 if weight is None else weight))
    return _Terms(total, parts)


def _sample(inputs: Sequence[Any], noise: Tensor, clamp: Any) -> _Terms:
    mu, logvar, *_ = inputs
    parts = [mu.expand(noise.shape), reference.sample(torch.zeros_like(mu), logvar, noise.abs(), clamp)]
    return _Terms(reference.sample(mu, logvar, noise, clamp), parts)


class _Truth(NamedTuple):
    value: Tensor
    size: Tensor
    terms: float  # how many numbers may have underflowed on their way to it


class _Part(NamedTuple):
    """Inputs of a call in float64, and the sums over their terms, each with its factor."""

    names: Sequence[str]
    dtypes: Sequence[torch.dtype | None]
    inputs: Sequence[Any]
    needs: Sequence[bool]
    sums: Sequence[tuple[Callable[[Sequence[Any]], _Terms], Any]]

    def values(self) -> list[_Truth]:
        found = []
        for terms_of, factor in self.sums:
            total, parts = terms_of(self.inputs)
            size: Any = sum(p.abs().flatten(total.ndim).sum(-1) if p.ndim > total.ndim else p.abs() for p in parts)
            found.append(_Truth(factor * total, abs(factor) * size, self._count()))
        return found

    def gradients(self, ups: Sequence[Tensor | None]) -> list[_Truth | None] | None:
        """Of each input that needs one, for an upstream gradient of each sum; None if one of these is not finite."""
        leaves = [t.detach().requires_grad_() if need else t for t, need in zip(self.inputs, self.needs, strict=True)]
        asked = [t for t, need in zip(leaves, self.needs, strict=True) if need]
        sums = [(terms_of(leaves), factor * up) for (terms_of, factor), up in zip(self.sums, ups, strict=True) if up is not None]
        if not all(bool(up.isfinite().all()) for _, up in sums):
            return None

        def differentiate(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
            pairs = [(out, up) for out, up in pairs if out.requires_grad]
            if not pairs:
                return [torch.zeros_like(t) for t in asked]
            outs, grads = zip(*pairs, strict=True)
            return list(torch.autograd.grad(outs, asked, grads, retain_graph=True, allow_unused=True, materialize_grads=True))

        values = differentiate([(terms.total, up) for terms, up in sums])
        sizes, count = [torch.zeros_like(t) for t in asked], self._count()
        for (_, parts), up in sums:
            count = max(count, count * float(torch.linalg.vector_norm(up)))
            for part in parts:
                # One by one: magnitudes are added, where autograd would add signs.
                wide = up.abs().reshape(up.shape + (1,) * (part.ndim - up.ndim)).expand(part.shape)
                sizes = [size + g.abs() for size, g in zip(sizes, differentiate([(part, wide)]), strict=True)]
        each = iter([_Truth(value, size, count) for value, size in zip(values, sizes, strict=True)])
        return [next(each) if need else None for need in self.needs]

    def _count(self) -> float:
        return max(t.numel() for t in self.inputs if isinstance(t, Tensor))


class _LinearPart(NamedTuple):
    """As `_Part`, of a linear layer, whose products cancel on their way: sizes are products of magnitudes."""

    part: _Part
    # What a product's operands lose beyond the arithmetic: residuals are rounded to half precision, and everything to tf32.
    of_residuals: float
    of_operands: float
    # Magnitude of what is added up to h.
    of_h: Tensor

    @property
    def names(self) -> Sequence[str]:
        return self.part.names

    @property
    def dtypes(self) -> Sequence[torch.dtype | None]:
        return self.part.dtypes

    def values(self) -> list[_Truth]:
        (truth,) = self.part.values()
        ((_, factor),) = self.part.sums
        residual, slope = self._residuals()
        size = 0.5 * (slope * residual + torch.as_tensor(self.part.inputs[-1]).detach().abs() + reference.LOG_2PI)
        return [truth._replace(size=abs(factor) * (size.sum(1) if truth.value.ndim else size.sum()))]

    def gradients(self, ups: Sequence[Tensor | None]) -> list[_Truth | None] | None:
        truths = self.part.gradients(ups)
        if truths is None:
            return None
        _, x, weight, *_ = self.part.inputs
        (up,), ((_, factor),) = ups, self.part.sums
        assert up is not None
        rate = (abs(factor) * up).abs().reshape(-1, 1)
        residual, slope = self._residuals()
        of_var = 0.5 * rate * (1.0 + slope * residual)
        slope = slope * rate
        rounded = (1.0 + self.of_residuals) * slope
        sizes = rounded @ weight.abs(), slope.view(-1, *x.shape).sum(0), rounded.T @ self.of_h, slope.sum(0), of_var
        each = zip(truths, sizes, self.part.inputs, strict=True)
        return [None if truth is None else truth._replace(size=size.sum_to_size(t.shape)) for truth, size, t in each]

    def _residuals(self) -> tuple[Tensor, Tensor]:
        """Magnitudes of what is added up to a residual, and of that over the variance: (rows of h, columns)."""
        h, x, weight, bias, var = (t.detach() if isinstance(t, Tensor) else t for t in self.part.inputs)
        product = self.of_h @ weight.abs().T
        residual = product if bias is None else product + bias.abs()
        residual = residual + x.abs().repeat(len(h) // len(x), 1) + self.of_operands * product
        return residual, residual * torch.exp(-torch.as_tensor(var, dtype=h.dtype))


class _LinearELBOPart(NamedTuple):
    """A sample, the KL, and a linear layer of the sample: (loss, nll, kl) and gradients of the loss."""

    latent: _Part
    linear: _LinearPart
    samples: int
    beta: Any
    of_kl: torch.dtype | None  # where it is not the loss's
    names: Sequence[str]
    dtypes: Sequence[torch.dtype | None]

    def values(self) -> list[_Truth]:
        (nll,), (_, kl) = self.linear.values(), self.latent.values()
        if nll.value.ndim:
            nll = nll._replace(value=nll.value.view(self.samples, -1).sum(0), size=nll.size.view(self.samples, -1).sum(0))
        # A KL that is summed in float32, beside a likelihood in float64, is off by what float32 is allowed.
        factor = abs(self.beta) * (2e6 if self.of_kl == torch.float32 else 1.0)
        loss = _Truth(nll.value + self.beta * kl.value, nll.size + factor * kl.size, nll.terms + kl.terms)
        return [loss, nll, kl]

    def gradients(self, ups: Sequence[Tensor | None]) -> list[_Truth | None] | None:
        (up,) = ups
        assert up is not None
        of_layer = self.linear.gradients([up.repeat(self.samples) if up.ndim else up])
        if of_layer is None:
            return None
        of_z, of_x, *of_others = of_layer
        assert of_z is not None
        value, size = (t.view(self.samples, *self.latent.inputs[0].shape) for t in (of_z.value, of_z.size))
        truths, sizes = (self.latent.gradients([g, self.beta * up]) for g in (value, size))
        if truths is None or sizes is None:
            return None
        of_latent = [t if t is None or s is None else t._replace(size=s.size) for t, s in zip(truths, sizes, strict=True)]
        return [of_x, *of_latent[:2], *of_others, *of_latent[2:]]


_AnyPart = _Part | _LinearPart | _LinearELBOPart

_LATENT = ("mu", "logvar", "prior_mu", "prior_logvar")
_LOSSES = ("loss", "nll", "kl")


def _nll_part(
    inputs: Sequence[Any], needs: Sequence[bool], weight: Any, kind: str, full: bool, eps: float, keep: int, scale: Any,
    name: str | None = None,
) -> _Part:  # fmt: skip
    dtypes, wide, weight = [getattr(t, "dtype", None) for t in inputs], [_wide(t) for t in inputs], _wide(weight)
    sums = [(lambda v: _nll(v, weight, kind, full, eps, keep), _wide(scale))]
    return _Part(("recon", "x", name or kind), dtypes, wide, needs, sums)


def _linear_part(
    inputs: Sequence[Any], needs: Sequence[bool], full: bool, keep: int, scale: Any, precision: Any, of_h: Tensor | None = None
) -> _LinearPart:
    """`of_h` is given for a sample, which lies in its dtype, and was made in the least precise one that this allows."""
    dtypes = [getattr(t, "dtype", None) for t in inputs]

    def terms_of(v: Sequence[Any]) -> _Terms:
        total = reference.linear_nll(v[0], v[1], v[2], v[3], v[4], full, keep)
        return _Terms(total, [total])

    operand = torch.promote_types(inputs[0].dtype, inputs[2].dtype)
    half = operand in (torch.float16, torch.bfloat16)
    fast = operand == torch.float32 and (
        precision == "tf32" or (precision is None and torch.get_float32_matmul_precision() == "medium")
    )
    # In units of the default rtol, which multiplies sizes.
    lost = 2**-9 if fast else 0.0
    wide = [_wide(t) for t in inputs]
    part = _Part(("h", "x", "weight", "bias", "logvar"), dtypes, wide, needs, [(terms_of, _wide(scale))])
    acc = accumulate_dtype(*inputs)
    rounded = 0.0 if of_h is None or inputs[0].dtype == acc else 4 * torch.finfo(inputs[0].dtype).eps
    rounded /= 1e-11 if acc == torch.float64 else 2e-5
    of_h = wide[0].abs() if of_h is None else of_h
    return _LinearPart(part, (torch.finfo(operand).eps if half else lost) / 2e-5, max(lost / 2e-5, rounded), of_h)


def _linear_elbo_part(
    inputs: Sequence[Any], needs: Sequence[bool], eps: Any, seed: Any, samples: int | None, full: bool, keep: int, nll_scale: Any,
    kl_scale: Any, beta: Any, precision: Any,
) -> _LinearELBOPart:  # fmt: skip
    x, mu, logvar, *layer, prior_mu, prior_logvar = inputs
    need_x, need_mu, need_logvar, *need_layer, _, _ = needs
    noise = _noise(mu, eps, seed, samples)
    noise = noise if samples is not None else noise.unsqueeze(0)
    latent = _latent_part(
        (mu, logvar, prior_mu, prior_logvar), (need_mu, need_logvar, *needs[6:]), None, None, keep, kl_scale, noise, True
    )
    (z, (centre, spread)) = _sample(latent.inputs, noise, None)
    rows, size = (t.detach().flatten(0, 1) for t in (z, centre.abs() + spread.abs()))
    linear = _linear_part((rows.to(mu.dtype), x, *layer), (True, need_x, *need_layer), full, keep, nll_scale, precision, size)
    names = "x", "mu", "logvar", "weight", "bias", "recon_logvar", "prior_mu", "prior_logvar"
    dtypes = [getattr(t, "dtype", None) for t in inputs]
    of_kl = accumulate_dtype(mu, logvar, prior_mu, prior_logvar)
    own = of_kl if of_kl != accumulate_dtype(*inputs) else None
    return _LinearELBOPart(latent, linear, samples or 1, _wide(beta), own, names, dtypes)


def _latent_part(
    inputs: Sequence[Any], needs: Sequence[bool], weight: Any, clamp: Any, keep: int, scale: Any, noise: Any, want_kl: bool
) -> _Part:
    """Of a sample, if there is noise, and of the KL, if it is wanted."""
    dtypes, wide, weight = [getattr(t, "dtype", None) for t in inputs], [_wide(t) for t in inputs], _wide(weight)
    sums: list[Any] = [] if noise is None else [(lambda v: _sample(v, noise, clamp), 1.0)]
    if want_kl:
        sums.append((lambda v: _kl(v, weight, clamp, keep), _wide(scale)))
    return _Part(_LATENT, dtypes, wide, needs, sums)


def _elbo_parts(
    inputs: Sequence[Any], needs: Sequence[bool], weight: Any, full: bool, clamp: Any, keep: int, nll_scale: Any, kl_scale: Any
) -> tuple[_Part, _Part]:
    clamp = _edges(clamp, accumulate_dtype(*inputs))
    nll = _nll_part(inputs[:3], needs[:3], weight, "logvar", full, 0.0, keep, nll_scale, "recon_logvar")
    return nll, _latent_part(inputs[3:], needs[3:], None, clamp, keep, kl_scale, None, True)


# ---- the comparison --------------------------------------------------------------------------------------------------------------


class _Result(NamedTuple):
    name: str
    got: Any  # a tensor; a number, where a backend returns one; or None, for a gradient of 0
    dtype: torch.dtype  # what it must have
    truth: _Truth


def _difference(result: _Result, rtol: float | None, roundings: int) -> str | None:
    """What is wrong with a result that was rounded to its dtype so many times, or None."""
    name, got, dtype, (want, size, terms) = result
    if got is None:
        got = torch.zeros(want.shape, dtype=dtype)
    elif not isinstance(got, Tensor):
        got = torch.as_tensor(got, dtype=dtype)
    if got.shape != want.shape or got.dtype != dtype:
        return f"{name} is {_show(got)}, expected {tuple(want.shape)} {_name(dtype)}"
    info, exact = torch.finfo(dtype), dtype == torch.float64
    if rtol is None:
        rtol = 1e-11 if exact else 2e-5
    floor = terms * torch.finfo(torch.float64 if exact else torch.float32).tiny + roundings * info.eps * info.tiny
    bound = rtol * size + roundings * info.eps * want.abs() + floor
    seen = _wide(got).to(want.device)
    error = (seen - want).abs()
    fine = (error <= bound) & want.isfinite()
    fine |= (seen == want) | (want.isnan() & ~seen.isfinite())
    fine |= seen.isinf() & (seen.sign() == want.sign()) & (want.abs() + bound >= info.max)
    if bool(fine.all()):
        return None
    excess = torch.where(fine, -1.0, torch.nan_to_num(error / bound, nan=math.inf, posinf=math.inf))
    at = torch.unravel_index(excess.argmax(), want.shape)
    shown, true = (f"{t[at].item():{'.17g' if exact else '.9g'}}" for t in (seen, want))
    far = f", an error of {error[at].item():.3g} where {bound[at].item():.3g} is allowed" if bool(want[at].isfinite()) else ""
    return (
        f"{name} is off at {tuple(int(i) for i in at)}: {shown} where the oracle has {true}{far}; {int((~fine).sum())} of "
        f"{fine.numel()} elements are off in {_show(got)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _show(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    what = str(tuple(value.shape)) if value.ndim else repr(value.item())
    return f"{what} {_name(value.dtype)}" + ("" if value.is_contiguous() else f" with strides {value.stride()}")


def _describe(step: str, args: Sequence[Any]) -> str:
    """A call of a backend's function, for messages: shapes, dtypes, and the values of scalars."""
    names = inspect.signature(getattr(eager, step)).parameters
    given = [f"{name} {_show(value)}" for name, value in zip(names, args, strict=False) if value is not None]
    return f"{step}({', '.join(given)})"


# ---- the backend of a checked call -----------------------------------------------------------------------------------------------


class _Checked:
    """The functions of a backend, whose arguments `eager` explains, for one fused call: each checks what it returned."""

    def __init__(self, served: Any, context: verify, op: str) -> None:
        self.__name__ = served.__name__
        self._backend, self._context, self._op = served, context, op
        # What the forward pass leaves: how it was called, the KL's factor, and what gradients that it wrote are compared with.
        self._call = ""
        self._kl_factor: Any = None
        self._pending: list[_AnyPart] = []
        self._handed_over = False

    def nll_forward(self, *args: Any) -> Any:
        nll, ready = self._backend.nll_forward(*args)
        *inputs, weight, kind, full, eps, keep, scale, needs = args
        with _oracle():
            part = _nll_part(inputs, needs, weight, kind, full, eps, keep, scale)
            self._forward("nll_forward", args, [_Result("nll", nll, accumulate_dtype(*inputs), *part.values())])
        self._pending = [] if ready is None else [part]
        return nll, ready

    def nll_backward(self, *args: Any) -> Any:
        grads = self._backend.nll_backward(*args)
        *inputs, weight, kind, eps, keep, scale, grad, needs = args
        with _oracle():
            part = _nll_part(inputs, needs, weight, kind, False, eps, keep, scale)
            self._backward(_describe("nll_backward", args), [(part, grads, [grad])])
        return grads

    def latent_forward(self, *args: Any) -> Any:
        z, kl, ready = self._backend.latent_forward(*args)
        *inputs, weight, clamp, keep, scale, eps, seed, samples, want_kl, needs = args
        acc = accumulate_dtype(*inputs)
        with _oracle():
            noise = None if eps is None and seed is None else _noise(inputs[0], eps, seed, samples)
            part = _latent_part(inputs, needs, weight, _edges(clamp, acc), keep, scale, noise, want_kl)
            named = [("z", z, inputs[0].dtype)] * (noise is not None) + [("kl", kl, acc)] * want_kl
            results = [_Result(name, got, dtype, truth) for (name, got, dtype), truth in zip(named, part.values(), strict=True)]
            self._forward("latent_forward", args, results, seeded=seed is not None)
        self._pending = [] if ready is None else [part]
        return z, kl, ready

    def latent_backward(self, *args: Any, out: Sequence[Tensor] | None = None) -> Any:
        grads = self._backend.latent_backward(*args, out=out)
        *inputs, weight, clamp, keep, scale, eps, seed, samples, grad_z, grad_kl, needs = args
        with _oracle():
            noise = None if grad_z is None else _noise(inputs[0], eps, seed, samples)
            clamp = _edges(clamp, accumulate_dtype(*inputs))
            part = _latent_part(inputs, needs, weight, clamp, keep, scale, noise, grad_kl is not None)
            # The caller gets the buffers that it gave, if any.
            got = grads if out is None else (*out, *grads[2:])
            ups = [up for up in (grad_z, grad_kl) if up is not None]
            seeded = grad_z is not None and seed is not None
            self._backward(_describe("latent_backward", args), [(part, got, ups)], seeded=seeded)
        return grads

    def elbo_terms_forward(self, *args: Any) -> Any:
        nll, kl, ready = self._backend.elbo_terms_forward(*args)
        *inputs, weight, full, clamp, keep, nll_scale, kl_scale, needs = args
        acc = accumulate_dtype(*inputs)
        with _oracle():
            parts = _elbo_parts(inputs, needs, weight, full, clamp, keep, nll_scale, kl_scale)
            truths = [truth for part in parts for truth in part.values()]
            results = [_Result("nll", nll, acc, truths[0]), _Result("kl", kl, acc, truths[1])]
            self._forward("elbo_terms_forward", args, results)
        self._pending = [] if ready is None else [*parts]
        return nll, kl, ready

    def elbo_terms_backward(self, *args: Any) -> Any:
        grads = self._backend.elbo_terms_backward(*args)
        *inputs, weight, clamp, keep, nll_scale, kl_scale, grad_nll, grad_kl, needs = args
        if self._kl_factor is not None:
            kl_scale = self._kl_factor
        with _oracle():
            nll, kl = _elbo_parts(inputs, needs, weight, False, clamp, keep, nll_scale, kl_scale)
            pairs = [(nll, grads[:3], [grad_nll]), (kl, grads[3:], [grad_kl])]
            self._backward(_describe("elbo_terms_backward", args), pairs)
        return grads

    def elbo_forward(self, *args: Any) -> Any:
        outs = self._backend.elbo_forward(*args)
        *inputs, weight, full, clamp, nll_scale, kl_scale, beta, needs = args
        acc = accumulate_dtype(*inputs)
        with _oracle():
            nll, kl = _elbo_parts(inputs, needs, weight, full, clamp, 0, nll_scale, kl_scale)
            (of_nll,), (of_kl,) = nll.values(), kl.values()
            # In backward the KL's scale comes as a product with beta, which may have been rounded.
            self._kl_factor = _wide(kl_scale) * _wide(beta)
            kl = kl._replace(sums=[(terms_of, self._kl_factor) for terms_of, _ in kl.sums])
            (weighted,) = kl.values()
            of_loss = _Truth(of_nll.value + weighted.value, of_nll.size + weighted.size, of_nll.terms + weighted.terms)
            results = [_Result(n, out, acc, truth) for n, out, truth in zip(_LOSSES, outs, (of_loss, of_nll, of_kl), strict=False)]
            self._forward("elbo_forward", args, results)
        self._pending = [nll, kl] if any(needs) else []
        return outs

    def linear_nll_forward(self, *args: Any) -> Any:
        nll, ready = self._backend.linear_nll_forward(*args)
        *inputs, full, keep, scale, precision, needs = args
        with _oracle():
            part = _linear_part(inputs, needs, full, keep, scale, precision)
            self._forward("linear_nll_forward", args, [_Result("nll", nll, accumulate_dtype(*inputs), *part.values())])
        self._pending = [] if ready is None else [part]
        return nll, ready

    def linear_nll_backward(self, *args: Any) -> Any:
        grads = self._backend.linear_nll_backward(*args)
        *inputs, keep, scale, grad, precision, needs = args
        with _oracle():
            part = _linear_part(inputs, needs, False, keep, scale, precision)
            self._backward(_describe("linear_nll_backward", args), [(part, grads, [grad])])
        return grads

    def linear_elbo_forward(self, *args: Any) -> Any:
        outs = self._backend.linear_elbo_forward(*args)
        *inputs, eps, seed, samples, full, keep, nll_scale, kl_scale, beta, precision, needs = args
        acc = accumulate_dtype(*inputs)
        with _oracle():
            part = _linear_elbo_part(inputs, needs, eps, seed, samples, full, keep, nll_scale, kl_scale, beta, precision)
            accs = acc, acc, part.of_kl or acc
            results = [_Result(*fields) for fields in zip(_LOSSES, outs[:3], accs, part.values(), strict=True)]
            self._forward("linear_elbo_forward", args, results, seeded=seed is not None)
        self._pending = [] if outs[3] is None else [part]
        return outs

    def linear_elbo_backward(self, *args: Any) -> Any:
        grads = self._backend.linear_elbo_backward(*args)
        *inputs, eps, seed, samples, keep, nll_scale, kl_scale, beta, grad, precision, needs = args
        with _oracle():
            part = _linear_elbo_part(inputs, needs, eps, seed, samples, False, keep, nll_scale, kl_scale, beta, precision)
            self._backward(_describe("linear_elbo_backward", args), [(part, grads, [grad])], seeded=seed is not None)
        return grads

    def scale_gradients(self, grads: Any, grad: Tensor | None) -> Any:
        grads = self._backend.scale_gradients(grads, grad)
        pieces, start = [], 0
        while start < len(grads):
            part = self._pending.pop(0)
            stop = start + len(part.names)
            pieces.append((part, grads[start:stop], [grad]))
            start = stop
        with _oracle():
            # Those of two terms are handed over in two calls, in one backward pass.
            call, first = f"{self._call} and scale_gradients", not self._handed_over
            self._handed_over |= self._backward(call, pieces, roundings=2, count=first)
        return grads

    def _forward(self, step: str, args: Sequence[Any], results: Sequence[_Result], seeded: bool = False) -> None:
        self._call = _describe(step, args)
        self._context._count("checked")
        self._compare(self._call, results, seeded=seeded)

    def _backward(
        self, call: str, pieces: Sequence[tuple[_AnyPart, Sequence[Any], Sequence[Tensor | None]]], *,
        seeded: bool = False, roundings: int = 1, count: bool = True,
    ) -> bool:  # fmt: skip
        """Whether there was anything to compare."""
        results = []
        for part, grads, ups in pieces:
            truths = part.gradients([_wide(up) for up in ups])
            if truths is not None:
                fields = zip(part.names, grads, part.dtypes, truths, strict=True)
                results += [
                    _Result(f"the gradient of {n}", g, dtype, truth) for n, g, dtype, truth in fields if dtype and truth is not None
                ]
        if results and count:
            self._context._count("backwards")
        self._compare(call, results, seeded=seeded, roundings=roundings)
        return bool(results)

    def _compare(self, call: str, results: Sequence[_Result], *, seeded: bool, roundings: int = 1) -> None:
        rtol = 2e-5 if seeded and self._context.rtol is None else self._context.rtol
        for result in results:
            wrong = _difference(result, rtol, roundings)
            if wrong is not None:
                self._context._report(f"{self._op}: {wrong}; by {self.__name__}, {call}")
