"""Every operation on every backend against the float64 oracle: dtypes, layouts, reductions, sizes, weights, extremes, noise."""

from __future__ import annotations

import functools
import itertools
import math
import random
import zlib
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    CPU,
    DTYPES,
    LAYOUTS,
    OPS,
    PATTERNS,
    TORCH,
    Backend,
    Op,
    accumulated,
    assert_close,
    broadcast_shape,
    check,
    draw,
    each_backend,
    leaves,
    make,
    run,
    slow_kl,
    slow_loss,
    slow_nll,
    slow_sample,
    slow_sgvb,
    slow_terms,
)

import fastelbo
from fastelbo.eager import walk
from fastelbo.noise import philox_normal

REFERENCE = pytest.param(Backend("reference", CPU), id="reference")


def variances(op: Op) -> list[str]:
    """The likelihood's variance among the inputs, which may broadcast; the posterior's logvar may not."""
    return [n for n in op.names if n in ("std", "var", "recon_logvar") or (n == "logvar" and "mu" not in op.names)]


def some_weight(op: Op, rng: random.Random) -> str | None:
    if "weight" not in op.options or rng.random() < 0.6:
        return None
    return f"{rng.choice(['mask', 'weight'])}:{rng.choice(PATTERNS)}"


def options_of(op: Op, rank: int, rng: random.Random) -> dict[str, Any]:
    """Some setting of the options that the operation takes."""
    out: dict[str, Any] = {}
    if "reduction" in op.options:
        out["reduction"] = rng.choice(["none", "batchmean", "sum", "mean"])
    if "batch_dims" in op.options:
        out["batch_dims"] = rng.choice([0, 1, 1, min(2, rank), rank])
    if "logvar_clamp" in op.options and rng.random() < 0.4:
        out["logvar_clamp"] = (-1.0, 0.75)
    return out


def compare(name: str, backend: Backend, layout: str, dtype: str, options: dict[str, Any], *, weight: str | None = None,
            patterns: dict[str, str] | None = None, seed: int = 0, **more: Any) -> None:  # fmt: skip
    """One operation against its oracle; `weight` is "mask:PATTERN" or "weight:PATTERN"."""
    op = OPS[name]
    tensors = make(op.names, layout, dtype, seed, **(patterns or {}))
    kind = None
    if weight is not None:
        kind, pattern = weight.split(":")
        tensors |= make([kind], layout, "float32", seed + 1, **{kind: pattern})

    def fast(v: dict[str, torch.Tensor]) -> Any:
        return op.fast(v, backend.impl, **options, **({} if kind is None else {"weight": v[kind]}))

    def slow(v: dict[str, torch.Tensor]) -> Any:
        return op.slow(v, **options, **({} if kind is None else {"weight": v[kind]}))

    acc = accumulated(*(tensors[n] for n in op.names if n != "eps"))
    z = [tensors["mu"].dtype] if op.returns_z else []
    outputs = len(z) if op.options == () else {"elbo_terms": 2}.get(name, 1 + len(z))
    check(fast, slow, tensors, backend, out_dtypes=z + [acc] * (outputs - len(z)), **more)


def covering(name: str, count: int) -> list[Any]:
    """`count` combinations in which every layout, dtype, reduction and broadcast pattern meets many of the others.

    Layouts and dtypes go round in steps that share no factor, so that count = 105 would meet every pair; the rest is drawn.
    """
    op, rng = OPS[name], random.Random(zlib.crc32(name.encode()))
    start = rng.randrange(105)
    out = []
    for i in range(start, start + count):
        layout, dtype = list(LAYOUTS)[i * 2 % len(LAYOUTS)], list(DTYPES)[i % len(DTYPES)]
        size, view = LAYOUTS[layout]
        options = options_of(op, view(torch.empty(size)).ndim, rng)
        weight = some_weight(op, rng)
        patterns = {n: rng.choice(PATTERNS) for n in variances(op)}
        patterns |= {n: rng.choice(PATTERNS) for n in op.names if n.startswith("prior") and name != "DiagonalGaussian"}
        shown = "-".join([layout, dtype, *(str(v) for v in options.values()), *filter(None, [weight]), *patterns.values()])
        out.append((layout, dtype, options, weight, patterns, shown))
    return out


def covered() -> list[Any]:
    out = []
    for backend, count in zip([*BACKENDS, REFERENCE], [35, 10, *[20] * (len(BACKENDS) - 2), 7], strict=True):
        for name in OPS:
            for layout, dtype, options, weight, patterns, shown in covering(name, count):
                if backend.id == "reference" and OPS[name].returns_z and dtype not in ("float32", "float64"):
                    continue  # it leaves it to autograd to add up gradients that were rounded already
                label = f"{backend.id}-{name}-{shown}".replace(" ", "")
                out.append(
                    pytest.param(*backend.values, name, layout, dtype, options, weight, patterns, marks=backend.marks, id=label)
                )
    return out


@pytest.mark.parametrize(("backend", "name", "layout", "dtype", "options", "weight", "patterns"), covered())
def test_against_oracle(
    backend: Backend, name: str, layout: str, dtype: str, options: dict[str, Any], weight: str | None, patterns: dict[str, str]
) -> None:
    compare(name, backend, layout, dtype, options, weight=weight, patterns=patterns)


