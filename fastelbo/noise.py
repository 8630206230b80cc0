"""Seeds, and the twin of kernels/philox.py on the host and in plain PyTorch.

All take element 4 k + i of the noise from lane i of counter k of Philox4x32-10 (Salmon et al. 2011), turned into normals by
Box-Muller. Their integers agree exactly, their normals to a few float32 ulp, whatever the device, the chunk or the block size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dtypes import on_host, plain
from .tracing import INT, are_wrapped, is_watched
from .types import Seed

__all__ = ["check_seed", "draw_seed", "philox_normal", "sample_noise"]

_LOW = 0xFFFFFFFF
_MUL_A, _MUL_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ANGLE = 2.0 * math.pi * 2.0**-32
_CHUNK = 12_000  # counters a pass on the host: 0.6 MB of scratch stays in cache, and starting a pass costs little beside it


def draw_seed(device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """64 random bits as a 0-d int64 tensor, drawn on the device: no host sync, and a new draw at each replay of a CUDA graph."""
    if torch.compiler.is_compiling():
        # random_ over the full range has no Inductor lowering.
        words = torch.randint(1 << 32, (2,), dtype=torch.int64, device=device, generator=generator)
        return (words[1] << 32) | words[0]
    return torch.empty((), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)


def check_seed(seed: Seed, device: torch.device | str | None = None) -> Tensor:
    """The seed as a 0-d int64 tensor on the device (None: its own, or torch's default), as both backends take it.

    An int in [-2**63, 2**64) counts modulo 2**64; the value of a tensor is not looked at.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"seed must be an int or a 0-d int64 tensor, got a {seed.dtype} tensor of shape {tuple(seed.shape)}")
        device = seed.device if device is None else torch.device(device)
        if seed.device.type not in ("cpu", device.type):
            raise ValueError(f"seed is on {seed.device}, expected it on {device} or on the CPU")
        return seed.to(device, non_blocking=True)
    number = plain(seed)
    if isinstance(number, bool) or not isinstance(number, INT):
        raise TypeError(f"seed must be an int or a 0-d int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must lie in [-2**63, 2**64), got {number}")
    # A fill, not a copy from the host: it can be captured in a CUDA graph.
    return torch.full((), number if number < 2**63 else number - 2**64, dtype=torch.int64, device=device)


def philox_normal(
    shape: int | Sequence[int],
    seed: int | Tensor,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
) -> Tensor:
    """Standard normals, computed in float32: elements offset, offset + 1, ... of the noise that belongs to the seed.

    seed: an int in [-2**63, 2**64) or a 0-d int64 tensor, which a GPU never hands back. device: the seed's if it is a tensor,
    else torch's default, unless given. Under torch.compile an int that changes between calls must be below 2**63.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
    key = check_seed(seed, device)
    n = math.prod(shape)
    first, lead = offset >> 2, offset & 3
    counters = (lead + n + 3) >> 2
    if not is_watched(key) and on_host(key):
        drawn = _host_normals(first, counters, int(key))
        return torch.from_numpy(drawn[lead : lead + n].reshape(shape)).to(dtype)
    normals = _normals(torch.arange(first, first + counters, dtype=torch.int64, device=key.device), _round_keys(key))
    if torch.compiler.is_compiling():
        # A slice of a symbolic size asks whether it fits, which no solver of the sizes can answer.
        return normals[torch.arange(lead, lead + n, dtype=torch.int64, device=key.device)].view(shape).to(dtype)
    return normals[lead : lead + n].view(shape).to(dtype)


def sample_noise(mu: Tensor, seed: Tensor, samples: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise of z that the seed stands for: of mu's shape, or of (samples, *mu.shape)."""
    drawn = philox_normal(mu.shape if samples is None else (samples, *mu.shape), seed, device=mu.device, dtype=dtype)
    return _placed_as(drawn, mu) if are_wrapped((mu,)) else drawn


def _placed_as(noise: Tensor, mu: Tensor) -> Tensor:
    """Beside a DTensor every process draws the whole noise and keeps its part, so that the number of processes does not matter."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    if not isinstance(mu, DTensor):
        return noise
    lead = noise.ndim - mu.ndim
    placements = [Shard(p.dim + lead) if isinstance(p, Shard) else Replicate() for p in mu.placements]
    return distribute_tensor(noise, mu.device_mesh, placements, src_data_rank=None)


# ---- plain expressions: for a GPU, for Inductor, which fuses them, and for whatever else looks on --------------------------------


def _round_keys(key: Tensor) -> tuple[Tensor, ...]:
    """The two key words of each of the ten rounds, in turn, as 0-d int64 tensors."""
    rounds = torch.arange(10, dtype=torch.int64, device=key.device)
    low, high = (key & _LOW) + rounds * _KEY_A, ((key >> 32) & _LOW) + rounds * _KEY_B
    return (torch.stack((low, high), dim=1) & _LOW).view(20).unbind()


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, keys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on 32-bit words held in int64; the results likewise."""
    for k0, k1 in zip(keys[::2], keys[1::2], strict=True):
        # With 2**32 taken off the multiplier the product fits int64, whose overflow is undefined in the C++ that Inductor writes.
        # c * M = p + 2**32 c: its low word is p's, its high word p's plus c, and no carry passes between them.
        p, q = c2 * (_MUL_B - 2**32), c0 * (_MUL_A - 2**32)
        c0, c2 = ((p >> 32) + c2) ^ c1 ^ k0, ((q >> 32) + c0) ^ c3 ^ k1
        c1, c3 = p & _LOW, q & _LOW
    return c0, c1, c2, c3


