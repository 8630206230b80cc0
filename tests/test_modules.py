"""The modules, the estimator as code uses it, and what `effective_beta` claims about losses."""

from __future__ import annotations

import copy
import io
import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Backend, each_backend, slow_loss
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastelbo


def batch(backend: Backend) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    shapes = ((4, 3, 5), (4, 3, 5), (4, 2), (4, 2))
    return [torch.randn(s, generator=g).to(backend.device).requires_grad_() for s in shapes]


def truth(args: list[torch.Tensor], **options: Any) -> torch.Tensor:
    doubles = {n: v.detach().double().cpu() if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    return slow_loss(*(a.detach().double().cpu() for a in args), **doubles).to(torch.float32)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected, rtol=2e-6, atol=1e-6)


# ---- ELBOLoss --------------------------------------------------------------------------------------------------------------------


@each_backend
def test_elbo_loss_module_is_the_function(backend: Backend) -> None:
    args = batch(backend)
    same(fastelbo.ELBOLoss(impl=backend.impl)(*args), truth(args))
    loss = fastelbo.ELBOLoss(beta=0.2, recon_logvar=-1.0, full=False, logvar_clamp=(-0.5, 0.5), reduction="mean", impl=backend.impl)
    options = {"beta": 0.2, "recon_logvar": -1.0, "full": False, "logvar_clamp": (-0.5, 0.5), "reduction": "mean"}
    same(loss(*args), truth(args, **options))
    weight = torch.rand(4, 1, 5, device=backend.device)
    prior = torch.randn(2, device=backend.device)
    same(loss(*args, weight=weight, prior_mu=prior, prior_logvar=0.3),
         truth(args, **options, weight=weight, prior_mu=prior, prior_logvar=0.3))  # fmt: skip
    total, nll, kl = fastelbo.ELBOLoss(beta=0.5, return_terms=True, impl=backend.impl)(*args)
    same(total, (nll + 0.5 * kl).cpu())
    same(total, truth(args, beta=0.5))


@each_backend
def test_beta_can_be_scheduled(backend: Backend) -> None:
    args = batch(backend)
    loss = fastelbo.ELBOLoss(beta=0.0, impl=backend.impl)
    for beta in (0.0, 0.25, 1.0, 4, torch.tensor(0.5)):
        loss.beta = beta
        same(loss(*args), truth(args, beta=float(beta)))
    # A KL with weight 0 passes no gradient, not even as NaN.
    loss.beta = 0.0
    grads = torch.autograd.grad(loss(*args), args[2:])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@each_backend
def test_held_and_learned_variance(backend: Backend) -> None:
    args = batch(backend)
    for start in (None, 0.7, torch.tensor([0.1, -0.2, 0.3]).view(3, 1)):
        learned = fastelbo.ELBOLoss(recon_logvar=start, learned=True, impl=backend.impl).to(backend.device)
        assert [n for n, _ in learned.named_parameters()] == ["recon_logvar"]
        assert isinstance(learned.recon_logvar, nn.Parameter)
        held = 0.0 if start is None else start
        same(learned(*args), truth(args, recon_logvar=held))
        learned(*args).backward()
        reference = torch.as_tensor(held, dtype=torch.float64).clone().requires_grad_()
        slow_loss(*(a.detach().double().cpu() for a in args), recon_logvar=reference).backward()
        same(learned.recon_logvar.grad, reference.grad.float())
    # The caller's tensor is where it starts, not what it is.
    start = torch.zeros(3, 1)
    module = fastelbo.ELBOLoss(recon_logvar=start, learned=True)
    with torch.no_grad():
        module.recon_logvar.add_(1)
    assert torch.equal(start, torch.zeros(3, 1))
    buffered = fastelbo.ELBOLoss(recon_logvar=torch.tensor(0.5), impl=backend.impl).to(backend.device)
    assert not list(buffered.parameters())
    assert buffered.recon_logvar.device.type == backend.device.type
    same(buffered(*args), truth(args, recon_logvar=0.5))
    with pytest.raises(ValueError, match="recon_logvar"):
        buffered(*args, recon_logvar=0.5)
    same(fastelbo.ELBOLoss(impl=backend.impl)(*args, recon_logvar=0.25), truth(args, recon_logvar=0.25))


