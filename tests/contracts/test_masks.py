"""Weights and masks: what they hide never shows, and a mean divides by their sum."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import BACKENDS, HAS_GPU, OPS, PATTERNS, TRITON, Backend, each_backend, leaves, make, run
from settings import compare

import fastelbo
from fastelbo.eager import walk

BAD = torch.tensor([math.nan, math.inf, -math.inf])


def hidings() -> list[Any]:
    """Every pattern of either kind. Blocks are the plain-PyTorch backend's: each pattern and each kind meets both sizes of them."""
    names, patterns = [n for n, op in OPS.items() if "weight" in op.options], ["element", "pixel", "sample", "dim"]
    out = []
    for backend, (i, name) in itertools.product(BACKENDS, enumerate(names)):
        # The interpreter sees fewer cases.
        some = patterns[:2] if backend is TRITON and not HAS_GPU else patterns
        for (j, pattern), (k, kind) in itertools.product(enumerate(some), enumerate(["mask", "weight"])):
            block = [16, 1 << 17][(i + j + k) % 2]
            label = f"{backend.id}-{name}-{block}-{pattern}-{kind}"
            out.append(pytest.param(*backend.values, name, block, pattern, kind, marks=backend.marks, id=label))
    return out


@pytest.mark.parametrize(("backend", "name", "block", "pattern", "kind"), hidings())
def test_weight_hides(backend: Backend, name: str, block: int, pattern: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and inf under a weight of 0 change nothing: the result is that of any finite value there, and its gradient is 0."""
    monkeypatch.setattr(walk, "RUN", block)
    op = OPS[name]
    clean = make(op.names, "chunk1", "float32", 0)
    clean |= make([kind], "chunk1", "float32", 1, **{kind: pattern})
    clean[kind][0] = 0  # something is hidden, whatever was drawn
    hidden = (clean[kind] == 0).expand(clean[op.names[0]].shape)
    assert 0 < int(hidden.sum()) < hidden.numel()
    # In elbo_loss the weight is the likelihood's; in the others it covers whatever there is, save z, which it does not concern.
    covers = [
        n for n in op.names if n != "eps" and not (name.startswith("elbo") and (n in ("mu", "logvar") or n.startswith("prior")))
    ]
    options = {"reduction": "none"} if name == "gaussian_nll" else {"reduction": "mean"}

    def fast(v: dict[str, torch.Tensor]) -> Any:
        out = op.fast(v, backend.impl, **options, weight=v[kind])
        return out[1] if op.returns_z else out

    wanted = [n for n in op.names if n != "eps"]
    outs, grads = run(fast, leaves(clean, wanted, backend.device))
    inputs = leaves(clean, wanted, backend.device)
    bad = BAD.to(backend.device)[torch.arange(int(hidden.sum())) % len(BAD)]
    for i, n in enumerate(covers):
        inputs[n].data[hidden.to(backend.device)] = bad.roll(i)  # beside each other they are of different kinds
    outs_bad, grads_bad = run(fast, inputs)
    for a, b in zip(outs, outs_bad, strict=True):
        assert torch.equal(a, b), f"what is under the weight changed the result from {a} to {b}"
    for n in wanted:
        assert torch.equal(grads[n], grads_bad[n]), f"what is under the weight changed the gradient of {n}"
        if n in covers:
            assert not grads_bad[n].cpu()[hidden].any(), f"the gradient of {n} under a weight of 0 is not 0"
    twice = fast(inputs)
    total = sum(o.sum() for o in twice) if isinstance(twice, tuple) else twice.sum()
    firsts = torch.autograd.grad(total, [inputs[n] for n in wanted], create_graph=True)
    seconds = torch.autograd.grad(sum((f * f).sum() for f in firsts), [inputs[n] for n in wanted], allow_unused=True)
    for n, f, s in zip(wanted, firsts, seconds, strict=True):
        torch.testing.assert_close(f.detach(), grads[n], rtol=1e-5, atol=1e-6)
        assert s is None or bool(s.isfinite().all()), f"NaN reached the second derivative of {n}"


@pytest.mark.parametrize("pattern", PATTERNS)
@each_backend
def test_mean_divides_by_the_sum_of_the_weights(backend: Backend, pattern: str) -> None:
    for name, kind in itertools.product(["gaussian_nll", "gaussian_kl", "elbo_loss"], ["mask", "weight"]):
        compare(name, backend, "chunk1", "float32", {"reduction": "mean"}, weight=f"{kind}:{pattern}", seed=7)


@pytest.mark.parametrize(
    "function",
    ["gaussian_kl", "gaussian_nll", "laplace_nll", "bernoulli_nll", "discretized_logistic_nll", "elbo_loss", "elbo_terms"],
)
@each_backend
def test_a_mean_over_nothing_has_no_slopes(backend: Backend, function: str) -> None:
    recon, mu, logvar = (torch.randn(2, n, device=backend.device).requires_grad_() for n in (5, 3, 3))
    spread = torch.zeros(2, 5, device=backend.device, requires_grad=True)
    x = torch.zeros(2, 5, device=backend.device)
    none = {"weight": torch.zeros(2, 1, dtype=torch.bool, device=backend.device), "reduction": "mean", "impl": backend.impl}
    both = {**none, "kl_weight": none["weight"]}
    outputs, inputs = {
        "gaussian_kl": lambda: (fastelbo.gaussian_kl(mu, logvar, **none), [mu, logvar]),
        "gaussian_nll": lambda: (fastelbo.gaussian_nll(recon, x, logvar=spread, **none), [recon, spread]),
        "laplace_nll": lambda: (fastelbo.laplace_nll(recon, x, logscale=spread, **none), [recon, spread]),
        "bernoulli_nll": lambda: (fastelbo.bernoulli_nll(recon, x, **none), [recon]),
        "discretized_logistic_nll": lambda: (fastelbo.discretized_logistic_nll(recon, x, logscale=spread, **none), [recon, spread]),
        "elbo_loss": lambda: (fastelbo.elbo_loss(recon, x, mu, logvar, **both), [recon, mu, logvar]),
        "elbo_terms": lambda: (fastelbo.elbo_terms(recon, x, mu, logvar, **both), [recon, mu, logvar]),
    }[function]()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(bool(t.isnan()) for t in outputs)
    for slope in torch.autograd.grad(outputs, inputs):
        assert not slope.any()


@each_backend
def test_a_mean_over_an_empty_batch_has_no_slopes(backend: Backend) -> None:
    for shape in ((), (3,)):
        spread = torch.zeros(shape, device=backend.device, requires_grad=True)
        empty = torch.zeros(0, 3, device=backend.device)
        nll = fastelbo.gaussian_nll(empty, empty, logvar=spread, reduction="mean", impl=backend.impl)
        assert bool(nll.isnan())
        assert not torch.autograd.grad(nll, spread)[0].any()
