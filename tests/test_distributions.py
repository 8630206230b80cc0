"""`DiagonalGaussian`: packed moments, and what it has in common with torch's distributions."""

from __future__ import annotations

import math
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


# ---- the contract of the classes that it replaces --------------------------------------------------------------------------------

FORMATS = (torch.contiguous_format, torch.channels_last)


def moments_of(memory_format: torch.memory_format, dtype: torch.dtype = torch.float32, seed: int = 4) -> torch.Tensor:
    """(2, 6, 3, 5), the clamp of logvar in play."""
    moments = 2 * torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(seed))
    moments[0, 3, 0, 0], moments[1, 4, 1, 1] = 25.0, -40.0
    return moments.to(dtype).to(memory_format=memory_format)


class Replaced:
    """What diffusers and CompVis compute, in float64 and from their definitions."""

    def __init__(self, moments: torch.Tensor):
        half = moments.shape[1] // 2
        self.mean = moments[:, :half].double()
        self.logvar = moments[:, half:].double().clamp(-30, 20)
        self.std, self.var = torch.exp(self.logvar / 2), torch.exp(self.logvar)

    def kl(self, other: Replaced | None = None) -> torch.Tensor:
        if other is None:
            return ((self.mean**2 + self.var - 1 - self.logvar) / 2).sum((1, 2, 3))
        ratio = ((self.mean - other.mean) ** 2 + self.var) / other.var
        return ((ratio - 1 - self.logvar + other.logvar) / 2).sum((1, 2, 3))

    def nll(self, x: torch.Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> torch.Tensor:
        return ((math.log(2 * math.pi) + self.logvar + (x - self.mean) ** 2 / self.var) / 2).sum(dims)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_numbers_of_the_replaced_classes(memory_format: torch.memory_format) -> None:
    moments, others = moments_of(memory_format), 0.1 * moments_of(memory_format, seed=5)
    q, p = (fastelbo.DiagonalGaussian.from_moments(m) for m in (moments, others))
    old, old_other = Replaced(moments), Replaced(others)
    for name in ("mean", "logvar", "std", "var"):
        assert_near(getattr(q, name), getattr(old, name))
    assert torch.equal(q.stddev, q.std)
    assert torch.equal(q.variance, q.var)
    assert q.parameters is moments
    assert_near(q.kl(), old.kl())
    assert_near(q.kl(p), old.kl(old_other))
    x = torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)
    assert_near(p.nll(x), old_other.nll(x.double()))
    assert_near(p.nll(x, reduction="batchmean"), old_other.nll(x.double()).mean())
    for dims in ([1, 2, 3], (2, 3), [3, 1], [0, 1], (0, 1, 2, 3), [-1], [-3, -1, -2]):
        assert_near(p.nll(x, dims), old_other.nll(x.double(), tuple(dims)))
    assert_near(p.nll(x, dims=2), old_other.nll(x.double(), (2,)))


