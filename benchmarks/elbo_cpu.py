"""Forward + backward of `elbo_loss` on a CPU against the eager formula, interleaved round by round in random order.

    python -m benchmarks.elbo_cpu [--rounds N] [--threads N] [--json FILE]

Two eager formulas stand beside it where the variance is fixed: squares written out, and `F.mse_loss(reduction="sum")`. Medians of
the rounds with their quartiles; the numbers of each size are checked against each other before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import fastelbo

# (name, batch, elements, latents): MNIST, CelebA-64, an autoencoder for 256 x 256 images.
SIZES = [("mnist", 128, 784, 20), ("celeba-64", 64, 12_288, 128), ("image-256", 16, 196_608, 4_096)]


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def eager_squares(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (0.5 * ((recon - x) ** 2).sum() + kl(mu, logvar)) / recon.shape[0]


def eager_mse(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (0.5 * F.mse_loss(recon, x, reduction="sum") + kl(mu, logvar)) / recon.shape[0]


def eager_learned(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor) -> Tensor:
    nll = 0.5 * (recon_logvar + (recon - x) ** 2 / recon_logvar.exp()).sum()
    return (nll + kl(mu, logvar)) / recon.shape[0]


def fused(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor | None = None) -> Tensor:
    return fastelbo.elbo_loss(recon, x, mu, logvar, recon_logvar=recon_logvar, full=False, impl="torch")


def step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    for t in inputs:
        t.grad = None
    loss(*inputs).backward()


def check(losses: list[Callable[..., Tensor]], inputs: list[Tensor]) -> None:
    results = []
    for loss in losses:
        value = loss(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        results.append([value, *torch.autograd.grad(value, wanted)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)
    table = Table(title=f"elbo_loss forward + backward, {options.threads} threads, torch {torch.__version__}, us (quartiles)")
    for heading in ("size", "variance", "eager, squares", "eager, mse_loss", "fastelbo", "times faster"):
        table.add_column(heading, justify="left" if heading in ("size", "variance") else "right")
    rows = []
    for name, batch, elements, latents in SIZES:
        inputs = [
            torch.randn(batch, elements),
            torch.randn(batch, elements),
            torch.randn(batch, latents),
            torch.randn(batch, latents),
        ]
        inputs[3] *= 0.3
        for i in (0, 2, 3):
            inputs[i].requires_grad_()
        for variance in ("fixed", "learned"):
            if variance == "learned":
                inputs = [*inputs, (0.3 * torch.randn(batch, elements)).requires_grad_()]
            losses = [eager_squares, eager_mse, fused] if variance == "fixed" else [eager_learned, fused]
            check(losses, inputs)
            times: dict[str, list[float]] = {f.__name__: [] for f in losses}
            for _ in range(5):
                for f in losses:
                    step(f, inputs)
            for _ in track(range(options.rounds), description=f"{name}, {variance} variance", transient=True):
                # In a fixed order the first after a peer that makes the allocator return memory would always pay for it.
                for f in random.sample(losses, len(losses)):
                    start = time.perf_counter()
                    step(f, inputs)
                    times[f.__name__].append(1e6 * (time.perf_counter() - start))
            median = {k: statistics.median(v) for k, v in times.items()}
            quartiles = {k: statistics.quantiles(v, n=4) for k, v in times.items()}
            ratios = [median[f.__name__] / median["fused"] for f in losses[:-1]]
            shown = [f"{median[f.__name__]:.0f} ({quartiles[f.__name__][0]:.0f}-{quartiles[f.__name__][2]:.0f})" for f in losses]
            if variance == "learned":
                shown.insert(1, "")
            table.add_row(f"{name} {batch} x {elements}", variance, *shown, " / ".join(f"{r:.2f}" for r in ratios))
            rows.append(
                {"size": name, "batch": batch, "elements": elements, "latents": latents, "variance": variance, "us": median}
            )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if options.json:
        host = {"machine": platform.processor() or platform.machine(), "threads": options.threads, "torch": torch.__version__}
        with open(options.json, "w") as file:
            json.dump({"host": host, "fastelbo": fastelbo.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
