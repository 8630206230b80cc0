"""torch.compile: every public function is one graph, gives the numbers that it gives without, and is not compiled again for a new
batch size, beta, variance or seed.

The Inductor backend compiles C++ for a second or more per graph, so most tests trace with "aot_eager", which runs the same graphs
through AOTAutograd. Under torch.compile plain PyTorch serves every call, whatever the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import HAS_GPU, assert_close, slow_loss
from torch._dynamo.testing import CompileCounterWithBackend

import fastelbo

Fn = Callable[..., Any]


def decoder(z: torch.Tensor) -> torch.Tensor:
    return torch.cat([z, z.tanh(), -z], -1)


def _moments(m: torch.Tensor, s: torch.Tensor) -> fastelbo.DiagonalGaussian:
    return fastelbo.DiagonalGaussian.from_moments(torch.cat([m, s], 1))


# Each takes (recon, x, spread, mu, logvar, eps); recon and spread are (B, 12), mu is (B, 4).
FUNCTIONS: dict[str, Fn] = {
    "reparameterize-eps": lambda r, x, v, m, s, e: fastelbo.reparameterize(m, s, eps=e),
    "reparameterize-seed": lambda r, x, v, m, s, e: fastelbo.reparameterize(m, s, seed=11),
    "reparameterize-samples": lambda r, x, v, m, s, e: fastelbo.reparameterize(m, s, 3, seed=12),
    "reparameterize_kl": lambda r, x, v, m, s, e: fastelbo.reparameterize_kl(m, s, eps=e, logvar_clamp=(-0.5, 0.5)),
    "reparameterize_kl-seed": lambda r, x, v, m, s, e: fastelbo.reparameterize_kl(
        m, s, 0.5, s.detach() * 0.3, seed=5, reduction="mean"
    ),
    "gaussian_kl": lambda r, x, v, m, s, e: fastelbo.gaussian_kl(m, s, reduction="batchmean"),
    "gaussian_kl-prior": lambda r, x, v, m, s, e: fastelbo.gaussian_kl(m, s, e, 0.25, weight=e.abs(), reduction="mean"),
    "gaussian_nll": lambda r, x, v, m, s, e: fastelbo.gaussian_nll(r, x),
    "gaussian_nll-logvar": lambda r, x, v, m, s, e: fastelbo.gaussian_nll(r, x, logvar=v, weight=x > -1, reduction="mean"),
    "gaussian_nll-logvar-row": lambda r, x, v, m, s, e: fastelbo.gaussian_nll(r, x, logvar=v[:, :1], reduction="sum"),
    "gaussian_nll-std": lambda r, x, v, m, s, e: fastelbo.gaussian_nll(r, x, std=v.exp()),
    "gaussian_nll-var": lambda r, x, v, m, s, e: fastelbo.gaussian_nll(r, x, var=v.exp(), batch_dims=2),
    "gaussian_nll-logvar-float": lambda r, x, v, m, s, e: fastelbo.gaussian_nll(r, x, logvar=-0.7),
    "gaussian_nll-std-float": lambda r, x, v, m, s, e: fastelbo.gaussian_nll(r, x, std=0.7),
    "gaussian_nll-var-float": lambda r, x, v, m, s, e: fastelbo.gaussian_nll(r, x, var=0.7),
    "gaussian_nll_loss": lambda r, x, v, m, s, e: fastelbo.gaussian_nll_loss(r, x, v.exp(), full=True),
    "gaussian_nll_loss-float": lambda r, x, v, m, s, e: fastelbo.gaussian_nll_loss(r, x, 0.7),
    "GaussianNLLLoss": lambda r, x, v, m, s, e: fastelbo.GaussianNLLLoss(reduction="sum")(r, x, v[:, 0].exp()),
    "elbo_terms": lambda r, x, v, m, s, e: fastelbo.elbo_terms(r, x, m, s, recon_logvar=v),
    "elbo_terms-none": lambda r, x, v, m, s, e: fastelbo.elbo_terms(r, x, m, s, recon_logvar=v, reduction="none"),
    "elbo_loss": lambda r, x, v, m, s, e: fastelbo.elbo_loss(r, x, m, s, beta=0.3),
    "elbo_loss-learned": lambda r, x, v, m, s, e: fastelbo.elbo_loss(r, x, m, s, recon_logvar=v, prior_mu=e[0], reduction="mean"),
    "elbo_loss-float": lambda r, x, v, m, s, e: fastelbo.elbo_loss(
        r, x, m, s, recon_logvar=-1.5, logvar_clamp=(-1, 1), reduction="sum"
    ),
    "elbo_loss-terms": lambda r, x, v, m, s, e: fastelbo.elbo_loss(r, x, m, s, beta=x.new_tensor(0.3), return_terms=True)[0],
    "elbo_loss-none": lambda r, x, v, m, s, e: fastelbo.elbo_loss(r, x, m, s, weight=x.detach().abs(), reduction="none"),
    "ELBOLoss": lambda r, x, v, m, s, e: fastelbo.ELBOLoss(beta=0.3, recon_logvar=-0.5)(r, x, m, s),
    "Reparameterize": lambda r, x, v, m, s, e: fastelbo.Reparameterize()(m, s, eps=e),
    "sgvb_loss": lambda r, x, v, m, s, e: fastelbo.sgvb_loss(decoder, x, m, s, seed=3, recon_logvar=0.1),
    "sgvb_loss-samples": lambda r, x, v, m, s, e: fastelbo.sgvb_loss(decoder, x, m, s, num_samples=2, seed=3, beta=0.5),
    "rsample": lambda r, x, v, m, s, e: _moments(m, s).rsample(eps=e),
    "rsample_kl": lambda r, x, v, m, s, e: _moments(m, s).rsample_kl(fastelbo.DiagonalGaussian(e, s * 0.5), seed=9),
    "kl": lambda r, x, v, m, s, e: _moments(m, s).kl(),
    "nll": lambda r, x, v, m, s, e: fastelbo.DiagonalGaussian(r, v).nll(x),
}


def inputs(batch: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, 12),) * 3 + ((batch, 4),) * 3
    values = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    return [v.requires_grad_() for v in values[:5]] + [values[5]]


def outcome(fn: Fn, args: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, then gradients (None as zeros)."""
    outs = fn(*args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    total = sum((o * torch.linspace(0.5, 1.5, max(1, o.numel()), dtype=o.dtype).view(o.shape)).sum() for o in outs)
    asked = [a for a in args if a.requires_grad]
    grads = torch.autograd.grad(total, asked, allow_unused=True)
    return [*(o.detach() for o in outs), *(torch.zeros_like(a) if g is None else g for g, a in zip(grads, asked, strict=True))]


def compare(fn: Fn, compiled: Fn, args: list[torch.Tensor], what: str = "") -> None:
    for i, (a, b) in enumerate(zip(outcome(compiled, args), outcome(fn, args), strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, i=i: f"{what} result {i}: {m}")


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_one_graph_and_the_same_numbers(name: str) -> None:
    fn = FUNCTIONS[name]
    compare(fn, torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs())


WHOLE = {
    "reparameterize-eps": "reparameterize",
    "reparameterize_kl": "reparameterize_kl",
    "gaussian_kl": "gaussian_kl",
    "gaussian_nll": "gaussian_nll",
    "gaussian_nll_loss-float": "gaussian_nll_loss",
    "elbo_terms": "elbo_terms",
    "elbo_loss-float": "elbo_loss",
    "ELBOLoss": "elbo_loss",
    "kl": "of_posterior",
}


@pytest.mark.parametrize("name", list(WHOLE))
def test_dynamo_sees_one_function(name: str) -> None:
    """What it traced through it would check before each call, for longer than a small loss takes."""
    nodes: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nodes.extend(n.target for n in graph.graph.nodes if n.op == "call_function" and not n.target.__module__.startswith("torch"))
        return graph.forward

    torch.compile(FUNCTIONS[name], fullgraph=True, backend=backend)(*inputs())
    assert [n.__name__ for n in nodes if n.__name__ != "getitem"] == [WHOLE[name]]


def test_the_same_tensor_in_two_places() -> None:
    fn: Fn = lambda r, x, v, m, s, e: fastelbo.elbo_loss(r, x, m, m, recon_logvar=r)  # noqa: E731
    compare(fn, torch.compile(fn, fullgraph=True, backend="aot_eager"), inputs())


@pytest.mark.parametrize("name", ["elbo_loss-learned", "reparameterize_kl-seed"])
def test_inductor(name: str) -> None:
    fn = FUNCTIONS[name]
    compiled = torch.compile(fn, fullgraph=True)
    compare(fn, compiled, inputs())
    if name == "elbo_loss-learned":
        compare(fn, compiled, inputs(seed=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """The results are one rounding away from the truth here too."""

    def fn(r: torch.Tensor, x: torch.Tensor, v: torch.Tensor, m: torch.Tensor, s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return fastelbo.elbo_loss(r, x, m, s, recon_logvar=v, beta=0.5)

    args = inputs(dtype=dtype)
    loss, *grads = outcome(torch.compile(fn, fullgraph=True, backend="aot_eager"), args)
    truth = [a.detach().double().requires_grad_(a.requires_grad) for a in args]
    want, *want_grads = outcome(lambda r, x, v, m, s, e: slow_loss(r, x, m, s, recon_logvar=v, beta=0.5), [*truth])
    upstream = 0.5  # outcome's, for a scalar
    assert_close(loss, want, "loss", dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for i, (g, w) in enumerate(zip(grads, want_grads, strict=True)):
        assert_close(g, w, f"gradient {i} under {upstream}", dtype=dtype)


def count_graphs(fn: Fn, calls: list[tuple[Any, ...]]) -> int:
    """How many graphs Dynamo makes for the calls, whose values are compared as well."""
    counter = CompileCounterWithBackend("aot_eager")  # which sees what a backward makes a constant as well
    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    for args in calls:
        torch.testing.assert_close(compiled(*args), fn(*args), rtol=1e-5, atol=1e-5)
    return int(counter.frame_count)


# Dynamo first takes a size or a number for a constant and, seeing another, makes it a variable, once. So two graphs are what a
# function that recompiles for nothing else gets by default, and one with dynamic=True, which skips the first.
BATCHES = [7, 5, 9, 33, 64, 128]


SIZED = [
    "elbo_loss-learned",
    "elbo_loss-none",
    "reparameterize_kl",
    "gaussian_nll-logvar",
    "sgvb_loss-samples",
    "gaussian_nll_loss",
    "kl",
]


@pytest.mark.parametrize("name", SIZED)
def test_no_recompilation_per_batch_size(name: str) -> None:
    assert count_graphs(FUNCTIONS[name], [tuple(inputs(b)) for b in BATCHES]) <= 2


VALUES = [0.3, 0.1, 1.7, 2.0, 0.25, 12.0]


@pytest.mark.parametrize(
    ("name", "fn", "values"),
    [
        ("beta", lambda v, r, x, m, s: fastelbo.elbo_loss(r, x, m, s, beta=v), VALUES),
        ("beta-none", lambda v, r, x, m, s: fastelbo.elbo_loss(r, x, m, s, beta=v, reduction="none"), VALUES),
        ("beta-tensor", lambda v, r, x, m, s: fastelbo.elbo_loss(r, x, m, s, beta=v), [torch.tensor(v) for v in VALUES]),
        ("sgvb-beta", lambda v, r, x, m, s: fastelbo.sgvb_loss(decoder, x, m, s, beta=v, seed=1), VALUES),
        ("recon_logvar", lambda v, r, x, m, s: fastelbo.elbo_loss(r, x, m, s, recon_logvar=v), [-v for v in VALUES]),
        (
            "recon_logvar-tensor",
            lambda v, r, x, m, s: fastelbo.elbo_loss(r, x, m, s, recon_logvar=v),
            [torch.tensor(v) for v in VALUES],
        ),
        ("prior_logvar", lambda v, r, x, m, s: fastelbo.gaussian_kl(m, s, v, v), VALUES),
        ("std", lambda v, r, x, m, s: fastelbo.gaussian_nll(r, x, std=v), VALUES),
        ("var", lambda v, r, x, m, s: fastelbo.gaussian_nll(r, x, var=v), VALUES),
        ("var-loss", lambda v, r, x, m, s: fastelbo.gaussian_nll_loss(r, x, v), VALUES),
        ("seed", lambda v, r, x, m, s: fastelbo.reparameterize(m, s, seed=v), [5, 6, 1234, 2**40, 77]),
        ("seed-tensor", lambda v, r, x, m, s: fastelbo.reparameterize(m, s, seed=v), [torch.tensor(v) for v in (5, 6, 2**62, -3)]),
    ],
    ids=lambda v: v if isinstance(v, str) else "values" if isinstance(v, list) else "fn",
)
def test_no_recompilation_per_value(name: str, fn: Fn, values: list[Any]) -> None:
    r, x, _, m, s, _ = inputs()
    assert count_graphs(fn, [(v, r, x, m, s) for v in values]) <= 2


def test_no_recompilation_when_the_modules_beta_is_scheduled() -> None:
    r, x, _, m, s, _ = inputs()
    loss = fastelbo.ELBOLoss(beta=0.3, learned=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for beta in VALUES:
        loss.beta = beta
        torch.testing.assert_close(compiled(r, x, m, s), loss(r, x, m, s))
    assert counter.frame_count <= 2


def test_training_under_compile() -> None:
    """A whole step, encoder to loss, with the noise drawn inside the graph: the gradients are those of the same noise outside."""
    torch.manual_seed(0)
    encoder, head = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)
    objective = fastelbo.ELBOLoss(beta=0.5, learned=True)
    sample = fastelbo.Reparameterize()
    parameters = [*encoder.parameters(), *head.parameters(), *objective.parameters()]

    def step(x: torch.Tensor) -> torch.Tensor:
        mu, logvar = encoder(x).chunk(2, 1)
        return objective(head(sample(mu, logvar)), x, mu, logvar)

    x = torch.randn(6, 12)
    found = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        loss = fn(x)
        found.append((loss.detach(), torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_retained_graph_under_compile() -> None:
    fn = FUNCTIONS["elbo_loss"]
    args = inputs()
    with torch._functorch.config.patch(donated_buffer=False):
        loss = torch.compile(fn, fullgraph=True, backend="aot_eager")(*args)
        first = torch.autograd.grad(loss, args[:2], retain_graph=True)
        second = torch.autograd.grad(2.5 * loss, args[:2])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, 2.5 * a)


def test_masked_nan_under_compile() -> None:
    def fn(r: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return fastelbo.gaussian_nll(r, x, weight=w, reduction="mean")

    r, x, *_ = inputs()
    w = torch.rand_like(x) < 0.7
    clean = outcome(fn, [r, x, w])
    dirty = [t.detach().masked_fill(~w, math.nan).requires_grad_() for t in (r, x)]
    for a, b in zip(clean, outcome(torch.compile(fn, fullgraph=True, backend="aot_eager"), [*dirty, w]), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_survive_tracing() -> None:
    """A bad argument is reported with its name under torch.compile as well, though Dynamo wraps the exception."""
    r, x, _, m, s, _ = inputs()
    compiled = torch.compile(lambda: fastelbo.elbo_loss(r, x, m, s[:, :3]), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="logvar has shape"):
        compiled()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU that PyTorch can use")
@pytest.mark.parametrize("name", ["elbo_loss-learned", "reparameterize_kl-seed", "sgvb_loss-samples"])
def test_inductor_on_a_gpu(name: str) -> None:
    fn = FUNCTIONS[name]
    args = [a.detach().cuda().requires_grad_(a.requires_grad) for a in inputs()]
    compiled = torch.compile(fn, fullgraph=True)
    for a, b in zip(_cuda_outcome(compiled, args), _cuda_outcome(fn, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _cuda_outcome(fn: Fn, args: list[torch.Tensor]) -> list[torch.Tensor]:
    outs = fn(*args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    asked = [a for a in args if a.requires_grad]
    grads = torch.autograd.grad(sum((2 * o).sum() for o in outs), asked, allow_unused=True)
    return [*(o.detach() for o in outs), *(g for g in grads if g is not None)]
