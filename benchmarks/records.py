"""What the files of results hold, and the words in which tables and plots tell it.

`benchmarks/results/*.jsonl` hold one record a line, as `python -m benchmarks` writes them. Of each device the newest torch and
fastelbo stand; several runs of one commit are shown together, as medians over the runs with their range.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from .workloads import WORKLOADS

# Each peer of the suite, as readers know it.
WORDS = {
    "fastelbo": "fastelbo",
    "compiled fastelbo": "fastelbo in torch.compile",
    "eager": "eager PyTorch",
    "compiled eager": "torch.compile of eager",
    "torch parts": "torch's own functions",
}
# Each workload: whose loss it is.
LOSSES = {
    "mnist": "MNIST image, fixed variance",
    "mnist-logvar": "MNIST image, learned variance",
    "celeba-64": "64 px image, fixed variance",
    "celeba-64-logvar": "64 px image, learned variance",
    "image-256": "256 px image, fixed variance",
    "image-256-logvar": "256 px image, learned variance",
    "ldm-kl-f8": "latent diffusion, 256 px image",
    "video-vae": "video, 17 frames",
    "cogvideox": "video, 49 frames",
    "vdvae-cifar": "hierarchical VAE, 43 KLs",
    "vits": "speech, masked KL",
    "rssm": "world model, balanced KL",
    "single-cell": "single cells, variance per gene",
    "single-cell-linear": "single cells, linear decoder",
    "mlp-last-layer": "last layer of an MLP",
}

Record = dict[str, Any]
Device = tuple[str, str]  # its name, and a slug for files


def load(path: Path) -> list[Record]:
    """Of a file, or of all files of a folder."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def device_name(about: Record) -> str:
    return about["device"] + (f", {about['threads']} threads" if about["driver"] is None else "")


def by_device(records: list[Record]) -> dict[Device, list[Record]]:
    """Each device's records of its newest day and commit, quick runs left out where there are others."""
    found: dict[Device, list[Record]] = defaultdict(list)
    for r in records:
        name = device_name(r["about"])
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


def right(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """Those cases whose numbers are right, and so have a speed."""
    return {case: runs for case, runs in cases(records).items() if not any(r["wrong"] for r in runs)}


def figures(runs: list[Record], peer: str, *path: str) -> list[float]:
    """One figure of a peer in each run."""
    values = []
    for r in runs:
        value = r["peers"][peer]
        for key in path:
            value = value[key]
        values.append(value)
    return values


def times(runs: list[Record], peer: str) -> float:
    """The microseconds of a step; the median over the runs, as below."""
    return statistics.median(figures(runs, peer, "step_us", "median"))


def speedup(runs: list[Record], peer: str, over: str) -> float:
    """How many times faster than `over` a step of `peer` is."""
    return times(runs, over) / times(runs, peer)


def mebibytes(runs: list[Record], peer: str) -> float:
    return statistics.median(figures(runs, peer, "peak_bytes")) / 2**20


def span(middle: float, values: list[float], form: str) -> str:
    """A figure, with its range over several runs."""
    return f"{middle:{form}}" + (f" ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else "")
