"""Small losses on a CPU: fastelbo beside the three lines that people write, and beside another version of itself.

    python -m benchmarks.small [--threads 1 2] [--rounds N] [--check] [--against FOLDER]

Here the host's work decides. Each ratio is the user's time over fastelbo's, so above 1 fastelbo is the quicker. The two take turns,
call by call, and each result is checked before it is timed. `--check` ends in status 1 where a ratio is below 0.97. `--against`
names a folder that holds another version of the package under another name, and times the workloads of this suite with both.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import fastelbo

from . import workloads
from .environment import about
from .measure import OWN_TOLERANCE, Step, errors, orders
from .workloads import WORKLOADS, Draw, Workload

CPU = torch.device("cpu")
LEAST = 0.97  # the ratio that --check asks for: the clock of a shared machine tells no less apart
SIZES = ((128, 64), (64, 3_072), (32, 12_288))
LATENTS = (16, 32, 64)

Call = Callable[..., Any]


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each call; all of them in every round, each first equally often."""
    for call in calls.values():
        for _ in range(5):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    schedule = orders(list(calls))
    gc.collect()
    gc.disable()  # which would fall on whoever allocates the object that is one too many
    try:
        for _ in range(rounds):
            for name in next(schedule):
                start = time.perf_counter()
                calls[name]()
                samples[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in samples.items()}


# ---- fastelbo and the user's own formula -----------------------------------------------------------------------------------------


def user_z(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def user_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())


def user_nll(recon: Tensor, x: Tensor) -> Tensor:
    return 0.5 * ((x - recon) ** 2 + math.log(2 * math.pi)).sum(1)


def user_negative_binomial(mean: Tensor, x: Tensor, theta: Tensor, eps: float = 1e-8) -> Tensor:
    """`log_nb_positive` of scvi-tools 1.4.2, with its sign changed."""
    log_total = torch.log(theta + mean + eps)
    each = theta * (torch.log(theta + eps) - log_total) + x * (torch.log(mean + eps) - log_total)
    return -(each + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)).sum(1)


def user_zero_inflated(mean: Tensor, x: Tensor, theta: Tensor, zi_logits: Tensor, eps: float = 1e-8) -> Tensor:
    """`log_zinb_positive` of scvi-tools 1.4.2, with its sign changed."""
    softplus, log_total = F.softplus(-zi_logits), torch.log(theta + mean + eps)
    zero = -zi_logits + theta * (torch.log(theta + eps) - log_total)
    count = -softplus + zero + x * (torch.log(mean + eps) - log_total)
    count = count + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return -((x < eps).float() * (F.softplus(zero) - softplus) + (x > eps).float() * count).sum(1)


class Pair(NamedTuple):
    inputs: tuple[str, ...]
    user: Call
    ours: Call


PAIRS = {
    "reparameterize": Pair(("mu", "logvar"), user_z, fastelbo.reparameterize),
    "reparameterize_kl": Pair(
        ("mu", "logvar"), lambda mu, logvar: (user_z(mu, logvar), user_kl(mu, logvar).sum(1)), fastelbo.reparameterize_kl
    ),
    "gaussian_kl, elements": Pair(
        ("mu", "logvar"), user_kl, lambda mu, logvar: fastelbo.gaussian_kl(mu, logvar, batch_dims=mu.ndim)
    ),
    "gaussian_nll": Pair(("recon", "x"), user_nll, fastelbo.gaussian_nll),
    "gaussian_nll_loss": Pair(("recon", "x", "var"), F.gaussian_nll_loss, fastelbo.gaussian_nll_loss),
    "elbo_loss": Pair(
        ("recon", "x", "mu", "logvar"),
        lambda recon, x, mu, logvar: user_nll(recon, x).mean() + user_kl(mu, logvar).sum(1).mean(),
        fastelbo.elbo_loss,
    ),
}  # fmt: skip

# Of counts per cell and gene, with theta per gene or per element.
COUNT_SIZES = ((128, 2_000), (128, 20_000))
COUNT_PAIRS = {
    f"{name}, theta per {of}": Pair(("mean", "counts", f"theta per {of}", *more), user, ours)
    for of in ("gene", "element")
    for name, more, user, ours in (
        ("negative_binomial_nll", (), user_negative_binomial,
         lambda mean, x, theta: fastelbo.negative_binomial_nll(mean, x, theta=theta)),
        ("zero_inflated_negative_binomial_nll", ("zi_logits",), user_zero_inflated,
         lambda mean, x, theta, logits: fastelbo.zero_inflated_negative_binomial_nll(mean, x, theta=theta, zi_logits=logits)),
    )
}  # fmt: skip


