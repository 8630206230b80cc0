"""A linear VAE, trained with `fastelbo.linear_elbo_loss`, against the closed-form optimum of probabilistic PCA.

An end-to-end check of the loss and its gradients that needs no reference code: the right answer is an eigendecomposition away.

- The decoder x | z ~ N(W z + b, sigma^2 I) with z ~ N(0, I) is probabilistic PCA. Where l_1 >= ... >= l_D are the eigenvalues of
  the data's covariance and q is the number of latents, its likelihood is largest where b is the mean, sigma^2 is the mean of the
  D - q smallest eigenvalues, and W = U (L - sigma^2 I)^(1/2) R: U has the first q eigenvectors, L their eigenvalues, and R is any
  rotation (Tipping & Bishop 1999, "Probabilistic principal component analysis").
- With a linear encoder and posterior variances that all data points share, the ELBO's global maximum is that same optimum. There
  the ELBO equals the log-likelihood, and no other local maximum is in the way (Lucas, Tucker, Grosse & Norouzi 2019, "Don't blame
  the ELBO!").

So the training must arrive, from random weights, at a log-likelihood, an ELBO and a sigma^2 that are known beforehand. The exit
status is 1 if any of them is off by more than 1%. The data are the 1797 digits of 8x8 pixels that ship with scikit-learn; their
intensities are the integers 0 to 16.

    python examples/linear_vae.py --latents 10 --plot linear_vae.png
"""

from __future__ import annotations

import argparse
import copy
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastelbo

TOLERANCE = 0.01
LATENTS = 10
STEPS = 1000
LEARNING_RATE = 0.1
SAMPLES = 4  # of z per data point and step
SAMPLES_AT_THE_END = 100


# ---- the answer, in closed form --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimum:
    log_likelihood: float  # nats per data point
    variance: float  # sigma^2
    eigenvalues: Tensor  # of the data's covariance, all of them, largest first
    subspace: Tensor  # orthonormal columns, which W spans


def closed_form(x: Tensor, latents: int) -> Optimum:
    """Probabilistic PCA's maximum-likelihood solution.

    Raises:
        ValueError: `latents` is not between 1 and one less than the rank of the centred data, where sigma^2 would be zero.
    """
    centred = x.cpu().double()
    centred = centred - centred.mean(0)
    # By the number of data points, not one less: the covariance of maximum likelihood.
    eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    rank = int((eigenvalues > 1e-9 * eigenvalues[0]).sum())
    if not 1 <= latents < rank:
        raise ValueError(f"latents must be from 1 to {rank - 1} for data of rank {rank}, got {latents}")
    elements = x.shape[1]
    variance = float(eigenvalues[latents:].mean())
    # The last term is tr(C^-1 S) = D: at the optimum, model and data have the same variance in each of the directions.
    twice = (
        eigenvalues[:latents].log().sum() + (elements - latents) * math.log(variance) + elements * math.log(2 * math.pi) + elements
    )
    return Optimum(-0.5 * float(twice), variance, eigenvalues, vectors[:, :latents])


# ---- the model -------------------------------------------------------------------------------------------------------------------


