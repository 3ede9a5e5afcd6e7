"""Checks the components that an experiment names: do they exist, and do their parameters fit."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from fedsim import registry
from fedsim.config.faults import Found, problems
from fedsim.config.models import FleetShare, StrategyConfig, TrainConfig
from fedsim.config.values import Path, look, unfit
from fedsim.core.errors import ConfigError, FedsimError
from fedsim.core.text import did_you_mean, shown, tame

PLACES: dict[Path, str] = {
    ("data", "dataset"): "datasets",
    ("data", "partition"): "partitioners",
    ("model",): "models",
    ("clock", "device"): "devices",
    ("oracle",): "oracles",
}
"""Where an experiment names a component besides `[[strategy]]`, and of which kind."""
_BUILT = ("strategies", "devices", "oracles")
"""Kinds whose constructors are light and judge their values, so that building one is a check."""


def component_faults(tables: Mapping[str, Any]) -> Iterator[Found]:
    """Faults of all names of components and of their parameters.

    Args:
        tables: the experiment as written, possibly with other faults.
    """
    for path, kind in PLACES.items():
        try:
            written = look(tables, path)
        except (LookupError, TypeError):
            continue
        yield from _check(kind, written, path, frozenset({"name", "params"}))
    own = frozenset(FleetShare.model_fields)
    for number, written in enumerate(_list(tables, ("clock", "fleet"))):
        yield from _check("devices", written, ("clock", "fleet", number), own)
    own = frozenset(StrategyConfig.model_fields)
    for number, written in enumerate(_list(tables, ("strategy",))):
        path = ("strategy", number)
        yield from _check("strategies", written, path, own)
        if isinstance(written, dict) and isinstance(written.get("model"), dict):
            merged = _merged(tables.get("model"), written["model"])
            for fault in _check("models", merged, (*path, "model"), frozenset({"name", "params"})):
                if fault[0][-1] in written["model"]:  # others are those of [model]
                    yield fault
        if isinstance(written, dict) and isinstance(written.get("client"), str):
            client = {"name": written["client"]}
            yield from _check("clients", client, (*path, "client"), frozenset({"name"}))


def _list(tables: Mapping[str, Any], path: Path) -> list[Any]:
    try:
        found = look(tables, path)
    except (LookupError, TypeError):
        return []
    return found if isinstance(found, list) else []


def _merged(model: Any, own: Mapping[str, Any]) -> Any:
    """`[model]` with a strategy's own keys; another name replaces all of it."""
    base = {"name": model} if isinstance(model, str) else model
    if not isinstance(base, dict) or own.get("name", base.get("name")) != base.get("name"):
        return own
    inner = base.get("params")
    plain = {k: v for k, v in base.items() if k != "params"}
    return {**plain, **(inner if isinstance(inner, dict) else {}), **own}


def _check(kind: str, written: Any, path: Path, own: frozenset[str]) -> Iterator[Found]:
    table = {"name": written} if isinstance(written, str) else written
    if not isinstance(table, dict) or not isinstance(table.get("name"), str) or not table["name"]:
        return
    name, inner = table["name"], table.get("params")
    params = inner if isinstance(inner, dict) else {}
    params = {**params, **{k: v for k, v in table.items() if k not in own}}
    here = path if isinstance(written, str) or path[-1] == "client" else (*path, "name")
    try:
        if not params and registry.plain(kind, name):
            return
        component = registry.resolve(kind, name)
    except registry.UnresolvedError as error:
        yield here, error.problem, shown(name)
        return
    faults = list(mistakes(kind, component, params, own - {"name", "params"}))
    if not faults and kind in _BUILT:
        faults = list(_refusals(component, params))
    for key, problem in faults:
        if key in params:
            yield (*path, key), problem, shown(params[key])
        else:
            yield ((*path, key) if key else here), problem, "" if key else shown(name)


def mistakes(
    kind: str, component: Any, params: Mapping[str, Any], beside: frozenset[str] = frozenset()
) -> Iterator[tuple[str, str]]:
    """Names of wrong, unknown and missing parameters, and what is wrong with each.

    Args:
        kind: kind of the component.
        component: function or class.
        params: what the user wrote.
        beside: keys that may stand beside the parameters; for the nearest spelling.
    """
    try:
        known, anything = parameters(kind, component)
    except (TypeError, ValueError):  # no signature: a C function
        return
    owner = getattr(component, "__name__", "it")
    for key, value in params.items():
        if key in known:
            if any(unfit(value)):
                continue  # has its own fault
            problem = known[key].judge(value)
            if problem:
                yield key, problem
        elif not anything or key in registry.GIVEN.get(kind, ()):
            allowed = ", ".join([*known, *sorted(beside)]) or "none"
            near = did_you_mean(key, [*known, *beside])
            if kind == "strategies" and not near and key in TrainConfig.model_fields:
                near = f"; write it under train, as train.{key}"
            yield key, f"unknown parameter of {owner}{near} (allowed: {allowed})"
    for key, parameter in known.items():
        if parameter.required and key not in params:
            yield key, f"is required by {owner}"


@dataclass(frozen=True)
class Parameter:
    """One parameter that an experiment can set.

    Attributes:
        required: it has no default.
        adapter: judges values by the annotation; None where that says nothing.
    """

    required: bool
    adapter: TypeAdapter[Any] | None

    def judge(self, value: Any) -> str:
        """What is wrong with a value, empty if nothing."""
        if self.adapter is None:
            return ""
        try:  # JSON's strictness: an array will do for a tuple, "1" will not do for a number
            self.adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            wanted = dict.fromkeys(what.removeprefix("must be ") for _, what, _ in problems(error))
            return f"must be {' or '.join(wanted)}"
        except (TypeError, ValueError):
            return "must be a plain value"
        return ""


@lru_cache(maxsize=512)
def parameters(kind: str, component: Any) -> tuple[dict[str, Parameter], bool]:
    """The parameters of a component that an experiment can set, and whether it takes any other.

    A class that passes ``**kwargs`` on has the parameters of its bases as well.
    """
    known: dict[str, Parameter] = {}
    given = registry.GIVEN.get(kind, frozenset())
    for function in _constructors(component):
        signature, hints = inspect.signature(function), _hints(function)
        found = list(signature.parameters.items())[isinstance(component, type) :]  # without self
        anything = any(p.kind is p.VAR_KEYWORD for _, p in found)
        for name, p in found:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                known.setdefault(name, Parameter(p.default is p.empty, _adapter(hints.get(name))))
        if not anything:
            break
    return {name: p for name, p in known.items() if name not in given}, anything


def _constructors(component: Any) -> list[Callable[..., Any]]:
    if not isinstance(component, type):
        return [component]
    found = [vars(c)["__init__"] for c in component.__mro__[:-1] if "__init__" in vars(c)]
    return found or [lambda self: None]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only
        return {}


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return None if hint is None else TypeAdapter(hint)
    except (PydanticUserError, NameError, TypeError):  # a class of the user's own
        return None


def _refusals(component: Any, params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the constructor itself finds wrong."""
    try:
        component(**params)
    except ConfigError as error:
        text = str(error)
        key = next((k for k in params if text.startswith(f"{k} = ")), "")
        yield key, text.removeprefix(f"{key} = {params[key]} ") if key else text
    except FedsimError as error:
        yield "", str(error)
    except Exception as error:  # foreign code may raise anything
        yield "", f"cannot be made: {type(error).__name__}: {tame(str(error))}"
