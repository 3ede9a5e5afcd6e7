"""Chooses each strategy's parameters on seeds of their own, before the comparison."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedsim.config import Experiment, StrategyConfig, slug
from fedsim.core.errors import ConfigError, FedsimError, RunError
from fedsim.core.events import Notice
from fedsim.results import Run
from fedsim.results.files import write_text
from fedsim.runner import OnEvent, RunResult, Task

FILE = "tuning.json"
"""What was tried: for each strategy the best values, and of every candidate score or failure."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "client_loss"})
RunAll = Callable[[Sequence[Task]], Iterator[RunResult | FedsimError]]


def candidates(experiment: Experiment, entry: StrategyConfig) -> list[dict[str, Any]]:
    """Every combination of the values to try for a strategy, by dotted key."""
    shared = experiment.tune.grid if experiment.tune else {}
    grid = {**shared, **entry.tune}
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def with_values(entry: StrategyConfig, values: dict[str, Any]) -> StrategyConfig:
    """The strategy with values set: ``train.KEY`` in its training, ``model.KEY`` in its model,
    other keys as its parameters.

    Raises:
        ConfigError: a key belongs to none of these.
    """
    tables = {"": dict(entry.params), "train": dict(entry.train), "model": dict(entry.model)}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section not in tables:
            raise ConfigError(
                f"tune key {key!r} must be train.NAME, model.NAME or a strategy's parameter"
            )
        tables[section][name] = value
    params = tables.pop("")
    return StrategyConfig.model_validate({**entry.model_dump(), "params": params, **tables})


def tune(
    experiment: Experiment, folder: Path, run_all: RunAll, on_event: OnEvent | None
) -> list[StrategyConfig]:
    """The strategies with their best values; as they are without ``[tune]``.

    Every strategy is run with every candidate on the tuning seeds; the best mean of the final
    metric wins, the earlier candidate on a tie. A candidate fails, and cannot win, if on one of
    the seeds it raises, its metric is missing or not finite (it diverged), or no round counted (all
    of its clients diverged, say), for then its metric is that of the model it started from. What
    was tried is written to `tuning.json`, failures with their reasons.

    Args:
        experiment: the configuration.
        folder: where the tuning runs go.
        run_all: runs tasks; what came of each, in their order.
        on_event: told of every start, round and end.

    Raises:
        RunError: every candidate of a strategy failed.
    """
    config = experiment.tune
    if config is None:
        return list(experiment.strategy)
    metric = experiment.evaluate.metric
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    trial = _trial(experiment)
    chosen, tried = [], {}
    for entry in experiment.strategy:
        home = folder / slug(entry.label)
        scores: list[tuple[float, dict[str, Any]]] = []
        shown: list[dict[str, Any]] = []
        tasks = [
            Task(trial, with_values(entry, values), seed, home / f"{_name(values)}-seed{seed}")
            for values in candidates(experiment, entry)
            for seed in config.seeds
        ]
        outcomes = run_all(tasks)
        for values in candidates(experiment, entry):
            mine = list(itertools.islice(outcomes, len(config.seeds)))
            try:
                score = _score(mine, metric)
            except FedsimError as error:
                shown.append({"values": values, "score": None, "failed": str(error)})
                if on_event:
                    on_event(Notice(f"{slug(entry.label)} {_name(values)}", f"failed: {error}"))
            else:
                scores.append((score, values))
                shown.append({"values": values, "score": score})
        best = max(scores, key=lambda s: sign * s[0], default=None)
        tried[entry.label] = {
            "metric": metric,
            "best": None if best is None else best[1],
            "candidates": shown,
        }
        write_text(folder / FILE, json.dumps(tried, indent=1))
        if best is None:
            raise RunError(
                f"tuning {entry.label}: every candidate failed, the first because "
                f"{shown[0]['failed']}; widen the grid, or see that [evaluate] measures {metric}"
            )
        chosen.append(with_values(entry, best[1]))
    return chosen


def _name(values: dict[str, Any]) -> str:
    """Name of a candidate in its folders."""
    return slug("-".join(f"{k}={v}" for k, v in values.items())) or "only"


def _score(outcomes: Sequence[RunResult | FedsimError], metric: str) -> float:
    """Mean of the final metric over a candidate's runs.

    Raises:
        FedsimError: one of them failed, or says nothing of the candidate.
    """
    from fedsim.results.clients import untrained

    results = []
    for result in outcomes:
        if isinstance(result, FedsimError):
            raise result
        results.append(result)
        reason = untrained(Run.load(result.path))
        value = result.metrics.get(metric)
        if reason is None and (value is None or not math.isfinite(value)):
            reason = f"{metric} was not measured" if value is None else f"{metric} is {value}"
        if reason is not None:
            raise RunError(f"seed {result.seed}: {reason}")
    return sum(r.metrics[metric] for r in results) / len(results)


def _trial(experiment: Experiment) -> Experiment:
    """The experiment as tuning runs it: its own number of rounds, evaluated at the end."""
    assert experiment.tune is not None
    rounds = experiment.tune.rounds or experiment.experiment.rounds
    return experiment.model_copy(
        update={
            "experiment": experiment.experiment.model_copy(update={"rounds": rounds}),
            "evaluate": experiment.evaluate.model_copy(update={"every": rounds}),
            "journal": experiment.journal.model_copy(update={"every": rounds}),
        }
    )
