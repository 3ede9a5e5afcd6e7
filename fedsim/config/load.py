"""Reads an experiment, applies overrides, and finds every fault at once."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from pydantic import ValidationError

from fedsim.config.components import PLACES, component_faults
from fedsim.config.edits import Misplaced, assign, label_of, parse_override, read_toml
from fedsim.config.faults import Found, problems
from fedsim.config.models import Experiment, Named, StrategyConfig
from fedsim.config.types import MAX_SEED
from fedsim.config.values import Path, dotted, look, split_key, unfit
from fedsim.core.errors import ConfigError, Fault
from fedsim.core.text import shown, tame

_SOUND: dict[Path, Any] = {
    ("experiment",): {"name": "x", "seeds": [MAX_SEED]},
    ("experiment", "name"): "x",
    ("experiment", "seeds"): [MAX_SEED],
    ("data",): {"dataset": "digits"},
    ("data", "dataset"): "digits",
    ("model",): "mlp",
    ("strategy",): [{"name": "fedavg"}],
    ("tune", "seeds"): [MAX_SEED - 1],
    ("sweep", "key"): "train.lr",
    ("sweep", "values"): [0.1],
}
"""Stand-ins for missing or faulty values whose absence would be, or would seem, another fault."""
MAX_FAULTS = 100
"""So many faults of one sort are told; more help nobody."""
MAX_TRIALS = 1000
"""So many values of grids and sweeps are checked beforehand, so that checking stays quick."""
_VARIABLE = ("cohort", "clock", "data", "evaluate", "experiment", "model", "strategy", "train")
"""Sections whose keys a sweep can change."""
_FIXED = frozenset(StrategyConfig.model_fields) - {"train", "model"}


def load_experiment(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
        path: a TOML file of at most 1 MB.
        overrides: assignments ``"KEY=VALUE"``: the key dotted (``train.lr``,
            ``strategy.LABEL.mu``, ``strategy.0.mu``), the value in TOML's syntax or a bare word.

    Raises:
        ConfigError: the file cannot be read, or holds faults; all of them are listed.
    """
    return parse(read_toml(os.fspath(path)), tame(os.fspath(path)), overrides)


def parse(
    document: Mapping[str, Any], source: str = "experiment", overrides: Sequence[str] = ()
) -> Experiment:
    """Make an experiment of nested tables, in the shape of the TOML file.

    Args:
        document: the tables; they stay as they are.
        source: what to call them in messages.
        overrides: assignments, see `load_experiment`.

    Raises:
        ConfigError: lists every fault.
    """
    faults: list[Fault] = []
    tables: dict[str, Any] = copy.deepcopy(dict(document))
    origins: dict[Path, str] = {}
    for text in overrides:
        origin = f"{source} (--set {tame(text, 100)})"
        try:
            origins[assign(tables, *parse_override(text))] = origin
        except Misplaced as error:
            faults.append(Fault(origin, _key(error.path, tables), str(error), error.given))
        except ValueError as error:
            faults.append(Fault(origin, tame(text.partition("=")[0], 60), str(error)))
    found, experiment = _judge(tables)
    if experiment is not None:
        found += _trial_faults(experiment)
    for path, problem, given in found:
        origin = next((o for p, o in origins.items() if path[: len(p)] == p[: len(path)]), source)
        faults.append(Fault(origin, _key(path, tables), problem, given))
    if faults or experiment is None:
        raise ConfigError(faults=faults)
    return experiment


def override(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The experiment with some values changed.

    Args:
        experiment: stays as it is.
        changes: values by dotted key, for example ``{"strategy.fedprox.mu": 0.1}``.

    Raises:
        ConfigError: a key is unknown or a value not allowed.
    """
    tables = document(experiment)
    try:
        for key, value in changes.items():
            assign(tables, split_key(key), value)
    except ValueError as error:
        raise ConfigError(f"{key} = {shown(value)}: {error}") from None
    found, changed = _judge(tables)
    if found or changed is None:
        raise ConfigError(faults=[Fault("override", _key(p, tables), w, g) for p, w, g in found])
    return changed


def document(experiment: Experiment) -> dict[str, Any]:
    """The experiment as nested tables, in the shape of the TOML file."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not hasattr(value, "model_fields_set"):
            return copy.deepcopy(value)
        table = {k: plain(v) for k, v in value if v is not None}
        if isinstance(value, (Named, StrategyConfig)):
            table |= table.pop("params")
        return table

    tables: dict[str, Any] = plain(experiment)
    return tables


def schema() -> dict[str, Any]:
    """JSON schema of an experiment file."""
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **Experiment.model_json_schema()}


def _key(path: Path, tables: Mapping[str, Any]) -> str:
    """A path as shown, strategies by label where they have one of their own."""
    if len(path) > 1 and path[0] == "strategy" and isinstance(path[1], int):
        labels = [label_of(s) for s in tables["strategy"]]
        label = labels[path[1]]
        if label and labels.count(label) == 1:
            return dotted(("strategy", label, *path[2:]))
    return dotted(path)


