"""Schedules of beta against the papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastelbo import ELBOLoss, elbo_loss, schedules


def test_linear() -> None:
    weights = [schedules.linear(step, steps=4) for step in range(-1, 7)]
    assert weights == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [schedules.linear(step, steps=2, start=4, end=1) for step in range(4)] == [4.0, 2.5, 1.0, 1.0]


@pytest.mark.parametrize(("steps", "cycles", "rising"), [(1000, 4, 0.5), (1000, 1, 1.0), (900, 3, 0.25), (1000, 7, 0.5)])
def test_cyclical_is_the_papers(steps: int, cycles: int, rising: float) -> None:
    """The schedule of Fu et al. 2019 for steps that count from 1: tau = mod(t - 1, T / M) / (T / M), and tau / R or 1."""
    for t in range(1, steps + 1):
        tau = math.fmod(t - 1, steps / cycles) / (steps / cycles)
        want = tau / rising if tau <= rising else 1.0
        got = schedules.cyclical(t - 1, steps=steps, cycles=cycles, rising=rising)
        # Where a cycle starts, rounding may put a step on either side.
        assert got == pytest.approx(want, abs=1e-9) or min(tau, 1 - tau) < 1e-9
    assert schedules.cyclical(steps, steps=steps, cycles=cycles, rising=rising) == 1.0
    assert schedules.cyclical(10 * steps, steps=steps, cycles=cycles, rising=rising) == 1.0


def test_cyclical_starts_again() -> None:
    weights = [schedules.cyclical(step, steps=8, cycles=2, start=0.5, end=1.5) for step in range(10)]
    assert weights == [0.5, 1.0, 1.5, 1.5, 0.5, 1.0, 1.5, 1.5, 1.5, 1.5]


def test_sigmoid_is_the_logistic_function() -> None:
    for step in range(0, 2000, 37):
        want = 1 / (1 + math.exp(-(step - 900) / 120))
        assert schedules.sigmoid(step, middle=900, width=120) == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert schedules.sigmoid(900, middle=900, width=120, start=2, end=4) == 3.0
    assert schedules.sigmoid(-(10**9), middle=0, width=1) == 0.0
    assert schedules.sigmoid(10**9, middle=0, width=1) == 1.0
    near, wide = (2 * schedules.sigmoid(w, middle=0, width=1) - 1 for w in (1, 3))
    assert (round(near, 2), round(wide, 2)) == (0.46, 0.91)  # as its docstring says


CALLS = {
    "linear": {"steps": 10},
    "cyclical": {"steps": 10, "cycles": 2, "rising": 0.5},
    "sigmoid": {"middle": 5, "width": 2.0},
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_numpy_give_the_same_float(name: str) -> None:
    schedule = getattr(schedules, name)
    want = schedule(3, **CALLS[name])
    got = schedule(np.int64(3), **{k: np.float64(v) for k, v in CALLS[name].items()}, start=np.array(0), end=np.float32(1))
    assert type(want) is type(got) is float
    assert got == want


@pytest.mark.parametrize("name", CALLS)
def test_a_loss_takes_it_as_beta(name: str) -> None:
    beta = getattr(schedules, name)(7, **CALLS[name])
    tensors = [torch.randn(4, n, generator=torch.Generator().manual_seed(n)) for n in (6, 6, 3, 3)]
    module = ELBOLoss()
    module.beta = beta
    torch.testing.assert_close(module(*tensors), elbo_loss(*tensors, beta=beta))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"steps": 0}, "steps must be positive, got 0"),
        ("cyclical", {"steps": -1}, "steps must be positive, got -1"),
        ("cyclical", {"steps": 9, "cycles": 0}, "cycles must be positive, got 0"),
        ("cyclical", {"steps": 9, "rising": 0.0}, "rising must be above 0 and at most 1, got 0.0"),
        ("cyclical", {"steps": 9, "rising": 1.5}, "rising must be above 0 and at most 1, got 1.5"),
        ("sigmoid", {"middle": 0, "width": 0}, "width must be positive, got 0"),
    ],
)
def test_errors(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(schedules, name)(3, **options)
