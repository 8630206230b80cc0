"""Bad input: the documented type of exception, with the argument's name in it, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Backend, each_backend

import fastelbo

M, S = torch.zeros(3, 4), torch.zeros(3, 4)
X = torch.zeros(3, 2, 5)
META = torch.zeros(3, 4, device="meta")
LEARNED = torch.zeros(3, 4, requires_grad=True)

LATENT: dict[str, Callable[..., Any]] = {
    "reparameterize": fastelbo.reparameterize,
    "reparameterize_kl": fastelbo.reparameterize_kl,
    "gaussian_kl": fastelbo.gaussian_kl,
    "DiagonalGaussian": fastelbo.DiagonalGaussian,
    "elbo_loss": lambda mu, logvar, **o: fastelbo.elbo_loss(X, X, mu, logvar, **o),
    "elbo_terms": lambda mu, logvar, **o: fastelbo.elbo_terms(X, X, mu, logvar, **o),
    "sgvb_loss": lambda mu, logvar, **o: fastelbo.sgvb_loss(lambda z: X, X, mu, logvar, **o),
}
LIKELIHOOD: dict[str, Callable[..., Any]] = {
    "gaussian_nll": fastelbo.gaussian_nll,
    "elbo_loss": lambda recon, x, **o: fastelbo.elbo_loss(recon, x, M, S, **o),
    "elbo_terms": lambda recon, x, **o: fastelbo.elbo_terms(recon, x, M, S, **o),
}
BAD_TENSORS: list[tuple[Any, type[Exception], str]] = [
    ([0.0], TypeError, "torch.Tensor, got list"),
    (1.0, TypeError, "torch.Tensor, got float"),
    (None, TypeError, "torch.Tensor, got NoneType"),
    (torch.zeros(3, 4, dtype=torch.int64), TypeError, "torch.int64"),
    (torch.zeros(3, 4, dtype=torch.bool), TypeError, "torch.bool"),
    (torch.zeros(3, 4, dtype=torch.complex64), TypeError, "torch.complex64"),
    (torch.zeros(3, 4, dtype=torch.float8_e4m3fn), TypeError, "torch.float8"),
]


def raises(error: type[Exception] | tuple[type[Exception], ...], name: str, call: Callable[[], Any], *, says: str = "") -> None:
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert name in message, f"{name!r} is not named in {message!r}"
    assert says in message, f"{says!r} is not in {message!r}"


@pytest.mark.parametrize("bad", BAD_TENSORS, ids=lambda b: b[2])
@pytest.mark.parametrize("fn", list(LATENT))
def test_mu_and_logvar(fn: str, bad: tuple[Any, type[Exception], str]) -> None:
    value, error, says = bad
    raises(error, "mu", lambda: LATENT[fn](value, S), says=says)
    raises(error, "logvar", lambda: LATENT[fn](M, value), says=says)


@pytest.mark.parametrize("bad", BAD_TENSORS, ids=lambda b: b[2])
@pytest.mark.parametrize("fn", list(LIKELIHOOD))
def test_recon_and_x(fn: str, bad: tuple[Any, type[Exception], str]) -> None:
    value, error, says = bad
    raises(error, "recon", lambda: LIKELIHOOD[fn](value, X), says=says)
    raises(error, "x", lambda: LIKELIHOOD[fn](X, value), says=says)


@pytest.mark.parametrize("fn", list(LATENT))
def test_latent_shapes_and_devices(fn: str) -> None:
    for bad in (torch.zeros(3, 5), torch.zeros(4, 3), torch.zeros(3), torch.zeros(1, 4), torch.zeros(3, 4, 1), torch.zeros(())):
        raises(ValueError, "logvar has shape", lambda b=bad: LATENT[fn](M, b), says=str(tuple(bad.shape)))
    raises(ValueError, "logvar", lambda: LATENT[fn](M, META), says="meta")


@pytest.mark.parametrize("fn", list(LIKELIHOOD))
def test_likelihood_shapes_and_devices(fn: str) -> None:
    for bad in (torch.zeros(3, 2, 4), torch.zeros(1, 2, 5), torch.zeros(2, 4), torch.zeros(5), torch.zeros(())):
        raises(ValueError, "x has shape", lambda b=bad: LIKELIHOOD[fn](X, b), says=str(tuple(bad.shape)))
    raises(ValueError, "x", lambda: LIKELIHOOD[fn](X, torch.zeros(3, 2, 5, device="meta")), says="meta")
    name = "logvar" if fn == "gaussian_nll" else "recon_logvar"
    for value in (torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, 3, 2, 5), torch.zeros(3, 2, 0), torch.zeros(4, 2, 5)):
        raises(ValueError, name, lambda v=value: LIKELIHOOD[fn](X, X, **{name: v}), says=str(tuple(value.shape)))
        raises(ValueError, "weight", lambda v=value: LIKELIHOOD[fn](X, X, weight=v), says=str(tuple(value.shape)))
    raises(ValueError, name, lambda: LIKELIHOOD[fn](X, X, **{name: torch.zeros((), device="meta")}), says="meta")
    for value in ("0", [0.0], True, 1j):
        raises(TypeError, name, lambda v=value: LIKELIHOOD[fn](X, X, **{name: v}), says=type(value).__name__)
    raises(TypeError, name, lambda: LIKELIHOOD[fn](X, X, **{name: torch.zeros(5, dtype=torch.int32)}), says="int32")


@pytest.mark.parametrize("fn", ["gaussian_kl", "reparameterize_kl", "elbo_loss", "elbo_terms", "sgvb_loss"])
@pytest.mark.parametrize("name", ["prior_mu", "prior_logvar"])
def test_priors(fn: str, name: str) -> None:
    for value in (torch.zeros(3), torch.zeros(4, 4), torch.zeros(2, 3, 5 if fn == "gaussian_kl" else 4)):
        raises(ValueError, name, lambda v=value: LATENT[fn](M, S, **{name: v}), says=str(tuple(value.shape)))
    raises(ValueError, name, lambda: LATENT[fn](M, S, **{name: META}), says="meta")
    for value in ("0", [0.0], True, 1j):
        raises(TypeError, name, lambda v=value: LATENT[fn](M, S, **{name: v}), says=type(value).__name__)
    raises(TypeError, name, lambda: LATENT[fn](M, S, **{name: torch.zeros(4, dtype=torch.int32)}), says="int32")


@pytest.mark.parametrize("fn", ["gaussian_kl", "reparameterize_kl", "gaussian_nll", "elbo_loss", "elbo_terms", "sgvb_loss"])
def test_weights(fn: str) -> None:
    call = (lambda **o: LATENT[fn](M, S, **o)) if fn in LATENT else (lambda **o: LIKELIHOOD[fn](X, X, **o))
    shape = (3, 4) if fn in ("gaussian_kl", "reparameterize_kl") else (3, 2, 5)
    raises(TypeError, "weight", lambda: call(weight=1.0), says="float")
    raises(TypeError, "weight", lambda: call(weight=[1.0]), says="list")
    raises(TypeError, "weight", lambda: call(weight=torch.ones(shape, dtype=torch.complex64)), says="complex64")
    raises(ValueError, "weight", lambda: call(weight=torch.ones(7)), says="(7,)")
    raises(ValueError, "weight", lambda: call(weight=torch.ones(2, 7, *shape)), says="(2, 7")
    raises(ValueError, "weight", lambda: call(weight=torch.ones(shape, requires_grad=True)), says="requires grad")
    for dtype in (torch.float32, torch.bool):
        raises(ValueError, "weight", lambda d=dtype: call(weight=torch.ones(shape, dtype=d, device="meta")), says="meta")


@pytest.mark.parametrize("fn", ["gaussian_kl", "reparameterize_kl", "gaussian_nll", "elbo_loss", "elbo_terms", "sgvb_loss"])
def test_reductions(fn: str) -> None:
    call = (lambda **o: LATENT[fn](M, S, **o)) if fn in LATENT else (lambda **o: LIKELIHOOD[fn](X, X, **o))
    for bad in ("avg", "", None, 1, "Mean", ["mean"]):
        raises((ValueError, TypeError), "reduction", lambda b=bad: call(reduction=b), says=repr(bad))


@pytest.mark.parametrize("fn", ["gaussian_kl", "reparameterize_kl", "gaussian_nll"])
def test_batch_dims(fn: str) -> None:
    call = (lambda **o: LATENT[fn](M, S, **o)) if fn in LATENT else (lambda **o: LIKELIHOOD[fn](X, X, **o))
    for bad in (-1, 4, 100):
        raises(ValueError, "batch_dims", lambda b=bad: call(batch_dims=b), says=str(bad))
    for bad in (1.0, "1", None, True):
        raises(TypeError, "batch_dims", lambda b=bad: call(batch_dims=b))


@pytest.mark.parametrize("fn", ["gaussian_kl", "reparameterize_kl", "elbo_loss", "elbo_terms", "DiagonalGaussian", "sgvb_loss"])
def test_clamps(fn: str) -> None:
    for bad in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)):
        raises(ValueError, "logvar_clamp", lambda b=bad: LATENT[fn](M, S, logvar_clamp=b))
    for wrong in (3.0, "ab", (1.0,), (0.0, 1.0, 2.0), (None, "1"), ("a", "b"), torch.zeros(2), (torch.zeros(3), 1.0)):
        raises((TypeError, ValueError), "logvar_clamp", lambda b=wrong: LATENT[fn](M, S, logvar_clamp=b))


@pytest.mark.parametrize("fn", ["reparameterize", "reparameterize_kl", "sgvb_loss", "DiagonalGaussian"])
def test_noise(fn: str) -> None:
    def call(**options: Any) -> Any:
        if fn == "DiagonalGaussian":
            return fastelbo.DiagonalGaussian(M, S).rsample(**options)
        return LATENT[fn](M, S, **options)

    generator = torch.Generator()
    for two in ({"eps": M, "seed": 1}, {"seed": 1, "generator": generator}, {"eps": M, "generator": generator}):
        raises(ValueError, next(iter(two)), lambda o=two: call(**o), says="at most one")
    for bad in (0, -1):
        raises(ValueError, "num_samples", lambda b=bad: call(num_samples=b), says=str(bad))
    for bad in (1.0, "2", True, 1.5):
        raises(TypeError, "num_samples", lambda b=bad: call(num_samples=b), says=type(bad).__name__)
    for bad in (torch.zeros(4), torch.zeros(3, 5), torch.zeros(1, 3, 4, 1), torch.zeros(3, 3, 4)):
        raises(ValueError, "eps has shape", lambda b=bad: call(eps=b), says=str(tuple(bad.shape)))
    raises(ValueError, "eps has shape", lambda: call(eps=M, num_samples=2), says="(2, 3, 4)")
    raises(TypeError, "eps", lambda: call(eps=1.0))
    raises(TypeError, "eps", lambda: call(eps=torch.zeros(3, 4, dtype=torch.int64)), says="int64")
    raises(ValueError, "eps", lambda: call(eps=META), says="meta")
    raises(ValueError, "eps", lambda: call(eps=LEARNED), says="requires grad")
    for seed in (1.0, "1", True, None if fn == "never" else [1]):
        raises(TypeError, "seed", lambda s=seed: call(seed=s), says=type(seed).__name__)
    for seed in (2**64, -(2**63) - 1):
        raises(ValueError, "seed", lambda s=seed: call(seed=s))
    for seed in (torch.tensor([1]), torch.tensor(1.0), torch.tensor(1, dtype=torch.int32)):
        raises(TypeError, "seed", lambda s=seed: call(seed=s), says=str(seed.dtype))
    raises(ValueError, "seed", lambda: call(seed=torch.zeros((), dtype=torch.int64, device="meta")), says="meta")
    raises(TypeError, "generator", lambda: call(generator=3))


def test_sgvb_num_samples_none() -> None:
    raises(TypeError, "num_samples", lambda: fastelbo.sgvb_loss(lambda z: X, X, M, S, num_samples=None))


@pytest.mark.parametrize("form", ["std", "var"])
def test_variance_forms(form: str) -> None:
    other = {"std": "var", "var": "logvar"}[form]
    raises(ValueError, form, lambda: fastelbo.gaussian_nll(X, X, **{form: 1.0, other: 1.0}), says=other)
    for bad in (0.0, -1.0, math.nan):
        raises(ValueError, form, lambda b=bad: fastelbo.gaussian_nll(X, X, **{form: b}), says=str(bad))
    raises(ValueError, "logvar", lambda: fastelbo.gaussian_nll(X, X, logvar=0.0, std=1.0, var=1.0), says="std")


@pytest.mark.parametrize("fn", ["elbo_loss", "sgvb_loss"])
def test_beta(fn: str) -> None:
    for bad in ("1", None, [1.0], True, 1j):
        raises(TypeError, "beta", lambda b=bad: LATENT[fn](M, S, beta=b), says=type(bad).__name__)
    raises(ValueError, "beta", lambda: LATENT[fn](M, S, beta=torch.ones(2)), says="(2,)")
    raises(ValueError, "beta", lambda: LATENT[fn](M, S, beta=torch.ones(3, 1)), says="(3, 1)")
    raises(ValueError, "beta", lambda: LATENT[fn](M, S, beta=torch.ones((), dtype=torch.complex64)), says="complex64")
    raises(ValueError, "beta", lambda: LATENT[fn](M, S, beta=torch.ones((), device="meta")), says="meta")


@pytest.mark.parametrize("fn", ["elbo_loss", "elbo_terms", "sgvb_loss"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_batches_that_differ(fn: str, reduction: str) -> None:
    for bad in (torch.zeros(4, 4), torch.zeros(1, 4), torch.zeros(12)):
        raises(ValueError, "mu", lambda b=bad: LATENT[fn](b, b, reduction=reduction), says=str(bad.shape[0]))


def test_no_batch_dimension() -> None:
    zero = torch.zeros(())
    for fn in (fastelbo.elbo_loss, fastelbo.elbo_terms):
        raises(ValueError, "recon", lambda f=fn: f(zero, zero, M, S), says="0-d")
        raises(ValueError, "mu", lambda f=fn: f(X, X, zero, zero), says="0-d")
    raises(ValueError, "mu", lambda: fastelbo.sgvb_loss(lambda z: z, X, zero, zero))
    raises(ValueError, "x", lambda: fastelbo.sgvb_loss(lambda z: z, zero, M, S))
    raises(ValueError, "batch_dims", lambda: fastelbo.gaussian_kl(zero, zero))
    raises(ValueError, "batch_dims", lambda: fastelbo.gaussian_nll(zero, zero))


@pytest.mark.parametrize("fn", [*LATENT, "gaussian_nll"])
def test_impl(fn: str) -> None:
    def call(impl: Any) -> Any:
        if fn == "DiagonalGaussian":
            return fastelbo.DiagonalGaussian(M, S, impl=impl).kl()
        return LATENT[fn](M, S, impl=impl) if fn in LATENT else fastelbo.gaussian_nll(X, X, impl=impl)

    for bad in ("cuda", "", "Torch", 1):
        raises((ValueError, TypeError), "impl", lambda b=bad: call(b), says=repr(bad))


def test_default_impl_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastelbo import backend

    monkeypatch.setattr(backend, "DEFAULT", "fast")
    raises(ValueError, "FASTELBO_IMPL", lambda: fastelbo.gaussian_kl(M, S), says="'fast'")


def test_triton_on_cpu_tensors_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastelbo import backend

    if not backend.has_triton():
        raises(ValueError, "triton", lambda: fastelbo.gaussian_kl(M, S, impl="triton"), says="not installed")
        return
    monkeypatch.setattr(backend.kernels(), "INTERPRETED", False)
    raises(ValueError, "impl", lambda: fastelbo.gaussian_kl(M, S, impl="triton"), says="'cpu'")


def test_triton_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastelbo import backend

    monkeypatch.setattr(backend, "_found", False)
    raises(ValueError, "impl", lambda: fastelbo.gaussian_kl(M, S, impl="triton"), says="not installed")
    assert torch.equal(fastelbo.gaussian_kl(M, S), torch.zeros(3))


def test_moments() -> None:
    make = fastelbo.DiagonalGaussian.from_moments
    raises(ValueError, "moments", lambda: make(torch.zeros(3, 5)), says="(3, 5)")
    raises(ValueError, "dim", lambda: make(torch.zeros(3, 4), 2), says="2")
    raises(ValueError, "dim", lambda: make(torch.zeros(3, 4), -3), says="-3")
    raises(TypeError, "moments", lambda: make([1.0]), says="list")
    raises(TypeError, "moments", lambda: make(torch.zeros(3, 4, dtype=torch.int64)), says="int64")
    raises(TypeError, "dim", lambda: make(torch.zeros(3, 4), 1.0))
    q = fastelbo.DiagonalGaussian(M, S)
    raises((TypeError, ValueError), "other", lambda: q.kl(M))  # type: ignore[arg-type]
    raises(ValueError, "prior_mu", lambda: q.kl(fastelbo.DiagonalGaussian(torch.zeros(5, 4), torch.zeros(5, 4))), says="(5, 4)")


def test_decoders() -> None:
    def call(out: Any, **o: Any) -> Any:
        return fastelbo.sgvb_loss(lambda z: out, X, M, S, **o)

    raises(ValueError, "decoder", lambda: call(torch.zeros(3, 2, 4)), says="(3, 2, 4)")
    raises(ValueError, "decoder", lambda: call(X, num_samples=2), says="(6, 2, 5)")
    raises(TypeError, "decoder", lambda: call(None), says="NoneType")
    raises(TypeError, "decoder", lambda: call([X, X]), says="list")
    raises(ValueError, "recon_logvar", lambda: call((X, X), recon_logvar=0.0))
    raises((TypeError, ValueError), "decoder", lambda: call((X, X, X)))
    raises(TypeError, "decoder", lambda: fastelbo.sgvb_loss(None, X, M, S))  # type: ignore[arg-type]
    raises(TypeError, "x", lambda: fastelbo.sgvb_loss(lambda z: X, None, M, S))  # type: ignore[arg-type]


def test_gaussian_nll_loss_types() -> None:
    x = torch.zeros(3, 4)
    raises(TypeError, "var", lambda: fastelbo.gaussian_nll_loss(x, x, "1"))  # type: ignore[arg-type]
    for args in ((None, x, x), (x, None, x)):
        with pytest.raises((TypeError, AttributeError)):
            fastelbo.gaussian_nll_loss(*args)


def test_effective_beta_arguments() -> None:
    f = fastelbo.effective_beta
    raises(ValueError, "recon_reduction", lambda: f(1.0, elements=4, recon_reduction="none"), says="'none'")
    raises(ValueError, "kl_reduction", lambda: f(1.0, elements=4, kl_reduction="avg"), says="'avg'")
    raises(ValueError, "latents", lambda: f(1.0, elements=4, kl_reduction="mean"))
    raises(ValueError, "batch_size", lambda: f(1.0, elements=4, recon_reduction="sum"))
    for name, value in (("elements", 0), ("latents", -1), ("variance", 0.0), ("batch_size", 0), ("variance", math.nan)):
        raises(ValueError, name, lambda n=name, v=value: f(1.0, **{"elements": 4, n: v}), says=str(value))


@each_backend
def test_nothing_is_launched_before_the_checks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last argument that can be wrong is found before the backend is called."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the backend was called")

    for name in ("likelihood", "latent", "elbo", "elbo_terms"):
        backend.replace(monkeypatch, name, forward=never)
    mu, x = M.to(backend.device), X.to(backend.device)
    for call in (
        lambda: fastelbo.elbo_loss(x, x, mu, mu, logvar_clamp=(1, 0), impl=backend.impl),
        lambda: fastelbo.elbo_loss(x, x, mu, mu, reduction="avg", impl=backend.impl),
        lambda: fastelbo.reparameterize_kl(mu, mu, weight=x, impl=backend.impl),
        lambda: fastelbo.sgvb_loss(lambda z: x, x, mu, mu, beta=torch.ones(2), impl=backend.impl),
        lambda: fastelbo.sgvb_loss(lambda z: x, x, mu, mu, weight=torch.ones(7), impl=backend.impl),
        lambda: fastelbo.gaussian_nll(x, x, logvar=torch.zeros(7, device=backend.device), impl=backend.impl),
    ):
        with pytest.raises(ValueError):
            call()
