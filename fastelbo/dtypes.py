"""What every part of the package agrees on: the dtype of the arithmetic, what can be read at no cost, and constants."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
# Where the open side of a first or last bin lies, in units of the scale. At infinity the product with a slope of 0 would be NaN.
OPEN = 1e30


def plain(value: Any) -> Any:
    """A NumPy number or 0-d array as the Python number that it holds; everything else as it is."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and not value.ndim else value


_PLAIN = (Tensor, torch.nn.Parameter)


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32: the dtype of arithmetic, sums and losses."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors if t is not None] else torch.float32


def widen(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype of the arithmetic, or of a result. Where that is its own, `Tensor.to` takes longer to find out."""
    return t if t.dtype == dtype else t.to(dtype)


def image(x: Tensor, scale: float, shift: float, dtype: torch.dtype) -> Tensor:
    """An x of uint8 as x * scale + shift, rounded once, as this sum of torch is and the kernels' own. Every other x widened."""
    if x.dtype == dtype:
        return x
    if x.dtype != torch.uint8:
        return x.to(dtype)
    return torch.add(torch.full((), shift, dtype=dtype, device=x.device), x.to(dtype), alpha=scale)


def has_float16(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient among these could underflow when it is written before GradScaler's factor is known."""
    return torch.float16 in [t.dtype for t in tensors if t is not None]


def on_host(t: Tensor) -> bool:
    """Whether `t` is memory that Python can look at without waiting: on a CPU, and not a stand-in of a tracer."""
    return t.is_cpu and type(t) in _PLAIN
