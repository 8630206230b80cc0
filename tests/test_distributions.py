"""`DiagonalGaussian`: packed moments, and what it has in common with torch's distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Backend, accumulated, assert_close, check, draw, each_backend, slow_kl, slow_sample

import fastelbo
from fastelbo.eager import walk


@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 8), 1), ((3, 8), -1), ((3, 6, 2, 5), 1), ((2, 3, 10), 2), ((2, 3, 10), -1), ((4, 3, 5), 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [16, 1 << 17])
@each_backend
def test_moments(
    backend: Backend, block: int, dtype: torch.dtype, shape: tuple[int, ...], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The halves are read where they lie, and their gradient comes back packed; a learned prior gets its own."""
    if backend.impl == "triton" and block == 16:
        pytest.skip("blocks are the plain-PyTorch backend's")
    monkeypatch.setattr(walk, "RUN", block)
    g = torch.Generator().manual_seed(9)
    half = draw("mu", shape, g).chunk(2, dim)[0].shape
    tensors = {"moments": (2 * draw("mu", shape, g)).to(dtype), "eps": draw("eps", half, g).to(dtype)}
    tensors |= {n: draw(n, half, g).to(dtype) for n in ("prior_mu", "prior_logvar")}

    def fast(v: dict[str, torch.Tensor]) -> Any:
        q = fastelbo.DiagonalGaussian.from_moments(v["moments"], dim, logvar_clamp=(-1.0, 2.0), impl=backend.impl)
        z, kl = q.rsample_kl(fastelbo.DiagonalGaussian(v["prior_mu"], v["prior_logvar"]), eps=v["eps"])
        return z, kl

    def slow(v: dict[str, torch.Tensor]) -> Any:
        mu, logvar = v["moments"].chunk(2, dim)
        kl = slow_kl(mu, logvar, v["prior_mu"], v["prior_logvar"], logvar_clamp=(-1.0, 2.0))
        return slow_sample(mu, logvar, v["eps"], (-1.0, 2.0)), kl

    check(fast, slow, tensors, backend, out_dtypes=[dtype, accumulated(tensors["moments"])])


@each_backend
def test_moments_that_need_no_gradient_leave_the_priors(backend: Backend) -> None:
    moments = torch.randn(3, 8, device=backend.device)
    prior = [torch.randn(3, 4, device=backend.device, requires_grad=True) for _ in range(2)]
    kl = fastelbo.DiagonalGaussian.from_moments(moments, impl=backend.impl).kl(fastelbo.DiagonalGaussian(*prior))
    grads = torch.autograd.grad(kl.sum(), prior)
    truth = [p.detach().double().cpu().requires_grad_() for p in prior]
    want = torch.autograd.grad(slow_kl(*moments.double().cpu().chunk(2, 1), *truth).sum(), truth)
    for name, g, w in zip(("prior_mu", "prior_logvar"), grads, want, strict=True):
        assert_close(g, w, name)


def test_distribution_properties() -> None:
    mu, logvar = torch.randn(3, 4, requires_grad=True), 3 * torch.randn(3, 4)
    q = fastelbo.DiagonalGaussian(mu, logvar, logvar_clamp=(-1.0, 1.0))
    clamped = logvar.clamp(-1, 1)
    torch.testing.assert_close(q.logvar, clamped)
    torch.testing.assert_close(q.std, torch.exp(clamped / 2))
    torch.testing.assert_close(q.var, torch.exp(clamped))
    assert torch.equal(q.mean, mu)
    assert torch.equal(q.mode(), mu)
    x = torch.randn(3, 4)
    normal = torch.distributions.Normal(mu, q.std)
    torch.testing.assert_close(q.nll(x), -normal.log_prob(x).sum(-1))
    other = fastelbo.DiagonalGaussian(torch.randn(3, 4), torch.randn(3, 4))
    want = torch.distributions.kl_divergence(normal, torch.distributions.Normal(other.mu, other.std)).sum(-1)
    torch.testing.assert_close(q.kl(other), want, rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    z = q.sample()
    torch.manual_seed(3)
    torch.testing.assert_close(z, mu + q.std * torch.randn_like(mu))
    assert z.requires_grad
    default = fastelbo.DiagonalGaussian.from_moments(torch.tensor([[0.0, 50.0], [0.0, -50.0]]))
    assert default.logvar.tolist() == [[20.0], [-30.0]]
    assert fastelbo.DiagonalGaussian.from_moments(torch.tensor([[0.0, 50.0]]), logvar_clamp=None).logvar.tolist() == [[50.0]]
