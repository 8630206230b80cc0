"""Gradients under the uses that real code makes of them: twice, in part, scaled, by row, under no_grad, through checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CPU,
    OPS,
    TORCH,
    Backend,
    Values,
    assert_close,
    broadcast_shape,
    draw,
    each_backend,
    leaves,
    make,
    run,
    slow_loss,
)
from torch.autograd import gradcheck, gradgradcheck

import fastelbo

NAMES = ("recon", "x", "recon_logvar", "mu", "logvar", "prior_mu", "prior_logvar")


def elbo(v: Values, impl: str, **options: Any) -> Any:
    return fastelbo.elbo_loss(*_positional(v), **_keywords(v), impl=impl, **options)


def slow_elbo(v: Values, **options: Any) -> torch.Tensor:
    return slow_loss(*_positional(v), **_keywords(v), **options)


def _positional(v: Values) -> list[torch.Tensor]:
    return [v[n] for n in ("recon", "x", "mu", "logvar")]


def _keywords(v: Values) -> Values:
    return {n: v[n] for n in ("recon_logvar", "prior_mu", "prior_logvar") if n in v}


def elbo_inputs(dtype: torch.dtype = torch.float32, names: tuple[str, ...] = NAMES, **patterns: str) -> Values:
    return {n: t.to(dtype) for n, t in make(names, "chunk1", seed=11, **patterns).items()}


def expected(v: Values, upstream: Any = 1.0, wanted: Any = None, **options: Any) -> Values:
    """The true gradients of elbo_loss."""
    truth = leaves(v, wanted, dtype=torch.float64)
    return run(lambda t: slow_elbo(t, **options), truth, [torch.as_tensor(upstream, dtype=torch.float64).cpu()])[1]


def assert_grads(grads: Values, want: Values, what: str = "", **bars: Any) -> None:
    assert set(grads) == set(want)
    for name, g in want.items():
        assert_close(grads[name], g, f"{what} gradient of {name}", scale=float(g.abs().max()) + 1, **bars)


# ---- finite differences ----------------------------------------------------------------------------------------------------------


def functions() -> dict[str, tuple[Callable[..., Any], list[str]]]:
    """Every function and form of variance as a function of its tensors, with what to draw for them."""
    two, latent = ["recon", "x"], ["mu", "logvar"]
    out: dict[str, Any] = {
        "reparameterize": (lambda i, m, s: fastelbo.reparameterize(m, s, seed=1, impl=i), latent),
        "reparameterize-samples": (lambda i, m, s: fastelbo.reparameterize(m, s, 2, seed=1, impl=i), latent),
        "reparameterize_kl": (lambda i, m, s: fastelbo.reparameterize_kl(m, s, seed=1, reduction="batchmean", impl=i), latent),
        "reparameterize_kl-clamp": (
            lambda i, m, s: fastelbo.reparameterize_kl(m, s, seed=1, logvar_clamp=(-0.4, 0.3), impl=i),
            latent,
        ),
        "gaussian_kl": (lambda i, m, s: fastelbo.gaussian_kl(m, s, impl=i), latent),
        "gaussian_kl-prior": (
            lambda i, m, s, p, q: fastelbo.gaussian_kl(m, s, p, q, reduction="mean", impl=i),
            [*latent, "mu:dim", "logvar:0d"],
        ),
        "gaussian_nll": (lambda i, r, x: fastelbo.gaussian_nll(r, x, impl=i), two),
        "DiagonalGaussian": (
            lambda i, m: fastelbo.DiagonalGaussian.from_moments(m, impl=i).rsample_kl(seed=2),
            ["moments"],
        ),
        "elbo_terms": (
            lambda i, r, x, v, m, s: fastelbo.elbo_terms(r, x, m, s, recon_logvar=v, reduction="none", impl=i),
            [*two, "logvar:dim", *latent],
        ),
        "elbo_loss": (
            lambda i, r, x, v, m, s, p: fastelbo.elbo_loss(r, x, m, s, recon_logvar=v, prior_mu=p, beta=0.7, impl=i),
            [*two, "logvar:0d", *latent, "mu:dim"],
        ),
        "elbo_loss-none": (
            lambda i, r, x, m, s: fastelbo.elbo_loss(r, x, m, s, recon_logvar=-0.3, beta=0.7, reduction="none", impl=i),
            [*two, *latent],
        ),
        "sgvb_loss": (
            lambda i, x, m, s: fastelbo.sgvb_loss(torch.tanh, x, m, s, num_samples=2, seed=3, recon_logvar=0.2, impl=i),
            ["x", *latent],
        ),
    }  # fmt: skip
    for form, pattern in itertools.product(("logvar", "std", "var"), ("0d", "channel", "dim", "sample", "element", "float")):
        weight = torch.tensor([[1.0, 0.0, 2.0]])
        if pattern == "float":
            out[f"gaussian_nll-{form}-float"] = (
                lambda i, r, x, form=form: fastelbo.gaussian_nll(r, x, **{form: 0.6}, reduction="mean", impl=i),
                two,
            )
        else:
            out[f"gaussian_nll-{form}-{pattern}"] = (
                lambda i, r, x, v, form=form, weight=weight: fastelbo.gaussian_nll(
                    r, x, **{form: v}, weight=weight.to(r.device), impl=i
                ),
                [*two, f"{form}:{pattern}"],
            )
    return out


FUNCTIONS = functions()


def arguments(names: list[str], device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    out = []
    for name in names:
        name, _, pattern = name.partition(":")
        shape = (2, 6) if name == "moments" else broadcast_shape(pattern or "element", (2, 3))
        out.append((draw(name, shape, generator) * (1.0 if name in ("std", "var") else 0.7)).to(device).requires_grad_())
    return out


@pytest.mark.parametrize("name", list(FUNCTIONS))
@each_backend
def test_gradcheck(backend: Backend, name: str) -> None:
    fn, names = FUNCTIONS[name]
    # The fast mode checks a random projection of the Jacobian: two evaluations where the interpreter makes each one slow.
    assert gradcheck(lambda *t: fn(backend.impl, *t), arguments(names, backend.device), fast_mode=backend.truncates)


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("backend", [TORCH])
def test_gradgradcheck(backend: Backend, name: str) -> None:
    """Double backward goes through the reference whatever the backend, so that one backend will do."""
    fn, names = FUNCTIONS[name]
    assert gradgradcheck(lambda *t: fn(backend.impl, *t), arguments(names, backend.device))


@pytest.mark.parametrize("name", list(FUNCTIONS))
@each_backend
def test_create_graph_gives_the_same_first_derivative(backend: Backend, name: str) -> None:
    fn, names = FUNCTIONS[name]
    inputs = [t.detach().float().requires_grad_() for t in arguments(names, backend.device)]

    def grads(create_graph: bool) -> Any:
        out = fn(backend.impl, *inputs)
        total = sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()
        return torch.autograd.grad(3 * total, inputs, create_graph=create_graph)

    for name_, plain, graphed in zip(names, grads(False), grads(True), strict=True):
        torch.testing.assert_close(graphed, plain, rtol=1e-5, atol=1e-5, msg=lambda m, n=name_: f"{n}: {m}")


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


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_retain_graph_for_every_op(backend: Backend, name: str) -> None:
    """A second backward of the same graph with three times the upstream gives three times the gradient."""
    op = OPS[name]
    v = leaves(make(op.names, "columns", seed=5), device=backend.device)
    outs = op.fast(v, backend.impl)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    asked = [t for t in v.values() if t.requires_grad]
    first = torch.autograd.grad(outs, asked, [torch.ones_like(o) for o in outs], retain_graph=True)
    second = torch.autograd.grad(outs, asked, [torch.full_like(o, 3.0) for o in outs])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, 3 * a, rtol=1e-5, atol=1e-6)


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


def _upstreams(n: int, device: torch.device) -> dict[str, torch.Tensor]:
    base = torch.linspace(-1.5, 2.0, 2 * n, device=device)
    return {
        "rows": base[:n],
        "stride 0": torch.tensor(0.75, device=device).expand(n),
        "strided": base[::2],
        "reversed copy": base.flip(0)[:n],
        "offset": base[1 : n + 1],
    }


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if "reduction" in op.options])
@each_backend
def test_upstream_layouts(backend: Backend, name: str) -> None:
    op = OPS[name]
    values = make(op.names, "chunk1", seed=8)
    for kind, up in _upstreams(values[op.names[0]].shape[0], backend.device).items():
        v, truth = leaves(values, device=backend.device), leaves(values, dtype=torch.float64)
        pick = (lambda o: o[-1]) if op.returns_z else (lambda o: o)
        outs = pick(op.fast(v, backend.impl, reduction="none"))
        count = len(outs) if isinstance(outs, tuple) else 1
        grads = run(lambda t: pick(op.fast(t, backend.impl, reduction="none")), v, [up] * count)[1]  # noqa: B023
        want = run(lambda t: pick(op.slow(t, reduction="none")), truth, [up.double().cpu()] * count)[1]  # noqa: B023
        assert_grads({n: grads[n] for n in want}, want, f"{kind}:")


@each_backend
def test_elementwise_upstream_layouts(backend: Backend) -> None:
    """With nothing summed the upstream gradient is as large as recon: transposed, expanded, sliced."""
    values = make(("recon", "x", "logvar"), "contiguous", seed=8)
    shape = values["recon"].shape
    wide = torch.randn(shape[0], 2 * shape[1], device=backend.device)
    for up in (wide[:, ::2], wide[:, : shape[1]], wide[:1, : shape[1]].expand(shape), wide[:, :1].expand(shape),
               wide[:, : shape[1]].t().contiguous().t()):  # fmt: skip
        v, truth = leaves(values, device=backend.device), leaves(values, dtype=torch.float64)
        for fast, slow in (
            (
                lambda t: fastelbo.gaussian_nll(t["recon"], t["x"], logvar=t["logvar"], batch_dims=2, impl=backend.impl),
                lambda t: OPS["gaussian_nll_logvar"].slow(t, batch_dims=2),
            ),
            (
                lambda t: fastelbo.gaussian_kl(t["recon"], t["logvar"], t["x"], batch_dims=2, impl=backend.impl),
                lambda t: OPS["gaussian_kl_prior"].slow(
                    {"mu": t["recon"], "logvar": t["logvar"], "prior_mu": t["x"], "prior_logvar": 0 * t["x"]}, batch_dims=2
                ),
            ),
            (
                lambda t: fastelbo.reparameterize(t["recon"], t["logvar"], eps=t["x"].detach(), impl=backend.impl) + 0 * t["x"],
                lambda t: (
                    OPS["reparameterize"].slow({"mu": t["recon"], "logvar": t["logvar"], "eps": t["x"].detach()}) + 0 * t["x"]
                ),
            ),
        ):
            assert_grads(run(fast, v, [up])[1], run(slow, truth, [up.double().cpu()])[1], f"strides {up.stride()}:")


@each_backend
def test_sum_and_expand_then_backward(backend: Backend) -> None:
    values = elbo_inputs()
    v = leaves(values, device=backend.device)
    elbo(v, backend.impl, reduction="none").sum().backward()
    assert_grads({n: t.grad for n, t in v.items()}, expected(values, reduction="sum"))
    v = leaves(values, device=backend.device)
    elbo(v, backend.impl).expand(5).sum().backward()
    assert_grads({n: t.grad for n, t in v.items()}, expected(values, 5.0))


@each_backend
def test_loss_scaling_does_not_underflow(backend: Backend) -> None:
    """GradScaler multiplies by 65536 in backward: a float16 gradient rounded before that would be 0."""
    shape = (64, 40) if backend.impl == "triton" and backend.device == CPU else (64, 3000)
    g = torch.Generator().manual_seed(2)
    values = {n: (1e-3 * draw(n, shape, g)).half() for n in ("recon", "x")} | {
        n: draw(n, (64, 4), g).half() for n in ("mu", "logvar")
    }
    for reduction in ("mean", "batchmean", "sum", "none"):
        v, truth = leaves(values, device=backend.device), leaves(values, dtype=torch.float64)
        scale = 65536.0 if reduction in ("mean", "batchmean") else 2.0
        loss = fastelbo.elbo_loss(*v.values(), reduction=reduction, impl=backend.impl)
        (scale * loss).sum().backward()
        want = run(lambda t: scale * slow_loss(*t.values(), reduction=reduction), truth)[1]  # noqa: B023
        for n in v:
            assert_close(v[n].grad, want[n], f"{reduction} {n}", dtype=torch.float16)
            assert bool((v[n].grad != 0).any())


@each_backend
def test_amp_grad_scaler_and_autocast(backend: Backend) -> None:
    """Autocast changes what the decoder returns, not what the loss does with it."""
    values = elbo_inputs(names=("recon", "x", "mu", "logvar"))
    v = leaves(values, device=backend.device)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        loss = elbo(v, backend.impl)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, list(v.values()))
    assert_grads(dict(zip(v, grads, strict=True)), expected(values))


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


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_each_input_alone(backend: Backend, name: str) -> None:
    op = OPS[name]
    values = make(op.names, "columns", seed=5)
    every = run(lambda t: op.fast(t, backend.impl), leaves(values, device=backend.device))[1]
    for n in every:
        alone = run(lambda t: op.fast(t, backend.impl), leaves(values, [n], backend.device))[1]
        assert set(alone) == {n}
        torch.testing.assert_close(alone[n], every[n], rtol=1e-6, atol=1e-6)


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


@each_backend
def test_terms_are_differentiable_apart(backend: Backend) -> None:
    values = elbo_inputs()
    for reduction in ("batchmean", "none"):
        v = leaves(values, device=backend.device)
        nll, kl = fastelbo.elbo_terms(*_positional(v), **_keywords(v), reduction=reduction, impl=backend.impl)
        of_nll = torch.autograd.grad(nll.sum(), list(v.values()), retain_graph=True, allow_unused=True)
        of_kl = torch.autograd.grad(kl.sum(), list(v.values()), allow_unused=True)
        for n, a, b in zip(v, of_nll, of_kl, strict=True):
            mine, other = (a, b) if n in ("recon", "x", "recon_logvar") else (b, a)
            assert other is None, f"the other term has a gradient for {n}"
            want = expected(values, torch.ones(nll.shape), beta=1.0, reduction=reduction)[n]
            assert_close(mine, want, n, scale=float(want.abs().max()) + 1)


@each_backend
def test_returned_terms_are_detached_and_right(backend: Backend) -> None:
    values = elbo_inputs()
    for reduction in ("batchmean", "none", "mean", "sum"):
        v = leaves(values, device=backend.device)
        loss, nll, kl = elbo(v, backend.impl, beta=0.25, reduction=reduction, return_terms=True)
        assert loss.requires_grad
        assert not nll.requires_grad
        assert not kl.requires_grad
        torch.testing.assert_close(loss.detach(), nll + 0.25 * kl, rtol=1e-6, atol=0)
        want = fastelbo.elbo_terms(*_positional(v), **_keywords(v), reduction=reduction, impl=backend.impl)
        torch.testing.assert_close((nll, kl), tuple(w.detach() for w in want), rtol=1e-6, atol=0)


# ---- the caller's memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_inputs_are_never_written(backend: Backend, name: str) -> None:
    op = OPS[name]
    v = leaves(make((*op.names, "weight"), "chunk1", seed=5), device=backend.device)
    options = {"weight": v["weight"]} if "weight" in op.options else {}
    before = {n: (t.detach().clone(), t._version) for n, t in v.items()}
    outs = op.fast(v, backend.impl, **options)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    ups = [torch.randn_like(o) for o in outs]
    copies = [u.clone() for u in ups]
    torch.autograd.backward(outs, ups, retain_graph=True)
    torch.autograd.grad(outs, [t for t in v.values() if t.requires_grad], ups, create_graph=True)
    for n, (value, version) in before.items():
        assert torch.equal(v[n].detach(), value), n
        assert v[n]._version == version, n
    for u, copy in zip(ups, copies, strict=True):
        assert torch.equal(u, copy), "an upstream gradient was written to"


@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_an_input_changed_before_backward(backend: Backend, name: str) -> None:
    """An error, or the gradient of the values that went in; never one of the values that are there now."""
    op = OPS[name]
    values = make((*op.names, "weight"), "chunk1", seed=5)
    for changed in values if "weight" in op.options else op.names:
        options = {"weight": None} if "weight" in op.options else {}
        v = leaves(values, device=backend.device)
        inputs = {n: t * 1 if t.requires_grad else t for n, t in v.items()}

        def call(t: Values, options: Any = options) -> list[torch.Tensor]:
            outs = op.fast(t, backend.impl, **{k: t[k] for k in options})
            return list(outs) if isinstance(outs, tuple) else [outs]

        asked = [t for t in v.values() if t.requires_grad and t is not v["weight"]]
        want = torch.autograd.grad(sum(o.sum() for o in call(inputs)), asked, retain_graph=True, allow_unused=True)
        outs = call(inputs)
        with torch.no_grad():
            inputs[changed].mul_(-3).add_(1)
        try:
            got = torch.autograd.grad(sum(o.sum() for o in outs), asked, allow_unused=True)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017 (no error is right too)
        else:
            for g, w in zip(got, want, strict=True):
                assert (g is None) == (w is None)
                assert g is None or torch.equal(g, w), f"{changed} was changed, and the gradient follows the new values"


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


@each_backend
def test_the_same_tensor_twice(backend: Backend) -> None:
    """recon is x; mu is the prior's mu; everything is one tensor: each place adds its own gradient."""
    t = make(["recon", "x", "mu", "logvar"], "contiguous", seed=6)
    aliases: list[Callable[[Values], tuple[Any, dict[str, Any]]]] = [
        lambda v: ((v["recon"], v["recon"], v["mu"], v["logvar"]), {}),
        lambda v: ((v["recon"], v["x"], v["mu"], v["mu"]), {}),
        lambda v: ((v["recon"], v["x"], v["mu"], v["logvar"]), {"prior_mu": v["mu"], "prior_logvar": v["logvar"]}),
        lambda v: ((v["recon"], v["x"], v["recon"], v["x"]), {"recon_logvar": v["x"], "prior_mu": v["x"]}),
        lambda v: ((v["mu"],) * 4, {"recon_logvar": v["mu"], "prior_mu": v["mu"], "prior_logvar": v["mu"]}),
    ]
    for reduction, arrange in itertools.product(("batchmean", "none"), aliases):
        v, truth = leaves(t, device=backend.device), leaves(t, dtype=torch.float64)
        args, options = arrange(v)
        want_args, want_options = arrange(truth)
        loss = fastelbo.elbo_loss(*args, **options, reduction=reduction, impl=backend.impl)
        want = slow_loss(*want_args, **want_options, reduction=reduction)
        assert_close(loss, want, "loss", scale=float(want.detach().abs().max()) + t["mu"].numel())
        for create_graph in (False, True):
            got = torch.autograd.grad(loss.sum(), list(v.values()), allow_unused=True, retain_graph=True, create_graph=create_graph)
            true = torch.autograd.grad(want.sum(), list(truth.values()), allow_unused=True, retain_graph=True)
            for n, g, w in zip(v, got, true, strict=True):
                assert (g is None) == (w is None), n
                if w is not None:
                    assert_close(g, w, n, scale=float(w.abs().max()) + 10)


