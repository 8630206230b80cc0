"""fastelbo.verify: silent where results are right, whatever the call; loud where a kernel, its noise or its rounding is not."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import random
import re
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import (
    CPU,
    DTYPES,
    FORMS,
    LAYOUTS,
    OPS,
    PATTERNS,
    Backend,
    Values,
    each_backend,
    leaves,
    make,
    run,
    slow_loss,
    upstream_for,
)

import fastelbo
from fastelbo import NumericsMismatch, verify
from fastelbo import backend as chooser
from fastelbo.eager import walk
from fastelbo.numerics.oracle import OUTPUTS

Patch = pytest.MonkeyPatch
EAGER = Backend("torch", CPU)
NAMES = ("recon", "x", "recon_logvar", "mu", "logvar", "prior_mu", "prior_logvar")


def elbo(v: Values, impl: str | None, **options: Any) -> Any:
    keywords = {n: v[n] for n in ("recon_logvar", "prior_mu", "prior_logvar")}
    return fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], **keywords, impl=impl, **options)


def inputs(backend: Backend, layout: str = "chunk1", **patterns: str) -> Values:
    return leaves(make(NAMES, layout, seed=3, **patterns), device=backend.device)


def wrap(patch: Patch, backend: Backend, op: str, step: str, change: Callable[..., Any]) -> None:
    """Let `change(out, *args)` spoil what a function of an op returns."""
    real = getattr(getattr(backend.ops(), op), step)

    @functools.wraps(real)
    def broken(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        changed = change(out, *args)
        return out if changed is None else changed

    backend.replace(patch, op, **{step: broken})


def leave_to_backward(patch: Patch, backend: Backend) -> None:
    """No forward pass has gradients ready except that of elbo_loss, which backends may choose for each call."""
    for op in ("likelihood", "latent", "elbo_terms"):
        wrap(patch, backend, op, "forward", lambda out, *_: (out[0], None))


# ---- right results ---------------------------------------------------------------------------------------------------------------


def combinations(name: str, count: int) -> list[tuple[str, str, dict[str, Any], dict[str, str]]]:
    """Layouts and dtypes in steps that share no factor with their numbers; options, weights and broadcasting are drawn."""
    op, rng = OPS[name], random.Random(zlib.crc32(name.encode()))
    start = rng.randrange(105)
    out = []
    for i in range(start, start + count):
        layout, dtype = list(LAYOUTS)[i * 2 % len(LAYOUTS)], list(DTYPES)[i % len(DTYPES)]
        size, view = LAYOUTS[layout]
        options: dict[str, Any] = {}
        if "reduction" in op.options:
            options["reduction"] = rng.choice(["none", "batchmean", "sum", "mean"])
        if "batch_dims" in op.options:
            options["batch_dims"] = rng.choice([0, 1, view(torch.empty(size)).ndim])
        if "logvar_clamp" in op.options and rng.random() < 0.5:
            options["logvar_clamp"] = (-1.0, 0.75)
        shared = [n for n in op.names if n == "recon_logvar" or (n in FORMS and "mu" not in op.names)]
        shared += [n for n in op.names if n.startswith("prior") and name != "DiagonalGaussian"]
        patterns = {n: rng.choice(PATTERNS) for n in shared}
        if "weight" in op.options and rng.random() < 0.5:
            patterns[rng.choice(["mask", "weight"])] = rng.choice(PATTERNS)
        out.append((layout, dtype, options, patterns))
    return out


@pytest.mark.parametrize("block", [64, walk.RUN])
@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_right_results_pass(backend: Backend, name: str, block: int, monkeypatch: Patch) -> None:
    """Layouts, dtypes, reductions, weights and broadcasting; and the bits are those of the same calls outside."""
    if backend.impl == "triton" and block == 64:
        pytest.skip("runs are the plain-PyTorch backend's")
    monkeypatch.setattr(walk, "RUN", block)
    op = OPS[name]
    for layout, dtype, options, patterns in combinations(name, 6 if backend.impl == "triton" else 21):
        weights = [n for n in patterns if n in ("mask", "weight")]
        drawn = make((*op.names, *weights), layout, dtype, seed=1, **patterns)
        found = []
        report = verify()
        for context in (contextlib.nullcontext(), report):
            v = leaves(drawn, device=backend.device)
            given = options | ({"weight": v[weights[0]]} if weights else {})
            before = {n: (t.detach().clone(), t._version) for n, t in v.items()}
            with context:
                outs = op.fast(v, backend.impl, **given)
            outs = list(outs) if isinstance(outs, tuple) else [outs]
            ups = [u.to(o) for u, o in zip(upstream_for(outs), outs, strict=True)]
            grads = torch.autograd.grad(outs, [t for t in v.values() if t.requires_grad], ups)
            found.append([o.detach() for o in outs] + list(grads))
            for n, (value, version) in before.items():
                assert v[n]._version == version, f"{n} was written to"
                assert torch.equal(v[n].detach(), value), n
        counts = report.calls, report.checked, report.backwards, report.mismatches
        assert counts == (1, 1, 1, 0), (layout, dtype, options, patterns)
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_empty_tensors(backend: Backend, name: str, shape: tuple[int, ...]) -> None:
    op = OPS[name]
    for reduction in ["none", "sum", "mean", "batchmean"] if "reduction" in op.options else [None]:
        options = {} if reduction is None else {"reduction": reduction}
        v = leaves({n: torch.zeros(shape) for n in op.names}, device=backend.device)
        with verify() as report:
            run(lambda v, o=options: op.fast(v, backend.impl, **o), v)
        assert report.checked == 1


@each_backend
def test_no_dimensions(backend: Backend) -> None:
    mu, logvar = (torch.tensor(k, device=backend.device, requires_grad=True) for k in (0.5, -0.3))
    with verify() as report:
        kl = fastelbo.gaussian_kl(mu, logvar, batch_dims=0, impl=backend.impl)
        nll = fastelbo.gaussian_nll(mu, logvar, logvar=mu, batch_dims=0, impl=backend.impl)
        z = fastelbo.reparameterize(mu, logvar, seed=3, impl=backend.impl)
        torch.autograd.grad(kl + nll + z, (mu, logvar))
    assert (report.checked, report.backwards) == (3, 3)


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@each_backend
def test_seeds_and_packed_moments(backend: Backend, dtype: torch.dtype, samples: int | None) -> None:
    """Noise from a seed is float32's on every backend: a float64 z is as near to the oracle's as that."""
    moments = torch.randn(3, 10, 7, device=backend.device).to(dtype).requires_grad_()
    prior = [torch.randn(3, 5, 7, device=backend.device).to(dtype).requires_grad_() for _ in range(2)]
    with verify() as report:
        q = fastelbo.DiagonalGaussian.from_moments(moments, 1, logvar_clamp=(-0.4, 0.3), impl=backend.impl)
        for seed in (0, -1, torch.tensor(77)):
            z, kl = q.rsample_kl(fastelbo.DiagonalGaussian(*prior), num_samples=samples, seed=seed)
            torch.autograd.grad(z.sum() + (kl * torch.arange(3.0, device=kl.device)).sum(), (moments, *prior))
    assert (report.checked, report.backwards) == (3, 3)


@each_backend
def test_scalars_on_the_device(backend: Backend) -> None:
    """0-d tensors for beta, the sum of the weights, and the variance; backward twice, so that it recomputes once."""
    for beta in (
        torch.tensor(0.3),
        torch.tensor(2),
        torch.tensor(0.3, dtype=torch.float16),
        torch.tensor(0.3, dtype=torch.float64),
    ):
        v = inputs(backend, recon_logvar="0d", prior_mu="0d")
        weight = make(["weight"], "chunk1", seed=4)["weight"].to(backend.device)
        with verify() as report:
            loss = elbo(v, backend.impl, beta=beta.to(backend.device), weight=weight, reduction="mean")
            for k in (1.0, -3.0):
                torch.autograd.grad(k * loss, list(v.values()), retain_graph=True)
        assert (report.checked, report.backwards) == (1, 2)


@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0, 65536.0, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@each_backend
def test_gradients_that_were_written_in_forward(backend: Backend, dtype: torch.dtype, upstream: float) -> None:
    values = {n: t.to(dtype) for n, t in make(NAMES, "chunk1", seed=3, recon_logvar="channel").items()}
    v = leaves(values, device=backend.device)
    with verify() as report:
        loss = elbo(v, backend.impl, beta=0.5)
        for _ in range(2):
            torch.autograd.grad(loss, list(v.values()), torch.full_like(loss, upstream), retain_graph=True)
    assert (report.checked, report.backwards, report.mismatches) == (1, 2, 0)


@each_backend
def test_what_overflows_must_be_infinite(backend: Backend, monkeypatch: Patch) -> None:
    """In float16 z is, from 65520 on; and a KL of exp(1000). Where NaN goes in, NaN comes out."""
    mu = torch.tensor([[65504.0, -65504.0, 60000.0, 1.0]], dtype=torch.float16, device=backend.device)
    logvar = torch.full_like(mu, 17.0)
    eps = torch.tensor([[10.0, -10.0, 2.0, 0.0]], dtype=torch.float16, device=backend.device)
    huge = torch.tensor([[1000.0, math.nan]], device=backend.device, requires_grad=True)
    with verify() as report:
        z = fastelbo.reparameterize(mu, logvar, eps=eps, impl=backend.impl)
        kl = fastelbo.gaussian_kl(huge, huge, batch_dims=2, impl=backend.impl)
        kl.sum().backward()
    assert report.backwards == 1
    assert z.tolist() == [[math.inf, -math.inf, math.inf, 1.0]]
    assert kl[0, 0] == math.inf
    for wrong in (65504.0, -math.inf, math.nan):

        def lose(out: Any, *_: Any, wrong: float = wrong) -> None:
            out[0][0][0, 0] = wrong

        with monkeypatch.context() as patch:
            wrap(patch, backend, "latent", "forward", lose)
            with pytest.raises(NumericsMismatch, match=r"z is off at \(0, 0\): .* where the oracle has 114651.688"), verify():
                fastelbo.reparameterize(mu, logvar, eps=eps, impl=backend.impl)
    for numbers, message in (
        ((0.0, math.inf), r"\(0, 1\): 0 where the oracle has nan"),
        ((math.nan, 1e30), r"\(0, 0\): 1.00000002e\+30 where the oracle has inf; 1 of 2 elements"),
    ):
        with monkeypatch.context() as patch:
            wrap(patch, backend, "latent", "forward", lambda out, *_, n=numbers: ((None, out[0][1].nan_to_num(*n)), None))
            with pytest.raises(NumericsMismatch, match=f"kl is off at {message}"), verify():
                fastelbo.gaussian_kl(huge, huge, batch_dims=2, impl=backend.impl)


@each_backend
def test_clamped_to_the_edge_before(backend: Backend) -> None:
    """float32(-0.4) is below the -0.4 of the oracle: on the edge to the caller, and its gradient is not 0."""
    raw = torch.tensor([[-0.4, 0.1, 0.7, -0.4, -2.0]], device=backend.device, requires_grad=True)
    mu = torch.zeros_like(raw)
    with verify() as report:
        z, kl = fastelbo.reparameterize_kl(mu, raw.clamp(-0.4, 0.7), seed=1, logvar_clamp=(-0.4, 0.7), impl=backend.impl)
        (g,) = torch.autograd.grad(z.sum() + kl.sum(), raw)
    assert report.backwards == 1
    assert (g[0] != 0).tolist() == [True, True, True, True, False]


@each_backend
def test_close_to_the_prior(backend: Backend, monkeypatch: Patch) -> None:
    """There the oracle itself cancels, and must not call float64 wrong; nor a KL right that has cancelled."""
    tiny = torch.logspace(-30, 0, 61, dtype=torch.float64, device=backend.device)
    for dtype, sign in itertools.product((torch.float32, torch.float64), (1, -1)):
        logvar = (sign * tiny).to(dtype).requires_grad_()
        with verify() as report:
            fastelbo.gaussian_kl(torch.zeros_like(logvar), logvar, batch_dims=1, impl=backend.impl).sum().backward()
        assert report.backwards == 1
    v = torch.full((2, 8), 1e-4, device=backend.device)

    def cancelled(_: Any, inputs: Any, *__: Any) -> Any:
        return (None, 0.5 * (inputs.spread.exp() - 1 - inputs.spread).sum(1)), None

    wrap(monkeypatch, backend, "latent", "forward", cancelled)
    with pytest.raises(NumericsMismatch, match=r"gaussian_kl: kl is off at \(0,\).*2 of 2 elements"), verify():
        fastelbo.gaussian_kl(torch.zeros_like(v), v, impl=backend.impl)


@each_backend
def test_sums_that_cancel(backend: Backend) -> None:
    """The constant against the logarithm, elementwise; and shares of both signs, of which the second half takes the first away."""
    x = torch.randn(4, 50, device=backend.device)
    with verify() as report:
        for level in (-math.log(2 * math.pi), -2.0, 0.0):
            logvar = torch.full_like(x, level) + 1e-4 * torch.randn_like(x)
            for full, batch_dims in itertools.product((True, False), (0, 2)):
                fastelbo.gaussian_nll(x, x, logvar=logvar, full=full, batch_dims=batch_dims, impl=backend.impl)
                fastelbo.gaussian_nll(x, x + 1e-4, logvar=level, full=full, batch_dims=batch_dims, impl=backend.impl)
    assert report.checked == 24
    recon, weight = (torch.randn(4, 51, device=backend.device) for _ in range(2))
    recon, weight = torch.cat((recon, recon.flip(1))), torch.cat((weight, -weight.flip(1)))
    spread = torch.tensor(-0.3, device=backend.device, requires_grad=True)
    with verify() as report:
        fastelbo.gaussian_nll(recon, 0 * recon, logvar=spread, weight=weight, reduction="sum", impl=backend.impl).backward()
    assert report.backwards == 1
    assert float(spread.grad) != 0.0  # or this shows nothing


@each_backend
def test_nothing_under_a_mask_and_a_mask_that_leaks(backend: Backend, monkeypatch: Patch) -> None:
    v = inputs(backend)
    mask = torch.rand_like(v["recon"]) < 0.5
    mask[0] = False
    for n in ("recon", "x", "recon_logvar"):
        v[n].data.masked_fill_(~mask, math.nan)
    with verify() as report:
        elbo(v, backend.impl, weight=mask, reduction="mean").backward()
        elbo(v, backend.impl, weight=mask, reduction="none").sum().backward()
        bad = {n: t.detach().masked_fill(~mask, math.nan).requires_grad_() for n, t in v.items() if n in LATENT}
        fastelbo.gaussian_kl(*bad.values(), weight=mask, impl=backend.impl).sum().backward()
    assert (report.checked, report.backwards) == (3, 3)

    def leak(out: Any, *_: Any) -> None:
        out[0][0, 0] = math.nan

    leave_to_backward(monkeypatch, backend)
    wrap(monkeypatch, backend, "elbo_terms", "backward", leak)
    with (
        pytest.raises(NumericsMismatch, match=r"the gradient of recon is off at \(0, 0, .*: nan where the oracle has 0,"),
        verify(),
    ):
        elbo(v, backend.impl, weight=mask, reduction="none").sum().backward()


@each_backend
def test_a_negative_variance_is_an_error_to_both(backend: Backend) -> None:
    """It shows as NaN where no check can look, while the reference raises it to eps."""
    recon, x = (torch.randn(3, 4, device=backend.device, requires_grad=True) for _ in range(2))
    var = torch.full((3, 4), 0.5, device=backend.device)
    var[1, 2] = -1.0
    var.requires_grad_()
    with verify() as report:
        fastelbo.gaussian_nll(recon, x, var=var, batch_dims=2, impl=backend.impl).sum().backward()
    assert report.backwards == 1
    assert var.grad is not None
    assert var.grad.isnan().nonzero().tolist() == [[1, 2]]


@each_backend
def test_a_standard_deviation_of_zero(backend: Backend) -> None:
    """The oracle's gradient is NaN there, inf - inf; the analytic one is the limit."""
    recon, x = (torch.randn(3, 4, device=backend.device, requires_grad=True) for _ in range(2))
    std = torch.tensor([0.5, 0.0, 1.0, 2.0], device=backend.device, requires_grad=True)
    with verify() as report:
        fastelbo.gaussian_nll(recon, x, std=std, impl=backend.impl).sum().backward()
    assert report.backwards == 1
    assert std.grad is not None
    assert std.grad.isfinite().tolist() == [True, False, True, True]


