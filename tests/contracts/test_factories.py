"""A caller's default device and default dtype change nothing: read from the source, and tried with every public function."""

from __future__ import annotations

import ast
import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKENDS, HAS_GPU, TORCH, TORCH_ON_GPU, TRITON, Backend
from interpreter import quick_interpreter
from torch import Tensor, nn
from torch.distributions import Normal

import fastelbo
from fastelbo import backend as chooser

ROOT = Path(__file__).resolve().parents[2]


# ---- as it is written ------------------------------------------------------------------------------------------------------------

FACTORIES = {
    f"torch.{name}"
    for name in (
        "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
        "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
    )
}  # fmt: skip

# What measures and shows, rather than computes in a caller's program.
APART = {"cli.py", "demo.py", "numerics/report.py"}


def unstated(source: str) -> list[tuple[int, str]]:
    """(line, call) of every tensor that is made without its device and its dtype. `**options` may hold both."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
            stated = {keyword.arg for keyword in node.keywords}  # None is **options
            if None not in stated and not stated >= {"device", "dtype"}:
                found.append((node.lineno, ast.unparse(node)))
    return sorted(found)


def test_the_lint_finds_what_it_should() -> None:
    source = """
torch.zeros(3)
torch.full((), 1.0, dtype=acc)
torch.arange(4, device=x.device)
torch.tensor(1.0, device=x.device, dtype=x.dtype)
torch.empty(3, **like)
torch.zeros_like(x)
x.new_zeros(3)
np.zeros(3)
"""
    assert [line for line, _ in unstated(source)] == [2, 3, 4]


def test_every_factory_call_states_its_device_and_dtype() -> None:
    wrong = []
    for folder in (ROOT / "fastelbo", ROOT / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            if path.relative_to(folder).as_posix() not in APART:
                wrong += [f"{path.relative_to(ROOT)}:{line}: {call}" for line, call in unstated(path.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


# ---- as it runs ------------------------------------------------------------------------------------------------------------------

Values = dict[str, Tensor]


def values(device: torch.device, dtype: torch.dtype) -> Values:
    """Inputs by name; all but x, the noise and the weights require grad."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "mu": (4, 6), "logvar": (4, 6), "prior_mu": (6,), "prior_logvar": (4, 1), "moments": (4, 12), "recon": (4, 2, 5),
        "spread": (2, 1), "decoder": (10, 6), "bias": (10,), "h": (4, 6), "eps": (4, 6), "eps3": (3, 4, 6), "x": (4, 2, 5),
        "w": (4, 1, 5),
    }  # fmt: skip
    constants = ("eps", "eps3", "x", "w")
    found = {
        name: (0.5 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_(name not in constants)
        for name, shape in shapes.items()
    }
    for name in ("std", "var"):
        found[name] = found["spread"].detach().exp().requires_grad_()
    found["mask"], found["rows"] = found["w"] > 0, torch.tensor([[True], [False], [True], [True]], device=device)
    return found | {"beta": torch.tensor(0.7, device=device), "seed": torch.tensor(-5, device=device)}


def distance(x: Tensor, recon: Tensor) -> Tensor:
    return (x - recon).square()


def modules(device: torch.device, dtype: torch.dtype, impl: str) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "nll": fastelbo.GaussianNLLLoss(),
        "l1": fastelbo.AutoencoderKLLoss(logvar=0.3, perceptual_loss=distance, impl=impl).to(device, dtype),
        "l2": fastelbo.AutoencoderKLLoss(likelihood="l2", kl_weight=0.1, impl=impl),
        "sample": fastelbo.Reparameterize(3, impl=impl),
        "elbo": fastelbo.ELBOLoss(recon_logvar=0.3, learned=True, impl=impl).to(device, dtype),
        "elbo of a number": fastelbo.ELBOLoss(beta=2, recon_logvar=0.3, impl=impl),
        "linear": fastelbo.LinearELBO(6, 10, recon_logvar=0.2, learned=True, impl=impl).to(device, dtype),
    }


