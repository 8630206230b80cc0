"""What anyone with a GPU runs and attaches: numerics against the oracle, then speed and memory against the eager formula.

    python -m benchmarks.gpu_check --out FOLDER [--device cuda|cpu] [--quick]

Writes FOLDER/numerics.json and FOLDER/speed.json, each with the GPU, the driver and the versions in it. A case whose numbers are
wrong reports no speed. `--device cpu` exercises the same code on the CPU backend; its times mean little.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import fastelbo

Loss = Callable[..., Tensor]

# (name, batch, elements, latents) of x and of the posterior: DESIGN's commonest losses, small to large.
SIZES = [
    ("mnist", 128, 784, 20),
    ("celeba-64", 64, 12_288, 128),
    ("latent-diffusion", 16, 196_608, 4_096),
    ("video", 1, 50_800_000, 1_123_200),
]


def describe(device: torch.device) -> dict[str, Any]:
    about: dict[str, Any] = {
        "fastelbo": fastelbo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = None
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
        about["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            about["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        except (OSError, subprocess.CalledProcessError):
            about["driver"] = None
    else:
        about["device"] = platform.processor() or platform.machine()
    return about


# ---- the losses ------------------------------------------------------------------------------------------------------------------


def eager_fixed(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dtype=torch.float32)
    return (0.5 * F.mse_loss(recon.float(), x.float(), reduction="sum") + kl) / recon.shape[0]


def eager_learned(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor) -> Tensor:
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dtype=torch.float32)
    nll = 0.5 * torch.sum(recon_logvar + (recon - x) ** 2 / recon_logvar.exp(), dtype=torch.float32)
    return (nll + kl) / recon.shape[0]


def fused(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor | None = None) -> Tensor:
    return fastelbo.elbo_loss(recon, x, mu, logvar, recon_logvar=recon_logvar, full=False)  # type: ignore[return-value]


def eager_sample(mu: Tensor, logvar: Tensor) -> Tensor:
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    return z.float().sum() - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dtype=torch.float32)


def fused_sample(mu: Tensor, logvar: Tensor) -> Tensor:
    z, kl = fastelbo.reparameterize_kl(mu, logvar, reduction="sum")
    return z.float().sum() + kl


# ---- numerics --------------------------------------------------------------------------------------------------------------------


def errors(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Errors against the float64 oracle, ours beside those of the eager formula in the same dtype, over sizes and dtypes."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, batch, elements, latents in SIZES[: 2 if quick else 3]:
            for learned in (False, True):
                inputs = make(device, dtype, batch, elements, latents, learned)
                oracle_inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
                oracle = fastelbo.elbo_loss(
                    *oracle_inputs[:4], recon_logvar=oracle_inputs[4] if learned else None, full=False, impl="reference"
                )
                truth = [oracle, *torch.autograd.grad(oracle, [t for t in oracle_inputs if t.requires_grad])]
                row: dict[str, Any] = {"case": name, "variance": "learned" if learned else "fixed", "dtype": str(dtype)[6:]}
                for peer, loss in (("fused", fused), ("eager", eager_learned if learned else eager_fixed)):
                    value = loss(*inputs)
                    grads = torch.autograd.grad(value, [t for t in inputs if t.requires_grad])
                    pairs = zip([value.detach(), *grads], truth, strict=True)
                    row[peer] = [float((a.double() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs]
                # One rounding of the gradient's dtype beyond what eager makes.
                slack = torch.finfo(dtype).eps
                row["ok"] = all(f <= e + slack for f, e in zip(row["fused"], row["eager"], strict=True))
                found.append(row)
    return found


def make(device: torch.device, dtype: torch.dtype, batch: int, elements: int, latents: int, learned: bool) -> list[Tensor]:
    def randn(n: int, scale: float, grad: bool) -> Tensor:
        return (scale * torch.randn(batch, n, device=device)).to(dtype).requires_grad_(grad)

    inputs = [randn(elements, 1, True), randn(elements, 1, False), randn(latents, 1, True), randn(latents, 0.3, True)]
    return [*inputs, randn(elements, 0.3, True)] if learned else inputs


# ---- speed -----------------------------------------------------------------------------------------------------------------------


def step(loss: Loss, inputs: list[Tensor]) -> None:
    for t in inputs:
        t.grad = None
    loss(*inputs).backward()


class Clock:
    """Device time by events on a GPU, with the inputs' copies rotated past its L2 cache; wall time elsewhere."""

    def __init__(self, device: torch.device, sets: list[list[Tensor]]):
        self.device, self.sets, self.turn = device, sets, 0

    def __call__(self, loss: Loss) -> tuple[float, float]:
        """(device seconds, host seconds until everything is queued) of one step."""
        inputs = self.sets[self.turn % len(self.sets)]
        self.turn += 1
        if self.device.type != "cuda":
            start = time.perf_counter()
            step(loss, inputs)
            taken = time.perf_counter() - start
            return taken, taken
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # A kernel that keeps the device busy while the host queues: small losses are then timed without launch gaps.
        torch.cuda._sleep(2_000_000)
        begin.record()
        start = time.perf_counter()
        step(loss, inputs)
        host = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, host


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and written."""
    n = 1 << (30 if device.type == "cuda" else 26)
    a, b = torch.empty(n, dtype=torch.uint8, device=device), torch.empty(n, dtype=torch.uint8, device=device)
    times = []
    for _ in range(7):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            b.copy_(a)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            b.copy_(a)
            times.append(time.perf_counter() - start)
    return 2 * n / statistics.median(times) / 1e9


def peak_memory(device: torch.device, loss: Loss, inputs: list[Tensor]) -> int | None:
    """Bytes beyond the inputs at the worst moment of a step, gradients included."""
    if device.type != "cuda":
        return None
    for t in inputs:
        t.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    loss(*inputs).backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def speeds(device: torch.device, quick: bool) -> dict[str, Any]:
    rounds = 11 if quick else 31
    copy = copy_bandwidth(device)
    rows = []
    cases: list[tuple[str, torch.dtype, dict[str, Loss], Callable[[], list[Tensor]], int]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, batch, elements, latents in SIZES[: 3 if quick or device.type == "cpu" else 4]:
            for learned in (False, True):
                eager = eager_learned if learned else eager_fixed
                peers: dict[str, Loss] = {"eager": eager, "compiled eager": torch.compile(eager, dynamic=False), "fastelbo": fused}
                bytes_moved = dtype.itemsize * batch * (elements * (5 if learned else 3) + latents * 4)
                args = (device, dtype, batch, elements, latents, learned)
                title = f"elbo_loss, {name}, {'learned' if learned else 'fixed'}"
                cases.append((title, dtype, peers, lambda a=args: make(*a), bytes_moved))
        latents = 1 << (22 if device.type == "cuda" else 18)
        peers = {"eager": eager_sample, "compiled eager": torch.compile(eager_sample, dynamic=False), "fastelbo": fused_sample}

        def moments(dtype: torch.dtype = dtype, latents: int = latents) -> list[Tensor]:
            return [(0.3 * torch.randn(16, latents // 16, device=device)).to(dtype).requires_grad_() for _ in range(2)]

        # The sum of z in the loss, read in forward and expanded in backward, is charged to every peer alike.
        cases.append(("reparameterize_kl", dtype, peers, moments, dtype.itemsize * latents * 8))
    for title, dtype, peers, inputs, bytes_moved in track(cases, description="speed"):
        torch._dynamo.reset()  # each case compiles its peer for its own shapes
        first = inputs()
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        size = sum(t.numel() * t.element_size() for t in first)
        copies = min(64, max(1, -(-3 * l2 // size)))
        clock = Clock(device, [first] + [inputs() for _ in range(copies - 1)])
        times: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers}
        for loss in peers.values():
            for _ in range(max(3, copies)):
                clock(loss)
        for _ in range(rounds):
            for peer, loss in peers.items():
                times[peer].append(clock(loss))
        row: dict[str, Any] = {"case": title, "dtype": str(dtype)[6:], "bytes": bytes_moved, "peers": {}}
        for peer, samples in times.items():
            seconds = statistics.median(s for s, _ in samples)
            row["peers"][peer] = {
                "us": 1e6 * seconds,
                "quartiles_us": [1e6 * q for q in statistics.quantiles([s for s, _ in samples], n=4)],
                "host_us": 1e6 * statistics.median(h for _, h in samples),
                "gb_per_s": bytes_moved / seconds / 1e9,
                "share_of_copy": bytes_moved / seconds / 1e9 / copy,
                "peak_bytes": peak_memory(device, peers[peer], first),
            }
        rows.append(row)
    return {"copy_gb_per_s": copy, "rows": rows}


# ---- reports ---------------------------------------------------------------------------------------------------------------------


def show_errors(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="largest error over largest magnitude, against the float64 oracle")
    for heading in ("case", "variance", "dtype", "fastelbo: loss, gradients", "eager: loss, gradients"):
        table.add_column(heading)
    for row in rows:
        shown = [" ".join(f"{e:.1e}" for e in row[peer]) for peer in ("fused", "eager")]
        table.add_row(row["case"], row["variance"], row["dtype"], *shown, style=None if row["ok"] else "red")
    console.print(table)


def show_speeds(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"forward + backward; a copy moves {result['copy_gb_per_s']:.0f} GB/s")
    for heading in ("case", "dtype"):
        table.add_column(heading)
    for heading in ("eager us", "compiled us", "fastelbo us", "times eager", "times compiled", "GB/s", "of copy", "host us", "MiB"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        eager, compiled, ours = (row["peers"][p] for p in ("eager", "compiled eager", "fastelbo"))
        table.add_row(
            row["case"], row["dtype"], *(f"{p['us']:.0f}" for p in (eager, compiled, ours)), f"{eager['us'] / ours['us']:.2f}",
            f"{compiled['us'] / ours['us']:.2f}", f"{ours['gb_per_s']:.0f}", f"{ours['share_of_copy']:.0%}",
            f"{ours['host_us']:.0f}", "" if ours["peak_bytes"] is None else f"{ours['peak_bytes'] / 2**20:.0f}",
        )  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 170)
    about = describe(device)
    console.print(about)

    rows = errors(device, options.quick)
    (options.out / "numerics.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    show_errors(console, rows)
    if not all(row["ok"] for row in rows):
        console.print("[red]the numbers are wrong: no speed is reported")
        return 1
    result = speeds(device, options.quick)
    (options.out / "speed.json").write_text(json.dumps({"about": about, **result}, indent=1))
    show_speeds(console, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
