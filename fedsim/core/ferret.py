"""Ferret's arithmetic and wire formats, shared by its two halves.

Shu et al., *Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models* (arXiv
2409.06277v3). The trainable parameters are cut into L blocks of d_l elements; an update Delta_l is
sent as K_l coordinates on random bases v with entries in [-a, a], ``a = 1 / sqrt(d_l)``, of
variance rho_l (about ``1 / (3 d_l)``):

    gamma_l = V_l' Delta_l / (rho_l K_l),    Delta_l is taken for V_l gamma_l      (Eq. 8)

Packets, little endian, after the 16 bytes of a `Header`; bases are prefixes of a common pool of K
seeds, so the numbers K_l say which were used:

- up (`UP`): the client's examples as uint32, L times K_l as uint16, then all coordinates as
  float32, block after block: 20 + 2 L + 4 sum K_l bytes. `UP_HALF`: after the K_l, L scales as
  float32, and coordinates over scales as float16: 20 + 6 L + 2 sum K_l.
- down (`DOWN`): `items` sets of bases, each: number of the set as uint32, L times K_l as uint16,
  coordinates as float32.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core import directions
from fedsim.core.packets import HEADER, Header, require_sound

DOWN, UP, UP_HALF = 4, 5, 6
PREFIX = "coordinates-"
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def blocks_of(sizes: Sequence[int], multiple: float = 0.9) -> list[int]:
    """Sizes of the blocks: whole entries in their order, close to `multiple` times the median.

    A block is closed when the next entry would take it beyond that (the official code's rule).
    A `multiple` of 0 makes one block.
    """
    if not multiple:
        return [sum(sizes)]
    target = int(multiple * float(np.median(sizes)))
    blocks: list[int] = []
    for size in sizes:
        if blocks and blocks[-1] + size <= target:
            blocks[-1] += size
        else:
            blocks.append(size)
    return blocks


def counts_of(norms: Sequence[float], bases: int, budget: str = "block") -> Ints:
    """Number of bases of each block, K_l, in proportion to the norm of its update.

    Args:
        norms: of each block's update.
        bases: K.
        budget: ``"block"``: K is for the block with the largest norm (the official code);
            ``"total"``: K is for all blocks together (the paper). Each gets at least 2, or K.
    """
    norm = np.asarray(norms, np.float64)
    whole = max(norm.max(), 1e-8) if budget == "block" else max(norm.sum(), 1e-8)
    return np.clip((norm / whole * bases).astype(np.int64), min(2, bases), bases)


def factors(blocks: Sequence[int], counts: Ints, basis: str, scaling: str = "unbiased") -> Floats:
    """What dot products are multiplied by: ``1 / (rho_l K_l)``; ``"official"``: ``d_l / K_l``.

    The official code's factor is a third of the unbiased one.
    """
    if scaling == "official":
        return np.asarray(blocks, np.float64) / counts
    rho = np.array([directions.variance(basis, size) for size in blocks])
    found: Floats = 1.0 / (rho * counts)
    return found


def project(
    delta: Tensor,
    seeds: NDArray[np.uint64],
    blocks: Sequence[int],
    counts: Ints,
    basis: str = "uniform",
    scaling: str = "unbiased",
) -> Floats:
    """Coordinates of an update, [L, K] with zeros from K_l on; sums in float32 at least."""
    found = directions.dots(delta, seeds, basis=basis, blocks=blocks, counts=counts.tolist())
    scaled: Floats = found.cpu().numpy() * factors(blocks, counts, basis, scaling)[:, None]
    return scaled


def add(
    w: Tensor,
    seeds: NDArray[np.uint64],
    blocks: Sequence[int],
    coordinates: Floats,
    basis: str = "uniform",
) -> None:
    """``w_l += V_l coordinates_l`` in place, in one pass; zero coordinates cost nothing."""
    last = int(np.flatnonzero(coordinates.any(0)).max(initial=-1)) + 1
    if last:
        directions.combine(w, seeds[:last], coordinates[:, :last], basis=basis, blocks=blocks)


@dataclass(frozen=True)
class Recipe:
    """The model from a server's packet: ``w = w0 - V (sum of the coordinates)``, set by set."""

    master: int
    bases: int
    blocks: Sequence[int]
    basis: str

    def name(self, data: bytes) -> bytes:
        """The coordinates as sent, without the round's number."""
        return data[12:]

    def build(self, w: Tensor, data: bytes, held: bytes | None) -> None:
        """Add the coordinates of all rounds to the initial model."""
        for number, coordinates in read_down(data, len(self.blocks), self.bases).items():
            seeds = seeds_of(self.master, number, self.bases)
            add(w, seeds, self.blocks, -coordinates, self.basis)


def seeds_of(master: int, number: int, bases: int) -> NDArray[np.uint64]:
    """The seeds of one set of bases."""
    return directions.pool((master + number) % 2**63, bases)


def _filled(coordinates: Floats) -> Ints:
    """K_l of each block: up to its last coordinate that is not zero."""
    places = np.arange(1, coordinates.shape[1] + 1)
    filled: Ints = np.max(np.where(coordinates != 0, places, 0), axis=1).astype(np.int64)
    return filled


def _rows(coordinates: Floats, counts: Ints) -> Floats:
    return np.concatenate([row[:k] for row, k in zip(coordinates, counts, strict=True)])


def _matrix(values: Floats, counts: Ints, bases: int) -> Floats:
    out = np.zeros((len(counts), bases))
    out[np.arange(bases) < counts[:, None]] = values
    return out


def pack_up(
    round: int, examples: int, coordinates: Floats, counts: Ints, half: bool = False
) -> bytes:
    """A client's packet: its coordinates [L, K], the first K_l of each block."""
    values, scales = _rows(coordinates, counts), b""
    body = values.astype("<f4").tobytes()
    if half:
        scale = np.maximum(np.abs(coordinates).max(1), 1e-30).astype("<f4")
        scales = scale.tobytes()
        body = (values / np.repeat(scale.astype(np.float64), counts)).astype("<f2").tobytes()
    head = Header(UP_HALF if half else UP, round, len(counts)).pack() + struct.pack("<I", examples)
    return head + counts.astype("<u2").tobytes() + scales + body


def most_up(blocks: int, bases: int) -> int:
    """Bytes of a client's packet, at most: all coordinates of all blocks."""
    return HEADER.size + 4 + 2 * blocks + 4 * blocks * bases


def read_up(
    data: bytes, blocks: int, bases: int, round: int | None = None, largest: float = np.inf
) -> tuple[int, Floats]:
    """Examples and coordinates [L, K] of a client's packet.

    Args:
        data: the packet.
        blocks: L.
        bases: K.
        round: the round it must answer; None: any.
        largest: largest absolute coordinate.

    Raises:
        ValueError: it must not be used; the message says why.
    """
    header, at = Header.read(data, (UP, UP_HALF), round), HEADER.size + 4
    half = header.algorithm == UP_HALF
    start = at + 2 * blocks + (4 * blocks if half else 0)
    if header.items != blocks or len(data) < start:
        raise ValueError(f"{len(data)} bytes for {header.items} blocks; the model has {blocks}")
    counts = np.frombuffer(data, "<u2", blocks, at).astype(np.int64)
    if counts.max(initial=0) > bases:
        raise ValueError(f"{counts.max()} bases in a block; there are {bases}")
    total = int(counts.sum())
    if len(data) != start + (2 if half else 4) * total:
        raise ValueError(f"{len(data)} bytes do not hold {total} coordinates of {blocks} blocks")
    values = np.frombuffer(data, "<f2" if half else "<f4", total, start).astype(np.float64)
    if half:
        scale = np.frombuffer(data, "<f4", blocks, at + 2 * blocks).astype(np.float64)
        values = values * np.repeat(scale, counts)
    require_sound(values, "coordinate", largest)
    (examples,) = struct.unpack_from("<I", data, HEADER.size)
    return examples, _matrix(values, counts, bases)


def pack_down(round: int, sets: Mapping[int, Floats]) -> bytes:
    """The server's packet: for each set of bases its coordinates [L, K]."""
    body = b""
    for number, coordinates in sorted(sets.items()):
        counts = _filled(coordinates)
        values = _rows(coordinates, counts).astype("<f4").tobytes()
        body += struct.pack("<I", number) + counts.astype("<u2").tobytes() + values
    return Header(DOWN, round, len(sets)).pack() + body


def read_down(data: bytes, blocks: int, bases: int) -> dict[int, Floats]:
    """The sets of a server's packet.

    Raises:
        ValueError: it is no such packet, or one for another model.
    """
    header, at = Header.read(data, (DOWN,)), HEADER.size
    sets: dict[int, Floats] = {}
    for _ in range(header.items):
        if len(data) < at + 4 + 2 * blocks:
            raise ValueError(f"{len(data)} bytes do not hold {header.items} sets of coordinates")
        (number,) = struct.unpack_from("<I", data, at)
        counts = np.frombuffer(data, "<u2", blocks, at + 4).astype(np.int64)
        total, start = int(counts.sum()), at + 4 + 2 * blocks
        if counts.max(initial=0) > bases or len(data) < start + 4 * total:
            raise ValueError(f"{len(data)} bytes do not hold {header.items} sets of coordinates")
        values = np.frombuffer(data, "<f4", total, start).astype(np.float64)
        sets[number] = _matrix(values, counts, bases)
        at = start + 4 * total
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes behind the last set of coordinates")
    return sets


def number_of(fresh: str, round: int, client: int) -> int:
    """Number of the set of bases that a client uses in a round.

    Args:
        fresh: ``"fixed"``, ``"round"`` or ``"client"``.
        round: number of the round, below 2^16.
        client: partition number, below 2^16 - 1.
    """
    if fresh == "fixed":
        return 0
    return round << 16 | (client + 1 if fresh == "client" else 0)


def with_number(number: int, data: bytes) -> bytes:
    """A client's packet behind the number of its set of bases, for the ledger."""
    return struct.pack("<I", number) + data


def number_and(part: bytes) -> tuple[int, bytes]:
    """The inverse of `with_number`."""
    return struct.unpack_from("<I", part)[0], part[4:]


def named(sets: Mapping[int, Floats]) -> dict[str, Floats]:
    """The sets of coordinates under the names that they have in a record, in order."""
    return {f"{PREFIX}{number}": coordinates for number, coordinates in sorted(sets.items())}


def unnamed(found: Mapping[str, Floats]) -> dict[int, Floats]:
    """The inverse of `named`."""
    return {int(name.removeprefix(PREFIX)): coordinates for name, coordinates in found.items()}
