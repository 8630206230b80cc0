"""Elementary functions for float32 blocks, built from fused multiply-adds and bit operations, and their float64 twins.

Triton lowers `tl.exp`, `tl.log`, `tl.sin` to hardware approximations (`ex2.approx`, `lg2.approx`, ...) whose error NumPy, and so
the interpreter, does not show. These do not use them: what the interpreter computes is what a GPU computes. Each stays within its
bound whether `tl.fma` rounds once (GPU, Triton >= 3.9 interpreter) or twice (older interpreters).

Polynomials are minimax fits (Remez, relative error) of the series named beside them, rounded to float32.
"""

import triton
import triton.language as tl


@triton.jit
def polynomial(x, coefficients):
    """Its value at a float32 or float64 block, by Horner's rule: the coefficient of the highest power comes first."""
    if x.dtype == tl.float64:
        # Plain products and sums: tl.fma takes a Python float for float32.
        p = x * coefficients[0] + coefficients[1]
        for i in tl.static_range(2, len(coefficients)):
            p = p * x + coefficients[i]
    else:
        p = tl.fma(x, coefficients[0], coefficients[1])
        for i in tl.static_range(2, len(coefficients)):
            p = tl.fma(p, x, coefficients[i])
    return p


@triton.jit
def exp(x):
    """e**x for a float32 or float64 block. Gradual underflow, overflow to inf, NaN stays NaN."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        tl.static_assert(x.dtype == tl.float32, "exp: widen to float32 first")
        # x = 2 h log(2) + r. Scaling by 2**h twice needs one exponent, and 2 h spans the subnormals without overflowing it.
        x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, 89.0, propagate_nan=tl.PropagateNan.ALL)
        # Adding 1.5 * 2**23 rounds to an integer and leaves it, plus the exponent bias 127, in the low bits.
        t = tl.fma(x, 0.7213475204444817, 12583039.0)
        h = t - 12583039.0
        scale = (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        # 2 log(2) in two parts; h times the first is exact.
        r = tl.fma(h, -1.38629150390625, x)
        r = tl.fma(h, -2.8572136405724535e-06, r)
        # e**r for |r| <= log(2), of which (e**r - 1 - r) / r**2 is fitted
        e = polynomial(r, (
            0.00019611803872976452, 0.0014104304136708379, 0.008336098864674568, 0.041661277413368225,
            0.1666661500930786, 0.5000003576278687, 1.0, 1.0,
        ))  # fmt: skip
        return e * scale * scale


@triton.jit
def log(x):
    """Natural logarithm of a float32 or float64 block. log(0) = -inf, negative -> NaN, subnormals as accurate as the rest."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        tl.static_assert(x.dtype == tl.float32, "log: widen to float32 first")
        subnormal = x < 1.1754943508222875e-38
        y = log_normal_f32(tl.where(subnormal, x * 8388608.0, x))
        y = tl.where(subnormal, y - 15.942385152878742, y)  # 23 log(2)
        y = tl.where(x < float("inf"), y, x)  # inf and NaN
        y = tl.where(x < 0.0, float("nan"), y)
        return tl.where(x == 0.0, float("-inf"), y)


@triton.jit
def log_normal_f32(x):
    """log(x) for positive, normal, finite float32."""
    bits = x.to(tl.int32, bitcast=True)
    # x = 2**k m with m in [2/3, 4/3): close to 1 k is 0, so nothing cancels. e holds k * 2**23.
    e = tl.sub(bits, 0x3F2AAAAB, sanitize_overflow=False) & -8388608
    f = tl.sub(bits, e, sanitize_overflow=False).to(tl.float32, bitcast=True) - 1.0
    p = polynomial(f, (  # (log(1 + f) - f) / f**2
        -0.12950366735458374, 0.1400611251592636, -0.12166854739189148, 0.1400090754032135, -0.16682326793670654,
        0.2001076191663742, -0.24999716877937317, 0.3333320915699005, -0.5,
    ))  # fmt: skip
    p = tl.fma(p, f * f, f)
    return tl.fma(e.to(tl.float32), 8.262958294867817e-08, p)  # log(2) * 2**-23


