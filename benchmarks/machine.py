"""What measuring asks of a device: time, memory, CUDA graphs, clocks. `Gpu` asks the device; `Cpu` answers in its place.

Nothing else under benchmarks/ that measures knows which of the two it has, so that a CPU runs what a GPU runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# As `nvidia-smi --help-query-gpu` names them; all are only read.
CLOCKS = (
    "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip
# torch's profiler, which counts a CPU's memory, writes two lines to stderr each time, at level 5. It reads this at its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


class Cpu:
    device = torch.device("cpu")
    copy_bytes = 1 << 27
    l2_bytes = 0

    def mark(self) -> Any:
        """A point in the queue of work."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        return end - begin

    def synchronize(self) -> None:
        """Wait for the queue to empty."""

    def keep_busy(self) -> None:
        """Give the device some milliseconds of work, so that what follows is queued before it starts."""

    def peak_bytes(self, action: Callable[[], object]) -> int:
        """The most that the action allocates at once, beyond what there is before it."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            action()
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

    def capture(self, action: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """The action's results, and what computes them again in the same memory: the action itself, for want of a graph."""
        results = action()

        def replay() -> None:
            for old, new in zip(results, action(), strict=True):
                old.copy_(new)

        return results, replay

    def clocks(self) -> dict[str, str]:
        return {}

    def status(self) -> str:
        return "no GPU"


class Gpu:
    device = torch.device("cuda")
    copy_bytes = 1 << 30

    @property
    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def keep_busy(self) -> None:
        torch.cuda._sleep(4_000_000)

    def peak_bytes(self, action: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def capture(self, action: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """On a side stream after a warm-up there, as torch's notes on CUDA graphs ask for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                action()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = action()
        return results, graph.replay

    def clocks(self) -> dict[str, str]:
        """Clocks, power and temperature; of the first GPU where there are several."""
        values = nvidia_smi(f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader").split("\n")[0].split(",")
        return dict(zip(CLOCKS, map(str.strip, values), strict=False))

    def status(self) -> str:
        return nvidia_smi("-q", "-d", "CLOCK,POWER,TEMPERATURE,PERFORMANCE,MEMORY")


Machine = Cpu | Gpu


def of(device: torch.device) -> Machine:
    return Gpu() if device.type == "cuda" else Cpu()


def nvidia_smi(*arguments: str) -> str:
    """What it prints, or why it prints nothing."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"no answer of nvidia-smi: {error}"
