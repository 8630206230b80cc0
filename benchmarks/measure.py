"""How a workload is measured: its numerics first, then time, memory and bandwidth, every peer in every round.

On a GPU time is the device's, by events, with copies of the inputs rotated past the L2 cache, and the host's is apart. On a CPU it
is the wall's; the host's share is what is left of a step when its tensors have next to no elements.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import machine as machines
from .machine import Machine
from .workloads import Draw, Result, Workload

PEERS = ("eager", "torch parts", "compiled eager", "fastelbo", "compiled fastelbo")
OURS = ("fastelbo", "compiled fastelbo")

Inputs = dict[str, Tensor]
Sample = tuple[float, float, float]  # seconds: forward, forward and backward, and until the host had queued both


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

    def results(self, loss: Callable[..., Result]) -> list[Tensor]:
        """What the loss returns, and its gradients."""
        outputs = self.forward(loss)
        gradients = torch.autograd.grad(outputs, self.wanted, [None, self.grad_z][: len(outputs)], allow_unused=True)
        return [o.detach() for o in outputs] + [g for g in gradients if g is not None]


# ---- numerics --------------------------------------------------------------------------------------------------------------------

# Largest error of a result over its largest magnitude. float32: a peer's sums over millions and exp(logvar)'s rounding.
# Half precision: what eager code makes of it, which rounds every intermediate, and its sums.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
OWN_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
# Of matrix products, which round z and the residual to their dtype too, and add thousands of terms in another order. Triton's
# interpreter cuts bfloat16 off where a GPU rounds it.
OF_PRODUCTS = 2.5


def errors(workload: Workload, losses: dict[str, Callable[..., Result]], inputs: Inputs) -> dict[str, float]:
    """Each peer's largest error over the loss, z and every gradient, against the eager formula in float64."""
    wide = {k: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for k, t in inputs.items()}
    truth = Step(wide).results(workload.eager)
    return {peer: largest_error(Step(inputs).results(loss), truth) for peer, loss in losses.items()}


def largest_error(results: list[Tensor], truth: list[Tensor]) -> float:
    """Over the largest magnitude of each; NaN where a result has one, and 0 where all is as it should be, zeros too."""
    off = torch.stack([(a.double() - b.double()).abs().max() for a, b in zip(results, truth, strict=True)])
    size = torch.stack([b.double().abs().max() for b in truth])
    return float(torch.where(off == 0, off, off / size).max())


def wrong(found: dict[str, float], dtype: torch.dtype, products: bool = False) -> list[str]:
    """The peers whose numbers are off; not <= catches NaN."""
    own = OWN_TOLERANCE[dtype] * (OF_PRODUCTS if products else 1.0)
    return [p for p, e in found.items() if not e <= (own if p in OURS else TOLERANCE[dtype])]


# ---- time ------------------------------------------------------------------------------------------------------------------------


def timed(machine: Machine, first: Callable[[], Any], second: Callable[[Any], object] = lambda _: None) -> Sample:
    """Of `first`, and of `second` on what it returned."""
    machine.synchronize()
    # Small losses are timed without the gaps between launches.
    machine.keep_busy()
    begin = machine.mark()
    start = time.perf_counter()
    result = first()
    halfway = machine.mark()
    second(result)
    host = time.perf_counter() - start
    end = machine.mark()
    machine.synchronize()
    return machine.seconds(begin, halfway), machine.seconds(begin, end), host


class Clock:
    """Times one step; each call takes the next copy of the inputs."""

    def __init__(self, steps: list[Step], machine: Machine):
        self.steps, self.machine, self.turn = steps, machine, 0

    def __call__(self, loss: Callable[..., Result]) -> Sample:
        step = self.steps[self.turn % len(self.steps)]
        self.turn += 1
        return timed(self.machine, partial(step.forward, loss), step.backward)


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


def rounds(times: dict[str, Callable[[], Sample]], least: int, seconds: float) -> dict[str, list[Sample]]:
    """Samples of every peer from the same rounds. Whoever follows a peer that leaves the caches cold, or makes the allocator give
    pages back, pays for it, so all follow all others equally often. At least `least` rounds, and more until `seconds` are spent.
    """
    samples: dict[str, list[Sample]] = {p: [] for p in times}
    schedule = orders(list(times))
    start = time.perf_counter()
    done = 0
    while done < least or (time.perf_counter() - start < seconds and done < 200):
        for peer in next(schedule):
            samples[peer].append(times[peer]())
        done += 1
    return samples


