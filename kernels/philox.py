"""Standard normal noise from a seed and an element's index, in registers.

Element 4 k + i is lane i of counter k of Philox4x32-10 (Salmon et al. 2011): key (seed's low word, high word), counter
(k's low word, high word, 0, 0). So noise depends on seed and index alone: not on the block size, the launch or the device.
`fastelbo.noise.philox_normal` is the same function in plain PyTorch.
"""

import triton
import triton.language as tl

from .math import minus_2_log, sincos_2pi


@triton.jit
def philox_bits4(seed, counter):
    """Four uint32 blocks of random bits, shaped like counter. seed: 64-bit integer scalar; counter: block of int32 or int64."""
    c0 = counter.to(tl.uint32)
    c2 = c0 * 0
    c3 = c2
    c1 = c2
    if counter.dtype == tl.int64:
        c1 = (counter >> 32).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p = c2.to(tl.uint64) * 0xCD9E8D57
        q = c0.to(tl.uint64) * 0xD2511F53
        c0, c2 = (p >> 32).to(tl.uint32) ^ c1 ^ k0, (q >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p.to(tl.uint32), q.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _box_muller(x0, x1):
    """Two float32 normals from two uint32, as cuRAND does: x0 gives the radius, x1 the angle; sine first."""
    # u = (x0 + 1/2) / 2**32 is never 0, so the radius ends at sqrt(66 log 2) = 6.76; the product is exact.
    u = tl.fma(x0.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    radius = tl.sqrt(minus_2_log(u))
    sin, cos = sincos_2pi(x1)
    return radius * sin, radius * cos


@triton.jit
def philox_normal4(seed, counter):
    """Four float32 blocks of standard normals for a block of counters: elements 4 counter + 0, 1, 2, 3."""
    x0, x1, x2, x3 = philox_bits4(seed, counter)
    n0, n1 = _box_muller(x0, x1)
    n2, n3 = _box_muller(x2, x3)
    return n0, n1, n2, n3


@triton.jit
def normal_tile_aligned(seed, counters):
    """float32 (BM, BN) normals for a (BM, BN // 4) block of counters; column 4 j + i is lane i of counters[:, j].

    For rows that start at a multiple of four elements: each Philox call serves four neighbours, and nothing moves between threads.
    """
    n0, n1, n2, n3 = philox_normal4(seed, counters)
    pairs = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(pairs, (counters.shape[0], counters.shape[1] * 4))


@triton.jit
def normal_at(seed, index):
    """float32 normals at a block of element indices, of any shape and alignment; same noise as the tiles.

    Costs over twice a tile's element: a Philox call each, except where the compiler sees that neighbours share a counter.
    """
    x0, x1, x2, x3 = philox_bits4(seed, index >> 2)
    second = (index & 2) != 0
    sin, cos = _box_muller(tl.where(second, x2, x0), tl.where(second, x3, x1))
    return tl.where((index & 1) != 0, cos, sin)


@triton.jit
def normal_rows(seed, start, N: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 (BM, N) normals for rows that start at a (BM,) block of elements; ALIGNED says that 4 divides these."""
    if ALIGNED:
        return normal_tile_aligned(seed, (start >> 2)[:, None] + tl.arange(0, N // 4)[None, :])
    else:
        return normal_at(seed, start[:, None] + tl.arange(0, N)[None, :])