def _normals(counter: Tensor, keys: tuple[Tensor, ...]) -> Tensor:
    zero = torch.zeros_like(counter)
    x0, x1, x2, x3 = _philox(counter & _LOW, counter >> 32, zero, zero, keys)
    r0, r2 = _radius(x0.to(torch.float32)), _radius(x2.to(torch.float32))
    return torch.stack((r0 * _sin(x1), r0 * _cos(x1), r2 * _sin(x3), r2 * _cos(x3)), dim=-1).view(-1)


def _radius(x: Tensor) -> Tensor:
    return torch.sqrt(-2.0 * torch.log(x * 2.0**-32 + 2.0**-33))


def _sin(x: Tensor) -> Tensor:
    """sin(2 pi (x + 1/2) / 2**32), as accurate near pi as near zero: sin(pi - a) = sin(a), done on the bits."""
    signed = x - ((x >> 31) << 32)
    outer = ((x >> 31) ^ (x >> 30)) & 1  # beyond a right angle from zero
    return torch.sin((signed ^ (outer * 0x7FFFFFFF)).to(torch.float32) * _ANGLE + 0.5 * _ANGLE)


def _cos(x: Tensor) -> Tensor:
    return _sin((x + (1 << 30)) & _LOW)


# ---- on the host: NumPy, which starts a small operation in a quarter of torch's time ---------------------------------------------

Words = NDArray[np.uint64]  # 32 bits each

# As arrays, which NumPy need not convert at every operation.
_U_LOW, _U_32, _U_A, _U_B = (np.array(value, dtype=np.uint64) for value in (_LOW, 32, _MUL_A, _MUL_B))
_STEPS = np.arange(10, dtype=np.uint64)[:, None, None] * np.array([[_KEY_A], [_KEY_B]], dtype=np.uint64)


def _host_philox(even: Words, odd: Words, key: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """As _philox. even: words 0 and 2 of the counters, (2, m), and odd: words 1 and 3; both are used up."""
    c0, c2 = even
    spare, odds = ((rows, *rows) for rows in (np.empty_like(odd), odd))
    for k in (np.array([[key & _LOW], [(key >> 32) & _LOW]], dtype=np.uint64) + _STEPS) & _LOW:
        products, p, q = spare
        np.multiply(c2, _U_B, out=p)
        np.multiply(c0, _U_A, out=q)
        np.right_shift(products, _U_32, out=even)
        even ^= odds[0]  # whose high words are left over from products
        even ^= k
        even &= _U_LOW
        spare, odds = odds, spare
    return even.astype(np.uint32), odds[0].astype(np.uint32)


def _host_normals(first: int, counters: int, key: int) -> NDArray[np.float32]:
    """The normals of counters first, first + 1, ..., as _normals has them."""
    out = np.empty((counters, 2, 2), dtype=np.float32)  # by counter, by pair, the sine's before the cosine's
    for start in range(0, counters, _CHUNK):
        _fill(out[start : start + _CHUNK], first + start, key)
    return out.ravel()


def _fill(out: NDArray[np.float32], first: int, key: int) -> None:
    m = len(out)
    even, odd = np.zeros((2, 2, m), dtype=np.uint64)
    even[0] = np.arange(first, first + m, dtype=np.uint64)
    np.right_shift(even[0], 32, out=odd[0])
    even[0] &= _LOW
    lengths, turns = _host_philox(even, odd, key)

    radius = lengths.astype(np.float32)
    radius *= 2.0**-32
    radius += 2.0**-33
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    # _sin and _cos: of x + 1/4 turn (for the cosine x + 1/2 turn) the sign says whether x is beyond a right angle from zero.
    x = np.empty((2, 2, m), dtype=np.uint32)
    np.add(turns, 1 << 30, out=x[0])
    np.add(turns, 1 << 31, out=x[1])
    signed = x.view(np.int32)
    signed ^= signed >> 31
    signed -= 1 << 30
    angle = signed.astype(np.float32)
    angle *= _ANGLE
    angle += 0.5 * _ANGLE
    np.sin(angle, out=angle)
    np.multiply(angle, radius, out=out.T)