# The function, what is peculiar to the call, and the call: of the inputs v, the modules m and the options o.
CASES: list[tuple[str, str, Callable[..., Any]]] = [
    ("reparameterize", "eps", lambda v, m, **o: fastelbo.reparameterize(v["mu"], v["logvar"], eps=v["eps"], **o)),
    ("reparameterize", "seed", lambda v, m, **o: fastelbo.reparameterize(v["mu"], v["logvar"], seed=7, **o)),
    ("reparameterize", "seed tensor", lambda v, m, **o: fastelbo.reparameterize(v["mu"], v["logvar"], 3, seed=v["seed"], **o)),
    ("reparameterize", "own noise", lambda v, m, **o: fastelbo.reparameterize(v["mu"], v["logvar"], **o)),
    ("reparameterize", "samples", lambda v, m, **o: fastelbo.reparameterize(v["mu"], v["logvar"], 3, **o)),
    ("reparameterize_kl", "eps", lambda v, m, **o: fastelbo.reparameterize_kl(v["mu"], v["logvar"], eps=v["eps"], **o)),
    (
        "reparameterize_kl", "seed, prior, clamp",
        lambda v, m, **o: fastelbo.reparameterize_kl(
            v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], num_samples=2, seed=7, logvar_clamp=(-1.0, 0.3), **o
        ),
    ),
    ("reparameterize_kl", "own noise", lambda v, m, **o: fastelbo.reparameterize_kl(v["mu"], v["logvar"], reduction="mean", **o)),
    ("gaussian_kl", "", lambda v, m, **o: fastelbo.gaussian_kl(v["mu"], v["logvar"], **o)),
    ("gaussian_kl", "elements", lambda v, m, **o: fastelbo.gaussian_kl(v["mu"], v["logvar"], batch_dims=2, **o)),
    ("gaussian_kl", "numbers", lambda v, m, **o: fastelbo.gaussian_kl(v["mu"], v["logvar"], 0.5, -1, reduction="batchmean", **o)),
    (
        "gaussian_kl", "prior, weight",
        lambda v, m, **o: fastelbo.gaussian_kl(
            v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], weight=v["rows"], reduction="mean", **o
        ),
    ),
    *(
        (
            "gaussian_kl", f"{form}, mixed prior",
            lambda v, m, form=form, **o: fastelbo.gaussian_kl(v["mu"], **{form: v["logvar"].exp()}, prior_logstd=0.3, **o),
        )
        for form in ("std", "var")
    ),
    (
        "reparameterize_kl", "log_prob",
        lambda v, m, **o: fastelbo.reparameterize_kl(v["mu"], v["logvar"], seed=7, num_samples=2, log_prob=True, **o),
    ),
    (
        "gaussian_kl", "free bits, balance, capacity",
        lambda v, m, **o: fastelbo.gaussian_kl(
            v["mu"], v["logvar"], v["prior_mu"], v["prior_logvar"], weight=v["rows"], kl_balance=0.8, free_bits=0.3, capacity=1,
            reduction="batchmean", **o
        ),
    ),
    (
        "foreach_gaussian_kl", "prior",
        lambda v, m, **o: tuple(
            fastelbo.foreach_gaussian_kl([v["mu"]] * 2, [v["logvar"]] * 2, [v["prior_mu"], 0.5], [v["prior_logvar"], -1], **o)
        ),
    ),
    *(
        (
            "foreach_reparameterize_kl", noise,
            lambda v, m, given=given, **o: tuple(
                itertools.chain(
                    *fastelbo.foreach_reparameterize_kl([v["mu"]] * 2, [v["logvar"]] * 2, **given(v), reduction="mean", **o)
                )
            ),
        )
        for noise, given in (
            ("seed", lambda v: {"seed": 7}), ("seed tensor", lambda v: {"seed": v["seed"]}),
            ("eps", lambda v: {"eps": [v["eps"]] * 2}), ("own noise", lambda v: {}),
        )
    ),
    ("gaussian_log_prob", "", lambda v, m, **o: fastelbo.gaussian_log_prob(v["mu"], v["prior_mu"], logstd=v["prior_logvar"], **o)),
    ("sample_kl", "", lambda v, m, **o: fastelbo.sample_kl(v["mu"], 0.5, v["prior_logvar"], prior_std=2.0, **o)),
    *(
        (
            "sgvb_loss", objective,
            lambda v, m, objective=objective, **o: fastelbo.sgvb_loss(
                lambda z: (z @ v["decoder"].T).view(-1, 2, 5), v["x"], v["mu"], v["logvar"], objective=objective, num_samples=3,
                eps=v["eps3"], **o
            ),
        )
        for objective in ("iwae", "dreg")
    ),
    (
        "kl_divergence", "",
        lambda v, m, **o: fastelbo.kl_divergence(
            Normal(v["mu"], v["logvar"].exp()), Normal(v["prior_mu"], v["prior_logvar"].exp()), **o
        ),
    ),
    ("gaussian_nll", "", lambda v, m, **o: fastelbo.gaussian_nll(v["recon"], v["x"], **o)),
    ("laplace_nll", "number", lambda v, m, **o: fastelbo.laplace_nll(v["recon"], v["x"], logscale=0.3, **o)),
    ("laplace_nll", "logscale", lambda v, m, **o: fastelbo.laplace_nll(v["recon"], v["x"], logscale=v["spread"], **o)),
    ("discretized_logistic_nll", "number", lambda v, m, **o: fastelbo.discretized_logistic_nll(v["recon"], v["x"], bins=9, **o)),
    (
        "discretized_logistic_nll", "logscale",
        lambda v, m, **o: fastelbo.discretized_logistic_nll(v["recon"], v["x"], logscale=v["spread"], **o),
    ),
    ("bernoulli_nll", "", lambda v, m, **o: fastelbo.bernoulli_nll(v["recon"], v["x"], reduction="batchmean", **o)),
    ("poisson_nll", "", lambda v, m, **o: fastelbo.poisson_nll(v["recon"].exp(), v["x"].abs().round().detach(), **o)),
    (
        "negative_binomial_nll", "number",
        lambda v, m, **o: fastelbo.negative_binomial_nll(v["recon"].exp(), v["x"].abs().round().detach(), theta=2.0, **o),
    ),
    (
        "zero_inflated_negative_binomial_nll", "tensors",
        lambda v, m, **o: fastelbo.zero_inflated_negative_binomial_nll(
            v["recon"].exp(), v["x"].abs().round().detach(), theta=v["std"], zi_logits=v["recon"], **o
        ),
    ),
    (
        "elbo_loss", "bernoulli",
        lambda v, m, **o: fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], likelihood="bernoulli", **o),
    ),
    *(
        ("gaussian_nll", form, lambda v, m, form=form, **o: fastelbo.gaussian_nll(v["recon"], v["x"], **{form: v[form]}, **o))
        for form in ("std", "var")
    ),
    ("gaussian_nll", "logvar", lambda v, m, **o: fastelbo.gaussian_nll(v["recon"], v["x"], logvar=v["spread"], **o)),
    *(
        (
            "gaussian_nll", f"{form} number",
            lambda v, m, form=form, **o: fastelbo.gaussian_nll(v["recon"], v["x"], reduction="batchmean", **{form: 0.7}, **o),
        )
        for form in ("logvar", "std", "var")
    ),
    (
        "gaussian_nll", "weights",
        lambda v, m, **o: fastelbo.gaussian_nll(v["recon"], v["x"], weight=v["w"].abs(), reduction="mean", batch_dims=2, **o),
    ),
    ("gaussian_nll_loss", "tensor", lambda v, m, impl: fastelbo.gaussian_nll_loss(v["recon"], v["x"], v["var"].expand(4, 2, 5))),
    ("gaussian_nll_loss", "number", lambda v, m, impl: fastelbo.gaussian_nll_loss(v["recon"], v["x"], 0.4, True, reduction="none")),
    ("elbo_loss", "", lambda v, m, **o: fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], **o)),
    (
        "elbo_loss", "numbers",
        lambda v, m, **o: fastelbo.elbo_loss(
            v["recon"], v["x"], v["mu"], v["logvar"], beta=0.3, recon_logvar=-0.5, prior_mu=0.1, prior_logvar=0.2,
            return_terms=True, **o,
        ),
    ),
    (
        "elbo_loss", "tensors",
        lambda v, m, **o: fastelbo.elbo_loss(
            v["recon"], v["x"], v["mu"], v["logvar"], beta=v["beta"], recon_logvar=v["spread"], prior_mu=v["prior_mu"],
            prior_logvar=v["prior_logvar"], weight=v["mask"], reduction="mean", **o,
        ),
    ),
    (
        "elbo_loss", "of each sample",
        lambda v, m, **o: fastelbo.elbo_loss(v["recon"], v["x"], v["mu"], v["logvar"], beta=v["beta"], reduction="none", **o),
    ),
    (
        "elbo_terms", "",
        lambda v, m, **o: fastelbo.elbo_terms(v["recon"], v["x"], v["mu"], v["logvar"], recon_logvar=v["spread"], **o),
    ),
    (
        "linear_elbo_loss", "eps",
        lambda v, m, **o: fastelbo.linear_elbo_loss(
            v["x"].flatten(1), v["mu"], v["logvar"], v["decoder"], v["bias"], recon_logvar=v["bias"], eps=v["eps"], **o
        ),
    ),
    (
        "linear_elbo_loss", "numbers, seed",
        lambda v, m, **o: fastelbo.linear_elbo_loss(
            v["x"].flatten(1), v["mu"], v["logvar"], v["decoder"], recon_logvar=0.4, prior_mu=0.1, beta=0.3, num_samples=2, seed=7,
            return_terms=True, **o,
        ),
    ),
    (
        "linear_elbo_loss", "own noise",
        lambda v, m, **o: fastelbo.linear_elbo_loss(
            v["x"].flatten(1), v["mu"], v["logvar"], v["decoder"], beta=v["beta"], reduction="none", **o
        ),
    ),
    (
        "linear_gaussian_nll", "",
        lambda v, m, **o: fastelbo.linear_gaussian_nll(v["h"], v["decoder"], v["x"].flatten(1), v["bias"], logvar=v["bias"], **o),
    ),
    (
        "linear_gaussian_nll", "number",
        lambda v, m, **o: fastelbo.linear_gaussian_nll(
            v["h"], v["decoder"], v["x"].flatten(1), logvar=0.4, reduction="batchmean", **o
        ),
    ),
    (
        "sgvb_loss", "seed",
        lambda v, m, **o: fastelbo.sgvb_loss(
            lambda z: (z @ v["decoder"].T).unflatten(-1, (2, 5)), v["x"], v["mu"], v["logvar"], num_samples=2, seed=7,
            recon_logvar=0.3, beta=v["beta"], return_terms=True, **o,
        ),
    ),
    (
        "sgvb_loss", "own noise",
        lambda v, m, **o: fastelbo.sgvb_loss(
            lambda z: ((z @ v["decoder"].T).unflatten(-1, (2, 5)), v["spread"]), v["x"], v["mu"], v["logvar"], beta=0.3,
            reduction="none", **o,
        ),
    ),
    *(
        (
            "DiagonalGaussian", name,
            lambda v, m, call=call, **o: call(v, fastelbo.DiagonalGaussian.from_moments(v["moments"], **o), **o),
        )
        for name, call in {
            "rsample": lambda v, q, **o: q.rsample(seed=7),
            "sample": lambda v, q, **o: q.sample(2),
            "rsample_kl": lambda v, q, **o: q.rsample_kl(eps=v["eps"]),
            "kl": lambda v, q, **o: q.kl(),
            "kl of two": lambda v, q, **o: q.kl(fastelbo.DiagonalGaussian(v["mu"], v["logvar"], **o), reduction="mean"),
            "nll": lambda v, q, **o: q.nll(v["eps"]),
            "properties": lambda v, q, **o: (q.mean, q.mode(), q.logvar, q.std, q.var),
        }.items()
    ),
    ("GaussianNLLLoss", "", lambda v, m, impl: m["nll"](v["recon"], v["x"], v["var"].expand(4, 2, 5))),
    (
        "AutoencoderKLLoss", "l1", lambda v, m, impl: m["l1"](v["recon"], v["x"], v["mu"].square(), weight=v["rows"].squeeze(1)),
    ),
    ("AutoencoderKLLoss", "l2", lambda v, m, impl: m["l2"](v["recon"], v["x"], v["mu"].square(), nll_divisor=3, kl_divisor=2.5)),
    ("Reparameterize", "", lambda v, m, impl: m["sample"](v["mu"], v["logvar"])),
    ("ELBOLoss", "learned", lambda v, m, impl: m["elbo"](v["recon"], v["x"], v["mu"], v["logvar"])),
    ("ELBOLoss", "number", lambda v, m, impl: m["elbo of a number"](v["recon"], v["x"], v["mu"], v["logvar"], prior_mu=0.5)),
    ("LinearELBO", "", lambda v, m, impl: m["linear"](v["x"].flatten(1), v["mu"], v["logvar"], seed=7)),
]  # fmt: skip

