"""Gradients of `elbo_loss` as real code uses them: twice, in part, scaled, under no_grad, through checkpoints."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import Backend, Values, assert_close, each_backend, leaves, run
from settings import assert_grads
from test_elbo import NAMES, elbo, elbo_inputs, expected, slow_elbo

import fastelbo

# ---- more than one backward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("reduction", ["batchmean", "none", "mean", "sum"])
@each_backend
def test_retain_graph_with_two_upstreams(backend: Backend, reduction: str, dtype: torch.dtype) -> None:
    values = elbo_inputs(dtype)
    v = leaves(values, device=backend.device)
    loss = elbo(v, backend.impl, beta=0.5, reduction=reduction)
    kept: list[tuple[Values, Values]] = []
    for k, retain in ((1.0, True), (-2.5, True), (0.0, True), (0.125, False)):
        ups = torch.full_like(loss, k) if loss.ndim == 0 else k * torch.arange(1.0, 1 + len(loss), device=backend.device).to(loss)
        grads = dict(zip(v, torch.autograd.grad(loss, list(v.values()), ups, retain_graph=retain), strict=True))
        assert_grads(grads, expected(values, ups.double(), beta=0.5, reduction=reduction), f"upstream {k}:")
        kept.append((grads, {n: g.clone() for n, g in grads.items()}))
    # A later backward neither writes into what an earlier one handed out nor shares memory with it.
    for grads, copies in kept:
        for n, g in grads.items():
            assert torch.equal(g, copies[n]), f"the gradient of {n} changed under its owner"
    pointers = [g.data_ptr() for grads, _ in kept for g in grads.values()]
    assert len(set(pointers)) == len(pointers)


@each_backend
def test_one_input_then_all(backend: Backend) -> None:
    """Adaptive loss weights: autograd.grad of the last layer, graph retained, then the full backward."""
    values = elbo_inputs()
    for first in NAMES:
        v = leaves(values, device=backend.device)
        loss = elbo(v, backend.impl, beta=0.5)
        (alone,) = torch.autograd.grad(loss, v[first], retain_graph=True)
        copy = alone.clone()
        (2 * loss).backward()
        assert_close(alone, expected(values, beta=0.5)[first], first)
        assert torch.equal(alone, copy)
        assert_grads({n: t.grad for n, t in v.items()}, expected(values, 2.0, beta=0.5))


@each_backend
def test_plain_then_create_graph_and_back(backend: Backend) -> None:
    values = elbo_inputs()
    want = expected(values)
    for order in itertools.permutations([True, False, True], 3):
        v = leaves(values, device=backend.device)
        loss = elbo(v, backend.impl)
        for create_graph in order:
            grads = torch.autograd.grad(loss, list(v.values()), retain_graph=True, create_graph=create_graph)
            assert_grads(dict(zip(v, grads, strict=True)), want, f"create_graph={create_graph}:")


@each_backend
def test_a_second_backward_without_the_graph_is_an_error(backend: Backend) -> None:
    v = leaves(elbo_inputs(), device=backend.device)
    loss = elbo(v, backend.impl)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@each_backend
def test_third_derivative_and_a_gradient_penalty(backend: Backend) -> None:
    """The norm of a gradient in a loss, as WGAN-GP and score matching have it; and once more."""
    v = leaves(elbo_inputs(torch.float64), device=backend.device)
    truth = leaves(elbo_inputs(torch.float64))

    def penalty(loss: torch.Tensor, t: Values) -> list[Any]:
        first = torch.autograd.grad(loss, list(t.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(t.values()), create_graph=True)
        return list(torch.autograd.grad(sum(g.sin().sum() for g in second), list(t.values())))

    for name, g, w in zip(v, penalty(elbo(v, backend.impl, beta=0.4), v), penalty(slow_elbo(truth, beta=0.4), truth), strict=True):
        assert_close(g, w, name, rtol=1e-10)


# ---- upstream gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [1.0, -1.0, 0.0, 3.0, 1e-30, 1e20, math.nan])
@each_backend
def test_scalar_upstream(backend: Backend, upstream: float) -> None:
    values = elbo_inputs()
    v = leaves(values, device=backend.device)
    grads = run(lambda t: elbo(t, backend.impl), v, [torch.tensor(upstream, device=backend.device)])[1]
    want = {n: g.float().double() for n, g in expected(values, upstream).items()}
    for n, g in grads.items():
        assert_close(g, want[n], n, scale=None if not math.isfinite(upstream) else float(want[n].abs().max()) + abs(upstream))


@each_backend
def test_sum_and_expand_then_backward(backend: Backend) -> None:
    values = elbo_inputs()
    v = leaves(values, device=backend.device)
    elbo(v, backend.impl, reduction="none").sum().backward()
    assert_grads({n: t.grad for n, t in v.items()}, expected(values, reduction="sum"))
    v = leaves(values, device=backend.device)
    elbo(v, backend.impl).expand(5).sum().backward()
    assert_grads({n: t.grad for n, t in v.items()}, expected(values, 5.0))


# ---- which gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@each_backend
def test_every_subset_of_inputs(backend: Backend, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients asked for are the same whoever else is asked; the rest is None, and nothing is computed for it."""
    values = elbo_inputs(recon_logvar="channel")
    every = run(lambda t: elbo(t, backend.impl, reduction=reduction), leaves(values, device=backend.device))[1]
    seen: list[tuple[bool, ...]] = []
    forward = backend.ops().elbo.forward

    def spy(inputs: Any, spec: Any, needs: Any) -> Any:
        outputs, kept = forward(inputs, spec, needs)
        seen.append(tuple(needs))
        assert [g is not None for g in kept] == list(needs)
        return outputs, kept

    backend.replace(monkeypatch, "elbo", forward=spy)
    subsets = [s for k in range(1, len(NAMES)) for s in itertools.combinations(NAMES, k)]
    if backend.impl == "triton":
        subsets = subsets[::6]
    for subset in subsets:
        v = leaves(values, subset, backend.device)
        elbo(v, backend.impl, reduction=reduction).sum().backward()
        for n, t in v.items():
            if n not in subset:
                assert t.grad is None, (subset, n)
            elif n in ("recon_logvar", "prior_mu", "prior_logvar"):
                torch.testing.assert_close(t.grad, every[n], rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(t.grad, every[n]), (subset, n)
        if reduction == "batchmean":
            order = ("recon", "x", "recon_logvar", "mu", "logvar", "prior_mu", "prior_logvar")
            assert seen[-1] == tuple(n in subset for n in order)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "nothing requires grad"])