@each_backend
def test_upstream_gradients_that_are_not_finite(backend: Backend) -> None:
    """There is no truth to hold the gradients to: what lies under a mask is NaN, or 0, by the order of two products."""
    v = inputs(backend)
    mask = torch.rand_like(v["recon"]) < 0.5
    with verify() as report:
        for reduction, up in itertools.product(("none", "mean"), (math.nan, math.inf)):
            (up * elbo(v, backend.impl, weight=mask, reduction=reduction)).sum().backward()
    assert (report.checked, report.backwards) == (4, 0)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "nothing requires grad"])
@each_backend
def test_modes(backend: Backend, mode: str) -> None:
    contexts: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast(backend.device.type, torch.bfloat16),
        "nothing requires grad": torch.enable_grad,
    }
    v = inputs(backend)
    if mode == "nothing requires grad":
        v = {n: t.detach() for n, t in v.items()}
    state = torch.get_rng_state()
    with contexts[mode](), verify() as report:
        here = {n: t + 0 for n, t in v.items()}  # inference tensors in inference mode
        loss = elbo(here, backend.impl, return_terms=True)[0]
        elbo(here, backend.impl, reduction="none")
        fastelbo.gaussian_nll(here["recon"], here["x"], std=here["mu"].exp(), impl=backend.impl)
        fastelbo.reparameterize_kl(here["mu"], here["logvar"], seed=1, impl=backend.impl)
        if mode == "autocast":
            loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert (report.checked, report.backwards) == (4, mode == "autocast")
    assert loss.requires_grad == (mode == "autocast")


