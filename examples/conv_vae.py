"""A convolutional VAE with both everyday likelihoods, on images whose bytes the loss reads as they lie.

- "bernoulli", the cross entropy, on black-and-white images: a pixel is 1 where it is in the brighter half of the grey scale.
- "gaussian" with one learned variance on grey or coloured ones. It balances the two terms of the loss, so that no weight is tuned.

The data ship with scikit-learn: 1797 digits of 8x8 pixels, and the patches of 16x16 pixels in three colours of two photographs.
They stay in uint8: `x_scale` and `x_shift` say what a byte counts as, and the loss makes no float copy of them.

The table has nats per sample of what was held out, as the ELBO has them, and bits per dimension: those of the discrete pixels, for
which the density counts as constant within a step of the grey scale. The baseline is the same likelihood without a latent variable:
what a pixel is in the mean of the training set. The exit status is 1 if a model is not better than that.

    python examples/conv_vae.py --plot results/conv_vae.png
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

import fastelbo

Likelihood = Literal["bernoulli", "gaussian"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPOCHS = 20
BATCH = 64
LATENTS = 16
LEARNING_RATE = 2e-3
PATCH = 16
SAMPLES_AT_THE_END = 20  # of z for each held-out image


# ---- the data --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    name: str
    train: Tensor  # uint8, (N, channels, size, size)
    held_out: Tensor
    steps: int  # of the grey scale, from black to white

    def black_and_white(self) -> Images:
        half = self.steps // 2
        return Images(self.name, (self.train > half).byte(), (self.held_out > half).byte(), 1)


def load(name: str, generator: torch.Generator) -> Images:
    if name == "digits":
        images, steps = torch.tensor(load_digits().images, dtype=torch.uint8).unsqueeze(1), 16
    else:
        photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images])
        patches = photographs.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (photograph, row, column, channel, y, x)
        images, steps = patches.flatten(0, 2).contiguous(), 255
    images = images[torch.randperm(len(images), generator=generator)].to(DEVICE)
    fifth = len(images) // 5
    return Images(name, images[fifth:], images[:fifth], steps)


# ---- the model -------------------------------------------------------------------------------------------------------------------


class ConvVAE(nn.Module):
    def __init__(self, images: Images, likelihood: Likelihood) -> None:
        super().__init__()
        channels, size = images.train.shape[1:3]
        inner = size // 4
        self.likelihood = likelihood
        # A byte counts as a number from 0 to 1. The cross entropy needs that, and a Gaussian can do with it.
        self.x_scale, self.x_shift = 1 / images.steps, 0.0
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * inner**2, 2 * LATENTS),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, 64 * inner**2), nn.GELU(), nn.Unflatten(1, (64, inner, inner)),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.GELU(),
            nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1),
        )  # fmt: skip
        self.recon_logvar = nn.Parameter(torch.tensor(-2.0)) if likelihood == "gaussian" else None

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Convolutions need floats. Centred, as weights are when they are drawn.
        mu, logvar = self.encoder(x * self.x_scale + self.x_shift - 0.5).chunk(2, dim=1)
        return mu, logvar

    def loss(self, x: Tensor, samples: int, seed: int) -> Tensor:
        """The negative ELBO in nats per image."""
        loss = fastelbo.sgvb_loss(
            self.decoder, x, *self.posterior(x), num_samples=samples, seed=seed, likelihood=self.likelihood,
            recon_logvar=self.recon_logvar, x_scale=self.x_scale, x_shift=self.x_shift,
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        return loss

    def mean(self, x: Tensor) -> Tensor:
        """Reconstructions from 0 to 1."""
        recon = self.decoder(self.posterior(x)[0])
        return torch.sigmoid(recon) if self.likelihood == "bernoulli" else recon.clamp(0, 1)


@dataclass
class Run:
    images: Images
    model: ConvVAE
    losses: list[float] = field(default_factory=list)  # mean of each epoch, nats per image
    nats: float = math.nan  # of the held-out images, per image
    baseline: float = math.nan
    seconds: float = 0.0

    @property
    def bits(self) -> float:
        """Per dimension of the discrete images: a density is one per unit, and a step of the grey scale is 1 / steps of it."""
        per_dimension = self.nats / self.images.held_out[0].numel()
        return (per_dimension + (math.log(self.images.steps) if self.model.likelihood == "gaussian" else 0.0)) / math.log(2)


def baseline(images: Images, likelihood: Likelihood) -> float:
    """Nats per held-out image without a latent variable: pixels that are independent, with their mean over the training set."""
    train, held_out = images.train / images.steps, images.held_out / images.steps
    mean = train.mean(0)
    if likelihood == "bernoulli":
        # As if each pixel had been seen once more, half black and half white: none is impossible.
        mean = (train.sum(0) + 0.5) / (len(train) + 1)
        return float(F.binary_cross_entropy(mean.expand_as(held_out), held_out, reduction="sum")) / len(held_out)
    variance = (train - mean).square().mean()
    nll = 0.5 * ((held_out - mean).square() / variance + torch.log(2 * math.pi * variance))
    return float(nll.sum()) / len(held_out)


def train(images: Images, likelihood: Likelihood, epochs: int, seed: int, console: Console | None = None) -> Run:
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        run = Run(images, ConvVAE(images, likelihood).to(DEVICE))
    generator = torch.Generator().manual_seed(seed)
    # One number against thousands of weights: at their rate it would take the whole training to get where it belongs.
    variance = [] if run.model.recon_logvar is None else [run.model.recon_logvar]
    weights = [*run.model.encoder.parameters(), *run.model.decoder.parameters()]
    optimizer = torch.optim.Adam([{"params": weights}, {"params": variance, "lr": 10 * LEARNING_RATE}], lr=LEARNING_RATE)
    steps = math.ceil(len(images.train) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    step = 0
    for _ in track(range(epochs), f"{images.name}, {likelihood}", console=console, disable=console is None):
        total = 0.0
        for rows in torch.randperm(len(images.train), generator=generator).split(BATCH):
            loss = run.model.loss(images.train[rows], 1, seed=step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            total += loss.item() * len(rows)
        run.losses.append(total / len(images.train))
    with torch.no_grad():
        run.nats = run.model.loss(images.held_out, SAMPLES_AT_THE_END, seed=step).item()
    run.baseline = baseline(images, likelihood)
    run.seconds = time.perf_counter() - started
    return run


# ---- what it shows ---------------------------------------------------------------------------------------------------------------


def table(runs: list[Run]) -> Table:
    made = Table(title="Held-out images", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for heading in ("data", "likelihood"):
        made.add_column(heading)
    for heading in ("nats per image", "baseline", "bits per dimension", "learned sigma", "seconds"):
        made.add_column(heading, justify="right")
    for run in runs:
        spread = run.model.recon_logvar
        sigma = "" if spread is None else f"{math.exp(spread.item() / 2):.4f}"
        row = (f"{run.nats:.2f}", f"{run.baseline:.2f}", f"{run.bits:.3f}", sigma, f"{run.seconds:.1f}")
        made.add_row(run.images.name, run.model.likelihood, *row, style=None if run.nats < run.baseline else "bold red")
    return made


@torch.no_grad()
def picture(runs: list[Run], path: Path) -> None:
    """For each run its loss, and held-out images above their reconstructions."""
    figure: Any = Figure(figsize=(11, 2.3 * len(runs)), dpi=110, layout="constrained")
    for row, run in zip(figure.subplots(len(runs), 2, squeeze=False, width_ratios=(1, 2)), runs, strict=True):
        curve, strip = row
        curve.plot(range(1, len(run.losses) + 1), run.losses, color="#d1495b")
        curve.axhline(run.baseline, color="k", linewidth=0.9, linestyle="--", label="baseline, held out")
        curve.plot(len(run.losses), run.nats, "ko", markersize=4, label="held out")
        curve.set(xlabel="epoch", ylabel="nats per image", title=f"{run.images.name}, {run.model.likelihood}")
        curve.locator_params(axis="x", integer=True)
        curve.legend(frameon=False)
        curve.spines[["top", "right"]].set_visible(False)
        shown = run.images.held_out[:14]
        both = torch.stack([shown / run.images.steps, run.model.mean(shown)]).cpu()
        framed = F.pad(both, (1, 1, 1, 1), value=1.0)  # (2, image, channel, y, x)
        pixels = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        strip.imshow(pixels.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        strip.set_title("held-out images and their reconstructions")
        strip.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train convolutional VAEs with a Bernoulli and a Gaussian likelihood.")
    parser.add_argument("--data", choices=("digits", "patches"), help="default both")
    parser.add_argument("--likelihood", choices=("bernoulli", "gaussian"), help="default both")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"default {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights, batches and noise (default 0)")
    parser.add_argument("--plot", type=Path, default=Path("results/conv_vae.png"), metavar="FILE", help="default %(default)s")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")

    console = Console()
    threads = torch.get_num_threads()
    # The models are small, so a second thread would save little; and with one the figures do not depend on the machine's cores.
    torch.set_num_threads(1)
    names = [args.data] if args.data else ["digits", "patches"]
    likelihoods: list[Likelihood] = [args.likelihood] if args.likelihood else ["bernoulli", "gaussian"]
    try:
        runs = []
        for name, likelihood in itertools.product(names, likelihoods):
            images = load(name, torch.Generator().manual_seed(args.seed))
            images = images.black_and_white() if likelihood == "bernoulli" else images
            runs.append(train(images, likelihood, args.epochs, args.seed, console))
        picture(runs, args.plot)
    finally:
        torch.set_num_threads(threads)
    console.print()
    console.print(table(runs))
    console.print(f"Picture: {args.plot}.", soft_wrap=True, highlight=False)
    if worse := [f"{run.images.name}, {run.model.likelihood}" for run in runs if not run.nats < run.baseline]:
        console.print(f"Not better than the baseline: {'; '.join(worse)}.", style="bold red")
        return 1
    console.print("Every model is better than its baseline.", style="bold green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
