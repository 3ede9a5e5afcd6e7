"""Messages without a model: packed bytes in an `ArrayRecord`, as one entry of type uint8."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedsim.core.records import FlatRecord, TensorArray, to_tensor

PACKET = "packet"
"""Name of the entry."""
HEADER = struct.Struct("<IHHII")
"""Magic, version, algorithm, round, count; 16 bytes, little endian like all that follows."""
MAGIC, VERSION = 0x53444546, 1


def packet(data: bytes) -> ArrayRecord:
    """A record that carries these bytes."""
    array = np.frombuffer(data, np.uint8).copy()
    return ArrayRecord({PACKET: TensorArray(torch.from_numpy(array))})


def packet_of(record: ArrayRecord) -> bytes:
    """The bytes that `packet` put into a record.

    Raises:
        ValueError: the record holds something else.
    """
    if set(record) != {PACKET} or record[PACKET].dtype != "uint8":
        raise ValueError(f"a record of packed bytes has one entry {PACKET!r} of type uint8")
    return bytes(np.ascontiguousarray(to_tensor(record[PACKET]).cpu().numpy()).data)


class Expected(ArrayRecord):
    """Stands in `Strategy.expected` for a record of packed bytes.

    Args:
        limit: most bytes.
        check: called with the bytes; raises `ValueError` if they must not reach the strategy.
    """

    def __init__(self, limit: int, check: Callable[[bytes], object]) -> None:
        super().__init__()
        self.__dict__["limit"], self.__dict__["check"] = limit, check

    limit: int
    check: Callable[[bytes], object]


class Checked(FlatRecord):
    """Stands in `Strategy.expected` for a record of arrays that has to pass a test besides.

    Args:
        like: a record of the layout that must come.
        check: called with the record; raises `ValueError` if it must not reach the strategy.
    """

    def __init__(self, like: FlatRecord, check: Callable[[FlatRecord], object]) -> None:
        super().__init__(like.layout, like.flat, like.beside)
        self.__dict__["check"] = check

    check: Callable[[FlatRecord], object]


class Header(NamedTuple):
    """The first 16 bytes of a packet.

    Attributes:
        algorithm: which format follows.
        round: number of the round.
        items: how many items follow.
    """

    algorithm: int
    round: int
    items: int

    def pack(self) -> bytes:
        """The bytes."""
        return HEADER.pack(MAGIC, VERSION, self.algorithm, self.round, self.items)

    @staticmethod
    def read(data: bytes, algorithms: Sequence[int], round: int | None = None) -> Header:
        """The header of a packet.

        Args:
            data: the packet.
            algorithms: which ones may come.
            round: which round is expected; None: any.

        Raises:
            ValueError: it is another algorithm's, version's or round's, or no packet.
        """
        if len(data) < HEADER.size:
            raise ValueError(f"a packet of {len(data)} bytes has no header")
        magic, version, found, number, count = HEADER.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION) or found not in algorithms:
            raise ValueError(
                f"packet {magic:#x} version {version} algorithm {found}; expected "
                f"{MAGIC:#x} version {VERSION} algorithm {' or '.join(map(str, algorithms))}"
            )
        if round is not None and number != round:
            raise ValueError(f"packet of round {number}, expected round {round}")
        return Header(found, number, count)


def require_sound(values: NDArray[np.float64], what: str, largest: float) -> None:
    """Raise `ValueError` if one of the values is not finite, or beyond `largest`."""
    if not np.isfinite(values).all():
        raise ValueError(f"a {what} is NaN or infinite")
    if len(values) and np.abs(values).max() > largest:
        raise ValueError(f"a {what} is beyond {largest:g}")