# ---- wrong results ---------------------------------------------------------------------------------------------------------------

WEIGHTS = {"rows": torch.tensor([1.0, -0.5, 2.0])}


def rows(t: torch.Tensor) -> torch.Tensor:
    return (t * WEIGHTS["rows"].to(t)).sum()


def nll(v: Values, impl: str) -> torch.Tensor:
    return rows(fastelbo.gaussian_nll(v["recon"], v["x"], logvar=v["recon_logvar"], impl=impl))


def latent(v: Values, impl: str) -> torch.Tensor:
    z, kl = fastelbo.reparameterize_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], seed=5, impl=impl)
    return z.sum() + rows(kl)


def per_row(v: Values, impl: str) -> torch.Tensor:
    return rows(elbo(v, impl, reduction="none"))


def whole(v: Values, impl: str) -> torch.Tensor:
    return elbo(v, impl, beta=0.5)


def kl(v: Values, impl: str) -> torch.Tensor:
    return rows(fastelbo.gaussian_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], impl=impl))


def total_kl(v: Values, impl: str) -> torch.Tensor:
    return fastelbo.gaussian_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], reduction="sum", impl=impl)


def with_terms(v: Values, impl: str) -> torch.Tensor:
    return elbo(v, impl, beta=0.5, return_terms=True)[0]


