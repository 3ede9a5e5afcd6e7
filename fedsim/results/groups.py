"""Runs that answer one question: in a fixed order, split by what was swept, asked for numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar, overload

import numpy as np

from fedsim.results.store import Floats, Run
from fedsim.results.tables import ROUNDS

METRICS = (
    "accuracy",
    "perplexity",
    "client_accuracy",
    "loss",
    "client_loss",
    "client_worst10",
    "rouge_l",
    "exact_match",
)
"""What can be compared; where the configured metric was not measured, the first that was."""

How = Literal["final", "best"]
T = TypeVar("T")

# Sections that do not change what is computed, or that are dealt with elsewhere.
_NOT_A_SETTING = (
    "experiment.name",
    "experiment.description",
    "experiment.seeds",
    "tune",
    "sweep",
    "runtime.",
    "journal.",
)


def higher_is_better(column: str) -> bool:
    """Whether larger values of a column are better ones; losses and errors are better small."""
    return not any(word in column for word in ("loss", "perplexity", "error", "mse"))


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; the level `params` of a component vanishes, as in the TOML."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        path = prefix if key == "params" else f"{prefix}.{key}" if prefix else key
        if isinstance(item, Mapping) and (item or key == "params"):
            flat |= flatten(item, path)
        else:
            flat[path] = item
    return flat


class Runs(Sequence[Run]):
    """Runs in the order of their settings, strategies (as the experiment lists them) and seeds.

    Numbers come from finished runs only. As a whole it may span several settings (values of a
    sweep); `groups` splits it into comparisons in which strategy and seed alone differ.

    Attributes:
        setting: in a group of a sweep, the keys that tell it from the others, with their values.
        labels: every strategy of the whole; the position in it decides on its colour.
        repeated: runs left out because another run has the same setting, strategy and seed.
    """

    def __init__(
        self,
        runs: Iterable[Run],
        setting: Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        runs = list(runs)
        self.setting = dict(setting or {})
        self.labels = tuple(labels or _ordered_labels(runs))
        place = {label: index for index, label in enumerate(self.labels)}
        self._all = sorted(runs, key=lambda run: (place[run.label], run.seed))
        self.repeated: list[Run] = []
        self._memo: dict[Hashable, Any] = {}

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> list[Run]: ...
    def __getitem__(self, index: int | slice) -> Run | list[Run]:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._all)

    @cached_property
    def groups(self) -> list[Runs]:
        """One `Runs` for each setting, in the order of the sweep."""
        settings: dict[str, tuple[list[Any], dict[str, Any], list[Run]]] = {}
        keys = _swept_keys(self._all)
        for run in self._all:
            flat = _flat(run)
            setting = {key: flat.get(key) for key in keys}
            order = [_sortable(value) for value in setting.values()]
            settings.setdefault(repr(setting), (order, setting, []))[2].append(run)
        groups = []
        for _, setting, runs in sorted(settings.values(), key=lambda item: item[0]):
            first: dict[tuple[str, int], Run] = {}
            for run in runs:
                first.setdefault((run.label, run.seed), run)
            group = Runs(first.values(), setting, self.labels)
            group.repeated = [run for run in runs if run not in first.values()]
            groups.append(group)
        return groups

    @property
    def name(self) -> str:
        """The setting in words, such as ``data.partition.alpha = 0.1``; empty without a sweep."""
        return ", ".join(f"{key} = {value}" for key, value in self.setting.items())

    @cached_property
    def finished(self) -> list[Run]:
        """The runs that reached their last round."""
        return [run for run in self._all if run.finished]

    @cached_property
    def compared(self) -> list[str]:
        """Labels of the strategies that have a finished run here."""
        there = {run.label for run in self.finished}
        return [label for label in self.labels if label in there]

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds of the finished runs."""
        return sorted({run.seed for run in self.finished})

    def of(self, label: str) -> list[Run]:
        """The strategy's finished runs, by seed."""
        return [run for run in self.finished if run.label == label]

    def colour(self, label: str) -> int:
        """Number of the strategy's colour."""
        return self.labels.index(label)

    def missing(self) -> list[tuple[str, int]]:
        """Label and seed of runs that the experiment asks for and that are not here."""
        wanted = {
            (str(entry.get("label")), int(seed))
            for run in self._all
            for entry in run.experiment.get("strategy") or []
            for seed in (run.experiment.get("experiment") or {}).get("seeds") or []
        }
        lacking = wanted - {(run.label, run.seed) for run in self._all}
        return sorted(lacking, key=lambda item: (self.labels.index(item[0]), item[1]))

    def option(self, section: str, key: str) -> Any:
        """One value of the experiment's configuration, of the first run that has it."""
        for run in self._all:
            value = (run.experiment.get(section) or {}).get(key)
            if value is not None:
                return value
        return None

    @cached_property
    def metric(self) -> str:
        """The column that is compared: the configured one, if it was measured."""
        for name in (self.option("evaluate", "metric"), *METRICS):
            if name and self.measured(name):
                return str(name)
        return "accuracy"

    def measured(self, column: str) -> bool:
        """Whether any finished run has a value in the column."""
        return any(len(run.series(column)[0]) for run in self.finished)

    @cached_property
    def extra_columns(self) -> list[str]:
        """Columns of numbers that strategies added to the rounds table, sorted."""
        names = {name for run in self.finished for name in run.rounds.column_names} - set(ROUNDS)
        return sorted(name for name in names if self.measured(name))

    def values(self, column: str, how: How = "final") -> dict[str, dict[int, float]]:
        """Final or best value of a column by label and seed, without strategies that lack it."""
        pick = _last if how == "final" else (np.max if higher_is_better(column) else np.min)
        found: dict[str, dict[int, float]] = {}
        for run in self.finished:
            series = run.series(column)[1]
            if len(series):
                found.setdefault(run.label, {})[run.seed] = float(pick(series))
        return found

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The result of `compute`, remembered under `key` for as long as these runs are."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]