@triton.jit
def minus_2_log(u):
    """-2 log(u) for a float32 block u from 2**-33 to 1, within 5 ulp: a normal's squared radius, whose root halves the error."""
    # As in `log_normal_f32`.
    bits = u.to(tl.int32, bitcast=True)
    e = tl.sub(bits, 0x3F2AAAAB, sanitize_overflow=False) & -8388608
    f = tl.sub(bits, e, sanitize_overflow=False).to(tl.float32, bitcast=True) - 1.0
    p = polynomial(f, (  # -2 log(1 + f) / f
        0.30731385946273804, -0.3422236144542694, 0.32840174436569214, -0.39590075612068176, 0.5001524090766907,
        -0.6667597889900208, 0.9999987483024597, -1.9999996423721313,
    ))  # fmt: skip
    return tl.fma(p, f, e.to(tl.float32) * -1.6525916589735634e-07)  # -2 log(2) * 2**-23


@triton.jit
def log1p_exp_and_sigmoid(m):
    """(log(1 + e**-|m|), 1 / (1 + e**-m)) for a float32 or float64 block."""
    e = exp(-tl.abs(m))
    u = 1.0 + e
    if m.dtype == tl.float64:
        log_u = tl.log(u)
        inverse = 1.0 / u
    else:
        log_u = log_normal_f32(u)
        # A line within 1/17 of 1 / u for u from 1 to 2, and Newton's steps, which square that: a division calls a slow path.
        inverse = tl.fma(u, -0.47058823529411764, 1.411764705882353)
        for _ in tl.static_range(3):
            inverse = tl.fma(inverse, tl.fma(-u, inverse, 1.0), inverse)
    # The second term is what u lost by rounding: all of a small e.
    return log_u + (e - (u - 1.0)) * inverse, tl.where(m < 0.0, e * inverse, inverse)


