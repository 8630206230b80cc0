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
    """Within it, the tests of the kernels take less than half of the time.

    At each launch and each call of a device function, the interpreter replaces the functions of `triton.language` by its own.
    Nothing else calls them here, so once is enough. It also computes whether each sum, difference and product of integers
    overflows. Only its debug mode reads the answer.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    replace, scopes = interpreter._patch_lang, {}

    def replace_once(function: Any) -> Any:
        module = function.__globals__["__name__"]  # which is what decides which names are replaced
        if module not in scopes:
            scopes[module] = replace(function)
        return SimpleNamespace(restore=lambda: None)  # called after each launch

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    with patch.object(interpreter, "_patch_lang", replace_once), patch.object(builder, "options", options):
        yield
    for scope in filter(None, reversed(scopes.values())):  # older versions of Triton give none
        scope.restore()
