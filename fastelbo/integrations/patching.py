"""What the adapters share: a check of the version, replacements that are undone exactly, and a patch that is made once."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


def check_version(library: str, known: str) -> None:
    """Refuse every version of a library except the one whose code an adapter was written against.

    Raises:
        ImportError: The library is not installed, or in another version.
    """
    try:
        installed = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"fastelbo patches {library} {known}, but no {library} is installed", name=library) from None
    if installed != known:
        raise ImportError(f"fastelbo patches {library} {known}, but {library} {installed} is installed", name=library)


@contextmanager
def replaced(replacements: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set the attribute `name` of `owner` for each (owner, name, new); afterwards each owner has again exactly what it had."""
    with ExitStack() as undo:
        for owner, name, new in replacements:
            if name in vars(owner):
                undo.callback(setattr, owner, name, vars(owner)[name])
            else:  # inherited
                undo.callback(delattr, owner, name)
            setattr(owner, name, new)
        yield


class Patch:
    """What a context manager changes, made by the first of many `apply` and undone by `undo`."""

    def __init__(self, change: Callable[[], AbstractContextManager[None]]):
        self._change = change
        self._made: ExitStack | None = None
        self._lock = threading.Lock()

    def apply(self) -> AbstractContextManager[object]:
        """Make the change. As a context the result leaves what it found: it undoes the change if this call has made it."""
        scope = ExitStack()
        with self._lock:
            if self._made is None:
                made = ExitStack()
                made.enter_context(self._change())
                self._made = made
                scope.callback(self.undo)
        return scope

    def undo(self) -> None:
        """Undo the change, if it is made."""
        with self._lock:
            made, self._made = self._made, None
            if made is not None:
                made.close()
