"""Where the report's sections come from: a registry of functions, the built-in ones among them.

A section is a function from runs to a `Section`, or to None where it has nothing to say:

    @section(order=550)
    def clusters(runs: Runs) -> Section | None:
        '''Which client was in which cluster.'''

Name it in `BUILTIN`, call `register("clusters", clusters)`, or declare an entry point in the group
``fedsim.sections``; the report needs no other change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import Literal, TypeVar

from fedsim.core.errors import ConfigError
from fedsim.results.blocks import Section
from fedsim.results.groups import Runs

Scope = Literal["setting", "whole"]
Make = Callable[[Runs], Section | None]
F = TypeVar("F", bound=Make)

GROUP = "fedsim.sections"
"""Entry-point group of sections that other packages bring."""

_PARTS = "fedsim.results.parts"
BUILTIN: dict[str, str] = {
    "sweep": f"{_PARTS}.outcome:sweep",
    "outcome": f"{_PARTS}.outcome:outcome",
    "curves": f"{_PARTS}.curves:curves",
    "tests": f"{_PARTS}.tests:tests",
    "clients": f"{_PARTS}.clients:clients",
    "clusters": f"{_PARTS}.clusters:clusters",
    "gossip": f"{_PARTS}.social:gossip",
    "labels": f"{_PARTS}.social:labels",
    "knowledge": f"{_PARTS}.social:knowledge",
    "fleet": f"{_PARTS}.fleet:fleet",
    "extras": f"{_PARTS}.curves:extras",
    "refused": f"{_PARTS}.clients:refused",
    "tuning": f"{_PARTS}.tuning:tuning",
    "runs": f"{_PARTS}.provenance:which_runs",
    "configuration": f"{_PARTS}.provenance:configuration",
    "provenance": f"{_PARTS}.provenance:provenance",
}
"""Sections by name, as "module:attribute"."""

_registered: dict[str, str | Make] = {}


@dataclass(frozen=True)
class Entry:
    """A section function with its name and place.

    Attributes:
        order: sections come in this order; the built-in ones are at 100, 200, ...; of those for the
            whole report, the ones below 100 stand before the settings, the others after.
        scope: `setting`: called for each setting of a sweep; `whole`: once, with all runs.
    """

    name: str
    make: Make
    order: int
    scope: Scope


def section(order: int = 550, scope: Scope = "setting") -> Callable[[F], F]:
    """Give a section function its place; without it, 550 in every setting."""

    def mark(function: F) -> F:
        function.order, function.scope = order, scope  # type: ignore[attr-defined]
        return function

    return mark


def register(name: str, target: str | Make) -> None:
    """Add a section, or put another in the place of one: a function or "module:attribute"."""
    _registered[name] = target


def unregister(name: str) -> None:
    """Take back what `register` did."""
    _registered.pop(name, None)


def entries() -> list[Entry]:
    """Every section in the order of the report."""
    found: dict[str, str | Make] = {**BUILTIN, **_entry_points(), **_registered}
    made = [_entry(name, target) for name, target in found.items()]
    return sorted(made, key=lambda entry: (entry.order, entry.name))


@cache
def _entry_points() -> dict[str, str]:
    points = metadata.entry_points(group=GROUP)
    return {point.name: point.value for point in sorted(points, key=lambda point: point.name)}


def _entry(name: str, target: str | Make) -> Entry:
    make = _resolve(name, target) if isinstance(target, str) else target
    return Entry(name, make, getattr(make, "order", 550), getattr(make, "scope", "setting"))


def _resolve(name: str, target: str) -> Make:
    module, _, attribute = target.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"report section {name!r} is {target!r}, which cannot be imported ({error}); "
            'expected "module:function"'
        ) from error
    if not callable(found):
        raise ConfigError(f"report section {name!r} is {target!r}, which is no function")
    return found
