"""FedKSeed's arithmetic and wire formats, shared by its two halves.

Qin et al., *Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
Cost under 18 Kilobytes* (ICML 2024); followed as its official code has it. With a pool of K seeds,
directions z_j of the seeds and the accumulators A of all scalar gradients ever sent, the model is

    w = w0 - lr * sum_j A[j] z_j.

Packets, little endian, after the 16 bytes of a `Header`:

- down (`DOWN`): K times float32, the accumulators; for FedKSeed-Pro (`DOWN_PRO`) K times float32
  more, the probabilities. 16 + 4 K or 16 + 8 K bytes.
- up (`UP`): the client's number of minibatches in an epoch as uint32, then `items` pairs of the
  seed's place in the pool (uint16, uint32 for K > 65,536) and the scalar gradient (float32).
  20 + 6 tau bytes at most.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core import directions
from fedsim.core.packets import HEADER, Header, require_sound

DOWN, DOWN_PRO, UP = 1, 2, 3
Floats = NDArray[np.float64]
Pair = tuple[int, float]


def pair_type(pool: int) -> np.dtype[Any]:
    """One (place, scalar) on the wire, for a pool of that size."""
    return np.dtype([("place", "<u2" if pool <= 1 << 16 else "<u4"), ("scalar", "<f4")])


def pack_down(round: int, sums: Floats, probabilities: Floats | None = None) -> bytes:
    """The server's packet: the accumulators [K], and the probabilities [K] of Pro."""
    kind = DOWN if probabilities is None else DOWN_PRO
    parts = [sums] if probabilities is None else [sums, probabilities]
    body = b"".join(part.astype("<f4").tobytes() for part in parts)
    return Header(kind, round, len(sums)).pack() + body


def read_down(data: bytes, pool: int) -> tuple[Floats, Floats | None]:
    """Accumulators and probabilities of a server's packet.

    Raises:
        ValueError: it is no such packet, or one for another size of the pool.
    """
    header = Header.read(data, (DOWN, DOWN_PRO))
    columns = 2 if header.algorithm == DOWN_PRO else 1
    if header.items != pool or len(data) != HEADER.size + 4 * columns * pool:
        raise ValueError(f"{len(data)} bytes for {header.items} seeds; the pool has {pool}")
    rows = np.frombuffer(data, "<f4", offset=HEADER.size).reshape(columns, pool).astype(np.float64)
    return rows[0], rows[1] if columns == 2 else None


def chances_of(data: bytes, pool: int) -> Floats | None:
    """Probabilities [K] of a server's packet, float32 as they are scaled to 1; None: uniform."""
    _, chances = read_down(data, pool)
    return None if chances is None else chances / chances.sum()


def pack_up(round: int, minibatches: int, pairs: Sequence[Pair], pool: int) -> bytes:
    """A client's packet: what it measured along which direction."""
    body = np.array(pairs, dtype=pair_type(pool)).tobytes()
    return Header(UP, round, len(pairs)).pack() + struct.pack("<I", minibatches) + body


def most_up(pool: int, steps: int) -> int:
    """Bytes of a client's packet, at most: a pair for each step."""
    return HEADER.size + 4 + pair_type(pool).itemsize * steps


def read_up(
    data: bytes, pool: int, steps: int, round: int | None = None, largest: float = np.inf
) -> tuple[int, NDArray[np.int64], Floats]:
    """Number of minibatches, places [n] and scalars [n] of a client's packet.

    Args:
        data: the packet.
        pool: size of the pool.
        steps: most pairs that may come.
        round: the round it must answer; None: any.
        largest: largest absolute scalar gradient.

    Raises:
        ValueError: it must not be used; the message says why.
    """
    header = Header.read(data, (UP,), round)
    kind, start = pair_type(pool), HEADER.size + 4
    if header.items > steps or len(data) != start + header.items * kind.itemsize:
        raise ValueError(f"{len(data)} bytes for {header.items} pairs; {steps} steps were asked")
    (minibatches,) = struct.unpack_from("<I", data, HEADER.size)
    pairs = np.frombuffer(data, kind, offset=start)
    places, scalars = pairs["place"].astype(np.int64), pairs["scalar"].astype(np.float64)
    if len(places) and places.max() >= pool:
        raise ValueError(f"seed {places.max()} is outside the pool of {pool}")
    require_sound(scalars, "scalar gradient", largest)
    return minibatches, places, scalars


@dataclass(frozen=True)
class Recipe:
    """The model from a server's packet: ``w = w0 - lr sum_j A[j] z_j`` (A7)."""

    master: int
    pool: int
    lr: float
    basis: str

    @cached_property
    def seeds(self) -> NDArray[np.uint64]:
        """The pool, uint64 [K]."""
        return directions.pool(self.master, self.pool)

    def name(self, data: bytes) -> bytes:
        """The accumulators as sent."""
        return data[HEADER.size : HEADER.size + 4 * self.pool]

    def build(self, w: Tensor, data: bytes, held: bytes | None) -> None:
        """Add all of the accumulators to the initial model, or what changed to the one `held`."""
        sums, _ = read_down(data, self.pool)
        if held is not None:
            sums = sums - np.frombuffer(held, "<f4").astype(np.float64)
        rebuild(w, self.seeds, sums, self.lr, self.basis)


def rebuild(w: Tensor, seeds: NDArray[np.uint64], sums: Floats, lr: float, basis: str) -> None:
    """``w -= lr * sum_j sums[j] z_j`` in place, in one pass over memory (A7).

    Args:
        w: the trainable parameters, shape [d].
        seeds: the pool, uint64 [K].
        sums: accumulators [K], or their change.
        lr: learning rate.
        basis: kind of direction.
    """
    used = np.flatnonzero(sums)
    if len(used):
        directions.combine(w, seeds[used], -lr * sums[used], basis=basis)


def amplitudes(totals: Floats, counts: Floats, start: bool) -> Floats:
    """Mean absolute scalar gradient of each seed, [K]; of a seed never used 0.

    Args:
        totals: sums of absolute (clipped) scalar gradients.
        counts: how many there were.
        start: count a zero before the first, as the official code does.
    """
    return totals / np.maximum(counts + start, 1.0)


def probabilities(phi: Floats) -> Floats:
    """Chance of each direction from the amplitudes: min-max normalised, then softmax (P)."""
    low, high = phi.min(), phi.max()
    q = (phi - low) / (high + 1e-10 - low)
    weights = np.exp(q - q.max())
    return weights / weights.sum()
