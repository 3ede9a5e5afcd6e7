"""Which code this process runs."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the packages: a checkout, or what Flower unpacked of an app."""


@cache
def digest() -> str:
    """SHA-256, shortened, over the sources of fedsim, strategies and clients."""
    total = hashlib.sha256()
    for room in ("fedsim", "strategies", "clients"):
        for path in sorted((ROOT / room).rglob("*.py")):
            total.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
            total.update(path.read_bytes() + b"\0")
    return total.hexdigest()[:16]