def count_inputs(cells: int, genes: int) -> dict[str, Tensor]:
    """Counts of a Poisson-gamma mixture, nine of ten 0."""
    draw = Draw(CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    rates = torch.distributions.Gamma(0.15, 1.0).sample((cells, genes))
    found = {"counts": torch.poisson(rates, generator=generator), "zi_logits": draw(cells, genes)}
    for name, shape in (("mean", (cells, genes)), ("theta per gene", (genes,)), ("theta per element", (cells, genes))):
        found[name] = (0.5 * draw(*shape, grad=False) - 0.5).exp().requires_grad_()
    return found


def inputs(batch: int, elements: int, latents: int) -> dict[str, Tensor]:
    draw = Draw(CPU, torch.float32)
    var = (0.3 * draw(batch, elements)).exp().detach().requires_grad_()
    found = {"recon": draw(batch, elements), "x": draw(batch, elements, grad=False), "var": var}
    return found | {"mu": draw(batch, latents), "logvar": draw(batch, latents, scale=0.3)}


def step_of(call: Call, args: list[Tensor]) -> Call:
    """Forward and backward, with upstream gradients that are at hand, as a decoder's would be."""
    outputs = call(*args)
    ups = [torch.ones_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
    wanted = [t for t in args if t.requires_grad]

    def step() -> list[Tensor]:
        outputs = call(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad(outputs, wanted, ups)]

    return step


def forward_of(call: Call, args: list[Tensor]) -> Call:
    def forward() -> Any:
        with torch.no_grad():
            return call(*args)

    return forward


def agree(user: Call, ours: Call) -> bool:
    """Outputs and gradients on the same noise, to float32's rounding of sums over tens of thousands."""
    torch.manual_seed(0)
    want = user()
    torch.manual_seed(0)
    got = ours()
    return all(float(((a - b).abs().max() / b.abs().max()).detach()) < 2e-5 for a, b in zip(got, want, strict=True))


class Row(NamedTuple):
    name: str
    sizes: str
    step: dict[str, float] | None  # None: the numbers differ
    forward: dict[str, float] | None

    def ratios(self) -> list[float]:
        return [t["user"] / t["ours"] for t in (self.step, self.forward) if t is not None]


def cases() -> Iterator[tuple[str, Pair, tuple[int, ...]]]:
    """(name, pair, (batch, elements, latents)), each size that makes a difference to the pair once."""
    for name, pair in PAIRS.items():
        for batch, elements in SIZES:
            for latents in LATENTS if "mu" in pair.inputs else LATENTS[:1]:
                yield name, pair, (batch, elements, latents)


def measured(name: str, pair: Pair, sizes: tuple[int, ...], rounds: int) -> Row:
    drawn = count_inputs(*sizes) if "counts" in pair.inputs else inputs(*sizes)
    args = [drawn[n] for n in pair.inputs]
    shown = " and ".join(f"{drawn[n].shape[0]} x {drawn[n].shape[1]:,}" for n in ("x", "mu", "counts") if n in pair.inputs)
    steps = {"user": step_of(pair.user, args), "ours": step_of(pair.ours, args)}
    if not agree(steps["user"], steps["ours"]):
        return Row(name, shown, None, None)
    forwards = {"user": forward_of(pair.user, args), "ours": forward_of(pair.ours, args)}
    return Row(name, shown, interleaved(steps, rounds), interleaved(forwards, rounds))


def seeded(rounds: int) -> Row:
    """Noise from a seed, which has no peer: its time alone."""
    drawn = inputs(128, 64, 16)
    args = [drawn["mu"], drawn["logvar"]]
    call = lambda mu, logvar: fastelbo.reparameterize(mu, logvar, seed=7)  # noqa: E731
    step, forward = (interleaved({"ours": make(call, args)}, rounds) for make in (step_of, forward_of))
    return Row("reparameterize, seed=7", "128 x 16", step, forward)


def show(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title)
    table.add_column("function")
    table.add_column("sizes", justify="right")
    for heading in ("step: user", "fastelbo", "ratio", "forward alone, no_grad: user", "fastelbo", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.step is None or row.forward is None:
            table.add_row(row.name, row.sizes, "[red]other numbers, so no speed")
            continue
        cells = []
        for t in (row.step, row.forward):
            if "user" in t:
                ratio = t["user"] / t["ours"]
                mark = "[red]" if ratio < LEAST else ""
                cells += [f"{1e6 * t['user']:.1f}", f"{1e6 * t['ours']:.1f}", f"{mark}{ratio:.2f}"]
            else:
                cells += ["", f"{1e6 * t['ours']:.1f}", ""]
        table.add_row(row.name, row.sizes, *cells)
    console.print(table)


# ---- another version of fastelbo -------------------------------------------------------------------------------------------------


def other_version(folder: Path) -> ModuleType:
    """The package that `folder` is or, alone, holds."""
    found = [folder] if (folder / "__init__.py").exists() else [path.parent for path in folder.glob("*/__init__.py")]
    if len(found) != 1:
        raise SystemExit(f"--against {folder}: expected a package or a folder that holds one, found {len(found)}")
    sys.path.insert(0, str(found[0].parent.resolve()))
    return importlib.import_module(found[0].name)


def served_by(version: ModuleType, workload: Workload) -> Call:
    """The workload's loss as that version computes it: workloads reach fastelbo through their module's own name for it."""

    def loss(**tensors: Tensor) -> Any:
        workloads.__dict__["fastelbo"] = version
        try:
            return workload.fused(**tensors)
        finally:
            workloads.__dict__["fastelbo"] = fastelbo

    return loss


def show_versions(console: Console, title: str, old: ModuleType, rounds: int) -> None:
    table = Table(title=title)
    table.add_column("workload")
    for heading in ("elements", f"{old.__name__} us", "fastelbo us", "ratio"):
        table.add_column(heading, justify="right")
    for workload in track(WORKLOADS, "workloads", console=console, transient=True):
        sizes = workload.sizes("small")
        drawn = workload.inputs(Draw(CPU, torch.float32), **sizes)
        losses = {"old": served_by(old, workload), "new": served_by(fastelbo, workload)}
        start = workload.name, f"{workload.traffic(**sizes)[0]:,}"
        try:
            Step(drawn).forward(losses["old"])
        except AttributeError as missing:
            table.add_row(*start, f"[red]{missing}")
            continue
        off = {name: e for name, e in errors(workload, losses, drawn).items() if not e <= OWN_TOLERANCE[torch.float32]}
        if off:
            table.add_row(*start, f"[red]wrong numbers, so no speed: {', '.join(f'{n} {e:.1e}' for n, e in off.items())}")
            continue
        step = Step(drawn)
        t = interleaved({name: functools.partial(step, loss) for name, loss in losses.items()}, rounds)
        table.add_row(*start, f"{1e6 * t['old']:,.0f}", f"{1e6 * t['new']:,.0f}", f"{t['old'] / t['new']:.2f}")
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], metavar="N", help="default: torch's")
    parser.add_argument("--rounds", type=int, default=400, metavar="N", help="calls of each peer (default: 400)")
    parser.add_argument("--check", action="store_true", help=f"exit status 1 where a ratio is below {LEAST}")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="a version of the package under another name")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    old = None if options.against is None else other_version(options.against)
    status = 0
    for threads in options.threads:
        torch.set_num_threads(threads)
        facts = ", ".join(f"{k} {v}" for k, v in about(CPU).items() if v is not None)
        if old is not None:
            title = f"forward + backward, us: medians; the ratio is old over new\n{facts}"
            show_versions(console, title, old, max(11, options.rounds // 10))
            continue
        every = track(list(cases()), "small losses", console=console, transient=True)
        rows = [measured(*case, options.rounds) for case in every]
        counted = [(*pair, sizes) for pair in COUNT_PAIRS.items() for sizes in COUNT_SIZES]
        rows += [measured(*case, max(11, options.rounds // 20)) for case in counted]
        title = f"medians in us; a ratio is the user's time over fastelbo's, a step is forward and backward\n{facts}"
        show(console, title, [*rows, seeded(options.rounds)])
        if any(row.step is None for row in rows) or (options.check and min(r for row in rows for r in row.ratios()) < LEAST):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