def test_a_learned_variance_finds_the_data() -> None:
    """The optimum of the learned scalar is the log of the mean squared error: what sigma-VAEs rest on."""
    torch.manual_seed(0)
    x, recon = torch.randn(256, 10), torch.zeros(256, 10)
    x = 0.3 * x
    zero = torch.zeros(256, 1)
    loss = fastelbo.ELBOLoss(learned=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(recon, x, zero, zero).backward()
        optimizer.step()
    assert float(loss.recon_logvar) == pytest.approx(float(x.square().mean().log()), abs=1e-3)


def test_state_dict() -> None:
    learned = fastelbo.ELBOLoss(recon_logvar=torch.randn(3, 1), learned=True)
    held = fastelbo.ELBOLoss(recon_logvar=torch.randn(3, 1))
    for module in (learned, held):
        assert set(module.state_dict()) == {"beta", "recon_logvar"}
        other = fastelbo.ELBOLoss(recon_logvar=torch.zeros(3, 1), learned=module is learned)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.recon_logvar, module.recon_logvar)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert torch.equal(again.recon_logvar, module.recon_logvar)
        assert torch.equal(copy.deepcopy(module).recon_logvar, module.recon_logvar)
    assert set(fastelbo.ELBOLoss(recon_logvar=0.5).state_dict()) == {"beta"}
    assert set(fastelbo.ELBOLoss().state_dict()) == {"beta"}


def test_a_float64_start_is_kept_exact() -> None:
    """A tensor brings its dtype; only numbers take the default one."""
    start = torch.tensor([1 / 3], dtype=torch.float64)
    assert fastelbo.ELBOLoss(recon_logvar=0.5, learned=True).recon_logvar.dtype == torch.get_default_dtype()
    assert torch.equal(fastelbo.ELBOLoss(recon_logvar=start, learned=True).recon_logvar.detach(), start)


def test_module_reprs() -> None:
    assert repr(fastelbo.ELBOLoss(beta=0.5, recon_logvar=-1.0)) == "ELBOLoss(beta=0.5, reduction='batchmean', recon_logvar=-1.0)"
    assert "GaussianNLLLoss(" in repr(fastelbo.GaussianNLLLoss())
    assert repr(fastelbo.Reparameterize(3)) == "Reparameterize(num_samples=3)"
    assert repr(fastelbo.Reparameterize(seed=7)) == "Reparameterize(num_samples=None, seed=7)"
    assert repr(fastelbo.ELBOLoss(0.2)) == "ELBOLoss(beta=0.2, reduction='batchmean')"
    assert "beta=..." in repr(fastelbo.ELBOLoss().to("meta"))


def test_a_parameter_is_shared() -> None:
    """An optimizer of the module trains the very parameter that the caller has."""
    recon, x, mu, logvar = (torch.randn(s) for s in ((4, 3), (4, 3), (4, 2), (4, 2)))
    for learned in (False, True):
        for build, args in ((fastelbo.ELBOLoss, (recon, x, mu, logvar)), (linear, (x, mu, logvar))):
            mine = nn.Parameter(torch.tensor(0.5))
            module = build(recon_logvar=mine, learned=learned)
            assert module.recon_logvar is mine
            assert dict(module.named_parameters())["recon_logvar"] is mine
            module(*args).backward()
            torch.optim.SGD(module.parameters(), lr=1.0).step()
            assert mine.grad is not None
            assert mine.item() == 0.5 - mine.grad.item() != 0.5


def linear(**options: Any) -> fastelbo.LinearELBO:
    return fastelbo.LinearELBO(2, 3, **options)


# ---- beta ------------------------------------------------------------------------------------------------------------------------


