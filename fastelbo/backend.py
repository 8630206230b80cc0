"""Which backend serves a call. Triton is imported on the first call that needs it, and the package works without it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import eager

IMPLS = ("auto", "triton", "torch", "reference")

# Read once: a variable that changed its meaning half-way through a run would be a trap, and the read is not free.
_DEFAULT = os.environ.get("FASTELBO_IMPL", "auto").lower() or "auto"

_kernels: ModuleType | None = None

# Inside `fastelbo.verify`, what stands in for the chosen backend in a fused call.
watcher: Callable[[ModuleType], Any] | None = None


def has_triton() -> bool:
    """Whether Triton can be imported at all (it is not published for macOS and Windows)."""
    return importlib.util.find_spec("triton") is not None


def kernels() -> ModuleType:
    """The Triton backend; raises ImportError where there is no Triton."""
    global _kernels
    if _kernels is None:
        _kernels = importlib.import_module("fastelbo.kernels")
    return _kernels


def choose(impl: str | None, device: torch.device, empty: bool = False) -> ModuleType | None:
    """The backend module for a call on `device`; None stands for the reference. Of `empty` tensors there is nothing to launch.

    "auto" picks Triton for CUDA and HIP tensors and plain PyTorch otherwise, and plain PyTorch under torch.compile, where
    Inductor fuses it. "triton" on CPU tensors works only in Triton's interpreter.
    """
    name = _DEFAULT if impl is None else impl
    if name not in IMPLS:
        where = "FASTELBO_IMPL" if impl is None else "impl"
        raise ValueError(f"{where} must be one of {', '.join(map(repr, IMPLS))}, got {name!r}")
    if name == "reference":
        return None
    if name == "torch":
        chosen = eager
    elif torch.compiler.is_compiling():
        # Before the watcher is looked at: a trace would guard on it, and compile again inside `verify`.
        return eager
    elif name == "auto":
        chosen = kernels() if device.type == "cuda" and not empty and _triton_found() else eager
    else:
        if not _triton_found():
            raise ValueError("impl='triton' needs the package triton, which is not installed here; use impl='torch'")
        if device.type != "cuda" and not kernels().INTERPRETED:
            raise ValueError(
                f"impl='triton' needs CUDA or HIP tensors (or TRITON_INTERPRET=1), got tensors on {device.type!r}; use impl='torch'"
            )
        chosen = eager if empty else kernels()
    return chosen if watcher is None else watcher(chosen)


_found: bool | None = None


def _triton_found() -> bool:
    global _found
    if _found is None:
        _found = has_triton()
    return _found
