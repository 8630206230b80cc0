"""docs/migrating.md: of each pair of losses, the two have equal values and gradients.

Under a heading with code, the first block defines `today` and the second `swapped`, of the same arguments. Blocks that belong to no
pair are for all that follow. An argument with a default is tried at it and at twice that; any other is an entry of `INPUTS`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PAGE = Path(__file__).resolve().parent.parent / "docs/migrating.md"
TEXT = PAGE.read_text()

B, T = 4, 3
IMAGE, CLIP, CELLS = (B, 3, 6, 5), (B, 3, T, 6, 5), (B, 11)
LATENTS, GROUP, PACKED, SOUND, STEPS = (B, 7), (B, 2, 3, 4), (B, 4, 3, 4), (B, 7, 5), (B, T, 7)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def unit(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return 0.3 + unit(*shape)


def small(*shape: int) -> Tensor:
    return 0.5 * normal(*shape)


def counted(*shape: int) -> Tensor:
    return torch.poisson(3 * unit(*shape))


def eight_bits(*shape: int) -> Tensor:
    """Grey levels from 0 to 1, black and white among them."""
    return torch.randint(0, 256, shape).double().div(255).where(unit(*shape) > 0.2, unit(*shape).round())


def rising(*shape: int) -> Tensor:
    """From sample to sample further from 0, so that the KL of some is below the free bits and of others above."""
    return 0.5 * normal(*shape) * torch.linspace(0.1, 1.5, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))


def rising_std(*shape: int) -> Tensor:
    return rising(*shape).exp()


def mask(batch: int, *rest: int) -> Tensor:
    """Sequences that end early."""
    return (torch.arange(rest[-1]) < torch.arange(1, batch + 1).view(-1, 1, 1)).expand(batch, *rest)


INPUTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    # images
    "x": (unit, IMAGE),
    "recon": (normal, IMAGE),
    "logits": (normal, IMAGE),
    "variance": (positive, IMAGE),
    "recon_logvar": (small, IMAGE),
    "prior_recon": (normal, IMAGE),
    "prior_recon_logvar": (small, IMAGE),
    "pixels": (eight_bits, IMAGE),
    "centre": (small, IMAGE),
    "log_scales": (small, IMAGE),
    "recons": (normal, (B, 6, *IMAGE[1:])),
    "perceptual": (unit, (B, 1, 1, 1)),
    "logscale": (small, ()),
    "logsigma": (small, ()),
    "obs_scale": (positive, ()),
    "nll": (normal, (B,)),
    # vectors of latents
    "mu": (normal, LATENTS),
    "logvar": (small, LATENTS),
    "prior_code": (normal, LATENTS),
    "prior_code_logvar": (small, LATENTS),
    "scale": (positive, LATENTS),
    "var": (positive, LATENTS),
    "pseudo_mu": (normal, (5, 7)),
    "pseudo_logvar": (small, (5, 7)),
    "z": (normal, LATENTS),
    "eps": (normal, (6, *LATENTS)),
    "matrix": (small, (7, 90)),
    # maps of latents
    "z_map": (normal, GROUP),
    "moments": (small, PACKED),
    "other_moments": (small, PACKED),
    "q_moments": (rising, PACKED),
    "p_moments": (rising, PACKED),
    "group_mu": (normal, GROUP),
    "group_logsigma": (small, GROUP),
    "prior_mu": (normal, GROUP),
    "prior_logsigma": (small, GROUP),
    # clips, sequences, cells
    "clip": (unit, CLIP),
    "clip_recon": (normal, CLIP),
    "clip_moments": (small, (B, 4, T, 3, 4)),
    "clip_weight": (unit, (B, 1, T, 1, 1)),
    "sound_mu": (normal, SOUND),
    "sound_logvar": (small, SOUND),
    "prior_sound_mu": (normal, SOUND),
    "prior_sound_logvar": (small, SOUND),
    "z_p": (normal, SOUND),
    "logs_q": (small, SOUND),
    "m_p": (normal, SOUND),
    "logs_p": (small, SOUND),
    "z_mask": (mask, (B, 1, 5)),
    "post_mu": (rising, STEPS),
    "post_std": (rising_std, STEPS),
    "step_mu": (rising, STEPS),
    "step_std": (rising_std, STEPS),
    "cells": (normal, CELLS),
    "spread": (positive, CELLS),
    "rate": (positive, CELLS),
    "theta": (positive, CELLS[1:]),
    "zi_logits": (normal, CELLS),
    "counts": (counted, CELLS),
    "library_mu": (normal, (B, 1)),
    "library_var": (positive, (B, 1)),
    "prior_library_mu": (normal, (B, 1)),
    "prior_library_var": (positive, (B, 1)),
}
# What no function differentiates: weights, masks, noise and counts.
CONSTANTS = {"clip_weight", "pixels", "z_mask", "eps", "counts"}


# Of a difference of two sigmoids that are nearly equal float32 keeps three digits in today's formula.
CANCELS = {"The discretised logistic of NVAE"}


def blocks(text: str) -> list[tuple[int, str]]:
    """(line, source) of every Python block."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in found]


