"""Shapes that nobody thought of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Backend, check, draw, each_backend, slow_kl, slow_nll

import fastelbo
from fastelbo.eager import walk

hypothesis = pytest.importorskip("hypothesis")

st = hypothesis.strategies

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


def broadcasting_to(shape: tuple[int, ...]) -> Any:
    """Shapes that broadcast to `shape`: some dimensions 1, some leading ones dropped."""
    return st.tuples(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)), st.integers(0, len(shape))).map(
        lambda c: tuple(1 if one else n for one, n in zip(c[0], shape, strict=True))[c[1] :]
    )


def _examples(backend: Backend) -> int:
    return (
        hypothesis.settings.default.max_examples
        if backend.impl == "torch"
        else max(4, hypothesis.settings.default.max_examples // 4)
    )


@each_backend
def test_any_shape_nll(backend: Backend) -> None:
    @hypothesis.settings(max_examples=2 * _examples(backend))
    @hypothesis.given(st.data())
    def inner(data: Any) -> None:
        shape = data.draw(SHAPES)
        form = data.draw(st.sampled_from(["logvar", "std", "var"]))
        spread, weight = data.draw(broadcasting_to(shape)), data.draw(st.none() | broadcasting_to(shape))
        options = {
            "batch_dims": data.draw(st.integers(0, len(shape))),
            "reduction": data.draw(st.sampled_from(["none", "sum", "mean"])),
        }
        small = data.draw(st.booleans())
        g = torch.Generator().manual_seed(0)
        tensors = {n: draw(n, shape, g).float() for n in ("recon", "x")} | {form: draw(form, spread, g).float()}
        if weight is not None:
            # No case is all zeros, whose mean is NaN.
            tensors["weight"] = draw("weight", weight, g).float() + 0.25 * (math.prod(weight) < 4)
        run, walk.RUN = walk.RUN, 4 if small else walk.RUN
        try:
            check(
                lambda v: fastelbo.gaussian_nll(
                    v["recon"], v["x"], **{form: v[form]}, weight=v.get("weight"), impl=backend.impl, **options
                ),
                lambda v: slow_nll(v["recon"], v["x"], **{form: v[form]}, weight=v.get("weight"), **options),
                tensors,
                backend,
            )
        finally:
            walk.RUN = run

    inner()


@each_backend
def test_any_shape_kl(backend: Backend) -> None:
    @hypothesis.settings(max_examples=2 * _examples(backend))
    @hypothesis.given(st.data())
    def inner(data: Any) -> None:
        shape = data.draw(SHAPES)
        priors = {n: data.draw(st.none() | broadcasting_to(shape)) for n in ("prior_mu", "prior_logvar")}
        weight = data.draw(st.none() | broadcasting_to(shape))
        options = {
            "batch_dims": data.draw(st.integers(0, len(shape))),
            "reduction": data.draw(st.sampled_from(["none", "sum", "mean"])),
        }
        small = data.draw(st.booleans())
        g = torch.Generator().manual_seed(0)
        tensors = {n: draw(n, shape, g).float() for n in ("mu", "logvar")}
        tensors |= {n: draw(n, s, g).float() for n, s in priors.items() if s is not None}
        if weight is not None:
            tensors["weight"] = draw("weight", weight, g).float() + 0.25 * (math.prod(weight) < 4)
        run, walk.RUN = walk.RUN, 4 if small else walk.RUN
        try:
            check(
                lambda v: fastelbo.gaussian_kl(
                    v["mu"],
                    v["logvar"],
                    v.get("prior_mu"),
                    v.get("prior_logvar"),
                    weight=v.get("weight"),
                    impl=backend.impl,
                    **options,
                ),
                lambda v: slow_kl(
                    v["mu"], v["logvar"], v.get("prior_mu"), v.get("prior_logvar"), weight=v.get("weight"), **options
                ),
                tensors,
                backend,
            )
        finally:
            walk.RUN = run

    inner()
