"""What a seeded direction is, down to the bit. Every back end implements this page.

**Integers.** Philox4x32-10 (Salmon et al., SC 2011). The key of a direction is its 64-bit seed, low
word first. The counter is ``(c0, c1, c2, c3)``: `c0, c1` the low and high word of the element's
number in the flat parameter vector divided by the elements per counter, `c2` the block (0 without
blocks), `c3` the tag of the basis. So any element of any direction can be computed alone: chunks,
threads, machines and the way a model is cut into tensors do not matter.

===============  =====  ================  =========================================================
basis            tag    elements/counter  value of element i, with x = word i % 4 of counter i // 4
===============  =====  ================  =========================================================
gaussian         1      4                 Box-Muller on the words (0, 1) and (2, 3), see below
uniform          2      4                 a (2n + 1) 2^-24, n = floor(x / 256) - 2^23
truncated        2      4                 a g(s), s the uniform value for a = 1, g below
rademacher       3      128               bit i % 32 of word (i // 32) % 4 of counter i // 128
rademacher32     4      4                 bit seed % 32 of x; the key is seed // 32
===============  =====  ================  =========================================================

``a = 1 / sqrt(size of the block)``. A set bit means -1, a clear bit +1. Seeds that agree but for
their low five bits share the words of `rademacher32`, which is what makes its sums cheap; `pool`
hands out seeds in such groups of 32. Tag 5 derives pools; 6 is kept for choices of subsets.

**Floats.** Only IEEE single precision ``+ - * sqrt``, conversions and selects, each rounded once to
nearest, never contracted to fused multiply-adds: hence equal bits wherever that is kept. Gaussian,
from words x and y, with ``u = (x + 1) 2^-32`` and ``v = (y + 1) 2^-32``, is
``sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v)``, computed as::

    t = float(x) + 1;  t = 2^e m with sqrt(1/2) <= m < sqrt(2);  f = m - 1
    if e = 32 (u near 1): f = -float(2^32 - 1 - x) 2^-32          u - 1 without cancellation
    r = sqrt(float(32 - e) TWO_LN2 + f LOG(f))                    LOG(f) ~ -2 ln(1 + f) / f
    q, p = divmod((y + 1 + 2^29) mod 2^32, 2^30);  s = float(p - 2^29) 2^-29;  h = s s
    (sin, cos) of s pi/4 = s SIN(h), COS(h);  turned by q quarter turns;  times r

with Horner's rule for LOG, SIN and COS (minimax fits, coefficients below, lowest power first). The
result is within 1e-6 and within 5 units in the last place of the exact Box-Muller value.

`truncated` is the standard normal cut to [-a, a] (Ferret, arXiv 2409.06277, section 3.2): its
inverse distribution function at the uniform s is ``a g(s)``, ``g(s) = s P(s^2)`` clamped to
[-1, 1], P the power series of `truncated_series` cut after twelve terms (wrong by less than 1e-7,
by 4e-6 for a block of one element).

**Sums.** `combine` adds ``c_k z_k`` in the order of the seeds, product and sum rounded separately,
in float32 (float64 for float64 weights), starting from zero, then adds the sum to the weights.
`rademacher32` adds group by group (ascending seed): the 32 terms of a group as
``(T0 + T1) + (T2 + T3)``, each T the sum of eight terms in ascending order. `dots` multiplies,
folds each chunk of 2048 elements (cut at multiples of 2048 of the flat number) in halves, and adds
the chunks one after another in float64. The scale `a` goes into the coefficients or the result.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

CHUNK = 2048
GAUSSIAN, UNIFORM, TRUNCATED, RADEMACHER, RADEMACHER32 = range(5)
CODES = {
    "gaussian": GAUSSIAN,
    "uniform": UNIFORM,
    "truncated": TRUNCATED,
    "rademacher": RADEMACHER,
    "rademacher32": RADEMACHER32,
}
TAGS = 1, 2, 2, 3, 4
POOL_TAG = 5
CHOICE_TAG = 6

SQRT_HALF_BITS = 0x3F3504F3
TWO_LN2 = 1.3862943649291992
LOG = (
    -2.0,
    0.9999983310699463,
    -0.6666839718818665,
    0.5001144409179688,
    -0.3991292417049408,
    0.33006006479263306,
    -0.2982828617095947,
    0.2936609089374542,
    -0.18287266790866852,
)
SIN = (0.7853981852531433, -0.08074583113193512, 0.0024910164065659046, -3.660915172076784e-05)
COS = (
    1.0,
    -0.3084251284599304,
    0.015854284167289734,
    -0.0003258686629123986,
    3.494036945994594e-06,
)
SERIES = 12


class Plan(NamedTuple):
    """One call's directions, as a back end reads them.

    `seeds` uint64 [K] and `coefficients` [K]; for `rademacher32` in `combine`, group keys
    (seed // 32) uint64 [G] and coefficients [G, 32] instead. `series` float32 [SERIES] is read by
    `truncated` only. Coefficients carry the scale `a`; back ends know values in [-1, 1] only.
    """

    basis: int
    stream: int
    seeds: NDArray[np.uint64]
    coefficients: NDArray[Any]
    series: NDArray[np.float32]


def scale(basis: int, size: int) -> float:
    """The factor `a` of a block of `size` elements: 1/sqrt(size) for Ferret's bases, else 1."""
    return 1.0 / math.sqrt(max(size, 1)) if basis in (UNIFORM, TRUNCATED) else 1.0


@lru_cache(maxsize=4096)
def truncated_series(size: int) -> NDArray[np.float32]:
    """Coefficients of P: the inverse of the truncated normal's distribution function, over a.

    With ``t = integral of exp(-y^2/2) from 0 to x``, ``x = sum c_k t^(2k+1) / ((2k+1) 2^k)`` and
    ``c_k = sum c_m c_(k-1-m) / ((m+1)(2m+1))``; the uniform s stands for ``t = s t(a)``. Only
    sums, products and quotients of doubles, so the same bits on every machine.
    """
    a = scale(TRUNCATED, size)
    end, term = 0.0, a
    for k in range(24):
        end += term / (2 * k + 1)
        term *= -a * a / (2 * (k + 1))
    c = [1.0]
    for k in range(1, SERIES):
        c.append(sum(c[m] * c[k - 1 - m] / ((m + 1) * (2 * m + 1)) for m in range(k)))
    power, out = end / a, []
    for k in range(SERIES):
        value = c[k] * power / ((2 * k + 1) * 2.0**k)
        out.append(value if value > 2.0**-40 else 0.0)  # no denormals: they are slow
        power *= end * end
    series = np.array(out, dtype=np.float32)
    series.setflags(write=False)
    return series


def variance(basis: str, size: int = 1) -> float:
    """Variance of one element of a direction of a block of `size` elements.

    1 for gaussian and rademacher; 1/(3 size) for uniform; Ferret's rho for truncated, by its
    formula (B5: 1 - 2 a pdf(a) / (2 cdf(a) - 1)) below 1000 elements and by the series
    ``a^2/3 - 2 a^4/45`` above, where the formula cancels.
    """
    code = CODES[basis]
    a = scale(code, size)
    if code == UNIFORM:
        return a * a / 3
    if code != TRUNCATED:
        return 1.0
    if size >= 1000:
        return a * a / 3 - 2 * a**4 / 45
    pdf = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * a * pdf / math.erf(a / math.sqrt(2))
