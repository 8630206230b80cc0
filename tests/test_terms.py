"""What the terms of a loss may be: at the optimal variance, scaled each by itself, over a batch of sequences, with an offset."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from cases import Backend, each_backend
from settings import drawn, same
from torch import Tensor, nn
from torch.distributions import Laplace, Normal
from torch.distributions import kl_divergence as torch_kl

import fastelbo

LOG_2PI = math.log(2 * math.pi)


def reduced(each: Tensor, reduction: str, weight: Tensor | None = None, batch_dims: int = 1) -> Tensor:
    each = each if weight is None else each * weight
    if reduction == "none":
        return each.flatten(batch_dims).sum(-1)
    divisor = {
        "sum": 1, "batchmean": math.prod(each.shape[:batch_dims]),
        "mean": each.numel() if weight is None else weight.expand(each.shape).sum(),
    }[reduction]  # fmt: skip
    return each.sum() / divisor


def standard_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return torch_kl(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0))


# ---- the optimal variance --------------------------------------------------------------------------------------------------------


def sigma_vae(recon: Tensor, x: Tensor, weight: Tensor | None = None, full: bool = True) -> Tensor:
    """Per element, with the logarithm of the root of the mean square, as its authors write it."""
    squares = (x - recon) ** 2
    mean = squares.mean() if weight is None else (squares * weight).sum() / weight.expand(squares.shape).sum()
    log_sigma = mean.sqrt().log()
    return 0.5 * ((x - recon) / log_sigma.exp()) ** 2 + log_sigma + (0.5 * LOG_2PI if full else 0.0)


@each_backend
@pytest.mark.parametrize("weighted", [None, "mask", "weights"])
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
def test_optimal(reduction: str, weighted: str | None, backend: Backend) -> None:
    inputs = [drawn(4, 3, 5), drawn(4, 3, 5, seed=1), drawn(4, 2, seed=2), drawn(4, 2, seed=3)]
    weight: Any = {"mask": drawn(3, 1, seed=4) > -0.3, "weights": drawn(4, 1, 1, seed=4).abs().float(), None: None}[weighted]
    if weight is not None:
        weight = weight.to(backend.device)
    options: dict[str, Any] = {"recon_logvar": "optimal", "reduction": reduction, "weight": weight, "impl": backend.impl}

    def terms(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        w = None if weight is None else weight.double()
        return reduced(sigma_vae(recon, x, w), reduction, w), reduced(standard_kl(mu, logvar), reduction)

    def loss(*v: Tensor) -> Tensor:
        nll, kl = terms(*v)
        return nll + 0.3 * kl

    same(lambda *v: fastelbo.elbo_terms(*v, **options), terms, inputs, backend)
    same(lambda *v: fastelbo.elbo_loss(*v, beta=0.3, **options), loss, inputs, backend)


@each_backend
def test_optimal_in_other_ways(backend: Backend) -> None:
    """In closed form; with samples, a beta for each sample, an image; by sgvb_loss and ELBOLoss; differentiated twice."""
    recon, x, mu, logvar = drawn(3, 4, 5), drawn(4, 5, seed=1), drawn(4, 2, seed=2), drawn(4, 2, seed=3)
    beta = torch.rand(4, generator=torch.Generator().manual_seed(0)).to(backend.device)
    impl: Any = backend.impl

    def written(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        sse, count = ((x - recon) ** 2).sum(), recon.numel()
        nll = 0.5 * count * (1 + LOG_2PI + torch.log(sse / count)) / (3 * 4)
        return nll + (beta.double() * standard_kl(mu, logvar).sum(1)).mean()

    same(
        lambda *v: fastelbo.elbo_loss(*v, recon_logvar="optimal", beta=beta, impl=impl), written, [recon, x, mu, logvar], backend
    )  # fmt: skip
    eps = drawn(3, 4, 2, seed=5).float().to(backend.device)
    weight = drawn(5, 2, seed=6).to(backend.device)
    for reduction in ("none", "batchmean", "sum", "mean"):

        def by_sgvb(x: Tensor, mu: Tensor, logvar: Tensor, r: Any = reduction) -> Tensor:
            options: dict[str, Any] = {"recon_logvar": "optimal", "num_samples": 3, "eps": eps, "reduction": r, "impl": impl}
            return fastelbo.sgvb_loss(lambda z: z @ weight.T.to(z.dtype), x, mu, logvar, **options)

        def by_hand(x: Tensor, mu: Tensor, logvar: Tensor, r: str = reduction) -> Tensor:
            each = sigma_vae((mu + (0.5 * logvar).exp() * eps.double()) @ weight.T, x)
            nll = {"none": each.sum(2).mean(0), "batchmean": each.sum() / 12, "sum": each.sum() / 3, "mean": each.mean()}[r]
            return nll + reduced(standard_kl(mu, logvar), r)

        same(by_sgvb, by_hand, [x, mu, logvar], backend)

    image = torch.randint(0, 256, (4, 5), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).to(backend.device)
    loss = fastelbo.ELBOLoss(recon_logvar="optimal", x_scale=1 / 255, impl=impl).to(backend.device)
    assert "recon_logvar=optimal" in repr(loss)
    v = [t.float().to(backend.device) for t in (recon[0], mu, logvar)]
    want = reduced(sigma_vae(v[0].double(), image.double() / 255), "batchmean") + reduced(
        standard_kl(v[1].double(), v[2].double()), "batchmean"
    )
    for module in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(module(v[0], image, v[1], v[2]).double(), want, rtol=1e-6, atol=0)

    wide = [t.to(backend.device).requires_grad_() for t in (recon[0], x, mu, logvar)]
    for reduction in ("none", "batchmean"):
        call = lambda *v, r=reduction: fastelbo.elbo_loss(*v, recon_logvar="optimal", reduction=r, impl=impl)  # noqa: E731
        assert torch.autograd.gradcheck(call, wide, fast_mode=backend.truncates)
        assert torch.autograd.gradgradcheck(call, wide, fast_mode=backend.truncates)


@each_backend
def test_optimal_of_nothing(backend: Backend) -> None:
    """Under a mask that is all False value and slopes are those of a fixed variance: 0, and of a mean NaN without slopes."""
    recon, x, mu = (t.float().to(backend.device) for t in (drawn(3, 4), drawn(3, 4, seed=1), torch.zeros(3, 2)))
    for mask in (torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 1)):
        for reduction in ("none", "batchmean", "sum", "mean"):
            found = []
            for recon_logvar in ("optimal", 0.0):
                leaf = recon.clone().requires_grad_()
                options: Any = {"weight": mask.to(backend.device), "reduction": reduction, "impl": backend.impl}
                loss = fastelbo.elbo_loss(leaf, x, mu, mu, recon_logvar=recon_logvar, **options)  # type: ignore[call-overload]
                found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
            torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
            assert bool((found[0][1] == 0).all())


def test_optimal_compiles() -> None:
    v = [t.float().requires_grad_() for t in (drawn(4, 5), drawn(4, 5, seed=1), drawn(4, 2, seed=2), drawn(4, 2, seed=3))]
    call = lambda *v: fastelbo.elbo_loss(*v, recon_logvar="optimal", nll_scale=0.5, kl_scale=2)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*v), call(*v))
    torch.testing.assert_close(torch.autograd.grad(compiled(*v), v), torch.autograd.grad(call(*v), v), rtol=1e-5, atol=1e-6)


def test_errors_of_optimal() -> None:
    x, mu = torch.zeros(3, 4), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="recon_logvar is given, but likelihood='laplace' takes recon_logscale"):
        fastelbo.elbo_loss(x, x, mu, mu, likelihood="laplace", recon_logvar="optimal")
    with pytest.raises(TypeError, match=r"recon_logvar must be a number or a torch.Tensor, got str 'best': the one string is"):
        fastelbo.elbo_loss(x, x, mu, mu, recon_logvar="best")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="learned=True, but"):
        fastelbo.ELBOLoss(recon_logvar="optimal", learned=True)


# ---- scales and batches ----------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("batch_dims", [1, 2])
@pytest.mark.parametrize("samples", [False, True])
def test_scales_and_batch_dims(samples: bool, batch_dims: int, reduction: str, backend: Backend) -> None:
    """Each term has its own divisor, and a batch of sequences is one of their steps."""
    lead = (2,) if samples else ()
    inputs = [drawn(*lead, 4, 3, 5), drawn(4, 3, 5, seed=1), drawn(4, 3, 2, seed=2), drawn(4, 3, 2, seed=3), drawn(3, 1, seed=4)]
    nll_scale = torch.tensor(0.25, device=backend.device)
    mask = (drawn(4, 3, 1, seed=5) > -1).to(backend.device)
    options: dict[str, Any] = {"nll_scale": nll_scale, "kl_scale": 2, "reduction": reduction, "batch_dims": batch_dims}
    options |= {"weight": mask, "kl_weight": mask, "impl": backend.impl}

    def terms(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, recon_logvar: Tensor) -> tuple[Tensor, Tensor]:
        each = -Normal(recon, (0.5 * recon_logvar).exp()).log_prob(x)
        each = each.mean(0) if samples else each
        nll = reduced(each, reduction, mask.double(), batch_dims)
        return 0.25 * nll, 2 * reduced(standard_kl(mu, logvar), reduction, mask.double(), batch_dims)

    def loss(*v: Tensor) -> Tensor:
        nll, kl = terms(*v)
        return nll + 0.3 * kl

    same(lambda *v: fastelbo.elbo_terms(*v[:4], recon_logvar=v[4], **options), terms, inputs, backend)
    same(lambda *v: fastelbo.elbo_loss(*v[:4], recon_logvar=v[4], beta=0.3, **options), loss, inputs, backend)


def test_errors_of_scales_and_batches() -> None:
    x, mu = torch.zeros(3, 4, 5), torch.zeros(3, 4)
    for function in (fastelbo.elbo_loss, fastelbo.elbo_terms):
        call: Any = function
        for name in ("nll_scale", "kl_scale"):
            with pytest.raises(TypeError, match=f"{name} must be a number or a tensor, got str"):
                call(x, x, mu, mu, **{name: "1"})
            with pytest.raises(ValueError, match=f"{name} must be a number or a real tensor of shape"):
                call(x, x, mu, mu, **{name: torch.ones(3)})
            with pytest.raises(ValueError, match=f"{name} requires grad, but is a constant here"):
                call(x, x, mu, mu, **{name: torch.ones((), requires_grad=True)})
        with pytest.raises(ValueError, match="batch_dims must be between 0 and the number of dimensions, 2, got 3"):
            call(x, x, mu, mu, batch_dims=3)
        with pytest.raises(
            ValueError, match="mu has a batch of 3, 2, but recon has 3, 4: the first 2 dimensions of all inputs are"
        ):
            call(x, x, mu[:, :2], mu[:, :2], batch_dims=2)
    with pytest.raises(ValueError, match="beta must be a number or a real tensor"):
        fastelbo.elbo_loss(x, x, mu, mu, beta=torch.ones(3), batch_dims=2)


# ---- a Laplace likelihood's offset -----------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("weighted", [None, "mask", "weights"])
@pytest.mark.parametrize("scale", ["none", "number", "0d", "channel", "element"])
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
def test_offset(reduction: str, scale: str, weighted: str | None, backend: Backend) -> None:
    """The reconstruction term of latent-diffusion autoencoders, (|d| + p) / e^s + s, of the likelihood's own constant."""
    shape: dict[str, tuple[int, ...]] = {"0d": (), "channel": (3, 1, 1), "element": (4, 3, 2, 2)}
    inputs = [drawn(4, 3, 2, 2), drawn(4, 3, 2, 2, seed=1), drawn(4, 1, 1, 1, seed=2).abs()]
    if scale in shape:
        inputs.append(drawn(*shape[scale], seed=3))
    weight: Any = {"mask": drawn(4, 1, 2, 2, seed=4) > -0.5, "weights": drawn(4, 1, 1, 1, seed=4).abs().float(), None: None}[
        weighted
    ]
    if weight is not None:
        weight = weight.to(backend.device)
    fixed = 0.4 if scale == "number" else None

    def call(recon: Tensor, x: Tensor, offset: Tensor, logscale: Any = fixed) -> Tensor:
        options: dict[str, Any] = {"weight": weight, "reduction": reduction, "impl": backend.impl}
        return fastelbo.laplace_nll(recon, x, logscale=logscale, offset=offset, **options)

    def written(recon: Tensor, x: Tensor, offset: Tensor, logscale: Any = fixed) -> Tensor:
        s = torch.as_tensor(0.0 if logscale is None else logscale, dtype=torch.float64, device=recon.device)
        each = -Laplace(recon, s.exp()).log_prob(x) + offset / s.exp()
        return reduced(each, reduction, None if weight is None else weight.double())

    same(call, written, inputs, backend)


