"""Every operation on every backend against the float64 oracle."""

from __future__ import annotations

import math
import random
import zlib
from typing import Any

import pytest
import torch
from cases import BACKENDS, CPU, DTYPES, LAYOUTS, OPS, PATTERNS, Backend, check, draw, each_backend
from settings import compare, options_of, some_weight, variances

import fastelbo
from fastelbo.eager import walk

REFERENCE = pytest.param(Backend("reference", CPU), id="reference")


def covering(name: str, count: int) -> list[Any]:
    """`count` combinations in which every layout, dtype, reduction and broadcast pattern meets many of the others.

    Layouts and dtypes go round in steps that share no factor, so that count = 105 would meet every pair; the rest is drawn.
    """
    op, rng = OPS[name], random.Random(zlib.crc32(name.encode()))
    start = rng.randrange(105)
    out = []
    for i in range(start, start + count):
        layout, dtype = list(LAYOUTS)[i * 2 % len(LAYOUTS)], list(DTYPES)[i % len(DTYPES)]
        size, view = LAYOUTS[layout]
        options = options_of(op, view(torch.empty(size)).ndim, rng)
        weight = some_weight(op, rng)
        patterns = {n: rng.choice(PATTERNS) for n in variances(op)}
        patterns |= {n: rng.choice(PATTERNS) for n in op.names if n.startswith("prior") and name != "DiagonalGaussian"}
        shown = "-".join([layout, dtype, *(str(v) for v in options.values()), *filter(None, [weight]), *patterns.values()])
        out.append((layout, dtype, options, weight, patterns, shown))
    return out


def covered() -> list[Any]:
    out = []
    for backend, count in zip([*BACKENDS, REFERENCE], [35, 10, *[20] * (len(BACKENDS) - 2), 7], strict=True):
        for name in OPS:
            for layout, dtype, options, weight, patterns, shown in covering(name, count):
                if backend.id == "reference" and OPS[name].returns_z and dtype not in ("float32", "float64"):
                    continue  # it leaves it to autograd to add up gradients that were rounded already
                label = f"{backend.id}-{name}-{shown}".replace(" ", "")
                out.append(
                    pytest.param(*backend.values, name, layout, dtype, options, weight, patterns, marks=backend.marks, id=label)
                )
    return out


@pytest.mark.parametrize(("backend", "name", "layout", "dtype", "options", "weight", "patterns"), covered())
def test_against_oracle(
    backend: Backend, name: str, layout: str, dtype: str, options: dict[str, Any], weight: str | None, patterns: dict[str, str]
) -> None:
    compare(name, backend, layout, dtype, options, weight=weight, patterns=patterns)


@pytest.mark.parametrize("name", ["gaussian_nll_logvar", "gaussian_kl", "elbo_loss", "reparameterize_kl"])
@each_backend
def test_more_than_one_block_of_the_default_size(backend: Backend, name: str) -> None:
    if backend.device == CPU and backend.impl == "triton":
        shape = (3, 2500)
    else:
        shape = (3, walk.RUN // 3 + 1001)
    op = OPS[name]
    g = torch.Generator().manual_seed(5)
    tensors = {n: draw(n, shape, g).float() for n in op.names}
    z = [torch.float32] if op.returns_z else []
    options = {} if "reduction" not in op.options else {"reduction": "mean" if name == "elbo_loss" else "none"}
    check(
        lambda v: op.fast(v, backend.impl, **options),
        lambda v: op.slow(v, **options),
        tensors,
        backend,
        out_dtypes=z + [torch.float32],
    )


@each_backend
def test_infinite_logvar(backend: Backend) -> None:
    """A variance of 0: infinitely far from the prior. Of infinity: no likelihood at all."""
    mu = torch.zeros(1, 3, device=backend.device)
    assert float(fastelbo.gaussian_kl(mu, mu - math.inf, impl=backend.impl)) == math.inf
    nll = fastelbo.gaussian_nll(mu, mu + 1, logvar=mu + math.inf, impl=backend.impl)
    assert float(nll) == math.inf
    for value in (math.inf, 1e4, 800.0):
        assert float(fastelbo.gaussian_nll(mu, mu + 1, logvar=value, impl=backend.impl)) == pytest.approx(
            1.5 * (value + math.log(2 * math.pi))
        )
