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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastelbo

from . import backend

TOLERANCE = 1e-5
HELD_OUT = 360
LATENTS = 10
HIDDEN = 128

Terms = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Terms]


def usual_loss(recon: Tensor, recon_logvar: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Terms:
    nll = 0.5 * (math.log(2 * math.pi) + recon_logvar + (x - recon) ** 2 / torch.exp(recon_logvar))
    kl = -0.5 * (1 + logvar - mu**2 - torch.exp(logvar))
    nll = nll.sum(1).mean()
    kl = kl.sum(1).mean()
    return nll + kl, nll.detach(), kl.detach()


def fused_loss(recon: Tensor, recon_logvar: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Terms:
    return fastelbo.elbo_loss(recon, x, mu, logvar, recon_logvar=recon_logvar, return_terms=True)


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
        self.encoder, self.decoder = (
            nn.Sequential(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs))
            for inputs, outputs in ((pixels, 2 * LATENTS), (LATENTS, 2 * pixels))
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


class Data(NamedTuple):
    train: Tensor
    held_out: Tensor  # with its uniform noise
    held_out_noise: Tensor
    generator: torch.Generator

    def batch(self) -> tuple[Tensor, Tensor]:
        """All training digits: at 64 pixels a digit a smaller batch would time Python more than the loss."""
        return with_noise(self.train, self.generator)


def with_noise(digits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits with fresh uniform noise, and noise for z; drawn on the CPU, so that every device gets the same."""
    uniform = torch.rand(digits.shape, generator=generator)
    noise = torch.randn(len(digits), LATENTS, generator=generator)
    return digits + uniform.to(digits.device), noise.to(digits.device)


def load(seed: int, device: torch.device) -> Data:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.tensor(load_digits().data, dtype=torch.float32)
    digits = digits[torch.randperm(len(digits), generator=generator)].to(device)
    return Data(digits[HELD_OUT:], *with_noise(digits[:HELD_OUT], generator), generator)


@dataclass
class Result:
    """What was measured at every step. What has two parts is (usual, fastelbo)."""

    device: str
    backend: str
    seed: int
    batch_size: int
    losses: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # in the loss
    gradients: list[float] = field(default_factory=list)  # difference at equal weights, in the outputs of the model
    drift: list[float] = field(default_factory=list)  # difference between the runs' own gradients, in the weights
    epochs: list[dict[str, Any]] = field(default_factory=list)  # loss, nll, kl and held_out, in nats per digit
    wall: float = 0.0

    @property
    def differences(self) -> list[float]:
        """Relative difference of the two losses; NaN counts as the largest there is."""
        each = (abs(a - b) / abs(a) for a, b in zip(*self.losses, strict=True))
        return [math.inf if math.isnan(d) else d for d in each]


def largest_difference(usual: Sequence[Tensor], fused: Sequence[Tensor]) -> float:
    """The largest difference in any tensor, relative to that tensor's largest entry."""
    each = [(a - b).abs().max() / a.abs().max().clamp_min(1e-30) for a, b in zip(usual, fused, strict=True)]
    return float(torch.stack(each).max())


def time_loss(loss_of: Loss, outputs: Sequence[Tensor]) -> tuple[float, Sequence[Tensor]]:
    """Seconds in the loss alone, call and backward pass, and its gradients in the outputs of the model."""
    recon, recon_logvar, x, mu, logvar = (t.detach() for t in outputs)
    leaves = [t.requires_grad_() for t in (recon, recon_logvar, mu, logvar)]
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    gradients = torch.autograd.grad(loss_of(recon, recon_logvar, x, mu, logvar)[0], leaves)
    wait()
    return time.perf_counter() - start, gradients


def train(epochs: int, seed: int, device: torch.device, console: Console) -> tuple[Result, VAE, Data]:
    """Train both; return the figures, the model that fastelbo trained, and the data."""
    started = time.perf_counter()
    data = load(seed, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        usual = VAE(data.train.cpu()).to(device)
    fused = copy.deepcopy(usual)
    runs: tuple[tuple[VAE, Loss], ...] = ((usual, usual_loss), (fused, fused_loss))
    # One optimizer for both: Adam treats every number apart.
    optimizer = torch.optim.Adam([*usual.parameters(), *fused.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    served = {backend.EAGER: "plain PyTorch", None: "reference"}.get(backend.choose(None, device), "Triton")
    result = Result(name, served, seed, len(data.train))
    for epoch in track(range(1, epochs + 1), "training both", console=console):
        x, noise = data.batch()
        optimizer.zero_grad()
        terms = [loss_of(*model(x, noise)) for model, loss_of in runs]
        torch.autograd.backward([loss for loss, _, _ in terms])
        result.drift.append(largest_difference(*([p.grad for p in m.parameters() if p.grad is not None] for m, _ in runs)))
        optimizer.step()
        schedule.step()
        loss, nll, kl = ([t.item() for t in pair] for pair in zip(*terms, strict=True))

        with torch.no_grad():
            outputs = fused(x, noise)
            held_out = [loss_of(*model(data.held_out, data.held_out_noise))[0].item() for model, loss_of in runs]
        # Taking turns to go first: whatever else the machine does falls on both.
        timed = {i: time_loss(runs[i][1], outputs) for i in ((0, 1) if epoch % 2 else (1, 0))}
        result.gradients.append(largest_difference(timed[0][1], timed[1][1]))
        for i in (0, 1):
            result.losses[i].append(loss[i])
            result.seconds[i].append(timed[i][0])
        result.epochs.append({"epoch": epoch, "loss": loss, "nll": nll, "kl": kl, "held_out": held_out})
    result.wall = time.perf_counter() - started
    return result, fused, data


def tables(result: Result) -> tuple[Table, Table]:
    title = "Nats per digit. Left: the usual loss; right: fastelbo"
    each = Table("epoch", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("ELBO", "nll", "KL", "held-out ELBO"):
        each.add_column(heading, justify="center")
    last = len(result.epochs)
    for epoch in sorted({max(1, round(last * k / 10)) for k in range(11)}):
        e = result.epochs[epoch - 1]
        pairs = [[-loss for loss in e["loss"]], e["nll"], e["kl"], [-loss for loss in e["held_out"]]]
        each.add_row(f"{epoch:5}", *(f"{a:.2f} {b:.2f}" for a, b in pairs))

    usual, fused = (statistics.median(seconds) for seconds in result.seconds)
    worst = max(result.differences)
    facts = {
        "loss, largest relative difference": f"{worst:.1e} at step {result.differences.index(worst) + 1}",
        "gradients, at equal weights": f"{max(result.gradients):.1e}",
        "gradients, between the runs": f"{max(result.drift):.1e}",
        "time in the usual loss per step": f"{usual * 1e6:.0f} µs, forward and backward, median",
        "time in fastelbo's per step": f"{fused * 1e6:.0f} µs, {usual / fused:.2f} times as fast",
        "device": result.device,
        "fastelbo's backend": result.backend,
        "training of both": f"{last} steps of {result.batch_size} digits, {result.wall:.0f} s in all",
    }
    summary = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for fact in facts.items():
        summary.add_row(*fact)
    return each, summary


@torch.no_grad()
@matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
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
    left, right = figure.subfigures(1, 2)
    for axis, (title, images, top, colours) in zip(left.subplots(4, 1, height_ratios=(1, 1, 1, 5)), strips, strict=True):
        # Ten in a row, each with a margin, as one image.
        framed = nn.functional.pad(images.cpu().view(-1, 10, 8, 8), (1, 1, 1, 1), value=math.nan)
        axis.imshow(framed.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap=colours, vmin=0, vmax=top)
        axis.set_title(title)
        axis.axis("off")

    curves, gap = right.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    steps = range(1, len(result.epochs) + 1)
    curves.plot(steps, result.losses[0], color="#9a9a9a", alpha=0.6, linewidth=6, label="usual loss")
    curves.plot(steps, result.losses[1], color="#d1495b", label="fastelbo")
    curves.plot(steps, [e["held_out"][1] for e in result.epochs], ":k", label="fastelbo, held-out digits")
    curves.set(ylabel="negative ELBO, nats per digit", title="The two runs, from the same weights and noise")
    curves.legend()
    # Equal losses have no place on a logarithmic axis: they are drawn on its lower edge.
    gap.semilogy(steps, [max(d, 1e-8) for d in result.differences], ".", color="#d1495b", markersize=3)
    gap.axhline(TOLERANCE, color="k", linewidth=0.9, linestyle="--", label=f"tolerance {TOLERANCE:.0e}")
    gap.set(xlabel="step", ylabel="relative difference\n(1e-8: equal)")
    gap.legend()
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
    console.print(*tables(result), sep="\n")
    console.print(f"Picture: {out / 'demo.png'}. Every step's figures: {out / 'demo.json'}.", soft_wrap=True, highlight=False)
    bar = f"differ by more than {TOLERANCE:.0e} of their value"
    if max(result.differences) > TOLERANCE:
        console.print(f"The runs disagree: their losses {bar}.", style="bold red")
        return 1
    console.print(f"The runs agree: at no step do their losses {bar}.", style="bold green")
    return 0
