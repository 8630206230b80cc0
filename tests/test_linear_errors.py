"""Losses across a linear decoder: what they refuse, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_linear import inputs

import fastelbo

BAD = [
    ({"weight": torch.zeros(20, 3)}, ValueError, "weight has shape"),
    ({"weight": torch.zeros(30)}, ValueError, "weight must be a matrix"),
    ({"x": torch.zeros(2, 5, 30)}, ValueError, "x must be a matrix"),
    ({"bias": torch.zeros(4)}, ValueError, "bias has shape"),
    ({"bias": torch.zeros(30, dtype=torch.int64)}, TypeError, "bias must be"),
    ({"mu": torch.zeros(7, 5), "logvar": torch.zeros(7, 5)}, ValueError, "mu has shape"),
    ({"logvar": torch.zeros(7, 3)}, ValueError, "logvar has shape"),
    ({"recon_logvar": torch.zeros(7, 1)}, ValueError, "recon_logvar has shape"),
    ({"recon_logvar": torch.zeros(7, 30)}, ValueError, "recon_logvar has shape"),
    ({"precision": "fp8"}, ValueError, "precision must be one of"),
    ({"num_samples": 0}, ValueError, "num_samples"),
    ({"reduction": "avg"}, ValueError, "reduction"),
    ({"beta": "1"}, TypeError, "beta"),
    ({"eps": torch.zeros(7, 4), "seed": 1}, ValueError, "at most one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = inputs((7, 30, 4)) | change
    with pytest.raises(error, match=message):
        fastelbo.linear_elbo_loss(**arguments)


def test_errors_of_the_hidden_layer() -> None:
    v = inputs((7, 30, 4))
    with pytest.raises(ValueError, match="h has shape"):
        fastelbo.linear_gaussian_nll(v["mu"][:5], v["weight"], v["x"])
    with pytest.raises(ValueError, match="logvar has shape"):
        fastelbo.linear_gaussian_nll(v["mu"], v["weight"], v["x"], logvar=torch.zeros(7, 30))
