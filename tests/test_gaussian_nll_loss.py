"""`gaussian_nll_loss` against `torch.nn.functional.gaussian_nll_loss`, on torch's own samples of it and beyond."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CPU, ROUNDING, Backend, each_backend
from torch.autograd import gradcheck, gradgradcheck

import fastelbo
from fastelbo import backend as chooser

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

(OP,) = (op for op in op_db if op.name == "nn.functional.gaussian_nll_loss")
DTYPES = sorted(OP.dtypes, key=str)


@pytest.fixture(autouse=True)
def _default_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function has torch's signature, hence no `impl`: FASTELBO_IMPL's place is where a test chooses."""
    if "backend" in request.fixturenames:
        monkeypatch.setattr(chooser, "DEFAULT", request.getfixturevalue("backend").impl)


def samples(backend: Backend, dtype: torch.dtype) -> list[Any]:
    """Torch's samples: all of them, but every ninth where Triton's interpreter is slow (their order repeats every four and 36)."""
    every = list(OP.sample_inputs(backend.device, dtype, requires_grad=True))
    return every[::9] if backend.impl == "triton" and backend.device == CPU else every


def tensors(args: Any) -> list[torch.Tensor]:
    return [a for a in args if isinstance(a, torch.Tensor)]


def outcome(fn: Any, args: Any, kwargs: Any, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Value and gradients, under an upstream gradient that tells the elements apart."""
    own = [
        a.detach().to(dtype or a.dtype).requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args
    ]
    loss = fn(*own, **kwargs)
    up = torch.linspace(0.5, 1.5, max(1, loss.numel())).view(-1)[: loss.numel()].view(loss.shape).to(loss)
    asked = [a for a in tensors(own) if a.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, asked, up)) if asked else []


def assert_agrees(args: Any, kwargs: Any, what: str, truncates: bool = False) -> None:
    """As near to the truth as torch is, to a rounding: in half precision torch rounds at every step and we do once."""
    ours, our_grads = outcome(fastelbo.gaussian_nll_loss, args, kwargs)
    theirs, their_grads = outcome(F.gaussian_nll_loss, args, kwargs)
    truth, true_grads = outcome(F.gaussian_nll_loss, args, kwargs, torch.float64)
    floats = [
        n for n, a in zip(("input", "target", "var"), args, strict=True) if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    dtypes = {n: a.dtype for n, a in zip(("input", "target", "var"), args, strict=True) if isinstance(a, torch.Tensor)}
    for name, a, b, t in zip(["value", *floats], [ours, *our_grads], [theirs, *their_grads], [truth, *true_grads], strict=True):
        assert a.dtype == b.dtype, f"{what}: {name} is {a.dtype}, torch's is {b.dtype}"
        assert a.shape == b.shape, f"{what}: {name} has shape {a.shape}, torch's has {b.shape}"
        assert torch.equal(a.isnan(), t.isnan()), f"{what}: {name} and NaN"
        finite = t.isfinite()
        largest = torch.finfo(a.dtype).max
        assert torch.equal(a[t.isinf()], b[t.isinf()]), f"{what}: {name} and infinities"
        if not bool(finite.any()):
            continue
        a, b, t = (v.double()[finite] for v in (a, b, t))
        relative, step = ROUNDING.get(ours.dtype if name == "value" else dtypes[name], (2.0**-53, 0.0))
        error, torchs = (a - t).abs(), (b - t).abs().nan_to_num(math.inf)
        # A few ulp of the largest value besides, since both add up in some order; and where the gradient of a shared input is a
        # sum of rounded shares, whose total happens to be nearer is luck.
        ulp = 2.0 ** (-53 if ours.dtype == torch.float64 else -24)
        bound = (
            2 * torchs.max() + (2 if truncates else 1.01) * (relative * t.abs() + step) + 8 * ulp * (t.abs() + t.abs().max() + 1)
        )
        assert bool(((error <= bound) | (t.abs() > largest)).all()), (
            f"{what}: {name} is off by {error.max():.3g}, torch by {torchs.max():.3g}"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@each_backend
def test_torchs_samples(backend: Backend, dtype: torch.dtype) -> None:
    every = samples(backend, dtype)
    assert len(every) >= 30
    for i, sample in enumerate(every):
        assert_agrees((sample.input, *sample.args), sample.kwargs, f"sample {i} {sample.kwargs}", backend.truncates)


@each_backend
def test_torchs_errors(backend: Backend) -> None:
    errors = list(OP.error_inputs(backend.device))
    assert len(errors) == 3
    for case in errors:
        sample = case.sample_input
        with pytest.raises(case.error_type, match=case.error_regex):
            F.gaussian_nll_loss(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            fastelbo.gaussian_nll_loss(sample.input, *sample.args, **sample.kwargs)


SHAPES = [
    ((4, 3), (4, 3), (4, 3)),
    ((4, 3), (4, 3), (4,)),
    ((4, 3), (4, 3), (4, 1)),
    ((4, 3), (4, 3), (1, 3)),
    ((4, 3), (3,), (4, 3)),
    ((4, 3), (), (4,)),
    ((4, 3), (2, 4, 3), (4, 3)),
    ((4, 1), (4, 3), (4, 1)),
    ((4, 1), (4, 3), (4,)),
    ((), (5,), ()),
    ((5,), (5,), ()),
    ((5,), (5,), (1,)),
    ((), (), ()),
    ((1,), (1,), ()),
    ((1, 1), (3, 4), (1, 1)),
    ((1, 1), (3, 4), (1,)),
    ((2, 3, 4), (2, 3, 4), (2, 1, 4)),
    ((2, 3, 4), (2, 3, 4), (2, 3)),
    ((2, 3, 4), (2, 1, 4), (1, 3, 4)),
    ((0, 3), (0, 3), (0, 3)),
    ((4, 0), (4, 0), (4,)),
    # What torch refuses, or lets through by the letter of its check.
    ((4, 3), (4, 3), (3,)),
    ((4, 3), (4, 3), ()),
    ((4, 3), (4, 3), (1, 1)),
    ((2, 3, 4), (2, 3, 4), (1, 1, 4)),
    ((2, 3, 4), (2, 3, 4), (3, 4)),
    ((1, 3), (4, 3), (4, 3)),
    ((4, 3), (4, 2), (4, 3)),
    ((4, 3), (5, 3), (4,)),
    ((4, 3), (4, 3), (4, 3, 1)),
    ((4, 3), (4, 3), (4, 2)),
    ((3, 5), (3, 5), (1, 0)),
    ((2, 2), (2, 2), (1, 1)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@each_backend
def test_shapes_are_taken_and_refused_as_torch_does(backend: Backend, shapes: Any) -> None:
    args = [torch.randn(shapes[0]), torch.randn(shapes[1]), torch.rand(shapes[2]) + 0.5]
    args = [a.to(backend.device) for a in args]
    for reduction, full in itertools.product(("none", "mean", "sum"), (False, True)):
        kwargs = {"reduction": reduction, "full": full}
        try:
            F.gaussian_nll_loss(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            with pytest.raises(type(error)) as raised:
                fastelbo.gaussian_nll_loss(*args, **kwargs)
            if isinstance(error, ValueError):
                assert str(raised.value) == str(error)  # noqa: PT017 (torch decides whether)
        else:
            assert_agrees(args, kwargs, f"{shapes} {kwargs}")


@pytest.mark.parametrize(
    "dtypes", list(itertools.product([torch.float16, torch.bfloat16, torch.float32, torch.float64], repeat=3)), ids=str
)
@each_backend
def test_dtypes_promote_as_torchs(backend: Backend, dtypes: Any) -> None:
    if backend.truncates and len(set(dtypes)) == 3:
        pytest.skip("the interpreter sees fewer cases")
    args = [(torch.randn(3, 4)).to(dtypes[0]), torch.randn(3, 4).to(dtypes[1]), (torch.rand(3, 1) + 0.5).to(dtypes[2])]
    args = [a.to(backend.device) for a in args]
    for reduction in ("none", "mean"):
        assert_agrees(args, {"reduction": reduction}, str(dtypes), backend.truncates)


def test_integers_promote_as_torchs() -> None:
    x = torch.randn(3, 4)
    n = torch.arange(12).view(3, 4)
    for args in ((x, n, torch.ones(3, 4)), (x, n, 0.7), (n, x, torch.ones(3, 4))):
        assert_agrees(args, {"reduction": "mean"}, "integers")


@pytest.mark.parametrize("var", [0.7, 0.0, 1e-9, 1e-6, 3.0, 1e30])
@each_backend
def test_float_variance(backend: Backend, var: float) -> None:
    x, y = torch.randn(5, 7, device=backend.device), torch.randn(5, 7, device=backend.device)
    for reduction, full, eps in itertools.product(("none", "mean", "sum"), (False, True), (1e-6, 0.01)):
        assert_agrees((x, y, var), {"reduction": reduction, "full": full, "eps": eps}, f"var={var} eps={eps}")


@each_backend
def test_variance_below_eps(backend: Backend) -> None:
    """The clamp raises the value and lets the gradient through, as torch's does."""
    var = torch.tensor([[0.0, 1e-9, 1e-6, 1e-3, 0.5, 2.0]], device=backend.device)
    x, y = (torch.randn(1, 6, device=backend.device) for _ in range(2))
    for eps in (1e-6, 1e-2):
        assert_agrees((x, y, var), {"reduction": "none", "eps": eps}, f"eps={eps}")
        assert_agrees((x, x.clone(), var), {"reduction": "none", "eps": eps}, f"x = y, eps={eps}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@each_backend
def test_not_finite(backend: Backend, bad: float) -> None:
    for place in range(3):
        if bad == float("-inf") and place == 2:
            continue  # a negative variance
        args = [torch.randn(2, 3), torch.randn(2, 3), torch.rand(2, 3) + 0.5]
        args[place][1, 1] = bad
        args = [a.to(backend.device) for a in args]
        ours, our_grads = outcome(fastelbo.gaussian_nll_loss, args, {"reduction": "none"})
        theirs, their_grads = outcome(F.gaussian_nll_loss, args, {"reduction": "none"})
        for a, b in zip([ours, *our_grads], [theirs, *their_grads], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_negative_variance_is_refused_on_the_cpu() -> None:
    x = torch.randn(2, 3)
    for var in (-0.1, torch.tensor([[1.0, 1.0, -1e-6], [1.0, 1.0, 1.0]])):
        with pytest.raises(ValueError, match="var has negative entry/entries"):
            F.gaussian_nll_loss(x, x, var)
        with pytest.raises(ValueError, match="var has negative entry/entries"):
            fastelbo.gaussian_nll_loss(x, x, var)


@pytest.mark.gpu
def test_negative_variance_on_a_gpu_is_nan_without_a_sync() -> None:
    x = torch.randn(2, 3, device="cuda")
    var = torch.ones_like(x)
    var[0, 1] = -1.0
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = fastelbo.gaussian_nll_loss(x, x, var, reduction="none")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isnan().nonzero().tolist() == [[0, 1]]


@each_backend
def test_gradients_of_gradients(backend: Backend) -> None:
    every = [s for s in samples(backend, torch.float64) if s.input.numel() <= 30 and "eps" not in s.kwargs]
    every += samples(backend, torch.float64)[:1]
    for sample in every[::6]:
        inputs = [t.detach().clone().requires_grad_() for t in (sample.input, *sample.args)]

        def fn(*t: torch.Tensor, kwargs: Any = sample.kwargs) -> torch.Tensor:
            return fastelbo.gaussian_nll_loss(*t, **kwargs)

        assert gradcheck(fn, inputs, fast_mode=backend.truncates)
        if backend.impl != "triton":
            assert gradgradcheck(fn, inputs)
        up = torch.ones_like(fn(*inputs))
        first = torch.autograd.grad(fn(*inputs), inputs, up, create_graph=True)
        theirs = torch.autograd.grad(F.gaussian_nll_loss(*inputs, **sample.kwargs), inputs, up, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)
        want = torch.autograd.grad(sum(g.sin().sum() for g in theirs), inputs)
        torch.testing.assert_close(second, want, rtol=1e-9, atol=1e-9)


@each_backend
def test_float_variance_twice(backend: Backend) -> None:
    x, y = (torch.randn(4, 3, dtype=torch.float64, device=backend.device, requires_grad=True) for _ in range(2))
    for var in (0.7, 0.0):
        found = []
        for fn in (fastelbo.gaussian_nll_loss, F.gaussian_nll_loss):
            first = torch.autograd.grad(fn(x, y, var, eps=1e-3), [x, y], create_graph=True)
            found.append((*first, *torch.autograd.grad(first[0].square().sum(), [x, y])))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=0)


@each_backend
def test_module(backend: Backend) -> None:
    x, y = (torch.randn(4, 3, device=backend.device) for _ in range(2))
    var = torch.rand(4, device=backend.device) + 0.1
    for kwargs in ({}, {"full": True, "reduction": "sum"}, {"eps": 0.3, "reduction": "none"}):
        ours, theirs = fastelbo.GaussianNLLLoss(**kwargs), torch.nn.GaussianNLLLoss(**kwargs)
        assert (ours.full, ours.eps, ours.reduction) == (theirs.full, theirs.eps, theirs.reduction)
        torch.testing.assert_close(ours(x, y, var), theirs(x, y, var))
        torch.testing.assert_close(ours(x, y, 0.5), theirs(x, y, 0.5))


@each_backend
def test_positional_arguments(backend: Backend) -> None:
    x, y = (torch.randn(4, 3, device=backend.device) for _ in range(2))
    var = torch.rand(4, 3, device=backend.device)
    torch.testing.assert_close(
        fastelbo.gaussian_nll_loss(x, y, var, True, 0.2, "sum"), F.gaussian_nll_loss(x, y, var, True, 0.2, "sum")
    )
    torch.testing.assert_close(
        fastelbo.gaussian_nll_loss(input=x, target=y, var=var), F.gaussian_nll_loss(input=x, target=y, var=var)
    )


def test_tensor_subclasses_are_honoured() -> None:
    """`__torch_function__`, which torch's own function dispatches on, must not be lost on the way."""

    class Tagged(torch.Tensor):
        pass

    x = torch.randn(3, 4).as_subclass(Tagged)
    loss = fastelbo.gaussian_nll_loss(x, torch.randn(3, 4), 0.5)
    assert torch.isfinite(loss).all()
