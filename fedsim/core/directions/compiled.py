# mypy: disable-error-code="no-untyped-def, call-arg"
"""The directions compiled by numba for the CPU: the fast path (extra `fast`).

Each kernel walks its part of the vector once, in chunks that stay in the first-level cache, and
adds all directions to a chunk before it touches the next. The loops are branch-free, so that LLVM
turns Philox, Box-Muller and the sign tricks into vector code; nothing allows it to reorder or
contract float operations, so the bits are those of `arrays`. Kernels release the GIL, and threads
are the caller's: numba's own parallel loops may not be entered from several threads at once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from . import layout
from .layout import CHUNK, GAUSSIAN, RADEMACHER, RADEMACHER32, TRUNCATED, Plan

F = TypeVar("F", bound=Callable[..., Any])

f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64
M0, M1 = u64(layout.MULTIPLIERS[0]), u64(layout.MULTIPLIERS[1])
W0, W1 = u64(layout.WEYL[0]), u64(layout.WEYL[1])
LOW, WORD = u64(layout.MASK), u64(32)
SQRT_HALF, TWO_LN2 = i32(layout.SQRT_HALF_BITS), f32(layout.TWO_LN2)
TINY, HALF_TURN = f32(2.0**-32), f32(2.0**-29)
SIGN, ONE = u32(1 << 31), u32(0x3F800000)
QUARTER, TURN = u32(1 << 30), u32(2**29 + 1)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (f32(c) for c in layout.LOG)
S0, S1, S2, S3 = (f32(c) for c in layout.SIN)
C0, C1, C2, C3, C4 = (f32(c) for c in layout.COS)
TAGS = np.array(layout.TAGS, dtype=np.uint64)


def _jit(function: F) -> F:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to: compile in each process
        return njit(**options)(function)


@intrinsic
def _wide(typing_context: Any) -> Any:
    """Ask LLVM for 512-bit vectors where there are any: twice as fast here (it prefers 256)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if isinstance(builder.function.attributes, set):
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


@_jit
def philox(key, first, count, stream, tag, words):
    """Write the four words a, b, c, d of counters ``first .. first + count`` to uint64 `words`
    [2, count or more]: a and c to its first row, b and d to its second, so that pairs come apart
    without a shuffle. Seen as uint32 a row holds every other word of the stream.
    """
    _wide()
    stream &= LOW
    tag &= LOW
    for n in range(count):
        i = first + u64(n)
        x0, x1, x2, x3 = i & LOW, i >> WORD, stream, tag
        k0, k1 = key & LOW, key >> WORD
        for _ in range(layout.ROUNDS):
            p0, p1 = M0 * x0, M1 * x2
            x0, x1, x2, x3 = (p1 >> WORD) ^ x1 ^ k0, p1 & LOW, (p0 >> WORD) ^ x3 ^ k1, p0 & LOW
            k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
        words[0, n] = x0 | (x2 << WORD)
        words[1, n] = x1 | (x3 << WORD)


