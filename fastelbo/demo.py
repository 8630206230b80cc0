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


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs)
    )  # fmt: skip


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
        self.encoder, self.decoder = network(pixels, 2 * LATENTS), network(LATENTS, 2 * pixels)

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


class Data:
    """The digits, and noise that is drawn on the CPU, so that every device gets the same."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)
        digits = torch.tensor(load_digits().data, dtype=torch.float32)
        digits = digits[torch.randperm(len(digits), generator=self.generator)].to(device)
        self.train = digits[HELD_OUT:]
        self.held_out, self.held_out_noise = self.with_noise(digits[:HELD_OUT])

    def with_noise(self, digits: Tensor) -> tuple[Tensor, Tensor]:
        """The digits with fresh uniform noise, and noise for z."""
        uniform = torch.rand(digits.shape, generator=self.generator)
        noise = torch.randn(len(digits), LATENTS, generator=self.generator)
        return digits + uniform.to(self.device), noise.to(self.device)


# ---- training --------------------------------------------------------------------------------------------------------------------


def pair_of_lists() -> tuple[list[float], list[float]]:
    return [], []


@dataclass
class Result:
    """The figures of both runs. What has two parts is (usual, fastelbo)."""

    device: str
    backend: str
    seed: int
    threads: int
    batch_size: int
    losses: tuple[list[float], list[float]] = field(default_factory=pair_of_lists)  # at every step
    seconds: tuple[list[float], list[float]] = field(default_factory=pair_of_lists)  # in the loss, at every step
    gradients: list[float] = field(default_factory=list)  # difference at equal weights, at every row of the table
    drift: list[float] = field(default_factory=list)  # difference between the runs' own gradients, at every step
    epochs: list[dict[str, Any]] = field(default_factory=list)  # the rows of the table, in nats per digit
    wall: float = 0.0

    @property
    def differences(self) -> list[float]:
        """Relative difference of the two losses at every step; NaN counts as the largest there is."""
        each = (abs(a - b) / abs(a) for a, b in zip(*self.losses, strict=True))
        return [math.inf if math.isnan(d) else d for d in each]

    @property
    def agrees(self) -> bool:
        return max(self.differences) <= TOLERANCE


def largest_difference(usual: list[Tensor], fused: list[Tensor]) -> float:
    """The largest difference in any tensor, relative to that tensor's largest entry."""
    each = [(a - b).abs().max() / a.abs().max().clamp_min(1e-30) for a, b in zip(usual, fused, strict=True)]
    return float(torch.stack(each).max())


def evaluate(model: VAE, loss_of: Loss, x: Tensor, noise: Tensor) -> tuple[Terms, list[Tensor]]:
    """Loss, nll and KL, and the gradients of the parameters."""
    loss, nll, kl = loss_of(*model(x, noise))
    return (loss.detach(), nll, kl), list(torch.autograd.grad(loss, list(model.parameters())))


def time_loss(loss_of: Loss, outputs: tuple[Tensor, ...]) -> float:
    """Seconds in the loss alone: the call and the backward pass, from it to the outputs of the model."""
    recon, recon_logvar, x, mu, logvar = (t.detach() for t in outputs)
    for leaf in (recon, recon_logvar, mu, logvar):
        leaf.requires_grad_()
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    loss_of(recon, recon_logvar, x, mu, logvar)[0].backward()
    wait()
    return time.perf_counter() - start


def train(epochs: int, seed: int, device: torch.device, console: Console) -> tuple[Result, VAE, Data]:
    """Train both; return the figures, the model that fastelbo trained, and the data."""
    started = time.perf_counter()
    data = Data(seed, device)
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
            # One batch holds all digits. At 64 pixels a digit a smaller batch would time Python more than the loss.
            x, noise = data.with_noise(data.train)
            if epoch in rows:
                at_equal_weights = [evaluate(usual, loss_of, x, noise)[1] for _, loss_of in runs]
                result.gradients.append(largest_difference(*at_equal_weights))

            found = [evaluate(model, loss_of, x, noise) for model, loss_of in runs]
            result.drift.append(largest_difference(*(gradients for _, gradients in found)))
            for (model, _), (terms, gradients), optimizer, schedule, losses in zip(
                runs, found, optimizers, schedules, result.losses, strict=True
            ):
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                losses.append(terms[0].item())

            with torch.no_grad():
                outputs = fused(x, noise)
            # Interleaved, taking turns to go first: whatever else the machine does falls on both.
            for run in (0, 1) if epoch % 2 else (1, 0):
                result.seconds[run].append(time_loss(runs[run][1], outputs))

            if epoch in rows:
                with torch.no_grad():
                    held_out = [loss_of(*model(data.held_out, data.held_out_noise))[0].item() for model, loss_of in runs]
                loss, nll, kl = ([t.item() for t in pair] for pair in zip(*(terms for terms, _ in found), strict=True))
                result.epochs.append({"epoch": epoch, "loss": loss, "nll": nll, "kl": kl, "held_out": held_out})
            now = f"-ELBO {result.losses[0][-1]:.2f} | {result.losses[1][-1]:.2f} nats"
            progress.update(task, advance=1, now=now)
    result.wall = time.perf_counter() - started
    return result, fused, data


# ---- what it shows ---------------------------------------------------------------------------------------------------------------