class LinearVAE(nn.Module):
    """One matrix each way, one posterior variance per latent, and one variance for all pixels."""

    mean: Tensor

    def __init__(self, x: Tensor, latents: int) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.encoder = nn.Linear(x.shape[1], latents, bias=False)
        self.logvar = nn.Parameter(torch.zeros(latents))
        self.decoder = nn.Linear(latents, x.shape[1])
        # Starts at the size of the pixels: at unit variance the first ELBOs would be ten times as far away.
        self.recon_logvar = nn.Parameter(x.square().mean().log())

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = self.encoder(x - self.mean)
        return mu, self.logvar.expand_as(mu)

    def loss(self, x: Tensor, samples: int, seed: int, impl: str | None = None) -> Tensor:
        """The negative ELBO in nats per data point, estimated from samples of z."""
        mu, logvar = self.posterior(x)
        loss = fastelbo.linear_elbo_loss(
            x, mu, logvar, self.decoder.weight, self.decoder.bias, recon_logvar=self.recon_logvar, num_samples=samples, seed=seed,
            impl=impl,
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        return loss


@dataclass
class Run:
    model: LinearVAE
    seconds: float = 0.0
    elbos: list[float] = field(default_factory=list)  # of every step, from that step's samples
    elbo: float = math.nan  # of the trained model, from many samples


def train(x: Tensor, latents: int, steps: int, seed: int, impl: str | None = None, console: Console | None = None) -> Run:
    """Maximise the ELBO over all of x, on x's device; shows its progress on the console if one is given.

    Raises:
        FloatingPointError: The ELBO became infinite or NaN.
    """
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LinearVAE(x.cpu(), latents).to(x.device)
    run = Run(model)
    # Pixels vary more than latents do, so the encoder's weights are the smaller ones.
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("encoder")]
    groups = [{"params": rest}, {"params": model.encoder.parameters(), "lr": LEARNING_RATE / 30}]
    optimizer = torch.optim.Adam(groups, lr=LEARNING_RATE, betas=(0.9, 0.99))
    # Down to zero: at a constant rate the noise in z would keep the weights moving around the optimum.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task("train", total=steps, now="")
        for step in range(steps):
            # A seed of its own for every step of every run. The noise it names is the same on every device.
            loss = model.loss(x, SAMPLES, seed * (steps + 1) + step, impl)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.elbos.append(-loss.item())
            if not math.isfinite(run.elbos[-1]):
                raise FloatingPointError(f"the ELBO is {run.elbos[-1]} at step {step + 1}")
            progress.update(task, advance=1, now=f"ELBO {run.elbos[-1]:.2f} nats")
    with torch.no_grad():
        run.elbo = -model.loss(x, SAMPLES_AT_THE_END, seed * (steps + 1) + steps, impl).item()
    run.seconds = time.perf_counter() - started
    return run


# ---- what it learned, in float64 and without fastelbo ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    log_likelihood: float
    elbo: float
    variance: float
    eigenvalues: Tensor  # of W W^T + sigma^2 I, largest first
    subspace: Tensor


@torch.no_grad()
def evaluate(model: LinearVAE, x: Tensor) -> Learned:
    """The log-likelihood of x ~ N(b, W W^T + sigma^2 I) and the ELBO's expectation over z, exactly, in nats per data point."""
    model, x = copy.deepcopy(model).cpu().double(), x.cpu().double()
    weight, variance = model.decoder.weight, model.recon_logvar.exp()
    covariance = weight @ weight.T + variance * torch.eye(len(weight), dtype=x.dtype)
    marginal = torch.distributions.MultivariateNormal(model.decoder.bias, covariance)

    mu, logvar = model.posterior(x)
    # E |x - W z - b|^2 is the error at the posterior's mean and what the posterior's variance adds to it.
    error = (x - model.decoder(mu)).square().sum(1) + (weight.square() * model.logvar.exp()).sum()
    nll = 0.5 * (x.shape[1] * (math.log(2 * math.pi) + model.recon_logvar) + error / variance)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    return Learned(
        float(marginal.log_prob(x).mean()),
        -float((nll + kl).mean()),
        float(variance),
        torch.linalg.eigvalsh(covariance).flip(0),
        torch.linalg.qr(weight).Q,
    )


