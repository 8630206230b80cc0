"""How a workload is measured: its numerics first, then time, memory and bandwidth, every peer in every round.

On a GPU time is the device's, by events, with copies of the inputs rotated past the L2 cache, and the host's is apart. On a CPU it
is the wall's; the host's share is what is left of a step when its tensors have next to no elements.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .workloads import Draw, Result, Workload

PEERS = ("eager", "torch parts", "compiled eager", "fastelbo", "compiled fastelbo")
OURS = ("fastelbo", "compiled fastelbo")

Inputs = dict[str, Tensor]


def peers(workload: Workload) -> dict[str, Callable[..., Result]]:
    torch._dynamo.reset()  # each workload compiles for its own shapes
    compile = lambda f: torch.compile(f, dynamic=False)  # noqa: E731
    return {
        "eager": workload.eager, "torch parts": workload.parts, "compiled eager": compile(workload.eager),
        "fastelbo": workload.fused, "compiled fastelbo": compile(workload.fused),
    }  # fmt: skip


class Step:
    """Forward and backward of a loss on one set of inputs."""

    def __init__(self, inputs: Inputs, own_noise: bool = False):
        self.grad_z = inputs.get("grad_z")
        self.args: dict[str, Any] = {k: t for k, t in inputs.items() if k != "grad_z"}
        if own_noise and "eps" in self.args:
            self.args["eps"] = None
        self.wanted = [t for t in inputs.values() if t.requires_grad]

    def forward(self, loss: Callable[..., Result]) -> tuple[Tensor, ...]:
        for t in self.wanted:
            t.grad = None
        out = loss(**self.args)
        return out if isinstance(out, tuple) else (out,)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        torch.autograd.backward(outputs, [None, self.grad_z][: len(outputs)])

    def __call__(self, loss: Callable[..., Result]) -> None:
        self.backward(self.forward(loss))


# ---- numerics --------------------------------------------------------------------------------------------------------------------

# Largest error of a result over its largest magnitude. float32: a peer's sums over millions and exp(logvar)'s rounding.
# Half precision: what eager code makes of it, which rounds every intermediate, and its sums.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
OWN_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def errors(workload: Workload, losses: dict[str, Callable[..., Result]], inputs: Inputs) -> dict[str, float]:
    """Each peer's largest error over the loss, z and every gradient, against the eager formula in float64."""

    def results(loss: Callable[..., Result], t: Inputs) -> list[Tensor]:
        step = Step(t)
        outputs = step.forward(loss)
        step.backward(outputs)
        return [o.detach() for o in outputs] + [w.grad for w in step.wanted if w.grad is not None]

    wide = {k: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for k, t in inputs.items()}
    truth = results(workload.eager, wide)
    found = {}
    for peer, loss in losses.items():
        pairs = zip(results(loss, inputs), truth, strict=True)
        found[peer] = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
    return found


def wrong(found: dict[str, float], dtype: torch.dtype) -> list[str]:
    """The peers whose numbers are off; not <= catches NaN."""
    return [p for p, e in found.items() if not e <= (OWN_TOLERANCE if p in OURS else TOLERANCE)[dtype]]


# ---- time ------------------------------------------------------------------------------------------------------------------------


class Clock:
    """(forward, step, host) seconds of one step; each call takes the next copy of the inputs."""

    def __init__(self, steps: list[Step], device: torch.device):
        self.steps, self.device, self.turn = steps, device, 0

    def __call__(self, loss: Callable[..., Result]) -> tuple[float, float, float | None]:
        step = self.steps[self.turn % len(self.steps)]
        self.turn += 1
        if self.device.type != "cuda":
            start = time.perf_counter()
            outputs = step.forward(loss)
            middle = time.perf_counter()
            step.backward(outputs)
            return middle - start, time.perf_counter() - start, None
        begin, halfway, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        # A kernel that keeps the device busy while the host queues: small losses are then timed without launch gaps.
        torch.cuda._sleep(4_000_000)
        begin.record()
        start = time.perf_counter()
        outputs = step.forward(loss)
        halfway.record()
        step.backward(outputs)
        host = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(halfway) / 1e3, begin.elapsed_time(end) / 1e3, host


