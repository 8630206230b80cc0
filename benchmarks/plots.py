"""The picture of a device's results: time and memory as bars, and speed against a plain copy's. Legible at 1000 pixels' width."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .records import LOSSES, WORDS, Record, figures, mebibytes, right, speedup

# Colours of Okabe and Ito, which colour-blind readers tell apart; what is compiled is hatched too.
STYLES = {
    "fastelbo": {"color": "#0072B2"},
    "compiled fastelbo": {"color": "#56B4E9", "hatch": "////"},
    "compiled eager": {"color": "#E69F00", "hatch": "////"},
    "torch parts": {"color": "#999999"},
}
INK, FAINT = "#222222", "#bbbbbb"
DPI, WIDTH = 100, 10.0  # inches
BAR = 0.115  # inches of height for each bar
BARS = len(STYLES) + 1.4  # and what is free between the groups
LABEL = 0.2  # inches between the labels of points

Groups = dict[str, list[Record]]


def pictures(records: list[Record], stem: Path) -> dict[Path, list[Record]]:
    """Of each dtype its file, and what is shown there: the records with right numbers, since others have no speed."""
    found: dict[Path, list[Record]] = defaultdict(list)
    for (_, dtype), runs in right(records).items():
        found[stem.with_name(f"{stem.name}-{dtype}.png")] += runs
    return found


def draw(name: str, records: list[Record], path: Path) -> None:
    """Records of one device and one dtype."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups = {LOSSES[workload]: runs for (workload, _), runs in right(records).items()}
    groups = dict(sorted(groups.items(), key=lambda item: faster(item[1], "fastelbo")))
    # Matrix products are bound by arithmetic.
    moving = {loss: runs for loss, runs in groups.items() if not runs[0]["flops_step"]}
    about = records[0]["about"]
    heights = [BAR * BARS * len(groups) + 1.3, *([max(3.0, LABEL * len(moving)) + 1.1] if moving else [])]
    with rc_context({"font.size": 11, "hatch.linewidth": 0.7, "hatch.color": "white", "text.color": INK, "axes.edgecolor": INK}):
        figure: Any = Figure(figsize=(WIDTH, sum(heights) + 1.2), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1)
        figure.suptitle(
            f"One training step of a loss, forward and backward, in {records[0]['dtype']}\n"
            f"{name}\n"
            f"torch {about['torch']}, fastelbo at {about['commit']}, {about['date']}",
            x=0.01, ha="left", fontsize=12,
        )  # fmt: skip
        above, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        left, middle = above.subplots(1, 2, sharey=True)
        beside_eager(left, groups, faster, "times faster than eager PyTorch")
        beside_eager(middle, groups, smaller, "times less memory than eager PyTorch")
        left.set_yticks(range(len(groups)), groups)
        above.legend(
            *left.get_legend_handles_labels(), loc="outside upper center", ncols=len(STYLES), frameon=False, handlelength=1.6
        )
        for part in below:
            roofline(part.subplots(), moving)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})


def faster(runs: list[Record], peer: str) -> float:
    return speedup(runs, peer, over="eager")


def smaller(runs: list[Record], peer: str) -> float:
    return mebibytes(runs, "eager") / mebibytes(runs, peer)


def beside_eager(axis: Any, groups: Groups, value: Callable[[list[Record], str], float], title: str) -> None:
    """Bars from 1, which is eager: to the right what is better, to the left what is worse, and as far for half as for twice."""
    height = 1 / BARS
    found = {peer: [value(runs, peer) for runs in groups.values()] for peer in STYLES}
    for i, (peer, style) in enumerate(STYLES.items()):
        at = [y + height * ((len(STYLES) - 1) / 2 - i) for y in range(len(groups))]
        axis.barh(at, [v - 1 for v in found[peer]], height, left=1, label=WORDS[peer], **style)
    every = [v for values in found.values() for v in values]
    lowest, highest = min(0.5, *every), max(2.0, *every)
    for y, v in enumerate(found["fastelbo"]):
        axis.annotate(
            f"{v:.1f}" if v >= 1 else f"{v:.2g}", (max(v, 1), y + height * (len(STYLES) - 1) / 2), (3, 0),
            textcoords="offset points", va="center", fontsize=9, color=STYLES["fastelbo"]["color"], fontweight="bold",
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    ticks = [2.0**i for i in range(math.floor(math.log2(lowest)), math.ceil(math.log2(highest)) + 1)]
    axis.set_xticks(ticks, [f"{t:g}" if t >= 1 else f"1/{1 / t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlim(lowest / 1.1, highest * 1.35)
    axis.axvline(1, color=INK, linewidth=1.2)
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_ylim(-0.6, len(groups) - 0.4)
    axis.set_title(title, loc="left", fontsize=12)
    axis.set_xlabel("worse  ←  1: as eager PyTorch  →  better")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def roofline(axis: Any, groups: Groups) -> None:
    """Bytes per second of fastelbo and eager against the bytes of a step."""
    from matplotlib.ticker import LogLocator

    copy = statistics.median(r["copy_gb_per_s"] for runs in groups.values() for r in runs)
    points = []
    for name, runs in groups.items():
        x = runs[0]["bytes_step"] / 1e6
        speeds = {peer: statistics.median(figures(runs, peer, "gb_per_s")) for peer in ("fastelbo", "eager")}
        points.append((speeds["fastelbo"], x, name))
        axis.plot([x, x], list(speeds.values()), color=FAINT, linewidth=1, zorder=1)
        axis.plot(x, speeds["fastelbo"], "o", color=STYLES["fastelbo"]["color"], markersize=7)
        axis.plot(x, speeds["eager"], "D", color=INK, markersize=5, markerfacecolor="white")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.minorticks_off()
    top = 1.15 * max(copy, max(points)[0])
    axis.set_ylim(0, top)
    axis.axhline(copy, color="#D55E00", linewidth=1.5, linestyle="--")
    axis.annotate(f"speed of a plain copy, {copy:,.0f} GB/s", (0, copy), (4, 5), xycoords=("axes fraction", "data"),
                  textcoords="offset points", color="#D55E00")  # fmt: skip
    # Names stand beside the panel in the order of the points' heights: in it they would cover each other.
    for i, (y, x, name) in enumerate(sorted(points)):
        axis.annotate(
            name, (x, y), (1.02, (i + 0.5) / len(points)), textcoords="axes fraction", va="center", fontsize=10,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)},
            zorder=0,
        )  # fmt: skip
    axis.plot([], [], "o", color=STYLES["fastelbo"]["color"], markersize=7, label=WORDS["fastelbo"])
    axis.plot([], [], "D", color=INK, markersize=5, markerfacecolor="white", label=WORDS["eager"])
    axis.legend(loc="upper left", frameon=False, bbox_to_anchor=(0, copy / top - 0.02))
    axis.set_title("how fast memory is read and written (GB/s); losses with a matrix product are left out", loc="left", fontsize=12)
    axis.set_xlabel("bytes that the step must read and write at least (MB)")
    axis.spines[["top", "right"]].set_visible(False)
