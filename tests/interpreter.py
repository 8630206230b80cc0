"""Triton's interpreter without the work that changes no result."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Within it, the tests of the kernels take much less time.

    At each launch and each call of a device function, the interpreter replaces the functions of `triton.language` by its own.
    Nothing else calls them here, so once is enough. It also computes whether each sum, difference and product of integers
    overflows. Only its debug mode reads the answer. At each operation it makes a table of NumPy's dtypes, and it names the types
    of all elements of each tuple, which are rarely read.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language import core
    from triton.runtime import interpreter

    replace, scopes = interpreter._patch_lang, {}

    def replace_once(function: Any) -> Any:
        module = function.__globals__["__name__"]  # which is what decides which names are replaced
        if module not in scopes:
            scopes[module] = replace(function)
        return SimpleNamespace(restore=lambda: None)  # called after each launch

    slow_dtype, dtypes, make_tuple = interpreter._get_np_dtype, {}, core.tuple.__init__

    def dtype_of(ty: Any) -> Any:
        if type(ty) is not core.dtype:  # of a pointer or a block
            return slow_dtype(ty)
        if ty.name not in dtypes:
            dtypes[ty.name] = slow_dtype(ty)
        return dtypes[ty.name]

    def keep_values(self: Any, args: Any, type: Any = None) -> None:
        self.values, self.type = list(args), None
        if type is not None:
            make_tuple(self, args, type)

    def type_when_read(self: Any) -> Any:
        if self._type is None:
            make_tuple(self, self.values)
        return self._type

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    with (
        patch.object(interpreter, "_patch_lang", replace_once),
        patch.object(interpreter, "_get_np_dtype", dtype_of),
        patch.object(core.tuple, "__init__", keep_values),
        patch.object(core.tuple, "type", property(type_when_read, lambda self, ty: setattr(self, "_type", ty)), create=True),
        patch.object(builder, "options", options),
    ):
        yield
    for scope in filter(None, reversed(scopes.values())):  # older versions of Triton give none
        scope.restore()
