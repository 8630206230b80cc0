"""The picture of `fastelbo compare`: the results that it shows, and that nothing of it is cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastelbo
from fastelbo.numerics import compare, report

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _plain_backend_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """conftest switches Triton's interpreter on, which would be compared too."""
    monkeypatch.setattr(compare, "backends", lambda: [("torch", torch.device("cpu"))])


def test_what_a_picture_shows() -> None:
    rows = [row for op in ("gaussian_kl", "elbo_loss", "gaussian_nll") for row in fastelbo.compare(op, "float32", (200, 1)).rows]
    assert tuple(report.drawn(rows)) == report.DRAWN
    # Where these were not compared, what eager PyTorch is off by the most.
    others = [row for row in rows if row.op in ("gaussian_kl/prior", "gaussian_nll/logvar")]
    assert report.drawn(others) == [("gaussian_kl/prior", "kl"), ("gaussian_kl/prior", "d prior_logvar")]
    # What is out of bounds comes first.
    bad = next(row for row in others if row.result == "nll")
    assert report.drawn([*rows, dataclasses.replace(bad, ok=False)]) == [
        ("gaussian_nll/logvar", "nll"),
        ("gaussian_kl/standard", "kl"),
    ]
    assert report.drawn([row for row in rows if row.op == "gaussian_nll/fixed"]) == []


@pytest.mark.parametrize(("op", "dtype"), [("gaussian_nll/logvar", "float32"), (None, None), ("negative_binomial_nll", "float32")])
def test_nothing_of_a_picture_is_cut(op: str | None, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figures: list[Any] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args: (figures.append(self), saved(self, *args)))
    ops = [op] if op else ["gaussian_kl", "elbo_loss/element"]
    rows = [row for name in ops for row in fastelbo.compare(name, dtype, (2000, 1)).rows]
    report.plot(rows, tmp_path / "x.png")
    (figure,) = figures
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert width * figure.dpi == 1000
    assert 0 <= box.x0 < box.x1 <= width
    assert 0 <= box.y0 < box.y1 <= height
    assert len(figure.axes) == 2 * len({row.dtype for row in rows})
    texts = [t.get_text() for t in figure.findobj(Text)]
    # The gradient of a log-variance near -50 is inf in eager PyTorch, and its KL in float16.
    assert ("lost: inf or NaN" in texts) == (op != "negative_binomial_nll")
    for axis in figure.axes:
        lowest, highest = axis.get_ylim()
        drawn = np.concatenate([line.get_ydata() for line in axis.lines])
        assert len(drawn) > 0
        assert lowest < drawn.min() <= drawn.max() < highest
