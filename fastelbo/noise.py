"""Seeds, and the plain-PyTorch twin of kernels/philox.py.

Both take element 4 k + i of the noise from lane i of counter k of Philox4x32-10 (Salmon et al. 2011), turned into normals by
Box-Muller. Their integers agree exactly, their normals to a few float32 ulp, whatever the device, the chunk or the block size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .tracing import INT

__all__ = ["check_seed", "draw_seed", "philox_normal", "sample_noise"]

_LOW = 0xFFFFFFFF
_MUL_A, _MUL_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ANGLE = 2.0 * math.pi * 2.0**-32
_CHUNK = 1 << 16  # counters a pass: 4.5 MB of scratch stays in cache, and starting a pass costs little beside it


def draw_seed(device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """64 random bits as a 0-d int64 tensor, drawn on the device: no host sync, and a new draw at each replay of a CUDA graph."""
    if torch.compiler.is_compiling():
        # random_ over the full range has no Inductor lowering.
        words = torch.randint(1 << 32, (2,), dtype=torch.int64, device=device, generator=generator)
        return (words[1] << 32) | words[0]
    return torch.empty((), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)


def check_seed(seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """The seed as a 0-d int64 tensor on the device (None: its own, or torch's default), as both backends take it.

    An int in [-2**63, 2**64) counts modulo 2**64; a tensor is never read back.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"seed must be an int or a 0-d int64 tensor, got a {seed.dtype} tensor of shape {tuple(seed.shape)}")
        device = seed.device if device is None else torch.device(device)
        if seed.device.type not in ("cpu", device.type):
            raise ValueError(f"seed is on {seed.device}, expected it on {device} or on the CPU")
        return seed.to(device, non_blocking=True)
    if isinstance(seed, bool) or not isinstance(seed, INT):
        raise TypeError(f"seed must be an int or a 0-d int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must lie in [-2**63, 2**64), got {seed}")
    # A fill, not a copy from the host: it can be captured in a CUDA graph.
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def philox_normal(
    shape: int | Sequence[int],
    seed: int | Tensor,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
) -> Tensor:
    """Standard normals, computed in float32: elements offset, offset + 1, ... of the noise that belongs to the seed.

    seed: an int in [-2**63, 2**64) or a 0-d int64 tensor, which is never read back. device: the seed's if it is a tensor,
    else torch's default, unless given. Under torch.compile an int that changes between calls must be below 2**63.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
    key = check_seed(seed, device)
    device = key.device
    n = math.prod(shape)
    first = offset >> 2
    counters = ((offset + n + 3) >> 2) - first
    keys = _round_keys(key)
    if device.type != "cpu" or torch.compiler.is_compiling():
        out = _normals(torch.arange(first, first + counters, device=device), keys)
    else:
        out = torch.empty(4 * counters, dtype=torch.float32, device=device)
        chunk = max(1, min(_CHUNK, counters))
        scratch = torch.empty(9 * chunk, dtype=torch.int64, device=device)
        for start in range(0, counters, chunk):
            m = min(chunk, counters - start)
            _fill_normals(out[4 * start : 4 * (start + m)], first + start, keys, scratch[: 9 * m].view(9, m))
    lead = offset - 4 * first
    return out[lead : lead + n].view(shape).to(dtype)


def _round_keys(key: Tensor) -> tuple[Tensor, ...]:
    """The two key words of each of the ten rounds, in turn, as 0-d int64 tensors."""
    rounds = torch.arange(10, dtype=torch.int64, device=key.device)
    low, high = (key & _LOW) + rounds * _KEY_A, ((key >> 32) & _LOW) + rounds * _KEY_B
    return (torch.stack((low, high), dim=1) & _LOW).view(20).unbind()


# Plain expressions: for a GPU, and for Inductor, which fuses them.


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


# The same with every pass in place, on scratch that stays in cache: for the CPU.


def _philox_(c: Tensor, keys: tuple[Tensor, ...], spare: Tensor) -> None:
    """_philox on c, (4, m) int64, which takes the results. spare: (2, m)."""
    c0, c1, c2, c3 = c.unbind()
    p, q = spare.unbind()
    for k0, k1 in zip(keys[::2], keys[1::2], strict=True):
        torch.mul(c2, _MUL_B, out=p)  # wraps around, as each operation by itself does
        torch.mul(c0, _MUL_A, out=q)
        # The high words of c1 and c3 are left over from products; they leave here.
        torch.bitwise_right_shift(p, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        torch.bitwise_right_shift(q, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, p, c3, q = p, c1, q, c3
    c1.bitwise_and_(_LOW)
    c3.bitwise_and_(_LOW)


def _fill_normals(out: Tensor, first: int, keys: tuple[Tensor, ...], scratch: Tensor) -> None:
    """out, (4 m,) float32, takes the normals of counters first to first + m. scratch: (9, m) int64."""
    m = scratch.shape[1]
    c = scratch[:4]
    torch.arange(first, first + m, out=c[0])
    torch.bitwise_right_shift(c[0], 32, out=c[1])
    c[0].bitwise_and_(_LOW)
    c[2:].zero_()
    _philox_(c, keys, scratch[4:6])

    radius = scratch[8].view(torch.float32).view(m, 2)
    radius[:, 0] = c[0]
    radius[:, 1] = c[2]
    radius.mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
    # Two int32 lanes in each int64, x and x + 2**30: their sines are the sine and the cosine.
    pairs = scratch[6:8].view(m, 2)
    torch.mul(c[1], (1 << 32) + 1, out=pairs[:, 0])
    torch.mul(c[3], (1 << 32) + 1, out=pairs[:, 1])
    x = pairs.add_(1 << 62).view(torch.int32).view(-1)
    outer = scratch[:2].view(torch.int32).view(-1)
    torch.bitwise_left_shift(x, 1, out=outer).bitwise_xor_(x).bitwise_right_shift_(31).bitwise_and_(0x7FFFFFFF)
    out.copy_(x.bitwise_xor_(outer)).mul_(_ANGLE).add_(0.5 * _ANGLE).sin_()
    out.view(m, 2, 2).mul_(radius.unsqueeze(-1))


def sample_noise(mu: Tensor, seed: Tensor, samples: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise of z that the seed stands for: of mu's shape, or of (samples, *mu.shape)."""
    return philox_normal(mu.shape if samples is None else (samples, *mu.shape), seed, device=mu.device, dtype=dtype)
