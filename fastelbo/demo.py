"""A variational autoencoder on real digits, trained twice: with the loss as it is usually written, and with fastelbo's.

The two runs start from the same weights and see the same batches and the same noise, in lock-step, so that their losses can be
compared at every step. What differs between them is `usual_loss` and `fused_loss`, below.

The data are the 1797 handwritten digits of 8x8 pixels that ship with scikit-learn. Their intensities are the integers 0 to 16, for
which a density has no likelihood; uniform noise in [0, 1) on each pixel mends that (Theis, van den Oord & Bethge 2016), bounds the
learned variance from below (some pixels are the same in all digits), and keeps the negative ELBO away from zero, where a relative
difference would mean nothing.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastelbo

from . import backend

TOLERANCE = 1e-5
HELD_OUT = 360
LATENTS = 10
HIDDEN = 128
LEARNING_RATE = 2e-3

Terms = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Terms]


# ---- the loss, before and after --------------------------------------------------------------------------------------------------


def usual_loss(recon: Tensor, recon_logvar: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Terms:
    nll = 0.5 * (math.log(2 * math.pi) + recon_logvar + (x - recon) ** 2 / torch.exp(recon_logvar))
    kl = -0.5 * (1 + logvar - mu**2 - torch.exp(logvar))
    nll = nll.sum(1).mean()
    kl = kl.sum(1).mean()
    return nll + kl, nll.detach(), kl.detach()


def fused_loss(recon: Tensor, recon_logvar: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Terms:
    return fastelbo.elbo_loss(recon, x, mu, logvar, recon_logvar=recon_logvar, return_terms=True)  # type: ignore[return-value]


# ---- the model and its data ------------------------------------------------------------------------------------------------------


class VAE(nn.Module):
    """A small VAE whose decoder gives the mean and the log-variance of every pixel.

    The decoder's outputs count from each pixel's own mean and variance over the training digits, so training starts near the best
    Gaussian that ignores z. Without this, near-constant pixels make the first hundred steps unstable: losses jump, and the
    difference in rounding between two runs grows a thousandfold.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, digits: Tensor) -> None:
        super().__init__()
        # The uniform noise adds 1/2 to the mean and 1/12 to the variance.
        self.register_buffer("mean", digits.mean(0) + 1 / 2)
        self.register_buffer("variance", digits.var(0) + 1 / 12)
        pixels = digits.shape[1]
        self.encoder = nn.Sequential(
            nn.Linear(pixels, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * LATENTS)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * pixels)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder((x - self.mean) / 8).chunk(2, 1)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_ratio = self.decoder(z).chunk(2, 1)
        return self.mean + torch.sqrt(self.variance) * shift, torch.log(self.variance) + log_ratio

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """What the loss takes: recon, recon_logvar, x, mu, logvar."""
        mu, logvar = self.encode(x)
        z = mu + torch.exp(0.5 * logvar) * noise
        return *self.decode(z), x, mu, logvar


@dataclass
class Data:
    train: Tensor
    held_out: Tensor  # with its uniform noise
    held_out_noise: Tensor
    generator: torch.Generator

    def batch(self) -> tuple[Tensor, Tensor]:
        """The training digits with fresh uniform noise, and noise for z; drawn on the CPU, so that every device gets the same.

        One batch holds all of them. At 64 pixels a digit a smaller batch would time Python more than the loss.
        """
        uniform = torch.rand(self.train.shape, generator=self.generator)
        noise = torch.randn(len(self.train), LATENTS, generator=self.generator)
        return self.train + uniform.to(self.train.device), noise.to(self.train.device)


def load(seed: int, device: torch.device) -> Data:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.tensor(load_digits().data, dtype=torch.float32)
    digits = digits[torch.randperm(len(digits), generator=generator)]
    held_out = digits[:HELD_OUT] + torch.rand(HELD_OUT, digits.shape[1], generator=generator)
    noise = torch.randn(HELD_OUT, LATENTS, generator=generator)
    return Data(digits[HELD_OUT:].to(device), held_out.to(device), noise.to(device), generator)


# ---- training --------------------------------------------------------------------------------------------------------------------


@dataclass
class Epoch:
    """One row of the table: (usual, fastelbo) for each figure, in nats per digit."""

    epoch: int
    loss: tuple[float, float]
    nll: tuple[float, float]
    kl: tuple[float, float]
    held_out: tuple[float, float]