LATENT = ("mu", "logvar", "prior_mu", "prior_logvar")
NLL = ("recon", "x", "logvar")
# The backend's function that is wrong; a call that runs it; the op's name in messages, and those of the gradients or values.
GRADIENTS: list[tuple[tuple[str, str], Callable[..., torch.Tensor], str, tuple[str, ...]]] = [
    (("likelihood", "backward"), nll, "gaussian_nll", NLL),
    (("latent", "backward"), latent, "reparameterize_kl", LATENT),
    (("elbo_terms", "backward"), per_row, "elbo_loss", NAMES),
    (("elbo", "forward"), whole, "elbo_loss", NAMES),
    (("elbo", "backward"), whole, "elbo_loss", NAMES),
    # Where a backend chooses to write them early:
    (("likelihood", "forward"), nll, "gaussian_nll", NLL),
    (("latent", "forward"), total_kl, "gaussian_kl", LATENT),
    (("latent", "forward"), kl, "gaussian_kl", LATENT),
    (("elbo_terms", "forward"), per_row, "elbo_loss", NAMES),
]
VALUES: list[tuple[tuple[str, str], Callable[..., torch.Tensor], str, tuple[str, ...]]] = [
    (("likelihood", "forward"), nll, "gaussian_nll", ("nll",)),
    (("latent", "forward"), latent, "reparameterize_kl", ("z", "kl")),
    (("elbo_terms", "forward"), per_row, "elbo_loss", ("nll", "kl")),
    (("elbo", "forward"), with_terms, "elbo_loss", ("loss", "nll", "kl")),
]


def each_result(table: list[Any]) -> Any:
    cases = [(step, call, op, i, name) for step, call, op, names in table for i, name in enumerate(names)]
    ids = [f"{'.'.join(c[0])}-{c[1].__name__}-{c[4]}" for c in cases]
    return pytest.mark.parametrize(("step", "call", "op", "i", "name"), cases, ids=ids)


def flat(kept: Any) -> list[Any]:
    return [t for part in kept for t in flat(part)] if isinstance(kept, tuple) else [kept]


def spoil(patch: Patch, backend: Backend, step: tuple[str, str], i: int, change: Callable[[torch.Tensor], Any]) -> None:
    """Change the i-th gradient that a function of a backend returns, in place."""
    if step[1] == "backward":
        leave_to_backward(patch, backend)

    def spoiled(out: Any, *_: Any) -> None:
        change([t for t in (flat(out[1]) if step[1] == "forward" else out) if t is not None][i])

    wrap(patch, backend, *step, spoiled)


@each_result(GRADIENTS)
@each_backend
def test_a_broken_gradient(
    backend: Backend, step: tuple[str, str], call: Callable[..., torch.Tensor], op: str, i: int, name: str, monkeypatch: Patch
) -> None:
    """By a part in a thousand, as a whole and in one element: not the first, and not the largest."""
    if backend.impl == "triton" and step[1] == "forward" and step[0] != "elbo":
        pytest.skip("no gradients ready")
    at = (1, 2, 2, 3)
    for where, least in ((..., 100), (at, 1)):
        with monkeypatch.context() as patch:
            spoil(patch, backend, step, i, lambda t, where=where: t[where].mul_(1.001))
            v = inputs(backend)
            with pytest.raises(NumericsMismatch) as caught, verify() as report:
                (3 * call(v, backend.impl)).backward()
        message = str(caught.value)
        assert message.startswith(f"{op}: the gradient of {name} is off at ")
        assert (report.checked, report.backwards, report.mismatches) == (1, 1, 1)
        count = re.search(
            rf"; (\d+) of 180 elements are off in \(3, 4, 3, 5\) float32; by {backend.ops().name}, {step[0]}.backward\(", message
        )
        assert count is not None
        assert least <= int(count[1]) <= (180 if least > 1 else 1)
        assert where is ... or f"is off at {at}: " in message


@each_result(VALUES)
@each_backend
def test_a_broken_value(
    backend: Backend, step: tuple[str, str], call: Callable[..., torch.Tensor], op: str, i: int, name: str, monkeypatch: Patch
) -> None:
    def off(out: Any, *_: Any) -> Any:
        return tuple(t * 1.001 if k == i else t for k, t in enumerate(out[0])), out[1]

    wrap(monkeypatch, backend, *step, off)
    pattern = rf"^{op}: {name} is off at .*by {backend.ops().name}, {step[0]}.forward\("
    with pytest.raises(NumericsMismatch, match=pattern), verify() as report:
        call(inputs(backend), backend.impl)
    assert (report.checked, report.backwards, report.mismatches) == (1, 0, 1)


@pytest.mark.parametrize("step", [("likelihood", "backward"), ("elbo_terms", "backward"), ("elbo", "forward")])
@pytest.mark.parametrize("pattern", ["0d", "channel", "sample", "pixel"])
@each_backend
def test_a_broken_gradient_of_a_shared_variance(backend: Backend, pattern: str, step: tuple[str, str], monkeypatch: Patch) -> None:
    """Its shares cancel; a part in a thousand of what is added up is seen nevertheless."""
    call, names = next((call, names) for name, call, _, names in GRADIENTS if name == step)
    spoil(monkeypatch, backend, step, 2, lambda t: t.add_(1e-3 * t.abs().max()))
    with pytest.raises(NumericsMismatch, match=f"the gradient of {names[2]} is off"), verify():
        call(inputs(backend, recon_logvar=pattern), backend.impl).backward()


@each_backend
def test_broken_packed_moments(backend: Backend, monkeypatch: Patch) -> None:
    """What counts is what lies in the caller's buffer."""
    moments = torch.randn(3, 8, 5, device=backend.device, requires_grad=True)
    real = backend.ops().latent.backward

    def broken(*args: Any, out: Any) -> Any:
        grads = real(*args, out=out)
        kept = [None if g is None else g.clone() for g in grads]
        out[1][2, 3, 4] += 1e-3
        return kept

    backend.replace(monkeypatch, "latent", backward=broken)
    with verify():
        z, kl = fastelbo.DiagonalGaussian.from_moments(moments, impl=backend.impl).rsample_kl(seed=1)
    with pytest.raises(NumericsMismatch, match=r"^DiagonalGaussian.rsample_kl: the gradient of logvar is off at \(2, 3, 4\): "):
        (z.sum() + kl.sum()).backward()


@each_backend
def test_a_gradient_that_never_comes_and_one_of_the_wrong_kind(backend: Backend, monkeypatch: Patch) -> None:
    changes: list[tuple[Callable[..., Any], str]] = [
        (lambda out, *_: (None, *out[1:]), "the gradient of recon is off at .*: 0 where the oracle has"),
        (
            lambda out, *_: (out[0].double(), *out[1:]),
            r"the gradient of recon is \(3, 4, 3, 5\) float64.*, expected \(3, 4, 3, 5\) float32",
        ),
        (
            lambda out, *_: (out[0].sum(1), *out[1:]),
            r"the gradient of recon is \(3, 3, 5\) float32.*, expected \(3, 4, 3, 5\) float32",
        ),
    ]
    for change, message in changes:
        with monkeypatch.context() as patch:
            leave_to_backward(patch, backend)
            wrap(patch, backend, "likelihood", "backward", change)
            with pytest.raises(NumericsMismatch, match=message), verify():
                nll(inputs(backend), backend.impl).backward()


