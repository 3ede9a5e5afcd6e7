# mypy: disable-error-code="no-untyped-def"
"""The directions as Triton kernels for CUDA.

A program makes a tile of a direction, [rows, columns] in the order of the elements, and adds it up
in registers. `combine` reads and writes the weights once; `dots` reads delta once a direction (from
the second-level cache: neighbouring programs share it). No launch waits for the device.

The arithmetic is that of `layout`, with contraction switched off and correctly rounded square
roots, so `combine` should give the bits of the CPU back ends; `dots` sums in another order (float32
over at most 1024 terms a lane, then float64) and agrees to rounding. What was checked: the values,
in Triton's interpreter on a CPU (bfloat16 only roughly: the interpreter cuts where it should
round), and the code that Triton makes for compute capability 9.0: no fused multiply-add, no
approximate square root, no spilled register. The kernels were never run on a GPU: neither equal
bits nor speed is claimed there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from . import layout
from .layout import Plan

TWO_LN2, SQRT_HALF = tl.constexpr(layout.TWO_LN2), tl.constexpr(layout.SQRT_HALF_BITS)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (tl.constexpr(c) for c in layout.LOG)
S0, S1, S2, S3 = (tl.constexpr(c) for c in layout.SIN)
C0, C1, C2, C3, C4 = (tl.constexpr(c) for c in layout.COS)
GAUSSIAN, TRUNCATED = tl.constexpr(layout.GAUSSIAN), tl.constexpr(layout.TRUNCATED)
RADEMACHER, RADEMACHER32 = tl.constexpr(layout.RADEMACHER), tl.constexpr(layout.RADEMACHER32)
SERIES, ROUNDS = tl.constexpr(layout.SERIES), tl.constexpr(layout.ROUNDS)

TILES = 1024
"""Tiles that one program of `dots` walks."""

OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def _tile(basis: int) -> tuple[int, int]:
    """Rows and columns of a tile: words of 32 signs, or counters of four words."""
    return (128, 32) if basis == layout.RADEMACHER else (256, 4)


@triton.jit
def _words(key, first, stream, TAG: tl.constexpr, COUNT: tl.constexpr):
    """The four words of counters ``first .. first + COUNT``: four times uint32 [COUNT]."""
    counter = first + tl.arange(0, COUNT)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(c0)
    return tl.philox(key, c0, c1, zero + stream.to(tl.uint32), zero + TAG, ROUNDS)


@triton.jit
def _join(a, b, c, d):
    """Four columns as a tile [rows, 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4])


