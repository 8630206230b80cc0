"""What `fastelbo compare` says: its rows, and their verdict, table, JSON and plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tolerance import LUCK, ORACLE_SLACK, SLACK

TOLD = 10  # failures that are printed

BOUND = (
    f"Bound: in every case the largest and the mean fused error are at most {LUCK} times eager's (in float32, where the inputs are "
    f"half precision) plus {SLACK:g} ulp; log2(n)/2 more for a sum of n terms; {ORACLE_SLACK:g} more in float64, where the oracle "
    "rounds too, and sqrt(n) for each matrix product there."
)


@dataclass(frozen=True)
class Errors:
    """Errors of one result over its elements. Those that are lost, inf or NaN where the truth is finite, are only counted."""

    max_ulp: float
    p99_ulp: float
    mean_ulp: float
    max_relative: float
    p99_relative: float
    mean_relative: float
    lost: int

    @classmethod
    def of(cls, ulp: Tensor, relative: Tensor) -> Errors:
        kept = ulp.isfinite()

        def figures(error: Tensor) -> tuple[float, float, float]:
            if not len(error):
                return math.nan, math.nan, math.nan
            # NumPy's percentile selects where torch's quantile sorts.
            return float(error.max()), float(np.percentile(error.numpy(), 99)), float(error.mean())

        return cls(*figures(ulp[kept]), *figures(relative[kept]), int((~kept).sum()))


@dataclass(frozen=True)
class Worst:
    """The element with the largest fused error, of those that eager does not lose."""

    index: tuple[int, ...]
    fused: float
    eager: float  # of the formula that judges
    exact: float
    fused_ulp: float
    eager_ulp: float
    inputs: dict[str, float]  # those that have one value for each element of the result


@dataclass(frozen=True)
class Row:
    """One result of one case. `eager` is the formula in the inputs' dtype, `widened` the same on half precision made float32."""

    backend: str
    device: str
    op: str
    result: str  # "kl" is a value, "d mu" the gradient in mu
    dtype: str
    shape: tuple[int, ...]
    logvar_range: tuple[float, float] | None
    elements: int
    fused: Errors
    eager: Errors
    widened: Errors | None
    library: Errors | None
    allowed_max_ulp: float
    allowed_mean_ulp: float
    ok: bool
    worst: Worst
    profile: list[tuple[float, float, float]]  # log-variance, and the largest fused and eager error about there, in ulp

    def __str__(self) -> str:
        """The row and its worst element, in a line."""
        w, fused = self.worst, self.fused
        where = f"logvar in {list(self.logvar_range)}" if self.logvar_range else "your tensors"
        off = f"{fused.max_ulp:.3g} ulp at most, {fused.mean_ulp:.3g} in the mean"
        if fused.lost:
            off = f"{fused.lost} of {self.elements} lost to inf or NaN" + (f", {off}" if fused.lost < self.elements else "")
        at = f"element {list(w.index)}" if w.index else "the value"
        inputs = "".join(f", {name} {value:.9g}" for name, value in w.inputs.items())
        return (
            f"{self.op}, {self.result}, {self.dtype} on {self.backend}, shape {self.shape}, {where}: {off}, where "
            f"{self.allowed_max_ulp:.3g} and {self.allowed_mean_ulp:.3g} are allowed. Worst, {at}: {w.fused:.9g} for "
            f"{w.exact:.9g}, off by {w.fused_ulp:.3g} ulp; eager {w.eager:.9g}, off by {w.eager_ulp:.3g}{inputs}"
        )


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `print` gives the verdict, `table()` and rich's `print` the table."""

    rows: list[Row] = field(repr=False)
    seed: int

    @property
    def ok(self) -> bool:
        """Whether every fused error is within its bound."""
        return not self.failures

    @property
    def failures(self) -> list[Row]:
        """The rows out of bounds, the worst first."""
        return sorted((row for row in self.rows if not row.ok), key=lambda row: -row.worst.fused_ulp / row.allowed_max_ulp)

    def to_json(self) -> str:
        """Everything except the profiles. JSON has no inf or NaN: they become "inf", "-inf" and "nan"."""
        rows = [{key: value for key, value in asdict(row).items() if key != "profile"} for row in self.rows]
        bound = {"luck": LUCK, "slack_ulp": SLACK, "oracle_slack_ulp": ORACLE_SLACK, "words": BOUND}
        facts = {"torch": torch.__version__, "seed": self.seed, "bound": bound, "ok": self.ok, "rows": rows}
        # Python's own reader is told of each inf and NaN that Python's own writer lets pass.
        return json.dumps(json.loads(json.dumps(facts), parse_constant=lambda name: str(float(name))), allow_nan=False)

    def __str__(self) -> str:
        lines, failures = [f"{len(self.rows)} results, seed {self.seed}. {BOUND}"], self.failures
        if not failures:
            return "\n".join([*lines, "All are within it."])
        told = [str(rows[0]) for rows in _grouped(failures, attrgetter("backend", "op", "result")).values()]
        more = [f"and {len(told) - TOLD} more kinds"] if len(told) > TOLD else []
        return "\n".join([*lines, f"{len(failures)} are NOT within it. The worst of each kind:", *told[:TOLD], *more])

    def table(self) -> str:
        """The table as plain text."""
        return "\n\n".join(_plain(title, lines) for title, lines in self._tables())

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*(_rich(title, lines) for title, lines in self._tables()))

    def _tables(self) -> Iterator[tuple[str, list[Line]]]:
        for kind, rows in _grouped(self.rows, attrgetter("dtype", "backend", "device")).items():
            yield "{}, backend {}, {}: largest error, 99th percentile and mean, in ulp".format(*kind), _lines(rows)


