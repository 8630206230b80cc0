"""`fastelbo compare`: right figures, the right verdict, and one clear line for what cannot be compared."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import NO_KERNELS, Backend

import fastelbo
from fastelbo import cli, composed, functional
from fastelbo.eager import walk
from fastelbo.numerics import compare as module
from fastelbo.numerics import peers, report, tolerance
from fastelbo.numerics.compare import DTYPES, OPS, Case, Comparison, Op, ulp_of
from fastelbo.numerics.oracle import kl_terms
from fastelbo.numerics.peers import FIXED
from fastelbo.numerics.report import BOUND
from fastelbo.specs import KL, LatentInputs

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

CPU = torch.device("cpu")
SMALL = (16, 50)


@pytest.fixture(autouse=True)
def _plain_backend_only(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """conftest switches Triton's interpreter on, which would be compared everywhere; one test below asks for it."""
    if "triton" not in request.keywords:
        monkeypatch.setattr(module, "backends", lambda: [("torch", CPU)])


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`fastelbo compare`, and what it leaves: exit status, output, errors."""

    def run(*args: str | Path) -> tuple[int, str, str]:
        status = cli.main(["compare", *map(str, args)])
        return status, *capsys.readouterr()

    return run


def the(result: Comparison, op: str, name: str) -> Any:
    (found,) = (row for row in result.rows if (row.op, row.result) == (op, name))
    return found


# ---- the figures -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logvar_range", [(-0.5, 0.5), (-10.0, 10.0)], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_oracle_is_the_reference(op: Op, logvar_range: tuple[float, float]) -> None:
    v = Case("torch", CPU, op, 3, torch.float64, (4, 3, 5), logvar_range).values()
    ups = module.upstream(op, v, 4)
    # gaussian_nll_loss takes no impl, but torch has it.
    call = op.library if op.function == "gaussian_nll_loss" else lambda v: op.fused("reference", v)
    want = module.differentiate(call, v, op.learned, ups)
    found = op.truth(v, ups)
    assert len(found) == len(want) == len(op.results) + len(op.learned)
    for (truth, size), exact in zip(found, want, strict=True):
        torch.testing.assert_close(truth, exact.detach(), rtol=1e-9, atol=0)
        assert bool((size >= truth.abs() * (1 - 1e-12)).all())


def test_the_oracles_kl_is_exact() -> None:
    mpmath = pytest.importorskip("mpmath")
    v = torch.tensor([1e-12, -1e-8, 1e-4, -0.1, 0.4999, -0.5001, 3.0, -30.0], dtype=torch.float64, requires_grad=True)
    _, term = kl_terms(LatentInputs(torch.zeros_like(v), v), KL())
    (slope,) = torch.autograd.grad(term.sum(), v)
    with mpmath.workdps(60):
        for x, kl, d in zip(v.tolist(), term.tolist(), slope.tolist(), strict=True):
            assert kl == pytest.approx(float((mpmath.expm1(mpmath.mpf(x)) - mpmath.mpf(x)) / 2), rel=1e-15)
            assert d == pytest.approx(float(mpmath.expm1(mpmath.mpf(x)) / 2), rel=1e-15)


def test_sizes_across_a_layer() -> None:
    """Where what is added up to a residual cancels, its size is that of all of it, and so is that of the gradients it enters."""
    op = next(op for op in OPS if op.name == "linear_gaussian_nll/element")
    v = {"h": [[2.0, -3.0]], "weight": [[1.0, 4.0]], "bias": [0.0], "x": [[-9.5]], "logvar": [math.log(0.25)]}
    wide = {name: torch.tensor(value, dtype=torch.float64) for name, value in v.items()}
    found = op.truth(wide, [torch.tensor([-2.0], dtype=torch.float64)])
    exact = {name: [t.flatten().tolist() for t in pair] for name, pair in zip(["nll", *op.learned], found, strict=True)}
    # The residual is 2 * 1 - 3 * 4 + 9.5 = -1/2, made of 2 + 12 + 9.5 = 23.5; the slope is -2 times that over 1/4.
    logs = 0.5 * math.log(2 * math.pi), 0.5 * math.log(0.25)
    assert exact["nll"] == [[pytest.approx(sum(logs) + 0.5)], [pytest.approx(logs[0] - logs[1] + 2 * 23.5**2)]]
    assert exact["h"] == [pytest.approx([4, 16]), pytest.approx([8 * 23.5, 32 * 23.5])]
    assert exact["weight"] == [pytest.approx([8, -12]), pytest.approx([16 * 23.5, 24 * 23.5])]
    assert exact["bias"] == [pytest.approx([4]), pytest.approx([8 * 23.5])]
    assert exact["x"] == [pytest.approx([-4]), pytest.approx([8 * 23.5])]
    assert exact["logvar"] == [pytest.approx([-1 + 1]), pytest.approx([1 + 4 * 23.5**2])]


def test_units_in_the_last_place() -> None:
    size = torch.tensor([1.0, 1.999, 2.0, 0.75, 3e38], dtype=torch.float64)
    assert ulp_of(size, torch.float32).tolist() == [2.0**-23, 2.0**-23, 2.0**-22, 2.0**-24, 2.0**104]
    assert ulp_of(size[:1], torch.bfloat16).item() == 2.0**-7
    assert ulp_of(size[:1], torch.float16).item() == 2.0**-10


@pytest.mark.parametrize(
    ("got", "truth", "error"),
    [
        (1.5, 1.0, 0.5),
        (math.inf, 1e5, 0.0),  # the truth overflows float16
        (-math.inf, 1e5, math.inf),
        (math.inf, 65503.0, 0.0),  # only its last digits keep it from that
        (math.inf, 6e4, math.inf),
        (6e4, 1e5, 4e4),
        (math.nan, 1.0, math.inf),
        (math.nan, math.nan, 0.0),
        (1.0, math.nan, math.inf),
        (2.0**-20, 2.0**-21, 2.0**-21),  # subnormal, but not in the float32 of the arithmetic
        (0.0, 1e-40, 0.0),  # subnormal in that too
    ],
)
def test_errors_and_what_is_lost(got: float, truth: float, error: float) -> None:
    found = module.errors(torch.tensor([got]), torch.tensor([truth], dtype=torch.float64), torch.float16, 2.0**-126)
    assert found.item() == error


def test_known_errors() -> None:
    """Near the prior the usual KL subtracts numbers of size 1: its error is some 2^-24, whatever the KL is."""
    v = torch.full((8, 1), 2.0**-10)
    result = fastelbo.compare("gaussian_kl/standard", tensors={"mu": torch.zeros_like(v), "logvar": v})
    kl = the(result, "gaussian_kl/standard", "kl")
    exact = 0.5 * (math.expm1(2.0**-10) - 2.0**-10)
    usual = float(-0.5 * (1 + v[0] - v[0].exp()))
    assert kl.worst.exact == pytest.approx(exact, rel=1e-10)
    assert kl.worst.eager == usual
    assert kl.eager.max_relative == pytest.approx(abs(usual - exact) / exact, rel=1e-6)
    assert kl.eager.max_ulp == pytest.approx(abs(usual - exact) * 2.0 ** (23 + 22), rel=1e-6)  # exact is from 2^-22 to 2^-21
    assert kl.eager.max_ulp == kl.eager.mean_ulp == kl.eager.p99_ulp > 1000
    assert kl.fused.max_ulp <= 1
    assert result.ok


# ---- the verdict -----------------------------------------------------------------------------------------------------------------


def test_all_is_well(command: Command, tmp_path: Path) -> None:
    figures = tmp_path / "errors.json"
    status, out, err = command("--shape", "16,50", "--json", figures)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "All are within it."
    assert BOUND in out

    facts = json.loads(figures.read_text())
    assert facts["ok"] is True
    assert facts["bound"]["words"] == BOUND
    rows = facts["rows"]
    assert {r["dtype"] for r in rows} == set(DTYPES)
    assert {tuple(r["logvar_range"]) for r in rows} == set(module.RANGES)
    assert {(r["op"], r["result"]) for r in rows} == {
        (op.name, name) for op in OPS for name in (*op.results, *(f"d {n}" for n in op.learned))
    }
    assert all(op.name in out for op in OPS)
    assert {r["elements"] for r in rows} == {1, 16, 800, 16 * 20, 50 * 20, 50}
    assert {tuple(r["shape"]) for r in rows} == {(16, 50)}
    for r in rows:
        assert r["ok"]
        assert r["fused"]["max_ulp"] <= r["allowed_max_ulp"]
        assert r["fused"]["mean_ulp"] <= r["allowed_mean_ulp"]
        assert r["fused"]["max_ulp"] == r["worst"]["fused_ulp"] or r["eager"]["lost"]
        assert (r["widened"] is not None) == (r["dtype"] in ("bfloat16", "float16"))
        assert (r["library"] is not None) == (r["op"] not in ("reparameterize", "zero_inflated_negative_binomial_nll"))

    def figure(op: str, name: str, dtype: str, who: str, which: str) -> list[float]:
        return [r[who][which] for r in rows if (r["op"], r["result"], r["dtype"]) == (op, name, dtype)]

    # Near the prior, the first range, the usual KL has lost three digits in float32, and all of them in bfloat16.
    kl = "gaussian_kl/standard", "kl"
    assert figure(*kl, "float32", "fused", "max_ulp")[0] < 3 < 1000 < figure(*kl, "float32", "eager", "max_ulp")[0]
    assert figure(*kl, "bfloat16", "fused", "max_relative")[0] < 1e-6 < 0.5 < figure(*kl, "bfloat16", "eager", "max_relative")[0]
    # In float16 the fused gradients are rounded once, and eager's overflow on the way to a finite value.
    slope = "gaussian_nll/logvar", "d recon", "float16"
    assert max(figure(*slope, "fused", "max_ulp")) < 0.51
    assert sum(figure(*slope, "fused", "lost")) == 0 < sum(figure(*slope, "eager", "lost"))


def test_the_picture(command: Command, tmp_path: Path) -> None:
    picture = tmp_path / "errors.png"
    status, _, err = command("--op", "gaussian_kl", "--shape", "16,50", "--plot", picture)
    assert (status, err) == (0, "")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000


def test_what_pixelcnns_formula_loses() -> None:
    """It subtracts sigmoids that may be near each other, and takes the density for the mass of a bin where that is small."""
    for range_ in ((-0.01, 0.01), (-10.0, 10.0)):
        result = fastelbo.compare("discretized_logistic_nll", "float32", SMALL, range_)
        assert result.ok
        for name in ("nll", "d recon", "d logscale"):
            row = the(result, "discretized_logistic_nll", name)
            assert row.fused.max_ulp < 4 < 20 < row.eager.max_ulp
    assert [row.result for row in result.rows] == ["nll", "d recon", "d logscale"]  # x is a constant


def test_weights_of_a_bound_lose_nothing_to_its_size() -> None:
    """logsumexp's own gradient, of log weights near -1000, moves every weight by what their logarithm's rounding is."""
    for name in ("iwae", "dreg"):
        result = fastelbo.compare(f"sgvb_loss/{name}", "float32", (64, 784), (-0.01, 0.01))
        assert result.ok
        for argument in ("x", "mu", "logvar"):
            row = the(result, f"sgvb_loss/{name}", f"d {argument}")
            assert row.fused.max_ulp < 8 < 100 < row.eager.max_ulp


def test_data_is_what_a_likelihood_is_of() -> None:
    pixels, shares = (
        Case("torch", CPU, op, 3, torch.float64, (300, 50)).values()["x"]
        for name in ("discretized_logistic_nll", "bernoulli_nll") for op in OPS if op.name == name
    )  # fmt: skip
    numbers = (pixels + 1) * 127.5
    torch.testing.assert_close(numbers, numbers.round())
    assert sorted({int(n) for n in numbers.round().flatten()}) == list(range(256))
    assert 0 <= float(shares.min()) < 0.01 < 0.99 < float(shares.max()) <= 1


BROKEN = [
    ("elbo", 0, "elbo_loss/element", "d recon"),
    ("elbo", 2, "elbo_loss/scalar", "d recon_logvar"),
    ("elbo", 4, "elbo_loss/fixed", "d logvar"),
    ("elbo_terms", 3, "elbo_terms", "d mu"),
    ("likelihood", 1, "gaussian_nll/logvar", "d x"),
    ("likelihood", 2, "gaussian_nll_loss", "d var"),
    ("likelihood", 0, "bernoulli_nll", "d logits"),
    ("likelihood", 0, "discretized_logistic_nll", "d recon"),
    ("likelihood", 2, "discretized_logistic_nll", "d logscale"),
    ("latent", 0, "reparameterize", "d mu"),
    ("latent", 1, "gaussian_kl/standard", "d logvar"),
    ("latent", 3, "gaussian_kl/prior", "d prior_logvar"),
    ("linear_nll", 0, "linear_gaussian_nll/fixed", "d h"),
    ("linear_nll", 1, "linear_gaussian_nll/scalar", "d x"),
    ("linear_nll", 4, "linear_gaussian_nll/element", "d logvar"),
    ("linear_nll", 2, "linear_elbo_loss/scalar", "d weight"),
    ("linear_nll", 3, "linear_elbo_loss/element", "d bias"),
    ("linear_nll", 4, "linear_elbo_loss/scalar", "d recon_logvar"),
    ("latent", 0, "linear_elbo_loss/fixed", "d mu"),
    ("latent", 1, "linear_elbo_loss/element", "d logvar"),
    ("latent", 0, "reparameterize_kl/log_prob", "d mu"),
    ("latent", 3, "gaussian_kl/balance", "d prior_logvar"),
    ("latent", 1, "gaussian_kl/free_bits", "d logvar"),
    ("latent", 0, "gaussian_kl/free_bits_over_sample", "d mu"),
    ("latent", 0, "gaussian_kl/capacity", "d mu"),
    ("likelihood", 0, "gaussian_log_prob", "d mu"),
    ("likelihood", 1, "sample_kl", "d z"),
    ("latent", 0, "sgvb_loss/iwae", "d mu"),
    ("latent", 0, "sgvb_loss/dreg", "d mu"),
]


@pytest.mark.parametrize(("kernel", "which", "op", "name"), BROKEN)
def test_a_broken_gradient_is_caught(
    kernel: str, which: int, op: str, name: str, monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path
) -> None:
    plain = Backend("torch", CPU)
    right = getattr(plain.ops(), kernel).backward

    def off(*args: Any, **options: Any) -> tuple[Any, ...]:
        return tuple(g if g is None or i != which else g * (1 + 1e-3) for i, g in enumerate(right(*args, **options)))

    plain.replace(monkeypatch, kernel, backward=off)
    # The op that is made of others is made of the broken one.
    whole = composed.linear_elbo(plain.ops().latent, plain.ops().linear_nll)
    plain.replace(monkeypatch, "linear_elbo", **whole._asdict())
    status, out, err = command("--op", op, "--dtype", "float32", "--shape", "16,50", "--json", tmp_path / "f.json")
    assert (status, err) == (1, "")
    facts = json.loads((tmp_path / "f.json").read_text())
    assert facts["ok"] is False
    failures = [r for r in facts["rows"] if not r["ok"]]
    assert {r["result"] for r in failures} == {name}
    worst = max(failures, key=lambda r: r["worst"]["fused_ulp"] / r["allowed_max_ulp"])["worst"]
    assert worst["fused"] == pytest.approx(worst["exact"] * (1 + 1e-3), rel=1e-5)
    (line,) = (line for line in out.splitlines() if line.startswith(f"{op}, {name}, float32 on torch, shape (16, 50), logvar in ["))
    assert f"{worst['fused']:.9g} for {worst['exact']:.9g}, off by {worst['fused_ulp']:.3g} ulp" in line
    assert (f"element {worst['index']}" if worst["index"] else "the value") in line
    assert all(f", {key} {value:.9g}" in line for key, value in worst["inputs"].items())
    assert bool(worst["inputs"]) == bool(worst["index"])


def test_a_wrong_and_a_lost_value_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.gaussian_nll
    factor = torch.ones(16)
    factor[3], factor[5] = math.nan, 1 + 1e-3

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        out = right(*args, **options)
        return out + (out * factor - out).detach()

    monkeypatch.setattr(functional, "gaussian_nll", wrong)
    result = fastelbo.compare("gaussian_nll/fixed", "bfloat16", SMALL, (-1.0, 1.0))
    (failure,) = result.failures
    assert (failure.result, failure.fused.lost, failure.eager.lost) == ("nll", 1, 0)
    assert failure.worst.index == (3,)
    assert math.isnan(failure.worst.fused)
    assert failure.fused.max_ulp == pytest.approx(1e-3 * 2.0**23, rel=0.6)  # of the others
    assert ": 1 of 16 lost to inf or NaN, " in str(result)
    (told,) = (r for r in json.loads(result.to_json())["rows"] if not r["ok"])
    assert (told["worst"]["fused"], told["worst"]["fused_ulp"]) == ("nan", "inf")


def test_many_failures_are_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerance, "LUCK", 0.0)
    monkeypatch.setattr(module, "SLACK", -20.0)
    result = fastelbo.compare(dtype="float32", shape=(3, 4), logvar_range=(-1.0, 1.0))
    kinds = sum(len(op.results) + len(op.learned) for op in OPS)
    assert len(result.failures) == kinds
    head, verdict, *told = str(result).splitlines()
    assert head.startswith(f"{kinds} results, seed 0. Bound: ")
    assert verdict == f"{kinds} are NOT within it. The worst of each kind:"
    assert len(told) == report.TOLD + 1
    assert told[-1] == f"and {kinds - report.TOLD} more kinds"


def test_what_eager_alone_loses_is_no_failure(command: Command) -> None:
    result = fastelbo.compare("elbo_loss", "float16", SMALL, (-80.0, 80.0))
    loss = the(result, "elbo_loss/element", "loss")
    assert (loss.eager.lost, loss.fused.lost) == (1, 0)
    assert math.isnan(loss.eager.max_ulp)
    assert loss.fused.max_ulp < 4
    assert result.ok
    result = fastelbo.compare("gaussian_nll/logvar", "float16", SMALL, (-80.0, 80.0))
    slope = the(result, "gaussian_nll/logvar", "d recon")
    assert 0 < slope.eager.lost < slope.elements
    assert slope.fused.lost == 0
    assert result.ok
    # In the table too, of a result all of which is lost.
    status, out, err = command("--op", "elbo_loss/element", "--dtype", "float16", "--shape", "16,50", "--logvar-range", "-80", "80")
    assert (status, err) == (0, "")
    (line,) = (line.split() for line in out.splitlines() if line.startswith("   loss "))
    assert line[4:7] == ["inf", "inf", "inf"]


def test_the_bound_is_what_it_says() -> None:
    result = fastelbo.compare("gaussian_kl", "float32", SMALL, (-20.0, 20.0), seed=5)
    plain = the(result, "gaussian_kl/standard", "kl")
    assert plain.allowed_max_ulp == pytest.approx(1.5 * plain.eager.max_ulp + 2 + 0.5 * math.log2(50))
    assert plain.allowed_mean_ulp == pytest.approx(1.5 * plain.eager.mean_ulp + 2 + 0.5 * math.log2(50))
    mean = the(result, "gaussian_kl/prior", "d mu")
    assert mean.allowed_max_ulp == pytest.approx(1.5 * mean.eager.max_ulp + 2)


def test_the_bound_of_float64_products() -> None:
    result = fastelbo.compare("linear_elbo_loss/element", "float64", SMALL, (-1.0, 1.0))
    # Residuals add 20 products; a gradient of weight adds those of 16 rows, one of mu those of 50 columns.
    for name, products in (("d x", (20,)), ("d weight", (20, 16)), ("d mu", (20, 50))):
        row = the(result, "linear_elbo_loss/element", name)
        more = 2 + 6 + 0.5 * math.log2(1000 / row.elements) + sum(map(math.sqrt, products))
        assert row.allowed_max_ulp == pytest.approx(1.5 * row.eager.max_ulp + more)


def test_kl_far_from_a_learned_prior() -> None:
    """v = logvar - prior_logvar is rounded; at |v| = 50 that alone would move e^v by some 30 ulp."""
    result = fastelbo.compare("gaussian_kl/prior", "float32", (200, 1), (-50.0, 50.0))
    assert {row.backend for row in result.rows} >= {"torch"}
    for name in ("kl", "d logvar", "d prior_logvar"):
        for row in result.rows:
            if row.result == name:
                assert row.fused.max_ulp < 3, (row.backend, name, row.fused.max_ulp)


def test_a_seed_gives_the_same_figures() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    a, b, c = (fastelbo.compare("elbo_terms", shape=SMALL, seed=seed).to_json() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert a == b != c
    # An op's inputs do not depend on what else is compared.
    alone, among = (fastelbo.compare(op, shape=SMALL).rows for op in ("gaussian_kl/prior", "gaussian_kl"))
    assert alone == [row for row in among if row.op == "gaussian_kl/prior"]


# ---- arguments -------------------------------------------------------------------------------------------------------------------


def test_python_interface() -> None:
    result = fastelbo.compare("reparameterize", torch.float32, SMALL, (-1.0, 1.0), seed=3)
    assert result.ok
    assert result.failures == []
    assert [row.result for row in result.rows] == ["z", "d mu", "d logvar"]
    assert {(r.backend, r.device, r.dtype, r.shape, r.logvar_range, r.elements) for r in result.rows} == {
        ("torch", "cpu", "float32", SMALL, (-1.0, 1.0), 800)
    }
    assert str(result) == f"3 results, seed 3. {BOUND}\nAll are within it."
    assert repr(result) == "Comparison(seed=3)"


def test_default_cases() -> None:
    cases = module.plan()
    assert {(c.shape, c.logvar_range) for c in cases if c.dtype == torch.bfloat16} == {
        (shape, r) for shape in module.SHAPES for r in module.RANGES
    }
    # More than the backend takes in one run.
    assert math.prod(module.LARGE) > walk.RUN
    large = [c for c in cases if c.shape == module.LARGE]
    # A layer's weight is as large as x at most, or no larger than WEIGHTS.
    assert {c.op.size("weight", c.shape) for c in large if c.op.is_linear} == {(540_001, 1)}
    layer = next(op for op in OPS if op.is_linear)
    assert layer.size("weight", (64, 28, 28)) == (784, peers.HIDDEN)
    assert layer.size("x", (64, 28, 28)) == (64, 784)
    assert layer.size("weight", (1, module.MAX_ELEMENTS)) == (module.MAX_ELEMENTS, 1)
    assert {c.op.name for c in large} == {op.name for op in OPS}
    assert {(c.dtype, c.logvar_range) for c in large} == {(torch.float32, (-10.0, 10.0))}


IMPOSSIBLE = [
    (["--op", "nll"], "op 'nll' is unknown: choose one of reparameterize, reparameterize_kl, gaussian_kl, gaussian_nll, "),
    (["--dtype", "float8"], "dtype 'float8' is unknown: choose one of float32, bfloat16, float16, float64"),
    (["--shape", "3,0"], "shape (3, 0) is impossible: give the batch and any more dimensions, each at least 1"),
    (["--shape", "-3"], "shape (-3,) is impossible"),
    (["--shape", "3x4"], "shape must be numbers with commas between them, such as 64,784, got '3x4'"),
    (["--shape", ""], "shape must be numbers with commas between them"),
    (["--shape", "100000,100000"], "shape (100000, 100000) has 10,000,000,000 elements, which is more than 16,777,216"),
    (["--logvar-range", "3", "-3"], "logvar_range must be two finite numbers, the smaller first, got (3.0, -3.0)"),
    (["--logvar-range", "0", "nan"], "logvar_range must be two finite numbers"),
    (["--seed", "-1"], "seed must be from 0 to 2^63 - 2, got -1"),
    (["--json", "nowhere/x.json"], "cannot write nowhere/x.json: there is no folder nowhere"),
    (["--json", "."], "cannot write .: it is a folder"),
    (["--plot", "errors.txt"], "cannot draw errors.txt: its name must end in one of "),
    (["--op", "gaussian_kl/entropy"], "op 'gaussian_kl/entropy' is unknown"),
    (["--tensors", "nowhere.pt"], "[Errno 2] No such file or directory: 'nowhere.pt'"),
]


@pytest.mark.parametrize(("argv", "message"), IMPOSSIBLE, ids=[" ".join(argv) for argv, _ in IMPOSSIBLE])
def test_what_cannot_be_compared(
    argv: list[str], message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*argv)
    assert (status, out) == (2, "")
    assert err.startswith(f"fastelbo: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "argv", "message"),
    [
        ("matplotlib", ("--plot", "x.png"), '--plot needs matplotlib: pip install "fastelbo[demo]"'),
        # Arguments first: nobody installs something to be told that the call was wrong.
        ("matplotlib", ("--plot", "x.png", "--shape", "a"), "shape must be numbers"),
    ],
)
def test_extras(missing: str, argv: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    installed = cli.is_installed
    monkeypatch.setattr(cli, "is_installed", lambda name: name != missing and installed(name))
    status, out, err = command(*argv)
    assert (status, out) == (2, "")
    assert err.startswith(f"fastelbo: {message}")


def test_a_plain_table_where_rich_is_missing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures in the same order, and the verdict."""
    argv = "--op", "gaussian_nll/fixed", "--shape", "3,4", "--dtype", "float32"
    status, of_rich, _ = command(*argv)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(cli, "is_installed", lambda name: name != "rich")
    plain_status, plain, err = command(*argv)
    assert (status, plain_status, err) == (0, 0, "")
    assert "All are within it." in plain
    lines = [line.split() for line in plain.splitlines() if line.startswith("  d ")]
    assert len(lines) == 2
    figures = [line.split() for line in of_rich.splitlines() if line.lstrip().startswith("d ")]
    assert lines == figures


