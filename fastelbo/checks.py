"""Every check of an argument: each error names the argument, what it was and what was expected, before any launch.

Nothing here computes or reads a value of a tensor, so no check costs a synchronisation. In a traced function a number may be
symbolic, hence the tuples of `tracing`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dtypes import plain
from .tracing import INT, NUMBER

FLOATING = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
FAMILIES = ("gaussian", "laplace", "bernoulli")
REDUCTIONS = ("none", "batchmean", "sum", "mean")


def shape_of(t: Tensor) -> str:
    return str(tuple(t.shape))


def tensor(name: str, t: Any, device: torch.device | None = None, is_image: bool = False) -> None:
    """A floating tensor, or one that holds an image."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in FLOATING and not (is_image and t.dtype == torch.uint8):
        way_out = "" if t.is_complex() else f": {name}.float() converts it"
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}{way_out}")
    if device is not None and t.device != device:
        raise ValueError(f"{name} is on {t.device}, but the first argument is on {device}: all tensors must share a device")


def pair(name_a: str, a: Any, name_b: str, b: Any, device: torch.device | None = None, is_image: bool = False) -> None:
    """Two tensors of one shape, the second of which may be an image."""
    tensor(name_a, a, device)
    tensor(name_b, b, a.device, is_image)
    if a.shape != b.shape:
        raise ValueError(f"{name_b} has shape {shape_of(b)}, but {name_a} has shape {shape_of(a)}: they must be equal")


def image_numbers(x_scale: Any, x_shift: Any) -> None:
    """What scales and shifts an image: numbers, the second of which may be None."""
    for name, value in (("x_scale", x_scale), ("x_shift", x_shift)):
        number = plain(value)
        if number is not None and (isinstance(number, bool) or not isinstance(number, NUMBER)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if x_scale is None:
        raise TypeError(
            "x_scale is not given, which an x of torch.uint8 needs: 1 / 255 makes it values in [0, 1]; x.float() converts it"
        )


def image(x: Any, x_scale: Any, x_shift: Any) -> bool:
    """Whether x is an image, and has the numbers that say what its values stand for."""
    if isinstance(x, Tensor) and x.dtype == torch.uint8:
        image_numbers(x_scale, x_shift)
        return True
    if x_scale is None and x_shift is None:
        return False
    name = "x_shift" if x_scale is None else "x_scale"
    got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
    raise ValueError(f"{name} is given, but only an x of torch.uint8 is scaled and shifted, got {got}")


def broadcast(name: str, t: Tensor, to: str, shape: torch.Size) -> None:
    # The ranks first: tuples of other lengths compare their elements, and a trace would take that for a condition on the batch.
    if t.ndim == len(shape) and t.shape == shape:
        return
    lead = len(shape) - t.ndim
    if lead < 0 or any(n not in (1, m) for n, m in zip(t.shape, shape[lead:], strict=True)):
        # A mask of samples or of steps is the usual case.
        way_out = f": write {name}[..., {', '.join(['None'] * lead)}]" if lead > 0 and t.shape == shape[: t.ndim] else ""
        raise ValueError(f"{name} has shape {shape_of(t)}, which does not broadcast to the shape {tuple(shape)} of {to}{way_out}")


def kept_dims(name: str, batch_dims: int, ndim: int) -> int:
    """Check a reduction and batch_dims; return how many leading dimensions the sum keeps."""
    if name not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {name!r}")
    batch_dims = batch_dims if type(batch_dims) is int else plain(batch_dims)
    if isinstance(batch_dims, bool) or not isinstance(batch_dims, INT):
        raise TypeError(f"batch_dims must be an int, got {type(batch_dims).__name__}")
    if not 0 <= batch_dims <= ndim:
        raise ValueError(f"batch_dims must be between 0 and the number of dimensions, {ndim}, got {batch_dims}")
    return batch_dims if name == "none" else 0


def weight(name: str, value: Any, to: str, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(value).__name__}")
    if value.is_complex() or (value.is_floating_point() and value.dtype not in FLOATING):
        raise TypeError(f"{name} must be a bool mask, integers or float16 to float64, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, but the first argument is on {device}: all tensors must share a device")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but is a constant here: detach it, or weigh the result of reduction='none'")
    broadcast(name, value, to, shape)


def factor(name: str, value: Any, device: torch.device, batch: int) -> None:
    """A run-time factor: a number, or a real tensor of one value or of one for each sample, on the inputs' device or the CPU."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.ndim > 1 or (value.ndim and value.shape[0] not in (1, batch)):
            raise ValueError(
                f"{name} must be a number or a real tensor of shape (), (1,) or (batch,) = ({batch},), "
                f"got shape {shape_of(value)} of {value.dtype}"
            )
        if value.device != device and value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}, but the first argument is on {device}: it must be there or on the CPU")
    elif isinstance(value, bool) or not isinstance(value, NUMBER):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")


def clamp(value: Any) -> tuple[float, float]:
    """The two edges; None is none."""
    edges = [plain(c) for c in value] if isinstance(value, (tuple, list)) else []
    if len(edges) != 2 or any(c is not None and (isinstance(c, bool) or not isinstance(c, NUMBER)) for c in edges):
        raise TypeError(f"logvar_clamp must be a pair (lo, hi) of numbers, one of which may be None, or None, got {value!r}")
    lo, hi = (unset if c is None else float(c) for c, unset in zip(edges, (-math.inf, math.inf), strict=True))
    if not lo <= hi:
        raise ValueError(f"logvar_clamp must be (lo, hi) with lo <= hi, got ({lo}, {hi})")
    return lo, hi


def prior(name: str, value: Any, mu: Tensor) -> None:
    """A parameter of the prior: a number, or a tensor that broadcasts to mu."""
    if isinstance(value, NUMBER) and not isinstance(value, bool):
        return
    tensor(name, value, mu.device)
    broadcast(name, value, "mu", mu.shape)


def number(name: str, value: Any, optional: bool = True) -> None:
    """A number, or None where it is `optional`."""
    given = plain(value)
    if isinstance(given, bool) or not (isinstance(given, NUMBER) or (given is None and optional)):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {type(value).__name__}")


def spread(name: str, form: str, value: Any, device: torch.device) -> None:
    """The spread of a prior, given in one form or another: a number, or a tensor, whose shape is checked beside mu's."""
    if not isinstance(value, NUMBER) or isinstance(value, bool):
        tensor(name, value, device)
    elif form in ("std", "var") and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def variance(name: str, parameter: str, value: Any, recon: Tensor, to: str = "recon") -> None:
    """A variance, given as a "logvar", "std", "var" or "theta": a number, or a tensor that broadcasts to recon (`to` its user)."""
    if isinstance(value, Tensor):
        tensor(name, value, recon.device)
        broadcast(name, value, to, recon.shape)
        return
    if isinstance(value, bool) or not isinstance(value, NUMBER):
        raise TypeError(f"{name} must be a number or a torch.Tensor, got {type(value).__name__}")
    if parameter != "logvar" and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def constant_data(x: Any, what: str) -> None:
    """Data in which a likelihood has no slope; `what` says what of it is constant."""
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"x requires grad, but {what} here: detach it")


