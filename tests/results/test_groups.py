"""Runs are ordered, split by what was swept, and asked for their numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedsim.results.groups import Runs, flatten, higher_is_better
from fedsim.results.store import Run, find_runs


def config(**changes: Any) -> dict[str, Any]:
    entries = [{"label": label} for label in ("b", "a")]
    base = {"experiment": {"seeds": [0, 1], "rounds": 2}, "train": {"lr": 0.1}, "strategy": entries}
    return {**base, **changes}


def test_flatten_drops_the_level_of_parameters() -> None:
    nested = {"data": {"partition": {"name": "dirichlet", "params": {"alpha": 0.1}}, "clients": 5}}
    assert flatten(nested) == {
        "data.partition.name": "dirichlet",
        "data.partition.alpha": 0.1,
        "data.clients": 5,
    }
    assert flatten({"params": {"mu": 1}, "train": {}}) == {"mu": 1, "train": {}}


@pytest.mark.parametrize(
    ("column", "higher"),
    [("accuracy", True), ("cluster_ari", True), ("client_loss", False), ("perplexity", False)],
)
def test_direction(column: str, higher: bool) -> None:
    assert higher_is_better(column) is higher


def test_order_follows_the_experiment_not_the_folders(tmp_path: Path, written: Any) -> None:
    for label in "ab":
        for seed in (1, 0):
            written(tmp_path / f"{label}{seed}", label, seed, [{"loss": 1.0}], config=config())
    runs = Runs(reversed(find_runs(tmp_path)))
    assert [(run.label, run.seed) for run in runs] == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    assert (runs.labels, runs.compared, runs.seeds) == (("b", "a"), ["b", "a"], [0, 1])
    assert runs.colour("a") == 1
    assert runs[0].label == "b"
    assert len(runs[1:]) == 3


def test_final_and_best(tmp_path: Path, written: Any) -> None:
    rows = [{"loss": 3.0, "accuracy": 0.1}, {"loss": 1.0, "accuracy": 0.9}, {"accuracy": 0.8}]
    written(tmp_path / "a", "a", 0, rows)
    written(tmp_path / "b", "b", 0, [{"loss": 2.0}, {"loss": math.nan}])
    runs = Runs(find_runs(tmp_path))
    assert runs.metric == "accuracy"
    assert runs.values("accuracy") == {"a": {0: 0.8}}
    assert runs.values("accuracy", "best") == {"a": {0: 0.9}}
    assert runs.values("loss", "best")["a"] == {0: 1.0}
    assert math.isnan(runs.values("loss")["b"][0])
    assert runs.values("perplexity") == {}


def test_unfinished_runs_have_no_numbers(tmp_path: Path, written: Any) -> None:
    written(tmp_path / "a", "a", 0, [{"accuracy": 0.5}], state="running")
    runs = Runs(find_runs(tmp_path))
    assert len(runs) == 1
    assert (runs.finished, runs.compared, runs.values("accuracy")) == ([], [], {})
    assert runs.metric == "accuracy"


@pytest.mark.parametrize(
    ("metric", "columns", "chosen"),
    [
        ("perplexity", {"loss": 1.0, "perplexity": 2.0}, "perplexity"),
        ("accuracy", {"loss": 1.0}, "loss"),
        ("accuracy", {"loss": 1.0, "client_accuracy": 0.5}, "client_accuracy"),
    ],
)
def test_metric(tmp_path: Path, written: Any, metric: str, columns: dict, chosen: str) -> None:
    written(tmp_path, "a", 0, [columns], config=config(evaluate={"metric": metric}))
    assert Runs([Run.load(tmp_path)]).metric == chosen


def test_extra_columns_are_numbers_that_strategies_added(tmp_path: Path, written: Any) -> None:
    row = {
        "loss": 1.0,
        "ari": 0.5,
        "phase": "warm",
        "sizes": [1, 2],
        "empty": None,
        "swapped": True,
    }
    written(tmp_path, "a", 0, [row])
    assert Runs([Run.load(tmp_path)]).extra_columns == ["ari", "swapped"]


def test_a_sweep_is_split_by_the_key_that_differs(sweep: Path) -> None:
    groups = Runs(reversed(find_runs(sweep))).groups
    assert [g.name for g in groups] == [f"data.partition.alpha = {a}" for a in (0.1, 1.0, 10.0)]
    assert [len(g) for g in groups] == [16] * 3
    assert groups[2].labels == ("FedAvg", "FedLD")


def split(tmp_path: Path, written: Any, configs: list[tuple[str, int, dict]]) -> list[dict]:
    for number, (label, seed, content) in enumerate(configs):
        written(tmp_path / f"{number:02}", label, seed, [{"loss": 1.0}], config=content)
    return [group.setting for group in Runs(find_runs(tmp_path)).groups]


def test_what_differs_between_strategies_only_is_no_setting(tmp_path: Path, written: Any) -> None:
    rates = {"a": 0.1, "b": 0.3}
    found = split(
        tmp_path, written, [(s, i, config(train={"lr": rates[s]})) for s in "ab" for i in (0, 1)]
    )
    assert found == [{}]


def test_a_declared_sweep_is_not_confused_by_tuned_values(tmp_path: Path, written: Any) -> None:
    rates = {("a", 1): 0.1, ("a", 9): 0.3, ("b", 1): 0.1, ("b", 9): 0.1}
    configs = [
        (s, 0, config(train={"lr": lr}, sweep={"key": "data.k"}, data={"k": k}))
        for (s, k), lr in rates.items()
    ]
    assert split(tmp_path, written, configs) == [{"data.k": 1}, {"data.k": 9}]


def test_a_swept_component_may_change_its_keys(tmp_path: Path, written: Any) -> None:
    partitions = [{"name": "iid", "params": {}}, {"name": "dirichlet", "params": {"alpha": 1.0}}]
    found = split(tmp_path, written, [("a", 0, config(data={"p": p})) for p in partitions])
    assert found == [
        {"data.p.alpha": 1.0, "data.p.name": "dirichlet"},
        {"data.p.alpha": None, "data.p.name": "iid"},
    ]


@pytest.mark.parametrize("sweep", [{"key": "strategy.'a'.mu"}, None])
def test_a_swept_key_of_one_strategy_splits_them_all(
    tmp_path: Path, written: Any, sweep: dict | None
) -> None:
    def entries(mu: int) -> list[dict]:
        return [{"label": "a", "params": {"mu": mu}}, {"label": "b", "params": {}}]

    configs = [(s, 0, config(strategy=entries(mu), sweep=sweep)) for mu in (1, 2) for s in "ab"]
    assert split(tmp_path, written, configs) == [{"strategy.a.mu": 1}, {"strategy.a.mu": 2}]


def test_comparisons_of_other_strategies_can_be_put_together(tmp_path: Path, written: Any) -> None:
    listed = {"a": ["a", "b"], "c": ["a", "c"]}
    configs = [(s, 0, config(strategy=[{"label": e} for e in listed[s]])) for s in "ac"]
    assert split(tmp_path, written, configs) == [{}]


def test_names_workers_and_checkpoints_are_no_setting(tmp_path: Path, written: Any) -> None:
    changes = [
        {"experiment": {"name": "x", "seeds": [3], "rounds": 2}},
        {"runtime": {"workers": 2}},
        {"journal": {"every": 5}},
    ]
    assert split(tmp_path, written, [("a", i, config(**c)) for i, c in enumerate(changes)]) == [{}]


def test_a_repeated_run_counts_once(tmp_path: Path, written: Any) -> None:
    for name in "xy":
        written(tmp_path / name, "a", 0, [{"loss": 1.0}], config=config())
    [group] = Runs(find_runs(tmp_path)).groups
    assert [run.path.name for run in group] == ["x"]
    assert [run.path.name for run in group.repeated] == ["y"]


def test_missing_runs_are_known_from_the_experiment(tmp_path: Path, written: Any) -> None:
    written(tmp_path / "a", "a", 1, [{"loss": 1.0}], config=config())
    assert Runs(find_runs(tmp_path)).missing() == [("b", 0), ("b", 1), ("a", 0)]