def test_nothing_to_plot(command: Command, tmp_path: Path) -> None:
    status, out, err = command("--op", "gaussian_nll/fixed", "--shape", "3,4", "--plot", tmp_path / "x.png")
    assert status == 2
    assert "All are within it." in out
    assert err == "fastelbo: nothing to plot: no result that was compared has an element for each log-variance\n"


# ---- the user's own tensors ------------------------------------------------------------------------------------------------------


def own() -> dict[str, torch.Tensor]:
    """As a model may leave them: halves of packed moments, a learned scalar, mixed dtypes."""
    mu, logvar = torch.randn(4, 12, requires_grad=True).chunk(2, 1)
    x = torch.rand(4, 9)
    scalar = torch.nn.Parameter(torch.tensor(-1.0))
    return {"mu": mu, "logvar": logvar, "recon": x.bfloat16() + 0.1, "x": x, "recon_logvar": scalar}


# What a mu and a logvar are enough for.
OF_KL = {"gaussian_kl/standard", "gaussian_kl/free_bits", "gaussian_kl/free_bits_over_sample", "gaussian_kl/capacity"}


def test_own_tensors(command: Command, tmp_path: Path) -> None:
    mine = own()
    torch.save(mine, tmp_path / "batch.pt")
    status, _, err = command("--tensors", tmp_path / "batch.pt", "--json", tmp_path / "f.json")
    assert (status, err) == (0, "")
    rows = {(r["op"], r["result"]): r for r in json.loads((tmp_path / "f.json").read_text())["rows"]}
    v = {name: t.detach().double() for name, t in mine.items()}
    # Every op whose arguments are there. The logvar is the posterior's, so gaussian_nll/logvar is not one of them.
    assert {op for op, _ in rows} == {
        *OF_KL, "gaussian_nll/fixed", "elbo_terms", "elbo_loss/fixed", "elbo_loss/element", "elbo_loss/scalar",
    }  # fmt: skip
    loss = rows["elbo_loss/scalar", "loss"]
    exact = fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["recon_logvar"], impl="reference")
    assert loss["worst"]["exact"] == pytest.approx(float(exact), rel=1e-12)
    assert (loss["dtype"], loss["logvar_range"]) == ("bfloat16+float32", None)
    nll = rows["gaussian_nll/fixed", "nll"]["worst"]
    terms = fastelbo.gaussian_nll(v["recon"], v["x"], logvar=FIXED, impl="reference")
    assert nll["exact"] == pytest.approx(float(terms[nll["index"]]), rel=1e-12)
    assert rows["elbo_loss/scalar", "d recon_logvar"]["elements"] == 1


