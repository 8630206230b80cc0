"""`reparameterize`, `reparameterize_kl` and `gaussian_kl`: priors, the clamp, and noise."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    CPU,
    Backend,
    accumulated,
    assert_close,
    broadcast_shape,
    check,
    draw,
    each_backend,
    leaves,
    make,
    run,
    slow_kl,
    slow_sample,
)

import fastelbo
from fastelbo import specs
from fastelbo.eager import latent, walk
from fastelbo.noise import philox_normal

# ---- priors and the clamp --------------------------------------------------------------------------------------------------------


@each_backend
def test_prior_forms(backend: Backend) -> None:
    """Numbers, 0-d, shared and full priors."""
    base = make(["mu", "logvar"], "chunk1", seed=4)
    shape = base["mu"].shape
    for prior_mu, prior_logvar in ((0.5, -0.25), (1, None), (None, 2)):
        check(
            lambda v, m=prior_mu, s=prior_logvar: fastelbo.gaussian_kl(v["mu"], v["logvar"], m, s, impl=backend.impl),
            lambda v, m=prior_mu, s=prior_logvar: slow_kl(v["mu"], v["logvar"], m, s),
            base,
            backend,
        )
    for pattern in ("0d", "channel", "dim"):
        g = torch.Generator().manual_seed(6)
        prior = {n: draw(n, broadcast_shape(pattern, shape), g).float() for n in ("prior_mu", "prior_logvar")}
        check(
            lambda v: fastelbo.gaussian_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], impl=backend.impl),
            lambda v: slow_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"]),
            {**base, **prior},
            backend,
        )
    # One of the two alone.
    for name in ("prior_mu", "prior_logvar"):
        check(
            lambda v, n=name: fastelbo.gaussian_kl(v["mu"], v["logvar"], **{n: v[n]}, impl=backend.impl),
            lambda v, n=name: slow_kl(v["mu"], v["logvar"], **{n: v[n]}),
            {**base, name: prior[name]},
            backend,
        )


MOMENTS = ("mu", "logvar", "prior_mu", "prior_logvar")


@pytest.mark.parametrize("priors", [(), ("prior_mu",), ("prior_logvar",), ("prior_mu", "prior_logvar")], ids="-".join)
@pytest.mark.parametrize("block", [16, 1 << 17])
@each_backend
def test_every_subset_of_the_gradients_of_a_kl(
    backend: Backend, block: int, priors: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a total, and of rows whose upstream gradients differ or are one number: each has its own way through."""
    if backend.impl != "torch" and block == 16:
        pytest.skip("blocks are the plain-PyTorch backend's")
    monkeypatch.setattr(walk, "RUN", block)
    g = torch.Generator().manual_seed(6)
    names = ["mu", "logvar", *priors]
    tensors = {n: draw(n, (2, 3, 4, 5), g).float() for n in names} | {"weight": draw("weight", (2, 3, 1, 5), g).float()}
    subsets = [s for n in range(1, len(names) + 1) for s in itertools.combinations(names, n)]
    settings = itertools.cycle(({}, {"batch_dims": 2}, {"reduction": "batchmean"}))

    def loss(kl: Any, v: Any, mean: bool, weighed: bool, **options: Any) -> Any:
        out = kl(*(v.get(n) for n in MOMENTS), weight=v["weight"] if weighed else None, **options)
        return out.mean() if mean else out

    for subset, mean, weighed in itertools.product(subsets, (False, True), (False, True)):
        options = {"mean": mean, "weighed": weighed} | next(settings)
        fast = functools.partial(loss, fastelbo.gaussian_kl, impl=backend.impl, **options)
        check(fast, functools.partial(loss, slow_kl, **options), tensors, backend, wanted=subset)


@each_backend
def test_clamp(backend: Backend) -> None:
    """Inclusive edges, zero gradient outside them, for z and for the KL."""
    lo, hi = -1.5, 2.25
    raw = torch.tensor([[-200.0, -1.5000001, -1.5, -1.4, 0.0, 2.2, 2.25, 2.2500002, 90.0, -math.inf, math.inf]])
    tensors = {
        "mu": torch.linspace(-2, 2, raw.numel()).view_as(raw),
        "logvar": raw,
        "eps": torch.linspace(1, -3, raw.numel()).view_as(raw),
    }
    for want_z in (True, False):

        def fast(v: dict[str, torch.Tensor], want_z: bool = want_z) -> Any:
            if want_z:
                return fastelbo.reparameterize_kl(
                    v["mu"], v["logvar"], eps=v["eps"], logvar_clamp=(lo, hi), batch_dims=2, impl=backend.impl
                )
            return fastelbo.gaussian_kl(v["mu"], v["logvar"], logvar_clamp=[lo, hi], batch_dims=2, impl=backend.impl)

        def slow(v: dict[str, torch.Tensor], want_z: bool = want_z) -> Any:
            kl = slow_kl(v["mu"], v["logvar"], logvar_clamp=(lo, hi), batch_dims=2)
            return (slow_sample(v["mu"], v["logvar"], v["eps"], (lo, hi)), kl) if want_z else kl

        check(fast, slow, tensors, backend)
        inputs = leaves(tensors, device=backend.device)
        grads = run(fast, inputs)[1]
        outside = (raw < lo) | (raw > hi)
        assert torch.equal(grads["logvar"].cpu() == 0, outside | (raw == 0.0) & (not want_z))


