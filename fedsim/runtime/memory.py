"""What the C library does with memory that was given back."""

from __future__ import annotations

import ctypes
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
KEPT, MAPPED = 1 << 29, 1 << 25
"""Bytes at the end of a heap that stay there, and of a block that is mapped by itself (the most
that glibc takes)."""


@cache
def keep_freed() -> None:
    """Let freed memory stay with the process, whose next step asks for it again.

    By default glibc returns a step's activations to the kernel, which hands them out again page by
    page, filled with zeros: a fifth of the time of a small CNN. Nothing happens elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(MMAP_THRESHOLD, MAPPED)