def test_own_tensors_in_another_dtype() -> None:
    mine = {name: t for name, t in own().items() if name in ("mu", "logvar")}
    before = {name: t.detach().clone() for name, t in mine.items()}
    result = fastelbo.compare(dtype="float16", tensors=mine)
    assert result.ok
    assert {(row.op, row.dtype) for row in result.rows} == {(op, "float16") for op in OF_KL}
    worst = the(result, "gaussian_kl/standard", "d mu").worst
    assert worst.inputs["mu"] == float(before["mu"].half()[worst.index])
    assert all(torch.equal(mine[name], before[name]) for name in mine)


def layer() -> dict[str, torch.Tensor]:
    """As a linear decoder may leave them: a bias of zeros, weights in another dtype than what they multiply."""
    torch.manual_seed(4)
    of_rows = {name: torch.randn(6, 3).bfloat16() for name in ("mu", "logvar", "eps")}
    return {**of_rows, "weight": torch.randn(9, 3), "bias": torch.zeros(9), "x": torch.randn(6, 9), "recon_logvar": torch.randn(9)}


def test_own_linear_layer() -> None:
    mine = layer()
    result = fastelbo.compare(tensors=mine)
    assert result.ok, str(result)
    # The logvar is the posterior's, so that no linear_gaussian_nll runs, nor the op with one variance for all.
    ops = {row.op for row in result.rows}
    assert ops == {
        "reparameterize",
        "reparameterize_kl",
        "reparameterize_kl/log_prob",
        *OF_KL,
        "linear_elbo_loss/fixed",
        "linear_elbo_loss/element",
    }
    loss, slope = (the(result, "linear_elbo_loss/element", name) for name in ("loss", "d recon_logvar"))
    assert (loss.shape, loss.dtype) == ((6, 9), "bfloat16+float32")
    assert slope.worst.inputs.keys() == {"bias", "recon_logvar"}
    assert len(slope.profile) == 9
    # z is rounded to mu's dtype before it is multiplied, and so the truth has it.
    z = fastelbo.reparameterize(mine["mu"], mine["logvar"], eps=mine["eps"])
    assert z.dtype == torch.bfloat16
    v = {name: t.double() for name, t in mine.items()}
    recon = z.double() @ v["weight"].T
    terms = fastelbo.elbo_loss(recon, v["x"], v["mu"], v["logvar"], recon_logvar=v["recon_logvar"], impl="reference")
    assert loss.worst.exact == pytest.approx(float(terms), rel=1e-12)


