"""Files that are either there whole or not there: write beside, sync, rename, sync the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fedsim.core.errors import RunError
from fedsim.failpoints import crash_here


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file in the folder of `path`, then rename it to `path`.

    After a crash at any moment `path` holds its old content or its new content, never a part.

    Raises:
        RunError: the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        crash_here("file.temporary")
        temporary.replace(path)
        crash_here("file.renamed")
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free the disk, mend the permissions "
            "or give another folder with --out"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON in the order given, atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has no words for.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        RunError: the file is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); run this strategy and seed again"
        ) from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object; run this strategy and seed again")
    return content


def make_folder(path: Path) -> None:
    """Create `path` and its parents.

    Raises:
        RunError: the folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make the folder {path}: {error.strerror or error}; give another with --out"
        ) from error


def remove_leftovers(*folders: Path) -> None:
    """Delete temporary files that a killed writer left in these folders, where they are there."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the folder's entries on disk, so that a rename survives a power cut."""
    if os.name == "nt":  # Windows has no handle for a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