ENVIRONMENTS = ("within a device", "default device", "default dtype")
ALL = "all of these"
DTYPES = (torch.float32, torch.bfloat16)


def test_every_public_name_is_tried() -> None:
    # The others compute no loss: numbers, and what checks numerics on inputs of its own.
    assert {name for name, *_ in CASES} == set(fastelbo.__all__) - {
        "effective_beta",
        "schedules",
        "compare",
        "verify",
        "NumericsMismatch",
    }


@contextlib.contextmanager
def environment(name: str) -> Iterator[None]:
    if name == ALL:
        with contextlib.ExitStack() as stack:
            for each in ENVIRONMENTS:
                stack.enter_context(environment(each))
            yield
        return
    if name == "within a device":
        with torch.device("meta"):
            yield
        return
    try:
        if name == "default device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def results(call: Callable[..., Any], v: Values, m: dict[str, Any], impl: str) -> list[Tensor | None]:
    """Outputs and the gradients of all that requires one."""
    torch.manual_seed(3)
    default, chooser.DEFAULT = chooser.DEFAULT, impl  # where a function has torch's signature, hence no `impl`
    try:
        outs = call(v, m, impl=impl)
        outs = list(outs) if isinstance(outs, tuple) else [outs]
        learned = [p for module in m.values() if isinstance(module, nn.Module) for p in module.parameters()]
        asked = [t for t in (*v.values(), *learned) if t.requires_grad]
        wanted = [o for o in outs if o.requires_grad]
        return outs + list(torch.autograd.grad(wanted, asked, [torch.ones_like(o) for o in wanted], allow_unused=True))
    finally:
        chooser.DEFAULT = default