@each_backend
def test_only_the_sample_in_the_loss(backend: Backend) -> None:
    """A learned prior gets nothing from z."""
    mu, logvar, prior_mu, prior_logvar = (torch.randn(3, 5).to(backend.device).requires_grad_() for _ in range(4))
    z, _ = fastelbo.reparameterize_kl(mu, logvar, prior_mu, prior_logvar, seed=1, impl=backend.impl)
    z.sum().backward()
    assert torch.equal(mu.grad, torch.ones_like(mu))
    assert prior_mu.grad is None or not prior_mu.grad.any()
    assert prior_logvar.grad is None or not prior_logvar.grad.any()


@each_backend
def test_halves_of_one_tensor_by_hand(backend: Backend) -> None:
    """moments.chunk(2, 1) by the caller: autograd puts the two gradients together."""
    moments = torch.randn(3, 8, 2, 5, device=backend.device, requires_grad=True)
    mu, logvar = moments.chunk(2, 1)
    fastelbo.gaussian_kl(mu, logvar, reduction="sum", impl=backend.impl).backward()
    m, s = moments.detach().double().chunk(2, 1)
    assert_close(moments.grad, torch.cat([m, 0.5 * torch.expm1(s)], 1), "moments")


# ---- noise -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("samples", [None, 1, 3])
@each_backend
def test_seed(backend: Backend, samples: int | None, dtype: torch.dtype) -> None:
    """A seed stands for noise that anyone can write down: z and gradients are those of `eps=philox_normal(shape, seed)`."""
    for layout, seed in (("contiguous", 0), ("chunk1", 1234567), ("transposed", 2**63 + 5), ("contiguous", -1)):
        tensors = {n: t.to(dtype) for n, t in make(["mu", "logvar"], layout).items()}
        shape = tensors["mu"].shape if samples is None else (samples, *tensors["mu"].shape)
        tensors["eps"] = philox_normal(shape, seed)
        check(
            lambda v, s=seed: fastelbo.reparameterize_kl(v["mu"], v["logvar"], num_samples=samples, seed=s, impl=backend.impl),
            lambda v: (slow_sample(v["mu"], v["logvar"], v["eps"]), slow_kl(v["mu"], v["logvar"])),
            tensors,
            backend,
            out_dtypes=[dtype, accumulated(tensors["mu"])],
            rtol=None if dtype != torch.float64 else 2e-6,  # the normals are float32's
        )


@each_backend
def test_seed_reproduces(backend: Backend) -> None:
    mu = torch.zeros(5, 7, device=backend.device)
    z = [fastelbo.reparameterize(mu, mu, seed=s, impl=backend.impl) for s in (3, 3, torch.tensor(3, device=backend.device), 4)]
    assert torch.equal(z[0], z[1])
    assert torch.equal(z[0], z[2])
    assert not torch.equal(z[0], z[3])
    # The noise belongs to the element's number, not to the shape or to what comes after it.
    flat = fastelbo.reparameterize(mu.view(-1)[:19], mu.view(-1)[:19], seed=3, impl=backend.impl)
    assert torch.equal(flat, z[0].view(-1)[:19])
    many = fastelbo.reparameterize(mu, mu, 2, seed=3, impl=backend.impl)
    assert torch.equal(many[0], z[0])
    assert not torch.equal(many[1], z[0])


@each_backend
def test_seed_is_the_same_on_both_backends(backend: Backend) -> None:
    v = make(["mu", "logvar"], "chunk1")
    here = leaves(v, device=backend.device)
    for samples in (None, 2):
        z = fastelbo.reparameterize(here["mu"], here["logvar"], samples, seed=77, impl=backend.impl)
        want = fastelbo.reparameterize(v["mu"], v["logvar"], samples, seed=77, impl="torch")
        torch.testing.assert_close(z.detach().cpu(), want, rtol=2e-6, atol=2e-6)