@triton.jit
def sigma_expm1_remainder(v):
    """e**(v/2), and half of (e**v - 1, e**v - 1 - v), for a float32 or float64 block: a log-variance's parts, for one exponential.

    Free of cancellation near 0, and the last is never negative. The halves are what a KL is made of, and they fit where e**v itself
    has overflowed: up to log(2) further. In float32 a first part below 2**-125.5 is 0.
    """
    if v.dtype == tl.float64:
        p = polynomial(v, (  # (e**v - 1 - v) / v**2 for |v| <= 1
            4.7988626503352334e-14, 7.752866515275412e-13, 1.1471240541581527e-11, 1.6057462258410962e-10, 2.0876744830109538e-09,
            2.5052120413093462e-08, 2.755731932489907e-07, 2.755731917507784e-06, 2.4801587301197165e-05, 0.00019841269841371754,
            0.001388888888888958, 0.00833333333333324, 0.041666666666666664, 0.16666666666666666, 0.5,
        ))  # fmt: skip
        w = p * v * v
        e = tl.exp(v - 1.0) * 1.3591409142295225 - 0.5  # e / 2
        # Past the overflow of e**v the minimum keeps inf - inf from arising.
        far = e - 0.5 * tl.minimum(v, 800.0, propagate_nan=tl.PropagateNan.ALL)
        near = tl.abs(v) <= 1.0
        return tl.exp(0.5 * v), tl.where(near, 0.5 * (v + w), e), tl.where(near, 0.5 * w, far)
    else:
        tl.static_assert(v.dtype == tl.float32, "sigma_expm1_remainder: widen to float32 first")
        v = tl.minimum(v, 179.0, propagate_nan=tl.PropagateNan.ALL)  # where both e**(v/2) and e**v have overflowed
        x = tl.maximum(v, -175.0, propagate_nan=tl.PropagateNan.ALL)
        # x = 2 n log(2) + r, with n = 0 near zero. The low bits of t make f = 2**(n-1).
        t = tl.where(tl.abs(v) <= 1.0, 12583038.0, tl.fma(x, 0.7213475204444817, 12583038.0))
        n = t - 12583038.0
        f = (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        r = tl.fma(n, -1.38629150390625, x)
        r = tl.fma(n, -2.8572136405724535e-06, r)
        # With q = e**(r/2) - 1: s is 4 (q - r/2), twice is 2 q, and s + twice**2 / 2 is 2 (e**r - 1 - r).
        p = polynomial(r, (
            6.211134405020857e-06, 8.738748147152364e-05, 0.0010416815057396889, 0.010416449047625065, 0.0833333283662796, 0.5,
        ))  # fmt: skip
        s = p * r * r  # in this order it rounds once where r * r is subnormal
        twice = tl.fma(s, 0.5, r)
        rest = tl.fma(0.5 * twice, twice, s)
        square = f * f
        # Sums of terms that are never negative, infinite ones too, so that no inf - inf arises.
        base = tl.fma(tl.fma(square, 2.0, -0.5), 1.0 + r, 0.5 * r)
        return f * (2.0 + twice), tl.fma(square, rest, base), tl.fma(square, rest, tl.fma(v, -0.5, base))


@triton.jit
def minus_log1m_exp_and_ratio(w):
    """(-log(1 - e**-w), 1 / (e**w - 1)) for a float32 or float64 block of positive w, free of cancellation at both ends."""
    e = exp(-w)
    # For small w the rounding of e is most of the error of 1 - e, and of log(e) too, so it cancels in their ratio (Kahan).
    near, at_1 = e > 0.5, e == 1.0
    top = tl.where(at_1, 1.0, tl.where(near, -log(tl.where(near, e, 1.0)) * e, e))
    bottom = tl.where(at_1, w, tl.where(near, (1.0 - e) * w, 1.0 - e))
    ratio = divide(top, bottom)
    # The first is log(1 + ratio). The second summand is what u lost by rounding: all of a small ratio.
    u = 1.0 + ratio
    return log(u) + tl.where(ratio < 1.0, ratio - (u - 1.0), 0.0), ratio


@triton.jit
def log1p_gap(u, v):
    """u - log(1 + u), never negative, for a float32 or float64 block u and v = 1 + u, which the caller may know better than u."""
    # log(1 + u) = 2 atanh(z) with z = u / (2 + u), and u - 2 z = u z.
    z = divide(u, 2.0 + u)
    z2 = z * z
    if u.dtype == tl.float64:
        tail = polynomial(z2, (  # 1/3 + z^2 / 5 + ..., for |z| < 1/3
            0.030303030303030304, 0.03225806451612903, 0.034482758620689655, 0.037037037037037035, 0.04, 0.043478260869565216,
            0.047619047619047616, 0.05263157894736842, 0.058823529411764705, 0.06666666666666667, 0.07692307692307693,
            0.09090909090909091, 0.1111111111111111, 0.14285714285714285, 0.2, 0.3333333333333333,
        ))  # fmt: skip
    else:
        tail = polynomial(z2, (
            0.06666666666666667, 0.07692307692307693, 0.09090909090909091, 0.1111111111111111, 0.14285714285714285, 0.2,
            0.3333333333333333,
        ))  # fmt: skip
    return tl.where((u > -0.5) & (u < 1.0), z * (u - 2.0 * z2 * tail), u - log(v))


@triton.jit
def divide(a, b):
    """Correctly rounded: the plain float32 quotient is an approximation on NVIDIA GPUs."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def sqrt(x):
    """Correctly rounded: the plain float32 root is an approximation on NVIDIA GPUs."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def stirling_remainders(z):
    """What Stirling's formulas leave out, for a positive float32 or float64 block z.

    That is lgamma(z) - ((z - 1/2) log(z) - z + 1/2 log(2 pi)), and log(z) - 1/(2 z) - digamma(z), which is minus its derivative.
    A fit in 1/z**2 holds from 1 on, in float64 from 4 on. To smaller z the recurrence of the gamma function leads back.
    """
    if z.dtype == tl.float64:
        small = z < 4.0
        u = 1.0 / tl.where(small, z + 4.0, z)
        v = u * u
        p = polynomial(v, (
            -0.17390223978422367, 0.08600886915362022, -0.02431970081518216, 0.006210992276421007, -0.0019125368108574897,
            0.0008416721483780579, -0.0005952373672607474, 0.0007936507901805894, -0.002777777777771288, 0.08333333333333333,
        ))  # fmt: skip
        q = polynomial(v, (
            16.272492444252475, -7.874672567242462, 2.0004758503978333, -0.3992958066655563, 0.08204835156459736,
            -0.021067490343790643, 0.007575437694477858, -0.004166664261695412, 0.003968253958849537, -0.008333333333318827,
            0.08333333333333333,
        ))  # fmt: skip
        near = tl.where(small, z, 1.0)
        log_ratio = tl.log(1.0 + 4.0 / near)
        product = (1.0 + 1.0 / (near + 3.0)) * (1.0 + 2.0 / (near + 2.0)) * (1.0 + 3.0 / (near + 1.0)) * (1.0 + 4.0 / near)
        lost = (near - 0.5) * log_ratio - 4.0 + tl.log(product)
        inverses = 1.0 / near + 1.0 / (near + 1.0) + 1.0 / (near + 2.0) + 1.0 / (near + 3.0)
        lost_slope = inverses - 0.5 / near + 0.5 / (near + 4.0) - log_ratio
    else:
        small = z < 1.0
        u = 1.0 / tl.where(small, z + 1.0, z)
        v = u * u
        p = polynomial(v, (
            3.676352935144678e-05, -0.00018581465701572597, 0.0004167917068116367, -0.0005674052517861128, 0.0005717761814594269,
            -0.0005568209453485906, 0.0007905138772912323, -0.0027776702772825956, 0.0833333358168602,
        ))  # fmt: skip
        q = polynomial(v, (
            0.0003417524858377874, -0.001704357098788023, 0.0037383465096354485, -0.004885561764240265, 0.004539948422461748,
            -0.003750551026314497, 0.003934965934604406, -0.008332203142344952, 0.0833333283662796,
        ))  # fmt: skip
        near = tl.where(small, z, 1.0)
        log_ratio = log(1.0 + 1.0 / near)
        lost = (near + 0.5) * log_ratio - 1.0
        lost_slope = 0.5 / near + 0.5 / (near + 1.0) - log_ratio
    return p * u + tl.where(small, lost, 0.0), q * v + tl.where(small, lost_slope, 0.0)


@triton.jit
def sincos_2pi(bits):
    """(sin, cos) of 2 pi t, float32, for t = (bits + 1/2) / 2**32 and a uint32 block of bits: t is in (0, 1), never on an axis."""
    # The top two bits, rounded to nearest, are the quadrant; the rest, a signed fraction of it, the angle a in units of pi/4.
    a = tl.fma((bits << 2).to(tl.int32, bitcast=True).to(tl.float32), 4.656612873077393e-10, 9.313225746154785e-10)
    quadrant = tl.add(bits, 0x20000000, sanitize_overflow=False)
    a2 = a * a
    # The last coefficient is what float32 leaves out of pi/4.
    s = polynomial(a2, (-3.59504520019982e-05, 0.00249000103212893, -0.08074543625116348, -2.43989717318982e-08))
    s = tl.fma(a, 0.7853981852531433, s * a)
    c = polynomial(a2, (3.5313346415932756e-06, -0.00032594200456514955, 0.015854327008128166, -0.3084251284599304, 1.0))
    odd = (quadrant & 0x40000000) != 0
    sin = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ (quadrant & 0x80000000)
    quadrant = tl.add(quadrant, 0x40000000, sanitize_overflow=False)
    cos = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (quadrant & 0x80000000)
    return sin.to(tl.float32, bitcast=True), cos.to(tl.float32, bitcast=True)