def test_an_absent_offset() -> None:
    """A NaN under a mask reaches nothing."""
    recon, x = torch.randn(3, 4), torch.randn(3, 4)
    offset = torch.tensor([[0.5], [math.nan], [1.0]], requires_grad=True)
    mask = torch.tensor([[True], [False], [True]])
    nll = fastelbo.laplace_nll(recon, x, offset=offset, weight=mask)
    assert nll.tolist()[1] == 0
    nll.sum().backward()
    assert offset.grad is not None
    assert offset.grad.tolist() == [[4.0], [0.0], [4.0]]
    for absent in (math.nan, -200.0, math.inf):
        logscale = torch.tensor([[0.0], [absent], [0.5]]).expand(3, 4).clone().requires_grad_()
        fastelbo.laplace_nll(recon, x, logscale=logscale, offset=torch.ones(3, 1), weight=mask).sum().backward()
        assert logscale.grad is not None
        assert logscale.grad[1].tolist() == [0.0] * 4
        assert bool(logscale.grad.isfinite().all())
    with pytest.raises(ValueError, match=r"offset has shape \(3,\), which does not broadcast to the shape \(3, 4\) of recon"):
        fastelbo.laplace_nll(recon, x, offset=torch.zeros(3))
    with pytest.raises(TypeError, match=r"offset must be a torch.Tensor, got float"):
        fastelbo.laplace_nll(recon, x, offset=1.0)  # type: ignore[arg-type]


