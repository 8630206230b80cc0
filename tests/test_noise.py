"""Philox and Box-Muller: published answers, both implementations against each other, and the statistics of what they draw."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from fastelbo import noise

try:
    import triton
    import triton.language as tl

    from fastelbo.kernels import philox
except ImportError:
    triton = None
else:

    @triton.jit
    def _philox_kernel(seed_ptr, c_ptr, x_ptr, n, BLOCK: tl.constexpr):
        """Any four-word counter, with philox_bits4's own key."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = i < n
        c0 = tl.load(c_ptr + i, live, other=0).to(tl.uint32)
        c1 = tl.load(c_ptr + n + i, live, other=0).to(tl.uint32)
        c2 = tl.load(c_ptr + 2 * n + i, live, other=0).to(tl.uint32)
        c3 = tl.load(c_ptr + 3 * n + i, live, other=0).to(tl.uint32)
        x0, x1, x2, x3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3, 10)
        tl.store(x_ptr + i, x0.to(tl.int64), live)
        tl.store(x_ptr + n + i, x1.to(tl.int64), live)
        tl.store(x_ptr + 2 * n + i, x2.to(tl.int64), live)
        tl.store(x_ptr + 3 * n + i, x3.to(tl.int64), live)

    @triton.jit
    def _bits_kernel(seed_ptr, counter_ptr, x_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = i < n
        x0, x1, x2, x3 = philox.philox_bits4(tl.load(seed_ptr), tl.load(counter_ptr + i, live, other=0))
        tl.store(x_ptr + i, x0.to(tl.int64), live)
        tl.store(x_ptr + n + i, x1.to(tl.int64), live)
        tl.store(x_ptr + 2 * n + i, x2.to(tl.int64), live)
        tl.store(x_ptr + 3 * n + i, x3.to(tl.int64), live)

    @triton.jit
    def _lanes_kernel(seed_ptr, y_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        n0, n1, n2, n3 = philox.philox_normal4(tl.load(seed_ptr), i)
        tl.store(y_ptr + 4 * i, n0, 4 * i < n)
        tl.store(y_ptr + 4 * i + 1, n1, 4 * i + 1 < n)
        tl.store(y_ptr + 4 * i + 2, n2, 4 * i + 2 < n)
        tl.store(y_ptr + 4 * i + 3, n3, 4 * i + 3 < n)

    @triton.jit
    def _tile_kernel(seed_ptr, y_ptr, rows, cols, BM: tl.constexpr, BN: tl.constexpr):
        """A (rows, cols) matrix of noise, cols a multiple of four."""
        row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
        quad = (tl.program_id(1) * (BN // 4) + tl.arange(0, BN // 4))[None, :]
        tile = philox.normal_tile_aligned(tl.load(seed_ptr), row * (cols // 4) + quad)
        col = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
        tl.store(y_ptr + row * cols + col, tile, (row < rows) & (col < cols))

    @triton.jit
    def _at_kernel(seed_ptr, index_ptr, y_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        index = tl.load(index_ptr + i, i < n, other=0)
        tl.store(y_ptr + i, philox.normal_at(tl.load(seed_ptr), index), i < n)


needs_triton = [pytest.mark.triton, pytest.mark.skipif(triton is None, reason="no triton")]
BLOCK = 1 << 12 if os.environ.get("TRITON_INTERPRET") == "1" else 256
SEEDS = [0, 1, -1, 1234567890123, 0xDEADBEEF << 32, -(2**63), 2**63 - 1]


def triton_philox(seed: int, counters: Tensor, device: torch.device) -> Tensor:
    n = counters.shape[1]
    x = torch.full((4, n), -1, dtype=torch.int64, device=device)
    key = noise.check_seed(seed, device)
    _philox_kernel[(triton.cdiv(n, BLOCK),)](key, counters.to(device), x, n, BLOCK=BLOCK)
    return x.cpu()


def torch_philox(seed: int, counters: Tensor, device: torch.device) -> Tensor:
    keys = noise._round_keys(noise.check_seed(seed, device))
    return torch.stack(noise._philox(*counters.to(device), keys)).cpu()


def host_philox(seed: int, counters: Tensor, device: torch.device) -> Tensor:
    c0, c1, c2, c3 = counters.numpy().astype(np.uint64)
    even, odd = noise._host_philox(np.stack((c0, c2)), np.stack((c1, c3)), seed)
    assert even.dtype == odd.dtype == np.uint32
    return torch.from_numpy(np.stack((even[0], odd[0], even[1], odd[1])).astype(np.int64))


def triton_normal_at(seed: int | Tensor, index: Tensor, device: torch.device) -> Tensor:
    y = torch.full(index.shape, math.nan, device=device)
    key = noise.check_seed(seed, device)
    _at_kernel[(triton.cdiv(index.numel(), BLOCK),)](key, index.to(device), y, index.numel(), BLOCK=BLOCK)
    return y.cpu()


def box_muller(seed: int, counters: Tensor) -> np.ndarray:
    """The normals of these counters in float64, in order, from the same bits and the same rounded uniforms."""
    zero = torch.zeros_like(counters)
    x = torch_philox(seed, torch.stack((counters & 0xFFFFFFFF, counters >> 32, zero, zero)), torch.device("cpu")).numpy()
    out = np.empty((counters.numel(), 4))
    for i in (0, 2):
        u = x[i].astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
        radius = np.sqrt(-2 * np.log(u.astype(np.float64)))
        quadrant = (x[i + 1] + (1 << 29)) >> 30
        angle = (x[i + 1] - (quadrant << 30) + 0.5) * (2 * np.pi * 2.0**-32)
        s, c = np.sin(angle), np.cos(angle)
        out[:, i] = radius * np.choose(quadrant & 3, [s, c, -s, -c])
        out[:, i + 1] = radius * np.choose(quadrant & 3, [c, -s, -c, s])
    return out.ravel()


def plain_normals(n: int, seed: int) -> Tensor:
    """The plain expressions, which serve a GPU and every trace, on the CPU."""
    counters = torch.arange((n + 3) // 4, dtype=torch.int64, device="cpu")
    return noise._normals(counters, noise._round_keys(noise.check_seed(seed, "cpu")))[:n]


def ulps(got: Tensor, true: np.ndarray) -> float:
    return float((np.abs(got.numpy().astype(np.float64) - true) / np.spacing(np.abs(true).astype(np.float32))).max())


implementations = pytest.mark.parametrize(
    "implementation", [pytest.param(triton_philox, marks=needs_triton), torch_philox, host_philox]
)


@implementations
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    # Random123's kat_vectors, philox4x32 10.
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(implementation, counter, key, answer, device: torch.device) -> None:
    x = implementation(key[0] | key[1] << 32, torch.tensor(counter)[:, None], device)
    assert x[:, 0].tolist() == answer


@implementations
def test_bits_agree(implementation, device: torch.device) -> None:
    counters = torch.randint(0, 1 << 32, (4, 10_001))
    for seed in SEEDS:
        assert torch.equal(implementation(seed, counters, device), torch_philox(seed, counters, torch.device("cpu")))


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no triton")
def test_the_counter_is_64_bits_in_the_two_low_words(device: torch.device) -> None:
    counters = torch.cat([torch.randint(0, 2**62, (500,)), torch.tensor([0, 1, 2**32 - 1, 2**32, 2**32 + 1])])
    zero = torch.zeros_like(counters)
    for seed in SEEDS:
        x = torch.full((4, counters.numel()), -1, dtype=torch.int64, device=device)
        _bits_kernel[(1,)](noise.check_seed(seed, device), counters.to(device), x, counters.numel(), BLOCK=512)
        words = torch.stack((counters & 0xFFFFFFFF, counters >> 32, zero, zero))
        assert torch.equal(x.cpu(), torch_philox(seed, words, device))


def test_normals_are_accurate(device: torch.device) -> None:
    n = 1 << 18
    for seed in SEEDS:
        true = box_muller(seed, torch.arange(n // 4))
        for got in (noise.philox_normal(n, seed, device=device).cpu(), plain_normals(n, seed)):
            assert np.abs(got.numpy() - true).max() < 8e-7
            assert ulps(got, true) < 5


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no triton")
def test_triton_normals_are_accurate_and_agree_with_torch(device: torch.device) -> None:
    n = 1 << 18
    for seed in SEEDS:
        got = triton_normal_at(seed, torch.arange(n), device)
        true = box_muller(seed, torch.arange(n // 4))
        assert np.abs(got.numpy() - true).max() < 8e-7
        assert ulps(got, true) < 5
        twin = noise.philox_normal(n, seed)
        torch.testing.assert_close(got, twin, rtol=1e-6, atol=0)


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no triton")
def test_noise_does_not_depend_on_the_block(device: torch.device) -> None:
    rows, cols = 37, 252
    key = noise.check_seed(-5, device)
    one_by_one = triton_normal_at(key, torch.arange(rows * cols), device)
    lanes = torch.full((rows * cols,), math.nan, device=device)
    _lanes_kernel[(triton.cdiv(rows * cols, 4 * 128),)](key, lanes, rows * cols, BLOCK=128)
    assert torch.equal(lanes.cpu(), one_by_one)
    for bm, bn in [(1, 1024), (16, 64), (64, 16), (8, 4), (2, 256)]:
        tile = torch.full((rows, cols), math.nan, device=device)
        _tile_kernel[(triton.cdiv(rows, bm), triton.cdiv(cols, bn))](key, tile, rows, cols, BM=bm, BN=bn)
        assert torch.equal(tile.cpu().view(-1), one_by_one)
    shuffled = torch.randperm(rows * cols)
    assert torch.equal(triton_normal_at(key, shuffled, device), one_by_one[shuffled])


def test_noise_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise.philox_normal(1003, 7)
    torch.testing.assert_close(plain_normals(1003, 7), whole, rtol=1e-6, atol=0)
    for chunk in (1, 7, 64, 250, 251):
        monkeypatch.setattr(noise, "_CHUNK", chunk)
        torch.testing.assert_close(noise.philox_normal(1003, 7), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 1001])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 64])
def test_offset_is_an_element_index(offset: int, n: int) -> None:
    whole = noise.philox_normal(2000, 11)
    got = noise.philox_normal(n, 11, offset=offset)
    assert got.shape == (n,)
    torch.testing.assert_close(got, whole[offset : offset + n], rtol=1e-6, atol=0)


@pytest.mark.triton
@pytest.mark.skipif(triton is None, reason="no triton")
def test_counters_past_32_bits(device: torch.device) -> None:
    start = 2**34 - 100  # element 2**34 is the first of counter 2**32
    got = noise.philox_normal(200, 3, offset=start)
    true = box_muller(3, torch.arange(start // 4, start // 4 + 50))
    assert ulps(got, true) < 5
    torch.testing.assert_close(triton_normal_at(3, start + torch.arange(200), device), got, rtol=1e-6, atol=0)
    assert not torch.isclose(got[100:], noise.philox_normal(100, 3)).any()


def test_shapes_and_dtypes(device: torch.device) -> None:
    flat = noise.philox_normal(30, 2, device=device)
    assert flat.dtype == torch.float32
    assert flat.device.type == device.type
    assert torch.equal(noise.philox_normal((2, 3, 5), 2, device=device), flat.view(2, 3, 5))
    assert torch.equal(noise.philox_normal(torch.Size([30]), 2, device=device), flat)
    assert torch.equal(noise.philox_normal((), 2, device=device), flat[0])
    assert noise.philox_normal((3, 0), 2, device=device).shape == (3, 0)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(noise.philox_normal(30, 2, device=device, dtype=dtype), flat.to(dtype))
    with pytest.raises(ValueError, match="offset must not be negative, got -1"):
        noise.philox_normal(3, 2, offset=-1)


def test_chunks_join_without_a_seam() -> None:
    n = 4 * (2 * noise._CHUNK + 7)
    whole = noise.philox_normal(n, 13)
    assert torch.equal(noise.philox_normal(n, 13), whole)
    torch.testing.assert_close(whole, plain_normals(n, 13), rtol=1e-6, atol=0)
    seam = 4 * noise._CHUNK
    torch.testing.assert_close(noise.philox_normal(10, 13, offset=seam - 5), whole[seam - 5 : seam + 5], rtol=1e-6, atol=0)


def test_the_result_is_a_tensor_like_any_other() -> None:
    z = noise.philox_normal((2, 3), 5)
    assert (z.is_contiguous(), z.requires_grad, z.is_leaf) == (True, False, True)
    kept = z.clone()
    z.mul_(2).add_(1)  # its memory is its own
    assert torch.equal(noise.philox_normal((2, 3), 5), kept)
    with np.errstate(all="raise"):
        assert torch.equal(noise.philox_normal((2, 3), 5), kept)


@pytest.mark.parametrize("how", ["within", "set"])
def test_a_default_device_or_dtype_changes_nothing(how: str) -> None:
    want = noise.philox_normal((4, 5), 3, device="cpu")
    seed = torch.tensor(3)
    mu = torch.zeros(2, 5)

    def results() -> list[Tensor]:
        # Given nothing but a number, noise is the default device's.
        assert noise.philox_normal(3, 3).device.type == "meta"
        return [
            noise.philox_normal((4, 5), seed),
            noise.philox_normal((4, 5), 3, device="cpu"),
            noise.sample_noise(mu, seed, 2).view(4, 5),
            plain_normals(20, 3).view(4, 5),
            noise.check_seed(3, "cpu"),
            noise.draw_seed("cpu"),
        ]

    try:
        if how == "set":
            torch.set_default_device("meta")
            torch.set_default_dtype(torch.float64)
            got = results()
        else:
            with torch.device("meta"):
                got = results()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    *normals, checked, drawn = got
    for z in normals:
        assert (z.device.type, z.dtype) == ("cpu", torch.float32)
        torch.testing.assert_close(z, want, rtol=1e-6, atol=0)
    assert (checked.device.type, checked.dtype, checked.item()) == ("cpu", torch.int64, 3)
    assert (drawn.device.type, drawn.dtype) == ("cpu", torch.int64)
    assert torch.equal(noise.philox_normal((4, 5), seed), want)


def test_every_bit_of_the_seed_counts() -> None:
    base = noise.philox_normal(8, 0)
    draws = torch.stack([base] + [noise.philox_normal(8, 1 << bit) for bit in range(64)])
    assert len(torch.unique(draws, dim=0)) == 65
    assert torch.equal(noise.philox_normal(8, -1), noise.philox_normal(8, 2**64 - 1))
    assert torch.equal(noise.philox_normal(8, torch.tensor(-(2**63))), noise.philox_normal(8, 2**63))


def test_statistics() -> None:
    stats = pytest.importorskip("scipy.stats")
    n = 1_000_000
    for seed in (0, 20140414):
        z = noise.philox_normal(n, seed).double()
        # Five standard errors of each moment: of its mean, of z**2, of z**3, of z**4.
        for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
            assert abs((z**power).mean().item() - moment) < 5 * math.sqrt(variance / n)
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
        for sigma in (2.0, 3.0, 4.0):
            expected = n * math.erfc(sigma / math.sqrt(2))
            assert abs((z.abs() > sigma).sum().item() - expected) < 5 * math.sqrt(expected)
        # Neighbours share a radius, a Philox call, or nothing: uncorrelated all the same, and so are their squares.
        for lag in (1, 2, 3, 4, 8):
            a, b = z[:-lag], z[lag:]
            assert abs((a * b).mean().item()) < 5 / math.sqrt(n)
            assert abs(((a * a - 1) * (b * b - 1)).mean().item()) < 5 * 2 / math.sqrt(n)
        other = noise.philox_normal(n, seed + (1 << 40)).double()
        assert abs((z * other).mean().item()) < 5 / math.sqrt(n)


def test_tails_reach_as_far_as_32_bits_can() -> None:
    x = torch.tensor([0.0, 2.0**32 - 1])
    radius = noise._radius(x)
    assert radius[0].item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
    assert radius[0] > 6.6
    assert radius[1] == 0


def test_check_seed_takes_ints_and_tensors(device: torch.device) -> None:
    for seed, value in [(5, 5), (-5, -5), (2**64 - 1, -1), (2**63, -(2**63)), (True + 1, 2)]:
        key = noise.check_seed(seed, device)
        assert (key.dtype, key.shape, key.device.type, key.item()) == (torch.int64, (), device.type, value)
    tensor = torch.tensor(9, device=device)
    assert noise.check_seed(tensor, tensor.device) is tensor
    assert noise.check_seed(torch.tensor(9), device).device.type == device.type


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (2**64, ValueError, r"seed must lie in \[-2\*\*63, 2\*\*64\), got 18446744073709551616"),
        (-(2**63) - 1, ValueError, "seed must lie in"),
        (1.0, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
        (True, TypeError, "seed must be an int or a 0-d int64 tensor, got bool"),
        (None, TypeError, "seed must be an int or a 0-d int64 tensor, got NoneType"),
        (torch.tensor(1.0), TypeError, r"seed must be .* got a torch.float32 tensor of shape \(\)"),
        (torch.tensor([1]), TypeError, r"seed must be .* got a torch.int64 tensor of shape \(1,\)"),
        (torch.empty((), dtype=torch.int64, device="meta"), ValueError, "seed is on meta, expected it on cpu"),
    ],
)
def test_check_seed_refuses(seed: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noise.check_seed(seed, "cpu")


def test_draw_seed(device: torch.device) -> None:
    def draws() -> list[int]:
        generator = torch.Generator(device).manual_seed(1)
        return [noise.draw_seed(device, generator).item() for _ in range(200)]

    seeds = draws()
    assert seeds == draws()
    assert len(set(seeds)) == 200
    # Each of the 64 bits is set in some and clear in others.
    words = np.array(seeds, dtype=np.int64)
    assert np.bitwise_or.reduce(words) == -1
    assert np.bitwise_and.reduce(words) == 0
    torch.manual_seed(3)
    first = noise.draw_seed(device)
    assert (first.dtype, first.shape, first.device.type) == (torch.int64, (), device.type)
    assert noise.draw_seed(device) != first
    torch.manual_seed(3)
    assert noise.draw_seed(device) == first


def test_a_seed_that_something_looks_at_takes_the_plain_expressions() -> None:
    """What NumPy computes would be a constant of a graph, or have no value to compute from."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def draw(seed: Tensor) -> Tensor:
        return noise.philox_normal((3, 5), seed)

    first, second = torch.tensor(4), torch.tensor(-9)
    with FakeTensorMode() as mode:
        fake = draw(mode.from_tensor(first))
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.device.type) == ((3, 5), torch.float32, "cpu")
        assert isinstance(noise.philox_normal((3, 5), 4, device="cpu"), FakeTensor)
    assert draw(torch.empty((), dtype=torch.int64, device="meta")).device.type == "meta"
    for traced in (make_fx(draw)(first), torch.jit.trace(draw, (first,))):
        for seed in (first, second):
            torch.testing.assert_close(traced(seed), draw(seed), rtol=1e-6, atol=0)
    each = torch.vmap(draw)(torch.stack((first, second)))
    torch.testing.assert_close(each, torch.stack((draw(first), draw(second))), rtol=1e-6, atol=0)


def test_compiles_whole_and_once(device: torch.device) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda seed: noise.philox_normal((5, 67), seed, device=device, offset=3), fullgraph=True, backend=backend
    )
    for seed in (5, -(2**63), 2**40):
        torch.testing.assert_close(
            compiled(torch.tensor(seed, device=device)),
            noise.philox_normal((5, 67), seed, device=device, offset=3),
            rtol=2e-6,
            atol=1e-12,
        )
    assert backend.frame_count == 1
    # An int is a constant at first; a second value makes it an input, and no third one compiles again.
    for seed in (5, 6, -7, 2**40, -(2**63)):
        torch.testing.assert_close(
            compiled(seed), noise.philox_normal((5, 67), seed, device=device, offset=3), rtol=2e-6, atol=1e-12
        )
    assert backend.frame_count <= 3


def test_drawing_a_seed_compiles(device: torch.device) -> None:
    compiled = torch.compile(lambda: noise.draw_seed(device), fullgraph=True, backend="aot_eager")
    seeds = np.array([compiled().item() for _ in range(60)], dtype=np.int64)
    assert np.bitwise_or.reduce(seeds) == -1
    assert np.bitwise_and.reduce(seeds) == 0


@pytest.mark.gpu
def test_a_captured_draw_is_new_at_each_replay() -> None:
    generator_state = torch.cuda.get_rng_state()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed = noise.draw_seed("cuda")
        z = noise.philox_normal(100, seed)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append((seed.item(), z.clone()))
    torch.cuda.set_rng_state(generator_state)
    assert len({s for s, _ in seen}) == 3
    for s, drawn in seen:
        torch.testing.assert_close(drawn, noise.philox_normal(100, s, device="cuda"))
