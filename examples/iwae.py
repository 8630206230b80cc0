"""The importance-weighted bound of Burda et al. against the ELBO: it rises with the number of samples, and can be trained on.

    L_S = E log (1/S) sum_s w_s,    w_s = p(x | z_s) p(z_s) / q(z_s | x),    z_1 ... z_S ~ q(z | x)

L_1 is the ELBO. Every further sample makes the bound tighter, up to log p(x) (Burda, Grosse & Salakhutdinov 2016, "Importance
weighted autoencoders", theorem 1). Two models are trained on the same digits, one on L_1 and one on L_S, and both are measured with
more and more samples. The table has each bound with its standard error, which is that of the noise in z: the digits are the same.

The data are the 1797 digits of 8x8 pixels that ship with scikit-learn, in black and white. The exit status is 1 if a bound at 50
samples is not above that at one, by more than the standard error of the difference.

    python examples/iwae.py --samples 20 --plot results/iwae.png
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastelbo

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 1500
BATCH = 64
LEARNING_RATE = 2e-3
LATENTS, HIDDEN = 10, 128
SAMPLES = 20
MEASURED = (1, 2, 5, 10, 20, 50, 100, 200)
REPEATS = 20  # of each measurement, with other noise


def load(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training and held-out digits: bytes that are 0 or 1."""
    digits = torch.tensor(load_digits().data > 8, dtype=torch.uint8)
    digits = digits[torch.randperm(len(digits), generator=generator)].to(DEVICE)
    fifth = len(digits) // 5
    return digits[fifth:], digits[:fifth]


class VAE(nn.Module):
    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, pixels))

    def negative_bound(self, x: Tensor, samples: int, seed: int) -> Tensor:
        """-L_S in nats per digit."""
        mu, logvar = self.encoder(x.float() - 0.5).chunk(2, dim=1)
        loss = fastelbo.sgvb_loss(
            self.decoder, x, mu, logvar, objective="iwae", num_samples=samples, seed=seed, likelihood="bernoulli", x_scale=1
        )
        assert isinstance(loss, Tensor)
        return loss


@dataclass
class Run:
    samples: int
    model: VAE
    bounds: list[float] = field(default_factory=list)  # of every step's batch
    held_out: list[Tensor] = field(default_factory=list)  # for each of MEASURED: (REPEATS,), nats per digit
    seconds: float = 0.0

    def rise(self, samples: int) -> tuple[float, float]:
        """How far the bound with so many samples is above the one with a single one, and the standard error of that."""
        apart = self.held_out[MEASURED.index(samples)] - self.held_out[0]
        return apart.mean().item(), error(apart)


def error(repeats: Tensor) -> float:
    """Standard error of the mean."""
    return repeats.std().item() / math.sqrt(len(repeats))


def train(digits: Tensor, held_out: Tensor, samples: int, steps: int, seed: int, console: Console | None = None) -> Run:
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        run = Run(samples, VAE(digits.shape[1]).to(DEVICE))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(run.model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in track(range(steps), f"trained on {samples} samples", console=console, disable=console is None):
        x = digits[torch.randint(len(digits), (BATCH,), generator=generator)]
        loss = run.model.negative_bound(x, samples, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.bounds.append(-loss.item())
    with torch.no_grad():
        for count in MEASURED:
            # Each measurement has noise of its own, so that its errors are independent.
            seeds = range(steps + REPEATS * count, steps + REPEATS * (count + 1))
            run.held_out.append(torch.tensor([-run.model.negative_bound(held_out, count, s).item() for s in seeds]))
    run.seconds = time.perf_counter() - started
    return run


# ---- what it shows ---------------------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> Table:
    made = Table(title="Held-out bounds on log p(x), nats per digit", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    made.add_column("samples", justify="right")
    for run in runs:
        made.add_column(f"trained on {run.samples}", justify="right")
    for i, count in enumerate(MEASURED):
        made.add_row(str(count), *(f"{run.held_out[i].mean():.3f} ± {error(run.held_out[i]):.3f}" for run in runs))
    return made


def picture(runs: Sequence[Run], path: Path) -> None:
    """The bound in training, and the held-out bound by the number of samples."""
    figure: Any = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, colour in zip(runs, ("#9a9a9a", "#d1495b"), strict=True):
        label = f"trained on {run.samples} sample{'s' if run.samples > 1 else ''}"
        smooth = torch.tensor(run.bounds).unfold(0, min(20, len(run.bounds)), 1).mean(1)
        left.plot(range(len(run.bounds) - len(smooth) + 1, len(run.bounds) + 1), smooth, color=colour, label=label)
        means, errors = [b.mean().item() for b in run.held_out], [error(b) for b in run.held_out]
        right.errorbar(MEASURED, means, yerr=errors, fmt="o-", markersize=4, color=colour, label=label)
    left.set(xlabel="step", ylabel="nats per digit", title="What is maximised: its own bound for each")
    right.set(xlabel="samples of z", ylabel="nats per digit", xscale="log", title="Held-out bound: one sample is the ELBO")
    for axis in (left, right):
        axis.legend(frameon=False, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train on the ELBO and on an importance-weighted bound, and compare the bounds.")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="S", help=f"of the second training (default {SAMPLES})")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"default {STEPS}")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights, batches and noise (default 0)")
    parser.add_argument("--plot", type=Path, default=Path("results/iwae.png"), metavar="FILE", help="default %(default)s")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.samples < 2:
        parser.error(f"--samples must be at least 2, got {args.samples}: with one it is the ELBO")

    console = Console()
    threads = torch.get_num_threads()
    # The model is small, so a second thread would save little; and with one the figures do not depend on the machine's cores.
    torch.set_num_threads(1)
    try:
        digits, held_out = load(torch.Generator().manual_seed(args.seed))
        runs = [train(digits, held_out, samples, args.steps, args.seed, console) for samples in (1, args.samples)]
        picture(runs, args.plot)
    finally:
        torch.set_num_threads(threads)
    console.print()
    console.print(table(runs))
    console.print(f"Picture: {args.plot}.", soft_wrap=True, highlight=False)
    for run in runs:
        rise, spread = run.rise(50)
        console.print(f"Trained on {run.samples}: 50 samples raise the bound by {rise:.3f} ± {spread:.3f} nats.", highlight=False)
        if not rise > spread:
            console.print("That is within its standard error.", style="bold red")
            return 1
    console.print("The bound rises with the number of samples.", style="bold green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
