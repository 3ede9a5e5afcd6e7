"""Every partition: disjoint, complete or as asked, deterministic; refusals name the cause."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from fedsim.core.errors import ConfigError, DataError
from fedsim.core.rng import SERVER, stream
from fedsim.data.arguments import call
from fedsim.data.catalogue import PARTITIONERS
from fedsim.data.federated import Ragged
from fedsim.data.raw import RawData

PARAMS = {
    "dirichlet": {"alpha": 0.5},
    "inner_dirichlet": {"alpha": 0.5},
    "grouped_natural": {"group_size": 2},
    "planted": {"groups": 2},
    "two_labels": {"package": 5},
}
COMPLETE = {
    "iid", "natural", "dirichlet", "linear", "square", "exponential", "id_to_size", "continuous",
    "grouped_natural", "planted",
}  # fmt: skip


def same(a: Ragged, b: Ragged) -> bool:
    return np.array_equal(a.values, b.values) and np.array_equal(a.offsets, b.offsets)


def clients_for(name: str, clients: int) -> int | None:
    return None if name in ("grouped_natural", "vertical_size", "size") else clients


@pytest.mark.parametrize("name", sorted(set(PARTITIONERS) - {"vertical_even", "vertical_size"}))
@settings(max_examples=12, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_examples_go_to_one_client_each(dataset, deal, name, data):
    raw = dataset(
        data.draw(st.integers(40, 150), "examples"),
        data.draw(st.integers(2, 4), "classes"),
        data.draw(st.integers(0, 9), "data seed"),
    )
    clients = data.draw(st.integers(1, 4), "clients") * (2 if name == "planted" else 1)
    indices = np.flatnonzero(np.arange(len(raw)) % 5)
    seed = data.draw(st.integers(0, 2**62), "seed")
    params = PARAMS.get(name, {})
    if name == "size":
        params = {"partition_sizes": data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))}
    try:
        found = deal(name, raw, clients_for(name, clients), seed, indices, **params)
    except DataError:  # too few examples of a label, too few natural clients
        reject()
    dealt = found.clients.values
    assert len(np.unique(dealt)) == len(dealt)
    assert np.isin(dealt, indices).all()
    assert found.clients.lengths.min() >= 1
    assert len(found.names) in (0, len(found.clients))
    if clients_for(name, clients) and name != "natural":
        assert len(found.clients) == clients
    if name in COMPLETE and not (name == "natural" and clients < 6):
        assert len(dealt) == len(indices)
    again = deal(name, raw, clients_for(name, clients), seed, indices, **params)
    assert same(found.clients, again.clients)
    assert found.names == again.names


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shard", "two_labels", "linear"])
def test_seed_matters(dataset, deal, name):
    raw = dataset()
    one, two = (deal(name, raw, 5, seed, **PARAMS.get(name, {})).clients for seed in (1, 2))
    assert not same(one, two)


def test_sizes_are_as_asked(dataset, deal):
    raw = dataset(200)
    assert deal("iid", raw, 7).clients.lengths.tolist() == [29] * 4 + [28] * 3
    sizes = [3, 50, 1]
    assert deal("size", raw, None, partition_sizes=sizes).clients.lengths.tolist() == sizes
    drawn = deal("inner_dirichlet", raw, None, alpha=1.0, partition_sizes=sizes)
    assert drawn.clients.lengths.tolist() == sizes
    assert deal("linear", raw, 4).clients.lengths.tolist() == [20, 40, 60, 80]
    assert deal("square", raw, 3).clients.lengths.tolist() == [14, 57, 129]
    roots = deal("id_to_size", raw, 4, function="numpy:sqrt").clients.lengths
    assert same(
        deal("id_to_size", raw, 4).clients, deal("id_to_size", raw, 4, function="sqrt").clients
    )
    assert roots.tolist() == [32, 46, 56, 66]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), clients=st.integers(1, 100))
def test_iid_is_flowers_on_a_shuffled_dataset(dataset, deal, seed, clients):
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    raw = dataset(100)
    theirs = IidPartitioner(clients)
    order = stream(seed, 0, SERVER, "partition").permutation(100)
    theirs.dataset = Dataset.from_dict({"index": order})
    ours = deal("iid", raw, clients, seed).clients
    for i in {0, clients // 2, clients - 1}:
        assert theirs.load_partition(i)["index"][:] == ours[i].tolist()


def test_natural_is_flowers(dataset, deal):
    from datasets import Dataset
    from flwr_datasets.partitioner import NaturalIdPartitioner

    raw = dataset(100)
    theirs = NaturalIdPartitioner("client")
    theirs.dataset = Dataset.from_dict(
        {"client": [raw.client_names[c] for c in raw.clients], "index": np.arange(100)}
    )
    ours = deal("natural", raw, None)
    for i in range(theirs.num_partitions):
        assert theirs.load_partition(i)["index"][:] == ours.clients[i].tolist()
        assert theirs.partition_id_to_natural_id[i] == ours.names[i]


def test_natural_leaves_out_small_clients_and_draws_as_many_as_asked(dataset, deal):
    raw = dataset(60, users=12)
    counts = np.bincount(raw.clients)
    big = deal("natural", raw, None, min_examples=5)
    assert sorted(big.clients.lengths) == sorted(counts[counts >= 5])
    some = deal("natural", raw, 3, min_examples=5)
    assert len(some.clients) == 3
    assert set(some.names) < set(big.names)
    for name, part in zip(some.names, (some.clients[i] for i in range(3)), strict=True):
        assert (raw.clients[part] == int(name.removeprefix("user"))).all()


def test_groups_of_natural_ids(dataset, deal):
    raw = dataset(100, users=5)
    found = deal("grouped_natural", raw, None, group_size=2)
    assert [len(np.unique(raw.clients[found.clients[i]])) for i in range(3)] == [2, 2, 1]
    assert found.names[0].endswith(" +1")


@settings(max_examples=15)
@given(
    alpha=st.floats(0.1, 100),
    least=st.integers(0, 5),
    seed=st.integers(0, 1000),
    balanced=st.booleans(),
)
def test_dirichlet_gives_every_client_its_least(dataset, deal, alpha, least, seed, balanced):
    raw = dataset(200)
    lengths = deal(
        "dirichlet", raw, 8, seed, alpha=alpha, min_partition_size=least, self_balancing=balanced
    ).clients.lengths
    assert lengths.min() >= least
    assert lengths.sum() == 200


@pytest.mark.parametrize("least", [2, 10])
def test_dirichlet_of_fifty_clients_and_5000_examples_at_alpha_a_tenth(dataset, deal, least):
    raw = dataset(5000, 10)
    lengths = deal("dirichlet", raw, 50, alpha=0.1, min_partition_size=least).clients.lengths
    assert lengths.min() >= least


def test_small_alpha_means_few_labels(dataset, deal):
    raw = dataset(2000, 10)

    def labels(alpha: float) -> float:
        parts = deal("dirichlet", raw, 10, alpha=alpha).clients
        return np.mean([np.bincount(raw.fields["y"][parts[i]]).max() / len(parts[i])
                        for i in range(10)])  # fmt: skip

    assert labels(0.1) > 0.4 > 0.2 > labels(100.0)


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(0, 99))
def test_pathological_gives_so_many_labels(dataset, deal, per_client, seed):
    raw = dataset(300, 4)
    parts = deal("pathological", raw, 6, seed, num_classes_per_partition=per_client).clients
    assert all(len(np.unique(raw.fields["y"][parts[i]])) == per_client for i in range(6))


def test_shards_have_few_labels_and_one_size(dataset, deal):
    raw = dataset(400, 4)
    parts = deal("shard", raw, 10, num_shards_per_partition=2).clients
    assert set(parts.lengths) == {40}
    assert max(len(np.unique(raw.fields["y"][parts[i]])) for i in range(10)) <= 4
    assert set(deal("shard", raw, 10, shard_size=7).clients.lengths) == {35, 42}


def test_continuous_sorts_when_strict(dataset, deal):
    raw = dataset(100)
    value = raw.fields["x"].mean((1, 2, 3))
    parts = deal("continuous", raw, 4, strictness=1.0).clients
    tops = [value[parts[i]].max() for i in range(4)]
    assert tops == sorted(tops)


def test_distribution_takes_a_matrix(dataset, deal):
    raw = dataset(400, 4)
    counts = [[5.0, 10.0], [7.0, 7.0], [1.0, 2.0], [3.0, 3.0]]
    parts = deal("distribution", raw, 4, distribution_array=counts, rescale=False).clients
    assert parts.lengths.sum() == sum(map(sum, counts))
    assert all(len(np.unique(raw.fields["y"][parts[i]])) == 2 for i in range(4))


def test_partition_by_other_fields(dataset, deal):
    raw = dataset(200)
    by_user = deal("pathological", raw, 6, num_classes_per_partition=1, partition_by="client")
    assert all(len(np.unique(raw.clients[by_user.clients[i]])) == 1 for i in range(6))


@pytest.mark.parametrize(
    ("name", "clients", "params", "words"),
    [
        ("iid", None, {}, "data.clients is missing"),
        ("iid", 201, {}, "data.clients = 201 .* 1 to 200"),
        ("dirichlet", 5, {"alpha": 0.0}, "data.partition.alpha = 0.0 .* > 0"),
        ("dirichlet", 5, {"alpha": [1.0, -1.0]}, "data.partition.alpha = .* > 0"),
        ("dirichlet", 5, {"alpha": [1.0, 1.0]}, "one for each of 5 clients"),
        ("dirichlet", 5, {"alpha": 1.0, "min_partition_size": 41}, "min_partition_size = 41 .* 40"),
        ("dirichlet", 20, {"alpha": 0.01, "attempts": 1}, "data.clients = 20, .*alpha = 0.01"),
        ("dirichlet", 5, {"alpha": 1.0, "partition_by": "z"}, "partition_by = \"z\" .* y, client"),
        ("inner_dirichlet", 2, {"alpha": 1.0, "partition_sizes": [5]}, "data.clients = 2"),
        ("size", None, {"partition_sizes": [300]}, "partition_sizes = .* at most 200"),
        ("size", None, {"partition_sizes": []}, "partition_sizes"),
        ("pathological", 5, {"num_classes_per_partition": 5}, "num_classes_per_partition = 5 .* 4"),
        ("shard", 5, {"shard_size": 41}, "shard_size = 41 .* 1 to 40"),
        ("square", 100, {}, "data.clients = 100"),
        ("exponential", 100, {}, "data.clients = 100"),
        ("distribution", 3, {}, "num_unique_labels_per_partition = 2 .* multiple of 4"),
        ("continuous", 5, {"strictness": 1.5}, "strictness = 1.5 .* 0 to 1"),
        ("natural", 7, {}, "data.clients = 7 .* 1 to 6"),
        ("grouped_natural", None, {"group_size": 7}, "group_size = 7 .* 1 to 6"),
        ("grouped_natural", None, {"group_size": 4, "mode": "strict"}, "group_size = 4"),
        ("planted", 10, {"groups": 3}, "groups = 3 .* divisor of the number of clients, 10"),
        ("planted", 10, {"groups": 5}, "groups = 5 .* 2 to 4"),
        ("planted", 10, {"groups": 1}, "groups = 1 .* 2 or more"),
        ("planted", 10, {"groups": 2, "base": "vertical_even"}, "data.partition.base"),
        ("two_labels", 100, {}, "data.clients = 100"),
        ("two_labels", None, {"package": 300}, "package = 300"),
        ("id_to_size", 3, {"function": "sin"}, "function = \"sin\" .* module:function"),
        ("vertical_even", 17, {}, "data.clients = 17 .* 1 to 16"),
        ("vertical_size", None, {"partition_sizes": [3, 4]}, "partition_sizes = .* sum 16"),
    ],
)  # fmt: skip
def test_refusals_name_parameter_value_and_what_is_allowed(
    dataset, deal, name, clients, params, words
):
    with pytest.raises(DataError, match=words) as raised:
        deal(name, dataset(200), clients, **params)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"alhpa": 0.1}, "alhpa = 0.1: unknown parameter of dirichlet; did you mean alpha"),
        ({}, "data.partition.alpha is required by dirichlet"),
        ({"alpha": "x"}, "data.partition.alpha = \"x\": must be a number"),
    ],
)  # fmt: skip
def test_wrong_parameters(dataset, deal, params, words):
    with pytest.raises(ConfigError, match=words):
        deal("dirichlet", dataset(), 5, **params)


def test_what_the_framework_gives_cannot_be_set():
    with pytest.raises(ConfigError, match="seed = 3: unknown parameter of synthetic"):
        call("datasets", "synthetic", "data.dataset", {"seed": 3}, seed=0)


def test_labels_without_natural_clients_or_classes(dataset, deal):
    raw = dataset()
    bare = RawData(
        "bare", {"x": raw.fields["x"], "y": np.random.default_rng(0).random(200)}, "mse", 1
    )
    for name in ("natural", "dirichlet"):
        with pytest.raises(DataError, match="bare"):
            deal(name, bare, 5, **PARAMS.get(name, {}))
    flat = RawData("flat", {"x": np.zeros((200, 3)), "y": raw.fields["y"]}, "cross_entropy", 4)
    with pytest.raises(DataError, match="square images"):
        deal("planted", flat, 4)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6), st.data())
def test_ragged(lists, data):
    ragged = Ragged.from_lists([np.array(part, np.int64) for part in lists])
    assert [ragged[i].tolist() for i in range(len(ragged))] == lists
    assert ragged.lengths.tolist() == [len(part) for part in lists]
    mask = ragged.values % 2 == 0
    even = ragged.where(mask)
    assert [even[i].tolist() for i in range(len(even))] == [
        [v for v in p if v % 2 == 0] for p in lists
    ]
    if lists:
        chosen = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=5))
        taken = ragged.take(np.array(chosen, np.int64))
        assert [taken[i].tolist() for i in range(len(taken))] == [lists[c] for c in chosen]
    with pytest.raises(IndexError):
        ragged[len(lists)]


def test_what_is_cached_depends_on_the_labels(dataset, deal):
    for data_seed in (1, 2):
        raw = dataset(120, 4, seed=data_seed)
        parts = deal("pathological", raw, 4, num_classes_per_partition=1).clients
        assert all(len(np.unique(raw.fields["y"][parts[i]])) == 1 for i in range(4))


def test_what_is_cached_depends_on_what_a_users_function_gives(dataset, deal, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", ModuleType("mine"))
    for sizes in ([1.0, 3.0], [3.0, 1.0]):
        monkeypatch.setattr("mine.sizes", lambda ids, sizes=sizes: np.array(sizes), raising=False)
        lengths = deal("id_to_size", dataset(80), 2, function="mine:sizes").clients.lengths
        assert lengths.tolist() == [20 * s for s in sizes]