def assert_same(got: list[Tensor | None], want: list[Tensor | None], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None), f"{what}: result {i}"
        if a is not None and b is not None:
            assert (a.device, a.dtype, a.shape) == (b.device, b.dtype, b.shape), f"{what}: result {i}"
            assert torch.equal(a, b), f"{what}: result {i} differs by {(a.double() - b.double()).abs().max()}"


def check(call: Callable[..., Any], backend: Backend, dtype: torch.dtype, where: str, first: bool = False) -> None:
    """The results inside against those outside, and these against the reference. `first`: go inside before anything else."""
    v = values(backend.device, dtype)
    m = modules(backend.device, dtype, backend.impl)
    before = None if first else results(call, v, m, backend.impl)
    with environment(where):
        inside = results(call, v, m, backend.impl)
    after = results(call, v, m, backend.impl)
    assert_same(inside, after, f"{where}, and afterwards")
    if before is not None:
        assert_same(after, before, f"after {where}, and before")
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    oracle = results(call, v, modules(backend.device, dtype, "reference"), "reference")
    for got, want in zip(after, oracle, strict=True):
        if got is not None and want is not None:
            assert got.device.type == backend.device.type
            torch.testing.assert_close(got.detach().float(), want.detach().float(), **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


# The last test spends the time that Triton's interpreter takes for all of them.
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", [TORCH, *TORCH_ON_GPU, *([TRITON] if HAS_GPU else [])])
@pytest.mark.parametrize(("name", "kind", "call"), CASES, ids=[f"{name} {kind}".strip() for name, kind, _ in CASES])
def test_a_default_changes_nothing(name: str, kind: str, call: Callable[..., Any], backend: Backend, dtype: torch.dtype) -> None:
    for where in ENVIRONMENTS:
        check(call, backend, dtype, where)


# ---- in a new process: what is kept from a first call that was made inside must serve every later one ----------------------------


# Each new process is a fork of one that has imported torch and fastelbo and called nothing, so that they are imported once.
# The kernels, which a first call imports, are not among what it has imported.
NEW_PROCESS = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
NEW_PROCESS.set_forkserver_preload(["fastelbo"])


def first_calls(backend: Backend) -> None:
    with quick_interpreter():
        for name, kind, call in CASES:
            try:
                check(call, backend, torch.float32, ALL, first=True)
            except Exception as error:
                raise AssertionError(f"{name} {kind}") from error


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_call_of_a_process_may_be_made_inside(backend: Backend) -> None:
    with ProcessPoolExecutor(1, mp_context=NEW_PROCESS) as pool:
        pool.submit(first_calls, backend).result(timeout=280)
