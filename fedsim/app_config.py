"""The run configuration of the Flower app: which experiment, which of its strategies, which seed.

The keys are those of ``[tool.flwr.app.config]`` in `pyproject.toml`; ``flwr run . --run-config``
changes them. Server and nodes read the same ones.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedsim.config import Experiment, StrategyConfig, load_experiment
from fedsim.core.errors import ConfigError

FILE, OVERRIDES, JSON = "experiment-file", "overrides", "experiment-json"
STRATEGY, SEED, OUT, WAIT = "strategy", "seed", "out", "node-timeout"
STATE = "state-dir"
"""Folder for clients' state; only within one machine, devices name theirs in the node config."""

RunConfig = Mapping[str, bool | float | int | str]


@dataclass(frozen=True)
class Settings:
    """A run configuration, read.

    Attributes:
        experiment: the whole configuration.
        entry: which of its strategies.
        seed: seed of the run.
        out: the run folder on the server; empty: ``runs/NAME/LABEL-seedN``.
        wait: seconds to wait for the nodes.
    """

    experiment: Experiment
    entry: StrategyConfig
    seed: int
    out: str = ""
    wait: float = 60.0

    @staticmethod
    def of(config: RunConfig) -> Settings:
        """Read a run configuration.

        Raises:
            ConfigError: it names no experiment, or one that is faulty.
        """
        if config.get(JSON):
            experiment = Experiment.model_validate_json(str(config[JSON]))
        elif config.get(FILE):
            overrides = shlex.split(str(config.get(OVERRIDES, "")))
            experiment = load_experiment(_found(str(config[FILE])), overrides)
        else:
            raise ConfigError(f"the run configuration names no {FILE!r}: start with `fedsim run`")
        seed = int(config.get(SEED, -1))
        return Settings(
            experiment,
            find_strategy(experiment, str(config.get(STRATEGY, "")) or None),
            experiment.experiment.seeds[0] if seed < 0 else seed,
            str(config.get(OUT, "")),
            float(config.get(WAIT, 60.0)),
        )

    @staticmethod
    def config(experiment: Experiment, entry: StrategyConfig, seed: int) -> dict[str, str | int]:
        """The run configuration that `of` reads back as these."""
        return {JSON: experiment.model_dump_json(), STRATEGY: entry.label, SEED: seed}


def find_strategy(experiment: Experiment, label: str | None) -> StrategyConfig:
    """The strategy of that label; the first one if None. Raises `ConfigError` if there is none."""
    entries = {s.label: s for s in experiment.strategy}
    if label is None:
        return experiment.strategy[0]
    if label not in entries:
        raise ConfigError(f"strategy {label!r} is not in the file; there are {', '.join(entries)}")
    return entries[label]


def _found(name: str) -> Path:
    """A file of the app, or of the working folder."""
    inside = Path(__file__).resolve().parents[1] / name
    return inside if inside.exists() else Path(name)
