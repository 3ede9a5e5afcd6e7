"""From text to nested tables: TOML files, and assignments such as ``train.lr=0.05``."""

from __future__ import annotations

import pathlib
import re
import tomllib
from typing import Any

from fedsim.config.components import PLACES
from fedsim.config.values import Path, split_key
from fedsim.core.errors import ConfigError, Fault
from fedsim.core.text import did_you_mean, shown, tame

MAX_BYTES = 1_000_000
"""No experiment file is larger."""
_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_EITHER = {"fraction": "size", "size": "fraction"}


def read_toml(path: str) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: it cannot be read, is too large or is no TOML; with line and column.
    """

    def wrong(where: str, problem: str) -> ConfigError:
        return ConfigError(faults=[Fault(tame(path), where, problem)])

    try:
        file = pathlib.Path(path)
        if not file.is_file():
            raise wrong("(file)", "is a folder" if file.is_dir() else "there is no such file")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise wrong(
            "(file)", f"cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if len(raw) > MAX_BYTES:
        raise wrong("(file)", f"must not be larger than {MAX_BYTES} bytes")
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        where = f"line {line}, column {column}"
        raise wrong(where, "not valid TOML: the file is no UTF-8 text") from None
    except RecursionError:
        raise wrong("line 1", "not valid TOML: nested too deep") from None
    except ValueError as error:  # a TOMLDecodeError, or an integer of thousands of digits
        reason = str(error)
        at = _POSITION.search(reason)
        where = f"line {at[1]}, column {at[2]}" if at and at[1] else "end of file"
        reason = tame(reason[: at.start()] if at else reason)
        raise wrong(where if at else "(file)", f"not valid TOML: {reason}") from None


def parse_override(text: str) -> tuple[Path, Any]:
    """Key and value of ``a.b=c``; the value in TOML's syntax, or a bare word for a string.

    Raises:
        ValueError: not of that form.
    """
    key, equals, value = text.partition("=")
    value = value.strip()
    if not equals or not key.strip():
        raise ValueError("must be KEY=VALUE, such as train.lr=0.05")
    path = split_key(key)
    try:
        parsed = tomllib.loads(f"value = {value}")
        if len(parsed) == 1 and "\n" not in value:
            return path, parsed["value"]
    except (ValueError, RecursionError):
        pass
    if not value or value[0] in "\"'[{" or not value.isprintable():
        raise ValueError('the value must be TOML, such as 0.1, true, "text" or [1, 2], or a word')
    return path, value


class Misplaced(ValueError):
    """A key that leads nowhere.

    Attributes:
        path: how far it led.
        given: what is there, as shown.
    """

    def __init__(self, path: Path, problem: str, given: str = "") -> None:
        super().__init__(problem)
        self.path, self.given = path, given


def assign(tables: dict[str, Any], path: Path, value: Any) -> Path:
    """Put a value into nested tables; ``strategy.LABEL`` and ``strategy.0`` address a strategy.

    Tables that are not there are made. A component written as a name becomes a table, so that its
    parameters can be set; of `cohort.fraction` and `cohort.size` the one set wins.

    Returns:
        The path, with strategies by number.

    Raises:
        Misplaced: it leads through something that is no table, or to no such entry.
    """
    target: Any = tables
    place: Path = ()
    for part in path[:-1]:
        step = _step(target, place, part)
        place = (*place, step)
        if isinstance(target, dict):
            target.setdefault(step, {})
            if isinstance(target[step], str) and place in PLACES:
                target[step] = {"name": target[step]}
        target = target[step]
        if not isinstance(target, (dict, list)):
            raise Misplaced(place, "is no table, nothing can be set in it", shown(target))
    last = _step(target, place, path[-1])
    if place == ("cohort",) and last in _EITHER:
        target.pop(_EITHER[str(last)], None)
    target[last] = value
    return (*place, last)


def _step(target: Any, place: Path, part: str | int) -> str | int:
    """The key or index that a part of a path means."""
    if isinstance(target, dict) or isinstance(part, int):
        return part
    labels = [label_of(item) for item in target] if place == ("strategy",) else []
    if part in labels:
        return labels.index(part)
    if part.isdecimal() and len(part) < 9 and int(part) < len(target):
        return int(part)
    known = [label for label in labels if label] or [str(n) for n in range(len(target))]
    near = did_you_mean(part, known)
    raise Misplaced((*place, part), f"there is no such entry{near} (allowed: {', '.join(known)})")


def label_of(strategy: Any) -> str | None:
    """What a strategy's table is called: its label, else its name."""
    both = (strategy.get("label"), strategy.get("name")) if isinstance(strategy, dict) else ()
    return next((text for text in both if isinstance(text, str) and text), None)
