"""`sgvb_loss` on each backend. tests/test_modules.py has its use in code, and `effective_beta`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CPU, Backend, broadcast_shape, check, draw, each_backend, slow_sgvb

import fastelbo


def decoder(z: torch.Tensor) -> torch.Tensor:
    return torch.cat([z.tanh(), 0.5 * z.square(), -z], -1)


@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("spread", ["none", "float", "0d", "sample", "dim", "decoded", "decoded-shared"])
@each_backend
def test_sgvb_is_the_papers_estimator(backend: Backend, spread: str, samples: int, reduction: str) -> None:
    if backend.impl == "triton" and backend.device == CPU and spread not in ("none", "sample", "decoded"):
        pytest.skip("the interpreter sees fewer cases")
    g = torch.Generator().manual_seed(2)
    tensors = {n: draw(n, (4, 3), g).float() for n in ("mu", "logvar")} | {"x": draw("x", (4, 9), g).float()}
    tensors["eps"] = draw("eps", (samples, 4, 3), g).float()
    tensors["weight"] = draw("weight", (4, 1), g).float()
    if spread in ("0d", "sample", "dim"):
        tensors["spread"] = draw("logvar", broadcast_shape(spread, (4, 9)), g).float()

    def decode(z: torch.Tensor) -> Any:
        if spread == "decoded":
            return decoder(z), 0.3 * decoder(-z)
        return (decoder(z), z[:, :1]) if spread == "decoded-shared" else decoder(z)

    def fixed(v: dict[str, torch.Tensor]) -> dict[str, Any]:
        held = 0.4 if spread == "float" else v.get("spread")
        return {"recon_logvar": held, "beta": 0.7, "logvar_clamp": (-1.0, 1.0), "weight": v["weight"], "reduction": reduction}

    check(
        lambda v: fastelbo.sgvb_loss(
            decode, v["x"], v["mu"], v["logvar"], num_samples=samples, eps=v["eps"], impl=backend.impl, **fixed(v)
        ),
        lambda v: slow_sgvb(decode, v["x"], v["mu"], v["logvar"], eps=v["eps"], **fixed(v)),
        tensors,
        backend,
        rtol=4e-6,  # the decoder's own rounding comes on top
    )


@each_backend
def test_sgvb_with_one_sample_is_elbo_loss(backend: Backend) -> None:
    g = torch.Generator().manual_seed(2)
    mu, logvar, x = (draw("mu", s, g).float().to(backend.device) for s in ((4, 3), (4, 3), (4, 9)))
    seed = {"seed": 11}
    loss, nll, kl = fastelbo.sgvb_loss(decoder, x, mu, logvar, return_terms=True, impl=backend.impl, **seed)
    recon = decoder(fastelbo.reparameterize(mu, logvar, impl=backend.impl, **seed))
    want = fastelbo.elbo_loss(recon, x, mu, logvar, return_terms=True, impl=backend.impl)
    for a, b in zip((loss, nll, kl), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
