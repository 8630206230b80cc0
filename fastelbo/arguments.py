"""From arguments to the fields of a record: priors in mu's shape, numbers that stay symbolic in a trace, factors, noise.

Each function that is named like an argument checks it first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .dtypes import accumulate_dtype
from .noise import check_seed, draw_seed
from .specs import Factor
from .tracing import NUMBER


def symbolic(value: float, like: Tensor) -> Tensor:
    """A number in a traced function. Added to a tensor it stays symbolic; as anything else every new value is a new graph."""
    return torch.zeros((), dtype=accumulate_dtype(like), device=like.device) + value


def factor(name: str, value: float | Tensor, like: Sequence[Tensor | None], device: torch.device) -> Factor:
    """A factor in the dtype of the arithmetic: a product with a half-precision one would be rounded to its dtype."""
    checks.factor(name, value, device)
    return value.to(device, accumulate_dtype(*like)) if isinstance(value, Tensor) else value


def variance(name: str, parameter: str, value: float | Tensor | None, recon: Tensor) -> tuple[Tensor | None, str, float]:
    """A variance as the inputs' tensor, what that holds, and the log-variance that stands for a missing tensor."""
    if value is None:
        return None, "logvar", 0.0
    checks.variance(name, parameter, value, recon)
    if isinstance(value, Tensor):
        return value, parameter, 0.0
    factor = 2 if parameter == "std" else 1
    if torch.compiler.is_compiling() and isinstance(value, NUMBER):
        number = symbolic(value, recon)
        return (number if parameter == "logvar" else torch.log(number) * factor), "logvar", 0.0
    return None, "logvar", float(value) if parameter == "logvar" else math.log(value) * factor


def prior(name: str, value: float | Tensor, mu: Tensor) -> Tensor:
    """A prior's parameter in mu's shape. Expanding is autograd's business, so a shared prior gets its summed gradient."""
    checks.prior(name, value, mu)
    if isinstance(value, NUMBER):
        if torch.compiler.is_compiling():
            return symbolic(value, mu).expand(mu.shape)
        return torch.full((), value, dtype=accumulate_dtype(mu), device=mu.device).expand(mu.shape)
    assert isinstance(value, Tensor)
    if value.ndim == mu.ndim and value.shape == mu.shape:
        return value
    # Autograd sums the gradients of an expanded tensor in its dtype: one rounding for each element in half precision.
    return (value.float() if value.dtype.itemsize < 4 else value).expand(mu.shape)


def scale_of(
    reduction: str, batch_dims: int, shape: torch.Size, weight: Tensor | None = None, like: Sequence[Tensor | None] = ()
) -> Factor:
    """The factor that turns a total over `shape` into the reduction; a mean over nothing is NaN.

    The dtype of the arithmetic with the tensors `like` is that of a sum of weights.
    """
    if reduction in ("sum", "none"):
        return 1.0
    if reduction == "mean" and weight is not None:
        # Over what the weight broadcasts to, it sums to this many times its own sum.
        times = math.prod(shape) / weight.numel() if weight.numel() else 0
        return (1.0 / times if times else math.nan) / weight.sum(dtype=accumulate_dtype(*like))
    count = math.prod(shape[:batch_dims] if reduction == "batchmean" else shape)
    return 1.0 / count if count else math.nan


def noise(
    mu: Tensor, num_samples: int | None, eps: Tensor | None, seed: int | Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check the sources of noise and return it as (eps, None) or as (None, seed), by the rule that the README tabulates."""
    if num_samples is None:
        shape = mu.shape
    else:
        checks.samples(num_samples)
        shape = torch.Size((num_samples, *mu.shape))
    checks.noise(eps, seed, generator, shape, mu.device)
    if eps is not None:
        return eps, None
    if seed is not None:
        return None, check_seed(seed, mu.device)
    if mu.device.type == "cuda":
        return None, draw_seed(mu.device, generator)
    # What `randn_like` gave the code before the swap, so that torch.manual_seed reproduces it.
    if num_samples is not None:
        return torch.randn(shape, generator=generator, dtype=mu.dtype, device=mu.device), None
    if generator is not None:
        return torch.empty_like(mu, requires_grad=False).normal_(generator=generator), None
    return torch.randn_like(mu, requires_grad=False), None