def largest_angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle between the spans of two sets of orthonormal columns, in degrees."""
    return math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(a.T @ b).min()))))


# ---- what it shows ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """One row of the table that the exit status depends on."""

    name: str
    learned: float
    closed_form: float

    @property
    def difference(self) -> float:
        return abs(self.learned - self.closed_form) / abs(self.closed_form)


def compare(run: Run, learned: Learned, optimum: Optimum) -> list[Figures]:
    return [
        Figures("log-likelihood, nats per digit", learned.log_likelihood, optimum.log_likelihood),
        Figures("ELBO, exact", learned.elbo, optimum.log_likelihood),
        # What the function itself says: a wrong constant in it would leave the gradients, and so the rows above, as they are.
        Figures(f"ELBO, linear_elbo_loss, {SAMPLES_AT_THE_END} samples", run.elbo, optimum.log_likelihood),
        Figures("sigma^2", learned.variance, optimum.variance),
    ]


def table(rows: list[Figures], angle: float, title: str) -> Table:
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    made.add_column("")
    for heading in ("learned", "closed form", "difference"):
        made.add_column(heading, justify="right")
    for row in rows:
        missed = not row.difference <= TOLERANCE
        made.add_row(
            row.name, f"{row.learned:.4f}", f"{row.closed_form:.4f}", f"{row.difference:.4%}", style="bold red" if missed else None
        )
    made.add_row("largest angle between the subspaces", f"{angle:.2f}°", "0°", "")
    return made


def picture(run: Run, learned: Learned, optimum: Optimum, path: Path) -> None:
    """The ELBO on its way to the closed form, and the eigenvalues of both covariances."""
    ink, grey, accent = "#222222", "#9a9a9a", "#d1495b"
    figure: Any = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)

    steps = range(1, len(run.elbos) + 1)
    left.semilogx(steps, run.elbos, color=accent, linewidth=1.4, label="ELBO")
    left.axhline(optimum.log_likelihood, color=ink, linewidth=0.9, linestyle="--", label="largest log-likelihood, closed form")
    left.set(xlabel="step", ylabel="nats per digit")
    left.set_title("The ELBO reaches the log-likelihood", fontsize=10, color=ink)
    left.legend(frameon=False, loc="lower right")

    # Pixels that are blank in all digits have no variance, and no place on a logarithmic axis.
    data = optimum.eigenvalues[optimum.eigenvalues > 1e-9 * optimum.eigenvalues[0]]
    right.semilogy(range(1, len(data) + 1), data, "o", color=grey, markersize=6, label="covariance of the digits")
    # The first ones are the last to settle: near the optimum the ELBO hardly changes as W turns within its subspace.
    model = learned.eigenvalues
    right.semilogy(range(1, len(model) + 1), model, ".", color=accent, markersize=5, label="learned W Wᵀ + σ² I")
    right.axvline(optimum.subspace.shape[1] + 0.5, color=ink, linewidth=0.9, linestyle="--", label="latents")
    right.set(xlabel="eigenvalue")
    right.set_title("The model keeps the first eigenvalues and averages the others", fontsize=10, color=ink)
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a linear VAE and compare it with the closed form of probabilistic PCA.")
    parser.add_argument("--latents", type=int, default=LATENTS, metavar="Q", help=f"size of z (default {LATENTS})")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"passes over the digits (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights and noise (default 0)")
    parser.add_argument("--plot", type=Path, default=Path("linear_vae.png"), metavar="FILE", help="default linear_vae.png")
    parser.add_argument("--impl", choices=("auto", "triton", "torch", "reference"), default="auto", help="default auto")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")

    console = Console()
    x = torch.tensor(load_digits().data, dtype=torch.float32, device="cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    # The model is small, so a second thread would save it little; and with one the figures do not depend on the machine's cores.
    torch.set_num_threads(1)
    try:
        optimum = closed_form(x, args.latents)
        run = train(x, args.latents, args.steps, args.seed, args.impl, console)
        learned = evaluate(run.model, x)
        rows, angle = compare(run, learned, optimum), largest_angle(learned.subspace, optimum.subspace)
        picture(run, learned, optimum, args.plot)
    except FloatingPointError as error:
        console.print(f"The training failed: {error}.", style="bold red")
        return 1
    except (ValueError, OSError) as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)

    title = f"{len(x)} digits, {args.latents} latents, {args.steps} steps in {run.seconds:.1f} s"
    console.print()
    console.print(table(rows, angle, title))
    console.print(f"Picture: {args.plot}.", soft_wrap=True, highlight=False)
    if missed := [row.name.split(",")[0] for row in rows if not row.difference <= TOLERANCE]:
        console.print(f"Off by more than {TOLERANCE:.0%}: {', '.join(dict.fromkeys(missed))}.", style="bold red")
        return 1
    console.print(f"The training found the closed form's optimum: everything agrees within {TOLERANCE:.0%}.", style="bold green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
