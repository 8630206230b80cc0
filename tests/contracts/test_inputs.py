"""What counts as a number, a mask, a beta, a clamp, a prior, a batch of samples; and the way out that errors name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, Backend, each_backend, slow_kl, slow_nll
from settings import in_turn
from torch import Tensor

import fastelbo

B, D, J = 4, 6, 3


def drawn(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(11)
    shapes = {"recon": (B, D), "x": (B, D), "mu": (B, J), "logvar": (B, J)}
    out = {n: torch.randn(s, generator=g, dtype=dtype).to(device) for n, s in shapes.items()}
    return {n: t.requires_grad_(n != "x") for n, t in out.items()}


def grads(out: Any, inputs: list[Tensor]) -> list[Tensor]:
    outs = out if isinstance(out, tuple) else (out,)
    return [o.detach() for o in outs] + list(torch.autograd.grad(sum(o.sum() for o in outs), inputs))


def assert_same(a: list[Tensor], b: list[Tensor], rtol: float = 2e-6) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=2e-6, check_dtype=False)


# ---- numbers ---------------------------------------------------------------------------------------------------------------------

T = dict[str, Tensor]
# Every argument that may be a number: a call that takes it, and a value of the kind.
NUMBERS: dict[str, tuple[Callable[[T, Any, str], Any], float | int]] = {
    "elbo_loss beta": (lambda t, v, i: fastelbo.elbo_loss(**t, beta=v, impl=i), 0.5),
    "elbo_loss recon_logvar": (lambda t, v, i: fastelbo.elbo_loss(**t, recon_logvar=v, impl=i), -0.25),
    "elbo_loss prior_mu": (lambda t, v, i: fastelbo.elbo_loss(**t, prior_mu=v, impl=i), 0.5),
    "elbo_loss prior_logvar": (lambda t, v, i: fastelbo.elbo_loss(**t, prior_logvar=v, impl=i), 0.5),
    "elbo_terms recon_logvar": (lambda t, v, i: fastelbo.elbo_terms(**t, recon_logvar=v, impl=i), -0.25),
    "gaussian_nll logvar": (lambda t, v, i: fastelbo.gaussian_nll(t["recon"], t["x"], logvar=v, impl=i), -0.25),
    "gaussian_nll std": (lambda t, v, i: fastelbo.gaussian_nll(t["recon"], t["x"], std=v, impl=i), 0.5),
    "gaussian_nll var": (lambda t, v, i: fastelbo.gaussian_nll(t["recon"], t["x"], var=v, impl=i), 2),
    "gaussian_nll batch_dims": (lambda t, v, i: fastelbo.gaussian_nll(t["recon"], t["x"], batch_dims=v, impl=i), 2),
    "gaussian_kl prior_mu": (lambda t, v, i: fastelbo.gaussian_kl(t["mu"], t["logvar"], v, impl=i), 0.5),
    "gaussian_kl clamp": (lambda t, v, i: fastelbo.gaussian_kl(t["mu"], t["logvar"], logvar_clamp=(None, v), impl=i), 0.5),
    "reparameterize num_samples": (lambda t, v, i: fastelbo.reparameterize(t["mu"], t["logvar"], v, seed=1, impl=i), 2),
    "reparameterize seed": (lambda t, v, i: fastelbo.reparameterize(t["mu"], t["logvar"], seed=v, impl=i), 7),
    "sgvb_loss": (
        lambda t, v, i: fastelbo.sgvb_loss(
            lambda z: z.repeat(1, D // J), t["x"], t["mu"], t["logvar"], num_samples=v, seed=v, beta=v, impl=i
        ),
        2,
    ),
    "linear_elbo_loss": (
        lambda t, v, i: fastelbo.linear_elbo_loss(
            t["x"], t["mu"], t["logvar"], t["recon"].T[:, :J].contiguous(), num_samples=v, seed=v, beta=v, recon_logvar=v, impl=i
        ),
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, np.int64, np.int8])
@pytest.mark.parametrize("name", list(NUMBERS))
@each_backend
def test_a_numpy_number_is_a_number(backend: Backend, name: str, kind: Any) -> None:
    call, value = NUMBERS[name]
    whole = isinstance(value, int)
    if kind in (np.int64, np.int8) and not whole:
        pytest.skip("not a whole number")
    if kind in (np.float32, np.float64) and whole and "var" not in name:
        pytest.skip("a whole number is asked for")
    t = drawn(backend.device)
    want, got = call(t, value, backend.impl), call(t, kind(value), backend.impl)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (got, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", [np.array([0.5, 0.5]), np.bool_(True), np.complex64(1)], ids=str)
@pytest.mark.parametrize("name", [n for n in NUMBERS if not n.startswith(("sgvb", "linear"))])
def test_other_numpy_objects_are_errors(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match="must be"):
        NUMBERS[name][0](drawn(torch.device("cpu")), wrong, "torch")


# ---- beta ------------------------------------------------------------------------------------------------------------------------


OF_BETA = list(itertools.product(["elbo_loss", "sgvb_loss", "linear_elbo_loss"], ["none", "batchmean", "sum", "mean"]))


@pytest.mark.parametrize(("case", "shape", "learned"), in_turn(OF_BETA, [(), (1,), (B,)], [False, True]))
@each_backend
def test_beta(backend: Backend, case: tuple[str, str], shape: tuple[int, ...], learned: bool) -> None:
    """A number, one of each sample; with its gradient, which is the KL."""
    function, reduction = case
    t = drawn(backend.device)
    weight = t["recon"].detach().T[:, :J].contiguous()
    beta = torch.linspace(0.3, 1.2, math.prod(shape)).view(shape).to(backend.device).requires_grad_(learned)
    inputs = [t["mu"], t["logvar"], *([beta] if learned else [])]
    options: dict[str, Any] = {"reduction": reduction, "impl": backend.impl, "return_terms": True}
    if function == "elbo_loss":
        loss, nll, kl = fastelbo.elbo_loss(**t, beta=beta, **options)
    elif function == "sgvb_loss":
        loss, nll, kl = fastelbo.sgvb_loss(lambda z: z @ weight.T, t["x"], t["mu"], t["logvar"], seed=2, beta=beta, **options)
    else:
        loss, nll, kl = fastelbo.linear_elbo_loss(t["x"], t["mu"], t["logvar"], weight, seed=2, beta=beta, **options)
    z = fastelbo.reparameterize(t["mu"], t["logvar"], seed=2, impl=backend.impl)
    recon = t["recon"] if function == "elbo_loss" else z @ weight.T
    want_nll = slow_nll(recon, t["x"], reduction=reduction)
    terms = slow_kl(t["mu"], t["logvar"], reduction="none")
    count = {"none": 1, "sum": 1, "batchmean": B, "mean": B * J}[reduction]
    per_sample = beta * terms
    want_kl, weighed = (terms, per_sample) if reduction == "none" else (terms.sum() / count, per_sample.sum() / count)
    want = want_nll + weighed
    assert_same([loss.detach(), nll, kl], [want.detach(), want_nll.detach(), want_kl.detach()], rtol=1e-5)
    assert_same(grads(loss, inputs), grads(want, inputs), rtol=1e-4)
    if learned and reduction != "none":
        slope = torch.autograd.grad(fastelbo.elbo_loss(**t, beta=beta, reduction=reduction, impl=backend.impl), beta)[0]
        of_each = terms.detach() / count
        assert_same([slope], [of_each if shape == (B,) else of_each.sum().view(shape)], rtol=1e-5)


@pytest.mark.parametrize("function", ["elbo_loss", "sgvb_loss", "linear_elbo_loss"])
@pytest.mark.parametrize("beta", [torch.ones(2), torch.ones(B, 1), torch.ones((), dtype=torch.complex64)], ids=str)
def test_a_beta_of_another_shape_is_an_error(function: str, beta: Tensor) -> None:
    t = drawn(torch.device("cpu"))
    latent = t["x"], t["mu"], t["logvar"]
    calls = {
        "elbo_loss": lambda: fastelbo.elbo_loss(**t, beta=beta),
        "sgvb_loss": lambda: fastelbo.sgvb_loss(lambda z: z, *latent, beta=beta),
        "linear_elbo_loss": lambda: fastelbo.linear_elbo_loss(*latent, torch.zeros(D, J), beta=beta),
    }
    with pytest.raises(
        ValueError, match=r"beta must be a number or a real tensor of shape \(\), \(1,\) or \(batch,\) = \(4,\), got"
    ):
        calls[function]()


# ---- clamps and masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", [(-0.3, None), (None, 0.2), (None, None)], ids=str)
@each_backend
def test_a_clamp_of_one_side(backend: Backend, clamp: Any) -> None:
    t = drawn(backend.device)
    full = tuple(c if c is not None else unset for c, unset in zip(clamp, (-1e30, 1e30), strict=True))
    for call in (
        lambda c: fastelbo.gaussian_kl(t["mu"], t["logvar"], logvar_clamp=c, impl=backend.impl),
        lambda c: fastelbo.reparameterize_kl(t["mu"], t["logvar"], seed=1, logvar_clamp=c, impl=backend.impl),
        lambda c: fastelbo.elbo_loss(**t, logvar_clamp=c, impl=backend.impl),
        lambda c: fastelbo.DiagonalGaussian(t["mu"], t["logvar"], logvar_clamp=c, impl=backend.impl).rsample_kl(seed=1),
    ):
        assert_same(grads(call(clamp), [t["mu"], t["logvar"]]), grads(call(full), [t["mu"], t["logvar"]]), rtol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@each_backend
def test_an_integer_mask_counts_as_numbers(backend: Backend, reduction: str, dtype: torch.dtype) -> None:
    t = drawn(backend.device)
    mask = (torch.arange(B * D).view(B, D) % 3).to(backend.device)
    kl_mask = mask[:, :J]
    options: dict[str, Any] = {"reduction": reduction, "impl": backend.impl}
    calls: list[Callable[[Tensor, Tensor], Any]] = [
        lambda w, k: fastelbo.gaussian_nll(t["recon"], t["x"], weight=w, **options),
        lambda w, k: fastelbo.gaussian_kl(t["mu"], t["logvar"], weight=k, **options),
        lambda w, k: fastelbo.reparameterize_kl(t["mu"], t["logvar"], seed=1, weight=k, **options),
        lambda w, k: fastelbo.elbo_loss(**t, weight=w, kl_weight=k, **options),
    ]
    for call in calls:
        got, want = call(mask.to(dtype), kl_mask.to(dtype)), call(mask.float(), kl_mask.float())
        for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (got, want)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("kind", ["mask", "weights"])
@each_backend
def test_a_weight_of_the_kl(backend: Backend, kind: str, reduction: str) -> None:
    """Beside that of the likelihood; what lies under a 0 is absent."""
    t = drawn(backend.device)
    g = torch.Generator().manual_seed(2)
    kl_weight = torch.rand(B, J, generator=g).to(backend.device)
    kl_weight = kl_weight > 0.4 if kind == "mask" else torch.where(kl_weight > 0.4, kl_weight, 0.0)
    weight = torch.rand(B, 1, generator=g).to(backend.device)
    holes = torch.where(kl_weight == 0, math.nan, t["mu"].detach()).requires_grad_()
    options: dict[str, Any] = {"reduction": reduction, "impl": backend.impl}
    inputs = [t["recon"], holes, t["logvar"]]
    nll = slow_nll(t["recon"], t["x"], weight=weight, reduction=reduction)
    kl = slow_kl(holes, t["logvar"], weight=kl_weight, reduction=reduction)
    want = grads(nll + 0.5 * kl, inputs)
    args = t["recon"], t["x"], holes, t["logvar"]
    assert_same(grads(fastelbo.elbo_loss(*args, beta=0.5, weight=weight, kl_weight=kl_weight, **options), inputs), want, rtol=1e-5)
    terms = fastelbo.elbo_terms(*args, weight=weight, kl_weight=kl_weight, **options)
    assert_same(grads(terms[0] + 0.5 * terms[1], inputs), want, rtol=1e-5)
    both: dict[str, Any] = {"weight": weight, "kl_weight": kl_weight, **options}
    recon = t["recon"]
    of_sgvb = fastelbo.sgvb_loss(lambda z: recon + 0 * z.nan_to_num().sum(), *args[1:], seed=1, beta=0.5, **both)
    assert_same([of_sgvb.detach()], want[:1], rtol=1e-5)


def test_a_mean_under_a_mask_that_is_all_false_is_nan() -> None:
    t = drawn(torch.device("cpu"))
    none = torch.zeros(B, D, dtype=torch.bool)
    assert fastelbo.gaussian_nll(t["recon"], t["x"], weight=none, reduction="mean").isnan()
    assert fastelbo.gaussian_nll(t["recon"], t["x"], weight=none, reduction="sum") == 0


# ---- samples in front, and priors that broadcast the posterior -------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("learned", [False, True])
@each_backend
def test_samples_in_front_of_the_batch(backend: Backend, learned: bool, reduction: str) -> None:
    """x has no such dimension, and is not copied. gaussian_nll keeps the samples, as IWAE wants them; elbo_loss averages them."""
    t, g = drawn(backend.device), torch.Generator().manual_seed(4)
    recon = torch.randn(5, B, D, generator=g).to(backend.device).requires_grad_()
    x = t["x"].clone().requires_grad_(learned)
    weight = torch.rand(B, D, generator=g).to(backend.device)
    options: dict[str, Any] = {"reduction": reduction, "impl": backend.impl}
    for variance in (None, -0.4, t["x"], recon.detach()[:, :, :1], t["x"][0]):
        per = [v[s] if isinstance(v := variance, Tensor) and v.ndim == 3 else v for s in range(5)]
        inputs = [recon, *([x] if learned else [])]
        nll = fastelbo.gaussian_nll(recon, x, logvar=variance, weight=weight, batch_dims=2, impl=backend.impl)
        want = torch.stack([slow_nll(recon[s], x, logvar=per[s], weight=weight) for s in range(5)])
        assert nll.shape == (5, B)
        assert_same(grads(nll, inputs), grads(want, inputs), rtol=1e-5)
        for w in (None, weight):
            loss = fastelbo.elbo_loss(recon, x, t["mu"], t["logvar"], recon_logvar=variance, weight=w, **options)
            nlls = [slow_nll(recon[s], x, logvar=per[s], weight=w, reduction=reduction) for s in range(5)]
            slow = torch.stack(nlls).mean(0) + slow_kl(t["mu"], t["logvar"], reduction=reduction)
            assert_same(grads(loss, inputs), grads(slow, inputs), rtol=1e-5)


@each_backend
def test_a_prior_that_broadcasts_the_posterior(backend: Backend) -> None:
    """VampPrior: the KL of each posterior to each component."""
    t, g = drawn(backend.device), torch.Generator().manual_seed(4)
    prior_mu, prior_logvar = (torch.randn(7, J, generator=g).to(backend.device).requires_grad_() for _ in range(2))
    inputs = [t["mu"], t["logvar"], prior_mu, prior_logvar]
    kl = fastelbo.gaussian_kl(
        t["mu"].unsqueeze(1), t["logvar"].unsqueeze(1), prior_mu, prior_logvar, batch_dims=2, impl=backend.impl
    )
    one = [[t.unsqueeze(0) for t in pair] for pair in zip(t["mu"], t["logvar"], strict=True)]
    components = [[t.unsqueeze(0) for t in pair] for pair in zip(prior_mu, prior_logvar, strict=True)]
    each = [[slow_kl(*posterior, *prior) for prior in components] for posterior in one]
    want = torch.stack([torch.cat(row) for row in each])
    assert kl.shape == (B, 7)
    assert_same(grads(kl, inputs), grads(want, inputs), rtol=1e-5)


# ---- images in uint8 -------------------------------------------------------------------------------------------------------------

UNIT, SIGNED = (1 / 255, None), (1 / 127.5, -1)
Image = Callable[..., Any]


def image_calls(backend: Backend, **options: Any) -> dict[str, tuple[Image, list[Tensor]]]:
    """Every function of an image, as a call of x, and what the results are differentiated in."""
    g = torch.Generator().manual_seed(1)
    recon, mu, logvar = (torch.randn(B, *s, generator=g).to(backend.device).requires_grad_() for s in ((2, 3, 5), (J,), (J,)))
    given = {"impl": backend.impl, **options}
    module = fastelbo.ELBOLoss(0.5, **given)
    elbo = lambda x: fastelbo.elbo_loss(recon, x, mu, logvar, **given)  # noqa: E731
    calls: dict[str, Image] = {
        "gaussian_nll": lambda x: fastelbo.gaussian_nll(recon, x, logvar=0.3, **given),
        "elbo_loss": elbo,
        "elbo_terms": lambda x: fastelbo.elbo_terms(recon, x, mu, logvar, **given),
        "sgvb_loss": lambda x: fastelbo.sgvb_loss(lambda z: recon * z.sum(), x, mu, logvar, seed=3, **given),
        "ELBOLoss": lambda x: module(recon, x, mu, logvar),
    }
    return {name: (call, [recon] if name == "gaussian_nll" else [recon, mu, logvar]) for name, call in calls.items()}


def drawn_image(device: torch.device) -> Tensor:
    return torch.randint(0, 256, (B, 2, 3, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)).to(device)


@pytest.mark.parametrize("function", ["gaussian_nll", "elbo_loss", "elbo_terms", "sgvb_loss", "ELBOLoss"])
@pytest.mark.parametrize(("scale", "shift"), [UNIT, SIGNED, (np.float32(0.5), np.int64(3)), (1, 0)])
@each_backend
def test_an_image_is_what_its_values_stand_for(backend: Backend, scale: Any, shift: Any, function: str) -> None:
    x = drawn_image(backend.device)
    call, inputs = image_calls(backend, x_scale=scale, x_shift=shift)[function]
    plain, same = image_calls(backend)[function]
    number = float(np.float32(scale))
    wide = (x.double() * number + float(shift or 0)).float()
    for got, want in zip(grads(call(x), inputs), grads(plain(wide), same), strict=True):
        assert torch.equal(got, want)
    assert_same(grads(call(x.to(memory_format=torch.channels_last)), inputs), grads(plain(wide), same), rtol=1e-6)


@each_backend
def test_an_image_below_samples(backend: Backend) -> None:
    x = drawn_image(backend.device)
    recon = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(3)).to(backend.device).requires_grad_()
    mu, logvar = (torch.zeros(B, J, device=backend.device) for _ in range(2))
    options: dict[str, Any] = {"impl": backend.impl}
    for call in (
        lambda x, **o: fastelbo.gaussian_nll(recon, x, batch_dims=2, **options, **o),
        lambda x, **o: fastelbo.elbo_loss(recon, x, mu, logvar, **options, **o),
    ):
        got = grads(call(x, x_scale=UNIT[0]), [recon])
        assert_same(got, grads(call(x.float() * UNIT[0]), [recon]), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@each_backend
def test_an_image_in_other_arithmetic(backend: Backend, dtype: torch.dtype) -> None:
    x = drawn_image(backend.device)
    recon = torch.rand(x.shape, device=backend.device).to(dtype).requires_grad_()
    wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32) * UNIT[0]
    nll = fastelbo.gaussian_nll(recon, x, x_scale=UNIT[0], impl=backend.impl)
    assert_same(grads(nll, [recon]), grads(fastelbo.gaussian_nll(recon, wide, impl=backend.impl), [recon]), rtol=1e-14)


@each_backend
def test_verify_knows_images(backend: Backend) -> None:
    """Of small residuals too, beside which the rounding of an image's values is not small."""
    x = drawn_image(backend.device)
    recon = (x.float() / 127.5 - 1 + 1e-6).requires_grad_()
    mu, logvar = (torch.zeros(B, J, device=backend.device) for _ in range(2))
    with fastelbo.verify() as report:
        fastelbo.gaussian_nll(recon, x, x_scale=1 / 127.5, x_shift=-1, impl=backend.impl).sum().backward()
        fastelbo.elbo_loss(recon, x, mu, logvar, x_scale=1 / 127.5, x_shift=-1, impl=backend.impl).backward()
    assert (report.calls, report.backwards, report.mismatches) == (2, 2, 0)