@_jit
def _gaussian(even, odd, z):
    """Box-Muller on pairs of words (uint32 [n] each) into `z` (float32 [2 n])."""
    _wide()
    for n in range(len(even)):
        x, y = even[n], u32(odd[n] + TURN)
        i = f32(f32(x) + f32(1)).view(i32)
        e = i32(i - SQRT_HALF) >> i32(23)
        f = i32(i - (e << i32(23))).view(f32) - f32(1)
        if e == 32:
            f = f32(u32(~x)) * -TINY
        p = (((((((L8 * f + L7) * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
        r = f32(math.sqrt(f32(i32(32) - e) * TWO_LN2 + f * p)).view(u32)
        s = f32(i32(i32(y & (QUARTER - u32(1))) - i32(1 << 29))) * HALF_TURN
        h = s * s
        sin = (((S3 * h + S2) * h + S1) * h + S0) * s
        cos = (((C4 * h + C3) * h + C2) * h + C1) * h + C0
        turned = (y & QUARTER) != u32(0)
        a, b = (sin, cos) if turned else (cos, sin)
        z[2 * n] = u32(r ^ u32(u32(y + QUARTER) & SIGN)).view(f32) * a
        z[2 * n + 1] = u32(r ^ u32(y & SIGN)).view(f32) * b


@_jit
def _uniform(even, odd, z):
    _wide()
    for n in range(len(even)):
        x = i32(i32(even[n] >> u32(8)) - i32(1 << 23)) * i32(2) + i32(1)
        y = i32(i32(odd[n] >> u32(8)) - i32(1 << 23)) * i32(2) + i32(1)
        z[2 * n] = f32(i32(x)) * f32(2.0**-24)
        z[2 * n + 1] = f32(i32(y)) * f32(2.0**-24)


@_jit
def _truncated(z, series):
    _wide()
    p0, p1, p2, p3, p4, p5 = series[0], series[1], series[2], series[3], series[4], series[5]
    p6, p7, p8, p9, p10, p11 = series[6], series[7], series[8], series[9], series[10], series[11]
    for n in range(len(z)):
        s = z[n]
        h = s * s
        p = (((((p11 * h + p10) * h + p9) * h + p8) * h + p7) * h + p6) * h + p5
        p = s * (((((p * h + p4) * h + p3) * h + p2) * h + p1) * h + p0)
        p = f32(1) if p > f32(1) else p
        z[n] = f32(-1) if p < f32(-1) else p


@_jit
def _signs(words, first, c, out):
    """Add c times 32 signs a word to every other 32 of `out`, from `first` on."""
    _wide()
    if out.itemsize == 4:
        bits = f32(c).view(u32)
        for n in range(len(words)):
            for j in range(32):
                bit = u32(words[n] << u32(31 - j)) & SIGN
                out[64 * n + first + j] += u32(bits ^ bit).view(f32)
    else:
        for n in range(len(words)):
            for j in range(32):
                bit = u32(words[n] << u32(31 - j)) & SIGN
                out[64 * n + first + j] += c * u32(ONE ^ bit).view(f32)


@_jit
def _two_signs(words, others, first, c, d, out):
    """`_signs` of `words` with c, then of `others` with d, for float32: one pass over `out`."""
    _wide()
    x, y = f32(c).view(u32), f32(d).view(u32)
    for n in range(len(words)):
        for j in range(32):
            a = u32(words[n] << u32(31 - j)) & SIGN
            b = u32(others[n] << u32(31 - j)) & SIGN
            v = out[64 * n + first + j] + u32(x ^ a).view(f32)
            out[64 * n + first + j] = v + u32(y ^ b).view(f32)


@_jit
def _all_signs(base, count, stream, seeds, coefficients, words, out):
    """Add the combination of all seeds' signs to `out` [count], of two seeds at a time.

    Offsets are literals: LLVM makes no vector code for an index that might be negative.
    """
    first, many, tag = u64(base // 128), count // 128, TAGS[RADEMACHER]
    even, odd = words[0, 0].view(u32)[: count // 64], words[0, 1].view(u32)[: count // 64]
    more, rest = words[1, 0].view(u32)[: count // 64], words[1, 1].view(u32)[: count // 64]
    paired = len(seeds) // 2 if out.itemsize == 4 else 0
    for k in range(0, 2 * paired, 2):
        philox(seeds[k], first, many, stream, tag, words[0])
        philox(seeds[k + 1], first, many, stream, tag, words[1])
        _two_signs(even, more, 0, coefficients[k], coefficients[k + 1], out)
        _two_signs(odd, rest, 32, coefficients[k], coefficients[k + 1], out)
    for k in range(2 * paired, len(seeds)):
        philox(seeds[k], first, many, stream, tag, words[0])
        _signs(even, 0, coefficients[k], out)
        _signs(odd, 32, coefficients[k], out)


@_jit
def _bit(even, odd, lane, c, out):
    """Add c times the sign in bit `lane` of each word to `out`."""
    _wide()
    mask = u32(1) << u32(lane)
    for n in range(len(even)):
        out[2 * n] += -c if u32(even[n] & mask) else c
        out[2 * n + 1] += -c if u32(odd[n] & mask) else c


@_jit
def _axpy(c, z, out):
    _wide()
    for n in range(len(z)):
        out[n] += c * z[n]


@_jit
def _table(c, table):
    """The 256 signed sums of each eight of 32 coefficients: `table` [4, 256]."""
    _wide()
    for byte in range(4):
        row = table[byte]
        row[0], row[1] = c[8 * byte], -c[8 * byte]
        for j in range(1, 8):
            x, half = c[8 * byte + j], 1 << j
            for v in range(half):
                row[half + v] = row[v] - x
                row[v] += x


@_jit
def _look_up(words, first, table, out):
    """Add the sum that the table has for each word to every other entry, from `first` on."""
    _wide()
    t0, t1, t2, t3 = table[0], table[1], table[2], table[3]
    byte = u32(255)
    for n in range(len(words)):
        w = words[n]
        out[2 * n + first] += (t0[w & byte] + t1[(w >> u32(8)) & byte]) + (
            t2[(w >> u32(16)) & byte] + t3[w >> u32(24)]
        )


@_jit
def _direction(basis, seed, fresh, base, count, stream, series, words, z):
    """Elements ``base .. base + count`` (multiples of 128) of one direction into `z` [count]."""
    even, odd = words[0].view(u32)[: count // 2], words[1].view(u32)[: count // 2]
    tag = TAGS[basis]
    if basis == RADEMACHER:
        philox(seed, u64(base // 128), count // 128, stream, tag, words)
        z[:] = f32(0)
        _signs(even[: count // 64], 0, f32(1), z)
        _signs(odd[: count // 64], 32, f32(1), z)
    elif basis == RADEMACHER32:  # neighbours in a pool share their words: `fresh` says whether
        if fresh:
            philox(seed >> u64(5), u64(base // 4), count // 4, stream, tag, words)
        z[:] = f32(0)
        _bit(even, odd, i32(seed & u64(31)), f32(1), z)
    else:
        philox(seed, u64(base // 4), count // 4, stream, tag, words)
        if basis == GAUSSIAN:
            _gaussian(even, odd, z)
        else:
            _uniform(even, odd, z)
            if basis == TRUNCATED:
                _truncated(z, series)


@_jit
def _combine(w, index, basis, stream, seeds, coefficients, series, words, z, total):
    end, low = index + len(w), index
    while low < end:
        high = min(end, low - low % CHUNK + CHUNK)
        base = low - low % 128
        count = (high - base + 127) // 128 * 128
        out = total[:count]
        out[:] = 0
        if basis == RADEMACHER:
            _all_signs(base, count, stream, seeds, coefficients, words, out)
        else:
            for k in range(len(seeds)):
                _direction(basis, seeds[k], True, base, count, stream, series, words[0], z[:count])
                _axpy(coefficients[k], z[:count], out)
        _axpy(f32(1), out[low - base : high - base], w[low - index : high - index])
        low = high


@_jit
def _combine_groups(w, index, stream, groups, coefficients, words, table, total):
    end, low = index + len(w), index
    while low < end:
        high = min(end, low - low % CHUNK + CHUNK)
        base = low - low % 128
        count = (high - base + 127) // 128 * 128
        out = total[:count]
        out[:] = 0
        for g in range(len(groups)):
            c = coefficients[g]
            philox(groups[g], u64(base // 4), count // 4, stream, TAGS[RADEMACHER32], words)
            even, odd = words[0].view(u32)[: count // 2], words[1].view(u32)[: count // 2]
            used, lane = 0, 0
            for j in range(32):
                if c[j] != 0:
                    used, lane = used + 1, j
            if used == 1:
                _bit(even, odd, i32(lane), c[lane], out)
            else:
                _table(c, table)
                _look_up(even, 0, table, out)
                _look_up(odd, 1, table, out)
        _axpy(f32(1), out[low - base : high - base], w[low - index : high - index])
        low = high


@_jit
def _dots(delta, index, basis, stream, seeds, series, words, z, product, fold, result):
    end, low = index + len(delta), index
    while low < end:
        high = min(end, low - low % CHUNK + CHUNK)
        base = low - low % 128
        count = (high - base + 127) // 128 * 128
        product[:] = 0
        for k in range(len(seeds)):
            fresh = k == 0 or seeds[k] >> u64(5) != seeds[k - 1] >> u64(5)
            _direction(basis, seeds[k], fresh, base, count, stream, series, words, z[:count])
            _multiply(delta[low - index : high - index], z[low - base :], product[low % CHUNK :])
            result[k] += _fold(product, fold)
        low = high


@_jit
def _multiply(x, y, out):
    _wide()
    for n in range(len(x)):
        out[n] = x[n] * y[n]


@_jit
def _fold(x, fold):
    """Sum of x [2048] by halves, three halvings at a time through `fold` [292]."""
    _eighth(x, fold[:256])
    _eighth(fold[:256], fold[256:288])
    _eighth(fold[256:288], fold[288:])
    return (fold[288] + fold[290]) + (fold[289] + fold[291])


@_jit
def _eighth(x, out):
    _wide()
    m = len(out)
    a, b, c, d = x[:m], x[m : 2 * m], x[2 * m : 3 * m], x[3 * m : 4 * m]
    e, f, g, h = x[4 * m : 5 * m], x[5 * m : 6 * m], x[6 * m : 7 * m], x[7 * m :]
    for n in range(m):
        out[n] = ((a[n] + e[n]) + (c[n] + g[n])) + ((b[n] + f[n]) + (d[n] + h[n]))


def _aligned(count: int, dtype: Any) -> NDArray[Any]:
    """An array on a 64-byte boundary: vectors that straddle cache lines cost 6 %."""
    size = count * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype)


class _Scratch(threading.local):
    """Buffers of one thread, together about 100 kB."""

    def __init__(self) -> None:
        self.words, self.z = _aligned(CHUNK, u64).reshape(2, 2, -1), _aligned(CHUNK, f32)
        self.sums = {np.dtype(t): _aligned(CHUNK, t) for t in (f32, np.float64)}
        self.tables = {t: _aligned(4 * 256, t).reshape(4, 256) for t in self.sums}
        self.folds = {t: _aligned(292, t) for t in self.sums}


_scratch = _Scratch()


def combine(w: NDArray[Any], index: int, plan: Plan) -> None:
    """Add the combination to `w` [n] in place; `index` is the flat number of its first element."""
    basis, stream, seeds, coefficients, series = plan
    words, total = _scratch.words, _scratch.sums[w.dtype]
    if basis == RADEMACHER32:
        table = _scratch.tables[w.dtype]
        _combine_groups(w, index, u64(stream), seeds, coefficients, words[0], table, total)
    else:
        buffers = words, _scratch.z, total
        _combine(w, index, basis, u64(stream), seeds, coefficients, series, *buffers)


def dots(delta: NDArray[Any], index: int, plan: Plan, total: NDArray[np.float64]) -> None:
    """Add the dot products of `delta` [n] with every direction to `total` [K], float64."""
    buffers = _scratch.words[0], _scratch.z, _scratch.sums[delta.dtype], _scratch.folds[delta.dtype]
    basis, stream, seeds, _, series = plan
    _dots(delta, index, basis, u64(stream), seeds, series, *buffers, total)
