"""Walking tensors in runs that stay in cache. Nothing here knows a formula.

Sums: float32 adds up SHORT terms at most, and float64 adds these sums. What is done with a sum is done in float64 too, since it may
cancel. The result is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import on_host

# Elements of a run: few enough for a handful of temporaries to stay in the outer caches, enough to amortise starting the threads.
RUN = 1 << 18

# Terms whose sum float64 may take as they come: fewer calls are worth more than the time that conversions take.
MANY = 1 << 14

# Terms that float32 adds up. Where they cancel, longer runs were less exact than the formula that users write.
SHORT = 64

Shape = tuple[int, ...]
Sums = Sequence[Tensor | None]
Gradients = Sequence[Tensor | None]


def widen(t: Tensor, acc: torch.dtype) -> Tensor:
    return t if t.dtype == acc else t.to(acc)


def usable(memory: Tensor | None, acc: torch.dtype) -> Tensor | None:
    """A gradient's memory, if values of dtype `acc` can lie in it on their way."""
    return memory if memory is not None and memory.dtype == acc else None


def against(t: Any, ndim: int, keep: int = 0) -> Any:
    """A tensor of the first `keep` dimensions, or of the last ones, as one of `ndim`; 0-d tensors and numbers as they are."""
    if not isinstance(t, Tensor) or t.ndim in (0, ndim):
        return t
    return t.reshape(t.shape + (1,) * (ndim - keep) if keep else (1,) * (ndim - t.ndim) + t.shape)


def sum_over(terms: Tensor, keep: int) -> Tensor:
    """The sum over all but the first `keep` dimensions, in float64 on a host; where that is none, the terms themselves."""
    if keep == terms.ndim:
        return terms
    if not on_host(terms):
        return terms.flatten(keep).sum(-1)
    if terms.numel() <= MANY or not terms.is_contiguous():
        return terms.flatten(keep).sum(-1, dtype=torch.float64) if keep else terms.sum(dtype=torch.float64)
    runs, rest = _short_runs(terms, keep)
    total = runs.sum(-1).double().sum(-1)
    return total if rest is None else total.add_(rest.sum(-1))


def sum_of_squares(t: Tensor, keep: int) -> Tensor:
    """`sum_over` of t^2; norms read t and write next to nothing."""
    if keep == t.ndim or not on_host(t) or t.numel() <= MANY or not t.is_contiguous():
        return sum_over(t * t, keep)
    runs, rest = _short_runs(t, keep)
    norms = torch.linalg.vector_norm(runs, dim=-1).double()
    total = norms.mul_(norms).sum(-1)
    return total if rest is None else total.add_((rest * rest).sum(-1))


def _short_runs(t: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
    """All but the first `keep` dimensions as (runs, SHORT elements), and what is left over."""
    kept, count = t.shape[:keep], math.prod(t.shape[keep:])
    rest = count % SHORT
    if not rest:
        return t.view(*kept, count // SHORT, SHORT), None
    flat, whole = t.view(*kept, count), count - rest
    return flat.narrow(-1, 0, whole).view(*kept, whole // SHORT, SHORT), flat.narrow(-1, whole, rest)


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
    tile: Callable[..., tuple[Sums, Gradients]],
    inputs: Sequence[Any],
    likes: Sequence[Tensor | None],
    sums: Sequence[Shape | None],
    acc: torch.dtype,
    arrays: float = 1.0,
) -> tuple[Sums, Gradients]:
    """`tile(*inputs, *memory)` over runs of the inputs; its sums and gradients whole.

    inputs: Tensors that broadcast to the first of them, with as many dimensions; and None, numbers and 0-d tensors, which every run
        gets as they are.
    likes: For each gradient that is needed, what it is like: of the first input's shape. A tile makes the gradient in the memory
        that it gets, or returns it in other memory, from which it is copied. Where one run does, it gets no memory, but None.
    sums: The shapes of the sums that a tile returns, None for none: either the first dimensions of the inputs, or all of them with
        some of size 1. A sum over nothing, with a value for each element, is of dtype `acc`.
    arrays: How many temporaries of the run's size a tile has at a time, in units of what RUN is made for.
    """
    first = inputs[0]
    size = max(1, int(RUN / arrays))
    if not on_host(first) or first.numel() <= size:
        return tile(*inputs, *[None] * len(likes))
    memory = [None if t is None else torch.empty_like(t) for t in likes]
    totals = [
        None
        if shape is None
        else torch.empty(shape, dtype=acc, device=first.device)
        if shape == first.shape
        else torch.zeros(shape, dtype=torch.float64, device=first.device)
        for shape in sums
    ]
    for pieces in _runs([*inputs, *memory, *totals], size):
        places = pieces[len(inputs) : len(inputs) + len(memory)]
        found, gradients = tile(*pieces[: len(inputs)], *places)
        for g, place in zip(gradients, places, strict=True):
            if place is not None and g is not None and g is not place:
                place.copy_(g)
        for part, total, shape in zip(found, pieces[len(inputs) + len(memory) :], sums, strict=True):
            if part is not None and total is not None:
                total.copy_(part) if shape == first.shape else total.add_(part)
    return totals, memory


def _runs(tensors: Sequence[Any], most: int) -> Iterator[list[Any]]:
    """Views of the tensors, which broadcast to the first, in pieces of at most so many elements that cover it."""
    shape = tensors[0].shape
    count = math.prod(shape)
    if count <= most:
        yield list(tensors)
        return
    dim = next(i for i, n in enumerate(shape) if n > 1)
    step = max(1, shape[dim] * most // count)
    for start in range(0, shape[dim], step):
        size = min(step, shape[dim] - start)
        pieces = [t.narrow(dim, start, size) if isinstance(t, Tensor) and t.ndim > dim and t.shape[dim] > 1 else t for t in tensors]
        if count // shape[dim] <= most:
            yield pieces
        else:
            yield from _runs(pieces, most)
