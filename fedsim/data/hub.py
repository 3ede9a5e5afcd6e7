"""Hugging Face datasets, from a local path or from the hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import numpy as np

from fedsim.core.errors import DataError
from fedsim.data.arguments import require
from fedsim.data.raw import RawData, next_character, supervised

_INPUTS = ("x", "image", "img", "pixel_values", "features", "text", "content")
_TARGETS = ("y", "label", "labels", "target", "fine_label", "class")
_ROLES = ("role", "character", "speaker", "player", "character_id", "name")
_TEXTS = ("text", "line", "speech", "dialogue", "content", "x")


def huggingface(
    path: str,
    config: str | None = None,
    split: str = "train",
    test_split: str | None = "test",
    x: str | None = None,
    y: str | None = None,
    client: str | None = None,
    length: int = 80,
    limit: int | None = None,
) -> RawData:
    """Any Hugging Face dataset: images or numbers with labels, or text (next character).

    Args:
        path: local folder (saved dataset, or csv, json, parquet, image files), local file, or an id
            on the hub.
        config: name of the dataset's configuration.
        split: split that is dealt to the clients.
        test_split: split for the central test set; ignored if the dataset has none of that name.
        x: column of inputs; found by its usual names if None. Text makes a next-character task.
        y: column of targets, likewise. Beside text it becomes the extra field ``"label"``.
        client: column of natural client ids.
        length: characters per example of text.
        limit: use only the first so many rows of each split.
    """
    where = f"data.dataset.path = {path!r}"
    splits = _open(path, config, where)
    if split not in splits:
        raise DataError(f"data.dataset.split = {split!r} is none of: {', '.join(splits)}")
    parts = [splits[split]]
    if test_split and test_split != split and test_split in splits:
        parts.append(splits[test_split])
    if limit is not None:
        parts = [p.select(range(min(limit, len(p)))) for p in parts]
    columns = parts[0].column_names
    x = _column("x", x, _INPUTS, columns)
    ids = None
    if client is not None:
        _column("client", client, (), columns)
        # Test rows belong to nobody; they are given any id.
        ids = np.array([*parts[0][client], *[parts[0][client][0]] * sum(map(len, parts[1:]))])
    if _is_text(parts[0], x):
        label = y or next((c for c in _TARGETS if c in columns and c != x), None)
        return _text(path, parts, x, label, ids, length)
    y = _column("y", y, _TARGETS, columns)
    inputs, targets = (np.concatenate([_array(p, c, where) for p in parts]) for c in (x, y))
    test = np.arange(len(parts[0]), len(inputs)) if len(parts) > 1 else None
    names = getattr(parts[0].features[y], "names", None)
    meta = {"labels": list(names)} if names else {}
    return supervised(Path(path).name, inputs, targets, ids, test=test, meta=meta)


def _text(
    path: str, parts: list[Any], x: str, label: str | None, ids: np.ndarray | None, length: int
) -> RawData:
    texts = [t or "" for p in parts for t in p[x]]
    rows = np.arange(len(texts))
    extra = {"row": rows}
    if label is not None:
        labels = [str(v) for p in parts for v in p[label]]
        extra["label"] = np.unique(labels, return_inverse=True)[1]
    names, owners = (None, None) if ids is None else np.unique(ids, return_inverse=True)
    raw = next_character(
        Path(path).name,
        texts,
        owners,
        () if names is None else tuple(map(str, names)),
        length,
        extra,
    )
    if len(parts) == 1:
        return raw
    test = np.flatnonzero(raw.fields["row"] >= len(parts[0]))
    return RawData(**{**vars(raw), "test": test})


def role_lines(path: str, role: str | None, text: str | None) -> Iterator[tuple[str, str]]:
    """(role, line) of every row of a dataset of plays; columns as in `fedsim.data.text.plays`."""
    for part in _open(path, None, f"data.dataset.path = {path!r}").values():
        role_column = _column("role_column", role, _ROLES, part.column_names)
        text_column = _column("text_column", text, _TEXTS, part.column_names)
        for name, said in zip(part[role_column], part[text_column], strict=True):
            yield from ((str(name), line) for line in str(said or "").splitlines() if line.strip())


def _open(path: str, config: str | None, where: str) -> dict[str, Any]:
    """All splits of the dataset, by name."""
    place = Path(path).expanduser()
    if not place.exists() and (place.is_absolute() or path.startswith((".", "~"))):
        raise DataError(f"{where}: there is no such file or folder")
    _prepare(place.exists())
    datasets = require("datasets", where, "data")
    try:
        if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
            found = datasets.load_from_disk(str(place))
        elif place.is_file():
            kind = {".jsonl": "json", ".txt": "text"}.get(place.suffix, place.suffix[1:])
            found = datasets.load_dataset(kind, data_files=str(place))
        else:
            found = datasets.load_dataset(str(place) if place.exists() else path, config)
    except Exception as error:  # the library raises whatever its readers and network layers raise
        hint = "" if place.exists() else "; there is no such local path, so the hub was asked"
        raise DataError(f"{where} cannot be loaded{hint} ({_first_line(error)})") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _prepare(local: bool) -> None:
    """Set the libraries' switches; they are read at import. Without a network, no retries."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    if not local and not getproxies():
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _column(parameter: str, given: str | None, usual: tuple[str, ...], columns: list[str]) -> str:
    name = given or next((c for c in usual if c in columns), None)
    if name is None or name not in columns:
        raise DataError(
            f"data.dataset.{parameter} = {given!r} names no column; allowed: {', '.join(columns)}"
        )
    return name


def _is_text(part: Any, column: str) -> bool:
    return getattr(part.features[column], "dtype", "") in ("string", "large_string")


def _array(part: Any, column: str, where: str) -> np.ndarray:
    if _is_text(part, column):
        raise DataError(f"{where}: column {column!r} is text; x and y need columns of numbers")
    values = part.with_format("numpy")[column][:]
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: the examples of column {column!r} are not numbers of one shape "
            "(images need one size)"
        )
    return values


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
