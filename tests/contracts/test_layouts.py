"""Inputs and upstream gradients are read as they lie in memory, in blocks of any size."""

from __future__ import annotations

import random

import pytest
import torch
from cases import LAYOUTS, OPS, PATTERNS, TORCH, Backend, each_backend, leaves, make, run
from settings import assert_grads, compare, options_of, some_weight, variances

import fastelbo
from fastelbo.eager import walk


# Each of them: dense, dense with a value per row, strided, broadcast, elementwise, and blocks that end in the middle.
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("backend", [TORCH])
def test_in_blocks(backend: Backend, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(layout)
    size, view = LAYOUTS[layout]
    rank = view(torch.empty(size)).ndim
    failed = []
    for name, op in OPS.items():
        for pattern in PATTERNS if variances(op) else PATTERNS[:2]:
            options = options_of(op, rank, rng)
            weight = some_weight(op, rng)
            dtype = rng.choice(["float32", "bfloat16", "mixed", "mixed-low"])
            patterns = dict.fromkeys(variances(op), pattern)
            block = rng.choice([16, 64])
            monkeypatch.setattr(walk, "RUN", block)
            try:
                compare(name, backend, layout, dtype, options, weight=weight, patterns=patterns)
            except (AssertionError, RuntimeError) as error:
                failed.append(f"{name} {dtype} {options} weight={weight} {patterns} {block}: {error}")
    assert not failed, f"{len(failed)} cases:\n" + "\n".join(failed)


def _upstreams(n: int, device: torch.device) -> dict[str, torch.Tensor]:
    base = torch.linspace(-1.5, 2.0, 2 * n, device=device)
    return {
        "rows": base[:n],
        "stride 0": torch.tensor(0.75, device=device).expand(n),
        "strided": base[::2],
        "reversed copy": base.flip(0)[:n],
        "offset": base[1 : n + 1],
    }


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if "reduction" in op.options])
@each_backend
def test_upstream_layouts(backend: Backend, name: str) -> None:
    op = OPS[name]
    values = make(op.names, "chunk1", seed=8)
    for kind, up in _upstreams(values[op.names[0]].shape[0], backend.device).items():
        v, truth = leaves(values, device=backend.device), leaves(values, dtype=torch.float64)
        pick = (lambda o: o[-1]) if op.returns_z else (lambda o: o)
        outs = pick(op.fast(v, backend.impl, reduction="none"))
        count = len(outs) if isinstance(outs, tuple) else 1
        grads = run(lambda t: pick(op.fast(t, backend.impl, reduction="none")), v, [up] * count)[1]  # noqa: B023
        want = run(lambda t: pick(op.slow(t, reduction="none")), truth, [up.double().cpu()] * count)[1]  # noqa: B023
        assert_grads({n: grads[n] for n in want}, want, f"{kind}:")


@each_backend
def test_elementwise_upstream_layouts(backend: Backend) -> None:
    """With nothing summed the upstream gradient is as large as recon: transposed, expanded, sliced."""
    values = make(("recon", "x", "logvar"), "contiguous", seed=8)
    shape = values["recon"].shape
    wide = torch.randn(shape[0], 2 * shape[1], device=backend.device)
    for up in (wide[:, ::2], wide[:, : shape[1]], wide[:1, : shape[1]].expand(shape), wide[:, :1].expand(shape),
               wide[:, : shape[1]].t().contiguous().t()):  # fmt: skip
        v, truth = leaves(values, device=backend.device), leaves(values, dtype=torch.float64)
        for fast, slow in (
            (
                lambda t: fastelbo.gaussian_nll(t["recon"], t["x"], logvar=t["logvar"], batch_dims=2, impl=backend.impl),
                lambda t: OPS["gaussian_nll_logvar"].slow(t, batch_dims=2),
            ),
            (
                lambda t: fastelbo.gaussian_kl(t["recon"], t["logvar"], t["x"], batch_dims=2, impl=backend.impl),
                lambda t: OPS["gaussian_kl_prior"].slow(
                    {"mu": t["recon"], "logvar": t["logvar"], "prior_mu": t["x"], "prior_logvar": 0 * t["x"]}, batch_dims=2
                ),
            ),
            (
                lambda t: fastelbo.reparameterize(t["recon"], t["logvar"], eps=t["x"].detach(), impl=backend.impl) + 0 * t["x"],
                lambda t: (
                    OPS["reparameterize"].slow({"mu": t["recon"], "logvar": t["logvar"], "eps": t["x"].detach()}) + 0 * t["x"]
                ),
            ),
        ):
            assert_grads(run(fast, v, [up])[1], run(slow, truth, [up.double().cpu()])[1], f"strides {up.stride()}:")