@dataclass
class Result:
    device: str
    backend: str
    seed: int
    threads: int
    batch_size: int
    losses: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # at every step, (usual, fastelbo)
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # in the loss, at every step
    gradients: list[float] = field(default_factory=list)  # difference at equal weights, at every row of the table
    drift: list[float] = field(default_factory=list)  # difference between the runs' own gradients, at every step
    epochs: list[Epoch] = field(default_factory=list)
    wall: float = 0.0

    @property
    def differences(self) -> list[float]:
        """Relative difference of the two losses at every step; NaN counts as the largest there is."""
        each = (abs(a - b) / abs(a) for a, b in zip(*self.losses, strict=True))
        return [math.inf if math.isnan(d) else d for d in each]

    @property
    def agrees(self) -> bool:
        return max(self.differences) <= TOLERANCE

    @property
    def times(self) -> tuple[float, float]:
        """Median seconds in the loss per step."""
        return statistics.median(self.seconds[0]), statistics.median(self.seconds[1])


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference in any tensor, relative to that tensor's largest entry."""
    each = [((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(each).max())


def parameter_gradients(model: VAE, loss: Loss, x: Tensor, noise: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss(*model(x, noise))[0], list(model.parameters())))


def time_loss(loss: Loss, outputs: tuple[Tensor, ...]) -> float:
    """Seconds in the loss alone: the call and the backward pass, from it to the outputs of the model."""
    recon, recon_logvar, x, mu, logvar = (t.detach() for t in outputs)
    for leaf in (recon, recon_logvar, mu, logvar):
        leaf.requires_grad_()
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    loss(recon, recon_logvar, x, mu, logvar)[0].backward()
    wait()
    return time.perf_counter() - start


def step(model: VAE, optimizer: torch.optim.Optimizer, loss_of: Loss, x: Tensor, noise: Tensor) -> Terms:
    loss, nll, kl = loss_of(*model(x, noise))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), nll, kl


def train(epochs: int, seed: int, device: torch.device, console: Console) -> tuple[Result, VAE, Data]:
    """Train both; return the figures, the model that fastelbo trained, and the data."""
    started = time.perf_counter()
    data = load(seed, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        usual = VAE(data.train.cpu()).to(device)
    fused = copy.deepcopy(usual)
    runs: tuple[tuple[VAE, Loss], ...] = ((usual, usual_loss), (fused, fused_loss))
    optimizers = [torch.optim.Adam(model.parameters(), lr=LEARNING_RATE) for model, _ in runs]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs) for o in optimizers]

    served = {backend.EAGER: "plain PyTorch", None: "reference"}.get(backend.choose(None, device), "Triton")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = Result(name, served, seed, torch.get_num_threads(), len(data.train))
    rows = {round(epochs * k / 10) for k in range(1, 11)} | {1}
    columns = TextColumn("training both"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=epochs, now="")
        for epoch in range(1, epochs + 1):
            x, noise = data.batch()
            if epoch in rows:
                at_equal_weights = [parameter_gradients(usual, loss, x, noise) for _, loss in runs]
                result.gradients.append(largest_difference(at_equal_weights[1], at_equal_weights[0]))

            terms = [step(model, o, loss, x, noise) for (model, loss), o in zip(runs, optimizers, strict=True)]
            for schedule in schedules:
                schedule.step()

            for run, of_run in enumerate(terms):
                result.losses[run].append(of_run[0].item())
            of_runs = [[p.grad for p in model.parameters() if p.grad is not None] for model, _ in runs]
            result.drift.append(largest_difference(of_runs[1], of_runs[0]))
            with torch.no_grad():
                outputs = fused(x, noise)
            # Interleaved, taking turns to go first: whatever else the machine does falls on both.
            for run in (0, 1) if epoch % 2 else (1, 0):
                result.seconds[run].append(time_loss(runs[run][1], outputs))

            if epoch in rows:
                with torch.no_grad():
                    held_out = [loss(*model(data.held_out, data.held_out_noise))[0].item() for model, loss in runs]
                loss, nll, kl = ((a.item(), b.item()) for a, b in zip(*terms, strict=True))
                result.epochs.append(Epoch(epoch, loss, nll, kl, (held_out[0], held_out[1])))
            now = f"-ELBO {result.losses[0][-1]:.2f} | {result.losses[1][-1]:.2f} nats"
            progress.update(task, advance=1, now=now)
    result.wall = time.perf_counter() - started
    return result, fused, data


# ---- what it shows ---------------------------------------------------------------------------------------------------------------


