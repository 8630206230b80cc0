"""Walking tensors in runs that stay in cache, and sums. Nothing here knows a formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import on_host

# Elements of a run: few enough for a handful of temporaries to stay in the outer caches, enough to amortise starting the threads.
RUN = 1 << 18

# Terms that float64 adds up as they come: fewer calls are worth more than the time that conversions take.
MANY = 1 << 14

# Of more terms, float32 adds up so many, and float64 adds these sums: where they cancel, longer float32 sums lose digits.
SHORT = 1 << 6

Shape = tuple[int, ...]
Parts = Sequence[Any]  # tensors, or None


def times(t: Tensor, factor: Any, out: Tensor | None = None) -> Tensor:
    """t times a factor. A pass over memory is worth a look whether the factor is the number 1: then it is t itself."""
    return t if isinstance(factor, float) and factor == 1.0 else torch.mul(t, factor, out=out)


def against(t: Any, ndim: int, keep: int = 0) -> Any:
    """A tensor of the first `keep` dimensions, or of the last ones, as one of `ndim`; 0-d tensors and numbers as they are."""
    if not isinstance(t, Tensor) or t.ndim in (0, ndim):
        return t
    return t.reshape(t.shape + (1,) * (ndim - keep) if keep else (1,) * (ndim - t.ndim) + t.shape)


def sum_over(t: Tensor, keep: int, squares: bool = False) -> Tensor:
    """The sum of t, or of t^2, over all but the first `keep` dimensions, in float64 on a host; where that is none, the terms."""
    if keep == t.ndim or not on_host(t):
        t = t * t if squares else t
        return t.sum(tuple(range(keep, t.ndim))) if keep < t.ndim else t
    kept, count = t.shape[:keep], math.prod(t.shape[keep:])
    rest = count % SHORT
    if t.numel() <= MANY or rest == count:
        return (t * t if squares else t).sum(tuple(range(keep, t.ndim)), dtype=torch.float64)
    if rest:
        t = t.reshape(*kept, count)
        return sum_over(t[..., : count - rest], keep, squares).add_(sum_over(t[..., count - rest :], keep, squares))
    runs = t.reshape(*kept, -1, SHORT)
    if squares:  # norms read t and write next to nothing: fresh memory for t^2 would cost more than they do
        norms = torch.linalg.vector_norm(runs, dim=-1).double()
        return (norms * norms).sum(-1)
    return runs.sum(-1).sum(-1, dtype=torch.float64)


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
    runs: float = 1.0,
) -> tuple[Parts, Parts]:
    """Call `tile(*inputs, *memory)`, which returns sums and fills the memory, run by run; return the sums and the memory whole.

    inputs: Tensors that broadcast to the first of them, with as many dimensions; and None, numbers and 0-d tensors, which every run
        gets as they are.
    likes: What each piece of memory is like: of the first input's shape; None for none. All memory is of dtype `acc`.
    sums: The shapes of the sums that a tile returns, None for none: either the first dimensions of the inputs, or all of them with
        some of size 1.
    runs: The size of a run, in units of RUN.
    """
    first = inputs[0]
    memory = [None if t is None else torch.empty_like(t, dtype=acc) for t in likes]
    if not on_host(first) or first.numel() <= RUN * runs:
        return tile(*inputs, *memory), memory
    totals = [None if shape is None else torch.zeros(shape, dtype=torch.float64, device=first.device) for shape in sums]
    for pieces in _runs([*inputs, *memory, *totals], int(RUN * runs)):
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
    step = max(1, shape[dim] * most // count)
    for start in range(0, shape[dim], step):
        size = min(step, shape[dim] - start)
        yield from _runs(
            [t.narrow(dim, start, size) if isinstance(t, Tensor) and t.ndim > dim and t.shape[dim] > 1 else t for t in tensors],
            most,
        )
