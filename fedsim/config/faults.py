"""From what pydantic says to what a user can mend: what is allowed, the nearest spelling."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedsim.config.models import Experiment, TrainConfig
from fedsim.config.values import Path, dotted
from fedsim.core.text import did_you_mean, nearest, shown

Found = tuple[Path, str, str]
"""Where a fault is, what is allowed there, and the value given as shown (empty if none)."""

_MESSAGES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be an array",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "finite_number": "must be a finite number",
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "too_short": "needs at least {min_length}",
    "too_long": "must hold at most {max_length}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
}
_TABLES: dict[Path, str] = {
    ("strategy",): "must be an array of tables: write [[strategy]]",
    ("model",): "must be a name or a table with a name",
    ("data", "dataset"): "must be a name or a table with a name",
    ("data", "partition"): "must be a name or a table with a name",
    ("clock", "device"): "must be a name or a table with a name",
}


def problems(error: ValidationError) -> Iterator[Found]:
    """The faults in a validation error."""
    for detail in error.errors(include_url=False):
        path: Path = tuple(detail["loc"])
        whole = detail["type"] == "value_error" and not isinstance(
            detail["input"], (str, int, float)
        )
        given = "" if whole or detail["type"] == "missing" else shown(detail["input"])
        yield path, _problem(detail, path), given


def _problem(detail: ErrorDetails, path: Path) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown(str(path[-1]), path[:-1])
    if kind == "missing":
        return f"is required{_about(path)}"
    if kind == "literal_error":
        allowed = context["expected"].replace("'", '"')
        options = re.findall(r'"([^"]*)"', allowed)
        return f"must be {allowed}{did_you_mean(str(detail['input']), options)}"
    if kind == "string_pattern_mismatch":
        return f"is not allowed{_about(path)}"
    if kind in ("value_error", "clash"):
        return str(context["error"]) if context else detail["msg"]
    if kind in ("model_type", "list_type") and path in _TABLES:
        return _TABLES[path]
    pattern = _MESSAGES.get(kind)
    return pattern.format(**context) if pattern else detail["msg"].lower()


def unknown(name: str, section: Path) -> str:
    """What to say of a key that its section does not have."""
    model = _model(section)
    keys = list(model.model_fields) if model else []
    if nearest(name, keys) is None:
        for other, field in Experiment.model_fields.items():
            if (other,) != section and name in getattr(field.annotation, "model_fields", {}):
                return f"unknown key; {name} belongs to [{other}]"
    table = dotted(part for part in section if isinstance(part, str))
    where = f"in [{table}]" if table else "at the top"
    return f"unknown key{did_you_mean(name, keys)} (allowed {where}: {', '.join(keys)})"


def _about(path: Path) -> str:
    """The description of a field, as a clause."""
    model = _model(path[:-1])
    field = model.model_fields.get(str(path[-1])) if model else None
    return f": {field.description.rstrip('.')}" if field and field.description else ""


def _model(section: Path) -> type[BaseModel] | None:
    """The model whose keys stand at a path; None where keys are free."""
    if len(section) == 3 and section[0] == "strategy" and section[2] == "train":
        return TrainConfig
    model: Any = Experiment
    for part in section:
        if isinstance(part, str):
            model = _model_in(_annotation(model, part))
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _annotation(model: Any, name: str) -> Any:
    fields: Mapping[str, Any] = getattr(model, "model_fields", {})
    return fields[name].annotation if name in fields else None


def _model_in(annotation: Any) -> Any:
    """The model inside ``Model | None`` or ``list[Model]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(a) for a in get_args(annotation))
    return next((m for m in found if m), None)
