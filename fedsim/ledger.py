"""The ledger of a run: what every round added, for strategies whose model follows from that alone.

One file of entries, appended and fsynced before the checkpoint of the round: round and length
(uint32 each), digest (BLAKE2b, 16 bytes), content. Checkpoints may be lost; from the ledger the
model is made again, bit for bit (`fedsim.rebuild`).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from fedsim.core.errors import RunError

_HEAD = struct.Struct("<II16s")


class Ledger:
    """The ledger file of one run.

    Args:
        path: of the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entries: Iterable[tuple[int, bytes]]) -> None:
        """Add (round, content) entries, durably."""
        data = b"".join(_HEAD.pack(n, len(c), _digest(n, c)) + c for n, c in entries)
        if not data:
            return
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error}") from None

    def entries(self) -> list[tuple[int, bytes]]:
        """All entries.

        Raises:
            RunError: the file is damaged or cut off, at any byte.
        """
        found: list[tuple[int, bytes]] = []
        at = 0
        data = self.path.read_bytes() if self.path.exists() else b""
        while at < len(data):
            size = len(data) - at
            number, length, digest = (
                _HEAD.unpack_from(data, at) if size >= _HEAD.size else (0, 0, b"")
            )
            content = data[at + _HEAD.size : at + _HEAD.size + length]
            if len(content) < length or _digest(number, content) != digest:
                raise RunError(
                    f"{self.path} is damaged at byte {at}, after {len(found)} whole entries"
                )
            found.append((number, content))
            at += _HEAD.size + length
        return found

    def keep_until(self, round: int) -> None:
        """Drop entries of later rounds, and whatever a crash left half written behind them."""
        data = self.path.read_bytes() if self.path.exists() else b""
        at = 0
        while at + _HEAD.size <= len(data):
            number, length, _ = _HEAD.unpack_from(data, at)
            if number > round or at + _HEAD.size + length > len(data):
                break
            at += _HEAD.size + length
        if at < len(data):
            os.truncate(self.path, at)


def _digest(number: int, content: bytes) -> bytes:
    return hashlib.blake2b(struct.pack("<I", number) + content, digest_size=16).digest()
