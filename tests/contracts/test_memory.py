"""The caller's memory, and buffers: inputs are never written, and outputs are written in full."""

from __future__ import annotations

import math
import random
import zlib
from typing import Any

import pytest
import torch
from cases import LAYOUTS, OPS, PATTERNS, Backend, Values, each_backend, leaves, make
from settings import compare, options_of, variances

from fastelbo.eager import walk


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fresh floating buffer starts as NaN: what a kernel forgets to write shows."""

    def poisoned(allocate: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            return out.detach().fill_(math.nan) if out.is_floating_point() and not out.requires_grad else out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.mark.parametrize("block", [16, 1 << 17])
@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_poisoned_buffers(backend: Backend, name: str, block: int, poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.impl == "triton" and block == 16:
        pytest.skip("blocks are the plain-PyTorch backend's")
    monkeypatch.setattr(walk, "RUN", block)
    rng = random.Random(zlib.crc32(name.encode()))
    layouts = ["columns", "chunk1", "channels-last", "expanded", "one"]
    for layout in layouts if backend.impl != "triton" else layouts[:3]:
        size, view = LAYOUTS[layout]
        patterns = {n: rng.choice(PATTERNS) for n in variances(OPS[name])}
        options = options_of(OPS[name], view(torch.zeros(size)).ndim, rng)
        compare(name, backend, layout, "float32", options, patterns=patterns)


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_inputs_are_never_written(backend: Backend, name: str) -> None:
    op = OPS[name]
    v = leaves(make((*op.names, "weight"), "chunk1", seed=5), device=backend.device)
    options = {"weight": v["weight"]} if "weight" in op.options else {}
    before = {n: (t.detach().clone(), t._version) for n, t in v.items()}
    outs = op.fast(v, backend.impl, **options)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    ups = [torch.randn_like(o) for o in outs]
    copies = [u.clone() for u in ups]
    torch.autograd.backward(outs, ups, retain_graph=True)
    torch.autograd.grad(outs, [t for t in v.values() if t.requires_grad], ups, create_graph=True)
    for n, (value, version) in before.items():
        assert torch.equal(v[n].detach(), value), n
        assert v[n]._version == version, n
    for u, copy in zip(ups, copies, strict=True):
        assert torch.equal(u, copy), "an upstream gradient was written to"


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_an_input_changed_before_backward(backend: Backend, name: str) -> None:
    """An error, or the gradient of the values that went in; never one of the values that are there now."""
    op = OPS[name]
    values = make((*op.names, "weight"), "chunk1", seed=5)
    for changed in values if "weight" in op.options else op.names:
        options = {"weight": None} if "weight" in op.options else {}
        v = leaves(values, device=backend.device)
        inputs = {n: t * 1 if t.requires_grad else t for n, t in v.items()}

        def call(t: Values, options: Any = options) -> list[torch.Tensor]:
            outs = op.fast(t, backend.impl, **{k: t[k] for k in options})
            return list(outs) if isinstance(outs, tuple) else [outs]

        asked = [t for t in v.values() if t.requires_grad and t is not v["weight"]]
        want = torch.autograd.grad(sum(o.sum() for o in call(inputs)), asked, retain_graph=True, allow_unused=True)
        outs = call(inputs)
        with torch.no_grad():
            inputs[changed].mul_(-3).add_(1)
        try:
            got = torch.autograd.grad(sum(o.sum() for o in outs), asked, allow_unused=True)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017 (no error is right too)
        else:
            for g, w in zip(got, want, strict=True):
                assert (g is None) == (w is None)
                assert g is None or torch.equal(g, w), f"{changed} was changed, and the gradient follows the new values"
