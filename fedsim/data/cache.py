"""Arrays that are slow to make, kept on disk: a cache, so that losing it costs only time."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Arrays = Mapping[str, np.ndarray]


def folder() -> Path:
    """``$FEDSIM_CACHE``, else ``$XDG_CACHE_HOME/fedsim``, else ``~/.cache/fedsim``."""
    if own := os.environ.get("FEDSIM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedsim"


def arrays(key: str, make: Callable[[], Arrays]) -> dict[str, np.ndarray]:
    """The arrays stored under `key`, or those of `make()`, which are then stored.

    A file is replaced whole, so that readers see the old or the new one. A damaged file (its zip
    checksums fail) is made anew; a folder that cannot be written only means no cache.

    Args:
        key: digest of everything the arrays depend on; the file's name.
        make: called when there is no sound file.
    """
    path = folder() / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        made = dict(make())
    with contextlib.suppress(OSError):
        _write(path, made)
    return made


def _write(path: Path, made: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out:
            np.savez(out, **made)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