def orders(peers: Sequence[str]) -> Iterator[list[str]]:
    """Rounds without end. In as many as twice the peers each peer follows each of the others equally often: Williams 1949,
    "Experimental designs balanced for the estimation of residual effects of treatments".
    """
    shuffle, n = random.Random(0).shuffle, len(peers)
    steps = [(i + 1) // 2 if i % 2 else n - i // 2 for i in range(n)]  # 0, 1, -1, 2, -2, ...
    rows = [[peers[(start + step) % n] for step in steps] for start in range(n)]
    rows += [row[::-1] for row in rows]
    while True:
        shuffle(rows)
        yield from rows


def rounds(
    clock: Clock, losses: dict[str, Callable[..., Result]], least: int, seconds: float
) -> dict[str, list[tuple[float, float, float | None]]]:
    """Samples of every peer from the same rounds. Whoever follows a peer that leaves the caches cold, or makes the allocator give
    pages back, pays for it, so all follow all others equally often. At least `least` rounds, and more until `seconds` are spent.
    """
    for loss in losses.values():
        for _ in range(max(3, len(clock.steps))):
            clock(loss)
    samples: dict[str, list[tuple[float, float, float | None]]] = {p: [] for p in losses}
    schedule = orders(list(losses))
    start = time.perf_counter()
    while len(samples["eager"]) < least or (time.perf_counter() - start < seconds and len(samples["eager"]) < 200):
        for peer in next(schedule):
            samples[peer].append(clock(losses[peer]))
    return samples


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles, in microseconds."""
    low, middle, high = (1e6 * q for q in statistics.quantiles(values, n=4))
    return {"median": middle, "low": low, "high": high}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read plus bytes written; the better half of several, since noise only ever slows."""
    n = 1 << (30 if device.type == "cuda" else 27)
    a, b = (torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(9):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            b.copy_(a)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            b.copy_(a)
            times.append(time.perf_counter() - start)
    return 2 * n / statistics.median(sorted(times)[:5]) / 1e9


# ---- memory ----------------------------------------------------------------------------------------------------------------------


def peak_memory(step: Step, loss: Callable[..., Result], device: torch.device) -> int:
    """Bytes beyond the inputs at the worst moment of a step, gradients included."""
    if device.type == "cuda":
        for t in step.wanted:
            t.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(loss)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    for t in step.wanted:
        t.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(loss)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


# ---- one workload ----------------------------------------------------------------------------------------------------------------


def measure(workload: Workload, device: torch.device, dtype: torch.dtype, scale: str, quick: bool, copy: float) -> dict[str, Any]:
    """A record of one workload: `peers` holds the figures of each, or `wrong` names those whose numbers are off, and no speed."""
    losses = peers(workload)
    sizes = workload.sizes("quick" if quick and scale == "small" else scale)
    inputs = workload.inputs(Draw(device, dtype), **sizes)
    elements, forward_elements, step_elements = workload.traffic(**sizes)
    record: dict[str, Any] = {
        "workload": workload.name, "source": workload.source, "dtype": str(dtype).removeprefix("torch."), "scale": scale,
        "sizes": sizes, "elements": elements,
        "bytes_forward": forward_elements * dtype.itemsize, "bytes_step": step_elements * dtype.itemsize, "copy_gb_per_s": copy,
        "flops_step": 0 if workload.flops is None else workload.flops(**sizes),
        "errors": errors(workload, losses, inputs),
    }  # fmt: skip
    record["wrong"] = wrong(record["errors"], dtype)
    if record["wrong"]:
        return record
    copies = 1
    if device.type == "cuda":
        held = sum(t.numel() * t.element_size() for t in inputs.values())
        copies = min(64, max(1, -(-3 * torch.cuda.get_device_properties(device).L2_cache_size // held)))
    own_noise = device.type == "cuda"
    steps = [Step(inputs, own_noise)]
    steps += [Step(workload.inputs(Draw(device, dtype, seed), **sizes), own_noise) for seed in range(1, copies)]
    samples = rounds(Clock(steps, device), losses, *((7, 0.5) if quick else (31, 8.0)))
    host: dict[str, float | None] = dict.fromkeys(losses)
    if device.type == "cuda":
        host = {p: 1e6 * statistics.median(h for *_, h in s if h is not None) for p, s in samples.items()}
    else:
        # Peers that torch.compile made would compile once more for these shapes, longer than everything else takes.
        bare = {p: f for p, f in losses.items() if not quick or not p.startswith("compiled")}
        tiny = Step(workload.inputs(Draw(device, dtype), **workload.sizes("tiny")))
        for p, s in rounds(Clock([tiny], device), bare, *((15, 0.2) if quick else (51, 1.0))).items():
            host[p] = 1e6 * statistics.median(t for _, t, _ in s)
    record["rounds"] = len(samples["eager"])
    record["peers"] = {}
    for peer, s in samples.items():
        step = spread([t for _, t, _ in s])
        speed = record["bytes_step"] / step["median"] / 1e3
        record["peers"][peer] = {
            "forward_us": spread([t for t, _, _ in s]), "step_us": step, "host_us": host[peer],
            "peak_bytes": peak_memory(steps[0], losses[peer], device), "gb_per_s": speed, "share_of_copy": speed / copy,
            "gflop_per_s": record["flops_step"] / step["median"] / 1e3,
        }  # fmt: skip
    return record
