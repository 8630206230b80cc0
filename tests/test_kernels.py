"""What the Triton backend does beyond its numbers: launches, addresses, what its source must not contain."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastelbo

pytest.importorskip("triton")
pytestmark = pytest.mark.triton

import fastelbo.kernels.launch as launch  # noqa: E402
from fastelbo import kernels  # noqa: E402
from fastelbo.kernels.latent import LatentArgs, LatentWanted, plan_latent  # noqa: E402
from fastelbo.kernels.likelihood import NLLArgs, nll_kernel  # noqa: E402
from fastelbo.kernels.tile import Block, row_offset  # noqa: E402
from fastelbo.specs import KL, Latent, LatentInputs  # noqa: E402

KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched, in order."""
    names: list[str] = []
    start = launch.start

    def counted(kernel, programs, args, *tuned):
        names.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
        start(kernel, programs, args, *tuned)

    monkeypatch.setattr(launch, "start", counted)
    return names


def _inputs(device: torch.device, batch: int = 4, d: int = 30, j: int = 6) -> list[torch.Tensor]:
    tensors = [torch.randn(batch, d), torch.randn(batch, d), torch.randn(batch, j), torch.randn(batch, j)]
    tensors = [t.to(device) for t in tensors]
    return [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]


Op = Callable[[torch.device], "torch.Tensor | tuple[torch.Tensor, ...]"]
OPS: dict[str, tuple[Op, list[str], list[str]]] = {
    "elbo_loss": (
        lambda dev: fastelbo.elbo_loss(*_inputs(dev), impl="triton"),
        ["elbo_kernel", "finish_kernel"],
        ["scale_kernel"],
    ),
    "elbo_loss, learned scalar variance": (
        lambda dev: fastelbo.elbo_loss(*_inputs(dev), recon_logvar=torch.zeros((), device=dev, requires_grad=True), impl="triton"),
        ["elbo_kernel", "finish_kernel"],
        ["scale_kernel"],
    ),
    "elbo_loss, per-dimension variance": (
        lambda dev: fastelbo.elbo_loss(*_inputs(dev), recon_logvar=torch.zeros(30, device=dev, requires_grad=True), impl="triton"),
        ["elbo_kernel", "finish_kernel"],
        ["scale_kernel"],
    ),
    "elbo_terms": (
        lambda dev: fastelbo.elbo_terms(*_inputs(dev), impl="triton"),
        ["elbo_kernel"],
        ["elbo_kernel"],
    ),
    "elbo_terms, several programs": (
        lambda dev: fastelbo.elbo_terms(*_inputs(dev, d=5000), impl="triton"),
        ["elbo_kernel", "finish_kernel"],
        ["elbo_kernel"],
    ),
    "elbo_terms, per sample": (
        lambda dev: fastelbo.elbo_terms(*_inputs(dev), reduction="none", impl="triton"),
        ["elbo_kernel"],
        ["elbo_kernel"],
    ),
    "elbo_terms, per sample, rows over several programs": (
        lambda dev: fastelbo.elbo_terms(*_inputs(dev, d=5000), reduction="none", impl="triton"),
        ["elbo_kernel", "finish_kernel"],
        ["elbo_kernel"],
    ),
    "gaussian_nll": (
        lambda dev: fastelbo.gaussian_nll(*_inputs(dev)[:2], reduction="mean", impl="triton"),
        ["nll_kernel"],
        ["nll_kernel"],
    ),
    "gaussian_nll, learned scalar std": (
        lambda dev: fastelbo.gaussian_nll(
            *_inputs(dev)[:2], std=torch.ones((), device=dev, requires_grad=True), reduction="mean", impl="triton"
        ),
        ["nll_kernel"],
        ["nll_kernel"],
    ),
    "gaussian_nll, learned scalar std, several programs": (
        lambda dev: fastelbo.gaussian_nll(
            *_inputs(dev, d=5000)[:2], std=torch.ones((), device=dev, requires_grad=True), reduction="mean", impl="triton"
        ),
        ["nll_kernel", "finish_kernel"],
        ["nll_kernel", "finish_kernel"],
    ),
    "gaussian_kl": (
        lambda dev: fastelbo.gaussian_kl(*_inputs(dev)[2:], impl="triton"),
        ["latent_kernel"],
        ["latent_kernel"],
    ),
    "reparameterize": (
        lambda dev: fastelbo.reparameterize(*_inputs(dev)[2:], seed=1, impl="triton"),
        ["latent_kernel"],
        ["latent_kernel"],
    ),
    "reparameterize_kl": (
        lambda dev: fastelbo.reparameterize_kl(*_inputs(dev)[2:], seed=1, num_samples=3, impl="triton"),
        ["latent_kernel"],
        ["latent_kernel"],
    ),
    "reparameterize_kl, mean": (
        lambda dev: fastelbo.reparameterize_kl(*_inputs(dev)[2:], seed=1, reduction="mean", impl="triton"),
        ["latent_kernel"],
        ["latent_kernel"],
    ),
    "reparameterize_kl, mean, several programs": (
        lambda dev: fastelbo.reparameterize_kl(*_inputs(dev, j=5000)[2:], seed=1, reduction="mean", impl="triton"),
        ["latent_kernel", "finish_kernel"],
        ["latent_kernel"],
    ),
}