def _last(values: Floats) -> float:
    return float(values[-1])


def _ordered_labels(runs: Sequence[Run]) -> list[str]:
    listed = [
        str(entry.get("label")) for run in runs for entry in run.experiment.get("strategy") or []
    ]
    return list(dict.fromkeys([*listed, *sorted(run.label for run in runs)]))


def _swept_keys(runs: Sequence[Run]) -> list[str]:
    """Keys that tell settings apart: the sweep's own, or whatever varies within a strategy.

    What differs between strategies only, such as a tuned learning rate, is no setting; nor is a key
    of a strategy that only some of the experiments list.
    """
    flats = [_flat(run) for run in runs]
    declared = {str((run.experiment.get("sweep") or {}).get("key")) for run in runs}
    if len(declared) == 1:
        plain = re.sub(r"[\"']|\.params(?=\.)", "", declared.pop())
        keys = {k for flat in flats for k in flat if k == plain or k.startswith(f"{plain}.")}
        if keys:
            return sorted(keys)
    swept: set[str] = set()
    for label in {run.label for run in runs}:
        own = [flat for run, flat in zip(runs, flats, strict=True) if run.label == label]
        keys = {key for flat in own for key in flat if not key.startswith(_NOT_A_SETTING)}
        swept |= {key for key in keys if len({repr(flat.get(key)) for flat in own}) > 1}
    listed = [{str(e.get("label")) for e in run.experiment.get("strategy") or []} for run in runs]
    common = set.intersection(*listed) if listed else set()
    alike = tuple(f"strategy.{label}." for label in common)
    return sorted(key for key in swept if not key.startswith("strategy.") or key.startswith(alike))


def _flat(run: Run) -> dict[str, Any]:
    """The experiment by dotted key, strategies by label: ``strategy.fedprox.mu``."""
    entries = run.experiment.get("strategy") or []
    by_label = {str(entry.get("label")): {**entry, "tune": None} for entry in entries}
    return flatten({**run.experiment, "strategy": by_label})


def _sortable(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, str(value))
