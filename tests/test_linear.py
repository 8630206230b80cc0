"""Losses across a linear decoder: against the float64 oracle and against the path that has the reconstruction in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CPU, HALVES, Backend, accumulated, assert_close, each_backend, run, slow_kl, slow_nll, slow_sample
from cases import leaves as leaves_of
from torch import Tensor

import fastelbo
from fastelbo.eager import linear as torch_tiles

# (batch, elements, latents): one of each, none a multiple of a tile, several tiles of rows and of columns, and odd thousands.
SIZES = [(1, 1, 1), (1, 1, 37), (1, 37, 1), (37, 1, 1), (5, 7, 3), (33, 131, 17), (64, 128, 32), (130, 257, 40)]
LARGE = [(3, 5001, 20), (4501, 301, 5), (1031, 1501, 33), (70, 333, 1025)]
# For time, the interpreter gets fewer rows: still several tiles of them, and the tests of launches have walks that are split.
FEWER = {(4501, 301, 5): (901, 301, 5), (1031, 1501, 33): (131, 1501, 33)}
VARIANCES = ["unit", "number", "scalar", "element"]


def inputs(
    size: tuple[int, int, int], var: str = "element", dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Of a size that a trained layer has: each column of recon is about as large as x."""
    batch, elements, latents = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    values = {
        "x": draw(batch, elements), "mu": draw(batch, latents), "logvar": draw(batch, latents, scale=0.3),
        "weight": draw(elements, latents, scale=max(1, latents) ** -0.5), "bias": draw(elements),
    }  # fmt: skip
    if var in ("scalar", "element"):
        values["recon_logvar"] = draw(*(() if var == "scalar" else (elements,)), scale=0.5)
    return values


def leaves(values: dict[str, Tensor], wanted: Iterable[str] | None = None, *args: Any, **options: Any) -> dict[str, Tensor]:
    """All of them require grad unless told otherwise: here `weight` is the layer's."""
    return leaves_of(values, list(values) if wanted is None else wanted, *args, **options)


def fused(v: dict[str, Tensor], impl: str, var: str, **options: Any) -> Any:
    recon_logvar = v.get("recon_logvar", 0.3 if var == "number" else None)
    return fastelbo.linear_elbo_loss(
        v["x"], v["mu"], v["logvar"], v["weight"], v.get("bias"), recon_logvar=recon_logvar, impl=impl, **options
    )


def oracle(
    v: dict[str, Tensor], var: str, eps: Tensor, reduction: str = "batchmean", beta: float = 1.0, rounded: Tensor | None = None
) -> Tensor:
    """The paper's estimator, sample by sample. `rounded` is z in mu's dtype, whose value and not whose gradient is meant."""
    total: Any = 0.0
    samples = eps if eps.ndim == 3 else eps.unsqueeze(0)
    for i, noise in enumerate(samples):
        z = slow_sample(v["mu"], v["logvar"], noise)
        z = z if rounded is None else z + (rounded.double().view(len(samples), *z.shape)[i] - z.detach())
        recon = z @ v["weight"].T + v.get("bias", 0.0)
        total = total + slow_nll(recon, v["x"], logvar=v.get("recon_logvar", 0.3 if var == "number" else None), reduction=reduction)
    return total / len(samples) + beta * slow_kl(v["mu"], v["logvar"], reduction=reduction)


def sizes_of(v: dict[str, Tensor]) -> dict[str, Tensor]:
    """Magnitudes of what a product adds up, by whose square root a float32 sum of either sign is off."""
    z = v["mu"].abs() + 2 * torch.exp(0.5 * v["logvar"])
    slope = z @ v["weight"].abs().T + v["x"].abs() + (v["bias"].abs() if "bias" in v else 0.0)
    slope = slope * torch.exp(-v["recon_logvar"] if "recon_logvar" in v else torch.zeros(()))
    of_z, batch = slope @ v["weight"].abs(), len(v["x"])
    return {"mu": of_z / batch, "logvar": of_z / batch, "weight": slope.T @ z / batch, "bias": slope.sum(0) / batch}