def test_beta_is_a_buffer() -> None:
    for build in (fastelbo.ELBOLoss, linear):
        module = build(beta=0.25)
        assert set(dict(module.named_buffers())) == {"beta"}
        held = module.beta
        assert (held.shape, held.dtype, held.requires_grad) == ((), torch.float32, False)
        for value in (0.5, 2, np.float32(0.75), torch.tensor(3.0), torch.tensor([4.0]), torch.tensor(5)):
            module.beta = value
            assert module.beta is held  # where compiled code and captured graphs look
            assert held.item() == float(value)
        other = build()
        assert other.load_state_dict(module.state_dict()) == ([], [])
        assert other.beta.item() == 5
        assert copy.deepcopy(module).beta.item() == 5
        with torch.device("meta"):
            empty = build()
        empty.load_state_dict(module.state_dict(), assign=True)
        assert empty.beta.item() == 5


def test_beta_comes_first() -> None:
    assert fastelbo.ELBOLoss(0.5).beta.item() == 0.5
    assert fastelbo.ELBOLoss(torch.tensor(0.5)).beta.item() == 0.5


def test_the_callers_tensor_is_not_written_to() -> None:
    mine = torch.tensor(0.5)
    module = fastelbo.ELBOLoss(mine)
    module.beta = 1.0
    assert mine.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_beta(dtype: torch.dtype) -> None:
    """0.3 is 0.30005 in float16 and 0.30078 in bfloat16."""
    for module in (fastelbo.ELBOLoss(0.3, recon_logvar=torch.zeros(3)).to(dtype), linear(beta=0.3).to(dtype),
                   linear(beta=0.3, dtype=dtype), nn.Sequential(fastelbo.ELBOLoss(0.3)).to(dtype)[0]):  # fmt: skip
        assert module.beta.dtype == torch.float32
        assert torch.equal(module.beta, torch.tensor(0.3))
        assert module.to("meta").beta.is_meta
    assert fastelbo.ELBOLoss(0.3, recon_logvar=torch.zeros(3)).to(dtype).recon_logvar.dtype == dtype
    assert torch.equal(fastelbo.ELBOLoss(torch.tensor(0.3, dtype=dtype)).beta, torch.tensor(0.3, dtype=dtype).float())


def test_beta_in_double_precision() -> None:
    exact = torch.tensor(0.3, dtype=torch.float64)
    assert torch.equal(fastelbo.ELBOLoss(exact).beta, exact)
    assert torch.equal(linear(beta=0.3, dtype=torch.float64).beta, exact)
    assert fastelbo.ELBOLoss(exact).half().beta.dtype == torch.float64
    module = fastelbo.ELBOLoss().double()
    module.beta = 0.3
    assert torch.equal(module.beta, exact)


def test_state_dicts_without_beta_load() -> None:
    """Of older versions, where beta was a plain attribute, and of a torch.nn.Linear."""
    model = nn.Sequential(fastelbo.ELBOLoss(0.25, learned=True))
    model.load_state_dict({"0.recon_logvar": torch.tensor(1.5)})
    assert (model[0].beta.item(), model[0].recon_logvar.item()) == (0.25, 1.5)
    layer, module = nn.Linear(2, 3), linear(beta=0.25)
    module.load_state_dict(layer.state_dict())
    assert torch.equal(module.weight, layer.weight)
    assert module.beta.item() == 0.25
    with pytest.raises(RuntimeError, match="recon_logvar"):
        model.load_state_dict({"0.beta": torch.tensor(1.0)})


