"""Each kernel at a size that fills a GPU: bandwidth against a copy, the formula compiled and eager, a CUDA graph, memory.

    python -m benchmarks.kernels --out FILE [--cpu-rehearsal]

A line of FILE is a record as `python -m benchmarks` writes them, of a case in float32 or bfloat16. It holds `copy_us`, `graph` (the
same step, captured and replayed) and `clocks` as well. A large copy and the graph's replays are measured in the same rounds as the
rest, and `share_of_copy` is of that copy. A case whose numbers are off, the graph's included, has no times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastelbo
from fastelbo.noise import philox_normal

from . import machine as machines
from .environment import about
from .machine import Machine
from .measure import (
    Clock,
    Inputs,
    Step,
    checked,
    clocked,
    copy_of,
    figures,
    largest_error,
    peak_memory,
    peers,
    rotated,
    rounds,
    spread,
    timed,
)
from .workloads import WORKLOADS, Draw, Result, Workload, noise

PEERS = ("eager", "compiled eager", "fastelbo")
DTYPES = (torch.float32, torch.bfloat16)
LARGE = {"batch": 1024, "elements": 12_288}  # 12.6 M elements, CelebA's at a large batch
TOY = {"batch": 3, "elements": 40}  # no block is full, so lanes are masked
SEED = 20140414
GRAPH = "CUDA graph"


def nll_inputs(draw: Draw, batch: int, elements: int) -> Inputs:
    return {"recon": draw(batch, elements), "x": draw(batch, elements, grad=False)}


def nll_eager(recon: Tensor, x: Tensor) -> Tensor:
    return 0.5 * (math.log(2 * math.pi) + (x - recon) ** 2).sum() / x.shape[0]


def nll_fused(recon: Tensor, x: Tensor) -> Tensor:
    return fastelbo.gaussian_nll(recon, x, reduction="batchmean")


def nll_traffic(batch: int, elements: int) -> tuple[int, int, int]:
    """Forward reads recon and x; backward reads them again and writes a gradient."""
    n = batch * elements
    return n, 2 * n, (2 + 3) * n


def kl_inputs(draw: Draw, batch: int, elements: int) -> Inputs:
    return {"mu": draw(batch, elements), "logvar": draw(batch, elements, scale=0.3)}


def kl_eager(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / mu.shape[0]


def kl_fused(mu: Tensor, logvar: Tensor) -> Tensor:
    return fastelbo.gaussian_kl(mu, logvar, reduction="batchmean")


def kl_traffic(batch: int, elements: int) -> tuple[int, int, int]:
    """Forward reads mu and logvar; backward reads them again and writes two gradients."""
    n = batch * elements
    return n, 2 * n, (2 + 4) * n


def sample_inputs(draw: Draw, batch: int, elements: int) -> Inputs:
    """eps is the noise of the seed, so that the formula can be held against what the kernel draws."""
    eps = philox_normal((batch, elements), SEED, device=draw.device)
    return kl_inputs(draw, batch, elements) | {"eps": eps, "grad_z": draw(batch, elements, scale=1e-3, grad=False)}


def sample_eager(mu: Tensor, logvar: Tensor, eps: Tensor | None) -> Result:
    return kl_eager(mu, logvar), mu + torch.exp(0.5 * logvar) * noise(eps, mu).to(mu.dtype)


def sample_fused(mu: Tensor, logvar: Tensor, eps: Tensor | None) -> Result:
    z, kl = fastelbo.reparameterize_kl(mu, logvar, seed=SEED, reduction="batchmean")
    return kl, z


def sample_traffic(batch: int, elements: int) -> tuple[int, int, int]:
    """Forward reads mu and logvar and writes z; backward reads mu, logvar and z's gradient and writes two."""
    n = batch * elements
    return n, 3 * n, (3 + 5) * n


def alone(name: str, *parts: Any) -> Workload:
    inputs, eager, fused, traffic = parts
    return Workload(name, "the function alone", LARGE, TOY, inputs, eager, eager, fused, traffic, TOY)


