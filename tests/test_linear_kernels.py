"""The kernels across a linear decoder, called as the autograd function calls them, against float64 autograd of the formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cases import TRITON

import fastelbo.eager.linear as torch_tiles
import fastelbo.kernels.linear.host as host
from fastelbo import backend, kernels
from fastelbo.dtypes import accumulate_dtype
from fastelbo.kernels.linear import linear_limits, tiles
from fastelbo.specs import Likelihood, Linear, LinearInputs, Op

pytestmark = TRITON.marks

NAMES = ("h", "x", "weight", "bias", "var")
ALL = (True,) * 5
HALVES = (torch.float16, torch.bfloat16)
F32 = torch.float32


def draw(
    device: torch.device, b: int, d: int, width: int, *, samples: int = 1, var: str = "columns", bias: bool = True,
    dtypes: Sequence[torch.dtype] = (F32,),
) -> list[Any]:  # fmt: skip
    """h, x, weight, bias and var, which may be a number; dtypes are taken in turn from `dtypes`."""
    shapes: list[Any] = [(samples * b, width), (b, d), (d, width), (d,) if bias else None]
    shapes.append({"float": None, "0d": (), "one": (1,), "columns": (d,)}[var])
    tensors = [None if s is None else 0.5 * torch.randn(s) for s in shapes]
    cycle = itertools.cycle(dtypes)
    inputs: list[Any] = [t if t is None else t.to(device, next(cycle)) for t in tensors]
    if var == "float":
        inputs[4] = 0.4
    return inputs


def dtype_of(inputs: list[Any]) -> torch.dtype:
    """Of the arithmetic."""
    return accumulate_dtype(*(t for t in inputs if isinstance(t, Tensor)))


def served(inputs: list[Any], full: bool, keep: int, scale: Any, precision: str | None) -> tuple[Op, LinearInputs, Linear]:
    """The op that serves impl="triton", which for a wide h and for float64 is plain PyTorch, and its records."""
    *tensors, var = inputs
    records = LinearInputs(*tensors, var if isinstance(var, Tensor) else None)
    logvar = 0.0 if isinstance(var, Tensor) else var
    chosen = backend.choose_linear("triton", records)
    assert chosen is not None
    return chosen.linear_nll, records, Linear(Likelihood(keep, scale, logvar=logvar, full=full), precision)


def forward(
    inputs: list[Any], full: bool, keep: int, scale: Any, precision: str | None, needs: tuple[bool, ...]
) -> tuple[Tensor, Any]:
    op, records, spec = served(inputs, full, keep, scale, precision)
    (nll,), kept = op.forward(records, spec, needs)
    assert nll is not None
    return nll, kept


def backward(
    inputs: list[Any], keep: int, scale: Any, grad: Tensor, precision: str | None, needs: tuple[bool, ...], kept: Any = None
) -> tuple[Tensor | None, ...]:
    op, records, spec = served(inputs, True, keep, scale, precision)
    return op.backward(records, spec, (grad,), needs, kept)


def formula(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, var: Any, full: bool, keep: int, scale: float) -> Tensor:
    recon = h @ weight.T
    if bias is not None:
        recon = recon + bias
    logvar = torch.as_tensor(var, dtype=recon.dtype)
    residual = recon - x.repeat(len(h) // len(x), 1)
    terms = 0.5 * (residual**2 * torch.exp(-logvar) + logvar) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return scale * (terms.sum(1) if keep else terms.sum())


def oracle(inputs: list[Any], full: bool, keep: int, scale: float, grad: Tensor) -> tuple[Tensor, list[Tensor | None], list[Any]]:
    """Result and gradients in float64, and what size the summands of each gradient have where they all have the same sign."""
    truth = [t.detach().cpu().double().requires_grad_() if isinstance(t, Tensor) else t for t in inputs]
    out = formula(*truth, full, keep, scale)
    asked = [t for t in truth if isinstance(t, Tensor)]
    found = iter(torch.autograd.grad(out, asked, grad.cpu().double().expand(out.shape)))
    grads = [next(found) if isinstance(t, Tensor) else None for t in truth]

    h, x, weight, bias, var = (t.detach() if isinstance(t, Tensor) else t for t in truth)
    inverse = torch.exp(-torch.as_tensor(var, dtype=torch.float64))
    recon = h.abs() @ weight.abs().T + (0.0 if bias is None else bias.abs()) + x.abs().repeat(len(h) // len(x), 1)
    up = (abs(scale) * grad.cpu().double().abs()).expand(len(h)).unsqueeze(1)
    g = up * recon * inverse
    share = 0.5 * up * (1 + recon**2 * inverse)
    of_var = share.sum().reshape(inverse.shape) if inverse.numel() == 1 else share.sum(0)
    sizes = [g @ weight.abs(), g.view(-1, *x.shape).sum(0), g.T @ h.abs(), g.sum(0), of_var]
    return out.detach(), grads, [out.detach().abs() + (recon**2).sum().sqrt(), *sizes]


def assert_right(
    got: Tensor | None, want: Tensor, size: Tensor, what: str, inputs: list[Any], dtype: torch.dtype, roundings: int = 1
) -> None:
    assert got is not None, f"{what}: nothing came back"
    assert got.dtype == dtype, what
    assert tuple(got.shape) == tuple(want.shape), what
    assert got.is_contiguous(), what
    acc = dtype_of(inputs)
    operands = torch.promote_types(inputs[0].dtype, inputs[2].dtype)
    # `size` is the sum of what is added up, without signs: a matrix product in acc is off by a rounding of each term and of each
    # partial sum, of which a few hundred terms leave less than 8 at the size of the whole. A missing term would be far more.
    bound = 8 * torch.finfo(acc).eps * size.reshape(want.shape)
    if operands in HALVES and what in ("gradient of h", "gradient of weight"):
        # The residual is rounded to the dtype of the product once, by eps / 2; the interpreter cuts bfloat16 off, by eps.
        bound = bound + torch.finfo(operands).eps * size.reshape(want.shape)
    if dtype != acc:
        # The result is rounded, by at most eps where it is cut off, or by half a subnormal of float16.
        bound = bound + 1.01 * roundings * torch.finfo(dtype).eps * want.abs() + 2.0**-25
    error = (got.detach().cpu().double() - want).abs()
    assert bool((error <= bound).all()), f"{what}: error {error.max():.3g}, {(error / bound).max():.3g} times what is allowed"


def check(inputs: list[Any], keep: int, *, full: bool = True, scale: Any = 0.7, precision: str | None = None) -> None:
    device = inputs[1].device
    count, acc = len(inputs[0]), dtype_of(inputs)
    needs = tuple(isinstance(t, Tensor) for t in inputs)
    before = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
    grad = torch.randn(count if keep else (), dtype=acc).to(device)
    factor = float(scale)
    want, grads, sizes = oracle(inputs, full, keep, factor, grad)
    nll, ready = forward(inputs, full, keep, scale, precision, needs)
    assert_right(nll, want, sizes[0], "nll", inputs, acc)
    early = keep == 0 and torch.float16 not in [t.dtype for t in inputs if isinstance(t, Tensor)]
    assert (ready is not None) == early
    got = backward(inputs, keep, scale, grad, precision, needs)
    # Gradients that are ready are rounded before and after they are scaled.
    rows = [(got, grads, sizes[1:], 1 if ready is None else 2)]
    if ready is not None:
        ones = torch.ones((), dtype=acc, device=device)
        _, unit, unit_sizes = oracle(inputs, full, keep, factor, ones)
        rows.append((ready, unit, unit_sizes[1:], 1))
        again = backward(inputs, keep, scale, ones, precision, needs)
        for a, b in zip(ready, again, strict=True):
            assert a is b is None or torch.equal(a, b)
    for found, wanted, size, roundings in rows:
        for name, t, g, w, s in zip(NAMES, inputs, found, wanted, size, strict=True):
            if w is None:
                assert g is None
            else:
                assert_right(g, w, s, f"gradient of {name}", inputs, t.dtype, roundings)
    assert all(torch.equal(t, b) if isinstance(t, Tensor) else t is b or t == b for t, b in zip(inputs, before, strict=True))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written reads as NaN."""
    empty = torch.empty

    def nan(*args: Any, **options: Any) -> Tensor:
        out = empty(*args, **options)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(host.torch, "empty", nan)


