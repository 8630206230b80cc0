"""Losses across a linear decoder in traced functions: one operator, whose tiles are those of the uncompiled function."""

from __future__ import annotations

import pytest
import torch
from cases import CPU, Backend, each_backend
from test_linear import fused, inputs, leaves
from torch import Tensor

import fastelbo


@pytest.mark.parametrize(("samples", "compiler"), [(None, "inductor"), (2, "aot_eager")])
def test_compile(samples: int | None, compiler: str) -> None:
    """One graph with the same numbers, for every batch size and beta."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(compiler)

    def loss(x, mu, logvar, weight, bias, recon_logvar, eps, beta):
        return fastelbo.linear_elbo_loss(
            x, mu, logvar, weight, bias, recon_logvar=recon_logvar, eps=eps, num_samples=samples, beta=beta
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch, beta in ((6, 0.5), (9, 0.25), (14, 2.0)):
        v = leaves(inputs((batch, 30, 4)))
        eps = torch.randn(*(() if samples is None else (samples,)), batch, 4)
        results = []
        for f in (loss, compiled):
            out = f(*v.values(), eps, torch.tensor(beta))
            results.append((out, torch.autograd.grad(out, list(v.values()))))
        torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=1e-6)
    assert counter.frame_count == 1


VALUES = [0.3, 0.1, 1.7, 2.0, 0.25, 12.0]


@pytest.mark.parametrize(
    ("vary", "reduction"),
    [("batch", "none"), ("batch", "batchmean"), ("batch", "mean")]
    + [("beta", "none"), ("recon_logvar", "batchmean"), ("prior_logvar", "mean")],
)
def test_no_recompilation(vary: str, reduction: str) -> None:
    """By default: a first graph for the first size or number, and one for all others. Backward included."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def loss(v: dict[str, Tensor], eps: Tensor, number: float) -> tuple[Tensor, Tensor]:
        options = {vary: number} if vary in ("beta", "prior_logvar") else {}
        logvar = number if vary == "recon_logvar" else v["recon_logvar"]
        args = v["x"], v["mu"], v["logvar"], v["weight"], v["bias"]
        elbo = fastelbo.linear_elbo_loss(*args, recon_logvar=logvar, eps=eps, reduction=reduction, **options)
        nll = fastelbo.linear_gaussian_nll(v["mu"], v["weight"], v["x"], logvar=logvar, reduction=reduction)
        return elbo, nll

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for batch, number in zip([7, 5, 9, 33, 64, 128] if vary == "batch" else [7] * 6, VALUES, strict=True):
        v = leaves(inputs((batch, 30, 4)), [n for n in inputs((1, 1, 1)) if not (vary == "recon_logvar" and n == "recon_logvar")])
        eps = torch.randn(batch, 4)
        results = []
        for f in (loss, compiled):
            outs = f(v, eps, 0.5 if vary == "batch" else number)
            wanted = [t for t in v.values() if t.requires_grad]
            results.append((outs, torch.autograd.grad(sum(((i + 1.5) * o).sum() for i, o in enumerate(outs)), wanted)))
        torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=1e-5)
    assert counter.frame_count <= 2


@each_backend
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("var", ["unit", "scalar", "element"])
def test_operator(backend: Backend, var: str, keep: int) -> None:
    """What torch asks of an operator: its schema, its shapes under FakeTensor, autograd, and AOTAutograd with any sizes."""
    v = leaves(inputs((6, 30, 4), var), device=backend.device)
    args = v["mu"], v["x"], v["weight"], v["bias"] if keep else None, v.get("recon_logvar")
    for ready in ([False] * 5, [t is not None for t in args])[: 2 - keep]:
        torch.library.opcheck(torch.ops.fastelbo.linear_nll, (*args, ready, keep, True, None, backend.impl))
    constants = [t if t is None else t.detach() for t in args]
    up = torch.randn(6 if keep else (), device=backend.device)
    for needs in ([t is not None for t in args], [False, False, True, False, False]):
        options = up, needs, keep, True, None, backend.impl
        torch.library.opcheck(torch.ops.fastelbo.linear_nll_backward, (*constants, *options))


