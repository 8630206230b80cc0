"""Everything that a GPU can show, in order of worth, in nine minutes and one folder.

    python -m benchmarks.gpu_check [--out FOLDER] [--cpu-rehearsal]

Each part is a process or several, with a log in the folder. A part that fails or takes too long stops no other. What a part leaves
of its time goes to the later ones. A second call for the same commit does what has not passed. `summary.md` tells the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import summary
from .environment import commit

LIMIT = 520.0  # seconds: nine minutes less what starting and stopping take
GRACE = 5.0  # from an interrupt, at which pytest tells what failed, to the end
SUITE = ("float32", "bfloat16")
SHARDS = 10  # of the tests; with four comparisons and two warm-ups they fill 16 cores
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Part:
    name: str
    commands: dict[str, list[str]]  # by the names of their logs; they run at the same time
    environment: dict[str, str]


@dataclass
class Group:
    """Parts that run at the same time. `beside` runs with them, is stopped with them, and counts for nothing."""

    seconds: float
    parts: list[Part]
    beside: list[Part] = field(default_factory=list)


def plan(folder: Path, rehearsal: bool) -> list[Group]:
    base: dict[str, str] = {}
    less: dict[str, list[str]] = {"kernels": [], "tests": [], "compare": [], "suite": []}
    shards, compared = SHARDS, ("float32", "bfloat16", "float16", "float64")
    if rehearsal:
        # Compiling C++ would take longer than all the rest; `make bench` does it.
        base = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
        less = {
            "kernels": ["--cpu-rehearsal"],
            "tests": ["tests/test_gaussian_nll.py", "tests/test_gpu.py", "-k", "one_extreme or test_gpu"],
            "compare": ["--op", "reparameterize_kl", "--shape", "2,3", "--logvar-range", "-1", "1"],
            "suite": ["--workload", "mnist"],
        }
        shards, compared = 2, ("float32",)

    def python(*arguments: str) -> list[str]:
        return [sys.executable, "-m", *arguments]

    def suite(dtype: str, out: str) -> list[str]:
        return python("benchmarks", "--quick", "--resume", "--dtype", dtype, "--out", str(folder / out), *less["suite"])

    def compare(dtype: str) -> list[str]:
        return python("fastelbo", "compare", "--dtype", dtype, "--json", str(folder / f"compare-{dtype}.json"), *less["compare"])

    def tests(shard: int) -> list[str]:
        options = ["-v", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--shard", f"{shard}/{shards}"]
        return python("pytest", *options, "-m", "gpu or triton", *less["tests"])

    environment = python("benchmarks.environment", "--out", str(folder / "environment.json"))
    kernels = python("benchmarks.kernels", "--out", str(folder / "kernels.jsonl"), *less["kernels"])
    crowded = base | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "CI": "1"}
    return [
        Group(20.0, [Part("environment", {"environment": environment}, base)]),
        Group(150.0, [Part("kernels", {"kernels": kernels}, base | {"FASTELBO_IMPL": "triton"})]),
        Group(
            190.0,
            [
                Part("tests", {f"tests-{i}": tests(i) for i in range(shards)}, crowded),
                Part("compare", {f"compare-{d}": compare(d) for d in compared}, crowded),
            ],
            # Nothing is timed here, so the suite can fill torch.compile's cache: compiling takes it longer than measuring.
            [Part("warm-up", {f"warm-up-{d}": suite(d, f"warm-up-{d}.jsonl") for d in SUITE}, base)],
        ),
        *(Group(80.0, [Part(f"suite, {d}", {f"suite-{d}": suite(d, "bench.jsonl")}, base)]) for d in SUITE),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu-check"), metavar="FOLDER", help="default results/gpu-check")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="the same path on a CPU: kernels interpreted, toy sizes")
    options = parser.parse_args(argv)
    if not options.cpu_rehearsal and not torch.cuda.is_available():
        print(f"gpu_check needs a GPU that PyTorch can use; torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is stopped too
    folder = options.out.resolve()
    return check(folder, plan(folder, options.cpu_rehearsal), options.cpu_rehearsal)


def check(folder: Path, groups: Sequence[Group], rehearsal: bool, limit: float = LIMIT) -> int:
    """Run the groups one after the other and write summary.md. 1 if a part has not passed."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # So it is where a shell started this in the background, and processes inherit it: none would heed the interrupt below.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    marks, key = folder / "parts.json", {"commit": commit(), "rehearsal": rehearsal}
    done: dict[str, Any] = json.loads(marks.read_text()) if marks.exists() else {}
    done = {name: mark for name, mark in done.items() if mark["status"] == "passed" and mark["of"] == key}
    names = [part.name for group in groups for part in group.parts]
    end = time.monotonic() + limit
    for i, group in enumerate(groups):
        parts = [part for part in group.parts if part.name not in done]
        left = end - time.monotonic() - sum(g.seconds for g in groups[i + 1 :]) - GRACE
        for name, mark in run(folder, parts, group.beside if parts else [], max(left, 1.0)).items():
            done[name] = mark | {"of": key}
            print(f"{name}: {mark['status']}, {mark['seconds']:.0f} s", flush=True)
        marks.write_text(json.dumps({name: done[name] for name in names if name in done}, indent=2))
        text = summary.write(folder)
        (folder / "summary.md").write_text(text)
    print(text)
    return 0 if all(done[name]["status"] == "passed" for name in names) else 1


def run(folder: Path, parts: list[Part], beside: list[Part], seconds: float) -> dict[str, dict[str, Any]]:
    """How each part ended, after how many seconds."""
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        running = {
            part.name: [
                stack.enter_context(Process(folder / f"{log}.txt", c, part.environment)) for log, c in part.commands.items()
            ]
            for part in (*parts, *beside)
        }
        found: dict[str, dict[str, Any]] = {}
        while len(found) < len(parts):
            late = time.monotonic() - start > seconds
            for name in (part.name for part in parts if part.name not in found):
                processes = running[name]
                if not late and any(p.popen.poll() is None for p in processes):
                    continue
                if stop(processes):
                    status = "stopped, out of time"
                else:
                    status = "failed" if any(p.popen.returncode for p in processes) else "passed"
                found[name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
            time.sleep(0.1)
    return found


def stop(processes: list[Process]) -> bool:
    """Whether there was one to stop. An interrupt comes first, at which pytest tells what has failed until then."""
    left = [p.popen for p in processes if p.popen.poll() is None]
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        for popen in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, number)
        end = time.monotonic() + patience
        while time.monotonic() < end and any(popen.poll() is None for popen in left):
            time.sleep(0.05)
    return bool(left)


class Process:
    """One command of a part, in a session of its own, so that what it has started ends with it."""

    def __init__(self, log: Path, command: list[str], environment: dict[str, str]):
        self.log = log.open("w")
        self.popen = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        stop([self])
        self.log.close()


if __name__ == "__main__":
    sys.exit(main())