def test_own_hidden_layer() -> None:
    mine = layer()
    mine = {"h": mine["mu"], "logvar": mine["recon_logvar"][0], **{name: mine[name] for name in ("weight", "bias", "x")}}
    result = fastelbo.compare("linear_gaussian_nll", "float16", tensors=mine)
    assert result.ok, str(result)
    assert {row.op for row in result.rows} == {f"linear_gaussian_nll/{way}" for way in ("fixed", "element", "scalar")}
    assert {row.dtype for row in result.rows} == {"float16"}


def test_nan_in_own_tensors_is_no_error() -> None:
    mu = torch.randn(4, 6)
    mu[1, 2] = math.nan
    result = fastelbo.compare(tensors={"mu": mu, "logvar": torch.randn(4, 6)})
    assert result.ok
    assert {row.fused.lost for row in result.rows} == {0}


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


PAIR = {"mu": torch.zeros(2, 3), "logvar": torch.zeros(2, 3)}
IMAGE = {"recon": torch.zeros(2, 4), "x": torch.zeros(2, 4)}
UNFIT = {
    "empty": (b"", (), " is damaged, or holds more than tensors, which could run code and is not loaded"),
    "garbage": (b"garbage", (), " is damaged, or holds more than tensors, which could run code and is not loaded"),
    "malicious": ({"mu": Malicious()}, (), " is damaged, or holds more than tensors, which could run code and is not loaded"),
    "no dict": ([torch.zeros(2)], (), " holds a list: expected a dict of tensors by argument name"),
    "nothing": ({}, (), "gaussian_kl/standard needs mu, logvar too: given are no tensors"),
    "unknown": ({**PAIR, "sigma": torch.ones(2)}, (), "no op takes a tensor named sigma: names are those of arguments, mu, "),
    "missing": ({"mu": torch.zeros(2)}, ("--op", "gaussian_kl"), "gaussian_kl/standard needs logvar too: given are mu"),
    "unused": ({**PAIR, "recon": torch.zeros(2, 4)}, (), "recon is of no use alone: gaussian_nll/fixed needs x too"),
    "text": ({**PAIR, "logvar": "high"}, (), "logvar must be a torch.Tensor, got str"),
    "integers": (
        {**PAIR, "mu": torch.zeros(2, 3, dtype=torch.int64)}, (), "mu must be float16, bfloat16, float32 or float64, got "
    ),
    "shapes": (
        {**PAIR, "mu": torch.zeros(2, 4)}, (), "logvar has shape (2, 3), but mu has shape (2, 4): they must be equal"
    ),
    "no elements": (
        {"mu": torch.zeros(0, 4), "logvar": torch.zeros(0, 4)}, (), "mu has shape (0, 4): there is nothing to compare"
    ),
    "a decoder of its own": (PAIR, ("--op", "sgvb_loss"), "sgvb_loss is compared with a decoder that is the identity, on drawn "),
    "drawn too": (PAIR, ("--shape", "3,4"), "shape and logvar_range are of drawn inputs, and tensors are given: "),
    "no scalar": (
        {**PAIR, **IMAGE, "recon_logvar": torch.zeros(2, 4)}, ("--op", "elbo_loss/scalar"),
        "elbo_loss/scalar takes recon_logvar as one number, a 0-d tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", UNFIT)
def test_unfit_tensors(which: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, options, message = UNFIT[which]
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("file.pt").write_bytes(content)
    else:
        torch.save(content, "file.pt")
    status, out, err = command("--tensors", "file.pt", *options)
    assert (status, out) == (2, "")
    assert err.startswith("fastelbo: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("harmed").exists()


# ---- backends --------------------------------------------------------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
@pytest.mark.parametrize("op", ["elbo_loss/element", "linear_elbo_loss/element"])
def test_the_triton_backend_is_compared_where_it_is_present(op: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = fastelbo.compare(op, shape=(3, 40), logvar_range=(-5.0, 5.0))
    assert {(row.backend, row.device) for row in result.rows} == {("torch", "cpu"), ("triton", device)}
    assert result.ok, str(result)
    loss = {row.backend: row.worst for row in result.rows if (row.result, row.dtype) == ("loss", "float32")}
    # Of the z that each decodes, which may differ in its last bit.
    assert loss["torch"].exact == pytest.approx(loss["triton"].exact, rel=1e-7)
    assert loss["triton"].fused == pytest.approx(loss["torch"].exact, rel=1e-6)


@pytest.mark.parametrize(("gpu", "interpreted", "device"), [(False, False, None), (False, True, "cpu"), (True, False, "cuda")])
def test_backends_present(gpu: bool, interpreted: bool, device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(module.backend, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    assert module.backends() == [("torch", CPU), *([("triton", torch.device(device))] if device else [])]
    monkeypatch.setattr(module.backend, "has_triton", lambda: False)
    assert module.backends() == [("torch", CPU)]
