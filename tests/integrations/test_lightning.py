"""The blocks of docs/recipes/lightning.md run, and its claims are assertions there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

PAGE = Path(__file__).resolve().parents[2] / "docs/recipes/lightning.md"


@pytest.mark.filterwarnings("ignore")  # what Lightning says of its own code and of a training as short as this
def test_the_recipe_runs() -> None:
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert any("assert" in block[1] for block in blocks)
    namespace: dict[str, Any] = {"__name__": "lightning_recipe"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        # Padded, so that a traceback names the page's own line.
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), namespace)
