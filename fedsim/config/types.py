"""Types of values in an experiment, with what they allow."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from fedsim.config.values import flatten, unfit

MAX_SEED = 2**63 - 1
Grid = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=1, max_length=100)]],
    Field(max_length=20),
    BeforeValidator(flatten),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["array", "object"]}}),
]


def _plain(value: Any) -> Any:
    for path, problem in unfit(value):
        where = ".".join(map(str, path))
        raise ValueError(f"{problem} (at {where})" if where else problem)
    return value


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        twice = next(s for s in seeds if seeds.count(s) > 1)
        raise ValueError(f"seeds must be distinct, {twice} is there twice")
    return seeds


def listed(value: Any) -> Any:
    """A tuple or range as the list that TOML would have; anything else as it is."""
    return list(value) if isinstance(value, (tuple, range)) else value


def count_or_fraction(value: Any) -> int | float:
    """A whole number of clients, or a fraction below 1; `ValueError` for anything else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if 0 <= value <= 10**9 if whole else isinstance(value, float) and 0 <= value < 1:
        return value
    raise ValueError("must be a whole number of clients >= 0, or a fraction >= 0 and < 1")


def slug(label: str) -> str:
    """The label as part of a folder's name: lower case, everything unusual replaced by dashes."""
    return re.sub(r"[^\w.]+", "-", label.lower()).strip("-._")


Seeds = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_SEED)]],
    Field(min_length=1, max_length=1000),
    BeforeValidator(listed),
    AfterValidator(_distinct),
]
Params = Annotated[dict[str, Any], AfterValidator(_plain)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Metric = Literal[
    "accuracy",
    "loss",
    "perplexity",
    "rouge_l",
    "exact_match",
    "client_accuracy",
    "client_loss",
    "client_worst10",
]
