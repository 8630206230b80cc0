"""A hierarchical VAE of two levels with a learned prior, with and without free bits.

    p(z2) = N(0, I)    p(z1 | z2) = N(m(z2), s(z2)^2)    p(x | z1, z2) = Bernoulli
    q(z2 | x)          q(z1 | x, z2)

    -ELBO = -log p(x | z1, z2) + KL(q(z1 | x, z2) || p(z1 | z2)) + KL(q(z2 | x) || p(z2))

Both KLs are in closed form given a sample of z2, and `fastelbo.reparameterize_kl` computes each together with the sample of its own
level; the first has a prior that is learned, with gradients to both sides.

Such models tend to leave latents unused: early in the training they cost more than they explain. Free bits (Kingma et al. 2016,
"Improved variational inference with inverse autoregressive flow", equation 15) put a floor under the KL of each latent in the mean
over the batch. Below it the KL costs nothing more, and has no gradient. The table shows what each level holds with and without.

The data are the 1797 digits of 8x8 pixels that ship with scikit-learn, in black and white. The exit status is 1 if the held-out
bound is not better than independent pixels, or if no more latents are in use with free bits than without.

    python examples/hierarchical_vae.py --free-bits 0.2 --plot results/hierarchical_vae.png
"""

from __future__ import annotations

import argparse
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
BATCH = 128
LEARNING_RATE = 2e-3
LOWER, UPPER, HIDDEN = 12, 6, 128
FREE_BITS = 0.2
EVERY = 20  # steps, a look at the held-out digits
SAMPLES_AT_THE_END = 20
# A latent that is worth less than this holds nothing.
ACTIVE = 0.05