def _linear(device: torch.device, batch: int = 4, d: int = 30, j: int = 8, **options: Any) -> torch.Tensor:
    _, x, mu, logvar = _inputs(device, batch, d, j)
    weight, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in ((d, j), (d,)))
    return fastelbo.linear_elbo_loss(x, mu, logvar, weight, bias, seed=1, impl="triton", **options)


def _layer(device: torch.device, reduction: str) -> torch.Tensor:
    _, x, h, _ = _inputs(device, j=8)
    weight = torch.randn(30, 8, device=device, requires_grad=True)
    return fastelbo.linear_gaussian_nll(h, weight, x, reduction=reduction, impl="triton")


OPS |= {
    "linear_elbo_loss": (_linear, ["rows_kernel", "columns_kernel", "finish_kernel"], ["scale_kernel"]),
    "linear_elbo_loss, learned scalar variance": (
        lambda dev: _linear(dev, recon_logvar=torch.zeros((), device=dev, requires_grad=True)),
        ["rows_kernel", "columns_kernel", "finish_kernel"],
        ["scale_kernel"],
    ),
    "linear_elbo_loss, many rows": (
        lambda dev: _linear(dev, batch=300),
        ["rows_kernel", "columns_kernel", "finish_kernel"],
        ["scale_kernel"],
    ),
    "linear_elbo_loss, many rows, per-dimension variance": (
        lambda dev: _linear(dev, batch=300, recon_logvar=torch.zeros(30, device=dev, requires_grad=True)),
        ["rows_kernel", "columns_kernel", "finish_kernel", "finish_kernel"],
        ["scale_kernel"],
    ),
    "linear_elbo_loss, per sample": (
        lambda dev: _linear(dev, reduction="none"),
        ["rows_kernel"],
        ["rows_kernel", "columns_kernel"],
    ),
    "linear_elbo_loss, per sample, rows over several programs": (
        lambda dev: _linear(dev, d=5000, reduction="none"),
        ["rows_kernel", "finish_kernel"],
        ["rows_kernel", "columns_kernel"],
    ),
    "linear_elbo_loss, rows that start anywhere": (
        lambda dev: _linear(dev, j=21),
        ["latent_kernel", "rows_kernel", "columns_kernel", "finish_kernel"],
        ["scale_kernel", "latent_kernel"],
    ),
    "linear_gaussian_nll": (lambda dev: _layer(dev, "sum"), ["rows_kernel", "columns_kernel", "finish_kernel"], ["scale_kernel"]),
    "linear_gaussian_nll, per sample": (lambda dev: _layer(dev, "none"), ["rows_kernel"], ["rows_kernel", "columns_kernel"]),
}


@pytest.mark.parametrize("name", OPS)
def test_numbers_of_launches(name: str, launches: list[str], device: torch.device) -> None:
    call, forward, backward = OPS[name]
    out = call(device)
    assert launches == forward
    launches.clear()
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    assert launches == backward
    assert max(len(forward), len(backward)) <= (6 if "anywhere" in name else 4 if name.startswith("linear") else 2)