SUITE = {w.name: w for w in WORKLOADS}
POSTERIOR = {"latents": 128}
CASES = [
    replace(SUITE["celeba-64"], name="elbo_loss", full=LARGE | POSTERIOR, tiny=TOY),
    replace(SUITE["celeba-64-logvar"], name="elbo_loss, learned variance", full=LARGE | POSTERIOR, tiny=TOY),
    alone("reparameterize_kl", sample_inputs, sample_eager, sample_fused, sample_traffic),
    replace(SUITE["single-cell-linear"], name="linear_elbo_loss", tiny=TOY),
    alone("gaussian_nll", nll_inputs, nll_eager, nll_fused, nll_traffic),
    alone("gaussian_kl", kl_inputs, kl_eager, kl_fused, kl_traffic),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="the same on CPU tensors at toy sizes")
    options = parser.parse_args(argv)
    machine: Machine = machines.Cpu() if options.cpu_rehearsal else machines.Gpu()
    scale, budget = ("tiny", (2, 0.0)) if options.cpu_rehearsal else ("full", (31, 2.0))
    key = about(machine.device)
    status = 0
    with options.out.open("w") as file:
        for case, dtype in itertools.product(CASES, DTYPES):
            start = time.perf_counter()
            try:
                record = {"about": key} | measure(case, machine, dtype, case.sizes(scale), *budget)
            except Exception as error:  # one case's failure stops no other
                record = {"workload": case.name, "dtype": str(dtype)[6:], "wrong": [], "failed": f"{type(error).__name__}: {error}"}
            file.write(json.dumps(record) + "\n")
            file.flush()
            if record["wrong"] or "failed" in record or "failed" in record["graph"]:
                status = 1
            print(f"{case.name}, {str(dtype)[6:]}: {told(record)}; {time.perf_counter() - start:.1f} s", flush=True)
    return status


def told(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"failed, {record['failed']}"
    if record["wrong"]:
        return "wrong numbers, " + ", ".join(f"{p} {record['errors'][p]:.1e}" for p in record["wrong"])
    ours = record["peers"]["fastelbo"]
    graph = f"; no graph, {record['graph']['failed']}" if "failed" in record["graph"] else ""
    return f"{ours['step_us']['median']:,.0f} us, {ours['share_of_copy']:.0%} of a copy{graph}"


def captured(case: Workload, machine: Machine, draws: list[Inputs]) -> tuple[float, float, Iterator[Callable[[], None]]]:
    """How far the replay of a captured step is off, the microseconds that capturing takes, and the replays on each draw in turn."""
    replays = []
    for t in draws:
        action = partial(Step(t).results, case.fused)
        want = action()
        machine.synchronize()
        start = time.perf_counter()
        results, replay = machine.capture(action)
        machine.synchronize()
        seconds = time.perf_counter() - start
        for r in results:
            r.fill_(float("nan"))
        replay()
        error = largest_error(results, want)
        replays.append(replay)
        if error != 0:  # NaN is not 0 either
            break
    return error, 1e6 * seconds, itertools.cycle(replays)


def measure(
    case: Workload, machine: Machine, dtype: torch.dtype, sizes: dict[str, int], least: int, seconds: float
) -> dict[str, Any]:
    """A record of one case, from at least so many rounds and for so many seconds."""
    losses = {p: loss for p, loss in peers(case).items() if p in PEERS}
    inputs = case.inputs(Draw(machine.device, dtype), **sizes)
    record = checked(case, losses, inputs, sizes)
    draws = rotated(case, machine, inputs, sizes)
    graph: dict[str, Any] = {}
    replayed = {}
    try:
        record["errors"][GRAPH], graph["capture_us"], replays = captured(case, machine, draws)
        replayed[GRAPH] = lambda: timed(machine, next(replays))
    except RuntimeError as error:  # what cannot be captured can still be timed
        graph["failed"] = str(error).splitlines()[0]
    if record["errors"].get(GRAPH, 0) != 0:
        record["wrong"].append(GRAPH)
    if record["wrong"]:
        return record

    steps = [Step(t, own_noise=True) for t in draws]
    moved, copy = copy_of(machine)
    times = clocked(Clock(steps, machine), losses) | replayed | {"copy": copy}
    before = machine.clocks()
    samples = rounds(times, least, seconds)
    clocks = {"before": before, "after": machine.clocks()}
    copy_us = spread([t for t, *_ in samples["copy"]])
    speed = moved / copy_us["median"] / 1e3
    record |= {"copy_us": copy_us, "copy_gb_per_s": speed, "clocks": clocks, "rounds": len(samples["copy"])}
    record["graph"] = graph | (figures(record, samples[GRAPH], speed) if replayed else {})
    record["peers"] = {
        p: figures(record, samples[p], speed)
        | {"host_us": 1e6 * statistics.median(h for *_, h in samples[p]), "peak_bytes": peak_memory(steps[0], loss, machine.device)}
        for p, loss in losses.items()
    }
    return record


if __name__ == "__main__":
    sys.exit(main())