@triton.jit
def _sign(bits):
    """+1 for an even number, -1 for an odd one."""
    return (0x3F800000 ^ (bits << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _normal(x, y):
    t = x.to(tl.float32) + 1.0
    i = t.to(tl.int32, bitcast=True)
    e = (i - SQRT_HALF) >> 23
    f = (i - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(e == 32, (~x).to(tl.float32) * -2.3283064365386963e-10, f)
    p = (((((((L8 * f + L7) * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    r = tl.sqrt_rn((32 - e).to(tl.float32) * TWO_LN2 + f * p)
    y = y + 0x20000001
    s = ((y & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 1.862645149230957e-09
    h = s * s
    sin = (((S3 * h + S2) * h + S1) * h + S0) * s
    cos = (((C4 * h + C3) * h + C2) * h + C1) * h + C0
    odd = (y & 0x40000000) != 0
    a, b = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return r * a * _sign((y + 0x40000000) >> 31), r * b * _sign(y >> 31)


@triton.jit
def _value(word, series, BASIS: tl.constexpr):
    """Elements of the uniform and truncated bases."""
    s = (((word >> 8).to(tl.int32) - 8388608) * 2 + 1).to(tl.float32) * 5.960464477539063e-08
    if BASIS == TRUNCATED:
        h = s * s
        p = tl.load(series + SERIES - 1) * h + tl.load(series + SERIES - 2)
        for k in tl.static_range(SERIES - 2):
            p = p * h + tl.load(series + (SERIES - 3 - k))
        s = tl.minimum(tl.maximum(s * p, -1.0), 1.0)
    return s


@triton.jit
def _columns(seed, start, stream, series, BASIS: tl.constexpr, TAG: tl.constexpr, N: tl.constexpr):
    """4 N elements of a direction from number `start` on, as four columns [N]."""
    if BASIS == RADEMACHER32:
        key = seed.to(tl.uint64)
        a, b, c, d = _words(key >> 5, start // 4, stream, TAG, N)
        lane = (key & 31).to(tl.uint32)
        return _sign(a >> lane), _sign(b >> lane), _sign(c >> lane), _sign(d >> lane)
    a, b, c, d = _words(seed, start // 4, stream, TAG, N)
    if BASIS == GAUSSIAN:
        z0, z1 = _normal(a, b)
        z2, z3 = _normal(c, d)
        return z0, z1, z2, z3
    z0, z1 = _value(a, series, BASIS), _value(b, series, BASIS)
    return z0, z1, _value(c, series, BASIS), _value(d, series, BASIS)


@triton.jit
def _signs(seed, start, stream, TAG: tl.constexpr, ROWS: tl.constexpr):
    """A tile [ROWS, 32] of the rademacher basis from number `start` on."""
    a, b, c, d = _words(seed, start // 128, stream, TAG, ROWS // 4)
    word = tl.reshape(_join(a, b, c, d), [ROWS, 1])
    return _sign(word >> tl.arange(0, 32).to(tl.uint32)[None, :])


@triton.jit
def _byte(word, row, BYTE: tl.constexpr):
    """Sum of the eight coefficients ``row[8 BYTE ..]`` with the signs of that byte of `word`."""
    part = tl.load(row + 8 * BYTE) * _sign(word >> (8 * BYTE))
    for bit in tl.static_range(1, 8):
        part += tl.load(row + (8 * BYTE + bit)) * _sign(word >> (8 * BYTE + bit))
    return part


@triton.jit
def _group(word, row):
    low = _byte(word, row, 0) + _byte(word, row, 1)
    return low + (_byte(word, row, 2) + _byte(word, row, 3))


@triton.jit
def _places(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit(do_not_specialize=["stream", "count"])
def _combine(
    w,
    size,
    index,
    stream,
    seeds,
    coefficients,
    count,
    series,
    BASIS: tl.constexpr,
    TAG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program p: the p-th tile of the vector, all directions."""
    start = index // 128 * 128 + tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS)
    dtype: tl.constexpr = coefficients.dtype.element_ty
    if BASIS == RADEMACHER:
        total = tl.zeros([ROWS, COLUMNS], dtype)
        for k in range(count):
            z = _signs(tl.load(seeds + k), start, stream, TAG, ROWS)
            total += tl.load(coefficients + k) * z.to(dtype)
    else:
        t0, t1 = tl.zeros([ROWS], dtype), tl.zeros([ROWS], dtype)
        t2, t3 = t0, t1
        for k in range(count):
            seed = tl.load(seeds + k)
            if BASIS == RADEMACHER32:
                a, b, c, d = _words(seed, start // 4, stream, TAG, ROWS)
                row = coefficients + 32 * k
                t0, t1 = t0 + _group(a, row), t1 + _group(b, row)
                t2, t3 = t2 + _group(c, row), t3 + _group(d, row)
            else:
                a, b, c, d = _columns(seed, start, stream, series, BASIS, TAG, ROWS)
                x = tl.load(coefficients + k)
                t0, t1 = t0 + x * a.to(dtype), t1 + x * b.to(dtype)
                t2, t3 = t2 + x * c.to(dtype), t3 + x * d.to(dtype)
        total = _join(t0, t1, t2, t3)
    place = start - index + _places(ROWS, COLUMNS)
    inside = (place >= 0) & (place < size)
    old = tl.load(w + place, mask=inside, other=0.0)
    tl.store(w + place, (old.to(total.dtype) + total).to(old.dtype), mask=inside)


@triton.jit(do_not_specialize=["stream", "count"])
def _dots(
    delta,
    size,
    index,
    stream,
    seeds,
    count,
    series,
    result,
    BASIS: tl.constexpr,
    TAG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Program (k, p): the dot product of direction k with the p-th span of tiles."""
    k, span = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seed = tl.load(seeds + k)
    total = tl.zeros([ROWS, COLUMNS], tl.float64 if DOUBLE else tl.float32)
    first = index // 128 * 128 + span * (SPAN * ROWS * COLUMNS)
    tiles = tl.cdiv(index - first + size, ROWS * COLUMNS)
    for tile in range(tl.minimum(tiles, SPAN)):
        start = first + tile * (ROWS * COLUMNS)
        if BASIS == RADEMACHER:
            z = _signs(seed, start, stream, TAG, ROWS)
        else:
            a, b, c, d = _columns(seed, start, stream, series, BASIS, TAG, ROWS)
            z = _join(a, b, c, d)
        place = start - index + _places(ROWS, COLUMNS)
        x = tl.load(delta + place, mask=(place >= 0) & (place < size), other=0.0)
        total += x.to(total.dtype) * z.to(total.dtype)
    tl.store(result + span * count + k, tl.sum(total.to(tl.float64)))


def combine(w: torch.Tensor, index: int, plan: Plan) -> None:
    """Add the combination to `w` [n] in place; `index` is the flat number of its first element."""
    rows, columns = _tile(plan.basis)
    seeds, coefficients, series = _to_device(w, plan)
    _combine[(_tiles(w, index, rows * columns),)](
        *(w, w.numel(), index, plan.stream, seeds, coefficients, len(seeds), series),
        *(plan.basis, layout.TAGS[plan.basis], rows, columns),
        **OPTIONS,
    )


def dots(delta: torch.Tensor, index: int, plan: Plan, total: torch.Tensor) -> None:
    """Add the dot products of `delta` [n] with every direction to `total` [K], float64."""
    rows, columns = _tile(plan.basis)
    spans, count = -(-_tiles(delta, index, rows * columns) // TILES), len(plan.seeds)
    if not count:
        return
    seeds, _, series = _to_device(delta, plan)
    result = torch.empty(spans, count, dtype=torch.float64, device=delta.device)
    _dots[(count, spans)](
        *(delta, delta.numel(), index, plan.stream, seeds, count, series, result),
        *(plan.basis, layout.TAGS[plan.basis], rows, columns),
        *(TILES, delta.dtype == torch.float64),
        **OPTIONS,
    )
    total += result.sum(0)


def _tiles(x: torch.Tensor, index: int, size: int) -> int:
    return -(-(index % 128 + x.numel()) // size)


def _to_device(x: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, ...]:
    arrays = plan.seeds.view(np.int64), plan.coefficients, plan.series.copy()
    return tuple(torch.from_numpy(a).to(x.device, non_blocking=True) for a in arrays)