def bins(count: Any, low: Any, high: Any) -> None:
    """How many bins there are, and the centres of the first and the last."""
    given = plain(count)
    if isinstance(given, bool) or not isinstance(given, INT):
        raise TypeError(f"bins must be an int, got {type(count).__name__}")
    if given < 2:
        raise ValueError(f"bins must be at least 2, got {given}")
    for name, value in (("low", low), ("high", high)):
        centre = plain(value)
        if isinstance(centre, bool) or not isinstance(centre, NUMBER):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low and high must be finite with low < high, got low={low} and high={high}")


def family(likelihood: Any) -> None:
    if likelihood not in FAMILIES:
        raise ValueError(f"likelihood must be one of {', '.join(map(repr, FAMILIES))}, got {likelihood!r}")


def samples(num_samples: Any) -> None:
    if isinstance(num_samples, bool) or not isinstance(num_samples, INT):
        raise TypeError(f"num_samples must be an int, got {type(num_samples).__name__}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")


def noise(eps: Any, seed: Any, generator: Any, shape: Sequence[int], device: torch.device) -> None:
    """At most one source of noise, and eps of z's shape."""
    one_source(eps, seed, generator)
    if eps is not None:
        given_noise("eps", eps, shape, device)


def one_source(eps: Any, seed: Any, generator: Any) -> None:
    if (eps is not None) + (seed is not None) + (generator is not None) > 1:
        given = [name for name, v in (("eps", eps), ("seed", seed), ("generator", generator)) if v is not None]
        raise ValueError(f"give at most one of eps, seed and generator, got {' and '.join(given)}")


def given_noise(name: str, eps: Any, shape: Sequence[int], device: torch.device) -> None:
    tensor(name, eps, device)
    if eps.shape != shape:
        raise ValueError(f"{name} has shape {shape_of(eps)}, but z will have shape {tuple(shape)}: they must be equal")
    if eps.requires_grad:
        raise ValueError(f"{name} requires grad, but noise is a constant here: detach it")