@each_backend
def test_beta_at_the_call(backend: Backend) -> None:
    args = batch(backend)
    loss = fastelbo.ELBOLoss(0.3, impl=backend.impl).to(backend.device)
    same(loss(*args, beta=0.0), truth(args, beta=0.0))
    same(loss(*args, beta=2), truth(args, beta=2.0))
    same(loss(*args), truth(args, beta=0.3))
    each = torch.tensor([0.0, 1.0, 2.0, 0.5], device=backend.device, requires_grad=True)
    (found,) = torch.autograd.grad(loss(*args, beta=each), each)
    kl = fastelbo.gaussian_kl(*args[2:])
    torch.testing.assert_close(found, kl / 4, rtol=2e-6, atol=0)

    x, mu, logvar = (torch.randn(s, device=backend.device) for s in ((4, 3), (4, 2), (4, 2)))
    layer = linear(beta=0.3, impl=backend.impl).to(backend.device)
    options = {"seed": 1, "impl": backend.impl}
    for beta in (None, 0.0, 2.0):
        expected = fastelbo.linear_elbo_loss(
            x, mu, logvar, layer.weight, layer.bias, beta=0.3 if beta is None else beta, **options
        )  # fmt: skip
        torch.testing.assert_close(layer(x, mu, logvar, beta=beta, seed=1), expected, rtol=1e-6, atol=0)


@each_backend
def test_backward_has_the_beta_of_its_forward(backend: Backend) -> None:
    """Here backward computes from the inputs: a second time, or in float16, where forward writes no gradients."""
    args = batch(backend)
    halves = [a.detach().half().requires_grad_() for a in args]
    loss = fastelbo.ELBOLoss(1.0, impl=backend.impl).to(backend.device)
    for tensors in (args, halves):
        loss.beta = 1.0
        out = loss(*tensors)
        first = torch.autograd.grad(out, tensors, retain_graph=True)
        loss.beta = 100.0
        second = torch.autograd.grad(out, tensors)
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-6)


def test_beta_of_functional_call() -> None:
    args = [torch.randn(s) for s in ((4, 3), (4, 3), (4, 2), (4, 2))]
    loss = fastelbo.ELBOLoss(0.3)
    slope = torch.func.grad(lambda beta: torch.func.functional_call(loss, {"beta": beta}, tuple(args)))(torch.tensor(0.5))
    torch.testing.assert_close(slope, fastelbo.gaussian_kl(*args[2:]).mean())
    assert torch.equal(loss.beta, torch.tensor(0.3))


def test_a_scheduled_beta_compiles_once() -> None:
    args = [torch.randn(s) for s in ((4, 3), (4, 3), (4, 2), (4, 2))]
    loss, counter = fastelbo.ELBOLoss(0.3, learned=True), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for beta in (0.0, 0.1, 0.7, 2, torch.tensor(0.5)):
        loss.beta = beta
        torch.testing.assert_close(compiled(*args), loss(*args))
    assert counter.frame_count == 1

    def step(beta: torch.Tensor) -> Any:
        loss.beta = beta
        return loss(*args)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(torch.tensor(0.2)), loss(*args, beta=0.2))
    assert torch.equal(loss.beta, torch.tensor(0.2))


# ---- what is refused when a module is built --------------------------------------------------------------------------------------

