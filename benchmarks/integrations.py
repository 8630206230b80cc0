"""The part of a step that an adapter replaces, forward and backward: the library as it is, and patched.

    .venv-integrations/bin/python -m benchmarks.integrations [--threads 1] [--rounds N]

`make test-integrations` makes that environment. The two take turns, ten calls each: to patch takes longer than to call, and would
leave other things in the caches. The ratio is the library's median over ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fastelbo.integrations import diffusers, distributions, pyro, pythae

from .environment import about

Step = Callable[[], Tensor]
Case = tuple[str, ModuleType, Step]


def leaf(*shape: int) -> Tensor:
    """Means, or log-variances and the like as they are in a model that is half trained: a few nats from the prior."""
    return (0.5 * torch.randn(shape) - 0.3).requires_grad_()


def of_pythae() -> Iterator[Case]:
    from pythae import models

    def loss(model: Any, *args: Any) -> Step:
        return lambda: model.loss_function(*args)[0]

    batch, elements, latents, samples = 128, 784, 16, 8
    for name, options in (
        ("VAE", {}),
        ("BetaVAE", {}),
        ("DisentangledBetaVAE", {}),
        ("IWAE", {"number_samples": samples}),
        ("VAMP", {"number_components": 50}),
    ):
        lead = (batch, samples) if name == "IWAE" else (batch,)
        for likelihood in ("mse", "bce"):
            config = getattr(models, f"{name}Config")
            model = getattr(models, name)(
                config(input_dim=(elements,), latent_dim=latents, reconstruction_loss=likelihood, **options)
            )
            recon, mu, log_var = torch.rand(*lead, elements).requires_grad_(), leaf(*lead, latents), leaf(*lead, latents)
            epoch = [5] if name in ("DisentangledBetaVAE", "VAMP") else []
            args = recon, torch.rand(batch, elements), mu, log_var, leaf(*lead, latents), *epoch
            yield f"pythae {name}, {likelihood}", pythae, loss(model, *args)


def of_diffusers() -> Iterator[Case]:
    from diffusers.models.autoencoders import vae

    for shape in ((4, 8, 32, 32), (1, 32, 5, 60, 90)):
        moments = leaf(*shape)

        def loss(moments: Tensor = moments) -> Tensor:
            posterior = vae.DiagonalGaussianDistribution(moments)
            return posterior.sample().sum() + posterior.kl().sum()

        yield f"diffusers, sample and kl of {shape}", diffusers, loss


def of_pyro() -> Iterator[Case]:
    import pyro.distributions as dist
    from pyro.infer import trace_mean_field_elbo

    batch, elements, latents = 128, 784, 16
    mu, log_sigma, recon, x = leaf(batch, latents), leaf(batch, latents), leaf(batch, elements), torch.randn(batch, elements)

    def loss() -> Tensor:
        q = dist.Normal(mu, log_sigma.exp(), validate_args=False).to_event(1)
        p = dist.Normal(torch.zeros(batch, latents), torch.ones(batch, latents), validate_args=False).to_event(1)
        likelihood = dist.Normal(recon, 0.5, validate_args=False).to_event(1)
        return trace_mean_field_elbo.kl_divergence(q, p).sum() - likelihood.log_prob(x).sum()

    yield "pyro, KL and log-density", pyro, loss


def of_distributions() -> Iterator[Case]:
    for shape in ((128, 16), (4096, 32)):
        tensors = [leaf(*shape) for _ in range(4)]

        def loss(tensors: list[Tensor] = tensors) -> Tensor:
            q, p = (Normal(mu, log_sigma.exp(), validate_args=False) for mu, log_sigma in (tensors[:2], tensors[2:]))
            return kl_divergence(q, p).sum(-1).mean()

        yield f"distributions, kl_divergence of {shape}", distributions, loss


def timed(library: ModuleType, step: Step, rounds: int) -> tuple[float, float]:
    """Median seconds of a step as it is and patched."""

    def ten() -> list[float]:
        times = []
        for _ in range(12):
            start = time.perf_counter()
            step().backward()
            times.append(time.perf_counter() - start)
        return times[2:]

    before: list[float] = []
    after: list[float] = []
    for _ in range(rounds):
        before += ten()
        with library.patch():
            after += ten()
    return statistics.median(before), statistics.median(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    table = Table("", "as it is, µs", "patched, µs", "ratio", title=f"{args.threads} thread, medians of {10 * args.rounds} calls")
    for cases in (of_pythae, of_diffusers, of_pyro, of_distributions):
        for name, library, step in cases():
            before, after = timed(library, step, args.rounds)
            table.add_row(name, f"{1e6 * before:.0f}", f"{1e6 * after:.0f}", f"{before / after:.2f}")
    Console().print(about(torch.device("cpu")), table)


if __name__ == "__main__":
    main()
