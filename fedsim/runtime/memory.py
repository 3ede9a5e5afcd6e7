"""What becomes of memory: what the C library keeps of it, and how large its pages are."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

from torch import Tensor

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


def large_pages(tensor: Tensor) -> Tensor:
    """The tensor itself, to which nobody has written yet, on pages of 2 MiB if there are any.

    With pages of 4 KiB a block of large models takes more of them than a core has in its tables.
    Nothing happens where the system has no such pages or gives them by itself.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if madvise is not None and advice is not None and tensor.device.type == "cpu":
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - first
        if size > 0:
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)
    return tensor
