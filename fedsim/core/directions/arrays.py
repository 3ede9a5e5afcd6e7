"""The directions in plain array operations: the numpy reference and the torch fallback.

One text for both libraries: integers are int64 arrays that hold 32-bit words, so that every
operator means the same in numpy and in torch, on any device. Slow and obviously right: the compiled
back ends are tested against it. `combine` gives the same bits in numpy and torch on a CPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from .layout import (
    CHUNK,
    COS,
    GAUSSIAN,
    LOG,
    MASK,
    MULTIPLIERS,
    RADEMACHER,
    RADEMACHER32,
    ROUNDS,
    SIN,
    SQRT_HALF_BITS,
    TAGS,
    TRUNCATED,
    TWO_LN2,
    WEYL,
    Plan,
)

PIECE = 1 << 16
"""Elements worked on at a time, a multiple of CHUNK; temporaries take about 100 bytes each."""

Array = Any


def combine(w: Array, index: int, plan: Plan) -> None:
    """Add the combination to `w` [n] in place; `index` is the flat number of its first element."""
    total = w * 0
    if plan.basis == RADEMACHER32:
        for group, row in zip(plan.seeds, plan.coefficients.tolist(), strict=True):
            word = words(w, int(group), plan.stream, TAGS[RADEMACHER32], index, len(w))
            parts = []
            for byte in range(0, 32, 8):
                part = row[byte] * _sign(w, word >> byte)
                for bit in range(byte + 1, byte + 8):
                    part = part + row[bit] * _sign(w, word >> bit)
                parts.append(part)
            total += (parts[0] + parts[1]) + (parts[2] + parts[3])
    else:
        for seed, coefficient in zip(plan.seeds, plan.coefficients.tolist(), strict=True):
            total += coefficient * _as(w, direction(w, int(seed), index, plan))
    w += total


def dots(delta: Array, index: int, plan: Plan, total: Array) -> None:
    """Add the dot products of `delta` [n] with every direction to `total` [K], float64."""
    before = index % CHUNK
    padded = _zeros(delta, -(-(before + len(delta)) // CHUNK) * CHUNK)
    xp = _module(delta)
    for k, seed in enumerate(plan.seeds):
        padded[before : before + len(delta)] = delta * _as(
            delta, direction(delta, int(seed), index, plan)
        )
        part, half = padded.reshape(-1, CHUNK), CHUNK // 2
        while half:
            part, half = part[:, :half] + part[:, half:], half // 2
        double = np.float64 if xp is np else torch.float64
        total[k] = xp.cumsum(xp.concatenate((total[k : k + 1], _to(part[:, 0], double))), 0)[-1]


def direction(like: Array, seed: int, index: int, plan: Plan) -> Array:
    """Elements ``index .. index + len(like)`` of one direction with a = 1, float32."""
    basis, count, xp = plan.basis, len(like), _module(like)
    tag = TAGS[basis]
    if basis == RADEMACHER:
        first, last = index // 32, -(-(index + count) // 32)
        word = words(like, seed, plan.stream, tag, first, last - first)
        bits = word.reshape(-1, 1) >> _range(like, 0, 32)
        return _sign(like, bits.reshape(-1)[index - 32 * first :][:count])
    if basis == RADEMACHER32:
        word = words(like, seed // 32, plan.stream, tag, index, count)
        return _sign(like, word >> (seed % 32))
    if basis == GAUSSIAN:
        first, last = index // 2 * 2, (index + count + 1) // 2 * 2
        word = words(like, seed, plan.stream, tag, first, last - first)
        pairs = xp.stack(box_muller(xp, word[0::2], word[1::2]), -1)
        return pairs.reshape(-1)[index - first :][:count]
    word = words(like, seed, plan.stream, tag, index, count)
    s = _float(((word >> 8) - 2**23) * 2 + 1) * 2.0**-24
    if basis != TRUNCATED:
        return s
    return (s * _horner(plan.series.tolist(), s * s)).clip(-1.0, 1.0)


def box_muller(xp: ModuleType, x: Array, y: Array) -> tuple[Array, Array]:
    """Two standard normals from two words, by the recipe of `layout`."""
    i = _bits(_float(x) + 1.0)
    e = (i - SQRT_HALF_BITS) >> 23
    f = _from_bits(i - (e << 23)) - 1.0
    f = xp.where(e == 32, _float(MASK - x) * -(2.0**-32), f)
    r = _sqrt(_float(32 - e) * TWO_LN2 + f * _horner(LOG, f))
    y = (y + (1 + 2**29)) & MASK
    s = _float((y & (2**30 - 1)) - 2**29) * 2.0**-29
    h = s * s
    sin, cos = _horner(SIN, h) * s, _horner(COS, h)
    odd = ((y >> 30) & 1) == 1
    sin, cos = xp.where(odd, cos, sin), xp.where(odd, sin, cos)
    cos = xp.where((((y >> 30) + 1) & 2) == 2, -cos, cos)
    sin = xp.where(((y >> 30) & 2) == 2, -sin, sin)
    return r * cos, r * sin


def words(like: Array, key: int, stream: int, tag: int, first: int, count: int) -> Array:
    """Words ``first .. first + count`` of a stream of four words a counter, int64 in [0, 2^32)."""
    start, stop = first // 4, -(-(first + count) // 4)
    counter = _range(like, start, stop)
    out = philox(
        (counter & MASK, counter >> 32, counter * 0 + stream, counter * 0 + tag),
        (key & MASK, key >> 32),
    )
    return _module(like).stack(out, -1).reshape(-1)[first - 4 * start :][:count]


def philox(counter: tuple[Array, ...], key: tuple[int, int]) -> tuple[Array, ...]:
    """Philox4x32-10 of four arrays (or ints) of 32-bit counters, two 32-bit keys."""
    c0, c1, c2, c3 = counter
    for turn in range(ROUNDS):
        k0, k1 = ((k + turn * w) & MASK for k, w in zip(key, WEYL, strict=True))
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _multiply(a: int, b: Array) -> tuple[Array, Array]:
    """High and low word of a 32 x 32 bit product, by 16-bit halves: no signed overflow."""
    low = b * (a & 0xFFFF)
    middle = b * (a >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _horner(coefficients: Any, x: Array) -> Array:
    out = x * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        out = out * x + c
    return out


def _sqrt(x: Array) -> Array:
    """Correctly rounded: torch's own may miss the last bit, through double it does not."""
    return np.sqrt(x) if isinstance(x, np.ndarray) else x.double().sqrt().float()