@each_backend
def test_seed_tensor_is_read_when_the_noise_is_drawn(backend: Backend) -> None:
    """Changing the caller's seed between forward and backward must not change the noise that backward regenerates, silently."""
    mu = torch.zeros(4, 5, device=backend.device)
    logvar = torch.zeros(4, 5, device=backend.device, requires_grad=True)
    seed = torch.tensor(5, device=backend.device)
    z = fastelbo.reparameterize(mu, logvar, seed=seed, impl=backend.impl)
    seed.add_(1)
    try:
        (g,) = torch.autograd.grad(z.sum(), logvar)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017 (no error is right too)
    else:
        assert_close(g, 0.5 * z.detach().double(), "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=BACKENDS[1].marks), "reference"])
def test_default_noise_on_a_cpu_is_torchs(impl: str, dtype: torch.dtype) -> None:
    if impl == "triton" and BACKENDS[1].values[0].device != CPU:
        pytest.skip("compiled kernels do not run on the CPU")
    mu, logvar = (t.to(dtype).requires_grad_() for t in make(["mu", "logvar"], "chunk1").values())
    sigma = torch.exp(0.5 * logvar.detach().double())
    for samples in (None, 3):
        shape = mu.shape if samples is None else (samples, *mu.shape)
        for generator in (None, torch.Generator()):
            (torch.random.default_generator if generator is None else generator).manual_seed(5)
            z = fastelbo.reparameterize(mu, logvar, samples, generator=generator, impl=impl)
            torch.manual_seed(5)
            eps = torch.randn_like(mu).detach() if samples is None else torch.randn(shape, dtype=dtype)
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            assert_close(z, mu.detach().double() + sigma * eps.double(), "z", dtype=dtype, acc=acc, truncates=impl == "triton")
            (g,) = torch.autograd.grad(z.sum(), logvar)
            want = 0.5 * sigma * eps.double()
            assert_close(g, want if samples is None else want.sum(0), "gradient", dtype=dtype, acc=acc, truncates=impl == "triton")


@each_backend
def test_seeded_backward_regenerates_the_noise(backend: Backend) -> None:
    """Nothing as large as z is kept for a seed, and the gradient is that of the noise written out."""
    mu, logvar = (t.to(backend.device).requires_grad_() for t in make(["mu", "logvar"], "contiguous", seed=2).values())
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        z = fastelbo.reparameterize(mu, logvar, 4, seed=99, impl=backend.impl)
    assert max(t.numel() for t in saved) <= mu.numel()
    up = torch.randn(z.shape, device=backend.device)
    got = torch.autograd.grad(z, [mu, logvar], up)
    eps = fastelbo.noise.philox_normal(z.shape, 99).to(backend.device)
    want = torch.autograd.grad(fastelbo.reparameterize(mu, logvar, 4, eps=eps, impl=backend.impl), [mu, logvar], up)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-6, atol=2e-6)


@each_backend
def test_backward_does_not_take_the_noise_from_z(backend: Backend) -> None:
    """z - mu cancels where mu is large: in bfloat16 nothing of sigma * eps is left there, and the gradient must not care."""
    mu = torch.full((2, 16), 1000.0, dtype=torch.bfloat16, device=backend.device, requires_grad=True)
    logvar = torch.full((2, 16), -8.0, dtype=torch.bfloat16, device=backend.device, requires_grad=True)
    z = fastelbo.reparameterize(mu, logvar, seed=4, impl=backend.impl)
    assert torch.equal(z, mu) or backend.truncates
    (g,) = torch.autograd.grad(z.sum(), logvar)
    want = 0.5 * math.exp(-4) * fastelbo.noise.philox_normal((2, 16), 4).double()
    assert_close(g, want, "gradient", truncates=backend.truncates)


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("seeded", [False, True])
def test_what_the_cpu_keeps_for_backward(seeded: bool, kl: bool) -> None:
    """The KL's gradients and the sample's spread, each of mu's size; nothing where backward can draw the noise again."""
    mu, logvar, eps = torch.randn(3, 4, 5).unbind()
    inputs = specs.LatentInputs(mu, logvar, eps=None if seeded else eps, seed=torch.tensor(7) if seeded else None)
    _, kept = latent.OP.forward(inputs, specs.Latent(want_kl=kl), (True, True, False, False))
    if seeded:
        assert kept is None
        return
    want = [mu, 0.5 * torch.expm1(logvar)] if kl else [None, None]
    for got, t in zip((*kept.of_kl, kept.slope), (*want, None, None, torch.exp(0.5 * logvar) * eps), strict=True):
        assert (got is None) == (t is None)
        if t is not None:
            torch.testing.assert_close(got, t)
