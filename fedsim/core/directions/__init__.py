"""Seeded random directions that are never stored.

A direction is a random vector z(seed) as long as the model. FedKSeed and Ferret send seeds and
scalars instead of models, so both ends must see the same z, and a model must be rebuilt from
thousands of them. Here every element of z is computed from (seed, its number in the flat parameter
vector) alone and used where it is made: `combine` and `dots` read the weights once, however many
directions there are, and take next to no memory. No global random state is read or changed.

>>> import torch
>>> w = torch.zeros(1000)
>>> combine(w, seeds=[1, 2], coefficients=[0.5, -0.5])
>>> a, b = dots(w, seeds=[1, 2]).tolist()
>>> round((a - b) / 2 / float(w @ w), 5)
1.0

The vector may be one tensor, a list or a dict of tensors (in their order): the flat number of an
element is `offset` plus the elements before it, so z does not depend on how the model is cut into
tensors. With `blocks` (sizes that partition the vector) each block has its own directions and its
own coefficients; Ferret's bases (`uniform`, `truncated`) scale with the size of the block.

`layout` defines every bit. Back ends, chosen by `backend`: numpy (the reference), numba (CPU),
torch (any device, without numba or triton; slow), triton (CUDA). numpy, numba and torch on the CPU
give equal bits, `combine` and `dots`, with any number of threads and any cut of the work; `combine`
also however the model is cut into tensors, `dots` then up to rounding. The integers, and so the
values of all but `gaussian` and `truncated`, are equal on every back end. See `cuda` for triton.

Half precision weights are summed in float32 and rounded once. float64 weights get the same float32
directions, summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError
from .arrays import words
from .calls import SHARE, Call, Vector, backend, cut, to_seeds
from .layout import CODES, POOL_TAG, Plan, scale, variance

__all__ = [
    "BASES",
    "Draws",
    "Vector",
    "backend",
    "combine",
    "count_draws",
    "dots",
    "perturb",
    "pool",
    "sample",
    "variance",
]

BASES = tuple(CODES)
"""The kinds of direction; `layout` defines them."""


def combine(
    w: Vector,
    seeds: ArrayLike,
    coefficients: ArrayLike | torch.Tensor,
    *,
    basis: str = "gaussian",
    blocks: Sequence[int] | None = None,
    offset: int = 0,
    backend: str | None = None,
    threads: int | None = None,
) -> None:
    """Add ``sum_k coefficients[k] z(seeds[k])`` to `w`, in place, in one pass over memory.

    Zero coefficients cost nothing and change nothing; all zero leaves the bits of `w` alone.

    Args:
        w: contiguous tensor(s) of one device, float16, bfloat16, float32 or float64.
        seeds: K integers in [0, 2^64). `rademacher32` is fast where they come from `pool`.
        coefficients: [K], or with `blocks` [L, K] (zero: that block goes without that direction).
        basis: one of `BASES`.
        blocks: L sizes that cover the whole vector, of which `w` is the part at `offset`.
            Default: one block that ends where `w` ends.
        offset: number of the first element of `w` in the whole vector.
        backend: overrides the choice of `backend`; for tests and comparisons.
        threads: threads for numba; default torch's own number. Does not change bits.

    Raises:
        ConfigError: wrong type, dtype, shape, layout, device, seed, coefficient, basis, back end.
    """
    call = Call("combine", w, seeds, basis, blocks, offset, backend)
    rows = _numbers(coefficients)
    shape = (len(call.seeds),) if blocks is None else (len(call.sizes), len(call.seeds))
    if rows.shape != shape:
        raise ConfigError(
            f"combine: coefficients have shape {rows.shape}; with these seeds"
            f"{'' if blocks is None else ' and blocks'} give {shape}"
        )
    places = [x.data_ptr() for x in call.tensors if x.numel()]
    if len(set(places)) < len(places):
        raise ConfigError("combine: w lists the same memory twice; list tied weights once")
    rows = rows.reshape(len(call.sizes), len(call.seeds))
    plans: dict[tuple[int, bool], Plan | None] = {}
    threads = threads or torch.get_num_threads()
    tasks: list[Callable[[], None]] = []
    draws = 0
    for part in call.parts:
        key = part.block, part.x.dtype == torch.float64
        if key not in plans:
            plans[key] = call.combination(part.block, rows[part.block], key[1])
        plan = plans[key]
        if plan is not None:
            draws += part.x.numel() * int(np.count_nonzero(rows[part.block]))
            step = max(part.x.numel() // (4 * threads), SHARE)
            tasks += [partial(_add, call, *piece, plan) for piece in cut(part.x, part.start, step)]
    call.run(tasks, threads, draws)
    for x in call.tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
    _count(draws)


def _numbers(coefficients: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
    if isinstance(coefficients, torch.Tensor):
        coefficients = coefficients.detach().double().cpu().numpy()
    try:
        rows = np.asarray(coefficients, dtype=np.float64)
    except (TypeError, ValueError):
        rows = np.full(1, np.nan)
    if not np.isfinite(rows).all():
        raise ConfigError("combine: a coefficient is not a finite number; it would spoil all of w")
    return rows


def _add(call: Call, x: torch.Tensor, index: int, plan: Plan) -> None:
    for piece, start in cut(x, index, call.limit(x)):
        wide = piece.float() if call.copies(piece) else piece
        call.engine.combine(call.native(wide), start, plan)
        if wide is not piece:
            piece.copy_(wide)


def dots(
    delta: Vector,
    seeds: ArrayLike,
    *,
    basis: str = "gaussian",
    blocks: Sequence[int] | None = None,
    counts: Sequence[int] | None = None,
    offset: int = 0,
    backend: str | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Dot products ``<delta, z(seeds[k])>``: the adjoint of `combine`.

    Args:
        delta: as `w` of `combine`; not changed.
        seeds: as in `combine`.
        basis: as in `combine`.
        blocks: as in `combine`.
        counts: how many directions each block uses: block l takes the first ``counts[l]`` seeds
            (Ferret's K_l). Default: all.
        offset: as in `combine`.
        backend: as in `combine`.
        threads: as in `combine`.

    Returns:
        float64 [K], or with `blocks` [L, K] with zeros past ``counts[l]``, on delta's device.

    Raises:
        ConfigError: as `combine`.
    """
    call = Call("dots", delta, seeds, basis, blocks, offset, backend)
    limits = [len(call.seeds)] * len(call.sizes) if counts is None else [int(c) for c in counts]
    if len(limits) != len(call.sizes) or not all(0 <= c <= len(call.seeds) for c in limits):
        raise ConfigError(
            f"dots: counts are {counts}; give each of the {len(call.sizes)} blocks "
            f"a number from 0 to {len(call.seeds)}, the number of seeds"
        )
    threads = threads or torch.get_num_threads()
    result = torch.zeros(len(limits), len(call.seeds), dtype=torch.float64, device=call.device)
    draws = 0
    for part in call.parts:
        count = limits[part.block]
        plan, total = call.directions(part.block, count), result[part.block, :count]
        share = max(1, -(-count // threads))
        for x, index in cut(part.x, part.start, call.limit(part.x)):
            tasks: list[Callable[[], None]] = []
            wide = call.native(x.float() if call.copies(x) else x)
            for k in range(0, count, share):
                some = plan._replace(seeds=plan.seeds[k : k + share])
                into = call.native(total[k : k + share])
                tasks.append(partial(call.engine.dots, wide, index, some, into))
            call.run(tasks, threads, x.numel() * count)
        draws += part.x.numel() * count
    _count(draws)
    scales = [scale(call.code, size) for size in call.sizes]
    result *= torch.tensor(scales, dtype=torch.float64).to(call.device).reshape(-1, 1)
    return result[0] if blocks is None else result


def perturb(w: Vector, seed: int, scale: float, **options: Any) -> None:
    """Add ``scale * z(seed)`` to `w` in place: one walk of a zeroth-order step.

    `options` are those of `combine`. Adding and taking away leaves rounding behind; where exact
    restoring matters, keep a copy.
    """
    blocks = options.get("blocks")
    combine(w, [seed], [scale] if blocks is None else [[scale]] * len(blocks), **options)


def sample(seed: int, size: int, **options: Any) -> torch.Tensor:
    """`size` elements of one direction (from `offset` on) as float32 [size]: for looking at."""
    z = torch.zeros(size)
    perturb(z, seed, 1.0, **options)
    return z


def pool(master: int, size: int) -> NDArray[np.uint64]:
    """`size` distinct seeds derived from one number: what a pool of directions costs to send.

    Group g of 32 seeds is ``32 b + 0 .. 31``, b the upper 59 bits of words 0 (low) and 1 of Philox
    counter ``(g, 0, 0, 5)`` under the key `master`; a b seen before is skipped. So `rademacher32`
    finds whole groups, and a shorter pool is a prefix of a longer one of the same master.
    """
    key, counter = int(to_seeds([master])[0]), 0
    groups: dict[int, None] = {}
    while 32 * len(groups) < size:
        low, high = words(np.zeros(0), key, 0, POOL_TAG, 4 * counter, 2).tolist()
        groups[(low | high << 32) >> 5] = None
        counter += 1
    return np.array([32 * b + j for b in groups for j in range(32)][:size], dtype=np.uint64)


class Draws:
    """How many elements of directions were made: elements times directions."""

    total: int = 0


_counter: ContextVar[Draws | None] = ContextVar("draws", default=None)


@contextmanager
def count_draws() -> Iterator[Draws]:
    """Count the draws made inside the ``with`` block; `total` of what it gives holds them."""
    token = _counter.set(draws := Draws())
    try:
        yield draws
    finally:
        _counter.reset(token)


def _count(draws: int) -> None:
    counter = _counter.get()
    if counter is not None:
        counter.total += draws
