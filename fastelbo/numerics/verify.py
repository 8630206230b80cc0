"""`fastelbo.verify`: inside it, fused calls of a user's own program are also run through the oracle, forward and backward.

Every fused call asks `backend.choose` for its backend once and keeps the answer for its backward. So inside the context `choose`
answers with a backend whose ops run the chosen one's and compare what they returned. No other module knows of it.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import backend
from ..specs import Backend, Gradients, Needs, Op
from .oracle import OUTPUTS, Oracle
from .tolerance import Truth, mismatch, shown_fields

Function = TypeVar("Function", bound=Callable[..., Any])
UNUSED = "this fastelbo.verify was never entered and checked nothing: use it in a `with` statement or as a decorator"


class NumericsMismatch(AssertionError):
    """A fused result differs from the float64 oracle by more than `fastelbo.verify` allows.

    Not a RuntimeError: training loops catch those to survive running out of memory.
    """


_lock = threading.Lock()
_active: list[verify] = []


class verify(ContextDecorator):
    """Check fused calls against the float64 oracle, forward and backward: for the first day in a training loop.

        with fastelbo.verify(every=100) as report:
            train()
        print(report)

    It decorates functions too (`@fastelbo.verify(every=100)`), each call of which then runs inside the context. An instance that is
    neither entered nor decorates a function says so in a UserWarning when it is collected or Python exits.

    A call is one that reaches a backend, in eager mode and on whichever thread: the context is the whole process's. The backward of
    a checked call is checked too, even after the context was left. Contexts nest, and each counts for itself.

    Not checked: what torch.compile traces or a CUDA graph captures, calls with impl="reference", and backwards with
    `create_graph=True`, which differentiate the reference anyway. Results are not touched: they have the same bits with and
    without the context. A checked call reads values back to the host and takes several float64 copies of its inputs. One whose
    forward pass makes the gradients, as that of `elbo_loss` does, keeps a copy until its first backward hands them over: that is
    where they are compared, multiplied by the upstream gradient, as the caller gets them.

    Args:
        every: N >= 1. Of each N consecutive calls one is checked: of the first N the first, of the next the second, and so on. (A
            fixed step of 100 would only ever meet one of the two calls that a training step makes.)
        rtol: Tolerance of the arithmetic, relative to the size of a result, at least 0; None is 2e-5, and 1e-11 for float64. What
            results and operands lose in their dtypes is allowed on top: fastelbo/numerics/tolerance.py has the whole rule.
        on_mismatch: "raise" raises NumericsMismatch, out of the call or out of its backward; "warn" issues a RuntimeWarning for
            each result that differs.

    Attributes:
        calls: Fused calls inside the context.
        checked: Those of them whose values were compared.
        backwards: Backward passes whose gradients were compared.
        mismatches: Results, of either, that differ.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value.
    """

    def __init__(self, *, every: int = 1, rtol: float | None = None, on_mismatch: str = "raise") -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if rtol is not None and (isinstance(rtol, bool) or not isinstance(rtol, (int, float))):
            raise TypeError(f"rtol must be a number or None, got {type(rtol).__name__}")
        if rtol is not None and not 0 <= rtol < math.inf:
            raise ValueError(f"rtol must be finite and not negative, got {rtol}")
        if on_mismatch not in ("raise", "warn"):
            raise ValueError(f"on_mismatch must be 'raise' or 'warn', got {on_mismatch!r}")
        self.every, self.rtol, self.on_mismatch = every, rtol, on_mismatch
        self.calls = self.checked = self.backwards = self.mismatches = 0
        code = sys._getframe(1)
        self._unused = weakref.finalize(self, warnings.warn_explicit, UNUSED, UserWarning, code.f_code.co_filename, code.f_lineno)

    def __enter__(self) -> verify:
        self._unused.detach()
        with _lock:
            _active.append(self)
            backend.watcher = _watch
        return self

    def __exit__(self, *error: object) -> None:
        # Not whichever is last: contexts of several threads need not be left in the order of their entry.
        with _lock:
            _active.remove(self)
            backend.watcher = _watch if _active else None

    def __call__(self, function: Function) -> Function:
        given: object = function
        if not callable(given) or isinstance(given, type):
            raise TypeError(f"verify decorates functions, got {given!r}")
        if any(is_so(given) for is_so in (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
            # The body runs after the call has returned, outside the context.
            raise TypeError(f"verify cannot decorate {function.__name__}, which runs in pieces: use `with` inside it")
        self._unused.detach()
        return super().__call__(function)

    def __repr__(self) -> str:
        settings = f"every={self.every}, rtol={self.rtol}, on_mismatch={self.on_mismatch!r}"
        counts = ", ".join(f"{getattr(self, name)} {name}" for name in ("calls", "checked", "backwards", "mismatches"))
        return f"<fastelbo.verify({settings}): {counts}>"

    def _count(self, what: str) -> int:
        """How many there were before."""
        with _lock:
            before: int = getattr(self, what)
            setattr(self, what, before + 1)
        return before


def _watch(chosen: Backend) -> Backend:
    """What `backend.choose` returns for a fused call inside a context."""
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return chosen
    served, caller = chosen, _caller()
    if caller.startswith("_"):
        return chosen  # an operator of a compiled function, which was traced
    for context in tuple(_active):
        block, place = divmod(context._count("calls"), context.every)
        if block % context.every == place:
            ops = {name: _Checked(context, caller, chosen.name, name, getattr(served, name)) for name in OUTPUTS}
            checked: dict[str, Any] = {name: Op(op.forward, op.backward) for name, op in ops.items()}
            served = served._replace(**checked)
    return served


def _caller() -> str:
    """The public function that asked for a backend: the outermost of the frames that are this package's own."""
    frame: FrameType | None = sys._getframe(3)  # past this function, _watch and choose
    name = ""
    while frame is not None and frame.f_globals.get("__name__", "").startswith("fastelbo."):
        owner = frame.f_locals.get("self")
        name = frame.f_code.co_name if owner is None else f"{type(owner).__name__}.{frame.f_code.co_name}"
        frame = frame.f_back
    return name