@each_backend
def test_one_float64_input_makes_the_loss_float64(backend: Backend) -> None:
    """Whichever it is, the whole loss is computed and returned in float64."""
    names = ("recon", "x", "recon_logvar", "mu", "logvar", "prior_mu", "prior_logvar")
    base = make(names, "contiguous")
    failed = []
    for double, reduction in itertools.product(names, ["none", "batchmean"]):
        tensors = {**base, double: base[double].double()}

        def terms(v: dict[str, torch.Tensor], fn: Any, reduction: str = reduction, **o: Any) -> Any:
            args = (v[n] for n in ("recon", "x", "mu", "logvar"))
            return fn(*args, **{n: v[n] for n in ("recon_logvar", "prior_mu", "prior_logvar")}, reduction=reduction, **o)

        for fast, slow, count in ((fastelbo.elbo_terms, slow_terms, 2), (fastelbo.elbo_loss, slow_loss, 1)):
            try:
                check(
                    lambda v, f=fast: terms(v, f, impl=backend.impl),
                    lambda v, f=slow: terms(v, f),
                    tensors,
                    backend,
                    out_dtypes=[torch.float64] * count,
                )
            except AssertionError as error:
                failed.append(f"{fast.__name__} {reduction} with a double {double}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("form", ["logvar", "std", "var"])
@pytest.mark.parametrize("pattern", PATTERNS)
@each_backend
def test_variance_patterns(backend: Backend, pattern: str, form: str) -> None:
    for options in ({"reduction": "mean"}, {"batch_dims": 1}, {"batch_dims": 2}):
        compare(f"gaussian_nll_{form}", backend, "contiguous", "float32", options, patterns={form: pattern})
    compare(f"gaussian_nll_{form}", backend, "5d", "float32", {"batch_dims": 2}, patterns={form: pattern}, weight="weight:pixel")


# Each of them: dense, dense with a value per row, strided, broadcast, elementwise, and blocks that end in the middle.
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("backend", [TORCH])
def test_in_blocks(backend: Backend, layout: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "RUN", block)
    rng = random.Random(block + len(layout))
    size, view = LAYOUTS[layout]
    rank = view(torch.empty(size)).ndim
    failed = []
    for name, op in OPS.items():
        for pattern in PATTERNS if variances(op) else PATTERNS[:2]:
            options = options_of(op, rank, rng)
            weight = some_weight(op, rng)
            dtype = rng.choice(["float32", "bfloat16", "mixed", "mixed-low"])
            patterns = dict.fromkeys(variances(op), pattern)
            try:
                compare(name, backend, layout, dtype, options, weight=weight, patterns=patterns)
            except (AssertionError, RuntimeError) as error:
                failed.append(f"{name} {dtype} {options} weight={weight} {patterns}: {error}")
    assert not failed, f"{len(failed)} cases:\n" + "\n".join(failed)


MOMENTS = ("mu", "logvar", "prior_mu", "prior_logvar")


@pytest.mark.parametrize("priors", [(), ("prior_mu",), ("prior_logvar",), ("prior_mu", "prior_logvar")], ids="-".join)
@pytest.mark.parametrize("block", [16, 1 << 17])
@each_backend
def test_every_subset_of_the_gradients_of_a_kl(
    backend: Backend, block: int, priors: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a total, and of rows whose upstream gradients differ or are one number: each has its own way through."""
    if backend.impl != "torch" and block == 16:
        pytest.skip("blocks are the plain-PyTorch backend's")
    monkeypatch.setattr(walk, "RUN", block)
    g = torch.Generator().manual_seed(6)
    names = ["mu", "logvar", *priors]
    tensors = {n: draw(n, (2, 3, 4, 5), g).float() for n in names} | {"weight": draw("weight", (2, 3, 1, 5), g).float()}
    subsets = [s for n in range(1, len(names) + 1) for s in itertools.combinations(names, n)]
    settings = itertools.cycle(({}, {"batch_dims": 2}, {"reduction": "batchmean"}))

    def loss(kl: Any, v: Any, mean: bool, weighed: bool, **options: Any) -> Any:
        out = kl(*(v.get(n) for n in MOMENTS), weight=v["weight"] if weighed else None, **options)
        return out.mean() if mean else out

    for subset, mean, weighed in itertools.product(subsets, (False, True), (False, True)):
        options = {"mean": mean, "weighed": weighed} | next(settings)
        fast = functools.partial(loss, fastelbo.gaussian_kl, impl=backend.impl, **options)
        check(fast, functools.partial(loss, slow_kl, **options), tensors, backend, wanted=subset)


@pytest.mark.parametrize("form", ["logvar", "std", "var"])
@pytest.mark.parametrize("pattern", ["row2", "sample", "dim", "element", "0d"])
@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3, 4])
def test_in_blocks_by_batch_dims(batch_dims: int, pattern: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense inputs with two or more batch dimensions: blocks see them as one."""
    monkeypatch.setattr(walk, "RUN", 16)
    tensors = make(["recon", "x"], "5d", seed=3)
    tensors = {k: v.reshape(4, 3, 2, 3) for k, v in tensors.items()}
    spread = draw(form, broadcast_shape(pattern, (4, 3, 2, 3)), torch.Generator().manual_seed(4)).float()
    check(
        lambda v: fastelbo.gaussian_nll(v["recon"], v["x"], **{form: v[form]}, batch_dims=batch_dims, impl="torch"),
        lambda v: slow_nll(v["recon"], v["x"], **{form: v[form]}, batch_dims=batch_dims),
        {**tensors, form: spread},
        Backend("torch", CPU),
    )


@pytest.mark.parametrize(
    "dtypes", list(itertools.permutations([torch.float32, torch.bfloat16, torch.float16], 2)) + [(torch.float32, torch.float64)]
)
@pytest.mark.parametrize("block", [16, 1 << 17])
@each_backend
def test_mixed_dtypes_round_once(backend: Backend, block: int, dtypes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """x's gradient is recon's with the other sign, yet has its own dtype: neither may pass through the other's rounding."""
    if backend.impl != "torch" and block == 16:
        pytest.skip("blocks are the plain-PyTorch backend's")
    monkeypatch.setattr(walk, "RUN", block)
    g = torch.Generator().manual_seed(0)
    tensors = {n: draw(n, (5, 11), g).to(d) for n, d in zip(("recon", "x"), dtypes, strict=True)}
    tensors |= {n: draw(n, (5, 11), g).to(d) for n, d in zip(("mu", "logvar"), reversed(dtypes), strict=True)}
    check(
        lambda v: fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], impl=backend.impl),
        lambda v: slow_loss(v["recon"], v["x"], v["mu"], v["logvar"]),
        tensors,
        backend,
    )


@pytest.mark.parametrize("latent", [(3,), (3, 7), (3, 4, 5, 2), (3, 0)])
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@each_backend
def test_latents_of_another_rank(backend: Backend, reduction: str, latent: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    tensors = {n: draw(n, (3, 2, 9), g).float() for n in ("recon", "x")} | {n: draw(n, latent, g).float() for n in ("mu", "logvar")}
    check(
        lambda v: fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], beta=2.5, reduction=reduction, impl=backend.impl),
        lambda v: slow_loss(v["recon"], v["x"], v["mu"], v["logvar"], beta=2.5, reduction=reduction),
        tensors,
        backend,
    )


