"""The README's Python runs, block after block, and its claims are assertions there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks() -> list[tuple[int, str]]:
    """(line, source) of every Python block."""
    found = re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [(TEXT[: m.start(1)].count("\n"), m.group(1)) for m in found]


def test_blocks_run() -> None:
    namespace: dict[str, Any] = {"__name__": "readme"}
    for line, source in blocks():
        # Padded, so that a traceback names the README's own line.
        exec(compile("\n" * line + source, str(ROOT / "README.md"), "exec"), namespace)


def test_every_block_after_the_first_asserts() -> None:
    first, *rest = blocks()
    assert "assert_close" in first[1]
    for line, source in rest:
        assert re.search(r"\bassert\b|assert_close|assert_same", source), f"README.md:{line} asserts nothing"


def test_local_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", TEXT)
    assert "CONTRIBUTING.md" in links
    for link in links:
        assert (ROOT / link).is_file(), link


@pytest.mark.parametrize("command", ["make demo", "make test", "fastelbo info"])
def test_commands_are_named(command: str) -> None:
    assert command in TEXT
