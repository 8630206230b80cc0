"""The latent side of a list: calls of `latent.py` share launches, which are what a hierarchy of small latents costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
import triton.language.core as core

from fastelbo.specs import Gradients, Latent, LatentInputs, ListOp, Needs

from .latent import latent_tiles, planned
from .launch import launch
from .reduction import FAMILIES, Plan, finish
from .tile import Grid

# Calls that share a launch, at most. A kernel has the code of each of them, and takes as many times as long to compile.
CALLS = 8


def _forward(
    inputs: Sequence[LatentInputs], specs: Sequence[Latent], needs: Sequence[Needs]
) -> tuple[list[torch.Tensor | None], None]:
    plans = [planned(*one, (False,) * 4, None) for one in zip(inputs, specs, strict=True)]
    _launch(plans, inputs[0].mu.device)
    return [output for plan, _ in plans for output in (plan.z, plan.terms.result())], None


def _backward(
    inputs: Sequence[LatentInputs], specs: Sequence[Latent], grads: Sequence[Gradients], needs: Sequence[Needs], kept: None
) -> list[Gradients]:
    found: list[Gradients] = [(None,) * 4] * len(inputs)
    owing = [i for i, need in enumerate(needs) if True in need and not (grads[i][0] is None and grads[i][1] is None)]
    plans = [planned(inputs[i], specs[i], needs[i], grads[i]) for i in owing]
    _launch(plans, inputs[0].mu.device)
    for i, (plan, _) in zip(owing, plans, strict=True):
        found[i] = plan.gradients
    return found


latents = ListOp(_forward, _backward)


def _launch(plans: Sequence[tuple[Plan, torch.dtype]], device: torch.device) -> None:
    """The plans, CALLS a launch, and what they leave to be added up, FAMILIES a launch."""
    for start in range(0, len(plans), CALLS):
        some = [plan for plan, _ in plans[start : start + CALLS]]
        sizes = [size for plan in some for size in plan.sizes[:4]] + [0] * (4 * (CALLS - len(some)))
        args, flags = tuple([plan.args for plan in some]), tuple([plan.flags for plan in some])
        launch(latents_kernel, sum([plan.programs for plan in some]), device, (*sizes, args, flags))
    for acc in (torch.float32, torch.float64):
        left = [plan.terms for plan, own in plans if own == acc and plan.terms.is_partial]
        for start in range(0, len(left), FAMILIES):
            finish(acc, *left[start : start + FAMILIES])


@triton.jit(do_not_specialize=[f"{size}_{i}" for i in range(CALLS) for size in ("programs", "rows", "r1", "r2")])
def latents_kernel(
    programs_0, rows_0, r1_0, r2_0, programs_1, rows_1, r1_1, r2_1, programs_2, rows_2, r1_2, r2_2,
    programs_3, rows_3, r1_3, r2_3, programs_4, rows_4, r1_4, r2_4, programs_5, rows_5, r1_5, r2_5,
    programs_6, rows_6, r1_6, r2_6, programs_7, rows_7, r1_7, r2_7, args, C: tl.constexpr,
):  # fmt: skip
    """Takes the fields of a `Grid` for each call, tuples of `LatentArgs` and of `LatentFlags`. Each call has one sample."""
    sizes = (
        (programs_0, rows_0, r1_0, r2_0), (programs_1, rows_1, r1_1, r2_1), (programs_2, rows_2, r1_2, r2_2),
        (programs_3, rows_3, r1_3, r2_3), (programs_4, rows_4, r1_4, r2_4), (programs_5, rows_5, r1_5, r2_5),
        (programs_6, rows_6, r1_6, r2_6), (programs_7, rows_7, r1_7, r2_7),
    )  # fmt: skip
    pid = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(args)):
        programs, rows, r1, r2 = sizes[i]
        if (pid >= first) & (pid < first + programs):
            grid = Grid(programs, rows, r1, r2, core.to_tensor(args[i].cols))
            latent_tiles(pid - first, grid, None, 0, args[i], C[i])
        first += programs