class Line(NamedTuple):
    cells: tuple[str, ...]
    style: str | None = None


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _lines(rows: list[Row]) -> list[Line]:
    """The heads, and a line for each result: the largest among its cases of each error."""
    heads = {"fused": "fused", "eager": "eager", "widened": "eager float32", "library": "torch's own"}
    shown = [key for key in heads if any(getattr(row, key) for row in rows)]
    out = [Line(("", *(heads[key] for key in shown), "relative: fused eager"))]
    for op, of_op in _grouped(rows, attrgetter("op")).items():
        out.append(Line((op, *("" for _ in shown), ""), "cyan"))
        for result, cases in _grouped(of_op, attrgetter("result")).items():
            of = {key: [e for row in cases if (e := getattr(row, key)) is not None] for key in shown}
            relative = " ".join(_power(_largest(of[key]).max_relative) for key in ("fused", "eager"))
            style = None if all(row.ok for row in cases) else "bold red"
            out.append(Line((f"  {result}", *(_cell(of[key]) for key in shown), relative), style))
    return out


def _rich(title: str, lines: list[Line]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in lines[0].cells:
        table.add_column(head.replace(": ", ":\n"), justify="right" if head else "left", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*line.cells, style=line.style)
    return table


def _plain(title: str, lines: list[Line]) -> str:
    widths = [max(map(len, column)) for column in zip(*(line.cells for line in lines), strict=True)]
    padded = ([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells, _ in lines)
    return "\n".join([title, *("  ".join(cells).rstrip() for cells in padded)])


def _largest(found: list[Errors]) -> Errors:
    """Of each figure the largest that is a number; of elements that are all lost there is none, which counts as inf."""
    return Errors(*np.nan_to_num(np.fmax.reduce([astuple(e) for e in found]), nan=math.inf, posinf=math.inf))


def _cell(found: list[Errors]) -> str:
    """The largest figures, each in three characters if it may be."""
    if not found:
        return ""
    of = _largest(found)
    figures = (math.inf if of.lost else of.max_ulp, of.p99_ulp, of.mean_ulp)
    first, *others = (f"{x:.1f}" if x < 9.95 else f"{x:.0f}" if x < 999.5 else _power(x) for x in figures)
    return " ".join([first, *(f"{text:>3}" for text in others)])


def _power(x: float) -> str:
    mantissa, *exponent = f"{x:.0e}".split("e")
    return "e".join([mantissa, *(str(int(n)) for n in exponent)])


# What a picture shows where it was compared: a value and a gradient that lose their digits in eager PyTorch near the prior.
DRAWN = (("gaussian_kl/standard", "kl"), ("elbo_loss/element", "d logvar"))


def drawn(rows: list[Row]) -> list[tuple[str, str]]:
    """The two results (op, result) that a picture shows: what is out of bounds, then DRAWN, then where eager is off the most."""

    def rank(row: Row) -> tuple[bool, bool, float]:
        return row.ok, (row.op, row.result) not in DRAWN, -np.nan_to_num(row.eager.max_ulp)

    found: list[tuple[str, str]] = []
    for row in sorted((row for row in rows if row.profile), key=rank):
        if all(row.result != result for _, result in found):
            found.append((row.op, row.result))
    return sorted(found[:2], key=lambda drawn: drawn[1].startswith("d "))


def plot(rows: list[Row], path: Path) -> None:
    """Draw the errors of two results against the log-variance: a panel for each, a row of them for each dtype and backend.

    Raises:
        ValueError: No result has an element for each log-variance.
    """
    from matplotlib.figure import Figure

    results = drawn(rows)
    if not results:
        raise ValueError("nothing to plot: no result that was compared has an element for each log-variance")
    rows = [row for row in rows if row.profile and (row.op, row.result) in results]
    shown = _grouped(rows, attrgetter("dtype", "backend", "device"))
    figure: Any = Figure(figsize=(10, 1.6 + 3.2 * len(shown)), dpi=100, layout="constrained")
    figure.suptitle(
        "Largest errors of fastelbo and of eager PyTorch against the float64 truth, in ulp:\n"
        "the gap to the next number of the dtype. Ten times as many are one decimal digit less.",
        x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    grid = figure.subplots(len(shown), len(results), sharex=True, sharey="row", squeeze=False)
    for axes, (kind, of_kind) in zip(grid, shown.items(), strict=True):
        points = {named: [p for row in of_kind if (row.op, row.result) == named for p in row.profile] for named in results}
        _scale(axes[0], [error for of in points.values() for _, *errors in of for error in errors])
        for axis, ((op, result), of) in zip(axes, points.items(), strict=True):
            what = f"gradient of {result[2:]}" if result.startswith("d ") else f"value of {result}"
            axis.set_title(f"{op}: {what}", loc="left", fontsize=12)
            _points(axis, of)
        axes[0].set_ylabel("{}, {} backend, {}\nlargest error (ulp)".format(*kind))
    for axis, (op, _) in zip(grid[-1], results, strict=True):
        axis.set_xlabel("logarithm of theta" if "binomial" in op else "log-variance, less the prior's")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


FLOOR = 0.1  # ulp; what is off by less is drawn there


def _scale(axis: Any, errors: list[float]) -> None:
    """The scale of errors that a row of panels has in common: two decades at the top are left for what is lost, where any is."""
    finite = np.isfinite(errors)
    decades = math.ceil(math.log10(max(1e3, 2 * np.max(errors, initial=1, where=finite))))
    axis.set(yscale="log", ylim=(FLOOR / 2, 10.0 ** (decades if finite.all() else decades + 2)))
    axis.set_yticks([10.0**n for n in range(-1, decades + 1, 1 + decades // 8)])
    axis.minorticks_off()


def _points(axis: Any, points: list[tuple[float, float, float]]) -> None:
    at, fused, eager = np.array(points).reshape(-1, 3).T
    top = axis.get_ylim()[1]
    for errors, marker, colour, label in ((eager, "D", "#D55E00", "eager PyTorch"), (fused, "s", "#0072B2", "fastelbo")):
        # An infinite error, of an element that is inf or NaN and should not be, has no place on the scale.
        height = np.where(np.isfinite(errors), errors.clip(FLOOR), top / 10)
        axis.plot(at, height, marker, color=colour, markersize=5, markerfacecolor="none" if marker == "D" else colour, label=label)
    if not np.isfinite([fused, eager]).all():
        axis.axhspan(top / 100, top, color="#e5e5e5", zorder=0)
        axis.text(0.97, 0.7 * top, "lost: inf or NaN", transform=axis.get_yaxis_transform(), ha="right", va="top")
    axis.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    axis.set_xticks([-10, -0.1, 0, 0.1, 10], ["-10", "-0.1", "0", "0.1", "10"])
    axis.minorticks_off()
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