def test_an_image_is_not_copied() -> None:
    from benchmarks.measure import Step, peak_memory

    for shift in (None, -1):
        inputs = {"recon": torch.randn(64, 196_608).requires_grad_(), "x": torch.zeros(64, 196_608, dtype=torch.uint8)}
        gradient = inputs["recon"].nbytes

        def nll(recon: Tensor, x: Tensor, shift: Any = shift) -> Tensor:
            return fastelbo.gaussian_nll(recon, x, logvar=0.5, x_scale=1 / 127.5, x_shift=shift, reduction="sum")

        assert peak_memory(Step(inputs), nll, torch.device("cpu")) - gradient < gradient // 4


def test_an_image_in_a_trace() -> None:
    x = drawn_image(torch.device("cpu"))
    recon = torch.randn(x.shape)
    call = lambda r, x: fastelbo.gaussian_nll(r, x, x_scale=1 / 127.5, x_shift=-1)  # noqa: E731
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(recon, x), call(recon, x))
    torch.testing.assert_close(torch.func.vmap(call)(recon[:, None], x[:, None])[:, 0], call(recon, x))


def test_errors_of_images() -> None:
    x, recon, mu = torch.zeros(B, D, dtype=torch.uint8), torch.zeros(B, D), torch.zeros(B, J)
    calls: list[Callable[..., Any]] = [
        lambda x, **o: fastelbo.gaussian_nll(recon, x, **o),
        lambda x, **o: fastelbo.elbo_loss(recon, x, mu, mu, **o),
        lambda x, **o: fastelbo.elbo_terms(recon, x, mu, mu, **o),
        lambda x, **o: fastelbo.sgvb_loss(lambda z: recon, x, mu, mu, **o),
        lambda x, **o: fastelbo.ELBOLoss(**o)(recon, x, mu, mu),
    ]
    for call in calls:
        for given in ({}, {"x_shift": 1}):
            with pytest.raises(
                TypeError, match=r"x_scale is not given, which an x of torch\.uint8 needs: .*x\.float\(\) converts it"
            ):
                call(x, **given)
        with pytest.raises(ValueError, match=r"x_scale is given, but only an x of torch\.uint8 .* got torch\.float32"):
            call(recon, x_scale=1)
        with pytest.raises(TypeError, match="x_scale must be a number, got str"):
            call(x, x_scale="1")
    with pytest.raises(TypeError, match=r"x must be .* got torch\.uint8: x\.float\(\) converts it"):
        fastelbo.linear_gaussian_nll(mu, torch.zeros(D, J), x)