def run(line: int, source: str, namespace: dict[str, Any]) -> None:
    # Padded, so that a traceback names the page's own line.
    exec(compile("\n" * line + source, str(PAGE), "exec"), namespace)


def pairs() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """(today, swapped) by heading."""
    shared: dict[str, Any] = {"__name__": "migrating"}
    found = {}
    for section in re.finditer(r"^#+ (.*?)\n(.*?)(?=^#+ |\Z)", TEXT, re.MULTILINE | re.DOTALL):
        title, first = section.group(1), TEXT[: section.start(2)].count("\n")
        sources = [(first + line, source) for line, source in blocks(section.group(2))]
        namespaces = []
        for line, source in sources:
            run(line, source, shared)
            namespaces.append({name: shared.pop(name) for name in ("today", "swapped") if name in shared})
        if any(namespaces):
            assert [list(defined) for defined in namespaces] == [["today"], ["swapped"]], title
            found[title] = (namespaces[0]["today"], namespaces[1]["swapped"])
    return found


PAIRS = pairs()


def outputs(result: Any) -> tuple[Tensor, ...]:
    """The loss and, for logs, what comes with it."""
    return result if isinstance(result, tuple) else (result,)


def compare(title: str, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """Check that the two agree; returns all numbers that were compared."""
    before, after = (outputs(function(**inputs, **options)) for function in PAIRS[title])
    assert len(before) == len(after)
    leaves = {name: value for name, value in inputs.items() if value.requires_grad}
    dtype = next(iter(leaves.values())).dtype
    gradients = [torch.autograd.grad(result[0], list(leaves.values())) for result in (before, after)]
    # In float32 the usual formula rounds: its KL cancels, and its sums are of hundreds of terms.
    rtol, share = (1e-10, 1e-12) if dtype == torch.float64 else (2e-5, 2e-6)
    if dtype == torch.float32 and title in CANCELS:
        rtol, share = 5e-3, 5e-4
    named = [(f"output {i}", *both) for i, both in enumerate(zip(before, after, strict=True))]
    named += [(name, *both) for name, *both in zip(leaves, *gradients, strict=True)]
    for name, expected, actual in named:
        assert actual.dtype == dtype
        assert expected.abs().max() > 0, f"{name} takes no part in the loss, so that it tests nothing"
        atol = share * float(expected.detach().abs().max())
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    return torch.cat([expected.detach().flatten() for _, expected, _ in named])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("title", PAIRS)
def test_values_and_gradients_are_equal(title: str, dtype: torch.dtype) -> None:
    today, swapped = PAIRS[title]
    arguments = inspect.signature(today).parameters
    assert inspect.signature(swapped).parameters == arguments
    inputs = {}
    for name in (name for name in arguments if name in INPUTS):
        make, shape = INPUTS[name]
        value = make(*shape)
        value = value if value.dtype == torch.bool else value.to(dtype)
        inputs[name] = value.requires_grad_(name not in CONSTANTS)
    numbers = compare(title, inputs, {})
    for name in (name for name in arguments if name not in INPUTS):
        others = compare(title, inputs, {name: 2 * arguments[name].default})
        assert not torch.equal(others, numbers), f"{name} takes no part in the loss, so that it tests nothing"


def test_nan_under_the_mask() -> None:
    """What the page says of VITS: with fastelbo it reaches no gradient, with today's formula it does."""
    names = ("z_p", "logs_q", "m_p", "logs_p", "z_mask")
    z_p, logs_q, m_p, logs_p, z_mask = (make(*shape) for make, shape in (INPUTS[name] for name in names))
    absent = ~z_mask.expand_as(m_p)
    leaves = [t.masked_fill(absent, torch.nan).requires_grad_() for t in (z_p, m_p, logs_p)]
    for function, finite in zip(PAIRS["VITS, coqui"], (False, True), strict=True):
        loss = function(leaves[0], logs_q, leaves[1], leaves[2], z_mask)
        assert loss.isfinite() == finite
        for gradient in torch.autograd.grad(loss, leaves):
            assert bool(gradient.isfinite().all()) == finite


def test_every_project_is_there() -> None:
    """The projects whose losses were read, each with a sentence on its beta."""
    for project in (
        "pytorch/examples", "PyTorch-VAE", "pythae", "latent-diffusion", "stable-diffusion", "generative-models", "CogVideo",
        "Open-Sora", "diffusers", "NVAE", "VDVAE", "guided-diffusion", "sigma-vae", "ladder-vae", "boiler", "disentangling-vae",
        "lightning-bolts", "pyro", "scvi-tools", "VITS", "coqui", "Dreamer", "torch.nn.functional.gaussian_nll_loss",
    ):  # fmt: skip
        assert any(project in title for title in PAIRS), project
    assert len(re.findall(r"^\*\*.*[bB]eta|^\*\*A KL", TEXT, re.MULTILINE)) == len(PAIRS)


def test_the_swap_is_one() -> None:
    """No loss of today uses fastelbo, and no swapped one the formulas that it replaces."""
    for title, (today, swapped) in PAIRS.items():
        assert "fastelbo" not in today.__code__.co_names, title
        assert "fastelbo" in swapped.__code__.co_names, title
        assert not {"Normal", "kl_divergence", "binary_cross_entropy"} & set(swapped.__code__.co_names), title
