"""Calls a component with the parameters of an experiment file, and names every wrong one."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, get_type_hints

from fedsim.core.errors import ConfigError, DataError
from fedsim.core.text import did_you_mean, shown


def call(
    component: Callable[..., Any], where: str, params: Mapping[str, Any], **context: Any
) -> Any:
    """``component(**params)``, plus those entries of `context` that it asks for by name.

    Args:
        component: function or class; its annotations say what each parameter may be.
        where: place of the parameters in the experiment, for example ``"data.partition"``.
        params: what the user wrote.
        context: what the framework offers (`seed`, `data`, ...); users cannot set these.

    Raises:
        ConfigError: unknown, missing or mistyped parameters, all in one message.
    """
    name = getattr(component, "__name__", str(component))
    accepted = inspect.signature(component).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    own = {
        n: p
        for n, p in accepted.items()
        if n not in context and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    hints = _hints(component)
    faults = []
    for key, value in params.items():
        if key in own:
            fault = _mistyped(value, hints.get(key, Any))
            faults += [f"{where}.{key} = {shown(value)}: {fault}"] if fault else []
        elif key in context or not any_name:
            faults.append(
                f"{where}.{key} is not a parameter of {name}{did_you_mean(key, own)}; "
                f"allowed: {', '.join(own) or 'none'}"
            )
    faults += [
        f"{where}.{key} is missing; {name} needs it"
        for key, p in own.items()
        if p.default is p.empty and key not in params
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    return component(**{k: v for k, v in context.items() if k in accepted}, **params)


def _hints(component: Callable[..., Any]) -> dict[str, Any]:
    target = component.__init__ if inspect.isclass(component) else component
    try:
        return get_type_hints(target)
    except (NameError, TypeError, AttributeError):  # a user's annotations need not resolve
        return {}


def _mistyped(value: Any, hint: Any) -> str:
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    try:  # JSON's strictness: an array will do for a tuple, "1" will not do for a number
        TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return "; or ".join(dict.fromkeys(e["msg"] for e in error.errors())).lower()
    except PydanticSchemaGenerationError:
        return ""  # a user's own class: nothing to check
    except (TypeError, ValueError):
        return "it must be a plain value"
    return ""


def require(package: str, why: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        package: its import name.
        why: what needs it, for example ``"data.dataset = 'mnist5k'"``.
        extra: our optional dependency that brings it.

    Raises:
        DataError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"{why} needs the Python package {package!r}, which cannot be imported ({error}); "
            f"install it with: pip install 'fedsim-flower[{extra}]'"
        ) from error
