"""Log-variances at which a variance, its inverse or e^v leaves float32's range, while the results stay in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import Backend, each_backend
from torch import Tensor

import fastelbo

BATCH, WIDTH, LATENTS = 4, 6, 3
Inputs = dict[str, Tensor]
Outputs = Sequence[Tensor]

# (scale of the data and of what decodes it, log-variance). In other units data may well be of size 1e-20, and then a log-variance
# of -92 fits it; a residual may also be small or none beside a variance that is as small.
SCALES = [
    (1e-20, -92.0), (1e-15, -100.0), (1e-22, -88.5), (1e-12, -110.0), (1e19, 88.5), (1e-3, -60.0), (0.0, -88.0), (0.0, -120.0)
]  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {"element": (BATCH, WIDTH), "dim": (WIDTH,), "sample": (BATCH, 1), "0d": ()}


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def right(run: Callable[[Inputs, str], Outputs], inputs: Inputs, backend: Backend) -> None:
    """Outputs and gradients in float32 are those of the equations in float64; inf only where these do not fit either."""
    found, true = [], []
    for results, dtype, device, impl in (
        (found, torch.float32, backend.device, backend.impl),
        (true, torch.float64, torch.device("cpu"), "reference"),
    ):
        v = {name: t.to(device, dtype).requires_grad_() for name, t in inputs.items()}
        outputs = run(v, impl)
        results += [t.detach() for t in outputs]
        results += torch.autograd.grad([t.sum() for t in outputs], list(v.values()))
    for got, want, name in zip(found, true, [*("output" for _ in range(len(found) - len(inputs))), *inputs], strict=True):
        want = torch.where(want.abs() > torch.finfo(torch.float32).max, math.inf * want.sign(), want)
        got = got.double().cpu()
        # Of the sums' size, which is that of their largest terms here.
        largest = want[want.isfinite()].abs().max() if bool(want.isfinite().any()) else 0.0
        close = (got == want) | ((got - want).abs() <= 3e-6 * largest + 1e-38)
        assert bool(close.all()), (name, got, want)


@each_backend
@pytest.mark.parametrize(("scale", "logvar"), SCALES)
@pytest.mark.parametrize("form", [*SHAPES, "number"])
@pytest.mark.parametrize("function", ["gaussian_nll", "elbo_loss", "elbo_terms", "sgvb_loss"])
def test_a_residual_is_divided_by_its_std(function: str, form: str, scale: float, logvar: float, backend: Backend) -> None:
    inputs = {"recon": drawn(BATCH, WIDTH, scale=scale), "x": drawn(BATCH, WIDTH, scale=0.3 * scale)}
    if form in SHAPES:
        inputs["spread"] = torch.full(SHAPES[form], logvar)

    def run(v: Inputs, impl: str) -> Outputs:
        latents = (torch.zeros_like(v["recon"][:, :LATENTS]),) * 2
        options: dict[str, Any] = {"full": False, "impl": impl}
        if function == "gaussian_nll":
            return [fastelbo.gaussian_nll(v["recon"], v["x"], logvar=v.get("spread", logvar), **options)]
        options["recon_logvar"] = v.get("spread", logvar)
        if function == "sgvb_loss":
            return [fastelbo.sgvb_loss(lambda z: v["recon"], v["x"], *latents, **options)]
        if function == "elbo_loss":
            return [fastelbo.elbo_loss(v["recon"], v["x"], *latents, **options)]
        return fastelbo.elbo_terms(v["recon"], v["x"], *latents, reduction="none", **options)[:1]

    right(run, inputs, backend)


@each_backend
@pytest.mark.parametrize(("scale", "logvar"), SCALES)
@pytest.mark.parametrize("form", ["dim", "0d", "number"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_a_residual_across_a_linear_layer(reduction: str, form: str, scale: float, logvar: float, backend: Backend) -> None:
    inputs = {"h": drawn(BATCH, LATENTS), "weight": drawn(WIDTH, LATENTS, scale=scale), "x": drawn(BATCH, WIDTH, scale=scale)}
    inputs["bias"] = drawn(WIDTH, scale=scale)
    if form in SHAPES:
        inputs["spread"] = torch.full(SHAPES[form], logvar)

    def run(v: Inputs, impl: str) -> Outputs:
        options: dict[str, Any] = {"logvar": v.get("spread", logvar), "reduction": reduction, "precision": "ieee", "impl": impl}
        return [fastelbo.linear_gaussian_nll(v["h"], v["weight"], v["x"], v["bias"], full=False, **options)]

    right(run, inputs, backend)


@each_backend
@pytest.mark.parametrize("logvar", [-100.0, 80.0, 88.5, 88.8, 89.0, 89.41])
@pytest.mark.parametrize("function", ["gaussian_kl", "reparameterize_kl"])
def test_a_kl_fits_as_long_as_half_of_e_to_the_v(function: str, logvar: float, backend: Backend) -> None:
    inputs = {"mu": drawn(BATCH, LATENTS), "logvar": torch.full((BATCH, LATENTS), logvar)}

    def run(v: Inputs, impl: str) -> Outputs:
        if function == "gaussian_kl":
            return [fastelbo.gaussian_kl(*v.values(), batch_dims=2, impl=impl)]
        eps = torch.zeros_like(v["mu"])
        return [fastelbo.reparameterize_kl(*v.values(), eps=eps, batch_dims=2, impl=impl)[1]]

    right(run, inputs, backend)


@each_backend
@pytest.mark.parametrize(("scale", "logvar"), SCALES)
def test_a_mean_is_divided_by_the_priors_std(scale: float, logvar: float, backend: Backend) -> None:
    inputs = {"mu": drawn(BATCH, LATENTS, scale=scale), "logvar": logvar + drawn(BATCH, LATENTS)}
    inputs |= {"prior_mu": drawn(BATCH, LATENTS, scale=0.3 * scale), "prior_logvar": torch.full((BATCH, LATENTS), logvar)}
    right(lambda v, impl: [fastelbo.gaussian_kl(*v.values(), batch_dims=2, impl=impl)], inputs, backend)


@pytest.fixture
def flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushed")
@pytest.mark.parametrize("form", [*SHAPES, "number"])
def test_no_nan_where_subnormals_are_flushed(form: str) -> None:
    recon = torch.zeros(BATCH, WIDTH, requires_grad=True)
    spread: Any = torch.full(SHAPES[form], -88.0) if form in SHAPES else -88.0
    nll = fastelbo.gaussian_nll(recon, torch.zeros(BATCH, WIDTH), logvar=spread, full=False, impl="torch")
    (slope,) = torch.autograd.grad(nll.sum(), recon)
    torch.testing.assert_close(nll.detach(), torch.full((BATCH,), -44.0 * WIDTH))
    assert not slope.any()


@each_backend
def test_a_subnormal_std(backend: Backend) -> None:
    """Its inverse is infinite, and its slope, for a residual of the same size, is 0."""
    std = torch.full((1, 1), 1e-40, device=backend.device, requires_grad=True)
    nll = fastelbo.gaussian_nll(torch.full_like(std, 1e-40).detach(), torch.zeros_like(std), std=std, impl=backend.impl)
    (slope,) = torch.autograd.grad(1e-3 * nll.sum(), std)
    assert not slope.isnan().any()
