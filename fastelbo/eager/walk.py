"""Walking tensors in runs that stay in cache, and sums. Nothing here knows a formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import on_host, widen
from ..specs import Gradients

# Elements of all temporaries of a run together: few enough to stay in the outer caches, enough to amortise starting the threads.
RUN = 1 << 20

# float32 adds up so many terms that cancel, or so many squares, and float64 adds these sums.
SHORT = 1 << 6
SHORT_SQUARES = 1 << 8

# So many squares are cheaper to write than to read in short runs.
FEW_SQUARES = 1 << 17

Shape = tuple[int, ...]
Parts = Sequence[Any]  # tensors, or None


def times(t: Tensor, factor: Any, out: Tensor | None = None) -> Tensor:
    """t times a factor. A pass over memory is worth a look whether the factor is the number 1: then it is t itself."""
    return t if isinstance(factor, float) and factor == 1.0 else torch.mul(t, factor, out=out)


def rate_of_some(rate: Any, scale: Any) -> Any:
    """The rate of slopes, which is 0 where the scale is not finite: a mean over nothing is NaN, and has no slopes."""
    if isinstance(scale, Tensor):
        return torch.where(scale.isfinite(), rate, 0.0)
    return rate if math.isfinite(scale) else torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0


def against(t: Any, ndim: int, keep: int = 0) -> Any:
    """A tensor of the first `keep` dimensions, or of the last ones, as one of `ndim`; 0-d tensors and numbers as they are."""
    if not isinstance(t, Tensor) or t.ndim in (0, ndim):
        return t
    return t.reshape(t.shape + (1,) * (ndim - keep) if keep else (1,) * (ndim - t.ndim) + t.shape)


def sum_over(t: Tensor, keep: int) -> Tensor:
    """The sum over all but the first `keep` dimensions, as exact as that of the usual formula. Where that is none, t."""
    return t.sum(tuple(range(keep, t.ndim))) if keep < t.ndim else t


def exact_sum_over(t: Tensor, keep: int) -> Tensor:
    """The sum in float64, for terms that cancel. To convert each term would take longer than all sums."""
    runs, rest = _short_runs(t, keep, SHORT)
    total = runs.sum(-1).sum(-1, dtype=torch.float64)
    return total.add_(rest.sum(-1, dtype=torch.float64)) if rest.shape[-1] else total


def squares_over(t: Tensor, keep: int) -> Tensor:
    """The sum of t^2. Norms read t and write next to nothing: fresh memory for many squares would cost more than they do."""
    if not on_host(t) or t.numel() <= FEW_SQUARES or keep == t.ndim:
        return sum_over(t * t, keep)
    runs, rest = _short_runs(t, keep, SHORT_SQUARES)
    norms = torch.linalg.vector_norm(runs, dim=-1).double()
    total = (norms * norms).sum(-1)
    return total.add_((rest * rest).sum(-1)) if rest.shape[-1] else total


def _short_runs(t: Tensor, keep: int, size: int) -> tuple[Tensor, Tensor]:
    """t as (kept, runs, size), and what is left of it."""
    kept, count = t.shape[:keep], math.prod(t.shape[keep:])
    rest = count % size
    if not rest:
        return t.reshape(*kept, count // size, size), t[..., :0]
    t = t.reshape(*kept, count)
    return t[..., : count - rest].unflatten(-1, (-1, size)), t[..., count - rest :]


def scaled(gradients: Gradients, grad_output: Tensor) -> Gradients:
    """Gradients that nobody has seen yet, times the upstream gradient, which has a number for each row or one for all."""
    if grad_output.ndim == 0 and on_host(grad_output) and float(grad_output) == 1.0:  # a CPU tensor is read without waiting
        return gradients
    if grad_output.ndim:  # then all gradients have the rank of the terms
        grad_output = against(grad_output, max(g.ndim for g in gradients if g is not None), grad_output.ndim)
    return tuple([g if g is None else g.mul_(grad_output) for g in gradients])


def rounded(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Gradients:
    """Each gradient in its input's dtype; None where there is none or no input."""
    return tuple([None if g is None or t is None else widen(g, t.dtype) for g, t in zip(gradients, inputs, strict=False)])


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def present(weight: Tensor | None, t: Tensor, value: float = 0.0) -> Tensor:
    """The tensor with `value` where the weight is 0: a NaN there reaches neither a sum nor a gradient."""
    if weight is None:
        return t
    if value or not on_host(t):
        return torch.where(weight == 0, value, t)
    # torch.where takes ten times as long on a CPU as clearing all bits does.
    bits = _BITS[t.dtype]
    return t.view(bits).bitwise_and((weight != 0).to(bits).neg_()).view(t.dtype)


def walk(
    tile: Callable[..., Parts],
    inputs: Sequence[Any],
    likes: Parts,
    sums: Sequence[Shape | None],
    acc: torch.dtype,
    temporaries: int,
) -> tuple[Parts, Parts]:
    """Call `tile(*inputs, *memory)`, which returns sums and fills the memory, run by run; return the sums and the memory whole.

    inputs: Tensors that broadcast to the first of them, with as many dimensions; and None, numbers and 0-d tensors, which every run
        gets as they are.
    likes: What each piece of memory is like: of the first input's shape; None for none. All memory is of dtype `acc`.
    sums: The shapes of the sums that a tile returns, None for none: either the first dimensions of the inputs, or all of them with
        some of size 1.
    temporaries: How many arrays of a run's size a tile allocates, about. Where it is none, one run is as good as many.
    """
    first = inputs[0]
    memory = [None if t is None else torch.empty_like(t, dtype=acc) for t in likes]
    if not temporaries or not on_host(first) or first.numel() * temporaries <= RUN:
        return tile(*inputs, *memory), memory
    totals = [None if shape is None else torch.zeros(shape, dtype=torch.float64, device=first.device) for shape in sums]
    for pieces in _runs([*inputs, *memory, *totals], max(1, RUN // temporaries)):
        parts = tile(*pieces[: -len(totals)])
        for total, part in zip(pieces[-len(totals) :], parts, strict=True):
            if total is not None:
                total.add_(part)
    return totals, memory


def _runs(tensors: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    """Views of the tensors, which broadcast to the first, in pieces of at most so many elements that cover it."""
    shape = tensors[0].shape
    count = math.prod(shape)
    if count <= most:
        yield tensors
        return
    dim = next(i for i, n in enumerate(shape) if n > 1)
    step = -(-shape[dim] // min(shape[dim], -(-count // most)))  # runs of about one size
    for start in range(0, shape[dim], step):
        size = min(step, shape[dim] - start)
        yield from _runs(
            [t.narrow(dim, start, size) if isinstance(t, Tensor) and t.ndim > dim and t.shape[dim] > 1 else t for t in tensors],
            most,
        )
