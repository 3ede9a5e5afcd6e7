"""Calls a component with the parameters of an experiment file, and names every wrong one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fedsim.config.components import mistakes
from fedsim.core.errors import ConfigError, DataError
from fedsim.core.text import shown
from fedsim.registry import resolve


def call(kind: str, name: str, where: str, params: Mapping[str, Any], **context: Any) -> Any:
    """What the component makes of `params`, and of those entries of `context` it asks for by name.

    Args:
        kind: kind of the component, for example ``"partitioners"``.
        name: its name in the registry; its annotations say what each parameter may be.
        where: place of the parameters in the experiment, for example ``"data.partition"``.
        params: what the user wrote.
        context: what the framework offers (`seed`, `data`, ...); users cannot set these.

    Raises:
        ConfigError: no such component; unknown, missing or mistyped parameters, in one message.
    """
    component = resolve(kind, name)
    faults = [
        f"{where}.{key} = {shown(params[key])}: {problem}"
        if key in params
        else f"{where}.{key} {problem}"
        for key, problem in mistakes(kind, component, params)
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    accepted = inspect.signature(component).parameters
    return component(**{k: v for k, v in context.items() if k in accepted}, **params)


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
