"""One named random stream per (seed, round, client, purpose).

No draw depends on any other draw having been made, so results do not depend on the order in which
clients run, on how often a run was killed and resumed, or on the number of workers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

SERVER = -1
"""The client number that stands for the server."""
EVERY = -2
"""The client number that stands for all clients at once (see `bits`)."""
CHUNK = 1 << 13
"""Counters that `bits` works on at a time, so that its arrays stay in the cache."""


def key(seed: int, round: int, client: int, purpose: str) -> int:
    """128-bit key of the stream: BLAKE2b over the four names.

    Args:
        seed: seed of the run, any integer of at most 64 bits.
        round: round number; 0 is the set-up before the first round.
        client: partition number of the client, or `SERVER`.
        purpose: what the numbers are for, for example ``"batches"``.
    """
    packed = struct.pack("<qqq", seed, round, client) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=16).digest(), "little")


def stream(seed: int, round: int, client: int, purpose: str) -> np.random.Generator:
    """A fresh NumPy generator (Philox4x64) at the start of the named stream."""
    return np.random.Generator(np.random.Philox(key=key(seed, round, client, purpose)))


def torch_generator(seed: int, round: int, client: int, purpose: str) -> torch.Generator:
    """A fresh CPU torch generator at the start of the named stream.

    torch's Mersenne Twister reads 64 bits of the key; use `stream` where bits must match across
    devices.
    """
    return torch.Generator().manual_seed(key(seed, round, client, purpose) & (2**63 - 1))


def bits(
    seed: int,
    round: int,
    purpose: str,
    clients: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> NDArray[np.uint64]:
    """64 random bits for every (client, position), without making a stream for every client.

    Philox4x32-10 (Salmon et al., SC 2011): the key is that of (seed, round, purpose), the counter
    is (position, client). So an entry depends on its own client and position alone, whoever else
    is asked for in the same call.

    Args:
        seed: seed of the run.
        round: round number.
        purpose: what the numbers are for.
        clients: client numbers, shape [n].
        positions: position within the client's numbers, from 0, shape [n].
    """
    out = np.empty(len(clients), np.uint64)
    half = key(seed, round, EVERY, purpose)
    for first in range(0, len(out), CHUNK):
        part = slice(first, first + CHUNK)
        counter = [_halves(a[part].astype(np.uint64)) for a in (positions, clients)]
        low, high = _philox([*counter[0], *counter[1]], (half & _MASK, half >> 32 & _MASK))
        out[part] = high << _WORD | low
    return out


_MASK, _WORD = 0xFFFFFFFF, np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85


def _halves(a: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    return a & np.uint64(_MASK), a >> _WORD


def _philox(
    counter: list[NDArray[np.uint64]], key: tuple[int, int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first two words of Philox4x32-10 of 32-bit counters held in 64-bit arrays."""
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0, k1 = (np.uint64((k + turn * w) & _MASK) for k, w in zip(key, _WEYL, strict=True))
        (low0, high0), (low1, high1) = (
            _halves(c * m) for c, m in zip((c0, c2), _MULTIPLIERS, strict=True)
        )
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator inside the block and restore its state afterwards.

    Module constructors draw their initial weights from the default generator and take no other.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed & (2**63 - 1))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