def check(
    backend: Backend, size: tuple[int, int, int], var: str, dtype: torch.dtype, *, bias: bool = True, samples: int | None = None,
    reduction: str = "batchmean", precision: str | None = None,
) -> None:  # fmt: skip
    values = inputs(size, var, dtype)
    if not bias:
        del values["bias"]
    shape = values["mu"].shape if samples is None else (samples, *values["mu"].shape)
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    options = {"reduction": reduction, "beta": 0.7}
    wide = leaves(values, dtype=torch.float64)
    up = torch.randn(size[0], generator=torch.Generator().manual_seed(8)) if reduction == "none" else torch.ones(())
    own = leaves(values, device=backend.device)
    given = {"eps": eps.to(backend.device), "num_samples": samples, "precision": precision}
    with torch.no_grad():
        z = fastelbo.reparameterize(own["mu"], own["logvar"], samples, eps=given["eps"], impl=backend.impl).cpu()
    rounded = z if dtype in HALVES else None
    (want,), truths = run(lambda v: oracle(v, var, eps.double(), rounded=rounded, **options), wide, [up.double()])
    (got,), grads = run(lambda v: fused(v, backend.impl, var, **given, **options), own, [up.to(backend.device)])
    acc = accumulated(*values.values())
    assert got.dtype == acc
    # Float32 products of a few hundred numbers of either sign are off by their square root; over thousands of rows, by twice that.
    rtol = 1e-12 if acc == torch.float64 else 3e-6 if size[0] < 2000 else 6e-6
    # In half precision the gradient of z is rounded before the KL's is added, as it is without fusing. The kernels also round the
    # residuals, one of either sign for each element of x, as operands of products.
    coarse = ("mu", "logvar", "weight") if backend.impl == "triton" else ("mu", "logvar")
    assert_close(got, want, "loss", rtol=rtol)
    sizes = sizes_of({n: t.detach() for n, t in wide.items()})
    share = {"none": size[0], "batchmean": 1.0, "sum": size[0], "mean": 1.0 / size[1]}[reduction]
    for name, truth in truths.items():
        scale = share * sizes[name] * float(up.abs().max()) / (1 + math.isqrt(size[0])) if name in sizes else None
        own_rtol = torch.finfo(dtype).eps if dtype in HALVES and name in coarse else rtol
        assert_close(
            grads[name], truth, f"the gradient of {name}", dtype=dtype, rtol=own_rtol, scale=scale, truncates=backend.truncates
        )


@each_backend
@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_variances(backend: Backend, size: tuple[int, int, int], var: str) -> None:
    check(backend, size, var, torch.float32)


@each_backend
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_odd_thousands(backend: Backend, size: tuple[int, int, int], reduction: str) -> None:
    if backend.impl == "triton" and backend.device.type == "cpu":
        if reduction == "none":
            pytest.skip("for time: smaller sizes go through the same tiles")
        size = FEWER.get(size, size)
    check(backend, size, "element", torch.float32, reduction=reduction)


@each_backend
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_reductions_and_samples(backend: Backend, reduction: str, samples: int | None, bias: bool) -> None:
    check(backend, (9, 41, 6), "scalar", torch.float32, reduction=reduction, samples=samples, bias=bias)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_dtypes(backend: Backend, dtype: torch.dtype, reduction: str) -> None:
    check(backend, (12, 65, 16), "element", dtype, reduction=reduction)


@each_backend
@pytest.mark.parametrize("of_x", [torch.bfloat16, torch.float64])
def test_mixed_dtypes(backend: Backend, of_x: torch.dtype) -> None:
    """Each gradient has its input's dtype, and the loss is float32 unless something is float64."""
    v = inputs((6, 20, 4))
    v = {n: t.to(d) for (n, t), d in zip(v.items(), [of_x, torch.float32, torch.float16, *[torch.float32] * 3], strict=True)}
    own = leaves(v, device=backend.device)
    with fastelbo.verify():  # sees what the backend returns, before autograd casts it
        loss = fused(own, backend.impl, "element", eps=torch.zeros_like(own["mu"]))
        loss.backward()
    assert loss.dtype == (torch.float64 if of_x == torch.float64 else torch.float32)
    assert all(t.grad is not None and t.grad.dtype == t.dtype and t.grad.isfinite().all() for t in own.values())