# ---- sizes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 0), (4, 0, 16), (0,)])
@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_empty(backend: Backend, name: str, shape: tuple[int, ...]) -> None:
    """Sums over nothing are 0, means over nothing NaN (as torch's are), and gradients are empty or 0."""
    op = OPS[name]
    tensors = {n: torch.zeros(shape) for n in op.names}
    for reduction in ["none", "sum", "mean", "batchmean"] if "reduction" in op.options else [None]:
        options = {} if reduction is None else {"reduction": reduction}
        outs, grads = run(lambda v, o=options: op.fast(v, backend.impl, **o), leaves(tensors, device=backend.device))
        loss = outs[-1]
        if reduction == "sum":
            assert loss.ndim == 0
            assert float(loss) == 0.0
        elif reduction == "none":
            assert torch.equal(loss.cpu(), torch.zeros(shape[0]))
        elif reduction == "mean" or (reduction == "batchmean" and shape[0] == 0):
            assert bool(loss.isnan())
        elif reduction == "batchmean":
            assert float(loss) == 0.0
        for n, g in grads.items():
            assert g is not None, n
            assert g.shape == tensors[n].shape


@pytest.mark.parametrize("pattern", ["0d", "channel", "sample"])
@each_backend
def test_shared_variance_of_nothing_has_no_gradient(backend: Backend, pattern: str) -> None:
    for shape in [(0, 3), (3, 0)]:
        recon = torch.zeros(shape, device=backend.device)
        spread = torch.ones(broadcast_shape(pattern, shape), device=backend.device, requires_grad=True)
        fastelbo.gaussian_nll(recon, recon, logvar=spread, reduction="sum", impl=backend.impl).backward()
        assert spread.grad is not None
        assert torch.equal(spread.grad, torch.zeros_like(spread))


@each_backend
def test_no_dimensions(backend: Backend) -> None:
    """0-d tensors are legal where no batch is asked for."""
    v = {n: torch.tensor(k, device=backend.device, requires_grad=True) for n, k in (("mu", 0.5), ("logvar", -0.3))}
    kl = fastelbo.gaussian_kl(v["mu"], v["logvar"], batch_dims=0, impl=backend.impl)
    nll = fastelbo.gaussian_nll(v["mu"], v["logvar"], batch_dims=0, impl=backend.impl)
    z = fastelbo.reparameterize(v["mu"], v["logvar"], eps=torch.tensor(2.0, device=backend.device), impl=backend.impl)
    assert_close(kl, torch.tensor(0.5 * (0.25 + math.expm1(-0.3) + 0.3), dtype=torch.float64), "kl")
    assert_close(nll, torch.tensor(0.5 * (math.log(2 * math.pi) + 0.64), dtype=torch.float64), "nll")
    assert_close(z, torch.tensor(0.5 + 2 * math.exp(-0.15), dtype=torch.float64), "z")
    mu, logvar = torch.autograd.grad(kl + nll + z, list(v.values()))
    assert_close(mu, torch.tensor(0.5 + 0.8 + 1.0, dtype=torch.float64), "mu")
    assert_close(logvar, torch.tensor(0.5 * math.expm1(-0.3) - 0.8 + math.exp(-0.15), dtype=torch.float64), "logvar")