@each_backend
def test_no_gradients_without_grad_mode(backend: Backend, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = elbo_inputs()
    want = elbo(leaves(values, device=backend.device), backend.impl).detach()
    needed: list[Any] = []
    forward = backend.ops().elbo.forward
    backend.replace(monkeypatch, "elbo", forward=lambda *a: needed.append((a[-1], (out := forward(*a))[1])) or out)
    v = leaves(values, [] if mode == "nothing requires grad" else None, backend.device)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        loss = elbo(v, backend.impl)
        terms = elbo(v, backend.impl, return_terms=True)
        rows = elbo(v, backend.impl, reduction="none")
    assert not loss.requires_grad
    assert not rows.requires_grad
    assert torch.equal(loss, want)
    assert torch.equal(terms[0], want)
    assert needed
    for needs, grads in needed:
        assert not any(needs)
        assert grads is None


@each_backend
def test_inference_tensors_are_accepted(backend: Backend) -> None:
    with torch.inference_mode():
        v = leaves(elbo_inputs(), [], backend.device)
        v = {n: t + 0 for n, t in v.items()}
        loss = elbo(v, backend.impl)
        z, kl = fastelbo.reparameterize_kl(v["mu"], v["logvar"], seed=1, impl=backend.impl)
    want = elbo({n: t.clone() for n, t in v.items()}, backend.impl)
    torch.testing.assert_close(loss.clone(), want, rtol=0, atol=0)
    assert bool(z.isfinite().all())
    assert bool((kl > 0).all())


# ---- checkpoints, hooks, accumulation --------------------------------------------------------------------------------------------


@each_backend
def test_gradients_share_no_memory(backend: Backend) -> None:
    """What backward hands out belongs to the caller: clipping one in place must not touch another, or an input."""
    for beta in (1.0, 0.5):
        v = leaves(elbo_inputs(), device=backend.device)
        elbo(v, backend.impl, beta=beta).backward()
        owned = [t.grad for t in v.values()] + [t.detach() for t in v.values()]
        for i, t in enumerate(owned):
            if i >= len(v):
                break
            copies = [o.clone() for o in owned]
            t.add_(1)
            for j, (o, copy) in enumerate(zip(owned, copies, strict=True)):
                assert j == i or torch.equal(o, copy)


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_backend
def test_checkpoint(backend: Backend, use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    values = elbo_inputs()
    for reduction in ("batchmean", "none"):
        v = leaves(values, device=backend.device)

        def call(*t: torch.Tensor, reduction: str = reduction) -> torch.Tensor:
            return elbo(dict(zip(NAMES, t, strict=True)), backend.impl, beta=0.5, reduction=reduction)

        loss = checkpoint(call, *v.values(), use_reentrant=use_reentrant)
        (2 * loss).sum().backward()
        up = 2.0 if reduction == "batchmean" else torch.full((3,), 2.0)
        assert_grads({n: t.grad for n, t in v.items()}, expected(values, up, beta=0.5, reduction=reduction))


@each_backend
def test_saved_tensor_hooks(backend: Backend) -> None:
    """Off-loading to the CPU, as FSDP does: what backward needs goes through the hooks."""
    values = elbo_inputs()
    v = leaves(values, device=backend.device)
    with torch.autograd.graph.save_on_cpu():
        loss = elbo(v, backend.impl, reduction="none")
    loss.sum().backward()
    assert_grads({n: t.grad for n, t in v.items()}, expected(values, reduction="sum"))


@each_backend
def test_accumulation(backend: Backend) -> None:
    """Two micro-batches add up, and the first one's buffers are not the second one's."""
    values = elbo_inputs()
    v = leaves(values, device=backend.device)
    for k in (0.5, 2.0):
        elbo(v, backend.impl, beta=k).backward()
    a, b = expected(values, beta=0.5), expected(values, beta=2.0)
    assert_grads({n: t.grad for n, t in v.items()}, {n: a[n] + b[n] for n in a})


@each_backend
def test_backward_in_another_thread(backend: Backend) -> None:
    from concurrent.futures import ThreadPoolExecutor

    values = elbo_inputs()
    v = leaves(values, device=backend.device)
    loss = elbo(v, backend.impl)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert_grads({n: t.grad for n, t in v.items()}, expected(values))