def load(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training and held-out digits: bytes that are 0 or 1."""
    digits = torch.tensor(load_digits().data > 8, dtype=torch.uint8)
    digits = digits[torch.randperm(len(digits), generator=generator)].to(DEVICE)
    fifth = len(digits) // 5
    return digits[fifth:], digits[:fifth]


def baseline(train: Tensor, held_out: Tensor) -> float:
    """Nats per held-out digit of pixels that are independent, with their frequencies in the training set."""
    # As if each pixel had been seen once more, half black and half white: none is impossible.
    logits = torch.logit((train.float().sum(0) + 0.5) / (len(train) + 1))
    return fastelbo.bernoulli_nll(logits.expand(held_out.shape), held_out, x_scale=1, reduction="batchmean").item()


# ---- the model -------------------------------------------------------------------------------------------------------------------


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs))


@dataclass(frozen=True)
class Terms:
    """Of a batch, in nats."""

    nll: Tensor  # per digit, the mean over the batch
    lower: Tensor  # the KL of z1
    upper: Tensor  # that of z2


class LadderVAE(nn.Module):
    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.q_upper = perceptron(pixels, 2 * UPPER)
        self.q_lower = perceptron(pixels + UPPER, 2 * LOWER)
        self.p_lower = perceptron(UPPER, 2 * LOWER)
        self.decoder = perceptron(LOWER + UPPER, pixels)

    def forward(self, x: Tensor, seed: int, **kl: Any) -> Terms:
        """The KLs as the options `kl` of `reparameterize_kl` have them."""
        pixels = x.float() - 0.5
        z2, upper = fastelbo.reparameterize_kl(*self.q_upper(pixels).chunk(2, dim=1), seed=2 * seed, **kl)
        posterior = self.q_lower(torch.cat([pixels, z2], dim=1)).chunk(2, dim=1)
        prior = self.p_lower(z2).chunk(2, dim=1)
        z1, lower = fastelbo.reparameterize_kl(*posterior, *prior, seed=2 * seed + 1, **kl)
        logits = self.decoder(torch.cat([z1, z2], dim=1))
        nll = fastelbo.bernoulli_nll(logits, x, x_scale=1, reduction="batchmean")
        return Terms(nll, lower, upper)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Digits from the prior: probabilities of their pixels."""
        z2 = torch.randn(count, UPPER, generator=generator).to(DEVICE)
        mu, logvar = self.p_lower(z2).chunk(2, dim=1)
        z1 = mu + torch.exp(logvar / 2) * torch.randn(mu.shape, generator=generator).to(DEVICE)
        return torch.sigmoid(self.decoder(torch.cat([z1, z2], dim=1)))


@dataclass(frozen=True)
class Measured:
    """Of held-out digits, in nats."""

    bound: float  # the ELBO, per digit
    lower: Tensor  # (LOWER,): the KL of each latent of z1, the mean over the digits
    upper: Tensor  # (UPPER,): the same of z2

    @property
    def active(self) -> tuple[int, int]:
        """How many latents of z1 and of z2 are in use."""
        return int((self.lower > ACTIVE).sum()), int((self.upper > ACTIVE).sum())


@torch.no_grad()
def measure(model: LadderVAE, digits: Tensor, seeds: Sequence[int]) -> Measured:
    """Averaged over the noise of several seeds."""
    each = [model(digits, seed, batch_dims=2) for seed in seeds]
    nll = torch.stack([terms.nll for terms in each]).mean()
    lower = torch.stack([terms.lower.mean(0) for terms in each]).mean(0)
    upper = torch.stack([terms.upper.mean(0) for terms in each]).mean(0)
    return Measured(-(nll + lower.sum() + upper.sum()).item(), lower.cpu(), upper.cpu())


@dataclass
class Run:
    floor: float  # nats
    model: LadderVAE
    course: dict[int, Measured] = field(default_factory=dict)  # by the step
    seconds: float = 0.0

    @property
    def end(self) -> Measured:
        return self.course[max(self.course)]


def train(digits: Tensor, held_out: Tensor, floor: float, steps: int, seed: int, console: Console | None = None) -> Run:
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        run = Run(floor, LadderVAE(digits.shape[1]).to(DEVICE))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(run.model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in track(range(steps), f"free bits {floor:g} per latent", console=console, disable=console is None):
        if step % EVERY == 0:
            run.course[step] = measure(run.model, held_out, [step])
        x = digits[torch.randint(len(digits), (BATCH,), generator=generator)]
        terms = run.model(x, step, free_bits=floor, reduction="batchmean")
        loss = terms.nll + terms.lower + terms.upper
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    run.course[steps] = measure(run.model, held_out, range(steps, steps + SAMPLES_AT_THE_END))
    run.seconds = time.perf_counter() - started
    return run


# ---- what it shows ---------------------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run], plain: float) -> Table:
    made = Table(title="Held-out digits, nats", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for heading in ("free bits", "-ELBO", "baseline", "KL z1", "KL z2", "active z1", "active z2", "seconds"):
        made.add_column(heading, justify="right")
    for run in runs:
        active = [f"{used} of {size}" for used, size in zip(run.end.active, (LOWER, UPPER), strict=True)]
        kls = [f"{kl.sum().item():.3f}" for kl in (run.end.lower, run.end.upper)]
        made.add_row(f"{run.floor:g}", f"{-run.end.bound:.2f}", f"{plain:.2f}", *kls, *active, f"{run.seconds:.1f}")
    return made


@torch.no_grad()
def picture(runs: Sequence[Run], plain: float, path: Path, seed: int) -> None:
    """The held-out bound and latents in use by step, the KL of each latent, and samples of the last run."""
    colours = ("#9a9a9a", "#d1495b")
    figure: Any = Figure(figsize=(11, 6.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2)
    for run, colour in zip(runs, colours, strict=True):
        label = f"free bits {run.floor:g}"
        axes[0, 0].plot(list(run.course), [m.bound for m in run.course.values()], color=colour, label=label)
        axes[0, 1].plot(list(run.course), [sum(m.active) for m in run.course.values()], color=colour, label=label)
        latents = torch.cat([run.end.lower, run.end.upper])
        offset = -0.2 if run is runs[0] else 0.2
        axes[1, 0].bar([i + offset for i in range(1, len(latents) + 1)], latents.tolist(), width=0.4, color=colour, label=label)
    axes[0, 0].axhline(-plain, color="k", linewidth=0.9, linestyle="--", label="independent pixels")
    axes[0, 0].set(xlabel="step", ylabel="held-out ELBO, nats per digit", ylim=(1.5 * -plain, None))
    axes[0, 1].set(xlabel="step", ylabel="latents in use")
    axes[1, 0].set(xlabel="latent: z1, then z2", ylabel="held-out KL, nats")
    axes[0, 1].locator_params(axis="y", integer=True)
    axes[1, 0].locator_params(axis="x", integer=True)
    axes[1, 0].axvline(LOWER + 0.5, color="k", linewidth=0.9, linestyle="--")
    for axis in axes.flat[:3]:
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    digits = runs[-1].model.sample(40, torch.Generator().manual_seed(seed)).view(4, 10, 8, 8).cpu()
    framed = nn.functional.pad(digits, (1, 1, 1, 1), value=0.5)
    axes[1, 1].imshow(framed.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes[1, 1].set_title(f"samples from the prior, free bits {runs[-1].floor:g}")
    axes[1, 1].axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a hierarchical VAE of two levels with and without free bits.")
    parser.add_argument("--free-bits", type=float, default=FREE_BITS, metavar="F", help=f"nats per latent (default {FREE_BITS})")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"default {STEPS}")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights, batches and noise (default 0)")
    parser.add_argument(
        "--plot", type=Path, default=Path("results/hierarchical_vae.png"), metavar="FILE", help="default %(default)s"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if not args.free_bits > 0:
        parser.error(f"--free-bits must be positive, got {args.free_bits}: the other run has none")

    console = Console()
    threads = torch.get_num_threads()
    # The model is small, so a second thread would save little; and with one the figures do not depend on the machine's cores.
    torch.set_num_threads(1)
    try:
        digits, held_out = load(torch.Generator().manual_seed(args.seed))
        plain = baseline(digits, held_out)
        runs = [train(digits, held_out, floor, args.steps, args.seed, console) for floor in (0.0, args.free_bits)]
        picture(runs, plain, args.plot, args.seed)
    finally:
        torch.set_num_threads(threads)
    console.print()
    console.print(table(runs, plain))
    console.print(f"Picture: {args.plot}.", soft_wrap=True, highlight=False)
    without, with_free_bits = runs
    failed = []
    if not min(without.end.bound, with_free_bits.end.bound) > -plain:
        failed.append("not better than independent pixels")
    if not sum(with_free_bits.end.active) > sum(without.end.active):
        failed.append("free bits keep no more latents in use")
    if failed:
        console.print(f"Failed: {'; '.join(failed)}.", style="bold red")
        return 1
    console.print("Both are better than independent pixels, and free bits keep more latents in use.", style="bold green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
