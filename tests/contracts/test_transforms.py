"""Transforms: torch.func, forward-mode differentiation, batched gradients, compiled autograd; each equals what a loop gives.

What a kernel or an `autograd.Function` cannot serve, the library hands over to the reference expression by itself. On a backend
that is forced with impl= too: nobody has to know about the hand-over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CPU, TORCH, TRITON, Backend, draw
from settings import FUNCTIONS, arguments
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vmap

import fastelbo

EACH = pytest.mark.parametrize("backend", [TORCH, TRITON])
LINEAR = {
    "linear_gaussian_nll": (
        lambda i, h, w, x, b: fastelbo.linear_gaussian_nll(h, w, x, b, logvar=-0.2, impl=i),
        [(4, 3), (5, 3), (4, 5), (5,)],
    ),
    "linear_elbo_loss": (
        lambda i, x, m, s, w: fastelbo.linear_elbo_loss(x, m, s, w, seed=3, num_samples=2, impl=i),
        [(4, 5), (4, 3), (4, 3), (5, 3)],
    ),
}
NAMES = [*FUNCTIONS, *LINEAR, "gaussian_nll_loss"]


def function(name: str, backend: Backend) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of tensors that returns a number, and float64 inputs."""
    if name == "gaussian_nll_loss":
        shapes = [("recon", (4, 3)), ("x", (4, 3)), ("var", (4, 1))]
        generator = torch.Generator().manual_seed(3)
        inputs = [draw(n, shape, generator).to(backend.device) for n, shape in shapes]
        return lambda r, x, v: fastelbo.gaussian_nll_loss(r, x, v), inputs
    if name in LINEAR:
        fn, linear_shapes = LINEAR[name]
        generator = torch.Generator().manual_seed(3)
        inputs = [draw("", shape, generator).to(backend.device) for shape in linear_shapes]
    else:
        fn, names = FUNCTIONS[name]
        inputs = [t.detach() for t in arguments(names, backend.device)]

    def total(*tensors: Tensor) -> Tensor:
        out = fn(backend.impl, *tensors)
        return sum(((k + 1) * o.sum() for k, o in enumerate(out)), start=torch.zeros(())) if isinstance(out, tuple) else out.sum()

    return total, inputs


def gradients(fn: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """By an ordinary backward pass."""
    own = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(fn(*own), own)


def stacked(inputs: list[Tensor]) -> list[Tensor]:
    return [torch.stack([t, 1.1 * t, 0.9 * t]) for t in inputs]


def bound(name: str) -> dict[str, float]:
    """Noise from a seed is float32's, and rounds otherwise in operations that a transform can see."""
    seeded = name.startswith(("reparameterize", "DiagonalGaussian", "sgvb_loss", "linear_elbo_loss"))
    return {"rtol": 2e-6, "atol": 2e-6} if seeded else {"rtol": 1e-9, "atol": 1e-11}


def assert_all_close(got: Any, want: Any, name: str = "") -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **bound(name))


@pytest.mark.parametrize("name", NAMES)
@EACH
def test_grad(backend: Backend, name: str) -> None:
    fn, inputs = function(name, backend)
    found, value = grad_and_value(fn, argnums=tuple(range(len(inputs))))(*inputs)
    assert_all_close([*found, value], [*gradients(fn, inputs), fn(*inputs)], name)


@pytest.mark.parametrize("name", NAMES)
@EACH
def test_vmap_and_vmap_of_grad(backend: Backend, name: str) -> None:
    fn, inputs = function(name, backend)
    many = stacked(inputs)
    each = [[t[i] for t in many] for i in range(3)]
    assert_all_close([vmap(fn)(*many)], [torch.stack([fn(*t) for t in each])], name)
    found = vmap(grad(fn, argnums=tuple(range(len(inputs)))))(*many)
    want = [torch.stack(g) for g in zip(*(gradients(fn, t) for t in each), strict=True)]
    assert_all_close(found, want, name)


@pytest.mark.parametrize("name", NAMES)
@EACH
def test_forward_mode(backend: Backend, name: str) -> None:
    """jvp, and dual tensors without torch.func, of inputs that require grad and of those that do not."""
    fn, inputs = function(name, backend)
    tangents = [torch.cos(7 * t) for t in inputs]
    want = sum((g * t).sum() for g, t in zip(gradients(fn, inputs), tangents, strict=True))
    value, found = jvp(fn, tuple(inputs), tuple(tangents))
    assert_all_close([found, value], [want, fn(*inputs)], name)
    for needs in (False, True):
        own = [t.detach().clone().requires_grad_(needs) for t in inputs]
        with forward_ad.dual_level():
            out = fn(*(forward_ad.make_dual(t, u) for t, u in zip(own, tangents, strict=True)))
            assert_all_close([forward_ad.unpack_dual(out).tangent], [want], name)


