"""Weights of the KL as functions of the training step, to be given as `beta`.

    loss = fastelbo.elbo_loss(recon, x, mu, logvar, beta=fastelbo.schedules.linear(step, steps=10_000))

Each takes a step that counts from 0 and returns a float. A new float does not wait for a GPU. Under torch.compile
the first new float compiles once more, and later ones compile nothing.
"""

from __future__ import annotations

import math

from .dtypes import plain
from .types import Number


def linear(step: Number, *, steps: Number, start: Number = 0.0, end: Number = 1.0) -> float:
    """From `start` at step 0 in a line to `end` at step `steps`, and `end` from there on: Sønderby et al. 2016.

    Raises:
        ValueError: `steps` is not positive.
    """
    return _between(start, end, _fraction(step, steps=steps))


def cyclical(
    step: Number, *, steps: Number, cycles: Number = 4, rising: Number = 0.5, start: Number = 0.0, end: Number = 1.0
) -> float:
    """`cycles` times over `steps` steps from `start` to `end`, and `end` from there on: Fu et al. 2019 (NAACL).

    Args:
        step: The training step.
        steps: How many steps all cycles take together.
        cycles: M of the paper, how often the weight starts again.
        rising: R of the paper, the part of a cycle in which the weight rises; for the rest of it, it is `end`.
        start, end: The lowest and the highest weight.

    Raises:
        ValueError: `steps` or `cycles` is not positive, or `rising` is not above 0 and at most 1.
    """
    if not plain(cycles) > 0:
        raise ValueError(f"cycles must be positive, got {cycles}")
    if not 0 < plain(rising) <= 1:
        raise ValueError(f"rising must be above 0 and at most 1, got {rising}")
    done = _fraction(step, steps=steps) * plain(cycles)
    within = 1.0 if done >= plain(cycles) else done % 1.0
    return _between(start, end, min(1.0, within / plain(rising)))


def sigmoid(step: Number, *, middle: Number, width: Number, start: Number = 0.0, end: Number = 1.0) -> float:
    """Along a logistic curve from `start` to `end`, halfway at step `middle`: Bowman et al. 2016.

    Args:
        step: The training step.
        middle: The step at which the weight is halfway.
        width: How many steps make the curve's argument 1: 46% of the way lies within a `width` of the middle, 91% within three.
        start, end: What the weight comes from, and what it goes to.

    Raises:
        ValueError: `width` is not positive.
    """
    if not plain(width) > 0:
        raise ValueError(f"width must be positive, got {width}")
    return _between(start, end, 0.5 + 0.5 * math.tanh(0.5 * (float(plain(step)) - float(plain(middle))) / float(plain(width))))


def _fraction(step: Number, *, steps: Number) -> float:
    """How much of `steps` is over, from 0 to 1."""
    if not plain(steps) > 0:
        raise ValueError(f"steps must be positive, got {steps}")
    return min(1.0, max(0.0, float(plain(step)) / float(plain(steps))))


def _between(start: Number, end: Number, part: float) -> float:
    # Of two products, so that 0 and 1 give exactly start and end.
    return (1.0 - part) * float(plain(start)) + part * float(plain(end))
