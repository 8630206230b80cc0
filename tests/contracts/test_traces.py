"""What a trace must not see: sizes. torch.export with a dynamic batch, compiled graphs over many sizes, and FakeTensorMode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import fastelbo

Fn = Callable[..., Any]

# Each takes (recon, x, mu, logvar), (B, 12) twice and (B, 4) twice.
EXPORTED: dict[str, Fn] = {
    "gaussian_kl": lambda r, x, m, v: fastelbo.gaussian_kl(m, v),
    "gaussian_kl-prior": lambda r, x, m, v: fastelbo.gaussian_kl(m, v, 0.5, v[0], reduction="mean"),
    "gaussian_nll": lambda r, x, m, v: fastelbo.gaussian_nll(r, x, logvar=-0.5),
    "gaussian_nll-element": lambda r, x, m, v: fastelbo.gaussian_nll(r, x, logvar=0.1 * r, reduction="mean"),
    "gaussian_nll-row": lambda r, x, m, v: fastelbo.gaussian_nll(r, x, logvar=v[:, :1], reduction="batchmean"),
    "elbo_loss": lambda r, x, m, v: fastelbo.elbo_loss(r, x, m, v, beta=0.5),
    "elbo_loss-dimension": lambda r, x, m, v: fastelbo.elbo_loss(r, x, m, v, recon_logvar=r[0]),
    "elbo_loss-none": lambda r, x, m, v: fastelbo.elbo_loss(r, x, m, v, logvar_clamp=(-1.0, 1.0), reduction="none"),
    "reparameterize_kl": lambda r, x, m, v: fastelbo.reparameterize_kl(m, v, eps=0.3 * m.detach()),
    "reparameterize-seed": lambda r, x, m, v: fastelbo.reparameterize(m[:, :3], v[:, :3], seed=3),  # rows of any alignment
    "elbo_loss-samples": lambda r, x, m, v: fastelbo.elbo_loss(torch.stack([r, -r, 2 * r]), x, m, v),
    "elbo_loss-beta": lambda r, x, m, v: fastelbo.elbo_loss(r, x, m, v, beta=v[:, 0]),
    "gaussian_kl-components": lambda r, x, m, v: fastelbo.gaussian_kl(m.unsqueeze(1), v.unsqueeze(1), m[:2], v[:2], batch_dims=2),
    "sgvb_loss": lambda r, x, m, v: fastelbo.sgvb_loss(lambda z: z.repeat(1, 3), x, m, v, num_samples=2, seed=3),
    "linear_gaussian_nll-dimension": lambda r, x, m, v: fastelbo.linear_gaussian_nll(m, layer(), x, logvar=0.1 * layer()[:, 0]),
    "linear_elbo_loss-samples": lambda r, x, m, v: fastelbo.linear_elbo_loss(x, m, v, layer(), num_samples=2, seed=3),
}


def layer() -> Tensor:
    return torch.linspace(-1, 1, 48).view(12, 4)


def inputs(batch: int, requires_grad: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, n, generator=g).requires_grad_(requires_grad) for n in (12, 12, 4, 4)]


class Module(torch.nn.Module):
    def __init__(self, fn: Fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, r: Tensor, x: Tensor, m: Tensor, v: Tensor) -> Any:
        return self.fn(r, x, m, v)


# A bare dimension is the strictest: no size may become a constant.
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "bare") for name in EXPORTED)]
    + [(name, kind) for name in ("elbo_loss", "reparameterize-seed", "sgvb_loss") for kind in ("auto", "named")],
)
def test_export_with_a_dynamic_batch(name: str, kind: str) -> None:
    dim = {"auto": Dim.AUTO, "named": Dim("batch", min=2, max=100_000), "bare": Dim("batch")}[kind]
    program = torch.export.export(Module(EXPORTED[name]), tuple(inputs(5)), dynamic_shapes=({0: dim},) * 4)
    for batch in (5, 3000):
        args = inputs(batch)
        torch.testing.assert_close(program.module()(*args), EXPORTED[name](*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*EXPORTED, "reparameterize-samples", "reparameterize_kl-samples"])
def test_compiled_at_more_than_one_batch(name: str) -> None:
    """The size is symbolic, for which some of torch's functions have no form."""
    drawn: dict[str, Fn] = {
        "reparameterize-samples": lambda r, x, m, v: fastelbo.reparameterize(m, v, 2),
        "reparameterize_kl-samples": lambda r, x, m, v: fastelbo.reparameterize_kl(m, v, num_samples=3),
    }
    fn = (EXPORTED | drawn)[name]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for batch in (4, 7):
        args, found = inputs(batch, requires_grad=True), []
        for t in args:
            torch._dynamo.maybe_mark_dynamic(t, 0)  # at the first batch rather than when it has seen another
        for call in (fn, compiled):
            torch.manual_seed(3)
            out = call(*args)
            total = sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()
            found.append([total, *(g for g in torch.autograd.grad(total, args, allow_unused=True) if g is not None)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_compiled_loss_makes_no_more_graphs_than_the_plain_formula() -> None:
    """25 sequences of random batch and length; Dynamo makes each dimension dynamic once it has seen it change."""

    def plain(r: Tensor, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
        nll = 0.5 * ((x - r) ** 2).sum()
        return (nll - 0.5 * (1 + v - m.pow(2) - v.exp()).sum()) / x.shape[0]

    def fused(r: Tensor, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return fastelbo.elbo_loss(r, x, m, v, full=False)

    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 40, (25, 2), generator=g).tolist()
    graphs = {}
    for fn in (plain, fused):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(fn, fullgraph=True, backend=counter)
        for b, t in sizes:
            args = [torch.randn(b, t, n, generator=g, requires_grad=True) for n in (12, 12, 4, 4)]
            got, want = (torch.autograd.grad(f(*args), args) for f in (compiled, plain))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        graphs[fn.__name__] = counter.frame_count
    assert graphs["fused"] <= graphs["plain"] <= 3


FAKE: dict[str, Fn] = EXPORTED | {
    "reparameterize-samples": lambda r, x, m, v: fastelbo.reparameterize(m, v, 3),
    "elbo_terms": lambda r, x, m, v: fastelbo.elbo_terms(r, x, m, v),
    "gaussian_nll-std": lambda r, x, m, v: fastelbo.gaussian_nll(r, x, std=r.exp()),
    "gaussian_nll-weight": lambda r, x, m, v: fastelbo.gaussian_nll(r, x, weight=x > 0, reduction="mean"),
    "gaussian_nll_loss": lambda r, x, m, v: fastelbo.gaussian_nll_loss(r, x, r.exp()),
    "sgvb_loss": lambda r, x, m, v: fastelbo.sgvb_loss(lambda z: z.repeat(1, 3), x, m, v, num_samples=2),
    "linear_elbo_loss": lambda r, x, m, v: fastelbo.linear_elbo_loss(x, m, v, r.T[:, :4]),
    "linear_gaussian_nll": lambda r, x, m, v: fastelbo.linear_gaussian_nll(m, r.T[:, :4], x),
    "DiagonalGaussian": lambda r, x, m, v: fastelbo.DiagonalGaussian.from_moments(torch.cat([m, v], 1)).rsample_kl(),
}


@pytest.mark.parametrize("name", list(FAKE))
def test_fake_tensors_go_forward_and_backward(name: str) -> None:
    """Shapes and dtypes without memory, as those who plan memory or distribution ask for them."""
    real = inputs(5, requires_grad=True)
    with FakeTensorMode() as mode:
        outs = FAKE[name](*(fake := [mode.from_tensor(t) for t in real]))
        outs = outs if isinstance(outs, tuple) else (outs,)
        sum(o.sum() for o in outs).backward()
    wants = FAKE[name](*real)
    wants = wants if isinstance(wants, tuple) else (wants,)
    sum(w.sum() for w in wants).backward()
    for out, want in zip(outs, wants, strict=True):
        assert (out.shape, out.dtype) == (want.shape, want.dtype)
    for f, t in zip(fake, real, strict=True):
        assert (f.grad is None) == (t.grad is None)
        assert f.grad is None or (f.grad.shape, f.grad.dtype) == (t.grad.shape, t.grad.dtype)


def test_a_trace_does_not_keep_the_value_of_a_learned_variance() -> None:
    """What watches tensors, other than torch.compile: jit.trace, make_fx, and a mode around a real parameter."""
    recon, x = (torch.randn(4, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    call = lambda r, x, v: fastelbo.gaussian_nll(r, x, logvar=v)  # noqa: E731
    want = call(recon, x, torch.tensor(1.0))
    for traced in (
        torch.jit.trace(call, (recon, x, torch.tensor(-2.0))),
        make_fx(call, tracing_mode="real")(recon, x, torch.tensor(-2.0)),
    ):
        torch.testing.assert_close(traced(recon, x, torch.tensor(1.0)), want)
    spread = torch.nn.Parameter(torch.tensor(0.5))
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = fastelbo.gaussian_nll(torch.randn(4, 3), torch.randn(4, 3), logvar=spread)
        assert loss.shape == (4,)