@pytest.mark.parametrize("name", ["gaussian_nll_logvar", "gaussian_kl", "elbo_loss", "reparameterize_kl"])
@each_backend
def test_more_than_one_block_of_the_default_size(backend: Backend, name: str) -> None:
    if backend.device == CPU and backend.impl == "triton":
        shape = (3, 2500)
    else:
        shape = (3, walk.RUN // 3 + 1001)
    op = OPS[name]
    g = torch.Generator().manual_seed(5)
    tensors = {n: draw(n, shape, g).float() for n in op.names}
    z = [torch.float32] if op.returns_z else []
    options = {} if "reduction" not in op.options else {"reduction": "mean" if name == "elbo_loss" else "none"}
    check(
        lambda v: op.fast(v, backend.impl, **options),
        lambda v: op.slow(v, **options),
        tensors,
        backend,
        out_dtypes=z + [torch.float32],
    )


# ---- weights: what they hide never shows -----------------------------------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("kind", ["mask", "weight"])
@pytest.mark.parametrize("pattern", ["element", "pixel", "sample", "dim"])
@pytest.mark.parametrize("block", [16, 1 << 17])
@pytest.mark.parametrize("name", [n for n, op in OPS.items() if "weight" in op.options])
@each_backend
def test_weight_hides(backend: Backend, name: str, block: int, pattern: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and inf under a weight of 0 change nothing: the result is that of any finite value there, and its gradient is 0."""
    if backend.impl == "triton" and (block == 16 or (backend.device == CPU and pattern in ("sample", "dim"))):
        pytest.skip("blocks are the plain-PyTorch backend's; the interpreter sees fewer cases")
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
    for bad in BAD:
        inputs = leaves(clean, wanted, backend.device)
        for n in covers:
            inputs[n].data.masked_fill_(hidden.to(backend.device), bad)
        outs_bad, grads_bad = run(fast, inputs)
        for a, b in zip(outs, outs_bad, strict=True):
            assert torch.equal(a, b), f"{bad} under the weight changed the result from {a} to {b}"
        for n in wanted:
            assert torch.equal(grads[n], grads_bad[n]), f"{bad} under the weight changed the gradient of {n}"
            if n in covers:
                assert not grads_bad[n].cpu()[hidden].any(), f"the gradient of {n} under a weight of 0 is not 0"
        if bad is math.nan and block > 4:
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


@pytest.mark.parametrize("block", [16, 1 << 17])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each_backend
def test_weight_dtype_does_not_decide_the_result_dtype(
    backend: Backend, reduction: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float64 weight beside float32 inputs: the same dtype whatever the size and the backend."""
    monkeypatch.setattr(walk, "RUN", block)
    t = make(["recon", "x", "mu", "logvar"], "contiguous")
    for dtype in (torch.float64, torch.float16):
        w = make(["weight"], "contiguous", seed=2)["weight"].to(dtype)
        v = leaves({**t, "weight": w}, device=backend.device)
        for out in (
            fastelbo.gaussian_nll(v["recon"], v["x"], weight=v["weight"], reduction=reduction, impl=backend.impl),
            fastelbo.gaussian_kl(v["mu"], v["logvar"], weight=v["weight"], reduction=reduction, impl=backend.impl),
            fastelbo.elbo_loss(
                v["recon"], v["x"], v["mu"], v["logvar"], weight=v["weight"], reduction=reduction, impl=backend.impl
            ),
        ):
            assert out.dtype == torch.float32
        compare("elbo_loss", backend, "contiguous", "float32", {"reduction": reduction}, weight="weight:element")


@each_backend
def test_float64_beta_keeps_a_float32_loss(backend: Backend) -> None:
    v = leaves(make(["recon", "x", "mu", "logvar"], "contiguous"), device=backend.device)
    truth = leaves(make(["recon", "x", "mu", "logvar"], "contiguous"), dtype=torch.float64)
    for reduction in ("none", "batchmean"):
        for beta in (
            torch.tensor(0.3, dtype=torch.float64),
            torch.tensor(0.3),
            torch.tensor(2),
            torch.tensor(0.3, dtype=torch.float16),
        ):
            loss = fastelbo.elbo_loss(*v.values(), beta=beta.to(backend.device), reduction=reduction, impl=backend.impl)
            assert_close(loss, slow_loss(*truth.values(), beta=float(beta), reduction=reduction), f"{beta!r}", dtype=torch.float32)
            loss.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_a_beta_on_the_cpu_beside_gpu_tensors(reduction: str) -> None:
    """Torch lets a 0-d CPU tensor into any operation: here it works as well, or is refused by name."""
    v = leaves(make(["recon", "x", "mu", "logvar"], "contiguous"), device=torch.device("cuda"))
    try:
        loss = fastelbo.elbo_loss(*v.values(), beta=torch.tensor(0.3), reduction=reduction)
    except ValueError as error:
        assert "beta" in str(error)  # noqa: PT017 (no error is right too)
    else:
        torch.testing.assert_close(loss, fastelbo.elbo_loss(*v.values(), beta=0.3, reduction=reduction))


# ---- the clamp, and extremes -----------------------------------------------------------------------------------------------------


@each_backend
def test_clamp(backend: Backend) -> None:
    """Inclusive edges, zero gradient outside them, for z and for the KL."""
    lo, hi = -1.5, 2.25
    raw = torch.tensor([[-200.0, -1.5000001, -1.5, -1.4, 0.0, 2.2, 2.25, 2.2500002, 90.0, -math.inf, math.inf]])
    tensors = {
        "mu": torch.linspace(-2, 2, raw.numel()).view_as(raw),
        "logvar": raw,
        "eps": torch.linspace(1, -3, raw.numel()).view_as(raw),
    }
    for want_z in (True, False):

        def fast(v: dict[str, torch.Tensor], want_z: bool = want_z) -> Any:
            if want_z:
                return fastelbo.reparameterize_kl(
                    v["mu"], v["logvar"], eps=v["eps"], logvar_clamp=(lo, hi), batch_dims=2, impl=backend.impl
                )
            return fastelbo.gaussian_kl(v["mu"], v["logvar"], logvar_clamp=[lo, hi], batch_dims=2, impl=backend.impl)

        def slow(v: dict[str, torch.Tensor], want_z: bool = want_z) -> Any:
            kl = slow_kl(v["mu"], v["logvar"], logvar_clamp=(lo, hi), batch_dims=2)
            return (slow_sample(v["mu"], v["logvar"], v["eps"], (lo, hi)), kl) if want_z else kl

        check(fast, slow, tensors, backend)
        inputs = leaves(tensors, device=backend.device)
        grads = run(fast, inputs)[1]
        outside = (raw < lo) | (raw > hi)
        assert torch.equal(grads["logvar"].cpu() == 0, outside | (raw == 0.0) & (not want_z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_backend
def test_extreme_logvar(backend: Backend, dtype: torch.dtype) -> None:
    """Where the true value is a float32 it comes out; where it overflows it is inf and not NaN."""
    extremes = [80.0, -80.0, 88.0, -85.0, 1e4, -1e4, 0.0]
    for recon_logvar, logvar in zip(extremes, reversed(extremes), strict=True):
        tensors = {
            "recon": torch.tensor([[1.0, -2.0]], dtype=dtype),
            "x": torch.tensor([[0.5, 1.0]], dtype=dtype),
            "recon_logvar": torch.full((1, 2), recon_logvar, dtype=dtype),
            "mu": torch.tensor([[0.25, -3.0]], dtype=dtype),
            "logvar": torch.full((1, 2), logvar, dtype=dtype),
        }
        truth = leaves(tensors, dtype=torch.float64)
        mine = leaves(tensors, device=backend.device)
        args = ("recon", "x", "mu", "logvar")
        outs, grads = run(
            lambda v, args=args: fastelbo.elbo_terms(*(v[n] for n in args), recon_logvar=v["recon_logvar"], impl=backend.impl), mine
        )
        nll = slow_nll(truth["recon"], truth["x"], logvar=truth["recon_logvar"], reduction="batchmean")
        kl = slow_kl(truth["mu"], truth["logvar"], reduction="batchmean")
        want = torch.autograd.grad([nll, kl], list(truth.values()))
        for what, got, true in [("nll", outs[0], nll), ("kl", outs[1], kl), *zip(truth, grads.values(), want, strict=True)]:
            assert_close(got, true.detach().to(dtype).double(), f"{what} at {recon_logvar}, {logvar}")


@each_backend
def test_infinite_logvar(backend: Backend) -> None:
    """A variance of 0: infinitely far from the prior. Of infinity: no likelihood at all."""
    mu = torch.zeros(1, 3, device=backend.device)
    assert float(fastelbo.gaussian_kl(mu, mu - math.inf, impl=backend.impl)) == math.inf
    nll = fastelbo.gaussian_nll(mu, mu + 1, logvar=mu + math.inf, impl=backend.impl)
    assert float(nll) == math.inf
    for value in (math.inf, 1e4, 800.0):
        assert float(fastelbo.gaussian_nll(mu, mu + 1, logvar=value, impl=backend.impl)) == pytest.approx(
            1.5 * (value + math.log(2 * math.pi))
        )


@each_backend
def test_half_precision_does_not_overflow(backend: Backend) -> None:
    """exp(15) and sums over 4 x 64 x 64 latents both leave float16's range; the arithmetic is float32's."""
    side = 64 if backend.impl != "triton" or backend.device != CPU else 32
    mu = torch.zeros(1, 4, side, side, dtype=torch.float16)
    for level in (15.0, -17.0):
        tensors = {"mu": mu, "logvar": torch.full_like(mu, level), "eps": torch.full_like(mu, 0.5)}
        mine = leaves(tensors, device=backend.device)
        kl = fastelbo.gaussian_kl(mine["mu"], mine["logvar"], impl=backend.impl)
        assert_close(
            kl, torch.tensor([mu.numel() * 0.5 * (math.expm1(level) - level)], dtype=torch.float64), "kl", dtype=torch.float32
        )
        z = fastelbo.reparameterize(mine["mu"], mine["logvar"], eps=mine["eps"], impl=backend.impl)
        assert_close(z, 0.5 * torch.exp(0.5 * tensors["logvar"].double()), "z", dtype=torch.float16)
    x = torch.full((1, 4, side, side), 40.0, dtype=torch.float16, device=backend.device)
    nll = fastelbo.gaussian_nll(-x, x, logvar=-9.0, full=False, impl=backend.impl)
    assert_close(nll, torch.tensor([x.numel() * 0.5 * (6400 * math.exp(9) - 9)], dtype=torch.float64), "nll", dtype=torch.float32)


# ---- buffers ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fresh floating buffer starts as NaN: what a kernel forgets to write shows."""

    def poisoned(allocate: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            return out.detach().fill_(math.nan) if out.is_floating_point() and not out.requires_grad else out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.mark.parametrize("block", [16, 1 << 17])
@pytest.mark.parametrize("name", list(OPS))
@each_backend
def test_poisoned_buffers(backend: Backend, name: str, block: int, poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.impl == "triton" and block == 16:
        pytest.skip("blocks are the plain-PyTorch backend's")
    monkeypatch.setattr(walk, "RUN", block)
    rng = random.Random(zlib.crc32(name.encode()))
    layouts = ["columns", "chunk1", "channels-last", "expanded", "one"]
    for layout in layouts if backend.impl != "triton" else layouts[:3]:
        size, view = LAYOUTS[layout]
        patterns = {n: rng.choice(PATTERNS) for n in variances(OPS[name])}
        options = options_of(OPS[name], view(torch.zeros(size)).ndim, rng)
        compare(name, backend, layout, "float32", options, patterns=patterns)


# ---- the estimator, and the distribution -----------------------------------------------------------------------------------------


def decoder(z: torch.Tensor) -> torch.Tensor:
    return torch.cat([z.tanh(), 0.5 * z.square(), -z], -1)


@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("spread", ["none", "float", "0d", "sample", "dim", "decoded", "decoded-shared"])
@each_backend
def test_sgvb_is_the_papers_estimator(backend: Backend, spread: str, samples: int, reduction: str) -> None:
    if backend.impl == "triton" and backend.device == CPU and spread not in ("none", "sample", "decoded"):
        pytest.skip("the interpreter sees fewer cases")
    g = torch.Generator().manual_seed(2)
    tensors = {n: draw(n, (4, 3), g).float() for n in ("mu", "logvar")} | {"x": draw("x", (4, 9), g).float()}
    tensors["eps"] = draw("eps", (samples, 4, 3), g).float()
    tensors["weight"] = draw("weight", (4, 1), g).float()
    if spread in ("0d", "sample", "dim"):
        tensors["spread"] = draw("logvar", broadcast_shape(spread, (4, 9)), g).float()

    def decode(z: torch.Tensor) -> Any:
        if spread == "decoded":
            return decoder(z), 0.3 * decoder(-z)
        return (decoder(z), z[:, :1]) if spread == "decoded-shared" else decoder(z)

    def fixed(v: dict[str, torch.Tensor]) -> dict[str, Any]:
        held = 0.4 if spread == "float" else v.get("spread")
        return {"recon_logvar": held, "beta": 0.7, "logvar_clamp": (-1.0, 1.0), "weight": v["weight"], "reduction": reduction}

    check(
        lambda v: fastelbo.sgvb_loss(
            decode, v["x"], v["mu"], v["logvar"], num_samples=samples, eps=v["eps"], impl=backend.impl, **fixed(v)
        ),
        lambda v: slow_sgvb(decode, v["x"], v["mu"], v["logvar"], eps=v["eps"], **fixed(v)),
        tensors,
        backend,
        rtol=4e-6,  # the decoder's own rounding comes on top
    )


@each_backend
def test_sgvb_with_one_sample_is_elbo_loss(backend: Backend) -> None:
    g = torch.Generator().manual_seed(2)
    mu, logvar, x = (draw("mu", s, g).float().to(backend.device) for s in ((4, 3), (4, 3), (4, 9)))
    seed = {"seed": 11}
    loss, nll, kl = fastelbo.sgvb_loss(decoder, x, mu, logvar, return_terms=True, impl=backend.impl, **seed)
    recon = decoder(fastelbo.reparameterize(mu, logvar, impl=backend.impl, **seed))
    want = fastelbo.elbo_loss(recon, x, mu, logvar, return_terms=True, impl=backend.impl)
    for a, b in zip((loss, nll, kl), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 8), 1), ((3, 8), -1), ((3, 6, 2, 5), 1), ((2, 3, 10), 2), ((2, 3, 10), -1), ((4, 3, 5), 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [16, 1 << 17])
@each_backend
def test_moments(
    backend: Backend, block: int, dtype: torch.dtype, shape: tuple[int, ...], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The halves are read where they lie, and their gradient comes back packed; a learned prior gets its own."""
    if backend.impl == "triton" and block == 16:
        pytest.skip("blocks are the plain-PyTorch backend's")
    monkeypatch.setattr(walk, "RUN", block)
    g = torch.Generator().manual_seed(9)
    half = draw("mu", shape, g).chunk(2, dim)[0].shape
    tensors = {"moments": (2 * draw("mu", shape, g)).to(dtype), "eps": draw("eps", half, g).to(dtype)}
    tensors |= {n: draw(n, half, g).to(dtype) for n in ("prior_mu", "prior_logvar")}

    def fast(v: dict[str, torch.Tensor]) -> Any:
        q = fastelbo.DiagonalGaussian.from_moments(v["moments"], dim, logvar_clamp=(-1.0, 2.0), impl=backend.impl)
        z, kl = q.rsample_kl(fastelbo.DiagonalGaussian(v["prior_mu"], v["prior_logvar"]), eps=v["eps"])
        return z, kl

    def slow(v: dict[str, torch.Tensor]) -> Any:
        mu, logvar = v["moments"].chunk(2, dim)
        kl = slow_kl(mu, logvar, v["prior_mu"], v["prior_logvar"], logvar_clamp=(-1.0, 2.0))
        return slow_sample(mu, logvar, v["eps"], (-1.0, 2.0)), kl

    check(fast, slow, tensors, backend, out_dtypes=[dtype, accumulated(tensors["moments"])])


@each_backend
def test_moments_that_need_no_gradient_leave_the_priors(backend: Backend) -> None:
    moments = torch.randn(3, 8, device=backend.device)
    prior = [torch.randn(3, 4, device=backend.device, requires_grad=True) for _ in range(2)]
    kl = fastelbo.DiagonalGaussian.from_moments(moments, impl=backend.impl).kl(fastelbo.DiagonalGaussian(*prior))
    grads = torch.autograd.grad(kl.sum(), prior)
    truth = [p.detach().double().cpu().requires_grad_() for p in prior]
    want = torch.autograd.grad(slow_kl(*moments.double().cpu().chunk(2, 1), *truth).sum(), truth)
    for name, g, w in zip(("prior_mu", "prior_logvar"), grads, want, strict=True):
        assert_close(g, w, name)


def test_distribution_properties() -> None:
    mu, logvar = torch.randn(3, 4, requires_grad=True), 3 * torch.randn(3, 4)
    q = fastelbo.DiagonalGaussian(mu, logvar, logvar_clamp=(-1.0, 1.0))
    clamped = logvar.clamp(-1, 1)
    torch.testing.assert_close(q.logvar, clamped)
    torch.testing.assert_close(q.std, torch.exp(clamped / 2))
    torch.testing.assert_close(q.var, torch.exp(clamped))
    assert torch.equal(q.mean, mu)
    assert torch.equal(q.mode(), mu)
    x = torch.randn(3, 4)
    normal = torch.distributions.Normal(mu, q.std)
    torch.testing.assert_close(q.nll(x), -normal.log_prob(x).sum(-1))
    other = fastelbo.DiagonalGaussian(torch.randn(3, 4), torch.randn(3, 4))
    want = torch.distributions.kl_divergence(normal, torch.distributions.Normal(other.mu, other.std)).sum(-1)
    torch.testing.assert_close(q.kl(other), want, rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    z = q.sample()
    torch.manual_seed(3)
    torch.testing.assert_close(z, mu + q.std * torch.randn_like(mu))
    assert z.requires_grad
    default = fastelbo.DiagonalGaussian.from_moments(torch.tensor([[0.0, 50.0], [0.0, -50.0]]))
    assert default.logvar.tolist() == [[20.0], [-30.0]]
    assert fastelbo.DiagonalGaussian.from_moments(torch.tensor([[0.0, 50.0]]), logvar_clamp=None).logvar.tolist() == [[50.0]]


# ---- noise -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("samples", [None, 1, 3])
@each_backend
def test_seed(backend: Backend, samples: int | None, dtype: torch.dtype) -> None:
    """A seed stands for noise that anyone can write down: z and gradients are those of `eps=philox_normal(shape, seed)`."""
    for layout in ("contiguous", "chunk1", "transposed"):
        tensors = {n: t.to(dtype) for n, t in make(["mu", "logvar"], layout).items()}
        shape = tensors["mu"].shape if samples is None else (samples, *tensors["mu"].shape)
        for seed in (0, 1234567, 2**63 + 5, -1):
            tensors["eps"] = philox_normal(shape, seed)
            check(
                lambda v, s=seed: fastelbo.reparameterize_kl(v["mu"], v["logvar"], num_samples=samples, seed=s, impl=backend.impl),
                lambda v: (slow_sample(v["mu"], v["logvar"], v["eps"]), slow_kl(v["mu"], v["logvar"])),
                tensors,
                backend,
                out_dtypes=[dtype, accumulated(tensors["mu"])],
                rtol=None if dtype != torch.float64 else 2e-6,  # the normals are float32's
            )


@each_backend
def test_seed_reproduces(backend: Backend) -> None:
    mu = torch.zeros(5, 7, device=backend.device)
    z = [fastelbo.reparameterize(mu, mu, seed=s, impl=backend.impl) for s in (3, 3, torch.tensor(3, device=backend.device), 4)]
    assert torch.equal(z[0], z[1])
    assert torch.equal(z[0], z[2])
    assert not torch.equal(z[0], z[3])
    # The noise belongs to the element's number, not to the shape or to what comes after it.
    flat = fastelbo.reparameterize(mu.view(-1)[:19], mu.view(-1)[:19], seed=3, impl=backend.impl)
    assert torch.equal(flat, z[0].view(-1)[:19])
    many = fastelbo.reparameterize(mu, mu, 2, seed=3, impl=backend.impl)
    assert torch.equal(many[0], z[0])
    assert not torch.equal(many[1], z[0])


@each_backend
def test_seed_is_the_same_on_both_backends(backend: Backend) -> None:
    v = make(["mu", "logvar"], "chunk1")
    here = leaves(v, device=backend.device)
    for samples in (None, 2):
        z = fastelbo.reparameterize(here["mu"], here["logvar"], samples, seed=77, impl=backend.impl)
        want = fastelbo.reparameterize(v["mu"], v["logvar"], samples, seed=77, impl="torch")
        torch.testing.assert_close(z.detach().cpu(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=BACKENDS[1].marks), "reference"])
def test_default_noise_on_a_cpu_is_torchs(impl: str, dtype: torch.dtype) -> None:
    if impl == "triton" and BACKENDS[1].values[0].device != CPU:
        pytest.skip("compiled kernels do not run on the CPU")
    mu, logvar = (t.to(dtype).requires_grad_() for t in make(["mu", "logvar"], "chunk1").values())
    sigma = torch.exp(0.5 * logvar.detach().double())
    for samples in (None, 3):
        shape = mu.shape if samples is None else (samples, *mu.shape)
        for generator in (None, torch.Generator()):
            (torch.random.default_generator if generator is None else generator).manual_seed(5)
            z = fastelbo.reparameterize(mu, logvar, samples, generator=generator, impl=impl)
            torch.manual_seed(5)
            eps = torch.randn_like(mu).detach() if samples is None else torch.randn(shape, dtype=dtype)
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            assert_close(z, mu.detach().double() + sigma * eps.double(), "z", dtype=dtype, acc=acc, truncates=impl == "triton")
            (g,) = torch.autograd.grad(z.sum(), logvar)
            want = 0.5 * sigma * eps.double()
            assert_close(g, want if samples is None else want.sum(0), "gradient", dtype=dtype, acc=acc, truncates=impl == "triton")


@each_backend
def test_seed_tensor_is_read_when_the_noise_is_drawn(backend: Backend) -> None:
    """Changing the caller's seed between forward and backward must not change the noise that backward regenerates, silently."""
    mu = torch.zeros(4, 5, device=backend.device)
    logvar = torch.zeros(4, 5, device=backend.device, requires_grad=True)
    seed = torch.tensor(5, device=backend.device)
    z = fastelbo.reparameterize(mu, logvar, seed=seed, impl=backend.impl)
    seed.add_(1)
    try:
        (g,) = torch.autograd.grad(z.sum(), logvar)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017 (no error is right too)
    else:
        assert_close(g, 0.5 * z.detach().double(), "gradient")


@each_backend
def test_prior_forms(backend: Backend) -> None:
    """Numbers, 0-d, shared and full priors."""
    base = make(["mu", "logvar"], "chunk1", seed=4)
    shape = base["mu"].shape
    for prior_mu, prior_logvar in ((0.5, -0.25), (1, None), (None, 2)):
        check(
            lambda v, m=prior_mu, s=prior_logvar: fastelbo.gaussian_kl(v["mu"], v["logvar"], m, s, impl=backend.impl),
            lambda v, m=prior_mu, s=prior_logvar: slow_kl(v["mu"], v["logvar"], m, s),
            base,
            backend,
        )
    for pattern in ("0d", "channel", "dim"):
        g = torch.Generator().manual_seed(6)
        prior = {n: draw(n, broadcast_shape(pattern, shape), g).float() for n in ("prior_mu", "prior_logvar")}
        check(
            lambda v: fastelbo.gaussian_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], impl=backend.impl),
            lambda v: slow_kl(v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"]),
            {**base, **prior},
            backend,
        )
    # One of the two alone.
    for name in ("prior_mu", "prior_logvar"):
        check(
            lambda v, n=name: fastelbo.gaussian_kl(v["mu"], v["logvar"], **{n: v[n]}, impl=backend.impl),
            lambda v, n=name: slow_kl(v["mu"], v["logvar"], **{n: v[n]}),
            {**base, name: prior[name]},
            backend,
        )


# ---- shapes that nobody thought of -----------------------------------------------------------------------------------------------

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


def broadcasting_to(shape: tuple[int, ...]) -> Any:
    """Shapes that broadcast to `shape`: some dimensions 1, some leading ones dropped."""
    return st.tuples(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)), st.integers(0, len(shape))).map(
        lambda c: tuple(1 if one else n for one, n in zip(c[0], shape, strict=True))[c[1] :]
    )


def _examples(backend: Backend) -> int:
    return (
        hypothesis.settings.default.max_examples
        if backend.impl == "torch"
        else max(4, hypothesis.settings.default.max_examples // 4)
    )


@each_backend
def test_any_shape_nll(backend: Backend) -> None:
    @hypothesis.settings(max_examples=2 * _examples(backend))
    @hypothesis.given(st.data())
    def inner(data: Any) -> None:
        shape = data.draw(SHAPES)
        form = data.draw(st.sampled_from(["logvar", "std", "var"]))
        spread, weight = data.draw(broadcasting_to(shape)), data.draw(st.none() | broadcasting_to(shape))
        options = {
            "batch_dims": data.draw(st.integers(0, len(shape))),
            "reduction": data.draw(st.sampled_from(["none", "sum", "mean"])),
        }
        small = data.draw(st.booleans())
        g = torch.Generator().manual_seed(0)
        tensors = {n: draw(n, shape, g).float() for n in ("recon", "x")} | {form: draw(form, spread, g).float()}
        if weight is not None:
            # No case is all zeros, whose mean is NaN.
            tensors["weight"] = draw("weight", weight, g).float() + 0.25 * (math.prod(weight) < 4)
        run, walk.RUN = walk.RUN, 4 if small else walk.RUN
        try:
            check(
                lambda v: fastelbo.gaussian_nll(
                    v["recon"], v["x"], **{form: v[form]}, weight=v.get("weight"), impl=backend.impl, **options
                ),
                lambda v: slow_nll(v["recon"], v["x"], **{form: v[form]}, weight=v.get("weight"), **options),
                tensors,
                backend,
            )
        finally:
            walk.RUN = run

    inner()


@each_backend
def test_any_shape_kl(backend: Backend) -> None:
    @hypothesis.settings(max_examples=2 * _examples(backend))
    @hypothesis.given(st.data())
    def inner(data: Any) -> None:
        shape = data.draw(SHAPES)
        priors = {n: data.draw(st.none() | broadcasting_to(shape)) for n in ("prior_mu", "prior_logvar")}
        weight = data.draw(st.none() | broadcasting_to(shape))
        options = {
            "batch_dims": data.draw(st.integers(0, len(shape))),
            "reduction": data.draw(st.sampled_from(["none", "sum", "mean"])),
        }
        small = data.draw(st.booleans())
        g = torch.Generator().manual_seed(0)
        tensors = {n: draw(n, shape, g).float() for n in ("mu", "logvar")}
        tensors |= {n: draw(n, s, g).float() for n, s in priors.items() if s is not None}
        if weight is not None:
            tensors["weight"] = draw("weight", weight, g).float() + 0.25 * (math.prod(weight) < 4)
        run, walk.RUN = walk.RUN, 4 if small else walk.RUN
        try:
            check(
                lambda v: fastelbo.gaussian_kl(
                    v["mu"],
                    v["logvar"],
                    v.get("prior_mu"),
                    v.get("prior_logvar"),
                    weight=v.get("weight"),
                    impl=backend.impl,
                    **options,
                ),
                lambda v: slow_kl(
                    v["mu"], v["logvar"], v.get("prior_mu"), v.get("prior_logvar"), weight=v.get("weight"), **options
                ),
                tensors,
                backend,
            )
        finally:
            walk.RUN = run

    inner()
