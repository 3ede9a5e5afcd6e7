"""Early stopping of each client by itself: who rests, who comes back, and that a resume knows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedsim.config import StrategyConfig
from fedsim.core.errors import ConfigError
from fedsim.core.events import Event, RoundFinished
from fedsim.patience import Patience
from fedsim.runner import Run, Task
from tests.contract import toy
from tests.contract.rows import Row

WILD: dict[str, Any] = {"train": {"lr": 0.3}, "evaluate": {"clients_every": 1}}
"""Steps so large that, with few clients a round, losses go up and down."""
COHORT = {"fraction": 0.4, "patience": 1}
ROWS = [Row("fedavg"), Row("flexlora", {"ranks": [2, 1]}, model="lora"), Row("local")]
ROUNDS = 8


def test_who_rests_and_who_comes_back() -> None:
    patience = Patience(2, 0.1, 3)
    for losses in ([5.0, 5.0, 5.0], [4.0, 4.95, math.nan], [3.0, 4.93, 6.0]):
        assert patience.awake([1, 2, 3]) == [1, 2, 3]
        patience.judge([0, 1, 2], losses)
    assert patience.awake([1, 2, 3]) == [1]
    patience.judge([1], [4.95])
    assert patience.awake([1, 2, 3]) == [1]
    patience.judge([1, 2], [4.89, 5.0])  # the first is lower than 5 by more than 0.1
    assert patience.awake([1, 2, 3]) == [1, 2]
    assert Patience(None, 0.0, 3).awake([3]) == [3]


def expected(clients: list[dict[str, Any]], most: int) -> dict[int, set[int]]:
    """Who rests in every round, from the clients' losses alone."""
    losses: dict[int, list[float]] = {}
    for row in clients:
        losses.setdefault(row["client"], []).append(row["eval_loss"])
    found: dict[int, set[int]] = {}
    for server_round in range(1, ROUNDS + 1):
        found[server_round] = set()
        for client, all_ in losses.items():
            seen = all_[:server_round]
            best = seen.index(min(seen))
            if server_round - 1 - best >= most:
                found[server_round].add(client)
    return found


def test_nobody_who_rests_is_asked() -> None:
    progress = toy.run(Row("fedavg").federation(rounds=ROUNDS, cohort=COHORT, **WILD))
    resting = expected(list(progress.clients), 1)
    for server_round, rest in resting.items():
        rows = [r for r in progress.clients if r["round"] == server_round]
        asked = {r["client"] for r in rows if "status" in r}
        assert not asked & rest
        assert len(asked) == math.ceil(0.4 * (7 - len(rest)))
        assert progress.rounds[server_round]["resting"] == len(rest)
    later = [resting[n] - resting[n + 1] for n in range(1, ROUNDS)]
    assert any(resting.values())
    assert any(later), "nobody came back"


def test_when_all_rest_nothing_is_sent_or_changed() -> None:
    fed = toy.federation(
        StrategyConfig(name="fedavg"), rounds=4, evaluate={"clients_every": 1},
        cohort={"patience": 1, "min_delta": 1e9, "fraction": 0.5},
    )  # fmt: skip
    progress = fed.begin()
    fed.advance(progress)
    model, before = toy.sha256(progress.arrays), progress.rounds[1]
    assert (before["sampled"], before["resting"]) == (4, 0)
    for _ in range(2):
        fed.advance(progress)
        now = progress.rounds[-1]
        assert (now["sampled"], now["resting"], now["bytes_down"]) == (0, 7, 0)
        assert now["loss"] == before["loss"]
        assert toy.sha256(progress.arrays) == model


def test_without_patience_nobody_rests() -> None:
    progress = toy.run(Row("fedavg").federation(rounds=2, **WILD))
    assert all("resting" not in row for row in progress.rounds)


def execute(row: Row, folder: Path, stop: int = 0) -> dict[str, bytes]:
    """Rounds up to `stop`, or all; what is on disk then."""

    def interrupt(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.round == stop:
            raise KeyboardInterrupt

    env = toy.environment([row.client], model=row.model)
    task = Task(
        toy.experiment(row.entry, ROUNDS, cohort=COHORT, **WILD), row.entry, toy.SEED, folder
    )
    Run(task, interrupt, env=env).execute(resume=folder.exists())
    files = [f for f in folder.glob("*") if f.suffix in (".parquet", ".safetensors")]
    return {f.name: f.read_bytes() for f in sorted(files) if f.name != "timings.parquet"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_resumed_run_knows_who_rests(row: Row, tmp_path: Path) -> None:
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            execute(row, tmp_path / "pieces", stop)
    assert execute(row, tmp_path / "pieces") == execute(row, tmp_path / "whole")


@pytest.mark.parametrize("evaluate", [{}, {"clients": False, "clients_every": 1}])
def test_patience_needs_evaluations(evaluate: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValueError), match=r"needs evaluate.clients_every"):
        toy.experiment(StrategyConfig(name="fedavg"), cohort={"patience": 2}, evaluate=evaluate)