# ---- errors that say the way out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_errors_say_the_way_out(backend: Backend) -> None:
    t = drawn(backend.device)
    with pytest.raises(TypeError, match=r"x must be .* got torch\.int64: x\.float\(\) converts it"):
        fastelbo.gaussian_nll(t["recon"], torch.zeros(B, D, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), .* \(4, 6\) of recon: write weight\[\.\.\., None\]"):
        fastelbo.gaussian_nll(t["recon"], t["x"], weight=torch.ones(B))
    with pytest.raises(ValueError, match=r"kl_weight has shape \(4,\), .* \(4, 3\) of mu: write kl_weight\[\.\.\., None\]"):
        fastelbo.elbo_loss(**t, kl_weight=torch.ones(B))
    with pytest.raises(TypeError, match=r"logvar_clamp must be a pair \(lo, hi\) of numbers, one of which may be None"):
        fastelbo.gaussian_kl(t["mu"], t["logvar"], logvar_clamp=("a", None))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_backend
def test_a_beta_that_is_written_to_before_backward(backend: Backend, dtype: torch.dtype) -> None:
    """A schedule may write to its tensor at any time: backward has the value of the call."""
    t = drawn(backend.device)
    v = {n: x.detach().to(dtype).requires_grad_(n != "x") for n, x in t.items()}
    beta = torch.tensor(0.5, device=backend.device)
    asked = [v["mu"], v["logvar"]]
    want = torch.autograd.grad(fastelbo.elbo_loss(**v, beta=0.5, impl=backend.impl), asked)
    loss = fastelbo.elbo_loss(**v, beta=beta, impl=backend.impl)
    beta.fill_(7.0)
    for _ in range(2):
        assert_same(list(torch.autograd.grad(loss, asked, retain_graph=True)), list(want), rtol=1e-3)
