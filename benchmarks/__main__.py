"""The benchmark suite: `python -m benchmarks` measures and draws, `python -m benchmarks report` writes the figures of the docs.

Five peers stand in every round: the eager formula, torch's own parts, torch.compile of the eager formula, fastelbo, and
torch.compile of a function that calls fastelbo. docs/benchmarks.md says how and why.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastelbo import cli

from . import plots, report
from .environment import about
from .measure import PEERS, copy_bandwidth, measure
from .records import WORDS, Record, device_name, load, mebibytes, speedup, times
from .workloads import WORKLOADS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    run = commands.add_parser("run", help="measure (the default)")
    names = [w.name for w in WORKLOADS]
    run.add_argument("--workload", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}; repeatable")
    run.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: float32, and bfloat16 on a GPU; repeatable")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    run.add_argument(
        "--small", action="store_true", help="smaller batches where the full ones do not fit the machine; implied on a CPU"
    )
    run.add_argument("--full", action="store_true", help="full sizes on a CPU too")
    run.add_argument("--quick", action="store_true", help="small sizes, few rounds: under two minutes on two cores")
    run.add_argument("--out", type=Path, default=Path("results/bench.jsonl"), metavar="FILE",
                     help="JSON lines are appended here, and plots drawn beside it (default: results/bench.jsonl)")  # fmt: skip
    run.add_argument("--resume", action="store_true", help="leave out what FILE already has of this commit and device")
    run.set_defaults(do=do_run)

    tell = commands.add_parser(
        "report", help="write the README's figures, and tables and plots into docs/, from benchmarks/results/"
    )
    tell.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a figure or table is not the data's")
    tell.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the *.jsonl lie")
    tell.add_argument("--readme", type=Path, default=report.ROOT / "README.md", metavar="FILE")
    tell.add_argument("--docs", type=Path, default=report.ROOT / "docs", metavar="FOLDER", help="tables and plots")
    tell.set_defaults(do=lambda o: report.main(o.results, o.readme, o.docs, o.check))

    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] not in ("run", "report", "-h", "--help"):
        arguments = ["run", *arguments]
    options = parser.parse_args(arguments)
    status: int = options.do(options)
    return status


def do_run(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"
    scale = "full" if options.full or not (on_cpu or options.small or options.quick) else "small"
    dtypes = [DTYPES[d] for d in options.dtype or (["float32"] if on_cpu else ["float32", "bfloat16"])]
    chosen = [w for w in WORKLOADS if options.workload is None or w.name in options.workload]
    key = about(device)
    done = {case(r) for r in measured(options.out, key)} if options.resume else set()
    cases = [(w, d) for d in dtypes for w in chosen if (w.name, str(d).removeprefix("torch."), scale, options.quick) not in done]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 180)
    records = []
    copy = copy_bandwidth(device)
    with Progress(console=console, transient=True) as progress, options.out.open("a") as file:
        task = progress.add_task("", total=len(cases))
        for workload, dtype in cases:
            progress.update(task, description=f"{workload.name}, {str(dtype)[6:]}")
            record = {"about": key, "quick": options.quick} | measure(workload, device, dtype, scale, options.quick, copy)
            file.write(json.dumps(record) + "\n")
            file.flush()
            records.append(record)
            progress.advance(task)
    show(console, key, copy, records)
    draw(console, options.out, key, options.quick)
    return 1 if any(r["wrong"] for r in records) else 0


def draw(console: Console, out: Path, key: dict[str, Any], quick: bool) -> None:
    """Plots of what this commit has measured on this device, beside the file of its records."""
    if not cli.is_installed("matplotlib"):
        console.print('no plots without matplotlib: pip install "fastelbo[bench]"', markup=False)
        return
    shown = [r for r in measured(out, key) if r["quick"] == quick]
    for path, of_dtype in plots.pictures(shown, out.with_suffix("")).items():
        plots.draw(device_name(key), of_dtype, path)
        console.print(f"plot: {path}", soft_wrap=True)


def measured(path: Path, key: dict[str, Any]) -> list[Record]:
    """The records that this commit already has on this device, with right numbers."""
    if not path.exists():
        return []
    same = ("device", "commit", "threads", "torch")
    return [r for r in load(path) if not r["wrong"] and all(r["about"][k] == key[k] for k in same)]


def case(record: Record) -> tuple[str, str, str, bool]:
    return record["workload"], record["dtype"], record["scale"], record["quick"]


def show(console: Console, key: dict[str, Any], copy: float, records: list[Record]) -> None:
    facts = ", ".join(f"{k} {v}" for k, v in key.items() if v is not None)
    table = Table(
        title=f"a step, forward and backward: medians; the speed of a plain copy is {copy:.0f} GB/s\n{facts}", title_justify="left"
    )
    heads = [
        "workload", "elements", "dtype", *(f"{WORDS[p]} (us)" for p in PEERS), "times faster than eager", "speed (GB/s)",
        "memory, fastelbo (MiB)", "memory, eager (MiB)",
    ]  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "workload" else "right")
    for r in records:
        start = (r["workload"], f"{r['elements']:,}", r["dtype"])
        if r["wrong"]:
            off = ", ".join(f"{p}: {r['errors'][p]:.1e}" for p in r["wrong"])
            table.add_row(*start, f"[red]wrong numbers, so no speed: {off}")
            continue
        table.add_row(
            *start, *(f"{times([r], p):,.0f}" for p in PEERS), f"{speedup([r], 'fastelbo', over='eager'):.2f}",
            f"{r['peers']['fastelbo']['gb_per_s']:,.1f}", *(f"{mebibytes([r], p):.1f}" for p in ("fastelbo", "eager")),
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
