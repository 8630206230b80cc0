"""The README's figures, the tables in docs/ and the plots, from the committed results: no figure there is typed by hand."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import plots
from .records import LOSSES, Record, by_device, cases, figures, load, mebibytes, right, span, speedup, times

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: begin, written by `python -m benchmarks report` -->", "<!-- benchmarks: end -->"
NUMERICS_BEGIN, NUMERICS_END = "<!-- numerics: begin, written by `python -m benchmarks report` -->", "<!-- numerics: end -->"
# Of the README: a small loss, a large one, the largest, and one across a matrix product.
SHOWN = ("mnist", "image-256-logvar", "cogvideox", "single-cell-linear")


class Page(NamedTuple):
    """What stands between two lines of a file."""

    path: Path
    begin: str
    end: str
    content: str


def main(results: Path, readme: Path, docs: Path, check: bool) -> int:
    records = load(results)
    if not records:
        print(f"no records in {results}/*.jsonl", file=sys.stderr)
        return 2
    pictures = {
        path: (name, shown)
        for (name, slug), of_device in by_device(records).items()
        for path, shown in plots.pictures(of_device, docs / f"bench-{slug}").items()
    }
    links = "".join(f"\n![time and memory of each loss on {name}]({path.name})\n" for path, (name, _) in pictures.items())
    pages = [Page(readme, BEGIN, END, summary(records)), Page(docs / "benchmarks.md", BEGIN, END, tables(records) + links)]
    if (compared := results / "numerics-cpu.json").exists():
        rows = json.loads(compared.read_text())["rows"]
        pages.append(Page(docs / "numerics.md", NUMERICS_BEGIN, NUMERICS_END, numerics(rows)))
    stale = []
    for page in pages:
        text = page.path.read_text()
        if text.count(page.begin) != 1 or text.count(page.end) != 1:
            print(f"{page.path} must hold the lines {page.begin!r} and {page.end!r} once each", file=sys.stderr)
            return 2
        head, rest = text.split(page.begin)
        # Python-Markdown makes a list or a table only of what follows an empty line.
        new = f"{head}{page.begin}\n\n{page.content}{page.end}{rest.split(page.end)[1]}"
        if new != text:
            stale.append(f"{page.path} does not say what {results} says")
        if not check:
            page.path.write_text(new)
    if not check:
        for path, (name, shown) in pictures.items():
            plots.draw(name, shown, path)
        return 0
    stale += [f"{path} is missing" for path in pictures if not path.exists()]
    for what in stale:
        print(f"{what}: run `python -m benchmarks report`", file=sys.stderr)
    return int(bool(stale))


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, ["---"] * len(heads), *rows])


# ---- the suite -------------------------------------------------------------------------------------------------------------------


def summary(records: list[Record]) -> str:
    """A few losses, and all in one sentence, in words that need no legend."""
    parts = []
    for (name, _), of_device in by_device(records).items():
        groups = right(of_device)
        if not groups:
            continue
        about = of_device[0]["about"]
        rows = []
        for (workload, dtype), runs in groups.items():
            if workload in SHOWN:
                took, held = ({p: of(runs, p) for p in ("eager", "fastelbo")} for of in (times, mebibytes))
                rows.append([
                    f"{LOSSES[workload]}, {dtype}",
                    milliseconds(took["eager"]), f"{milliseconds(took['fastelbo'])}: {less(took['eager'] / took['fastelbo'])}",
                    f"{held['eager']:.1f} MiB", f"{held['fastelbo']:.1f} MiB: {less(held['eager'] / held['fastelbo'])}",
                ])  # fmt: skip
        heads = ["loss", "time, eager PyTorch", "time, fastelbo", "memory, eager PyTorch", "memory, fastelbo"]
        versions = f"torch {about['torch'].split(' ')[0]}, fastelbo at {about['commit']}, {about['date']}"
        parts.append(
            f"Time and peak memory of one forward and backward pass of the loss, without the network. Less is better. Measured on\n"
            f"{name} ({versions}).\n\n{table(heads, rows)}\n"
            f"Over all {len(groups)} losses of the benchmarks, eager PyTorch takes {among(groups, 'eager')} times as long as\n"
            "fastelbo. "
            f"The same formula in torch.compile takes {among(groups, 'compiled eager')} times as long as fastelbo without\n"
            "torch.compile: below 1 the compiled formula is faster.\n\n"
        )
    return "".join(parts)


def milliseconds(us: float) -> str:
    return f"{us / 1e3:.{1 if us >= 1e3 else 2}f} ms"


def less(ratio: float) -> str:
    """Eager's figure over fastelbo's, in words."""
    if round(ratio, 1) > 1:
        return f"{ratio:.1f} times less"
    return f"{1 / ratio:.1f} times as much" if round(1 / ratio, 1) > 1 else "as much"


def among(groups: dict[tuple[str, str], list[Record]], peer: str) -> str:
    found = [speedup(runs, "fastelbo", over=peer) for runs in groups.values()]
    return f"{min(found):.1f} to {max(found):.1f} (median {statistics.median(found):.1f})"


def faster(over: str, peer: str = "fastelbo") -> Callable[[list[Record]], str]:
    return lambda runs: span(speedup(runs, peer, over), [speedup([r], peer, over) for r in runs], ".2f")


# Of the table: each head, what it says, and its cell.
COLUMNS: list[tuple[str, str, Callable[[list[Record]], str]]] = [
    ("loss", "the kind of model, and the name of its loss in `benchmarks/workloads.py`",
     lambda runs: f"{LOSSES[runs[0]['workload']]}: `{runs[0]['workload']}`"),
    ("elements", "the number of elements of x, or of latents if a loss has more latents than elements of x",
     lambda runs: f"{runs[0]['elements']:,}"),
    ("dtype", "the dtype of the inputs and of their gradients", lambda runs: runs[0]["dtype"]),
    ("time of a step (us)", "microseconds of forward and backward of the loss with fastelbo; small is good", lambda runs: span(
        times(runs, "fastelbo"), figures(runs, "fastelbo", "step_us", "median"), ",.0f")),
    ("times faster than eager PyTorch", "the time of the eager formula divided by the time of fastelbo; above 1 fastelbo is faster",
     faster("eager")),
    ("times faster than torch's own functions",
     "the time of torch's functions divided by the time of fastelbo; above 1 fastelbo is faster", faster("torch parts")),
    ("times faster than torch.compile of eager",
     "the time of the compiled eager formula divided by the time of fastelbo, which is not compiled; above 1 fastelbo is faster",
     faster("compiled eager")),
    ("times faster, both in torch.compile",
     "the time of the compiled eager formula divided by the time of compiled code that calls fastelbo; above 1 fastelbo is faster",
     faster("compiled eager", "compiled fastelbo")),
    ("speed (GB/s)", "the bytes that a step must at least read and write, divided by the time of fastelbo; large is good",
     lambda runs: f"{statistics.median(figures(runs, 'fastelbo', 'gb_per_s')):,.1f}"),
    ("peak memory (MiB), fastelbo", "the peak memory of a step with fastelbo, without the inputs; small is good",
     lambda runs: f"{mebibytes(runs, 'fastelbo'):.1f}"),
    ("peak memory (MiB), eager PyTorch", "the peak memory of a step with the eager formula; small is good",
     lambda runs: f"{mebibytes(runs, 'eager'):.1f}"),
]  # fmt: skip


def tables(records: list[Record]) -> str:
    """A table for each device, below what its columns say."""
    if not records:
        return ""
    parts = [f"- *{head}*: {meaning}.\n" for head, meaning, _ in COLUMNS]
    for (name, _), of_device in by_device(records).items():
        about, groups = of_device[0]["about"], cases(of_device)
        runs = max(map(len, groups.values()))
        driver = f", driver {about['driver']}" if about["driver"] else ""
        triton = f", triton {about['triton']}" if about["driver"] else ""
        versions = f"torch {about['torch']}{triton}, fastelbo {about['fastelbo']} at {about['commit']}, {about['date']}"
        shown = "One run." if runs == 1 else f"Medians of {runs} runs; the brackets have the smallest and the largest run."
        copies = [r["copy_gb_per_s"] for r in of_device]
        copy = span(statistics.median(copies), copies, ",.0f")
        rows = []
        for group in groups.values():
            wrong = any(r["wrong"] for r in group)
            cells = [cell(group) for *_, cell in COLUMNS[: 3 if wrong else None]]
            rows.append(cells + (["wrong numbers, no speed"] + [""] * (len(COLUMNS) - 4) if wrong else []))
        parts.append(f"\n**{name}**{driver}: {versions}.\n{shown}\nThe speed of a plain copy is {copy} GB/s.\n\n")
        parts.append(table([head for head, *_ in COLUMNS], rows))
    return "".join(parts)


# ---- numerics --------------------------------------------------------------------------------------------------------------------


def numerics(rows: list[Record]) -> str:
    """From what `fastelbo compare --json` wrote: a function's worst value and worst gradient, over its ways, shapes and ranges."""
    found: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        found[row["op"].split("/")[0]].append(row)

    def worst(group: list[Record], of: str, gradients: bool) -> str:
        errors = [
            (float(row[of]["max_ulp"]), row["result"].removeprefix("d "))
            for row in group
            if row["result"].startswith("d ") == gradients
        ]
        largest, result = max((e for e in errors if not math.isnan(e[0])), default=(math.nan, ""))
        return f"{largest:.2g} ({result})".replace("e+0", "e").replace("e+", "e") if result else ""

    def lost(group: list[Record], of: str) -> str:
        count: int = sum(row[of]["lost"] for row in group)
        return str(count or "")

    heads = ["function", *(f"{what}, {of} (ulp)" for what in ("value", "gradient") for of in ("fastelbo", "eager"))]
    return table([*heads, "lost, fastelbo", "lost, eager"], [
        [f"`{function}`", *(worst(group, of, gradients) for gradients in (False, True) for of in ("fused", "eager")),
         *(lost(group, of) for of in ("fused", "eager"))]
        for function, group in found.items()
    ])  # fmt: skip