@dataclass(eq=False)
class _Checked:
    """An op for one fused call, which checks what the real one returns."""

    context: verify
    caller: str
    by: str
    name: str
    op: Op
    spec: Any = None  # of the forward pass, if it ran here: backward is held to it, whatever it is given
    ready: Oracle | None = None  # what the gradients are held to that the forward pass made, until they are handed over
    roundings: int = 1  # of a gradient; 2 where it is made for an upstream gradient of 1, and scaled later

    def forward(self, inputs: Any, spec: Any, needs: Needs) -> tuple[tuple[Tensor | None, ...], Any]:
        outputs, kept = self.op.forward(inputs, spec, needs)
        oracle = Oracle(self.name, inputs, spec, needs)
        self.spec = spec
        if _holds_tensors(kept):
            self.ready, self.roundings = oracle, 2
        self.context._count("checked")
        self._compare("forward", {**inputs._asdict(), "spec": spec, "needs": needs}, OUTPUTS[self.name], outputs, oracle.values())
        return outputs, kept

    def backward(self, inputs: Any, spec: Any, grad_outputs: Gradients, needs: Needs, kept: Any, **memory: Any) -> Gradients:
        gradients = self.op.backward(inputs, spec, grad_outputs, needs, kept, **memory)
        held_to = spec if self.spec is None else self.spec
        ready, self.ready = self.ready if kept is not None else None, None
        truths = (ready or Oracle(self.name, inputs, held_to, needs)).gradients(grad_outputs)
        if truths is not None:
            self.context._count("backwards")
            # What counts for a caller's own memory is what lies there.
            got = (*memory.get("out", gradients[:2]), *gradients[2:])
            names = [f"the gradient of {_argument(field, inputs, held_to)}" for field in inputs._fields]
            ups = {f"grad_{name}": up for name, up in zip(OUTPUTS[self.name], grad_outputs, strict=False)}
            given = {**inputs._asdict(), "spec": spec, **ups, "needs": needs}
            self._compare("backward", given, names, got, truths, self.roundings)
        return gradients

    def _compare(
        self, step: str, given: dict[str, Any], names: Sequence[str], results: Gradients, truths: Sequence[Truth | None],
        roundings: int = 1,
    ) -> None:  # fmt: skip
        for name, got, truth in zip(names, results, truths, strict=False):
            wrong = None if truth is None else mismatch(name, got, truth, self.context.rtol, roundings)
            if wrong is not None:
                self.context._count("mismatches")
                message = f"{self.caller}: {wrong}; by {self.by}, {self.name}.{step}({shown_fields(given)})"
                if self.context.on_mismatch == "raise":
                    raise NumericsMismatch(message)
                warnings.warn(message, RuntimeWarning, stacklevel=2)


def _argument(field: str, inputs: Any, spec: Any) -> str:
    """The name that a public function has for a field of the inputs."""
    if field == "variance":
        return "recon_logvar" if hasattr(inputs, "mu") else str(getattr(spec, "likelihood", spec).parameter)
    return field.replace("spread", spec.kl.parameter) if field.endswith("spread") else field


def _holds_tensors(kept: Any) -> bool:
    return any(map(_holds_tensors, kept)) if isinstance(kept, (tuple, list)) else isinstance(kept, Tensor)
