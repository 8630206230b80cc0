"""Host time of the Triton backend, without a GPU: microseconds of Python for each call, beside the eager formula's dispatch.

    python -m benchmarks.host [--case NAME ...] [--rounds N] [--profile]

The calls below go through the package's own checks, records, plans and autograd; what they would launch is counted, and not run.
Tensors lie on the CPU and have next to no elements, so the user's formula costs its dispatch alone. Left out of fastelbo's time is
what Triton's launcher and the driver take for each launch, and of the formula's what the driver takes for each of its kernels.
An empty node, an `autograd.Function` that only allocates the outputs and the gradients, is the least that a step can take.
`--profile` prints in which functions the time of a step goes.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import pstats
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import fastelbo
from fastelbo import backend, kernels
from fastelbo.kernels import launch as launch_module

from .environment import about
from .small import interleaved, step_of, user_kl, user_z
from .workloads import WORKLOADS, Draw, groups_one_by_one, image_eager, kl_eager, learned_eager, linear_with

CPU = torch.device("cpu")
BATCH, ELEMENTS, LATENTS = 4, 8, 4
# Calls in a row, timed together: what a call finds in the caches is its own.
IN_A_ROW = 10
# What a step may take, in microseconds, where more has been promised than to stay below the formula.
TARGETS = {"elbo_loss": 60.0}

Call = Callable[..., Any]


class Case(NamedTuple):
    inputs: list[Tensor]
    ours: Call
    user: Call


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shapes: list[torch.Size], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple([torch.empty(shape, dtype=tensors[0].dtype, device=tensors[0].device) for shape in shapes])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *[torch.empty_like(t) if need else None for t, need in pairs]


def cases() -> dict[str, Case]:
    draw = Draw(CPU, torch.float32)
    recon, x = draw(BATCH, ELEMENTS), draw(BATCH, ELEMENTS, grad=False)
    mu, logvar, prior_mu, prior_logvar = (draw(BATCH, LATENTS, scale=0.3) for _ in range(4))
    weight, bias, recon_logvar = draw(ELEMENTS, LATENTS), draw(ELEMENTS), draw(ELEMENTS)

    def linear(*tensors: Tensor) -> Tensor:
        *given, recon_logvar = tensors
        return fastelbo.linear_elbo_loss(*given, recon_logvar=recon_logvar, seed=1)

    found = {
        "elbo_loss": Case([recon, x, mu, logvar], fastelbo.elbo_loss, image_eager),
        "reparameterize_kl": Case(
            [mu, logvar],
            functools.partial(fastelbo.reparameterize_kl, seed=1),
            lambda mu, logvar: (user_z(mu, logvar), user_kl(mu, logvar).sum(1)),
        ),
        "gaussian_kl": Case([mu, logvar], fastelbo.gaussian_kl, lambda mu, logvar: user_kl(mu, logvar).sum(1)),
        "gaussian_kl, mean": Case(
            [mu, logvar],
            functools.partial(fastelbo.gaussian_kl, reduction="batchmean"),
            lambda mu, logvar: user_kl(mu, logvar).sum(1).mean(),
        ),
        "gaussian_kl, prior": Case(
            [mu, logvar, prior_mu, prior_logvar], fastelbo.gaussian_kl, lambda *moments: kl_eager(*moments).sum(1)
        ),
        "linear_elbo_loss": Case(
            [x, mu, logvar, weight, bias, recon_logvar],
            linear,
            functools.partial(linear_with(learned_eager), eps=None),
        ),
    }
    groups = next(w for w in WORKLOADS if w.name == "vdvae-cifar")
    named = groups.inputs(draw, **groups.sizes("tiny"))

    def by_name(loss: Call) -> Call:
        return lambda *tensors: loss(**dict(zip(named, tensors, strict=True)))

    for name, loss in (("", groups.fused), (", one by one", groups_one_by_one)):
        found[groups.name + name] = Case(list(named.values()), by_name(loss), by_name(groups.eager))
    return found


@contextmanager
def unlaunched() -> Iterator[list[Any]]:
    """Triton serves calls on the CPU, and each kernel that it would launch goes into the list."""
    launched: list[Any] = []
    with (
        patch.object(launch_module, "start", lambda kernel, programs, args, tuned=None: launched.append(kernel)),
        patch.object(kernels, "INTERPRETED", True),
        patch.object(backend, "DEFAULT", "triton"),
    ):
        yield launched


def timed(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each call."""

    def row(call: Call) -> None:
        for _ in range(IN_A_ROW):
            call()

    rows = {name: functools.partial(row, call) for name, call in calls.items()}
    found = interleaved(rows, max(1, rounds // IN_A_ROW))
    return {name: seconds / IN_A_ROW for name, seconds in found.items()}


class Row(NamedTuple):
    """Medians, in seconds, of a forward pass that will be differentiated and of one with its backward pass."""

    name: str
    launches: tuple[int, int]  # of the two passes
    forward: dict[str, float]
    step: dict[str, float]

    @property
    def is_on_target(self) -> bool:
        return 1e6 * self.step["ours"] <= min(TARGETS.get(self.name, float("inf")), 1e6 * self.step["user"])


def measured(name: str, case: Case, rounds: int) -> Row:
    with unlaunched():
        outputs = case.ours(*case.inputs)
    shapes = [o.shape for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
    calls = {"user": case.user, "ours": case.ours, "empty": functools.partial(Empty.apply, shapes)}
    steps = {who: step_of(call, case.inputs) for who, call in calls.items()}
    forwards = {"user": functools.partial(case.user, *case.inputs), "ours": functools.partial(case.ours, *case.inputs)}
    with unlaunched() as launched:
        forwards["ours"]()
        forward = len(launched)
        steps["ours"]()
        launches = forward, len(launched) - 2 * forward
        return Row(name, launches, timed(forwards, rounds), timed(steps, rounds))


def show(console: Console, rows: list[Row]) -> None:
    facts = ", ".join(f"{k} {v}" for k, v in about(CPU).items() if v is not None)
    table = Table(title=f"host time, us: medians; a step is forward and backward, launches are stubs\n{facts}")
    table.add_column("call")
    for heading in ("launches", "forward: eager", "fastelbo", "step: eager", "fastelbo", "empty node", "target"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [f"{1e6 * t[who]:.1f}" for t, who in ((row.forward, "user"), (row.forward, "ours"), (row.step, "user"))]
        mark = "" if row.is_on_target else "[red]"
        target = TARGETS.get(row.name)
        wanted = "below eager" if target is None else f"{target:.0f}"
        step, least = 1e6 * row.step["ours"], 1e6 * row.step["empty"]
        launches = f"{row.launches[0]} + {row.launches[1]}"
        table.add_row(row.name, launches, *times, f"{mark}{step:.1f}", f"{least:.1f}", wanted)
    console.print(table)


def profile(case: Case, rounds: int) -> None:
    """Print the functions by their own time."""
    step = step_of(case.ours, case.inputs)
    with unlaunched():
        step()
        profiler = cProfile.Profile()
        with profiler:
            for _ in range(rounds):
                step()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    found = cases()
    parser.add_argument("--case", nargs="+", choices=list(found), default=list(found), metavar="NAME", help=", ".join(found))
    parser.add_argument("--rounds", type=int, default=2000, metavar="N", help="calls of each (default: 2000)")
    parser.add_argument("--profile", action="store_true", help="print where the time of each call goes, and no table")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.profile:
        for name in options.case:
            console.print(name)
            profile(found[name], options.rounds)
        return 0
    with torch.random.fork_rng(devices=[]):
        rows = [measured(name, found[name], options.rounds) for name in track(options.case, console=console, transient=True)]
    show(console, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
