"""The README's table and the plots, from the committed results: no figure there is typed by hand.

`benchmarks/results/*.jsonl` hold one record a line, as `python -m benchmarks` writes them. Of each device the newest torch and
fastelbo stand; several runs of one commit are shown together, as medians over the runs with their range.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from .measure import PEERS
from .workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: begin, written by `python -m benchmarks report` -->", "<!-- benchmarks: end -->"
NUMERICS_BEGIN, NUMERICS_END = "<!-- numerics: begin, written by `python -m benchmarks report` -->", "<!-- numerics: end -->"
OTHERS = [p for p in PEERS if p != "fastelbo"]

Record = dict[str, Any]
Device = tuple[str, str]  # its name, and a slug for files


def main(results: Path, readme: Path, docs: Path, check: bool) -> int:
    records = load(results)
    if not records:
        print(f"no records in {results}/*.jsonl", file=sys.stderr)
        return 2
    stale = False
    pages = [(readme, BEGIN, END, tables(records))]
    if (compared := results / "numerics-cpu.json").exists():
        pages.append((docs / "numerics.md", NUMERICS_BEGIN, NUMERICS_END, numerics(json.loads(compared.read_text())["rows"])))
    for page, begin, end, table in pages:
        text = page.read_text()
        if text.count(begin) != 1 or text.count(end) != 1:
            print(f"{page} must hold the lines {begin!r} and {end!r} once each", file=sys.stderr)
            return 2
        head, rest = text.split(begin)
        new = f"{head}{begin}\n{table}{end}{rest.split(end)[1]}"
        if check and new != text:
            print(f"the table in {page} is not what {results} says: run `python -m benchmarks report`", file=sys.stderr)
            stale = True
        if not check:
            page.write_text(new)
    if not check:
        for (name, slug), of_device in by_device(records).items():
            plot(name, of_device, docs / f"bench-{slug}.png")
    return int(stale)


def numerics(rows: list[Record]) -> str:
    """From what `fastelbo compare --json` wrote: an op's results, over its shapes and ranges."""
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for row in rows:
        found[row["op"], row["result"]].append(row)

    def worst(group: list[Record], of: str, what: str) -> str:
        values = [row[of][what] for row in group if row[of] is not None]
        return f"{max(values):.2g}" if values else ""

    headings = ["op", "result", "fused: worst, mean", "eager: worst, mean", "torch's own: worst", "lost, of fused and of eager"]
    lines = [f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|\n"]
    for (op, result), group in found.items():
        errors = [f"{worst(group, of, 'max_ulp')}, {worst(group, of, 'mean_ulp')}" for of in ("fused", "eager")]
        lost = [sum(row[of]["lost"] for row in group) for of in ("fused", "eager")]
        cells = [op, result, *errors, worst(group, "library", "max_ulp"), f"{lost[0]}, {lost[1]}" if any(lost) else ""]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def load(folder: Path) -> list[Record]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def by_device(records: list[Record]) -> dict[Device, list[Record]]:
    """Each device's records of its newest day and commit, quick runs left out where there are others."""
    found: dict[Device, list[Record]] = defaultdict(list)
    for r in records:
        name = r["about"]["device"] + (f", {r['about']['threads']} threads" if r["about"]["driver"] is None else "")
        found[name, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")].append(r)
    for device, of_device in found.items():
        thorough = [r for r in of_device if not r["quick"]] or of_device
        newest = max(thorough, key=lambda r: r["about"]["date"])["about"]
        found[device] = [r for r in thorough if (r["about"]["date"], r["about"]["commit"]) == (newest["date"], newest["commit"])]
    return dict(sorted(found.items()))


def cases(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """The runs of each (workload, dtype), in the suite's order."""
    order = {w.name: i for i, w in enumerate(WORKLOADS)}
    runs: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in sorted(records, key=lambda r: (-len(r["dtype"]), order.get(r["workload"], len(order)))):
        runs[r["workload"], r["dtype"]].append(r)
    return runs


def figure(runs: list[Record], peer: str, *path: str) -> list[float]:
    """One figure of a peer in each run that has it."""
    values = []
    for r in runs:
        value: Any = r.get("peers", {}).get(peer)
        for key in path:
            value = None if value is None else value[key]
        if value is not None:
            values.append(value)
    return values


def ratios(runs: list[Record], peer: str) -> list[float]:
    """How many times faster than `peer` a step of fastelbo was, in each run."""
    pairs = zip(figure(runs, peer, "step_us", "median"), figure(runs, "fastelbo", "step_us", "median"), strict=True)
    return [other / ours for other, ours in pairs]


def span(values: list[float], form: str) -> str:
    """The median, with the range where there are several."""
    if not values:
        return ""
    shown = f"{statistics.median(values):{form}}"
    return f"{shown} ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else shown


def tables(records: list[Record]) -> str:
    parts = []
    for (name, _), of_device in by_device(records).items():
        about = of_device[0]["about"]
        runs = max(len(r) for r in cases(of_device).values())
        driver = f", driver {about['driver']}" if about["driver"] else ""
        triton = f", triton {about['triton']}" if about["driver"] else ""
        copies = span([r["copy_gb_per_s"] for r in of_device], ".0f")
        versions = f"torch {about['torch']}{triton}, fastelbo {about['fastelbo']} at {about['commit']}, {about['date']}"
        shown = "one run" if runs == 1 else f"medians of {runs} runs and their range"
        headings = [
            "workload", "elements", "dtype", "fastelbo, us", *(f"x {p}" for p in OTHERS[:3]),
            "compiled x compiled eager", "of a copy", "MiB, eager's",
        ]  # fmt: skip
        parts.append(f"**{name}**{driver}: {versions}; {shown}. A copy moves {copies} GB/s.\n\n")
        parts.append(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|\n")
        for (workload, dtype), group in cases(of_device).items():
            if any(r["wrong"] for r in group):
                parts.append(f"| {workload} | {group[0]['elements']:,} | {dtype} | wrong numbers, no speed | | | | | | |\n")
                continue
            compiled = [
                a / b
                for a, b in zip(
                    figure(group, "compiled eager", "step_us", "median"),
                    figure(group, "compiled fastelbo", "step_us", "median"),
                    strict=True,
                )
            ]
            memory = [statistics.median(figure(group, p, "peak_bytes")) / 2**20 for p in ("fastelbo", "eager")]
            cells = [
                workload, f"{group[0]['elements']:,}", dtype, span(figure(group, "fastelbo", "step_us", "median"), ",.0f"),
                *(span(ratios(group, p), ".2f") for p in OTHERS[:3]), span(compiled, ".2f"),
                f"{statistics.median(figure(group, 'fastelbo', 'share_of_copy')):.0%}", f"{memory[0]:.1f}, {memory[1]:.1f}",
            ]  # fmt: skip
            parts.append(f"| {' | '.join(cells)} |\n")
        parts.append("\n")
    return "".join(parts)


def plot(name: str, records: list[Record], path: Path) -> None:
    """Speed-up over eager, share of a copy's speed, memory and host time, a group of bars for each workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {k: g for k, g in cases(records).items() if not any(r["wrong"] for r in g)}
    many = len({dtype for _, dtype in groups}) > 1
    labels = [f"{w}\n{d}" if many else w for w, d in groups]
    figures = {
        "times faster than eager, forward + backward": lambda g, p: statistics.median(
            a / b for a, b in zip(figure(g, "eager", "step_us", "median"), figure(g, p, "step_us", "median"), strict=True)
        ),
        "share of a copy's bandwidth, by the byte model": lambda g, p: statistics.median(figure(g, p, "share_of_copy")),
        "peak memory beyond the inputs, MiB": lambda g, p: statistics.median(figure(g, p, "peak_bytes")) / 2**20,
        "host time of a step, us": lambda g, p: statistics.median(figure(g, p, "host_us") or [float("nan")]),
    }
    fig, axes = plt.subplots(4, 1, figsize=(max(9.0, 1.1 * len(groups)), 15), layout="constrained")
    for ax, (title, value) in zip(axes, figures.items(), strict=True):
        for i, peer in enumerate(PEERS):
            heights = [value(g, peer) for g in groups.values()]
            ax.bar([x + 0.16 * (i - 2) for x in range(len(groups))], heights, width=0.16, label=peer)
        ax.set_title(title, loc="left")
        ax.set_xticks(range(len(groups)), labels, rotation=20, ha="right")
        if "MiB" in title or "us" in title:
            ax.set_yscale("log")
        if "times" in title:
            ax.axhline(1, color="black", linewidth=0.8)
    axes[0].legend(ncols=len(PEERS), fontsize="small", loc="lower left", bbox_to_anchor=(0, 1.08))
    fig.suptitle(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(fig)