def test_gradients_of_dims() -> None:
    """Dimensions that are not the last ones take another way."""
    moments = (0.3 * moments_of(torch.contiguous_format)).requires_grad_()
    x = torch.randn(2, 3, 3, 5, requires_grad=True)
    weights = torch.rand(2, 5)
    got = torch.autograd.grad((fastelbo.DiagonalGaussian.from_moments(moments).nll(x, (1, 2)) * weights).sum(), (moments, x))
    want = torch.autograd.grad((Replaced(moments).nll(x, (1, 2)) * weights).sum(), (moments, x))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_of_the_replaced_classes(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """An element gets the same noise in every memory layout: that of a new tensor, in its order."""
    q = fastelbo.DiagonalGaussian.from_moments(moments_of(memory_format, dtype))
    shape = tuple(q.mean.shape)

    def sample_of(noise: torch.Tensor) -> torch.Tensor:
        return (q.mean.double() + q.std.double() * noise.double()).to(dtype)

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    want = sample_of(torch.randn(shape, generator=seeded(8), dtype=dtype))
    for z in (
        q.sample(seeded(8)),
        q.sample(generator=seeded(8)),
        q.rsample(seeded(8)),
        q.sample([seeded(8)]),
        q.sample((), generator=seeded(8)),
        q.rsample_kl(generator=seeded(8))[0],
    ):
        torch.testing.assert_close(z, want, **tolerance)
        assert z.dtype == dtype
    for draw_one in (q.sample, lambda: q.rsample_kl()[0]):
        torch.manual_seed(8)
        torch.testing.assert_close(draw_one(), want, **tolerance)

    each = sample_of(torch.cat([torch.randn(1, *shape[1:], generator=seeded(s), dtype=dtype) for s in (3, 8)]))
    torch.testing.assert_close(q.sample([seeded(3), seeded(8)]), each, **tolerance)
    torch.testing.assert_close(q.rsample(generator=[seeded(3), seeded(8)]), each, **tolerance)
    several = q.sample(4, generator=[seeded(3), seeded(8)])
    columns = [sample_of(torch.randn(4, 1, *shape[1:], generator=seeded(s), dtype=dtype)) for s in (3, 8)]
    torch.testing.assert_close(several[:, 1], columns[1][:, 1], **tolerance)
    torch.testing.assert_close(several[:, 0], columns[0][:, 0], **tolerance)


def test_noise_of_each_sample_does_not_depend_on_the_batch() -> None:
    moments = moments_of(torch.channels_last)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    z = fastelbo.DiagonalGaussian.from_moments(moments).sample(generators)
    alone = fastelbo.DiagonalGaussian.from_moments(moments[1:]).sample(torch.Generator().manual_seed(2))
    torch.testing.assert_close(z[1:], alone)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_deterministic(memory_format: torch.memory_format) -> None:
    moments = moments_of(memory_format).requires_grad_()
    q = fastelbo.DiagonalGaussian.from_moments(moments, deterministic=True)
    mean, logvar = moments.detach().chunk(2, 1)
    assert q.deterministic
    assert q.std.tolist() == q.var.tolist() == q.stddev.tolist() == q.variance.tolist() == torch.zeros(2, 3, 3, 5).tolist()
    assert torch.equal(q.logvar, logvar.clamp(-30, 20))
    state = torch.get_rng_state()
    for z in (
        q.sample(),
        q.sample(torch.Generator()),
        q.rsample(seed=1),
        q.rsample_kl()[0],
        q.sample(2)[1],
        q.sample((1, 2))[0, 1],
    ):
        assert torch.equal(z, mean)
        (gradient,) = torch.autograd.grad(z.sum(), moments)
        assert torch.equal(gradient, torch.cat((torch.ones_like(mean), torch.zeros_like(mean)), 1))
    assert torch.equal(torch.get_rng_state(), state)
    q.sample().detach().zero_()
    assert torch.equal(q.mean, mean)
    x = torch.ones(2, 3, 3, 5)
    for zero in (q.kl(), q.nll(x), q.nll(x, [1, 2, 3]), q.log_prob(x), q.entropy(), q.rsample_kl()[1]):
        assert zero.tolist() == [0.0, 0.0]
        assert not zero.requires_grad
    assert q.kl(reduction="sum").item() == q.nll(x, reduction="mean").item() == 0
    assert q.nll(x.expand(4, 2, 3, 3, 5)).tolist() == torch.zeros(4, 2).tolist()
    with pytest.raises(ValueError, match="other is deterministic"):
        fastelbo.DiagonalGaussian.from_moments(moments).kl(q)


# ---- what it has in common with torch's distributions ----------------------------------------------------------------------------


def gaussians(shape: tuple[int, ...], memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """(ours, torch's in float64, the leaves of each)."""
    g = torch.Generator().manual_seed(6)
    values = [torch.randn(shape, generator=g).to(memory_format=memory_format) for _ in range(2)]
    ours, theirs = ([v.detach().clone().to(d).requires_grad_() for v in values] for d in (torch.float32, torch.float64))
    normal = torch.distributions.Normal(theirs[0], torch.exp(theirs[1].clamp(-1, 1) / 2))
    independent = torch.distributions.Independent(normal, len(shape) - 1)
    return fastelbo.DiagonalGaussian(*ours, logvar_clamp=(-1, 1)), independent, ours, theirs


LAYOUTS = [((4,), FORMATS[0]), ((4, 3), FORMATS[0]), ((2, 3, 3, 5), FORMATS[0]), ((2, 3, 3, 5), FORMATS[1])]


@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS)
def test_as_independent_normals(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    q, want, leaves, truth = gaussians(shape, memory_format)
    assert (q.batch_shape, q.event_shape) == (want.batch_shape, want.event_shape)
    assert_near(q.stddev, want.stddev)
    assert_near(q.variance, want.variance)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    other = fastelbo.DiagonalGaussian(x + 1, 0.5 * x)
    normal = torch.distributions.Normal(x.double() + 1, torch.exp(0.25 * x.double()))
    want_other = torch.distributions.Independent(normal, len(shape) - 1)
    pairs = [
        (q.log_prob(x), want.log_prob(x.double())),
        (q.entropy(), want.entropy()),
        (torch.distributions.kl_divergence(q, other), torch.distributions.kl_divergence(want, want_other)),
    ]
    for got, expected in pairs:
        assert got.dtype == torch.float32
        assert_near(got, expected)
        weights = torch.linspace(0.5, 1.5, shape[0])
        grads = torch.autograd.grad((got * weights).sum(), leaves, allow_unused=True)
        wants = torch.autograd.grad((expected * weights).sum(), truth, allow_unused=True, retain_graph=True)
        for g, w in zip(grads, wants, strict=True):
            assert (g is None) == (w is None)
            assert g is None or torch.allclose(g.double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_entropy_of_half_precision(dtype: torch.dtype) -> None:
    """Summed wider than it is stored: 20000 elements near 10 overflow float16."""
    mu, logvar = torch.zeros(2, 20000, dtype=dtype), torch.full((2, 20000), 10.25, dtype=dtype)
    entropy = fastelbo.DiagonalGaussian(mu, logvar).entropy()
    assert_near(entropy, torch.full((2,), 20000 * 0.5 * (10.25 + 1 + math.log(2 * math.pi))))


@pytest.mark.parametrize("memory_format", FORMATS)
@each_backend
def test_sample_shapes(backend: Backend, memory_format: torch.memory_format) -> None:
    """Samples of any shape, their densities, and the gradients of both."""
    shape = (2, 3, 3, 5)
    g = torch.Generator().manual_seed(6)
    values = [torch.randn(shape, generator=g).to(memory_format=memory_format) for _ in range(2)]
    leaves = [v.to(backend.device).requires_grad_() for v in values]
    truth = [v.double().requires_grad_() for v in values]
    q = fastelbo.DiagonalGaussian(*leaves, impl=backend.impl)
    normal = torch.distributions.Normal(truth[0], torch.exp(truth[1] / 2))
    want = torch.distributions.Independent(normal, 3)
    for sizes in ((), (1,), (3,), torch.Size((3,)), (2, 2)):
        eps = torch.randn(*sizes, *shape, generator=g)
        z = q.rsample(sizes, eps=eps.to(backend.device))
        expected = normal.mean + normal.stddev * eps.double()
        assert_near(z.cpu(), expected)
        # Of a constant z: of one that depends on mu, the density does not.
        got, wanted = q.log_prob(z.detach()), want.log_prob(expected.detach())
        assert got.shape == (*sizes, 2)
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(q.nll(z.detach(), reduction="batchmean").cpu().double(), -wanted.mean(), rtol=1e-5, atol=1e-4)
        for a, b in ((z, expected), (got, wanted)):
            weights = torch.rand(a.shape, generator=g)
            grads = torch.autograd.grad((a * weights.to(a.device)).sum(), leaves)
            wants = torch.autograd.grad((b * weights).sum(), truth, retain_graph=True)
            for name, gradient, w in zip(("mu", "logvar"), grads, wants, strict=True):
                torch.testing.assert_close(gradient.cpu().double(), w, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_sample_shapes_draw_the_same_noise() -> None:
    q, *_ = gaussians((2, 3))

    def drawn(shape: Any) -> torch.Tensor:
        return q.sample(shape, generator=torch.Generator().manual_seed(3))

    noise = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(3))
    assert_near(drawn(6), q.mean + q.std * noise)
    assert torch.equal(drawn((6,)), drawn(6))
    assert torch.equal(drawn((2, 3)), drawn(6).view(2, 3, 2, 3))
    assert torch.equal(drawn(()), drawn(None))
    assert torch.equal(q.sample((2, 3), seed=5), q.sample(6, seed=5).view(2, 3, 2, 3))
    z, kl = q.rsample_kl(num_samples=(2, 3), seed=5)
    assert torch.equal(z, q.sample((2, 3), seed=5))
    assert torch.equal(kl, q.kl())


def test_nll_of_samples_with_dims_and_weights() -> None:
    q, want, *_ = gaussians((2, 3, 4))
    x = torch.randn(5, 2, 3, 4)
    each = -want.base_dist.log_prob(x.double())
    assert_near(q.nll(x, [1]), each.sum(2))
    assert_near(q.nll(x, [-1]), each.sum(3))
    assert_near(q.nll(x, batch_dims=2), each.sum(3))
    assert_near(q.nll(x, full=False), each.sum((2, 3)) - 6 * math.log(2 * math.pi))
    weight = torch.rand(2, 1, 4)
    assert_near(q.nll(x, weight=weight), (each * weight).sum((2, 3)))
    assert_near(q.nll(x, reduction="sum"), each.sum())
    assert_near(q.nll(x, reduction="mean"), each.mean())


def test_repr_and_parameters() -> None:
    q = fastelbo.DiagonalGaussian.from_moments(torch.zeros(4, 8, 2, 2, dtype=torch.float64))
    assert repr(q) == (
        "DiagonalGaussian(batch_shape=(4,), event_shape=(4, 2, 2), dtype=torch.float64, device=cpu, logvar_clamp=(-30.0, 20.0))"
    )
    q = fastelbo.DiagonalGaussian(torch.zeros(4, 3), torch.ones(4, 3), deterministic=True)
    assert repr(q).endswith("device=cpu, logvar_clamp=None, deterministic=True)")
    assert q.parameters.tolist() == [[0.0] * 3 + [1.0] * 3] * 4
    again = fastelbo.DiagonalGaussian.from_moments(q.parameters)
    assert torch.equal(again.logvar, q.logvar)


def test_traced() -> None:
    """One graph, with the noise that it draws without."""

    def traced(moments: torch.Tensor, x: torch.Tensor) -> Any:
        q = fastelbo.DiagonalGaussian.from_moments(moments)
        z, kl = q.rsample_kl()
        return z, kl, q.sample((2, 2), seed=1), q.rsample(2), q.log_prob(x), q.nll(x, [1, 3]), q.entropy()

    args = moments_of(torch.channels_last), torch.randn(4, 2, 3, 3, 5)
    results = []
    for fn in (traced, torch.compile(traced, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        results.append(fn(*args))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_errors_say_the_way_out() -> None:
    moments = moments_of(torch.contiguous_format)
    q, generator = fastelbo.DiagonalGaussian.from_moments(moments), torch.Generator()
    x = torch.zeros(2, 3, 3, 5)
    wrong: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "dim must be an int, got bool: write deterministic=True", lambda: type(q).from_moments(moments, True)),
        (TypeError, "generator is given twice", lambda: q.sample(generator, generator=generator)),
        (TypeError, "generator must be .* got int", lambda: q.sample(generator=3)),
        (TypeError, "generator must be .* a list with int: a shape is a tuple", lambda: q.sample([2])),
        (ValueError, r"generator is a list of 3, but mu has shape \(2, 3, 3, 5\)", lambda: q.sample([generator] * 3)),
        (ValueError, "generator is a list of 0", lambda: q.sample([])),
        (ValueError, "at most one of eps, seed and generator, got seed and generator", lambda: q.sample(generator, seed=1)),
        (ValueError, "num_samples must be at least 1, got 0", lambda: q.sample((2, 0))),
        (TypeError, "num_samples must be an int, got float", lambda: q.sample((2.0,))),
        (ValueError, r"eps has shape \(2, 3, 3, 5\), but z will have shape \(2, 2, 2", lambda: q.sample((2, 2), eps=x)),
        (ValueError, r"x has shape \(1, 3, 3, 5\), .* x\.expand\(\(2, 3, 3, 5\)\)", lambda: q.nll(x[:1])),
        (ValueError, r"x has shape \(3, 3, 5\), but mu has shape", lambda: q.log_prob(x[0])),
        (TypeError, "x must be a torch.Tensor", lambda: q.nll(1.0)),
        (ValueError, "give dims, or a reduction", lambda: q.nll(x, [1], reduction="sum")),
        (ValueError, "dims must be distinct and between -4 and 3", lambda: q.nll(x, [1, -3])),
        (ValueError, "dims must be distinct and between -4 and 3", lambda: q.nll(x, [4])),
        (ValueError, "dims must not be empty: batch_dims=4 keeps", lambda: q.nll(x, ())),
        (TypeError, "dims must be ints", lambda: q.nll(x, [1.0])),
        (TypeError, "dims must be ints", lambda: q.nll(x, True)),
        (ValueError, "batch_dims must be between 0 and the number of dimensions, 4", lambda: q.nll(x[None], batch_dims=5)),
    ]
    for error, match, call in wrong:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_on_a_gpu() -> None:
    """A generator's own noise, on the CPU or the GPU, so that a seed gives the sample that it gave before the swap."""
    moments = moments_of(torch.channels_last)
    q = fastelbo.DiagonalGaussian.from_moments(moments.cuda())
    want = fastelbo.DiagonalGaussian.from_moments(moments).sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(q.sample(torch.Generator().manual_seed(1)).cpu(), want)
    noise = torch.randn(2, 3, 3, 5, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    torch.testing.assert_close(q.sample(torch.Generator("cuda").manual_seed(1)), q.mean + q.std * noise)
    each = q.sample([torch.Generator().manual_seed(s) for s in (1, 2)])
    torch.testing.assert_close(each[1:], type(q).from_moments(moments[1:].cuda()).sample(torch.Generator().manual_seed(2)))
