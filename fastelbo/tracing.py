"""Who looks on: torch.compile, a transform of torch.func.

Under torch.compile a public function is one node of the graph, which AOTAutograd opens.

Dynamo would trace through every check and helper, and verify all that it saw there before each call of the compiled code: more
time than a small loss takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, is_traceable_wrapper_subclass

Function = TypeVar("Function", bound=Callable[..., Any])

# What a size or a number is in a graph that serves them all.
INT: tuple[type[Any], ...] = int, torch.SymInt
FLOAT: tuple[type[Any], ...] = float, torch.SymFloat
NUMBER = *INT, *FLOAT


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def are_batched(gradients: Iterable[torch.Tensor]) -> bool:
    """Whether these come from `torch.autograd.grad(is_grads_batched=True)`, which has a vmap of its own."""
    return True in [torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients]


def is_watched(t: torch.Tensor) -> bool:
    """Whether something (torch.compile, jit.trace, a mode, vmap) wants to see what is computed from the tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


_ORDINARY = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def are_wrapped(tensors: Iterable[Any]) -> bool:
    """Whether a subclass that wraps other tensors, such as a DTensor, is among these. Tracers' own stand-ins are not meant."""
    if _ORDINARY.issuperset(map(type, tensors)):
        return False
    wrapped = [t for t in tensors if is_traceable_wrapper_subclass(t)]
    return not all(isinstance(t, FunctionalTensor) for t in wrapped)


nodes: list[Callable[..., Any]] = []


def one_node(function: Function) -> Function:
    """Decorate a function of tensors and numbers (not of functions), which has no effects."""
    nodes.append(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            # Marks the functions in a module of its own, which Dynamo imports when it gets here: torch._dynamo takes a second.
            from . import _nodes  # noqa: F401
        return function(*args, **kwargs)

    named: Any = call
    named.__code__ = named.__code__.replace(co_name=function.__name__)
    return named
