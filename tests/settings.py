"""Settings in which an operation is tried, its comparison with the oracle in one of them, and the comparison of gradients."""

from __future__ import annotations

import random
from typing import Any

import torch
from cases import OPS, PATTERNS, Backend, Op, Values, accumulated, assert_close, check, make


def variances(op: Op) -> list[str]:
    """The likelihood's variance among the inputs, which may broadcast; the posterior's logvar may not."""
    return [n for n in op.names if n in ("std", "var", "recon_logvar") or (n == "logvar" and "mu" not in op.names)]


def some_weight(op: Op, rng: random.Random) -> str | None:
    if "weight" not in op.options or rng.random() < 0.6:
        return None
    return f"{rng.choice(['mask', 'weight'])}:{rng.choice(PATTERNS)}"


def options_of(op: Op, rank: int, rng: random.Random) -> dict[str, Any]:
    """Some setting of the options that the operation takes."""
    out: dict[str, Any] = {}
    if "reduction" in op.options:
        out["reduction"] = rng.choice(["none", "batchmean", "sum", "mean"])
    if "batch_dims" in op.options:
        out["batch_dims"] = rng.choice([0, 1, 1, min(2, rank), rank])
    if "logvar_clamp" in op.options and rng.random() < 0.4:
        out["logvar_clamp"] = (-1.0, 0.75)
    return out


def compare(name: str, backend: Backend, layout: str, dtype: str, options: dict[str, Any], *, weight: str | None = None,
            patterns: dict[str, str] | None = None, seed: int = 0, **more: Any) -> None:  # fmt: skip
    """One operation against its oracle; `weight` is "mask:PATTERN" or "weight:PATTERN"."""
    op = OPS[name]
    tensors = make(op.names, layout, dtype, seed, **(patterns or {}))
    kind = None
    if weight is not None:
        kind, pattern = weight.split(":")
        tensors |= make([kind], layout, "float32", seed + 1, **{kind: pattern})

    def fast(v: dict[str, torch.Tensor]) -> Any:
        return op.fast(v, backend.impl, **options, **({} if kind is None else {"weight": v[kind]}))

    def slow(v: dict[str, torch.Tensor]) -> Any:
        return op.slow(v, **options, **({} if kind is None else {"weight": v[kind]}))

    acc = accumulated(*(tensors[n] for n in op.names if n != "eps"))
    z = [tensors["mu"].dtype] if op.returns_z else []
    outputs = len(z) if op.options == () else {"elbo_terms": 2}.get(name, 1 + len(z))
    check(fast, slow, tensors, backend, out_dtypes=z + [acc] * (outputs - len(z)), **more)


def assert_grads(grads: Values, want: Values, what: str = "", **bars: Any) -> None:
    assert set(grads) == set(want)
    for name, g in want.items():
        assert_close(grads[name], g, f"{what} gradient of {name}", scale=float(g.abs().max()) + 1, **bars)
