"""summary.md of a folder that `python -m benchmarks.gpu_check` has filled, from the files there alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import report

Record = dict[str, Any]
TOLD = 40  # failed tests by name
RESULT = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]$", re.MULTILINE)
UNREAD = re.compile(r"^ERROR (tests/[^\s:]+\.py)(?: - .*)?$", re.MULTILINE)
STARTED = re.compile(r"^(tests/\S+::.+?) $", re.MULTILINE)  # pytest ends this line when the test does


def write(folder: Path) -> str:
    marks = read(folder / "parts.json", {})
    kernels = read_lines(folder / "kernels.jsonl")
    rehearsed = any(mark["of"]["rehearsal"] for mark in marks.values())
    note = "A rehearsal on a CPU, at toy sizes: times and targets mean nothing.\n" if rehearsed else ""
    return "\n".join(
        [
            f"# GPU check\n\n{note}",
            table(("part", "status", "seconds"), ([name, mark["status"], mark["seconds"]] for name, mark in marks.items())),
            "## Targets\n",
            table(("kernel", "dtype", "figure", "at least", "measured", ""), targets(kernels)),
            "## Kernels\n",
            kernel_table(kernels),
            "## Tests\n",
            tests("\n".join(logs(folder, "tests").values())),
            "## Compare\n",
            "".join(f"- {dtype}: {verdict(log)}\n" for dtype, log in logs(folder, "compare").items()) or "none\n",
            "## The suite\n",
            report.tables(read_lines(folder / "bench.jsonl")) or "none\n",
            "## Environment\n",
            table(("", ""), read(folder / "environment.json", {}).items()),
        ]
    )


def logs(folder: Path, part: str) -> dict[str, str]:
    return {path.stem.removeprefix(f"{part}-"): path.read_text() for path in sorted(folder.glob(f"{part}-*.txt"))}


def read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


def read_lines(path: Path) -> list[Record]:
    """A process that was stopped may leave half a line."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def table(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(headings)]
    lines += [["---"] * len(lines[0])] + [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- targets ---------------------------------------------------------------------------------------------------------------------


def share(record: Record) -> float:
    return record["peers"]["fastelbo"]["share_of_copy"]


def times(peer: str, figure: Callable[[Record], float]) -> Callable[[Record], float]:
    return lambda record: figure(record["peers"][peer]) / figure(record["peers"]["fastelbo"])


def step(figures: Record) -> float:
    return figures["step_us"]["median"]


def memory(figures: Record) -> float:
    return figures["peak_bytes"]


FIGURES: dict[str, tuple[Callable[[Record], float], str]] = {
    "share of a copy's bandwidth": (share, ".0%"),
    "times faster than torch.compile": (times("compiled eager", step), ".2f"),
    "times faster than eager": (times("eager", step), ".2f"),
    "times less memory than torch.compile": (times("compiled eager", memory), ".1f"),
}
COPY, COMPILED, EAGER, MEMORY = FIGURES
ELBO = ("elbo_loss", "elbo_loss, learned variance")
BOTH = ("float32", "bfloat16")
# Of forward and backward together.
TARGETS: list[tuple[str, str, str, float]] = [
    *((k, d, f, v) for k in ELBO for d in BOTH for f, v in ((COPY, 0.9), (COMPILED, 1.5), (EAGER, 6.0))),
    ("reparameterize_kl", "float32", COPY, 0.85),
    ("reparameterize_kl", "bfloat16", COPY, 0.75),
    *(("linear_elbo_loss", d, f, v) for d in BOTH for f, v in ((COMPILED, 4.0), (MEMORY, 10.0))),
]


def targets(records: list[Record]) -> list[list[str]]:
    measured = {(r["workload"], r["dtype"]): r for r in records if "peers" in r}
    rows = []
    for kernel, dtype, name, least in TARGETS:
        figure, form = FIGURES[name]
        record = measured.get((kernel, dtype))
        value = None if record is None else figure(record)
        verdict = "not measured" if value is None else "met" if value >= least else "MISSED"
        rows.append([kernel, dtype, name, f"{least:{form}}", "" if value is None else f"{value:{form}}", verdict])
    return rows


# ---- what the parts found --------------------------------------------------------------------------------------------------------


def kernel_table(records: list[Record]) -> str:
    headings = (
        "kernel", "elements", "dtype", "bytes per element", "forward (us)", "forward, share of a copy's speed",
        "forward and backward (us)", "speed (GB/s)", "share of a copy's speed", "speed of a copy (GB/s)",
        "times faster than torch.compile of eager", "times faster than eager", "CUDA graph (us)",
        "CUDA graph, share of a copy's speed", "capture (ms)", "peak memory (MiB): fastelbo, torch.compile of eager, eager",
        "clock of the multiprocessors",
    )  # fmt: skip
    rows = []
    for r in records:
        if "peers" not in r:
            why = r.get("failed") or "wrong numbers, no speed: " + ", ".join(f"{p} {r['errors'][p]:.1e}" for p in r["wrong"])
            rows.append([r["workload"], r.get("elements", ""), r["dtype"], why, *[""] * (len(headings) - 4)])
            continue
        ours, graph, clocks = r["peers"]["fastelbo"], r["graph"], r["clocks"]
        forward = ours["forward_us"]["median"]
        of_copy = r["bytes_forward"] / forward / 1e3 / r["copy_gb_per_s"]
        alone = not r["workload"].startswith(("elbo", "linear"))
        rows.append([
            r["workload"], f"{r['elements']:,}", r["dtype"], f"{r['bytes_step'] / r['elements']:.1f}", f"{forward:,.0f}",
            f"{of_copy:.0%}" if alone else "",
            f"{step(ours):,.0f}", f"{ours['gb_per_s']:,.0f}", f"{ours['share_of_copy']:.0%}", f"{r['copy_gb_per_s']:,.0f}",
            *(f"{times(p, step)(r):.2f}" for p in ("compiled eager", "eager")),
            *([graph["failed"], "", ""] if "failed" in graph else
              [f"{step(graph):,.0f}", f"{graph['share_of_copy']:.0%}", f"{graph['capture_us'] / 1e3:.1f}"]),
            ", ".join(f"{memory(r['peers'][p]) / 2**20:.1f}" for p in ("fastelbo", "compiled eager", "eager")),
            ", ".join(c.get("clocks.sm", "") for c in clocks.values()),
        ])  # fmt: skip
    return table(headings, rows) + (
        "\nA large share of a copy's speed is good. The bytes per element are what a perfect step would read and write: the\n"
        "function `traffic` beside each case in `benchmarks/kernels.py` and `benchmarks/workloads.py`. The forward pass of\n"
        "elbo_loss and linear_elbo_loss writes gradients too, so it has no speed of its own. All numbers were checked before any\n"
        "time was taken.\n"
    )


def tests(log: str) -> str:
    results = dict(RESULT.findall(log))
    results |= dict.fromkeys(STARTED.findall(log), "not finished")
    results |= dict.fromkeys(UNREAD.findall(log), "not imported")
    outcomes = list(results.values())
    counts = ", ".join(f"{outcomes.count(o)} {o.lower()}" for o in dict.fromkeys(outcomes)) or "none"
    bad = [f"- {name}: {o.lower()}\n" for name, o in results.items() if o not in ("PASSED", "SKIPPED", "XFAIL")]
    more = [f"- and {len(bad) - TOLD} more\n"] if len(bad) > TOLD else []
    return "".join([f"{counts}\n\n", *bad[:TOLD], *more])


def verdict(log: str) -> str:
    """From the last words of `fastelbo compare`."""
    found = re.search(r"^(\d+ results), seed.*", log, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"no verdict; its last words: {' '.join(log.strip().splitlines()[-1:])}"
    if "All are within it." in found[0]:
        return f"{found[1]}, all within the bound"
    return "".join(f"\n    {line}" for line in found[0].splitlines())
