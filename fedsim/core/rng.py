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

SERVER = -1
"""The client number that stands for the server."""


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
