"""The properties that an implementation of FedAP owes: where each is tested, and the rest."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.config import StrategyConfig
from fedsim.core import clustering
from fedsim.core.clustering import Rule
from fedsim.core.records import as_flat
from fedsim.data import FederatedData, Ragged
from fedsim.data.partitions import two_labels
from fedsim.data.raw import supervised
from tests.contract import toy

ROOT = Path(__file__).parents[1]
CORE, OWN, FAMILY, HERE = (
    "core/test_clustering.py",
    "strategies/test_fedap.py",
    "strategies/test_clusters.py",
    "strategies/test_fedap_properties.py",
)
TESTED = {
    "planted groups are found: linkages, cuts, all parameters, last layer, sketches": (
        (CORE, "test_planted_groups_are_found"),
        (OWN, "test_groups_are_found_and_told"),
        (HERE, "test_planted_groups_are_found_in_sketches"),
    ),
    "the order of clients does not matter": (
        (CORE, "test_neither_order_nor_numbering_of_clients_matters"),
        (FAMILY, "test_clusters_do_not_depend_on_the_numbering_of_clients"),
    ),
    "weights and updates give one tree": ((CORE, "test_weights_and_updates_give_the_same_tree"),),
    "rotations and signs keep clusters": ((CORE, "test_rotations_and_signs_keep_the_clusters"),),
    "points and threshold scale together": ((CORE, "test_these_cuts_are_free_of_scale"),),
    "from N clusters to 1, never more": (
        (CORE, "test_a_higher_threshold_never_gives_more_clusters"),
    ),
    "joiners find their group, at scipy's cost; outliers none": (
        (CORE, "test_a_joiner_costs_what_scipy_says"),
        (CORE, "test_late_joiners_go_to_their_group_and_outliers_nowhere"),
        (OWN, "test_who_is_absent_at_the_clustering_joins_later"),
        (OWN, "test_an_outlier_makes_a_cluster_of_its_own"),
    ),
    "a least size, nobody lost, labels from 0": (
        (CORE, "test_small_clusters_join_the_nearest_and_nobody_is_lost"),
    ),
    "Reptile: a step of 1 is FedAvg, of 0 stands still; one gradient step is FedSGD's times eps": (
        (OWN, "test_a_step_of_one_is_fedavg_and_of_zero_stands_still"),
        (HERE, "test_reptile_with_one_gradient_step_is_fedsgd_times_eps"),
    ),
    "clusters begin at their members' weighted mean; with one cluster it is FedAvg": (
        (OWN, "test_clusters_begin_at_their_members_mean"),
        (HERE, "test_the_mean_is_weighted_by_examples"),
    ),
    "clusters do not mix": (
        (OWN, "test_what_happens_in_one_cluster_leaves_the_other_alone"),
        (FAMILY, "test_what_befalls_one_cluster_leaves_the_other_alone_to_the_bit"),
    ),
    "personalisation leaves the clusters alone": (
        (OWN, "test_personalisation_leaves_the_clusters_alone"),
    ),
    "fewer members than asked for": (
        (OWN, "test_members_train_in_a_cluster_smaller_than_asked_for"),
    ),
    "no counters in the signature; twice the examples do not change the cluster": (
        (OWN, "test_signatures_leave_statistics_out_unless_asked"),
        (HERE, "test_more_examples_do_not_change_the_cluster"),
    ),
    "the paper's split": ((HERE, "test_the_papers_split_of_ham10000"),),
    "a resumed run goes on to the bit": (
        (OWN, "test_state_goes_through_a_checkpoint_after_the_clustering"),
        (FAMILY, "test_a_crash_between_clustering_and_saving_restores_the_clusters_exactly"),
    ),
}
"""Properties A1 to A16, in order: where each is tested."""


def test_every_property_has_its_tests() -> None:
    assert len(TESTED) == 16
    there = {
        (file, node.name)
        for file in (CORE, OWN, FAMILY, HERE)
        for node in ast.parse((ROOT / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {place for places in TESTED.values() for place in places} <= there


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("rule", [Rule(), Rule("average", "cosine", "distance", t=0.6)], ids=str)
def test_planted_groups_are_found_in_sketches(rule: Rule, size: int) -> None:
    for seed in range(4):
        draw, truth = np.random.default_rng(seed), np.arange(24) % 4
        points = 2 * draw.normal(size=(4, 3000))[truth] + draw.normal(size=(24, 3000))
        made = [clustering.sketch(torch.from_numpy(p).float(), size, seed) for p in points]
        found = clustering.cluster(range(24), np.stack(made), rule)
        assert clustering.agreement(found.labels, truth)[0] == 1.0


def federation(params: dict[str, Any], **options: Any) -> Any:
    given = {"warmup_rounds": 0, "cut": "k", "k": 1, "personal_epochs": 0, **params}
    return toy.federation(StrategyConfig(name="fedap", params=given), **options)


def test_reptile_with_one_gradient_step_is_fedsgd_times_eps() -> None:
    train = {"epochs": 1, "batch_size": 100}
    moves = []
    for eps in (1.0, 0.25):
        params = {"meta_step": eps, "meta_step_end": eps, "signature_epochs": 1}
        fed = federation(params, rounds=2, train=train)
        progress = toy.run(fed, 1)
        before = fed.strategy.heads[0].flat.clone()
        fed.advance(progress)
        moves.append(fed.strategy.heads[0].flat - before)
    torch.testing.assert_close(moves[1], 0.25 * moves[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_mean_is_weighted_by_examples(weighted: bool) -> None:
    fed = federation({"weighted": weighted, "signature_epochs": 1}, rounds=1)
    progress = fed.begin()
    messages = toy.messages_of(fed, progress.arrays, 1)
    models = [as_flat(r["arrays"]).flat.double() for r in toy.contents_of(fed, messages)]
    fed.advance(progress)
    weights = torch.tensor(toy.SIZES if weighted else toy.EQUAL, dtype=torch.float64)
    mean = (torch.stack(models) * (weights / weights.sum())[:, None]).sum(0)
    torch.testing.assert_close(fed.strategy.heads[0].flat.double(), mean, rtol=1e-5, atol=1e-6)


def repeated() -> FederatedData:
    """Two groups of three clients; the first client has all of its examples four times."""
    data = toy.federated((20,) * 6)
    y = data.fields["y"].clone()
    for client in (1, 3, 5):
        rows = np.concatenate([data.train[client], data.test[client]])
        y[rows] = (y[rows] + 1) % toy.CLASSES
    train = [np.tile(data.train[c], 4 if c == 0 else 1) for c in range(6)]
    return replace(
        data,
        fields={**data.fields, "y": y},
        train=Ragged.from_lists(train),
        groups=np.array([0, 1] * 3),
    )


def test_more_examples_do_not_change_the_cluster() -> None:
    def clusters(params: dict[str, Any]) -> list[int]:
        given = {"k": 2, "signature_epochs": 10, **params}
        fed = federation(given, rounds=1, model="bn", data=repeated())
        toy.run(fed)
        return [fed.strategy.members[n] for n in range(1, 7)]

    assert clusters({}) == [0, 1, 0, 1, 0, 1]
    for signature in ("params", "state_dict"):  # where lengths count, it is set apart
        assert clusters({"signature": signature, "unit": False}) == [0, 1, 1, 1, 1, 1]


def test_the_papers_split_of_ham10000() -> None:
    """Label counts of HAM10000: 30 to 36 clients with two labels of 35 images, most often 35."""
    counts = [327, 514, 1099, 115, 1113, 6705, 142]
    y = np.repeat(np.arange(7), counts)
    raw = supervised("blobs", np.zeros((len(y), 1), np.float32), y)
    found = []
    for seed in range(20):
        clients = two_labels(raw, np.arange(len(y)), None, seed)
        table = np.array([np.bincount(y[clients[c]], minlength=7) for c in range(len(clients))])
        assert ((table == 35).sum(1) == 2).all()
        assert (table.sum(1) == 70).all()
        assert len(np.unique(clients.values)) == len(clients.values)
        assert (table.sum(0) // 35 <= np.minimum(counts, 500) // 35).all()
        found.append(len(clients))
        again = two_labels(raw, np.arange(len(y)), None, seed)
        np.testing.assert_array_equal(clients.values, again.values)
    assert 30 <= min(found) <= max(found) <= 36
    assert np.bincount(found).argmax() == 35