@pytest.mark.parametrize("name", NAMES)
@EACH
def test_jacobians_and_hessian(backend: Backend, name: str) -> None:
    fn, inputs = function(name, backend)
    for jacobian in (jacrev, jacfwd):
        assert_all_close(jacobian(fn, argnums=tuple(range(len(inputs))))(*inputs), gradients(fn, inputs), name)
    first = inputs[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(fn(first, *inputs[1:]), first, create_graph=True)
    zero = torch.zeros_like(first)  # where the function is linear
    rows = [torch.autograd.grad(s, first, retain_graph=True)[0] if s.requires_grad else zero for s in slope.flatten()]
    assert_all_close([hessian(fn)(*inputs)], [torch.stack(rows).view(first.shape * 2)], name)


@pytest.mark.parametrize("name", list(FUNCTIONS))
@EACH
def test_batched_gradients(backend: Backend, name: str) -> None:
    fn, names = FUNCTIONS[name]
    inputs = arguments(names, backend.device)
    out = fn(backend.impl, *inputs)
    outs = out if isinstance(out, tuple) else (out,)
    ups = [torch.stack([torch.cos(k + torch.arange(o.numel(), dtype=o.dtype).view(o.shape)) for k in range(3)]) for o in outs]
    ups = [u.to(backend.device) for u in ups]
    found = torch.autograd.grad(outs, inputs, ups, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(outs, inputs, [u[k] for u in ups], retain_graph=True) for k in range(3)]
    assert_all_close(found, [torch.stack(g) for g in zip(*each, strict=True)], name)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_double_backward_of_every_subset_of_inputs(name: str) -> None:
    """Where only one term's inputs require grad the other term has no gradient, and that is no error."""
    fn, names = FUNCTIONS[name]
    inputs = arguments(names, CPU)
    for subset in itertools.chain.from_iterable(itertools.combinations(range(len(inputs)), n) for n in range(1, len(inputs))):
        own = [t.detach().requires_grad_(i in subset) for i, t in enumerate(inputs)]
        asked = [own[i] for i in subset]

        def of_subset(*given: Tensor, own: Any = own, subset: Any = subset) -> Any:
            each = iter(given)
            return fn("torch", *(next(each) if i in subset else t for i, t in enumerate(own)))

        out = of_subset(*asked)
        ups = [torch.ones_like(o) for o in (out if isinstance(out, tuple) else (out,))]
        assert gradgradcheck(of_subset, asked, [u.requires_grad_() for u in ups], fast_mode=True), subset


class SmallVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, -1)
        z, kl = fastelbo.reparameterize_kl(mu, logvar, eps=eps, reduction="sum")
        return fastelbo.gaussian_nll(torch.tanh(self.decoder(z)), x, reduction="sum") + kl


def test_gradients_of_each_sample_of_a_small_vae() -> None:
    model, x, eps = SmallVAE().double(), torch.randn(5, 1, 6).double(), torch.randn(5, 1, 2).double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    found = vmap(grad(lambda p, x, eps: functional_call(model, p, (x, eps))), in_dims=(None, 0, 0))(parameters, x, eps)
    for i in range(5):
        want = torch.autograd.grad(model(x[i], eps[i]), list(model.parameters()))
        assert_all_close([found[n][i] for n in parameters], want)


def test_noise_that_vmap_draws() -> None:
    """Other noise in each call with randomness="different", and torch's own error without."""
    mu, logvar = torch.zeros(4, 3), torch.zeros(4, 3)
    z = vmap(fastelbo.reparameterize, randomness="different")(mu, logvar)
    assert len(z.unique()) == 12
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(fastelbo.reparameterize)(mu, logvar)


@pytest.mark.parametrize("name", ["elbo_loss", "gaussian_nll", "gaussian_kl-prior", "reparameterize_kl", "DiagonalGaussian"])
def test_compiled_autograd(name: str) -> None:
    fn, names = FUNCTIONS[name]
    want_of = arguments(names, CPU)
    got_of = [t.detach().clone().requires_grad_() for t in want_of]

    def total(inputs: list[Tensor]) -> Tensor:
        out = fn("torch", *inputs)
        return sum((o.sum() for o in out), start=torch.zeros(())) if isinstance(out, tuple) else out.sum()

    total(want_of).backward()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        total(got_of).backward()
    assert_all_close([t.grad for t in got_of], [t.grad for t in want_of], name)
