"""Centralised training: one client holds everybody's examples, everybody is judged as before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fedsim import api, load_experiment
from fedsim.core.errors import ConfigError, DataError
from fedsim.data import FederatedData, Ragged, pooled
from tests.contract import toy

TOML = """
[experiment]
name = "pooling"
seeds = [3]
rounds = 3
[data]
dataset = "digits"
clients = 8
partition = "two_labels"
[model]
name = "logistic"
[cohort]
size = 4
[[strategy]]
name = "fedavg"
[[strategy]]
name = "fedavg"
label = "centralised"
pooled = 1.0
"""


@pytest.fixture
def data() -> FederatedData:
    return replace(toy.federated(), groups=np.array([0, 1, 0, 1, 0, 1, 0]))


def test_the_pool_trains_and_the_others_are_judged(data: FederatedData) -> None:
    found = pooled(data, 1.0, 5)
    assert found.num_clients == data.num_clients + 1
    assert found.client_names[-1] == "pool"
    np.testing.assert_array_equal(found.train[7], np.sort(data.train.values))
    assert not len(found.test[7])
    for client in range(7):
        np.testing.assert_array_equal(found.test[client], data.test[client])
    np.testing.assert_array_equal(found.heldout_clients, np.arange(7))
    assert found.groups is not None
    assert found.groups.tolist() == [0, 1, 0, 1, 0, 1, 0, 2]
    assert found.fields is data.fields


def test_a_share_is_drawn_by_the_seed_without_test_examples(data: FederatedData) -> None:
    part = pooled(data, 0.25, 5).train[7]
    assert len(part) == round(0.25 * sum(toy.SIZES))
    assert set(part) <= set(data.train.values)
    np.testing.assert_array_equal(part, pooled(data, 0.25, 5).train[7])
    assert part.tolist() != pooled(data, 0.25, 6).train[7].tolist()
    assert len(pooled(data, 1e-9, 5).train[7]) == 1
    assert pooled(data, 0.25, 5).fingerprint != pooled(data, 0.5, 5).fingerprint


def test_clients_that_are_never_trained_on_stay_out(data: FederatedData) -> None:
    away = replace(data, heldout_clients=np.array([2]))
    assert not set(pooled(away, 1.0, 5).train[7]) & set(data.train[2])
    nothing = replace(data, train=Ragged.from_lists([np.empty(0, np.int64)] * 7))
    with pytest.raises(DataError, match="no client has any"):
        pooled(nothing, 1.0, 5)


def test_a_strategy_of_an_experiment_is_trained_centrally(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text(TOML)
    experiment = load_experiment(file)
    rows = {}
    for label in ("fedavg", "centralised"):
        done = api.run(experiment, strategy=label, out=tmp_path / label)
        rows[label] = pq.read_table(done.path / "clients.parquet").to_pylist()
    assert {r["client"] for r in rows["centralised"] if r["status"]} == {8}
    assert {r["name"] for r in rows["centralised"] if r["status"]} == {"pool"}
    judged = {
        label: {r["client"]: r["eval_examples"] for r in found if r["eval_examples"]}
        for label, found in rows.items()
    }
    assert judged["centralised"] == judged["fedavg"]
    assert len(judged["fedavg"]) == 8


@pytest.mark.parametrize("share", ["0.0", "1.5", '"all"'])
def test_an_impossible_share_is_told(tmp_path: Path, share: str) -> None:
    file = tmp_path / "e.toml"
    file.write_text(TOML.replace("pooled = 1.0", f"pooled = {share}"))
    with pytest.raises(ConfigError, match="pooled"):
        load_experiment(file)