@each_backend
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("samples", [None, 2])
def test_a_seed_gives_the_loss_of_the_unfused_path(backend: Backend, reduction: str, samples: int | None) -> None:
    v = {n: t.to(backend.device) for n, t in inputs((33, 130, 12)).items()}
    loss, nll, kl = fused(v, backend.impl, "element", seed=5, num_samples=samples, reduction=reduction, return_terms=True)
    z, other_kl = fastelbo.reparameterize_kl(
        v["mu"], v["logvar"], seed=5, num_samples=samples, reduction=reduction, impl=backend.impl
    )
    recon = F.linear(z, v["weight"], v["bias"])
    plain = fastelbo.gaussian_nll(
        recon, v["x"].expand_as(recon), logvar=v["recon_logvar"], reduction=reduction, batch_dims=1 if samples is None else 2,
        impl=backend.impl,
    )  # fmt: skip
    if reduction == "none" and samples is not None:
        plain = plain.mean(0)
    torch.testing.assert_close(kl, other_kl, rtol=0, atol=0)
    torch.testing.assert_close(nll, plain, rtol=2e-6, atol=0)
    torch.testing.assert_close(loss, plain + other_kl, rtol=2e-6, atol=0)


@each_backend
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_any_hidden_layer(backend: Backend, reduction: str) -> None:
    """`linear_gaussian_nll` is `gaussian_nll` of the layer's output, x's gradient included."""
    v = leaves(inputs((17, 50, 9)), ("x", "mu", "weight", "bias", "recon_logvar"), backend.device)
    nll = fastelbo.linear_gaussian_nll(
        v["mu"], v["weight"], v["x"], v["bias"], logvar=v["recon_logvar"], reduction=reduction, impl=backend.impl
    )
    wide = leaves(inputs((17, 50, 9)), ("x", "mu", "weight", "bias", "recon_logvar"), dtype=torch.float64)
    recon = F.linear(wide["mu"], wide["weight"], wide["bias"])
    truth = slow_nll(recon, wide["x"], logvar=wide["recon_logvar"], reduction=reduction)
    assert_close(nll, truth, "nll")
    nll.sum().backward()
    truth.sum().backward()
    for name in ("x", "mu", "weight", "bias", "recon_logvar"):
        assert_close(v[name].grad, wide[name].grad, name, dtype=torch.float32, rtol=3e-6)


@each_backend
@pytest.mark.parametrize("full", [True, False])
def test_the_constant(backend: Backend, full: bool) -> None:
    v = {n: t.to(backend.device) for n, t in inputs((4, 10, 3)).items()}
    args = v["mu"], v["weight"], v["x"], v["bias"]
    nll = fastelbo.linear_gaussian_nll(*args, full=full, impl=backend.impl)
    square = 0.5 * ((v["x"] - F.linear(v["mu"], v["weight"], v["bias"])) ** 2).sum(1)
    torch.testing.assert_close(nll, square + (5 * math.log(2 * math.pi) if full else 0.0), rtol=1e-5, atol=1e-5)


