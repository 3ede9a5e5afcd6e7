"""Tuning: the best candidate wins, and one that diverged never does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedsim.config import Experiment
from fedsim.core.errors import RunError
from fedsim.runner import RunResult, Task
from fedsim.tuning import tune


def experiment(metric: str = "client_accuracy") -> Experiment:
    return Experiment.model_validate(
        {
            "experiment": {"name": "toy", "seeds": [0]},
            "data": {"dataset": "digits"},
            "model": "logistic",
            "evaluate": {"metric": metric},
            "tune": {"seeds": [7, 8], "grid": {"train.lr": [0.1, 0.2, 0.3]}},
            "strategy": [{"name": "fedavg"}],
        }
    )


def chosen(folder: Path, scores: dict[float, list[float | None]], metric: str) -> float:
    """The learning rate that wins where runs end with these values; None: without any."""

    def execute(task: Task, on_event: object) -> RunResult:
        value = scores[task.entry.train["lr"]][task.seed - 7]
        return RunResult(task.path, "fedavg", task.seed, {} if value is None else {metric: value})

    (entry,) = tune(experiment(metric), folder, execute, None)
    best: float = entry.train["lr"]
    return best


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_what_diverged_on_one_seed_never_wins(bad: float | None, tmp_path: Path) -> None:
    scores: dict[float, list[float | None]] = {0.1: [0.9, bad], 0.2: [0.2, 0.4], 0.3: [0.1, 0.4]}
    assert chosen(tmp_path, scores, "client_accuracy") == 0.2
    assert chosen(tmp_path, scores, "loss") == 0.3
    tried = json.loads((tmp_path / "tuning.json").read_text())
    assert [c["train.lr"] for c in tried["fedavg"]["candidates"]] == [0.2, 0.3]


def test_nothing_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no candidate ended with a finite client_accuracy"):
        chosen(
            tmp_path, {0.1: [None, 1.0], 0.2: [math.nan] * 2, 0.3: [None] * 2}, "client_accuracy"
        )