@each_backend
@pytest.mark.parametrize("samples", [None, 2])
def test_compiled_code_calls_the_backend(backend: Backend, samples: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it runs, not when it is traced; and has the numbers of the uncompiled function, terms included."""
    calls: list[str] = []
    own = backend.ops().linear_nll
    backend.replace(
        monkeypatch, "linear_nll",
        forward=lambda *args: (calls.append("forward"), own.forward(*args))[1],
        backward=lambda *args: (calls.append("backward"), own.backward(*args))[1],
    )  # fmt: skip
    v = leaves(inputs((9, 70, 5)), device=backend.device)
    eps = torch.randn(*(() if samples is None else (samples,)), 9, 5, device=backend.device)
    for reduction in ("none", "batchmean"):
        options = {"eps": eps, "num_samples": samples, "reduction": reduction, "beta": 0.5, "return_terms": True}
        compiled = torch.compile(lambda v: fused(v, backend.impl, "element", **options), fullgraph=True, backend="aot_eager")  # noqa: B023
        want = fused(v, backend.impl, "element", **options)
        calls.clear()
        got = compiled(v)
        assert not got[1].requires_grad
        assert not got[2].requires_grad
        grads = torch.autograd.grad(got[0].sum(), list(v.values()))
        assert calls == (["forward", "backward"] if reduction == "none" else ["forward"])
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(grads, torch.autograd.grad(want[0].sum(), list(v.values())), rtol=1e-5, atol=1e-5)


def test_no_reconstruction_in_memory_under_compile() -> None:
    """A compiled step, forward and backward: 40 MiB beyond its inputs and gradients, where recon alone would take 312."""
    from benchmarks.measure import Step, peak_memory

    batch, elements, latents = 4096, 20_000, 32
    assert batch * elements * 4 > 312 * 2**20
    v = leaves(inputs((batch, elements, latents)), ("mu", "logvar", "weight", "bias", "recon_logvar"))
    own = sum(t.nbytes for t in v.values() if t.requires_grad)
    v["eps"] = torch.zeros(batch, latents)
    compiled = torch.compile(fastelbo.linear_elbo_loss, fullgraph=True)
    step = Step(v)
    step(compiled)  # compiles, and is compared
    truth = fastelbo.linear_elbo_loss(**v)
    for t, want in zip(step.wanted, torch.autograd.grad(truth, step.wanted), strict=True):
        torch.testing.assert_close(t.grad, want, rtol=1e-4, atol=1e-4)
    assert peak_memory(step, compiled, CPU) - own < 40 * 2**20


def test_export() -> None:
    """For any batch size; the program has the operator and not what it computes."""

    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, mu: Tensor, logvar: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
            return fastelbo.linear_elbo_loss(x, mu, logvar, weight, eps=eps)

    def tensors(batch: int) -> tuple[Tensor, ...]:
        v = inputs((batch, 30, 4))
        return v["x"], v["mu"], v["logvar"], v["weight"], torch.randn(batch, 4)

    batch = {0: torch.export.Dim("batch")}
    shapes = {"x": batch, "mu": batch, "logvar": batch, "weight": None, "eps": batch}
    program = torch.export.export(Loss(), tensors(7), dynamic_shapes=shapes)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("fastelbo.linear_nll" in n for n in names) == 1
    assert not any(n in ("aten.linear.default", "aten.mm.default", "aten.addmm.default") for n in names)
    for size in (7, 12):
        args = tensors(size)
        torch.testing.assert_close(program.module()(*args), Loss()(*args))


def test_compile_hidden_layer() -> None:
    v = leaves(inputs((7, 30, 4)))
    loss = lambda: fastelbo.linear_gaussian_nll(v["mu"], v["weight"], v["x"], logvar=v["recon_logvar"])  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), loss())