def test_no_gradients_are_written_without_grad_mode(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    seen = []
    start = launch.start
    monkeypatch.setattr(launch, "start", lambda k, p, args: (seen.append(args), start(k, p, args)))
    with torch.no_grad():
        fastelbo.elbo_loss(*_inputs(device), impl="triton")
    nll, latent = (arg for arg in seen[0] if isinstance(arg, (NLLArgs, LatentArgs)))
    tensors = {**nll.tensors._asdict(), **latent.tensors._asdict()}
    given = {name for name, operand in tensors.items() if operand is not None}
    assert given == {"recon", "x", "mu", "spread"}
    assert nll.variance_parts is None


def test_offsets_past_2_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tile of a tensor of more than 2**31 elements, of which only the touched pages ever exist."""
    if not kernels.INTERPRETED:
        pytest.skip("on a GPU, test_gpu.py runs the whole tensor")
    n = 2**31 + 5000
    recon, x = torch.empty(1, n, dtype=torch.float16), torch.empty(1, n, dtype=torch.float16)
    for t in (recon, x):
        t[0, :4096] = 0
        t[0, -8192:] = 0
    recon[0, -1] = 3.0
    recon[0, -4000] = 1.0
    sums: list[float] = []

    def ends_only(kernel, programs, args):
        if kernel is nll_kernel:
            # A program that strides from the first tile to one of the last, which holds elements past 2**31.
            tiles = math.ceil(n / launch.TILE)
            for step in (tiles - 3, tiles - 1):
                _programs, *others = args
                kernel[(1,)](step, *others)
                (nll,) = (arg for arg in args if isinstance(arg, NLLArgs))
                sums.append(float(nll.parts[0]))

    monkeypatch.setattr(launch, "start", ends_only)
    fastelbo.gaussian_nll(recon, x, full=False, reduction="sum", impl="triton")
    assert sums == [pytest.approx(0.5), pytest.approx(4.5)]


def test_row_offsets_are_64_bit_where_they_must_be() -> None:
    """Rows of two dimensions whose offset, but no factor of it, exceeds 2**31."""
    import triton
    import triton.language as tl

    @triton.jit
    def probe(out, r1, r2, strides, B: tl.constexpr):
        rows = tl.arange(0, 4) + 70_000
        tl.store(out + tl.arange(0, 4), row_offset(rows, r1, r2, strides, B))

    if not kernels.INTERPRETED:
        pytest.skip("the GPU tests address real tensors of that size")
    out = torch.empty(4, dtype=torch.int64)
    probe[(1,)](out, 1, 10, (400_000, 7), B=Block(2, 4, 1, 0, tl.float32, tl.int64))
    rows = torch.arange(70_000, 70_004)
    assert torch.equal(out, rows // 10 * 400_000 + rows % 10 * 7)
    assert int(out.max()) > 2**31


def test_offsets_are_as_wide_as_the_farthest_element() -> None:
    import triton.language as tl

    def of_rows(step: int) -> Any:
        slices = [torch.empty_strided((2, 100), (stride, 1), device="meta") for stride in (100, step)]
        view = launch.fold(torch.Size((2, 100)), 1, slices, torch.float32)
        assert view is not None
        return view.block.INDEX

    assert of_rows(2**31 - 100) == tl.int32  # the last element lies at 2**31 - 1
    assert of_rows(2**31 - 99) == tl.int64

    def of_noise(samples: int | None, *shape: int) -> Any:
        mu = torch.empty(shape, device="meta")
        inputs = LatentInputs(mu, mu, seed=torch.empty((), dtype=torch.int64, device="meta"))
        spec = Latent(KL(), want_kl=False, num_samples=samples)
        return plan_latent(inputs, spec, LatentWanted((False,) * 4), torch.float32).flags.BLOCK.INDEX

    assert of_noise(None, 2**16, 2**15 - 4) == tl.int32
    assert of_noise(None, 2**16, 2**15) == tl.int64
    assert of_noise(3, 2**16, 2**13) == tl.int32
    assert of_noise(4, 2**16, 2**13) == tl.int64


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: str(p.relative_to(KERNELS)))
def test_every_masked_load_states_what_it_reads_elsewhere(path: Path) -> None:
    """The interpreter reads zeros under a mask where a GPU reads anything at all."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            names = {k.arg for k in node.keywords}
            masked = len(node.args) > 1 or "mask" in names
            assert not masked or "other" in names or len(node.args) > 2, f"{path.name}:{node.lineno}"


def test_scale_of_one_element(device: torch.device) -> None:
    """Nothing is summed and nothing kept: the reduction's factor must not get lost between the two."""
    recon, x, weight = (torch.tensor(v, device=device) for v in (2.0, 0.0, 3.0))
    nll = fastelbo.gaussian_nll(recon, x, weight=weight, reduction="mean", batch_dims=0, full=False, impl="triton")
    assert float(nll) == 2.0
    kl = fastelbo.gaussian_kl(recon, x, weight=weight, reduction="mean", batch_dims=0, impl="triton")
    assert float(kl) == 2.0


def test_scaled_gradients_reach_every_element(device: torch.device) -> None:
    """Whole blocks and a rest, several programs, and an upstream gradient that is not 1."""
    inputs = _inputs(device, batch=3, d=2 * launch.TILE + 5, j=2)
    plain = torch.autograd.grad(fastelbo.elbo_loss(*inputs, impl="triton"), [inputs[0], *inputs[2:]])
    scaled = torch.autograd.grad(2.0 * fastelbo.elbo_loss(*inputs, impl="triton"), [inputs[0], *inputs[2:]])
    assert all(torch.equal(2 * a, b) for a, b in zip(plain, scaled, strict=True))


def test_many_rows_of_a_shared_variance(device: torch.device) -> None:
    """More groups of rows than one, for the gradient of a per-dimension variance, and long segments for a per-channel one."""
    recon, x = torch.randn(300, 130, device=device), torch.randn(300, 130, device=device)
    for shape in ((130,), (300, 1)):
        logvar = torch.zeros(shape, device=device, requires_grad=True)
        nll = fastelbo.gaussian_nll(recon, x, logvar=logvar, reduction="sum", impl="triton")
        (grad,) = torch.autograd.grad(nll, logvar)
        square = (recon.double() - x.double()) ** 2
        want = (0.5 * (1 - square)).sum_to_size(shape if len(shape) == 2 else (1, *shape)).view(shape)
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-4)
