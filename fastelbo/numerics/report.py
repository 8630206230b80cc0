"""What `fastelbo compare` says: its rows, and their verdict, table, JSON and plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .tolerance import LUCK, ORACLE_SLACK, SLACK

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

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


# ---- the verdict, in words and in a table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `print` gives the verdict, rich's `print` the table."""

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
        return json.dumps(_without_inf(facts), allow_nan=False)

    def __str__(self) -> str:
        lines = [f"{len(self.rows)} results, seed {self.seed}. {BOUND}"]
        if self.ok:
            return "\n".join([*lines, "All are within it."])
        worst: dict[tuple[str, ...], Row] = {}
        for row in self.failures:
            worst.setdefault((row.backend, row.op, row.result), row)
        told = [_tell(row) for row in worst.values()]
        more = [f"and {len(told) - TOLD} more kinds"] if len(told) > TOLD else []
        return "\n".join([*lines, f"{len(self.failures)} are NOT within it. The worst of each kind:", *told[:TOLD], *more])

    def __rich__(self) -> Group:
        from rich.console import Group

        kinds = dict.fromkeys((row.backend, row.device, row.dtype) for row in self.rows)
        return Group(*(_table(kind, [r for r in self.rows if (r.backend, r.device, r.dtype) == kind]) for kind in kinds))


def _without_inf(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_inf(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_inf(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _tell(row: Row) -> str:
    """A failure and its worst element, in a line."""
    w = row.worst
    where = f"logvar in {list(row.logvar_range)}" if row.logvar_range else "your tensors"
    inputs = "".join(f", {name} {value:.9g}" for name, value in w.inputs.items())
    off = f"{row.fused.max_ulp:.3g} ulp at most, {row.fused.mean_ulp:.3g} in the mean"
    if row.fused.lost:
        off = f"{row.fused.lost} of {row.elements} lost to inf or NaN" + (f", {off}" if row.fused.lost < row.elements else "")
    at = f"element {list(w.index)}" if w.index else "the value"
    return (
        f"{row.op}, {row.result}, {row.dtype} on {row.backend}, shape {row.shape}, {where}: {off}, where {row.allowed_max_ulp:.3g} "
        f"and {row.allowed_mean_ulp:.3g} are allowed. Worst, {at}: {w.fused:.9g} for {w.exact:.9g}, off by {w.fused_ulp:.3g} ulp; "
        f"eager {w.eager:.9g}, off by {w.eager_ulp:.3g}{inputs}"
    )


def _digits(x: float) -> str:
    """Two digits, in three characters if it may be."""
    return f"{x:.1f}" if x < 9.95 else f"{x:.0f}" if x < 999.5 else _power(x)


def _power(x: float) -> str:
    mantissa, _, exponent = f"{x:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _largest(found: Iterable[float]) -> float:
    """The largest that is a number; of elements that are all lost there is none."""
    return max((x for x in found if not math.isnan(x)), default=math.inf)


def _table(kind: tuple[str, str, str], rows: list[Row]) -> Table:
    """A line for each result: the largest among its cases of the largest error, of the 99th percentile and of the mean."""
    from rich import box
    from rich.table import Table

    name, device, dtype = kind
    title = f"{dtype}, backend {name}, {device}: largest error, 99th percentile and mean, in ulp"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    heads = {"fused": "fused", "eager": "eager", "widened": "eager float32", "library": "torch's own"}
    shown = {key: head for key, head in heads.items() if any(getattr(row, key) for row in rows)}
    for head in ("", *shown.values(), "relative:\nfused eager"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)

    for op in dict.fromkeys(row.op for row in rows):
        table.add_row(op, style="cyan")
        for result in dict.fromkeys(row.result for row in rows if row.op == op):
            cases = [row for row in rows if (row.op, row.result) == (op, result)]
            of = {key: [e for row in cases if (e := getattr(row, key)) is not None] for key in shown}
            cells = [_cell(of[key]) for key in shown]
            relative = " ".join(_power(_largest(e.max_relative for e in of[key])) for key in ("fused", "eager"))
            table.add_row(f"  {result}", *cells, relative, style=None if all(row.ok for row in cases) else "bold red")
    return table


def _cell(found: list[Errors]) -> str:
    if not found:
        return ""
    largest = math.inf if any(e.lost for e in found) else max(e.max_ulp for e in found)
    p99, average = _largest(e.p99_ulp for e in found), _largest(e.mean_ulp for e in found)
    return f"{_digits(largest)} {_digits(p99):>3} {_digits(average):>3}"


def plot(rows: list[Row], path: Path) -> None:
    """Draw every elementwise error against its log-variance: a row for each function, a column for each dtype.

    Raises:
        ValueError: No result has an element for each log-variance.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.profile]
    if not rows:
        raise ValueError("nothing to plot: no result that was compared has an element for each log-variance")
    panels: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row in rows:
        panels.setdefault((row.op.split("/")[0], row.dtype), []).extend(row.profile)
    functions, dtypes = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))

    ink, grey, accent = "#222222", "#9a9a9a", "#d1495b"
    lowest, highest = 0.1, 1e9
    figure: Any = Figure(figsize=(1.2 + 3.1 * len(dtypes), 1.2 + 1.6 * len(functions)), dpi=110, layout="constrained")
    figure.suptitle("Largest errors of values and gradients against the log-variance (less the prior's)", fontsize=10, color=ink)
    grid = figure.subplots(len(functions), len(dtypes), sharex=True, sharey=True, squeeze=False)
    for (function, dtype), points in panels.items():
        axis = grid[functions.index(function), dtypes.index(dtype)]
        at = [p[0] for p in points]
        for column, colour, size, label in ((2, grey, 5, "eager"), (1, accent, 3, "fused")):
            # No error and an infinite one have no place on a logarithmic axis: they are drawn on its edges.
            heights = [min(max(p[column], lowest), highest) for p in points]
            axis.plot(at, heights, ".", color=colour, markersize=size, markeredgewidth=0, label=label)
        axis.set_xscale("symlog", linthresh=0.01, linscale=0.5)
        axis.set(yscale="log", ylim=(lowest / 2, highest * 2), xticks=[-10, -0.1, 0, 0.1, 10], yticks=[1, 1e3, 1e6])
        axis.minorticks_off()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis, dtype in zip(grid[0], dtypes, strict=True):
        axis.set_title(dtype, fontsize=9, color=ink)
    for axis, function in zip(grid[:, 0], functions, strict=True):
        axis.set_ylabel(f"{function}\nulp", fontsize=8, color=ink)
    grid[0, 0].legend(frameon=False, fontsize=8, markerscale=3, loc="upper left", ncols=2)
    figure.savefig(path)