@each_backend
def test_halves_of_one_tensor_by_hand(backend: Backend) -> None:
    """moments.chunk(2, 1) by the caller: autograd puts the two gradients together."""
    moments = torch.randn(3, 8, 2, 5, device=backend.device, requires_grad=True)
    mu, logvar = moments.chunk(2, 1)
    fastelbo.gaussian_kl(mu, logvar, reduction="sum", impl=backend.impl).backward()
    m, s = moments.detach().double().chunk(2, 1)
    assert_close(moments.grad, torch.cat([m, 0.5 * torch.expm1(s)], 1), "moments")


# ---- checkpoints, hooks, accumulation --------------------------------------------------------------------------------------------


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


@each_backend
def test_backward_in_another_thread(backend: Backend) -> None:
    from concurrent.futures import ThreadPoolExecutor

    values = elbo_inputs()
    v = leaves(values, device=backend.device)
    loss = elbo(v, backend.impl)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert_grads({n: t.grad for n, t in v.items()}, expected(values))


# ---- what once crashed -----------------------------------------------------------------------------------------------------------


@each_backend
def test_only_the_sample_in_the_loss(backend: Backend) -> None:
    """A learned prior gets nothing from z."""
    mu, logvar, prior_mu, prior_logvar = (torch.randn(3, 5).to(backend.device).requires_grad_() for _ in range(4))
    z, _ = fastelbo.reparameterize_kl(mu, logvar, prior_mu, prior_logvar, seed=1, impl=backend.impl)
    z.sum().backward()
    assert torch.equal(mu.grad, torch.ones_like(mu))
    assert prior_mu.grad is None or not prior_mu.grad.any()
    assert prior_logvar.grad is None or not prior_logvar.grad.any()


@pytest.mark.parametrize("value", [-75.0, 75.0])
@each_backend
def test_one_extreme_learned_log_variance(backend: Backend, value: float) -> None:
    recon, x = (torch.randn(3, 5).to(backend.device) for _ in range(2))
    logvar = torch.tensor(value, device=backend.device, requires_grad=True)
    wide = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    fastelbo.gaussian_nll(recon, x, logvar=logvar, reduction="sum", impl=backend.impl).backward()
    fastelbo.gaussian_nll(recon.cpu().double(), x.cpu().double(), logvar=wide, reduction="sum", impl="reference").backward()
    torch.testing.assert_close(logvar.grad.cpu().double(), wide.grad, rtol=1e-5, atol=0)