def tables(result: Result) -> tuple[Table, Table]:
    title = "Nats per digit. Left: the usual loss; right: fastelbo"
    each = Table("epoch", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("ELBO", "nll", "KL", "held-out ELBO"):
        each.add_column(heading, justify="center")
    for e in result.epochs:
        pairs = [[-loss for loss in e["loss"]], e["nll"], e["kl"], [-loss for loss in e["held_out"]]]
        each.add_row(f"{e['epoch']:5}", *(f"{a:.2f} {b:.2f}" for a, b in pairs))

    usual, fused = (statistics.median(seconds) for seconds in result.seconds)
    worst = max(result.differences)
    threads = f", {result.threads} thread{'s'[: result.threads != 1]}" if result.device == "CPU" else ""
    summary = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for fact in {
        "loss, largest relative difference": f"{worst:.1e} at step {result.differences.index(worst) + 1}",
        "gradients, at equal weights": f"{max(result.gradients):.1e}",
        "gradients, between the runs": f"{max(result.drift):.1e}",
        "time in the usual loss per step": f"{usual * 1e6:.0f} µs, forward and backward, median",
        "time in fastelbo's per step": f"{fused * 1e6:.0f} µs, {usual / fused:.2f} times as fast",
        "device": f"{result.device}{threads}",
        "fastelbo's backend": result.backend,
        "training of both": f"{len(result.differences)} steps of {result.batch_size} digits, {result.wall:.0f} s in all",
    }.items():
        summary.add_row(*fact)
    return each, summary


def side_by_side(images: Tensor, columns: int = 10) -> Any:
    """One picture of many, with a white border around each."""
    framed = nn.functional.pad(images.cpu().view(-1, columns, 8, 8), (1, 1, 1, 1), value=math.nan)
    return framed.transpose(1, 2).flatten(2).flatten(0, 1).numpy()


@torch.no_grad()
def picture(result: Result, model: VAE, data: Data, path: Path) -> None:
    """Reconstructions of held-out digits, samples from the prior, and both loss curves."""
    digits = data.held_out[:10]
    mean, logvar = model.decode(model.encode(digits)[0])
    z = torch.randn(50, LATENTS, generator=torch.Generator().manual_seed(result.seed)).to(digits.device)
    strips = (
        ("Held-out digits", digits, 17, "gray_r"),
        ("Their reconstructions", mean, 17, "gray_r"),
        ("The learned standard deviation", torch.exp(0.5 * logvar), 6, "Blues"),
        ("Samples from the prior: the decoder's mean at z ~ N(0, I)", model.decode(z)[0], 17, "gray_r"),
    )
    figure: Any = Figure(figsize=(12, 6.2), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.05), wspace=0.03)
    for axis, (title, images, top, colours) in zip(left.subplots(4, 1, height_ratios=(1, 1, 1, 5)), strips, strict=True):
        axis.imshow(side_by_side(images), cmap=colours, vmin=0, vmax=top)
        axis.set_title(title, fontsize=10)
        axis.axis("off")

    grey, accent, ink = "#9a9a9a", "#d1495b", "#222222"
    curves, gap = right.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    steps = range(1, len(result.losses[0]) + 1)
    curves.plot(steps, result.losses[0], color=grey, alpha=0.6, linewidth=6, solid_capstyle="round", label="usual loss")
    curves.plot(steps, result.losses[1], color=accent, linewidth=1.4, label="fastelbo")
    held_out = {e["epoch"]: e["held_out"][1] for e in result.epochs}
    curves.plot(held_out.keys(), held_out.values(), "o", color=ink, markersize=3.5, label="fastelbo, held-out digits")
    curves.set_ylabel("negative ELBO, nats per digit")
    curves.set_title("The two runs, from the same weights and noise", fontsize=10)
    curves.legend(frameon=False)
    # Equal losses have no place on a logarithmic axis: they are drawn on its lower edge.
    gap.semilogy(steps, [max(d, 1e-8) for d in result.differences], ".", color=accent, markersize=3)
    gap.axhline(TOLERANCE, color=ink, linewidth=0.9, linestyle="--")
    for at, text, below in ((TOLERANCE, f"tolerance {TOLERANCE:.0e}", -11), (1e-8, "equal", 5)):
        gap.annotate(text, (1, at), (0, below), textcoords="offset points", fontsize=8)
    gap.set_ylim(0.7e-8, max(3e-5, 3 * max(min(d, 1.0) for d in result.differences)))
    gap.set(xlabel="step", ylabel="relative difference")
    for axis in (curves, gap):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    figure.savefig(path)


def run(epochs: int, seed: int, out: Path, device: str) -> int:
    """Train, print, draw; return the exit status: 1 if the two runs' losses ever differ by more than `TOLERANCE`.

    Raises:
        ValueError: `epochs` is not positive, or the device is not there.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is 'cuda', but torch {torch.__version__} sees no GPU")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console()
    threads = torch.get_num_threads()
    # The model is small: a second thread would save it little, and on a busy machine waiting for that thread costs tenfold.
    torch.set_num_threads(1)
    try:
        result, model, data = train(epochs, seed, torch.device(device), console)
    finally:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    picture(result, model, data, out / "demo.png")
    (out / "demo.json").write_text(json.dumps(asdict(result)))
    console.print()
    console.print(*tables(result), sep="\n")
    console.print(f"Picture: {out / 'demo.png'}. Every step's figures: {out / 'demo.json'}.", soft_wrap=True, highlight=False)
    verdict, never, style = ("agree", "at no step do", "bold green") if result.agrees else ("disagree", "at some step", "bold red")
    console.print(f"The runs {verdict}: {never} their losses differ by more than {TOLERANCE:.0e} of their value.", style=style)
    return 0 if result.agrees else 1