# ---- the module ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
def test_a_module_of_other_likelihoods(learned: bool) -> None:
    recon, x, mu, logvar = (t.float() for t in (drawn(4, 5), drawn(4, 5, seed=1), drawn(4, 2, seed=2), drawn(4, 2, seed=3)))
    loss = fastelbo.ELBOLoss(likelihood="laplace", recon_logscale=0.3, learned=learned)
    assert "likelihood='laplace', recon_logscale=" in repr(loss)
    assert isinstance(loss.recon_logscale, nn.Parameter) == learned
    assert loss.recon_logvar is None
    assert ("recon_logscale" in loss.state_dict()) == learned
    want = fastelbo.elbo_loss(recon, x, mu, logvar, likelihood="laplace", recon_logscale=0.3)
    torch.testing.assert_close(loss(recon, x, mu, logvar), want)
    own = fastelbo.ELBOLoss(likelihood="laplace")
    torch.testing.assert_close(own(recon, x, mu, logvar, recon_logscale=torch.tensor(0.3)), want)
    with pytest.raises(ValueError, match="recon_logscale is given, but this ELBOLoss holds one"):
        loss(recon, x, mu, logvar, recon_logscale=torch.tensor(0.3))
    bernoulli = fastelbo.ELBOLoss(likelihood="bernoulli", beta=0.5)
    target = torch.sigmoid(x)
    want = fastelbo.elbo_loss(recon, target, mu, logvar, likelihood="bernoulli", beta=0.5)
    torch.testing.assert_close(bernoulli(recon, target, mu, logvar), want)


def test_errors_of_the_module() -> None:
    with pytest.raises(ValueError, match="recon_logvar is given, but likelihood='laplace' takes recon_logscale"):
        fastelbo.ELBOLoss(likelihood="laplace", recon_logvar=0.0)
    with pytest.raises(ValueError, match="learned=True, but likelihood='bernoulli'"):
        fastelbo.ELBOLoss(likelihood="bernoulli", learned=True)
    with pytest.raises(ValueError, match="likelihood must be one of"):
        fastelbo.ELBOLoss(likelihood="poisson")  # type: ignore[arg-type]