LOSSES: list[Any] = [fastelbo.ELBOLoss, linear]
OF_LOSSES: list[tuple[str, Any, type[Exception], str]] = [
    ("beta", "1", TypeError, "beta must be a number or a tensor, got str"),
    ("beta", None, TypeError, "beta must be a number or a tensor, got NoneType"),
    ("beta", True, TypeError, "beta must be a number or a tensor, got bool"),
    ("beta", torch.ones(3), ValueError, "beta must be a number or a real tensor of shape (), (1,)"),
    ("beta", torch.ones(1, 1), ValueError, "beta must be a number or a real tensor of shape (), (1,)"),
    ("beta", torch.tensor(1j), ValueError, "beta must be a number or a real tensor of shape (), (1,)"),
    ("beta", nn.Parameter(torch.tensor(1.0)), ValueError, "beta requires grad"),
    ("recon_logvar", "1", TypeError, "recon_logvar must be a number or a torch.Tensor, got str"),
    ("recon_logvar", True, TypeError, "recon_logvar must be a number or a torch.Tensor, got bool"),
    ("recon_logvar", torch.tensor(1), TypeError, "recon_logvar must be float16, bfloat16, float32 or float64, got torch.int64"),
    ("recon_logvar", torch.ones((), requires_grad=True), ValueError, "recon_logvar requires grad"),
    ("reduction", "avg", ValueError, "reduction must be one of 'none', 'batchmean', 'sum', 'mean', got 'avg'"),
    ("reduction", None, ValueError, "reduction must be one of 'none', 'batchmean', 'sum', 'mean', got None"),
    ("impl", "cuda", ValueError, "impl must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"),
    ("impl", 3, ValueError, "impl must be one of 'auto', 'triton', 'torch', 'reference', got 3"),
    ("return_terms", "no", TypeError, "return_terms must be a bool, got str"),
    ("return_terms", None, TypeError, "return_terms must be a bool, got NoneType"),
    ("full", 1, TypeError, "full must be a bool, got int"),
    ("learned", torch.ones(3), TypeError, "learned must be a bool, got Tensor"),
]
SAMPLES: list[tuple[str, Any, type[Exception], str]] = [
    ("num_samples", 0, ValueError, "num_samples must be at least 1, got 0"),
    ("num_samples", 1.5, TypeError, "num_samples must be an int, got float"),
    ("num_samples", True, TypeError, "num_samples must be an int, got bool"),
]
REFUSED: list[tuple[Any, str, Any, type[Exception], str]] = [
    *((build, *case) for build in LOSSES for case in OF_LOSSES),
    (fastelbo.ELBOLoss, "logvar_clamp", 3.0, TypeError, "logvar_clamp must be a pair (lo, hi) of numbers"),
    (fastelbo.ELBOLoss, "logvar_clamp", (1.0, "2"), TypeError, "logvar_clamp must be a pair (lo, hi) of numbers"),
    (fastelbo.ELBOLoss, "logvar_clamp", (1.0, 0.0), ValueError, "logvar_clamp must be (lo, hi) with lo <= hi, got (1.0, 0.0)"),
    *((build, *case) for build in (fastelbo.Reparameterize, linear) for case in SAMPLES),
    (linear, "precision", "fp8", ValueError, "precision must be one of None, 'ieee', 'tf32', 'tf32x3', got 'fp8'"),
    (linear, "recon_logvar", torch.ones(4), ValueError, "recon_logvar has shape (4,), which does not broadcast"),
    (linear, "recon_logvar", torch.ones(1, 3), ValueError, "recon_logvar has shape (1, 3), expected one value"),
    (fastelbo.Reparameterize, "impl", "cuda", ValueError, "impl must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"),
    (fastelbo.Reparameterize, "seed", 0.5, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
    (fastelbo.Reparameterize, "seed", 2**64, ValueError, "seed must lie in [-2**63, 2**64)"),
    (fastelbo.Reparameterize, "seed", torch.ones(2), TypeError, "seed must be an int or a 0-d int64 tensor, got a torch.float32"),
    (fastelbo.GaussianNLLLoss, "reduction", "batchmean", ValueError, "batchmean is not valid"),
    (fastelbo.GaussianNLLLoss, "reduction", None, ValueError, "None is not valid"),
    (fastelbo.GaussianNLLLoss, "eps", "1e-6", TypeError, "eps must be a number, got str"),
    (fastelbo.GaussianNLLLoss, "eps", None, TypeError, "eps must be a number, got NoneType"),
    (fastelbo.GaussianNLLLoss, "eps", -1.0, ValueError, "eps must not be negative, got -1.0"),
]


@pytest.mark.parametrize(
    ("build", "name", "value", "error", "message"), REFUSED, ids=[f"{case[0].__name__}-{case[1]}-{case[2]}" for case in REFUSED]
)
def test_a_bad_value_fails_when_the_module_is_built(
    build: Any, name: str, value: Any, error: type[Exception], message: str
) -> None:  # fmt: skip
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        build(**{name: value})


@pytest.mark.parametrize("value", ["1", None, True, torch.ones(3), nn.Parameter(torch.tensor(1.0))], ids=str)
def test_a_bad_beta_is_not_assigned(value: Any) -> None:
    module = fastelbo.ELBOLoss(0.5)
    with pytest.raises((TypeError, ValueError), match=r"^beta "):
        module.beta = value
    assert module.beta.item() == 0.5


def test_numbers_of_numpy_are_numbers() -> None:
    module = fastelbo.ELBOLoss(np.float64(0.5), recon_logvar=np.float32(0.25), logvar_clamp=(np.float32(-1), None))
    assert (module.beta.item(), module.recon_logvar) == (0.5, 0.25)
    assert fastelbo.Reparameterize(np.int64(2), seed=np.int64(7)).num_samples == 2
    assert fastelbo.GaussianNLLLoss(eps=np.float32(0.5)).eps == 0.5


# ---- Reparameterize --------------------------------------------------------------------------------------------------------------


@each_backend
def test_reparameterize_module(backend: Backend) -> None:
    _, _, mu, logvar = batch(backend)
    for samples in (None, 3):
        sample = fastelbo.Reparameterize(samples, impl=backend.impl)
        eps = torch.randn((4, 2) if samples is None else (3, 4, 2), device=backend.device)
        same(sample(mu, logvar, eps=eps), (mu + torch.exp(logvar / 2) * eps).detach().cpu())
        assert torch.equal(sample(mu, logvar, seed=1), sample(mu, logvar, seed=1))
        sample.eval()
        z = sample(mu, logvar)
        assert torch.equal(z, mu if samples is None else mu.expand(3, 4, 2))
        (g,) = torch.autograd.grad(z.sum(), mu)
        assert torch.equal(g, torch.full_like(mu, samples or 1))
    assert not list(fastelbo.Reparameterize().parameters())
    assert fastelbo.Reparameterize().state_dict() == {}


def draws(sample: fastelbo.Reparameterize, calls: int, device: torch.device | None = None) -> torch.Tensor:
    """The noise of so many calls."""
    zero = torch.zeros(4, 50, device=device)
    return torch.stack([sample(zero, zero) for _ in range(calls)])


@each_backend
def test_a_seed_names_a_sequence(backend: Backend) -> None:
    first, again, other = (fastelbo.Reparameterize(seed=s, impl=backend.impl).to(backend.device) for s in (7, 7, 8))
    noise = draws(first, 5, backend.device)
    assert torch.equal(draws(again, 5, backend.device), noise)
    # No two calls of the ten repeat each other's noise, whichever module made them.
    calls = torch.cat([noise, draws(other, 5, backend.device)]).flatten(1)
    assert torch.corrcoef(calls).fill_diagonal_(0).abs().max() < 0.4
    assert calls.mean().abs() < 0.1
    assert abs(calls.std() - 1) < 0.1
    assert first.counter is not None
    assert first.counter.item() == 5
    samples = fastelbo.Reparameterize(3, seed=7, impl=backend.impl).to(backend.device)
    assert draws(samples, 2, backend.device).shape == (2, 3, 4, 50)


def test_the_sequence_stays() -> None:
    """Of a seed, over versions: runs are resumed with them."""
    for seed in (7, torch.tensor(7)):
        sample = fastelbo.Reparameterize(seed=seed)
        for call in range(3):
            expected = fastelbo.noise.philox_normal((4, 50), 1606183886791375402 + call)
            assert torch.equal(draws(sample, 1)[0], expected)
    # An int counts modulo 2**64, as it does for the functions.
    assert torch.equal(draws(fastelbo.Reparameterize(seed=-1), 1), draws(fastelbo.Reparameterize(seed=2**64 - 1), 1))


def test_a_resumed_run_has_the_noise_it_would_have_had() -> None:
    sample = nn.Sequential(fastelbo.Reparameterize(seed=7))
    draws(sample[0], 3)
    saved = copy.deepcopy(sample.state_dict())
    assert set(saved) == {"0.counter"}
    expected = draws(sample[0], 3)
    resumed = nn.Sequential(fastelbo.Reparameterize(seed=7))
    resumed.load_state_dict(saved)
    assert torch.equal(draws(resumed[0], 3), expected)
    # A state_dict of a run without a seed leaves the counter where it is.
    resumed.load_state_dict({})
    assert resumed[0].counter.item() == 6
    assert resumed.half()[0].counter.dtype == torch.int64


def test_what_does_not_advance_the_sequence() -> None:
    mu, logvar = torch.randn(4, 2), torch.randn(4, 2)
    sample = fastelbo.Reparameterize(seed=7)
    expected = draws(fastelbo.Reparameterize(seed=7), 1)
    sample.eval()
    assert torch.equal(sample(mu, logvar), mu)
    sample.train()
    assert torch.equal(sample(mu, logvar, seed=1), fastelbo.reparameterize(mu, logvar, seed=1))
    sample(mu, logvar, eps=torch.zeros(4, 2))
    sample(mu, logvar, generator=torch.Generator())
    with pytest.raises(ValueError, match="logvar"):
        sample(mu, logvar[:2])
    assert sample.counter is not None
    assert sample.counter.item() == 0
    assert torch.equal(draws(sample, 1), expected)


def test_backward_has_the_noise_of_its_forward() -> None:
    sample = fastelbo.Reparameterize(seed=7)
    mu, logvar = torch.zeros(4, 50, requires_grad=True), torch.zeros(4, 50, requires_grad=True)
    first = sample(mu, logvar)
    second = sample(mu, logvar)
    for z in (first, second):
        (found,) = torch.autograd.grad(z.sum(), logvar)
        torch.testing.assert_close(found, z.detach() / 2)


def test_a_sequence_is_not_computed_again() -> None:
    """Checkpointing would go on with other noise than forward had, and its gradients would be wrong."""
    mu, logvar = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    sample = fastelbo.Reparameterize(seed=7)
    z = checkpoint(sample, mu, logvar, use_reentrant=False)
    with pytest.raises(RuntimeError, match="checkpoint"):
        z.sum().backward()
    checkpoint(sample, mu, logvar, seed=3, use_reentrant=False).sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_sequence_under_compile(compiler: str) -> None:
    expected = draws(fastelbo.Reparameterize(seed=7), 3)
    sample, counter = fastelbo.Reparameterize(seed=7), CompileCounterWithBackend(compiler)
    found = draws(torch.compile(sample, fullgraph=True, backend=counter), 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert sample.counter is not None
    assert sample.counter.item() == 3
    assert counter.frame_count == 1


@each_backend
def test_a_training_step(backend: Backend) -> None:
    """A VAE of two linear layers, once with the loss as users write it and once fused: the same loss and the same gradients."""
    torch.manual_seed(1)
    encoder, decoder = nn.Linear(15, 8).to(backend.device), nn.Linear(4, 15).to(backend.device)
    x = torch.rand(6, 15, device=backend.device)
    eps = torch.randn(6, 4, device=backend.device)
    found = []
    for fused in (False, True):
        mu, logvar = encoder(x).chunk(2, 1)
        if fused:
            recon = decoder(fastelbo.Reparameterize(impl=backend.impl)(mu, logvar, eps=eps))
            # mse + KL, both summed and over the batch: the ELBO at a variance of 1/2, except for its constant.
            loss = fastelbo.elbo_loss(recon, x, mu, logvar, recon_logvar=-0.6931471805599453, full=False, impl=backend.impl)
            loss = loss + 0.5 * 15 * 0.6931471805599453
        else:
            recon = decoder(mu + torch.exp(0.5 * logvar) * eps)
            loss = (F.mse_loss(recon, x, reduction="sum") - 0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())) / len(x)
        parameters = [*encoder.parameters(), *decoder.parameters()]
        found.append((loss.detach(), torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


# ---- sgvb_loss: what tests/test_estimators.py does not say -----------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
@each_backend
def test_sgvb_calls_the_decoder_once(backend: Backend, samples: int) -> None:
    shapes: list[Any] = []

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 15)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(z.shape))
            return self.linear(z).view(-1, 3, 5)

    decoder = Decoder().to(backend.device)
    _, x, mu, logvar = batch(backend)
    loss = fastelbo.sgvb_loss(decoder, x, mu, logvar, num_samples=samples, seed=6, impl=backend.impl)
    assert shapes == [(samples * 4, 2)]
    eps = fastelbo.noise.philox_normal((samples, 4, 2), 6).to(backend.device)
    recon = decoder((mu + torch.exp(logvar / 2) * eps).flatten(0, 1)).view(samples, 4, 3, 5)
    want = torch.stack([fastelbo.elbo_loss(r, x, mu, logvar, impl=backend.impl) for r in recon]).mean()
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=0)
    got = torch.autograd.grad(loss, [mu, logvar, x, *decoder.parameters()])
    expected = torch.autograd.grad(want, [mu, logvar, x, *decoder.parameters()])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@each_backend
