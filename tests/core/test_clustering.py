"""Clustering: planted groups, order, scale, cuts, joiners, stable names, sketches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist

from fedsim.core import clustering
from fedsim.core.clustering import Rule
from fedsim.core.errors import ConfigError

GROUPS = np.arange(40) % 4


def planted(seed: int, dims: int = 60, apart: float = 3.0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return apart * draw.normal(size=(4, dims))[GROUPS] + draw.normal(size=(40, dims))


RULES = [
    Rule(),
    Rule(cut="k", k=4),
    Rule(cut="relative", t=1.0),
    Rule("average", "cosine", "distance", t=0.6),
    Rule("complete", "cosine", "distance", t=0.7),
    Rule("average", "cosine", "gap"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_planted_groups_are_found(rule: Rule, seed: int) -> None:
    found = clustering.cluster(range(40), planted(seed), rule)
    assert found.count == 4
    assert clustering.agreement(found.labels, GROUPS) == (1.0, pytest.approx(1.0))


@pytest.mark.parametrize("dims", [20, 64, 1000])
def test_where_there_are_no_groups_there_is_one_cluster(dims: int) -> None:
    for seed in range(20):
        points = np.random.default_rng(seed).normal(size=(40, dims))
        assert clustering.cluster(range(40), points).count == 1


def test_distances_are_scipys() -> None:
    points = planted(0)
    for metric in ("euclidean", "cosine", "cityblock"):
        found = clustering.distances(points, metric)
        np.testing.assert_allclose(found, pdist(points, metric), rtol=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_neither_order_nor_numbering_of_clients_matters(rule: Rule) -> None:
    points, order = planted(1), np.random.default_rng(0).permutation(40)
    expected = clustering.cluster(range(40), points, rule)
    found = clustering.cluster(order.tolist(), points[order], rule)
    assert found.members() == expected.members()
    np.testing.assert_array_equal(found.tree, expected.tree)


def test_weights_and_updates_give_the_same_tree() -> None:
    points = planted(2)
    one, other = (clustering.cluster(range(40), p) for p in (points, points + 7.0))
    np.testing.assert_allclose(one.tree, other.tree, rtol=1e-9)


def test_rotations_and_signs_keep_the_clusters() -> None:
    points = planted(3)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(60, 60)))
    expected = clustering.cluster(range(40), points).members()
    assert clustering.cluster(range(40), points @ turn).members() == expected
    assert clustering.cluster(range(40), -points).members() == expected


@pytest.mark.parametrize("cut", ["gap", "relative"])
def test_these_cuts_are_free_of_scale(cut: clustering.Cut) -> None:
    rule = Rule(cut=cut, t=1.0)
    expected = clustering.cluster(range(40), planted(4), rule).members()
    assert clustering.cluster(range(40), 1e6 * planted(4), rule).members() == expected
    one = clustering.cluster(range(40), planted(4), Rule(cut="distance", t=5.0)).members()
    assert (
        clustering.cluster(range(40), 8 * planted(4), Rule(cut="distance", t=40.0)).members() == one
    )


def test_a_higher_threshold_never_gives_more_clusters() -> None:
    counts = [
        clustering.cluster(range(40), planted(5), Rule(cut="distance", t=t)).count
        for t in (0, 1, 5, 10, 20, 50, 100, 1e9)
    ]
    assert counts[0] == 40
    assert counts[-1] == 1
    assert counts == sorted(counts, reverse=True)


def test_small_clusters_join_the_nearest_and_nobody_is_lost() -> None:
    points = np.concatenate([planted(6), planted(6)[:1] + 20.0])
    rule = Rule(cut="distance", t=12.0, min_size=3)
    found = clustering.cluster(range(41), points, rule)
    sizes = np.bincount(found.labels)
    assert sizes.sum() == 41
    assert sizes.min() >= 3
    assert set(found.labels) == set(range(found.count))


def test_one_client_and_equal_clients_are_one_cluster() -> None:
    assert clustering.cluster([7], np.ones((1, 3))).members() == {7: 0}
    assert clustering.cluster(range(6), np.ones((6, 3))).count == 1
    assert clustering.explain(clustering.cluster(range(6), np.ones((6, 3))))["clusters"] == 1


def test_ward_needs_euclidean_distances() -> None:
    with pytest.raises(ConfigError, match="euclidean"):
        Rule("ward", "cosine")


def test_a_joiner_costs_what_scipy_says() -> None:
    draw = np.random.default_rng(7)
    points = draw.normal(size=(6, 5)) * 0.01
    late = draw.normal(size=5) * 3
    height = linkage(np.concatenate([points, late[None]]), "ward")[-1, 2]
    cost = clustering.merge_cost(late, points.mean(0)[None], [6])
    assert cost[0] == pytest.approx(height, rel=1e-12)


def test_late_joiners_go_to_their_group_and_outliers_nowhere() -> None:
    points, draw = planted(8), np.random.default_rng(8)
    found = clustering.cluster(range(40), points)
    centres = clustering.centres_of(points, found.labels)
    sizes = np.bincount(found.labels).tolist()
    for client in range(20):
        late = centres[found.labels[client]] + draw.normal(size=60)
        place = clustering.assign(late, centres, sizes, found.threshold)
        assert place == found.labels[client]
    assert clustering.assign(centres[0] + 1e4, centres, sizes, found.threshold) is None


def test_clusters_keep_their_names() -> None:
    old = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2}
    new = {1: 1, 2: 1, 3: 0, 4: 0, 5: 2, 6: 3}
    assert clustering.match(old, new, 3) == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 3}
    assert clustering.match(old, {1: 0, 2: 1, 3: 2}, 3) == {1: 0, 2: 3, 3: 1}


def test_sketches_keep_distances() -> None:
    draw = np.random.default_rng(9)
    points = torch.from_numpy(draw.normal(size=(12, 2000))).float()
    sketches = np.stack([clustering.sketch(p, 256, 5) for p in points])
    ratios = pdist(sketches) / pdist(points.numpy())
    assert abs(ratios - 1).max() < 0.25
    np.testing.assert_array_equal(sketches[0], clustering.sketch(points[0], 256, 5))


def test_the_explanation_prefers_the_true_number() -> None:
    points = planted(10)
    found = clustering.cluster(range(40), points)
    told = clustering.explain(found, clustering.distances(points))
    assert max(told["silhouettes"], key=told["silhouettes"].get) == "4"
    assert max(told["ratios"], key=told["ratios"].get) == "4"
    assert len(told["tree"]) == 39
