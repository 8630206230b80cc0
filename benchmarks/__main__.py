"""The benchmark suite: `python -m benchmarks` measures, `python -m benchmarks report` writes the README's table and the plots.

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

from . import report
from .environment import about
from .measure import OURS, PEERS, copy_bandwidth, measure
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
    run.add_argument("--out", type=Path, default=Path("results/bench.jsonl"), metavar="FILE", help="JSON lines are appended here")
    run.add_argument("--resume", action="store_true", help="leave out what FILE already has of this commit and device")
    run.set_defaults(do=do_run)

    tell = commands.add_parser("report", help="write the README's table and docs/*.png from benchmarks/results/")
    tell.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where the README's table is not the data's"
    )
    tell.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the *.jsonl lie")
    tell.add_argument("--readme", type=Path, default=report.ROOT / "README.md", metavar="FILE")
    tell.add_argument("--docs", type=Path, default=report.ROOT / "docs", metavar="FOLDER", help="where the plots go")
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
    done = _done(options.out, key) if options.resume else set()
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
    return 1 if any(r["wrong"] for r in records) else 0


def _done(path: Path, key: dict[str, Any]) -> set[tuple[str, str, str, bool]]:
    """(workload, dtype, scale, quick) of the records that this commit already has on this device, with right numbers."""
    if not path.exists():
        return set()
    records = map(json.loads, path.read_text().splitlines())
    same = [r for r in records if not r["wrong"] and all(r["about"][k] == key[k] for k in ("device", "commit", "threads", "torch"))]
    return {(r["workload"], r["dtype"], r["scale"], r["quick"]) for r in same}


def show(console: Console, key: dict[str, Any], copy: float, records: list[dict[str, Any]]) -> None:
    facts = ", ".join(f"{k} {v}" for k, v in key.items() if v is not None)
    table = Table(title=f"forward + backward, us: median (quartiles)\n{facts}; a copy moves {copy:.0f} GB/s", show_lines=False)
    for heading in ("workload", "elements", "dtype"):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    for peer in PEERS:
        table.add_column(peer, justify="right")
    for heading in ("times eager", "of copy", "MiB eager", "MiB", "host us"):
        table.add_column(heading, justify="right")
    for r in records:
        start = (r["workload"], f"{r['elements']:,}", r["dtype"])
        if r["wrong"]:
            off = ", ".join(f"{p}: {r['errors'][p]:.1e}" for p in r["wrong"])
            table.add_row(*start, f"[red]wrong numbers, so no speed: {off}")
            continue
        p = r["peers"]
        times = [f"{p[n]['step_us']['median']:,.0f} ({p[n]['step_us']['low']:,.0f}-{p[n]['step_us']['high']:,.0f})" for n in PEERS]
        eager, ours = p["eager"], p[OURS[0]]
        table.add_row(
            *start, *times, f"{eager['step_us']['median'] / ours['step_us']['median']:.2f}", f"{ours['share_of_copy']:.0%}",
            f"{eager['peak_bytes'] / 2**20:.1f}", f"{ours['peak_bytes'] / 2**20:.1f}", f"{ours['host_us']:.0f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