def _module(like: Array) -> ModuleType:
    return np if isinstance(like, np.ndarray) else torch


def _to(x: Array, dtype: Any) -> Array:
    return x.astype(dtype) if isinstance(x, np.ndarray) else x.to(dtype)


def _as(like: Array, x: Array) -> Array:
    return _to(x, like.dtype)


def _float(x: Array) -> Array:
    return _to(x, np.float32 if isinstance(x, np.ndarray) else torch.float32)


def _bits(x: Array) -> Array:
    numpy = isinstance(x, np.ndarray)
    return _to(x.view(np.int32 if numpy else torch.int32), np.int64 if numpy else torch.int64)


def _from_bits(x: Array) -> Array:
    if isinstance(x, np.ndarray):
        return x.astype(np.int32).view(np.float32)
    return x.to(torch.int32).view(torch.float32)


def _sign(like: Array, word: Array) -> Array:
    return _as(like, 1 - 2 * (word & 1))


def _range(like: Array, start: int, stop: int) -> Array:
    if isinstance(like, np.ndarray):
        return np.arange(start, stop, dtype=np.int64)
    return torch.arange(start, stop, dtype=torch.int64, device=like.device)


def _zeros(like: Array, count: int) -> Array:
    if isinstance(like, np.ndarray):
        return np.zeros(count, dtype=like.dtype)
    return torch.zeros(count, dtype=like.dtype, device=like.device)
