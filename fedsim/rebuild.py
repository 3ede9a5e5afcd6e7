"""The final model of a run, made again from its ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.config import Experiment, StrategyConfig
from fedsim.core.errors import RunError
from fedsim.core.records import from_record
from fedsim.core.strategy import Setting, Strategy
from fedsim.ledger import Ledger
from fedsim.runner import LEDGER, build_strategy, saved_config
from fedsim.runtime.work import Environment


def rebuild(path: Path, env: Environment | None = None) -> dict[str, Tensor]:
    """The model of a run folder, without its checkpoints and its model file.

    Args:
        path: the run folder.
        env: data and initial model; None makes them again from the folder's configuration.

    Raises:
        RunError: there is no run or no ledger, or it is damaged, or the strategy keeps none.
    """
    config = saved_config(path)
    if config is None:
        raise RunError(f"{path} is no run folder: it has no config.json")
    entries = Ledger(path / LEDGER).entries()
    if not entries:
        raise RunError(f"{path} has no ledger: {config['strategy']['name']} keeps none")
    experiment = Experiment.model_validate(config["experiment"])
    entry = StrategyConfig.model_validate(config["strategy"])
    strategy: Strategy = build_strategy(entry)
    env = env or Environment.of(experiment, config["seed"], entry)
    strategy.setup(
        Setting(
            env.model.info,
            env.data.num_clients,
            config["seed"],
            experiment.experiment.rounds,
            None,
            env.model.initial(),
            resident=lambda: env.model.resident,
        )
    )
    replay: Any = getattr(strategy, "replay", None)
    arrays = replay(content for _, content in entries)
    (served,) = strategy.models(arrays).values()
    return {n: t.clone() for n, t in from_record(served.arrays).items()}