@each_backend
def test_strides(backend: Backend) -> None:
    """Slices and transposes are read as they lie, and give what their copies give."""
    whole = {n: t.to(backend.device) for n, t in inputs((12, 40, 6)).items()}
    eps = torch.randn(12, 6, device=backend.device)
    odd = {
        "x": whole["x"].T.contiguous().T, "mu": torch.cat([whole["mu"]] * 2, 1)[:, :6], "logvar": whole["logvar"].expand(12, 6),
        "weight": torch.cat([whole["weight"]] * 3, 1)[:, 6:12], "bias": whole["bias"].repeat_interleave(2)[::2],
        "recon_logvar": whole["recon_logvar"],
    }  # fmt: skip
    results = []
    for values in (whole, odd):
        own = {n: t.detach().requires_grad_() for n, t in values.items()}
        loss = fused(own, backend.impl, "element", eps=eps)
        results.append((loss, torch.autograd.grad(loss, list(own.values()))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("var", VARIANCES)
def test_double_backward(backend: Backend, var: str) -> None:
    v = leaves(inputs((3, 5, 2), var), dtype=torch.float64, device=backend.device)
    eps = torch.randn(3, 2, dtype=torch.float64, device=backend.device)
    names = list(v)

    def loss(*tensors: Tensor) -> Tensor:
        return fused(dict(zip(names, tensors, strict=True)), backend.impl, var, eps=eps, reduction="none", beta=0.5)

    assert torch.autograd.gradcheck(loss, tuple(v.values()), fast_mode=backend.truncates)
    assert torch.autograd.gradgradcheck(loss, tuple(v.values()), fast_mode=backend.truncates)


@each_backend
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_backward_twice_and_upstream_gradients(backend: Backend, reduction: str) -> None:
    """The first backward hands over what forward wrote, later ones recompute: both are right, for any upstream gradient."""
    values = inputs((10, 30, 4))
    eps = torch.randn(10, 4)
    truth = leaves(values, dtype=torch.float64)
    wanted = torch.autograd.grad(oracle(truth, "element", eps.double(), reduction).sum(), list(truth.values()))
    v = leaves(values, device=backend.device)
    loss = fused(v, backend.impl, "element", eps=eps.to(backend.device), reduction=reduction)
    (alone,) = torch.autograd.grad(loss.sum(), v["weight"], retain_graph=True)
    assert_close(alone, wanted[3], "weight alone")
    for factor in (1.0, -2.5):
        grads = torch.autograd.grad(loss, list(v.values()), torch.full_like(loss, factor), retain_graph=True)
        for name, g, want in zip(v, grads, wanted, strict=True):
            assert_close(g, factor * want, name, rtol=3e-6)


@each_backend
def test_only_what_is_asked_for(backend: Backend) -> None:
    values = inputs((8, 20, 3))
    eps = torch.randn(8, 3, device=backend.device)
    every = leaves(values, device=backend.device)
    fused(every, backend.impl, "element", eps=eps).backward()
    for name in values:
        v = leaves(values, (name,), backend.device)
        fused(v, backend.impl, "element", eps=eps).backward()
        assert all((t.grad is not None) == (n == name) for n, t in v.items())
        torch.testing.assert_close(v[name].grad, every[name].grad, rtol=1e-6, atol=1e-6)


@each_backend
def test_without_gradients(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad and inference_mode nothing is computed for a backward, and inputs are not written to."""
    v = leaves(inputs((8, 20, 3)), device=backend.device)
    before = {n: t.detach().clone() for n, t in v.items()}
    forward, seen = backend.ops().linear_elbo.forward, []

    def spy(inputs: Any, spec: Any, needs: tuple[bool, ...]) -> Any:
        outputs, kept = forward(inputs, spec, needs)
        seen.append((any(needs), kept))
        return outputs, kept

    backend.replace(monkeypatch, "linear_elbo", forward=spy)
    with torch.no_grad():
        fused(v, backend.impl, "element", seed=1)
    with torch.inference_mode():
        fused(v, backend.impl, "element", seed=1)
    assert seen == [(False, None)] * 2
    fused(v, backend.impl, "element", seed=1).backward()
    assert all(torch.equal(t.detach(), before[n]) for n, t in v.items())


@each_backend
def test_half_precision_gradients_survive_small_scales(backend: Backend) -> None:
    """A float16 gradient of a mean is written when GradScaler's factor is known, not before, where it would underflow."""
    v = leaves(inputs((64, 128, 4), dtype=torch.float16), ("mu", "weight"), backend.device)
    loss = fused(v, backend.impl, "element", eps=torch.zeros_like(v["mu"]), reduction="mean") * 65536.0
    loss.backward()
    assert float((v["weight"].grad != 0).float().mean()) > 0.99


@each_backend
def test_a_float16_gradient_beside_float32_survives_small_scales(backend: Backend) -> None:
    values = inputs((64, 512, 4)) | {"logvar": torch.full((64, 4), -20.0, dtype=torch.float16)}
    v = leaves(values, ("mu", "logvar"), backend.device)
    eps = torch.randn(64, 4, device=backend.device)
    (fused(v, backend.impl, "element", eps=eps, reduction="mean", beta=0.0) * 65536.0).backward()
    assert float((v["logvar"].grad != 0).float().mean()) > 0.99


@each_backend
def test_empty(backend: Backend) -> None:
    for size in ((0, 5, 3), (4, 0, 3)):
        v = leaves(inputs(size, "scalar"), device=backend.device)
        loss = fused(v, backend.impl, "scalar", seed=0, reduction="sum")
        loss.backward()
        assert float(loss) == pytest.approx(float(slow_kl(v["mu"], v["logvar"], reduction="sum")), rel=1e-6)
        assert all(t.grad is not None and not t.grad.isnan().any() for t in v.values())


REDUCTIONS = ["none", "batchmean", "sum", "mean"]


@each_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 3)], ids=str)
def test_empty_is_what_the_equations_give(backend: Backend, size: tuple[int, int, int], reduction: str) -> None:
    """Values and gradients of both functions, NaN for the mean of nothing included."""

    def results(impl: str) -> list[Tensor]:
        v = leaves(inputs(size), device=backend.device)
        eps = torch.zeros(2, *v["mu"].shape, device=backend.device)
        elbo = fused(v, impl, "element", eps=eps, num_samples=2, reduction=reduction)
        nll = fastelbo.linear_gaussian_nll(
            v["mu"], v["weight"], v["x"], v["bias"], logvar=v["recon_logvar"], reduction=reduction, impl=impl
        )
        of_nll = [t for n, t in v.items() if n != "logvar"]
        return [
            elbo.detach(), nll.detach(), *torch.autograd.grad(elbo.sum(), list(v.values())), *torch.autograd.grad(nll.sum(), of_nll)
        ]  # fmt: skip

    for got, want in zip(results(backend.impl), results("reference"), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@each_backend
def test_repeatable(backend: Backend) -> None:
    v = leaves(inputs((40, 150, 20)), device=backend.device)
    results = []
    for _ in range(2):
        loss = fused(v, backend.impl, "element", seed=3)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(v.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_reconstruction_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are of bounded size: a step takes the gradients and a few MiB, where recon alone would take 32."""
    from benchmarks.measure import Step, peak_memory

    v = leaves(inputs((1024, 8192, 16)), ("mu", "logvar", "weight", "bias"))
    v["eps"] = torch.zeros(1024, 16)
    own = sum(t.nbytes for t in v.values() if t.requires_grad)
    recon = v["x"].nbytes

    def loss(**tensors: Tensor) -> Tensor:
        eps = tensors.pop("eps")
        return fused(tensors, "torch", "element", eps=eps)

    assert peak_memory(Step(v), loss, CPU) - own < torch_tiles.TILE + recon // 8


@each_backend
def test_verify_passes_right_results_and_catches_wrong_ones(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    v = leaves(inputs((10, 30, 4)), device=backend.device)
    prior = torch.zeros_like(v["mu"]).requires_grad_()
    with fastelbo.verify() as report:
        for reduction in ("none", "batchmean"):
            fused(v, backend.impl, "element", seed=2, num_samples=2, reduction=reduction, prior_logvar=prior).sum().backward()
            nll = fastelbo.linear_gaussian_nll(v["mu"], v["weight"], v["x"], v["bias"], reduction=reduction, impl=backend.impl)
            nll.sum().backward()
    assert (report.calls, report.backwards, report.mismatches) == (4, 4, 0)

    elbo, layer = backend.ops().linear_elbo, backend.ops().linear_nll
    for i, name in enumerate(("x", "mu", "logvar", "weight", "bias", "recon_logvar", "prior_logvar")):

        def broken(*args: Any, i: int = i) -> Any:
            at = 7 if i == 6 else i
            return tuple(g * 1.001 if k == at else g for k, g in enumerate(elbo.backward(*args)))

        backend.replace(monkeypatch, "linear_elbo", backward=broken)
        with fastelbo.verify(), pytest.raises(fastelbo.NumericsMismatch, match=f"gradient of {name}"):
            fused(v, backend.impl, "element", seed=2, prior_logvar=prior).backward()
    for i, name in enumerate(("loss", "nll", "kl")):

        def wrong(*args: Any, i: int = i) -> Any:
            terms, kept = elbo.forward(*args)
            return tuple(t * 1.001 if k == i else t for k, t in enumerate(terms)), kept

        backend.replace(monkeypatch, "linear_elbo", forward=wrong)
        with fastelbo.verify(), pytest.raises(fastelbo.NumericsMismatch, match=f"{name} is off"):
            fused(v, backend.impl, "element", seed=2, return_terms=True)

    for i, name in enumerate(("h", "x", "weight", "bias", "logvar")):

        def off(*args: Any, i: int = i) -> Any:
            return tuple(g * 1.001 if k == i else g for k, g in enumerate(layer.backward(*args)))

        backend.replace(monkeypatch, "linear_nll", backward=off)
        arguments = v["mu"], v["weight"], v["x"], v["bias"]
        with fastelbo.verify(), pytest.raises(fastelbo.NumericsMismatch, match=f"gradient of {name}"):
            fastelbo.linear_gaussian_nll(*arguments, logvar=v["recon_logvar"], reduction="sum", impl=backend.impl).backward()


def test_module() -> None:
    """A `torch.nn.Linear` by its parameters, with the loss of its own weight, bias and variance."""
    torch.manual_seed(3)
    layer = fastelbo.LinearELBO(4, 30, learned=True, beta=0.5)
    torch.manual_seed(3)
    plain = torch.nn.Linear(4, 30)
    assert torch.equal(layer.weight, plain.weight)
    assert set(layer.state_dict()) == {"weight", "bias", "recon_logvar", "beta"}
    v = inputs((7, 30, 4))
    loss = layer(v["x"], v["mu"], v["logvar"], seed=1)
    same = fastelbo.linear_elbo_loss(
        v["x"], v["mu"], v["logvar"], layer.weight, layer.bias, recon_logvar=layer.recon_logvar, beta=0.5, seed=1
    )
    assert torch.equal(loss, same)
    loss.backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert torch.equal(layer.decode(v["mu"]), F.linear(v["mu"], layer.weight, layer.bias))
    assert "in_features=4" in repr(layer)
    assert "beta=0.5" in repr(layer)
    with pytest.raises(TypeError, match="beta"):
        fastelbo.LinearELBO(4, 30, beta="1")  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("logvar", [-130.0, -800.0, -math.inf])
def test_a_variance_beyond_float32_gives_infinite_gradients(logvar: float, reduction: str) -> None:
    """And raises nothing, as a number that scales a product would."""
    g = torch.Generator().manual_seed(0)
    h, weight, x, bias = (torch.randn(s, generator=g) for s in ((6, 4), (5, 4), (6, 5), (5,)))
    for value in (logvar, torch.tensor([logvar])):
        inputs = [t.clone().requires_grad_() for t in (h, weight, x, bias)]
        loss = fastelbo.linear_gaussian_nll(*inputs, logvar=value, reduction=reduction, impl="torch").sum()
        grads = torch.autograd.grad(loss, inputs)
        assert loss.item() == math.inf or logvar == -math.inf
        assert all(bool(t.isinf().all()) for t in grads), (value, [t.isinf().float().mean() for t in grads])