SIZES = [(1, 1, 1), (2, 3, 16), (65, 63, 5), (17, 333, 33), (129, 70, 101), (300, 33, 64), (3, 700, 20)]


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_sizes(size: tuple[int, int, int], keep: int, device: torch.device) -> None:
    check(draw(device, *size), keep)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("var", ["float", "0d", "one", "columns"])
def test_variances(var: str, keep: int, device: torch.device) -> None:
    check(draw(device, 21, 150, 20, var=var), keep, full=False)
    check(draw(device, 21, 150, 20, var=var, bias=False), keep)


DTYPES = [
    (torch.bfloat16,),
    (torch.float16,),
    (torch.float64,),
    (torch.bfloat16, F32, torch.bfloat16, F32, torch.float16),
    (F32, torch.bfloat16, torch.float16),
    (torch.bfloat16, F32, torch.float16),
    (torch.float16, F32, torch.float16, F32, torch.float64),
]


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda ds: "-".join(str(d).removeprefix("torch.") for d in ds))
def test_dtypes(dtypes: Sequence[torch.dtype], keep: int, device: torch.device) -> None:
    check(draw(device, 40, 100, 20, dtypes=dtypes), keep)
    check(draw(device, 20, 70, 20, samples=3, var="0d", dtypes=dtypes), keep)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("size", [(1, 40, 7), (33, 70, 20), (150, 65, 16)], ids=lambda s: "x".join(map(str, s)))
