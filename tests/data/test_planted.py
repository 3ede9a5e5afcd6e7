"""Partitions with a known structure: two labels per client, planted groups, vertical columns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsim.data.raw import RawData

HAM10K = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}


@settings(max_examples=40)
@given(seed=st.integers(0, 2**40))
def test_two_labels_is_the_papers_split(deal, seed):
    labels = np.repeat(np.arange(7), list(HAM10K.values()))
    raw = RawData("ham", {"x": np.zeros((len(labels), 1), np.float32), "y": labels},
                  "cross_entropy", 7)  # fmt: skip
    parts = deal("two_labels", raw, None, seed).clients
    assert 30 <= len(parts) <= 36
    assert set(parts.lengths) == {70}
    assert len(np.unique(parts.values)) == len(parts.values)
    table = np.stack([np.bincount(labels[parts[i]], minlength=7) for i in range(len(parts))])
    assert (np.sort(table, 1)[:, -2:] == 35).all()
    assert (table.sum(1) == 70).all()
    assert ((table > 0).sum(0) <= [9, 14, 14, 3, 14, 14, 4]).all()
    # Nothing more could have been dealt: at most one label has a package left.
    left = np.minimum(list(HAM10K.values()), 500) - table.sum(0)
    assert (left >= 35).sum() <= 1


def test_two_labels_options(dataset, deal):
    raw = dataset(400, 4)
    parts = deal("two_labels", raw, 3, package=10, labels=3, cap=50).clients
    assert len(parts) == 3
    assert all(len(np.unique(raw.fields["y"][parts[i]])) == 3 for i in range(3))
    most = deal("two_labels", raw, None, package=10, cap=20).clients
    assert len(most) <= 4


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_planted_rotations(dataset, deal, groups):
    raw = dataset(240)
    found = deal("planted", raw, 12, groups=groups)
    assert np.bincount(found.groups).tolist() == [12 // groups] * groups
    rows = np.concatenate([np.arange(7), found.clients.values])
    owner = np.concatenate([np.full(7, -1), found.clients.owners])
    before = {k: v[rows] for k, v in raw.fields.items()}
    after = found.view(before, owner)
    for row in range(len(rows)):
        k = row % groups if owner[row] < 0 else found.groups[owner[row]]
        assert after["group"][row] == k
        pixels = before["x"][row, 0]
        for _ in range(k):  # one quarter turn: the last column becomes the first row
            pixels = np.array([[pixels[r, 3 - c] for r in range(4)] for c in range(4)])
        assert np.array_equal(after["x"][row, 0], pixels)
    assert np.array_equal(after["y"], before["y"])


@settings(max_examples=20)
@given(classes=st.integers(2, 6), groups=st.integers(2, 4), seed=st.integers(0, 999))
def test_planted_label_permutations_are_different_bijections(dataset, deal, classes, groups, seed):
    assume(groups <= math.factorial(classes))
    raw = dataset(200, classes)
    found = deal("planted", raw, 2 * groups, seed, groups=groups, kind="labels")
    rows, owner = found.clients.values, found.clients.owners
    before = {k: v[rows] for k, v in raw.fields.items()}
    after = found.view(before, owner)
    assert np.array_equal(after["x"], before["x"])
    tables = set()
    for g in range(groups):
        mine = found.groups[owner] == g
        pairs = set(zip(before["y"][mine].tolist(), after["y"][mine].tolist(), strict=True))
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
        tables.add(frozenset(pairs))
    assert len(tables) == groups


def test_planted_on_another_partition(dataset, deal):
    raw = dataset(300)
    base = {"name": "dirichlet", "alpha": 0.5}
    found = deal("planted", raw, 6, base=base, groups=3)
    plain = deal("dirichlet", raw, 6, alpha=0.5)
    assert np.array_equal(found.clients.values, plain.clients.values)


@pytest.mark.parametrize(
    ("name", "params"),
    [("vertical_even", {}), ("vertical_size", {"partition_sizes": [0.5, 0.25, 0.25]}),
     ("vertical_size", {"partition_sizes": [8, 4, 4]})],
)  # fmt: skip
def test_vertical_clients_share_examples_and_part_columns(dataset, deal, name, params):
    raw = dataset(40)
    found = deal(name, raw, 3, **params)
    assert all(np.array_equal(found.clients[i], np.arange(40)) for i in range(3))
    ones = {"x": np.ones((4, 1, 4, 4), np.float32)}
    seen = found.view(ones, np.array([-1, 0, 1, 2]))["x"]
    assert (seen[0] == 1).all()
    assert (seen[1:].sum(0) == 1).all()
    assert [int(s) for s in seen[1:].sum((1, 2, 3))] == ([8, 4, 4] if params else [6, 5, 5])