def _judge(tables: dict[str, Any]) -> tuple[list[Found], Experiment | None]:
    """Every fault of a document, and the experiment without what is faulty.

    A faulty value hides others: a section is judged as a whole only once its fields are right. So
    what is faulty is replaced by something sound, and the rest is judged again.
    """
    found: list[Found] = []
    sound = copy.deepcopy(tables)
    for path, problem in islice(unfit(tables), MAX_FAULTS):
        found.append((path, problem, shown(look(tables, path))))
        _mend(sound, path)
    experiment = None
    for _ in range(8):
        try:
            experiment = Experiment.model_validate(sound)
            break
        except ValidationError as error:
            for fault in islice(problems(error), MAX_FAULTS):
                found += [fault] * (fault not in found)
                _mend(sound, fault[0])
    known = {path for path, _, _ in found}
    named = islice(component_faults(tables), MAX_FAULTS)
    return found + [fault for fault in named if fault[0] not in known], experiment


def _mend(tables: dict[str, Any], path: Path) -> None:
    """Put something sound in the place of what is faulty."""
    for place in (*PLACES, ("tune", "grid"), ("clock", "fleet")):
        if path[: len(place)] == place:
            path = place
    if path[0] == "strategy" and len(path) > 1:
        number = path[1]
        label = f"strategy {number}"
        if len(path) == 2 or not isinstance(tables["strategy"][number], dict):
            tables["strategy"][number] = {"name": "fedavg", "label": label}
        elif path[2] == "label":
            tables["strategy"][number]["label"] = label
        elif path[2] == "name":
            tables["strategy"][number] = {"label": label, **tables["strategy"][number]}
            tables["strategy"][number]["name"] = "fedavg"
        else:
            tables["strategy"][number].pop(path[2], None)
    elif path in _SOUND:
        parent = look(tables, path[:-1])
        parent[path[-1]] = copy.deepcopy(_SOUND[path])
    elif isinstance(path[-1], int):
        _mend(tables, path[:-1])
    else:
        with suppress(LookupError, TypeError):
            del look(tables, path[:-1])[path[-1]]


def _trial_faults(experiment: Experiment) -> Iterator[Found]:
    """Faults that a value of `[sweep]`, `[tune]` or a strategy's `tune` would bring."""
    tables = {k: v for k, v in document(experiment).items() if k not in ("sweep", "tune")}
    usual = {(_key(path, tables), problem) for path, problem, _ in _judge(tables)[0]}
    told: set[Found] = set()
    for place, path, value in islice(_trials(experiment), MAX_TRIALS):
        trial, new = tables, list[Found]()
        if path[0] == "strategy":  # the others do not change
            trial = {**tables, "strategy": [tables["strategy"][path[1]]]}
            path = ("strategy", 0, *path[2:])
        trial = copy.deepcopy(trial)
        try:
            _check_variable(place, path)
            assign(trial, path, value)
        except ValueError as error:
            new.append((place[:-1], str(error), ""))
        for at, problem, given in () if new else _judge(trial)[0]:
            if (_key(at, trial), problem) not in usual:
                whole = problem.startswith(("unknown key", "unknown parameter"))
                shared = place[0] == "tune" and at[2:3] == ("train",)  # alike for every strategy
                text = f"{dotted(at[2:]) if shared else _key(at, trial)}: {problem}"
                new.append((place[:-1], text, "") if whole else (place, text, given))
        yield from (fault for fault in new if fault not in told)
        told.update(new)


def _trials(experiment: Experiment) -> Iterator[tuple[Path, Path, Any]]:
    """Where it is written, the key that is tried, and the value, of everything to be tried."""
    if sweep := experiment.sweep:
        for number, value in enumerate(sweep.values):
            yield ("sweep", "values", number), _split(sweep.key), value
    shared = experiment.tune.grid if experiment.tune else {}
    for index, strategy in enumerate(experiment.strategy):
        own: Path = ("strategy", index, "tune")
        for grid, place in ((shared, ("tune", "grid")), (strategy.tune, own)):
            for key, values in grid.items():
                for number, value in enumerate(values):
                    yield (*place, key, number), ("strategy", index, *_split(key)), value


def _split(key: str) -> Path:
    try:
        return split_key(key)
    except ValueError:
        return (key,)


def _check_variable(place: Path, path: Path) -> None:
    """Raise `ValueError` unless a sweep or a grid can vary the key."""
    if place[0] == "sweep":
        if path[0] not in _VARIABLE or len(path) < 2:
            raise ValueError(f"{dotted(path)} is no key of {', '.join(_VARIABLE)}")
    elif len(path) != 3 + (path[2] in ("train", "model")) or path[2] in _FIXED:
        raise ValueError(
            f"{dotted(path[2:])} must be train.KEY, model.KEY or a parameter of the strategy"
        )