def test_sgvb_default_noise_is_the_callers_generator(backend: Backend) -> None:
    _, x, mu, logvar = batch(backend)

    def once(**noise: Any) -> torch.Tensor:
        return fastelbo.sgvb_loss(lambda z: z.sum(-1)[:, None, None].expand(-1, 3, 5), x, mu, logvar, impl=backend.impl, **noise)

    torch.manual_seed(3)
    first = once()
    second = once()
    torch.manual_seed(3)
    assert torch.equal(first, once())
    assert not torch.equal(first, second)
    generators = [torch.Generator(backend.device).manual_seed(8) for _ in range(2)]
    assert torch.equal(once(generator=generators[0]), once(generator=generators[1]))


# ---- effective_beta --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [1.0, 0.5, 0.1])
@pytest.mark.parametrize(("of_squares", "of_kl"), list(itertools.product(["mean", "batchmean", "sum"], repeat=2)))
def test_effective_beta_is_the_beta_of_the_loss(of_squares: str, of_kl: str, variance: float) -> None:
    """`mse + w * KL` and the ELBO at that beta and variance have gradients that differ by one factor only."""
    torch.manual_seed(2)
    b, d, j, w = 4, 15, 3, 0.3
    recon, x = (torch.randn(b, d, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mu, logvar = (torch.randn(b, j, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def reduced(total: torch.Tensor, how: str, per_sample: int) -> torch.Tensor:
        return total / {"sum": 1, "batchmean": b, "mean": b * per_sample}[how]

    squares = reduced(((recon - x) ** 2).sum(), of_squares, d)
    kl = reduced(-0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(), of_kl, j)
    users = torch.autograd.grad(squares + w * kl, [recon, x, mu, logvar])
    beta = fastelbo.effective_beta(
        w, elements=d, latents=j, recon_reduction=of_squares, kl_reduction=of_kl, variance=variance, batch_size=b
    )
    loss = fastelbo.elbo_loss(
        recon, x, mu, logvar, recon_logvar=float(torch.tensor(variance, dtype=torch.float64).log()), beta=beta
    )
    ours = torch.autograd.grad(loss, [recon, x, mu, logvar])
    factor = users[0][0, 0] / ours[0][0, 0]
    for u, o in zip(users, ours, strict=True):
        torch.testing.assert_close(u, factor * o, rtol=1e-9, atol=1e-12)


def test_effective_beta_known_cases() -> None:
    """DESIGN's two: mean-MSE is beta = w D / 2 at variance 1; sum-MSE + KL is the ELBO itself at variance 1/2."""
    assert fastelbo.effective_beta(0.01, elements=784) == pytest.approx(3.92)
    assert fastelbo.effective_beta(1.0, elements=784, recon_reduction="sum", kl_reduction="sum", variance=0.5) == pytest.approx(1.0)
    assert fastelbo.effective_beta(1.0, elements=784, recon_reduction="batchmean", variance=0.5) == pytest.approx(1.0)
    assert fastelbo.effective_beta(1.0, elements=100, latents=10, kl_reduction="mean") == pytest.approx(5.0)
