"""How values and spellings are shown to a user."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any


def tame(text: str, limit: int = 300) -> str:
    """Text on one line that cannot drive a terminal: what is not printable is escaped."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."


def shown(value: Any, limit: int = 60) -> str:
    """A value about as TOML would write it, short and tame."""
    try:
        return tame(json.dumps(value, ensure_ascii=False, default=str), limit)
    except (ValueError, TypeError, RecursionError):
        return f"({type(value).__name__})"


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option spelt most like `name`, or None if none is near."""
    folded = {_fold(option): option for option in options}
    found = difflib.get_close_matches(_fold(name[:100]), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A clause with the nearest spelling, empty if none is near."""
    near = nearest(name, options)
    return f"; did you mean {near}?" if near else ""


def _fold(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")