def clocked(clock: Clock, losses: dict[str, Callable[..., Result]]) -> dict[str, Callable[[], Sample]]:
    """What `rounds` takes, warm."""
    for loss in losses.values():
        for _ in range(max(3, len(clock.steps))):
            clock(loss)
    return {p: partial(clock, loss) for p, loss in losses.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles, in microseconds."""
    low, middle, high = (1e6 * q for q in statistics.quantiles(values, n=4))
    return {"median": middle, "low": low, "high": high}


def copy_of(machine: Machine) -> tuple[int, Callable[[], Sample]]:
    """Bytes read plus bytes written by a large copy, and what times it."""
    a, b = (torch.zeros(machine.copy_bytes, dtype=torch.uint8, device=machine.device) for _ in range(2))
    return 2 * machine.copy_bytes, lambda: timed(machine, lambda: b.copy_(a))


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy; the better half of several, since noise only ever slows."""
    moved, copy = copy_of(machines.of(device))
    return moved / statistics.median(sorted(copy()[0] for _ in range(9))[:5]) / 1e9


# ---- memory ----------------------------------------------------------------------------------------------------------------------


def peak_memory(step: Step, loss: Callable[..., Result], device: torch.device) -> int:
    """Bytes beyond the inputs at the worst moment of a step, gradients included."""
    for t in step.wanted:
        t.grad = None
    return machines.of(device).peak_bytes(lambda: step(loss))


# ---- one workload ----------------------------------------------------------------------------------------------------------------


def checked(workload: Workload, losses: dict[str, Callable[..., Result]], inputs: Inputs, sizes: dict[str, int]) -> dict[str, Any]:
    """The head of a record: the sizes, the byte model, the errors, and in `wrong` the peers whose numbers are off."""
    dtype = next(t.dtype for t in inputs.values() if t.requires_grad)
    elements, forward_elements, step_elements = workload.traffic(**sizes)
    found = errors(workload, losses, inputs)
    off = wrong(found, dtype, products=workload.flops is not None)
    return {
        "workload": workload.name, "source": workload.source, "dtype": str(dtype).removeprefix("torch."), "sizes": sizes,
        "elements": elements, "bytes_forward": forward_elements * dtype.itemsize, "bytes_step": step_elements * dtype.itemsize,
        "flops_step": 0 if workload.flops is None else workload.flops(**sizes), "errors": found, "wrong": off,
    }  # fmt: skip


def rotated(workload: Workload, machine: Machine, inputs: Inputs, sizes: dict[str, int]) -> list[Inputs]:
    """As many draws of the inputs as keep a step from finding its own in the L2 cache."""
    held = sum(t.numel() * t.element_size() for t in inputs.values())
    copies = min(64, max(1, -(-3 * machine.l2_bytes // held)))
    dtype = next(t.dtype for t in inputs.values() if t.requires_grad)
    return [inputs] + [workload.inputs(Draw(machine.device, dtype, seed), **sizes) for seed in range(1, copies)]


def measure(workload: Workload, device: torch.device, dtype: torch.dtype, scale: str, quick: bool, copy: float) -> dict[str, Any]:
    """A record of one workload: `peers` holds the figures of each, or `wrong` names those whose numbers are off, and no speed."""
    losses = peers(workload)
    machine = machines.of(device)
    sizes = workload.sizes("quick" if quick and scale == "small" else scale)
    inputs = workload.inputs(Draw(device, dtype), **sizes)
    record = checked(workload, losses, inputs, sizes) | {"scale": scale, "copy_gb_per_s": copy}
    if record["wrong"]:
        return record
    own_noise = device.type == "cuda"
    steps = [Step(t, own_noise) for t in rotated(workload, machine, inputs, sizes)]
    samples = rounds(clocked(Clock(steps, machine), losses), *((7, 0.5) if quick else (31, 8.0)))
    host: dict[str, float | None] = dict.fromkeys(losses)
    if device.type == "cuda":
        host = {p: 1e6 * statistics.median(h for *_, h in s) for p, s in samples.items()}
    else:
        # Peers that torch.compile made would compile once more for these shapes, longer than everything else takes.
        bare = {p: f for p, f in losses.items() if not quick or not p.startswith("compiled")}
        tiny = Step(workload.inputs(Draw(device, dtype), **workload.sizes("tiny")))
        for p, s in rounds(clocked(Clock([tiny], machine), bare), *((15, 0.2) if quick else (51, 1.0))).items():
            host[p] = 1e6 * statistics.median(t for _, t, _ in s)
    record["rounds"] = len(samples["eager"])
    record["peers"] = {
        p: figures(record, samples[p], copy) | {"host_us": host[p], "peak_bytes": peak_memory(steps[0], losses[p], device)}
        for p in losses
    }
    return record


def figures(record: dict[str, Any], samples: list[Sample], copy: float) -> dict[str, Any]:
    """Times of a peer, and what they come to by the models of bytes and operations; copy: GB/s."""
    step = spread([t for _, t, _ in samples])
    speed = record["bytes_step"] / step["median"] / 1e3
    return {
        "forward_us": spread([t for t, _, _ in samples]), "step_us": step, "gb_per_s": speed, "share_of_copy": speed / copy,
        "gflop_per_s": record["flops_step"] / step["median"] / 1e3,
    }  # fmt: skip
