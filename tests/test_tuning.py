"""Tuning: the best candidate wins; one that diverged or never trained does not, and is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedsim import api
from fedsim.config import Experiment
from fedsim.core.errors import RunError
from fedsim.results import Run, RunWriter
from fedsim.results.clients import untrained
from fedsim.runner import RunResult, Task
from fedsim.tuning import tune

Scores = dict[float, list[float | None]]
REFUSED = {"status": "refused", "reason": "not_finite: 0.weight holds NaN"}


def experiment(metric: str = "client_accuracy", rates: tuple[float, ...] = (0.1, 0.2, 0.3)) -> Any:
    return Experiment.model_validate(
        {
            "experiment": {"name": "toy", "seeds": [0], "rounds": 2},
            "data": {"dataset": "digits", "clients": 4},
            "model": "logistic",
            "evaluate": {"metric": metric, "clients": False},
            "tune": {"seeds": [7, 8], "grid": {"train.lr": list(rates)}},
            "strategy": [{"name": "fedavg"}],
        }
    )


def write(task: Task, counted: tuple[bool, ...], clients: list[dict[str, Any]]) -> None:
    """The run folder of a task, with these rounds after round 0."""
    writer = RunWriter(task.path)
    writer.write_config({"strategy": {"label": "fedavg"}, "seed": task.seed})
    rows = [{"round": i, "abandoned": not c} for i, c in enumerate((True, *counted))]
    writer.write_tables(rows, clients, [])


def ending(
    scores: Scores, metric: str, barren: tuple[float, ...] = ()
) -> Callable[[Sequence[Task]], Iterator[RunResult]]:
    """Runs with these values at the end; None: without any. No round of the `barren` counts."""

    def execute(task: Task) -> RunResult:
        rate = task.entry.train["lr"]
        never = rate in barren
        told = [{"round": r, "client": c, **REFUSED} for r in (1, 2) for c in range(3)]
        write(task, (not never, False), told if never else [])
        value = scores[rate][task.seed - 7]
        return RunResult(task.path, "fedavg", task.seed, {} if value is None else {metric: value})

    return lambda tasks: map(execute, tasks)


def chosen(folder: Path, scores: Scores, metric: str, barren: tuple[float, ...] = ()) -> float:
    """The learning rate that wins."""
    (entry,) = tune(experiment(metric), folder, ending(scores, metric, barren), None)
    best: float = entry.train["lr"]
    return best


def candidates(folder: Path) -> dict[float, dict[str, Any]]:
    """What `tuning.json` tells of every learning rate."""
    tried = json.loads((folder / "tuning.json").read_text())["fedavg"]["candidates"]
    return {c["values"]["train.lr"]: c for c in tried}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_what_diverged_on_one_seed_never_wins(bad: float | None, tmp_path: Path) -> None:
    scores: Scores = {0.1: [0.9, bad], 0.2: [0.2, 0.4], 0.3: [0.1, 0.4]}
    assert chosen(tmp_path, scores, "client_accuracy") == 0.2
    assert chosen(tmp_path, scores, "loss") == 0.3
    told = candidates(tmp_path)
    assert [c["score"] for c in told.values()] == [None, pytest.approx(0.3), 0.25]
    what = "was not measured" if bad is None else f"is {bad}"
    assert told[0.1]["failed"] == f"seed 8: loss {what}"
    assert "failed" not in told[0.2]


@pytest.mark.parametrize("metric", ["client_accuracy", "loss"])
def test_what_never_trained_loses_to_whatever_did(metric: str, tmp_path: Path) -> None:
    """Its score is that of the model everybody starts from, which is better than a bad rate's."""
    good = 0.9 if metric == "client_accuracy" else 0.1
    scores: Scores = {0.1: [good, good], 0.2: [0.4, 0.4], 0.3: [0.4, 0.4]}
    assert chosen(tmp_path, scores, metric) == 0.1
    assert chosen(tmp_path, scores, metric, barren=(0.1,)) == 0.2
    assert candidates(tmp_path)[0.1] == {
        "values": {"train.lr": 0.1},
        "score": None,
        "failed": "seed 7: no round counted: not_finite: 0.weight holds NaN (6 of 6 replies)",
    }


def test_a_run_is_trained_once_a_round_counted(tmp_path: Path) -> None:
    task = Task(experiment(), experiment().strategy[0], 0, tmp_path)
    for counted, why in (
        ((False, True), None),
        ((), None),
        ((False, False), "no round counted: too few clients were there"),
    ):
        write(task, counted, [])
        assert untrained(Run.load(tmp_path)) == why


def test_nothing_to_choose_from(tmp_path: Path) -> None:
    scores: Scores = {0.1: [None, 1.0], 0.2: [math.nan] * 2, 0.3: [None] * 2}
    with pytest.raises(
        RunError,
        match="every candidate failed, the first because seed 7: client_accuracy was not measured",
    ):
        chosen(tmp_path, scores, "client_accuracy")
    assert len(candidates(tmp_path)) == 3, "what was tried is told all the same"


def test_clients_that_all_diverge_fail_and_the_report_says_so(tmp_path: Path) -> None:
    """A rate at which every reply is refused, beside one at which training makes things worse."""
    done = api.compare(experiment("loss", (1e30, 50.0)), out=tmp_path)
    told = candidates(tmp_path / "tune")
    run = Run.load(done.results[0].path)
    start = run.series("loss")[1][0]
    assert told[50.0]["score"] > start, "else it would have won anyway"
    assert run.config["strategy"]["train"]["lr"] == 50.0
    assert told[1e30]["failed"].startswith("seed 7: no round counted: too_large: ")
    page = " ".join(done.markdown.read_text().split())
    assert "| fedavg | train.lr = 1e+30 | – | failed: seed 7: no round counted: too" in page
    assert "| train.lr = 50.0 |" in page.replace("*", "")
    assert "| chosen |" in page
