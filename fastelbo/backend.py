"""Which backend serves a call. Triton is imported on the first call that needs it, and the package works without it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch

from . import composed, eager
from .dtypes import accumulate_dtype
from .specs import Backend, LinearElboInputs, LinearInputs

IMPLS = ("auto", "triton", "torch", "reference")

# Read once: a variable that changed its meaning half-way through a run would be a trap, and the read is not free.
DEFAULT = os.environ.get("FASTELBO_IMPL", "auto").lower() or "auto"

EAGER = Backend(
    "fastelbo.eager", eager.likelihood.OP, eager.latent.OP, eager.elbo.OP, eager.elbo.TERMS_OP, eager.linear.linear_nll,
    composed.linear_elbo(eager.latent.OP, eager.linear.linear_nll), composed.each(eager.latent.OP),
)  # fmt: skip

# Inside `fastelbo.verify`, what stands in for the chosen backend in a fused call.
watcher: Callable[[Backend], Backend] | None = None

_kernels: ModuleType | None = None
_triton: Backend | None = None
_found: bool | None = None


def has_triton() -> bool:
    """Whether Triton can be imported at all (it is not published for macOS and Windows)."""
    global _found
    if _found is None:
        _found = importlib.util.find_spec("triton") is not None
    return _found


def kernels() -> ModuleType:
    """The Triton kernels; raises ImportError where there is no Triton."""
    global _kernels
    if _kernels is None:
        _kernels = importlib.import_module("fastelbo.kernels")
    return _kernels


def triton_backend() -> Backend:
    global _triton
    if _triton is None:
        k = kernels()
        _triton = Backend("fastelbo.kernels", k.likelihood, k.latent, k.elbo, k.elbo_terms, k.linear_nll, k.linear_elbo, k.latents)
    return _triton


def _pick(impl: str | None, device: torch.device, empty: bool) -> Backend | None:
    name = DEFAULT if impl is None else impl
    if name == "auto":
        # Under torch.compile plain PyTorch serves every call: Inductor fuses it.
        if device.type != "cuda" or empty or torch.compiler.is_compiling() or not has_triton():
            return EAGER
        return triton_backend()
    if name == "torch":
        return EAGER
    if name == "reference":
        return None
    if name != "triton":
        where = "FASTELBO_IMPL" if impl is None else "impl"
        raise ValueError(f"{where} must be one of {', '.join(map(repr, IMPLS))}, got {name!r}")
    if torch.compiler.is_compiling():
        return EAGER
    if not has_triton():
        raise ValueError("impl='triton' needs the package triton, which is not installed here; use impl='torch'")
    if device.type != "cuda" and not kernels().INTERPRETED:
        raise ValueError(
            f"impl='triton' needs CUDA or HIP tensors (or TRITON_INTERPRET=1), got tensors on {device.type!r}; use impl='torch'"
        )
    return EAGER if empty else triton_backend()


def choose(impl: str | None, device: torch.device, empty: bool = False) -> Backend | None:
    """The backend of a call on `device`; None stands for the reference. Of `empty` tensors there is nothing to launch.

    "auto" picks Triton for CUDA and HIP tensors and plain PyTorch otherwise, and plain PyTorch under torch.compile, where
    Inductor fuses it. "triton" on CPU tensors works only in Triton's interpreter.
    """
    chosen = _pick(impl, device, empty)
    # A trace must not look at the watcher: it would guard on it, and compile again inside `verify`.
    return chosen if chosen is None or torch.compiler.is_compiling() or watcher is None else watcher(chosen)


def check(impl: str | None) -> None:
    """Refuse a wrong `impl` where no tensor is at hand yet."""
    # Whether "triton" can serve depends on the device of a call, and so does the default.
    if impl not in (None, "triton"):
        choose(impl, torch.device("cpu"))


def choose_linear(impl: str | None, inputs: LinearInputs | LinearElboInputs, num_samples: int | None = None) -> Backend | None:
    """As `choose`, for a linear decoder: what is too wide or too precise for the kernels goes through torch's matrix products."""
    x, weight = inputs.x, inputs.weight
    chosen = _pick(impl, x.device, not (x.numel() and weight.numel()))
    if chosen is not None and chosen is _triton:
        limits = kernels().linear_limits
        hidden, rows = weight.shape[1], x.shape[0] * (num_samples or 1)
        if isinstance(inputs, LinearInputs):
            rows = inputs.h.shape[0]
        fits = hidden <= limits.hidden and max(rows, x.shape[1]) <= limits.rows and accumulate_dtype(*inputs) == torch.float32
        if not fits:
            chosen = chosen._replace(linear_nll=eager.linear.linear_nll)
        # Noise in registers needs rows that start at a multiple of four elements: other wide rows spill.
        drawn = isinstance(inputs, LinearInputs) or inputs.eps is not None or hidden % 4 == 0 or hidden <= limits.unaligned_hidden
        if not (fits and drawn):
            chosen = chosen._replace(linear_elbo=composed.linear_elbo(chosen.latent, chosen.linear_nll))
    return chosen if chosen is None or torch.compiler.is_compiling() or watcher is None else watcher(chosen)
