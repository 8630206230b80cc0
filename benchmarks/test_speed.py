"""The same workloads for those who live in pytest-benchmark: `pytest benchmarks/ --benchmark-only`, with its options.

Each peer is timed by itself here, one after the other, where `python -m benchmarks` puts all of them in every round: use that to
compare peers on a noisy machine, and this to compare one peer with its own past.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .measure import PEERS, Step, errors, peers, wrong
from .workloads import WORKLOADS, Draw, Workload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", params=WORKLOADS, ids=lambda w: w.name)
def checked(request: pytest.FixtureRequest) -> tuple[Workload, dict[str, Any], Step]:
    """A workload whose numbers have been checked, or none of its speeds is measured."""
    workload: Workload = request.param
    inputs = workload.inputs(Draw(DEVICE, torch.float32), **workload.sizes("full" if DEVICE.type == "cuda" else "small"))
    losses = peers(workload)
    found = errors(workload, losses, inputs)
    if off := wrong(found, torch.float32):
        pytest.fail(f"wrong numbers: {', '.join(f'{p} {found[p]:.1e}' for p in off)}")
    return workload, losses, Step(inputs)


@pytest.mark.parametrize("peer", PEERS)
def test_step(benchmark: Any, checked: tuple[Workload, dict[str, Any], Step], peer: str) -> None:
    """Forward and backward."""
    workload, losses, step = checked
    benchmark.group = workload.name

    def once() -> None:
        step(losses[peer])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=20, warmup_rounds=3)
    assert all(t.grad is not None for t in step.wanted)
