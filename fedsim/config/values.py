"""Plain values and dotted keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from fedsim.core.text import shown

Path = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SEGMENT = re.compile(r"""\s*(?:("(?:[^"\\]|\\.)*")|'([^']*)'|([^."']+?))\s*(\.|$)""")
_DEPTH = 20


def unfit(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Where a value holds something that JSON or the run folder could not hold, and why."""
    if len(path) > _DEPTH:
        yield path, f"must not be nested deeper than {_DEPTH} levels"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from unfit(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from unfit(item, (*path, number))
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield path, "must be a finite number"
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            yield path, "must fit in 64 bits"
    elif isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            yield path, "must be valid Unicode"
    elif value is not None:
        yield path, "must be a string, a number, true or false, an array or a table"


def flatten(value: Any) -> Any:
    """Nested tables as one of dotted keys: ``{"train": {"lr": x}}`` is ``{"train.lr": x}``."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= {f"{key}.{inner}": v for inner, v in flatten(item).items()}
        else:
            flat[key] = item
    return flat


def dotted(path: Iterable[str | int]) -> str:
    """A path as a dotted key: ``experiment.seeds[1]``, odd names quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += "." * bool(text) + (part if _BARE.fullmatch(part) else shown(part))
    return text


def split_key(text: str) -> Path:
    """The parts of a dotted key; a part that holds a dot is quoted.

    Raises:
        ValueError: an empty part or an open quote.
    """
    parts: list[str] = []
    at = 0
    while match := _SEGMENT.match(text, at):
        double, single, bare, end = match.groups()
        parts.append(json.loads(double) if double else single or bare or "")
        at = match.end()
        if not end:
            return tuple(parts)
    raise ValueError("is no dotted key such as train.lr")


def look(tables: Any, path: Path) -> Any:
    """The value at a path. Raises `LookupError` or `TypeError` where there is none."""
    for part in path:
        tables = tables[part]
    return tables