def tables(result: Result) -> tuple[Table, Table]:
    each = Table(
        title="Nats per digit. Left: the usual loss; right: fastelbo", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    each.add_column("epoch", justify="right")
    for title in ("ELBO", "nll", "KL", "held-out ELBO"):
        each.add_column(title, justify="center")
    for e in result.epochs:
        pairs = [(-e.loss[0], -e.loss[1]), e.nll, e.kl, (-e.held_out[0], -e.held_out[1])]
        each.add_row(str(e.epoch), *(f"{a:.2f} {b:.2f}" for a, b in pairs))

    usual, fused = result.times
    worst = max(result.differences)
    summary = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    summary.add_column()
    summary.add_column()
    summary.add_row("loss, largest relative difference", f"{worst:.1e} at step {result.differences.index(worst) + 1}")
    summary.add_row("gradients, at equal weights", f"{max(result.gradients):.1e}")
    summary.add_row("gradients, between the runs", f"{max(result.drift):.1e}")
    summary.add_row("time in the usual loss per step", f"{usual * 1e6:.0f} µs, forward and backward, median")
    summary.add_row("time in fastelbo's per step", f"{fused * 1e6:.0f} µs, {usual / fused:.2f} times as fast")
    threads = f", {result.threads} thread{'s'[: result.threads != 1]}" if result.device == "CPU" else ""
    summary.add_row("device", f"{result.device}{threads}")
    summary.add_row("fastelbo's backend", result.backend)
    summary.add_row(
        "training of both", f"{len(result.differences)} steps of {result.batch_size} digits, {result.wall:.0f} s in all"
    )
    return each, summary


@torch.no_grad()
def picture(result: Result, model: VAE, data: Data, path: Path) -> None:
    """Reconstructions of held-out digits, samples from the prior, and both loss curves."""
    ink, grey, accent = "#222222", "#9a9a9a", "#d1495b"
    figure: Any = Figure(figsize=(12, 6.2), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.05), wspace=0.03)
    above, below = left.subfigures(2, 1, height_ratios=(3.55, 5))

    shown = 10
    mu, _ = model.encode(data.held_out[:shown])
    mean, logvar = model.decode(mu)
    axes = above.subplots(3, shown, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    above.suptitle("Held-out digits, their reconstructions, and the learned standard deviation", fontsize=10, color=ink)
    for row, (label, images, top) in enumerate(
        (("digit", data.held_out[:shown], 17.0), ("mean", mean, 17.0), ("std", torch.exp(0.5 * logvar), 6.0))
    ):
        for column in range(shown):
            draw(axes[row, column], images[column], top, "gray_r" if row < 2 else "Blues")
        axes[row, 0].set_ylabel(label, fontsize=9, color=ink)

    z = torch.randn(5 * shown, LATENTS, generator=torch.Generator().manual_seed(result.seed)).to(data.held_out.device)
    below.suptitle("Samples from the prior: the decoder's mean at z ~ N(0, I)", fontsize=10, color=ink)
    for axis, image in zip(
        below.subplots(5, shown, gridspec_kw={"wspace": 0.04, "hspace": 0.04}).flat, model.decode(z)[0], strict=True
    ):
        draw(axis, image, 17.0, "gray_r")

    curves, gap = right.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (2.4, 1)})
    steps = range(1, len(result.losses[0]) + 1)
    curves.plot(steps, result.losses[0], color=grey, alpha=0.6, linewidth=6, solid_capstyle="round", label="usual loss")
    curves.plot(steps, result.losses[1], color=accent, linewidth=1.4, label="fastelbo")
    rows = [e.epoch for e in result.epochs]
    curves.plot(rows, [e.held_out[1] for e in result.epochs], "o", color=ink, markersize=3.5, label="fastelbo, held-out digits")
    curves.set_ylabel("negative ELBO, nats per digit")
    curves.set_title("The two runs, from the same weights and noise", fontsize=10, color=ink)
    curves.legend(frameon=False)
    # Equal losses have no place on a logarithmic axis: they are drawn on its lower edge.
    gap.semilogy(steps, [max(d, 1e-8) for d in result.differences], ".", color=accent, markersize=3)
    gap.axhline(TOLERANCE, color=ink, linewidth=0.9, linestyle="--")
    gap.annotate(f"tolerance {TOLERANCE:.0e}", (1, TOLERANCE), (0, -11), textcoords="offset points", fontsize=8, color=ink)
    gap.annotate("equal", (1, 1e-8), (0, 5), textcoords="offset points", fontsize=8, color=ink)
    gap.set_ylim(0.7e-8, max(3e-5, 3 * max(min(d, 1.0) for d in result.differences)))
    gap.set_xlabel("step")
    gap.set_ylabel("relative difference")
    for axis in (curves, gap):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    figure.savefig(path)


def draw(axis: Any, image: Tensor, top: float, colours: str) -> None:
    axis.imshow(image.reshape(8, 8).cpu().numpy(), cmap=colours, vmin=0, vmax=top)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def run(
    epochs: int = 400, seed: int = 0, out: Path = Path("results/demo"), device: str = "auto", console: Console | None = None
) -> int:
    """Train, print, draw; return the exit status: 1 if the two runs' losses ever differ by more than `TOLERANCE`.

    Raises:
        ValueError: `epochs` is not positive, or the device is not there.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is 'cuda', but torch {torch.__version__} sees no GPU")
    console = console or Console()
    chosen = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    threads = torch.get_num_threads()
    # The model is small: a second thread would save it little, and on a busy machine waiting for that thread costs tenfold.
    torch.set_num_threads(1)
    try:
        result, model, data = train(epochs, seed, chosen, console)
    finally:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    picture(result, model, data, out / "demo.png")
    (out / "demo.json").write_text(json.dumps(asdict(result)))
    console.print()
    console.print(*tables(result), sep="\n")
    console.print(f"Picture: {out / 'demo.png'}. Every step's figures: {out / 'demo.json'}.", soft_wrap=True, highlight=False)
    if not result.agrees:
        console.print(f"The runs disagree: their losses differ by more than {TOLERANCE:.0e} of their value.", style="bold red")
        return 1
    console.print(
        f"The runs agree: at no step do their losses differ by more than {TOLERANCE:.0e} of their value.", style="bold green"
    )
    return 0