@each_backend
def test_wrong_noise(backend: Backend, monkeypatch: Patch) -> None:
    """Other noise in backward than in forward, and other noise than the seed's in both."""
    for step, what in (("backward", "the gradient of logvar"), ("forward", "z")):
        real = getattr(backend.ops().latent, step)

        def shifted(inputs: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            return real(inputs._replace(seed=inputs.seed + 1), *args, **kwargs)

        with monkeypatch.context() as patch:
            backend.replace(patch, "latent", **{step: shifted})
            for samples in (None, 2):
                v = inputs(backend)
                with pytest.raises(NumericsMismatch, match=f"^reparameterize: {what} is off"), verify():
                    fastelbo.reparameterize(v["mu"], v["logvar"], samples, seed=9, impl=backend.impl).sum().backward()


@each_backend
def test_gradients_changed_between_forward_and_backward(backend: Backend, monkeypatch: Patch) -> None:
    """Those of elbo_loss lie ready: whoever writes into them before they are handed over is found."""
    kept: list[Any] = []
    wrap(monkeypatch, backend, "elbo", "forward", lambda out, *_: kept.append(flat(out[1])))
    for up in (1.0, 2.0):
        with verify():
            loss = elbo(inputs(backend), backend.impl)
        kept[-1][4][0, 1, 2, 3] += 1e-3
        with pytest.raises(NumericsMismatch, match=r"the gradient of logvar is off at \(0, 1, 2, 3\)"):
            (up * loss).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_backend
def test_inputs_changed_between_forward_and_backward(backend: Backend, dtype: torch.dtype) -> None:
    """Gradients that lie ready are those of the values that went in, and so must the oracle's be."""
    v = leaves({n: t.to(dtype) for n, t in make(NAMES, "chunk1", seed=3).items()}, device=backend.device)
    with verify() as report:
        loss = elbo(v, backend.impl)
    for t in v.values():
        t.data.mul_(-2)
    loss.backward()
    assert report.backwards == 1


@each_backend
def test_a_second_backward_is_checked(backend: Backend, monkeypatch: Patch) -> None:
    v = inputs(backend)

    def only_recomputed(out: Any, *args: Any) -> None:
        if args[4] is None:
            out[3].mul_(1.001)

    wrap(monkeypatch, backend, "elbo", "backward", only_recomputed)
    with verify() as report:
        loss = elbo(v, backend.impl)
    torch.autograd.grad(loss, list(v.values()), retain_graph=True)
    assert (report.backwards, report.mismatches) == (1, 0)
    with pytest.raises(NumericsMismatch, match="elbo_loss: the gradient of mu is off"):
        torch.autograd.grad(loss, list(v.values()), retain_graph=True)
    assert (report.backwards, report.mismatches) == (2, 1)
    # Differentiable gradients are the reference's own.
    torch.autograd.grad(loss, list(v.values()), create_graph=True)
    assert report.backwards == 2


@each_backend
def test_what_autograd_hands_to_the_backend_is_checked(backend: Backend) -> None:
    """The second backward is held to the factors of the call, whatever it is given: the op itself cannot see that one is off."""
    v = inputs(backend)
    with verify():
        loss = elbo(v, backend.impl, beta=0.3)
    torch.autograd.grad(loss, list(v.values()), retain_graph=True)
    node: Any = loss.grad_fn
    node.spec = node.spec._replace(beta=torch.tensor(0.3, dtype=torch.bfloat16, device=backend.device).float())
    with pytest.raises(NumericsMismatch, match="elbo_loss: the gradient of mu is off"):
        torch.autograd.grad(loss, list(v.values()))


@each_backend
def test_backward_in_inference_mode(backend: Backend, monkeypatch: Patch) -> None:
    for wrong in (False, True):
        v = inputs(backend)
        if wrong:
            wrap(monkeypatch, backend, "likelihood", "backward", lambda out, *_: tuple(None if g is None else 2 * g for g in out))
        with verify() as report:
            loss = nll(v, backend.impl)
            with torch.inference_mode(), pytest.raises(NumericsMismatch) if wrong else contextlib.nullcontext():
                torch.autograd.grad(loss, list(v.values())[:3])
        assert (report.checked, report.backwards) == (1, 1)


@each_backend
def test_half_precision_is_held_to_one_rounding(backend: Backend, monkeypatch: Patch) -> None:
    for dtype, seen, unseen in ((torch.bfloat16, 0.03, 1e-3), (torch.float16, 4e-3, 1e-4)):
        values = {n: t.to(dtype) for n, t in make(NAMES, "chunk1", seed=3).items()}
        for error in (seen, unseen):
            with monkeypatch.context() as patch:
                spoil(patch, backend, ("elbo_terms", "backward"), 0, lambda t, e=error: t.mul_(1 + e))
                with verify(on_mismatch="warn") as report, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    per_row(leaves(values, device=backend.device), backend.impl).backward()
            assert report.mismatches == (error == seen), (dtype, error)


# What is rounded on its way into the products of a linear layer: the inputs' dtype, and what is asked for.
ROUNDED = {"bfloat16": (torch.bfloat16, None), "float16": (torch.float16, None), "tf32": (torch.float32, "tf32")}
LAYER = ("h", "x", "weight", "bias", "logvar")
SAMPLED = ("x", "mu", "logvar", "weight", "bias", "recon_logvar", "prior_mu", "prior_logvar")
SHAPES = {"x": (6, 40), "weight": (40, 4), "bias": (40,), "recon_logvar": (40,)}  # and (6, 4)


def across(op: str, kind: str, backend: Backend, reduction: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A loss across a linear layer, and its inputs in the order of their record."""
    dtype, precision = ROUNDED[kind]
    names = LAYER if op == "linear_nll" else SAMPLED
    shapes = SHAPES | ({"logvar": (40,)} if op == "linear_nll" else {})
    generator = torch.Generator().manual_seed(5)
    v = {n: 0.5 * torch.randn(shapes.get(n, (6, 4)), generator=generator) for n in names}
    v = {n: t.to(backend.device, dtype).requires_grad_() for n, t in v.items()}
    options: Any = {"precision": precision, "reduction": reduction, "impl": backend.impl}
    if op == "linear_nll":
        loss = fastelbo.linear_gaussian_nll(v["h"], v["weight"], v["x"], v["bias"], logvar=v["logvar"], **options)
    else:
        of_layer = v["x"], v["mu"], v["logvar"], v["weight"], v["bias"]
        options |= {n: v[n] for n in SAMPLED[5:]} | {"seed": 3}
        loss = fastelbo.linear_elbo_loss(*of_layer, **options)
    return list(v.values()), loss.sum()


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("op", ["linear_nll", "linear_elbo"])
@each_backend
def test_a_linear_gradient_that_is_wrong_by_half(backend: Backend, op: str, kind: str, monkeypatch: Patch) -> None:
    """Half precision and tf32 round factors of products. What that may do to a result is its own, and no multiple of rtol."""
    names = LAYER if op == "linear_nll" else SAMPLED
    factors = [1.0] * len(names)
    right: list[torch.Tensor] = []
    backward = getattr(backend.ops(), op).backward

    def scaled(*args: Any) -> Any:
        right[:] = right or backward(*args)
        return tuple(g * factor for g, factor in zip(right, factors, strict=True))

    for reduction, wrong in (("none", 0.5), ("sum", 1.5)):
        for rtol in (None, 1e-5, 1e-2):
            with verify(rtol=rtol) as report:
                v, loss = across(op, kind, backend, reduction)
            for _ in range(2):  # as the forward pass may have left it, and computed again
                torch.autograd.grad(loss, v, retain_graph=True)
            assert (report.checked, report.backwards, report.mismatches) == (1, 2, 0)
            right.clear()
            with monkeypatch.context() as patch:
                backend.replace(patch, op, backward=scaled)
                with verify(rtol=rtol):
                    v, loss = across(op, kind, backend, reduction)
            for i, name in enumerate(names):
                factors[i] = wrong
                with pytest.raises(NumericsMismatch, match=f"the gradient of {name} is off"):
                    torch.autograd.grad(loss, v, retain_graph=True)
                factors[i] = 1.0


@each_backend
def test_rtol(backend: Backend, monkeypatch: Patch) -> None:
    with pytest.raises(NumericsMismatch, match=r"where \d\.\d+e-\d\d is allowed"), verify(rtol=1e-10):
        nll(inputs(backend), backend.impl).backward()
    spoil(monkeypatch, backend, ("likelihood", "backward"), 0, lambda t: t.mul_(1.001))
    with verify(rtol=2e-3) as report:
        nll(inputs(backend), backend.impl).backward()
    assert report.backwards == 1
    with pytest.raises(NumericsMismatch), verify(rtol=5e-4):
        nll(inputs(backend), backend.impl).backward()


def test_the_message(monkeypatch: Patch) -> None:
    recon = torch.zeros(2, 3, requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]).t()
    spoil(monkeypatch, EAGER, ("likelihood", "backward"), 0, lambda t: t[1].mul_(torch.tensor([1.0, 1.5, 1.001])))
    with pytest.raises(NumericsMismatch) as caught, verify():
        fastelbo.gaussian_nll(recon, x, reduction="sum", impl="torch").backward()
    assert str(caught.value) == (
        "gaussian_nll: the gradient of recon is off at (1, 1): -12 where the oracle has -8, an error of 4 where 0.000161 is "
        "allowed; 2 of 6 elements are off in (2, 3) float32; by fastelbo.eager, likelihood.backward(recon (2, 3) float32, "
        "x (2, 3) float32 with strides (1, 2), spec Likelihood(keep 0, scale 1.0, parameter 'logvar', logvar 0.0, full True, "
        "floor -inf, x_scale 1.0, x_shift 0.0, family 'gaussian'), grad_nll 1.0 float32, needs (True, False, False, False))"
    )


def test_names_of_callers(monkeypatch: Patch) -> None:
    """The outermost of the package's own functions, so that the user finds it in the user's code."""
    for op in ("likelihood", "latent", "elbo", "elbo_terms"):
        wrap(monkeypatch, EAGER, op, "forward", lambda out, *_: (tuple(o if o is None else -o for o in out[0]), out[1]))
    v = make(("recon", "x", "mu", "logvar", "var"), "contiguous")
    recon, x, mu, logvar, var = v.values()
    q = fastelbo.DiagonalGaussian(mu, logvar)
    calls: dict[str, Callable[[], Any]] = {
        "gaussian_nll": lambda: fastelbo.gaussian_nll(recon, x),
        "gaussian_nll_loss": lambda: fastelbo.gaussian_nll_loss(recon, x, var),
        "GaussianNLLLoss.forward": lambda: fastelbo.GaussianNLLLoss()(recon, x, var),
        "gaussian_kl": lambda: fastelbo.gaussian_kl(mu, logvar),
        "reparameterize": lambda: fastelbo.reparameterize(mu, logvar),
        "Reparameterize.forward": lambda: fastelbo.Reparameterize()(mu, logvar),
        "DiagonalGaussian.kl": q.kl,
        "DiagonalGaussian.sample": q.sample,
        "DiagonalGaussian.nll": lambda: q.nll(x),
        "elbo_terms": lambda: fastelbo.elbo_terms(recon, x, mu, logvar),
        "elbo_loss": lambda: fastelbo.elbo_loss(recon, x, mu, logvar, reduction="none"),
        "ELBOLoss.forward": lambda: fastelbo.ELBOLoss()(recon, x, mu, logvar),
        "sgvb_loss": lambda: fastelbo.sgvb_loss(lambda z: z, x, mu, logvar),
    }
    for name, call in calls.items():
        with pytest.raises(NumericsMismatch, match=f"^{name}: "), verify():
            call()


# ---- the context -----------------------------------------------------------------------------------------------------------------


@each_backend
def test_off_it_costs_nothing(backend: Backend, monkeypatch: Patch) -> None:
    """The backend is itself, before and after, however the context was left."""

    def chosen() -> Any:
        return chooser.choose(backend.impl, backend.device)

    def assert_off() -> None:
        assert chooser.watcher is None
        assert chosen() is backend.ops()

    assert_off()
    with verify():
        assert chosen() is not backend.ops()
    assert_off()
    with pytest.raises(KeyError), verify():
        raise KeyError
    assert_off()
    wrap(monkeypatch, backend, "likelihood", "forward", lambda out, *_: ((out[0][0] + 1,), out[1]))
    with pytest.raises(NumericsMismatch), verify():
        nll(inputs(backend), backend.impl)
    assert_off()
    assert nll(inputs(backend), backend.impl).isfinite()


def test_every_op_of_a_backend_is_checked() -> None:
    ops = chooser.EAGER._fields[1:-1]  # inside `verify` the last, a list, is single calls
    assert (*ops, "latents") == (*OUTPUTS, chooser.EAGER._fields[-1])
    assert len(ops) == 6
    with verify():
        served = chooser.choose("torch", CPU)
    assert served is not None
    for name in ops:
        checked, real = getattr(served, name), getattr(chooser.EAGER, name)
        assert checked.forward != real.forward
        assert checked.backward != real.backward


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every(every: int) -> None:
    """One call in each N, the first at once, and in a loop of N calls each of them in its turn."""
    mu = torch.zeros(2, 3)
    seen: list[int] = []
    with verify(every=every) as report:
        for i in range(3 * every * every):
            before = report.checked
            fastelbo.gaussian_kl(mu, mu)
            seen += [i] * (report.checked - before)
    assert report.calls == 3 * every * every
    assert report.checked == len(seen) == 3 * every
    assert seen[0] == 0
    assert [i // every for i in seen] == list(range(3 * every))
    for k in range(every):
        assert sum(i % every == k for i in seen) == 3


def test_the_backward_of_a_call_that_was_not_checked_is_not() -> None:
    mu = torch.ones(2, 3, requires_grad=True)
    with verify(every=10) as report:
        losses = [fastelbo.gaussian_kl(mu, mu).sum() for _ in range(3)]
        sum(losses).backward()
    assert (report.calls, report.checked, report.backwards) == (3, 1, 1)


def test_calls_without_a_backend_do_not_count() -> None:
    mu = torch.ones(2, 3, requires_grad=True)
    with verify() as report:
        fastelbo.gaussian_kl(mu, mu, impl="reference").sum().backward()
    assert (report.calls, report.checked, report.backwards) == (0, 0, 0)


@each_backend
def test_a_backward_after_the_context(backend: Backend, monkeypatch: Patch) -> None:
    spoil(monkeypatch, backend, ("likelihood", "backward"), 1, lambda t: t.mul_(1.001))
    with verify() as report:
        loss = nll(inputs(backend), backend.impl)
    assert (report.calls, report.backwards) == (1, 0)
    with pytest.raises(NumericsMismatch, match="the gradient of x"):
        loss.backward()
    assert (report.calls, report.backwards, report.mismatches) == (1, 1, 1)


def test_warnings(monkeypatch: Patch) -> None:
    """One for each result that is off, and the program goes on with what the backend returned."""
    v = inputs(EAGER)
    for i in (0, 2, 5):
        spoil(monkeypatch, EAGER, ("elbo", "forward"), i, lambda t: t.mul_(2.0))
    wrap(monkeypatch, EAGER, "elbo", "forward", lambda out, *_: ((out[0][0] + 1, *out[0][1:]), out[1]))
    with warnings.catch_warnings(record=True) as caught, verify(on_mismatch="warn") as report:
        warnings.simplefilter("always")
        elbo(v, "torch").backward()
    assert [w.category for w in caught] == [RuntimeWarning] * 4
    found = [re.match(r"elbo_loss: (.*) is off at", str(w.message))[1] for w in caught]  # type: ignore[index]
    assert found == ["loss", "the gradient of recon", "the gradient of recon_logvar", "the gradient of prior_mu"]
    assert (report.calls, report.checked, report.backwards, report.mismatches) == (1, 1, 1, 4)
    want = run(
        lambda t: slow_loss(*(t[n] for n in ("recon", "x", "mu", "logvar")), **{n: t[n] for n in NAMES if "_" in n}),
        leaves(v, dtype=torch.float64),
    )[1]
    torch.testing.assert_close(v["recon"].grad, 2 * want["recon"].float())


def test_nesting(monkeypatch: Patch) -> None:
    mu = torch.ones(2, 3, requires_grad=True)

    def call() -> None:
        fastelbo.gaussian_kl(mu, mu).sum().backward()

    with verify() as outer:
        call()
        with verify(every=2) as inner:
            for _ in range(4):
                call()
        call()
    assert (outer.calls, outer.checked, outer.backwards) == (6, 6, 6)
    assert (inner.calls, inner.checked, inner.backwards) == (4, 2, 2)
    # The same object twice, one inside the other, is two.
    with outer, outer:
        call()
    assert outer.calls == 8
    assert chooser.watcher is None
    v = inputs(EAGER)
    with verify() as outer, verify() as inner:
        elbo(v, None).mul(2).backward()
    assert (outer.backwards, inner.backwards) == (1, 1)
    wrap(monkeypatch, EAGER, "latent", "forward", lambda out, *_: ((None, out[0][1] + 1), out[1]))
    with pytest.warns(RuntimeWarning), verify(on_mismatch="warn") as outer, pytest.raises(NumericsMismatch), verify() as inner:
        call()
    assert (outer.mismatches, inner.mismatches) == (1, 1)


def test_contexts_of_threads_that_end_in_any_order() -> None:
    a, b = verify(), verify()
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert chooser.watcher is not None
    fastelbo.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3))
    b.__exit__(None, None, None)
    assert chooser.watcher is None
    assert (a.calls, b.calls) == (0, 1)


def test_threads(monkeypatch: Patch) -> None:
    """All threads count, none twice; and a mismatch of a backward comes out of that backward."""
    start = threading.Barrier(4)

    def work(k: int) -> None:
        v = {n: t.detach().requires_grad_() for n, t in make(NAMES, "chunk1", seed=k).items()}
        start.wait()
        for _ in range(8):
            elbo(v, None).backward()

    with verify(every=2) as report, ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (report.calls, report.checked, report.backwards, report.mismatches) == (32, 16, 16, 0)

    spoil(monkeypatch, EAGER, ("likelihood", "backward"), 0, lambda t: t.mul_(1.001))
    with verify() as report, ThreadPoolExecutor(1) as pool:
        loss = nll(inputs(EAGER), "torch")
        with pytest.raises(NumericsMismatch, match="the gradient of recon"):
            pool.submit(loss.backward).result()
    assert report.mismatches == 1


@each_backend
def test_as_a_decorator(backend: Backend, monkeypatch: Patch) -> None:
    report = verify(every=2)
    v = inputs(backend)

    @report
    def step(scale: float, *, shift: float = 0.0) -> torch.Tensor:
        """Of a training loop."""
        assert chooser.watcher is not None
        return scale * nll(v, backend.impl) + shift

    assert (step.__name__, step.__doc__) == ("step", "Of a training loop.")
    assert chooser.watcher is None
    for i in range(4):
        step(2.0, shift=float(i)).backward()
        assert chooser.watcher is None
    nll(v, backend.impl)
    assert (report.calls, report.checked, report.backwards, report.mismatches) == (4, 2, 2, 0)
    torch.testing.assert_close(step(1.0, shift=3.0), nll(v, backend.impl) + 3.0)

    wrap(monkeypatch, backend, "likelihood", "forward", lambda out, *_: ((out[0][0] * 1.001,), out[1]))

    @verify(every=1)
    def wrong() -> Any:
        return nll(v, backend.impl)

    with pytest.raises(NumericsMismatch, match=r"^gaussian_nll: nll is off"):
        wrong()
    assert chooser.watcher is None


def test_what_it_cannot_decorate() -> None:
    """What runs in pieces would run outside."""

    def generates() -> Any:
        yield 1

    async def waits() -> None: ...

    async def does_both() -> Any:
        yield 1

    with verify() as report:
        pass
    for function in (generates, waits, does_both):
        with pytest.raises(
            TypeError, match=rf"^verify cannot decorate .*{function.__name__}, which runs in pieces: use `with` ins"
        ):
            report(function)
    for no_function in (None, torch.nn.Linear):
        with pytest.raises(TypeError, match=r"^verify decorates functions, got "):
            report(no_function)  # type: ignore[type-var]


def test_repr() -> None:
    mu = torch.ones(2, 3, requires_grad=True)
    with verify(every=3, rtol=1e-4) as report:
        for _ in range(4):
            fastelbo.gaussian_kl(mu, mu).sum().backward()
    text = "<fastelbo.verify(every=3, rtol=0.0001, on_mismatch='raise'): 4 calls, 1 checked, 1 backwards, 0 mismatches>"
    assert repr(report) == str(report) == text


NEVER = "this fastelbo.verify was never entered and checked nothing: use it in a `with` statement or as a decorator"


def test_an_instance_without_use_says_so_when_it_is_collected() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verify(every=100)
        line = sys._getframe().f_lineno - 1
        gc.collect()
    assert [(w.category, str(w.message), w.filename, w.lineno) for w in caught] == [(UserWarning, NEVER, __file__, line)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with verify():
            pass
        verify()(lambda: None)
        with pytest.raises(ValueError, match="every"):
            verify(every=0)
        gc.collect()


def test_an_instance_without_use_says_so_at_exit() -> None:
    code = "import fastelbo\nreport = fastelbo.verify(every=100)\nprint('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr.startswith(f"<string>:2: UserWarning: {NEVER}")
    used = code.replace("print", "report(len)('')\nprint")
    done = subprocess.run([sys.executable, "-c", used], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_that_are_checked_once(use_reentrant: bool) -> None:
    """The first forward is checked, the one that is repeated in backward is not: both must save the same tensors."""
    from torch.utils.checkpoint import checkpoint

    v = inputs(EAGER)
    with verify(every=5) as report:
        loss = checkpoint(lambda *t: per_row(dict(zip(NAMES, t, strict=True)), "torch"), *v.values(), use_reentrant=use_reentrant)
        loss.backward()
    assert (report.calls, report.checked) == (2, 1)
    want = run(lambda t: per_row(t, "torch"), inputs(EAGER))[1]
    for n, t in v.items():
        assert torch.equal(t.grad, want[n])


def test_hooks_on_saved_tensors_see_nothing_of_it(monkeypatch: Patch) -> None:
    leave_to_backward(monkeypatch, EAGER)
    seen = []
    for context in (contextlib.nullcontext(), verify()):
        saved: list[torch.dtype] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.dtype) or t, lambda t: t), context:
            per_row(inputs(EAGER), "torch").backward()
        seen.append(saved)
    assert seen[0] == seen[1]
    assert torch.float64 not in seen[0]


def test_double_backward() -> None:
    v = leaves(make(("mu", "logvar"), "contiguous", "float64"))
    with verify() as report:
        assert torch.autograd.gradgradcheck(
            lambda m, s: fastelbo.gaussian_kl(m, s, reduction="sum", impl="torch"), tuple(v.values())
        )
    assert report.calls == report.checked > 0


@pytest.mark.parametrize("impl", [None, "torch"])
def test_traces_are_not_checked(impl: str | None, monkeypatch: Patch) -> None:
    """Inside and outside they are the same graph, and it is not compiled for each context."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    v = inputs(EAGER)
    want = elbo(v, impl).detach()
    compiled = torch.compile(lambda t: elbo(t, impl), backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(v).detach(), want)
        with verify() as report:
            compiled(v).backward()
        assert (report.calls, report.checked, report.backwards) == (0, 0, 0)
    assert counter.frame_count == 1


def test_operators_of_traces_are_not_checked() -> None:
    """Across a linear layer the likelihood is an operator of the graph, which asks for its backend when it runs."""
    generator = torch.Generator().manual_seed(2)
    h, weight, x = (torch.randn(s, generator=generator).requires_grad_() for s in ((6, 4), (9, 4), (6, 9)))
    compiled = torch.compile(
        lambda: fastelbo.linear_gaussian_nll(h, weight, x, reduction="sum"), backend="aot_eager", fullgraph=True
    )
    with verify() as report:
        compiled().backward()
    assert (report.calls, report.checked, report.backwards) == (0, 0, 0)
    fastelbo.linear_gaussian_nll(h, weight, x, reduction="sum").mul(-1).backward()
    for t in (h, weight, x):
        assert t.grad is not None
        assert float(t.grad.abs().max()) < 1e-4


def test_captured_graphs_are_not_checked(monkeypatch: Patch) -> None:
    """A check reads values back, which a stream that is being captured forbids."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with verify() as report:
        assert chooser.choose("torch", CPU) is chooser.EAGER
    assert report.calls == 0


def test_a_mismatch_is_no_runtime_error() -> None:
    """Loops that catch those, for memory that has run out, must not swallow it."""
    assert issubclass(NumericsMismatch, AssertionError)
    assert not issubclass(NumericsMismatch, RuntimeError)
    assert {"verify", "NumericsMismatch"} <= set(fastelbo.__all__)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": -3}, ValueError, "every must be at least 1, got -3"),
        ({"every": 2.0}, TypeError, "every must be an int, got float"),
        ({"every": True}, TypeError, "every must be an int, got bool"),
        ({"rtol": -1e-3}, ValueError, "rtol must be finite and not negative, got -0.001"),
        ({"rtol": math.nan}, ValueError, "rtol must be finite and not negative, got nan"),
        ({"rtol": math.inf}, ValueError, "rtol must be finite and not negative, got inf"),
        ({"rtol": "1e-3"}, TypeError, "rtol must be a number or None, got str"),
        ({"rtol": False}, TypeError, "rtol must be a number or None, got bool"),
        ({"on_mismatch": "log"}, ValueError, "on_mismatch must be 'raise' or 'warn', got 'log'"),
        ({"on_mismatch": None}, ValueError, "on_mismatch must be 'raise' or 'warn', got None"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        verify(**options)
    assert chooser.watcher is None
