"""Gossip matrices: golden eigenvalues, and what every one of them must satisfy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from fedsim.core import rng, topology
from fedsim.core.errors import ConfigError
from fedsim.core.gossip import consensus, mix

FIXED = sorted(topology.FIXED)
SIZES = [*range(1, 34), 64, 100]


def check(graph):
    """What gossip needs of a graph's weights; they bring all together just if it is connected."""
    m, weights = len(graph), topology.metropolis(graph)
    assert (graph == graph.T).all()
    assert not graph.diagonal().any()
    assert (weights >= 0).all()
    assert (weights.diagonal() > 0).all()
    assert (weights == weights.T).all()
    np.testing.assert_allclose(weights.sum(0), 1.0, atol=1e-15 * m)
    assert ((weights > 0) <= (graph | np.eye(m, dtype=bool))).all()
    parts, _ = connected_components(graph)
    gap = 1 - topology.second_eigenvalue(weights)
    assert gap > 1e-6 if parts == 1 else gap == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", FIXED)
def test_every_topology_gives_a_symmetric_doubly_stochastic_matrix(name):
    for m in SIZES:
        check(topology.FIXED[name](m))


@pytest.mark.parametrize("degree", [1, 3])
def test_so_does_the_random_one(degree):
    for m in SIZES:
        check(topology.random(m, degree, rng.stream(0, m, rng.SERVER, "topology")))


def test_one_draw_of_ten_neighbours_each_among_a_hundred():
    """Degree about 19, for each draws ten and is drawn by ten; second eigenvalue about 0.5."""
    graph = topology.random(100, 10, rng.stream(0, 1, rng.SERVER, "topology"))
    assert 18 < graph.sum(1).mean() < 20
    assert topology.second_eigenvalue(topology.metropolis(graph)) == pytest.approx(0.503, abs=0.05)


def test_golden_ring_of_a_hundred_and_offsets_of_one_and_nine():
    ring = topology.second_eigenvalue(topology.metropolis(topology.ring(100)))
    assert ring == pytest.approx(0.998684486, abs=5e-10)
    offsets = topology.from_edges(100, [(i, (i + h) % 100) for i in range(100) for h in (1, 9)])
    weights = topology.metropolis(offsets)
    np.testing.assert_allclose(weights[weights > 0], 0.2)
    assert topology.second_eigenvalue(weights) == pytest.approx(0.9369, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "eigenvalues"),
    [
        ("ring", (0.9493, 0.9968, 0.99868)),
        ("grid", (0.8686, 0.9677, 0.97947)),
        ("torus", (0.6000, 0.8828, 0.92361)),
        ("exponential", (0.5000, 0.6667, 0.7333)),
        ("full", (0.0, 0.0, 0.0)),
    ],
)
def test_golden_second_eigenvalues(name, eigenvalues):
    for m, value in zip((16, 64, 100), eigenvalues, strict=True):
        found = topology.second_eigenvalue(topology.metropolis(topology.FIXED[name](m)))
        assert found == pytest.approx(value, abs=5e-5)


def test_closed_forms():
    ring = topology.metropolis(topology.ring(100))
    # circulant with weights 1/3: eigenvalues 1/3 + 2/3 cos(2 pi k / m)
    expected = 1 / 3 + 2 / 3 * math.cos(2 * math.pi / 100)
    assert topology.second_eigenvalue(ring) == pytest.approx(expected, abs=1e-12)
    for m in (16, 64, 100):
        tau = math.ceil(math.log2(m))
        directed = topology.directed_exponential(m)
        assert topology.second_eigenvalue(directed) == pytest.approx((tau - 1) / (tau + 1))
        np.testing.assert_allclose(directed.sum(0), 1.0)
        np.testing.assert_allclose(directed.sum(1), 1.0)
        assert (directed != directed.T).any()


def test_golden_path_and_star():
    # path 0-1-2: degrees 1, 2, 1, so both edges weigh 1/3 and the ends keep 2/3
    path = topology.metropolis(topology.from_edges(3, [(0, 1), (1, 2)]))
    np.testing.assert_allclose(path @ [0.0, 2.0, 4.0], [2 / 3, 2.0, 10 / 3])
    assert topology.second_eigenvalue(path) == pytest.approx(2 / 3)
    star = topology.metropolis(topology.from_edges(5, [(0, i) for i in range(1, 5)]))
    np.testing.assert_allclose(star[0], 0.2)
    np.testing.assert_allclose(star[1], [0.2, 0.8, 0, 0, 0])
    assert topology.second_eigenvalue(star) == pytest.approx(0.8)


def test_two_nodes_are_joined_once_and_one_keeps_what_it_has():
    for graph in (topology.ring, topology.full):
        np.testing.assert_array_equal(topology.metropolis(graph(2)), [[0.5, 0.5], [0.5, 0.5]])
        np.testing.assert_array_equal(topology.metropolis(graph(1)), [[1.0]])


@st.composite
def graphs(draw):
    m = draw(st.integers(2, 12))
    pairs = st.tuples(st.integers(0, m - 1), st.integers(0, m - 1))
    tree = [(i, draw(st.integers(0, i - 1))) for i in range(1, m)]  # connected
    return topology.from_edges(m, tree + draw(st.lists(pairs, max_size=20)))


@given(graphs(), st.booleans())
def test_so_does_any_connected_graph_and_none_that_falls_apart(graph, split):
    if split:
        graph[0] = graph[:, 0] = False
    check(graph)


@given(graphs(), st.integers(1, 6), st.integers(0, 2**32))
def test_gossip_keeps_the_mean_and_contracts(graph, steps, seed):
    weights = topology.metropolis(graph)
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(graph), 7)))
    mixed = mix(values, weights, steps)
    torch.testing.assert_close(mixed.mean(0), values.mean(0), atol=1e-12, rtol=0)
    bound = topology.second_eigenvalue(weights) ** steps
    assert math.sqrt(consensus(mixed)) <= bound * math.sqrt(consensus(values)) + 1e-9
    one_by_one = values
    for _ in range(steps):
        one_by_one = mix(one_by_one, weights)
    torch.testing.assert_close(mixed, one_by_one, atol=1e-12, rtol=0)


@given(graphs(), st.data())
def test_inactive_nodes_keep_their_model(graph, data):
    active = data.draw(st.sets(st.integers(0, len(graph) - 1)))
    weights = topology.metropolis(topology.among(graph, active))
    for i in set(range(len(graph))) - active:
        np.testing.assert_array_equal(weights[i], np.eye(len(graph))[i])
    np.testing.assert_allclose(weights.sum(0), 1.0)


def test_the_random_topology_is_undirected_and_reproducible():
    graphs = [topology.random(30, 4, rng.stream(0, r, rng.SERVER, "topology")) for r in (1, 1, 2)]
    assert (graphs[0] == graphs[1]).all()
    assert (graphs[0] != graphs[2]).any()
    assert (graphs[0] == graphs[0].T).all()
    assert (graphs[0].sum(1) >= 4).all()


def test_an_edge_to_nowhere_is_refused():
    with pytest.raises(ConfigError, match=r"\[0, 3\].*0 to 2"):
        topology.from_edges(3, [(0, 3)])