def test_samples(size: tuple[int, int, int], samples: int, keep: int, device: torch.device) -> None:
    check(draw(device, *size, samples=samples), keep)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("samples", [1, 3])
def test_wide_h_and_several_blocks(samples: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for keep in (0, 1):
        check(draw(device, 19, 83, 261, samples=samples, dtypes=(dtype,)), keep)
    monkeypatch.setattr(torch_tiles, "TILE", 2000)
    monkeypatch.setattr(torch_tiles, "TILE_ROWS", 50)
    monkeypatch.setattr(torch_tiles, "DEVICE_TILE", 2000)
    for keep, var in itertools.product((0, 1), ("float", "columns")):
        check(draw(device, 90, 83, 261, samples=samples, var=var, dtypes=(dtype,)), keep, precision="tf32x3")


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtypes", [d for d in DTYPES if torch.float64 not in d], ids=str)
def test_wide_h_in_half_precision(
    dtypes: Sequence[torch.dtype], samples: int, keep: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU torch multiplies halves as they are. Elsewhere a product stands in that has the same inputs and the same sums."""

    def product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
        assert a.dtype == b.dtype
        total.copy_(a.float() @ b.float() + beta * total)

    if device.type == "cpu":
        monkeypatch.setattr(torch_tiles, "_multiplies_halves", lambda x, acc: acc == F32)
        monkeypatch.setattr(torch_tiles, "on_host", lambda t: False)
        monkeypatch.setattr(torch_tiles, "_product", product)
    monkeypatch.setattr(torch_tiles, "DEVICE_TILE", 2000)
    monkeypatch.setattr(torch_tiles, "TILE_ROWS", 50)
    for var in ("float", "0d", "columns"):
        check(draw(device, 90, 83, 261, samples=samples, var=var, dtypes=dtypes), keep, scale=0.05)


def test_half_precision_does_not_overflow_over_a_small_variance(device: torch.device) -> None:
    """Where the residual over the variance leaves float16's range, and the gradients, which average over it, do not."""
    for width in (20, 261):
        inputs = draw(device, 64, 80, width, dtypes=(torch.float16,))
        inputs[4] = torch.full((80,), -11.5, dtype=torch.float16, device=device)
        check(inputs, 0, scale=1e-4)


@pytest.mark.parametrize("width", [20, 130])
def test_every_subset_of_gradients(width: int, device: torch.device) -> None:
    """Those asked for, no others, and the same numbers as together (x's decides which rows a walk takes, so not bit for bit)."""
    inputs = draw(device, 30, 90, width, samples=2)
    for keep in (0, 1):
        grad = torch.randn(60 if keep else (), device=device)
        together = backward(inputs, keep, 0.7, grad, None, ALL)
        for needs in itertools.product((False, True), repeat=5):
            grads = backward(inputs, keep, 0.7, grad, None, needs)
            assert [g is not None for g in grads] == list(needs)
            for g, w in zip(grads, together, strict=True):
                if g is not None:
                    torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5 * float(w.abs().max()))
    nll, ready = forward(inputs, True, 0, 0.7, None, (False,) * 5)
    assert ready is None
    assert not nll.isnan()


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("width", [20, 130])
def test_strides(width: int, keep: int, device: torch.device) -> None:
    """Rows with gaps, columns with gaps, transposed, and all rows the same."""

    def gaps(t: Tensor) -> Tensor:
        return torch.cat([t, torch.full_like(t, math.nan)], 1)[:, : t.shape[1]]

    h, x, weight, bias, var = draw(device, 24, 77, width, samples=2)
    check([gaps(h), gaps(x), gaps(weight), bias, var], keep)
    check([h.repeat_interleave(2, 1)[:, ::2], x.T.contiguous().T, weight.T.contiguous().T, bias, var], keep)
    check([h, x[:1].expand(24, 77), weight, bias[:1].expand(77), var.repeat_interleave(3)[::3]], keep)


def test_scale_and_upstream_gradients_on_the_device(device: torch.device) -> None:
    """A scale that is a tensor, an upstream gradient with gaps, and one that is a single number for all rows."""
    for keep in (0, 1):
        check(draw(device, 20, 60, 20), keep, scale=torch.tensor(-0.3, device=device))
    inputs = draw(device, 20, 60, 20)
    for grad in (torch.randn(40, device=device)[::2], torch.tensor(1.5, device=device).expand(20)):
        got = backward(inputs, 1, 0.7, grad, None, ALL)
        want = backward(inputs, 1, 0.7, grad.contiguous(), None, ALL)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_split_walks_are_exact_and_repeatable(device: torch.device) -> None:
    """Few rows and many columns split the columns, many rows and few columns the rows; each adds up in one order."""
    for size, samples in (((5, 600, 8), 1), ((600, 20, 8), 1), ((300, 20, 8), 2)):
        inputs = draw(device, *size, samples=samples)
        check(inputs, 0)
        check(draw(device, *size, samples=samples, dtypes=(torch.bfloat16,)), 1)
        first, second = (forward(inputs, True, 0, 0.7, None, ALL) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_an_infinite_inverse_variance_stays_in_its_column(device: torch.device) -> None:
    inputs = draw(device, 7, 65, 5)
    inputs[4][3] = -200.0
    nll, grads = forward(inputs, True, 0, 1.0, None, ALL)
    assert nll == math.inf
    others = torch.arange(65, device=device) != 3
    assert not grads[2][3].isfinite().any()
    assert not grads[3][3].isfinite()
    assert grads[4][3] == -math.inf
    assert all(bool(g[others].isfinite().all()) for g in grads[2:])
    assert not grads[0].isfinite().any()
    _, grads = forward([*inputs[:4], -200.0], True, 0, 1.0, None, (True,) * 4 + (False,))
    # Residuals beyond the last column are 0, and would be NaN times infinity.
    assert bool(grads[1].isinf().all())


def test_precision_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, name in (("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert tiles.products_of(F32, None, "cuda") == name
        assert tiles.products_of(F32, "ieee", "cuda") == "ieee"
        assert tiles.products_of(F32, None, "hip") == "ieee"
        assert tiles.products_of(torch.bfloat16, None, "cuda") == "bf16"
        assert tiles.products_of(torch.float16, None, "cuda") == "fp16"


def test_a_tile_is_on_the_table_for_every_width() -> None:
    for name, kinds in (("cuda", ("bf16", "fp16", "tf32", "tf32x3", "ieee")), ("hip", ("bf16", "fp16", "ieee"))):
        for kind in kinds:
            assert set(tiles.TILES[name][kind]) == {2**k for k in range(4, 1 + linear_limits.hidden.bit_length() - 1)}


def test_scaling_ready_gradients(device: torch.device) -> None:
    """A first backward multiplies what the forward pass kept by the upstream gradient."""
    inputs = draw(device, 5, 40, 6)
    _, ready = forward(inputs, True, 0, 1.0, None, ALL)
    want = [2 * g for g in ready]
    got = backward(inputs, 0, 1.0, torch.tensor(2.0, device=device), None, ALL, ready)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_past_2_to_the_31(device: torch.device) -> None:
    """Rows so far apart that only 64 bits count the elements between them; only the pages touched ever exist."""
    if not kernels.INTERPRETED:
        pytest.skip("on a GPU all of the pages would exist")
    inputs = draw(device, 2, 5, 3, dtypes=(torch.float16,))
    for i in range(3):
        far = torch.empty_strided(inputs[i].shape, (2**31 // (len(inputs[i]) - 1) + 50, 1), dtype=torch.float16)
        check([*inputs[:i], far.copy_(inputs[i]), *inputs[i + 1 :]], 1)
