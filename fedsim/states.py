"""Files of clients' states, of which one client's can be read without the others.

Safetensors with an entry for each client: the bytes that `fedsim.core.packing.pack` made of its
state. Files are put together from new states and from pieces of older files, a piece at a time, so
that the memory this takes does not grow with the number of clients.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 22
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class Piece:
    """A client's packed state in a file.

    Attributes:
        path: of the file.
        offset: where it begins, in bytes.
        length: in bytes.
    """

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """The packed state. Raises `OSError` if the file has gone or was cut off."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) < self.length:
            raise OSError(f"{self.path} ends before byte {self.offset + self.length}")
        return data


Part = bytes | Piece
"""A packed state, or where it is."""


def digest(data: bytes = b"") -> hashlib.blake2b:
    """The digest that a checkpoint's files carry in their names."""
    return hashlib.blake2b(data, digest_size=16)


def digest_of(path: Path) -> str:
    """Hex digest of a file, read a piece at a time."""
    state = digest()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            state.update(data)
    return state.hexdigest()


def pieces(path: Path) -> dict[str, Piece]:
    """Where each client's state is in a file.

    Raises:
        ValueError: the file was not made by `write`.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} holds no states")
        header = json.loads(file.read(size))
    return {
        client: Piece(path, 8 + size + entry["data_offsets"][0], entry["shape"][0])
        for client, entry in header.items()
    }


def write(file: BinaryIO, parts: Mapping[str, Part]) -> str:
    """Fill a file with states.

    Args:
        file: where to write.
        parts: packed states by client.

    Returns:
        the file's hex digest.
    """
    header, end = {}, 0
    for client, part in parts.items():
        length = part.length if isinstance(part, Piece) else len(part)
        header[client] = {"dtype": "U8", "shape": [length], "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    state = digest()
    for data in _content(text, parts):
        file.write(data)
        state.update(data)
    return state.hexdigest()


def _content(header: bytes, parts: Mapping[str, Part]) -> Iterator[bytes]:
    yield len(header).to_bytes(8, "little") + header
    for part in parts.values():
        yield part.read() if isinstance(part, Piece) else part
