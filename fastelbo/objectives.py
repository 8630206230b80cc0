"""What a training objective makes of a KL: free bits, a capacity. Plain arithmetic on its values, which autograd sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .dtypes import plain

OVER = ("batch", "sample")


class Objective(NamedTuple):
    """The options of a KL that make it an objective, as `gaussian_kl` describes them."""

    kl_balance: Any = None
    free_bits: Any = None
    free_bits_over: Any = "batch"
    capacity: Any = None

    def check(self, reduction: str, weight: Tensor | None) -> None:
        for name in ("kl_balance", "free_bits", "capacity"):
            checks.number(name, getattr(self, name))
        if self.kl_balance is not None and not 0 <= self.kl_balance <= 1:
            raise ValueError(f"kl_balance must be from 0 to 1, got {self.kl_balance}")
        if self.free_bits_over not in OVER:
            raise ValueError(f"free_bits_over must be one of {', '.join(map(repr, OVER))}, got {self.free_bits_over!r}")
        if self.free_bits is None:
            return
        if self.free_bits < 0:
            raise ValueError(f"free_bits must not be negative, got {self.free_bits}")
        if weight is not None and weight.dtype != torch.bool:
            raise TypeError(f"weight must be a bool mask beside free_bits, got {weight.dtype}")
        if self.free_bits_over == "batch" and reduction != "batchmean":
            raise ValueError(
                f"free_bits over the batch make one value of it: reduction must be 'batchmean', got {reduction!r}; "
                "free_bits_over='sample' takes others"
            )

    def of(self, kl: Tensor, mask: Tensor | None, reduction: str, batch_dims: int) -> Tensor:
        """The objective, of a reduced KL, or of that of each latent where some nats are free."""
        if self.free_bits is not None:
            kl = at_least(kl, plain(self.free_bits), self.free_bits_over, mask, reduction, plain(batch_dims))
        return kl if self.capacity is None else (kl - plain(self.capacity)).abs()


def at_least(each: Tensor, bits: float, over: str, mask: Tensor | None, reduction: str, batch_dims: int) -> Tensor:
    """The KL `each` of every latent, 0 where absent, raised to `bits` nats and reduced; below them the gradient is 0."""
    batch: Sequence[int] = each.shape[:batch_dims]
    latents: Sequence[int] = each.shape[batch_dims:]
    present = None if mask is None else mask.expand(each.shape)
    if over == "batch":
        each = each.reshape(-1, *latents)
        if present is None:
            return torch.clamp(each.mean(0), min=bits).sum()
        count = present.reshape(-1, *latents).sum(0)
        raised = torch.clamp(each.sum(0) / count.clamp(min=1), min=bits)
        return torch.where(count > 0, raised, 0.0).sum()
    raised = torch.clamp(each, min=bits)
    if present is not None:
        raised = torch.where(present, raised, 0.0)
    if reduction == "none":
        return raised.sum(tuple(range(batch_dims, each.ndim))) if latents else raised
    total = raised.sum()
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        size = math.prod(batch)
        return total / size if size else total * math.nan
    return total / (each.numel() if present is None else present.sum())
