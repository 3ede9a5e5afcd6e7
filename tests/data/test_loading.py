"""The federation's data as a whole: who may see what, determinism, the cache."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.config import DataConfig
from fedsim.core.errors import ConfigError, DataError
from fedsim.data import RawData, cache, load
from fedsim.data.federated import digest


def config(dataset="synthetic", **data) -> DataConfig:
    return DataConfig.model_validate({"dataset": dataset, **data})


DIRICHLET = {"name": "dirichlet", "alpha": 0.5}


@settings(max_examples=40)
@given(
    clients=st.integers(1, 20),
    test_fraction=st.floats(0, 0.9),
    central=st.floats(0, 0.5),
    heldout=st.integers(0, 3) | st.floats(0, 0.5),
    seed=st.integers(0, 2**40),
    partition=st.sampled_from(["iid", DIRICHLET, "planted"]),
)
def test_nobody_trains_on_what_judges(clients, test_fraction, central, heldout, seed, partition):
    if partition == "planted":
        clients *= 4
    if isinstance(heldout, int):
        heldout = min(heldout, clients - 1)
    data = load(
        config(
            "digits",
            partition=partition,
            clients=clients,
            test_fraction=test_fraction,
            central_test_fraction=central,
            heldout_clients=heldout,
        ),
        seed,
    )
    sets = [data.train.values, data.test.values, data.central_test]
    everything = np.concatenate(sets)
    assert np.array_equal(np.sort(everything), np.arange(1797))
    assert len(data.train) == len(data.test) == len(data.client_names) == data.num_clients
    assert data.train.lengths.min() >= 1
    total = data.train.lengths + data.test.lengths
    wanted = np.minimum(np.floor(total * test_fraction + 0.5), total - 1)
    assert np.array_equal(data.test.lengths, wanted)
    assert abs(len(data.central_test) - central * 1797) <= 0.5
    held = data.heldout_clients
    assert len(held) == (heldout if isinstance(heldout, int) else round(heldout * clients))
    assert (np.diff(held) > 0).all()
    assert ((held >= 0) & (held < data.num_clients)).all()


def test_every_client_keeps_an_example_to_train_on():
    data = load(config("digits", clients=700, test_fraction=0.9), 0)
    assert data.train.lengths.tolist() == [1] * 700
    alone = load(config("digits", clients=1527, test_fraction=0.9, min_examples=1), 0)
    assert not len(alone.test.values)


def test_planted_clients_are_tested_as_they_are_trained():
    plain = load(config("digits", clients=12), 3)
    data = load(config("digits", partition="planted", clients=12), 3)
    group = data.fields["group"].numpy()
    for part in (data.train, data.test):
        assert np.array_equal(group[part.values], data.groups[part.owners])
    assert np.ptp(np.bincount(group[data.central_test])) <= 1
    upright = np.sort(plain.train[0])
    for i in range(12):
        same = np.sort(plain.train[i])
        assert len(same) == len(data.train[i])
    turned = torch.rot90(plain.fields["x"][plain.train[0]], int(data.groups[0]), (2, 3))
    assert torch.equal(turned, data.fields["x"][data.train[0]])
    assert len(upright) == len(turned)


def test_vertical_clients_hold_out_the_same_examples():
    data = load(config("digits", partition="vertical_even", clients=2), 0)
    first, second = (data.fields["y"][data.test[i]] for i in (0, 1))
    assert torch.equal(first, second)
    x = data.fields["x"]
    assert ((x[data.train[0]] == 0) | (x[data.train[1]] == 0)).all()


def test_two_labels_is_56_and_14():
    data = load(config("mnist5k", partition="two_labels", clients=35), 0)
    assert set(data.train.lengths) == {56}
    assert set(data.test.lengths) == {14}


def test_standardised_by_what_is_not_tested():
    data = load(config("mnist5k", clients=10, test_fraction=0.3), 0)
    x = data.fields["x"]
    mine = np.concatenate([data.train.values, data.test.values])
    assert x.dtype == torch.float32
    assert tuple(x.shape) == (5000, 1, 28, 28) == (5000, *data.input_shape)
    assert abs(x[mine].mean()) < 1e-4
    assert abs(x[mine].std() - 1) < 1e-4
    assert abs(x[data.central_test].mean()) > 1e-4


def test_same_object_for_the_same_question_and_other_data_for_another_seed():
    one = load(config("digits", clients=4), 0)
    assert load(config("digits", clients=4), 0) is one
    assert load(config("digits", clients=4), 1).fingerprint != one.fingerprint
    assert load(config("digits", clients=5), 0).fingerprint != one.fingerprint
    fixed = config("digits", clients=4, seed=0)
    assert load(fixed, 7).fingerprint == one.fingerprint


def test_only_so_many_stay_in_memory(monkeypatch):
    from fedsim.data import loading

    monkeypatch.setattr(loading, "KEPT", 2)
    for seed in range(4):
        load(config(clients=3), seed)
    assert len(loading._loaded) == 2


ASK = """
    import sys
    from fedsim.config import DataConfig
    from fedsim.data import load
    data = load(DataConfig.model_validate(
        {"dataset": "digits", "partition": {"name": "dirichlet", "alpha": 0.5}, "clients": 5}), 3)
    print(data.fingerprint, *(m in sys.modules for m in ("flwr_datasets", "datasets", "sklearn")))
"""


def run(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return done.stdout.split()


def test_another_process_finds_the_same_data_and_imports_nothing_heavy_once_it_is_cached():
    here = load(config("digits", partition=DIRICHLET, clients=5), 3)
    assert run(ASK) == [here.fingerprint, "False", "False", "False"]


def test_importing_the_room_is_cheap():
    heavy = '("torch", "datasets", "sklearn", "flwr_datasets", "matplotlib", "pydantic")'
    imports = "import sys, fedsim.data.catalogue, fedsim.models.catalogue"
    assert set(run(f"{imports}; print(*(m in sys.modules for m in {heavy}))")) == {"False"}


def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(1000)}

    assert np.array_equal(cache.arrays("k", make)["a"], np.arange(1000))
    (file,) = tmp_path.iterdir()
    sound = file.read_bytes()
    for damage in (b"", b"rubbish", sound[:-100], sound[:500] + b"\xff" + sound[501:]):
        file.write_bytes(damage)
        assert np.array_equal(cache.arrays("k", make)["a"], np.arange(1000))
        assert file.read_bytes() == sound
    assert len(made) == 5
    assert list(tmp_path.iterdir()) == [file]
    cache.arrays("k", make)
    assert len(made) == 5


def test_a_cache_that_cannot_be_written_is_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file" / "below"))
    assert cache.arrays("k", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]


def test_pickled_arrays_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    np.savez(tmp_path / "k.npz", a=np.array([{}], dtype=object))
    assert cache.arrays("k", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]


def test_telemetry_is_off():
    import os

    load(config("digits", partition=DIRICHLET, clients=3), 11)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"


def test_a_hundred_thousand_clients():
    big = {"name": "synthetic", "examples": 300_000, "dimensions": 4, "natural_clients": 100_000}
    data = load(config(big, clients=100_000, heldout_clients=0.1), 0)
    assert data.num_clients == 100_000
    assert set(data.train.lengths + data.test.lengths) == {2, 3}
    assert len(data.heldout_clients) == 10_000
    natural = load(config(big, partition="natural", central_test_fraction=0.0), 0)
    assert natural.num_clients == 100_000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"clients": 2000}, "data.clients = 2000 .* 1 to 1700"),
        ({"clients": 1000}, "data.min_examples = 2, but partition iid gives 300 client"),
        ({"clients": 10, "heldout_clients": 10}, "data.heldout_clients = 10 .* 0 to 9"),
        ({"partition": "natural", "clients": 11}, "data.clients = 11"),
        ({"partition": "natural", "min_examples": 1000}, "leaves no client"),
        ({}, "data.clients is missing"),
    ],
)
def test_impossible_requests(data, words):
    with pytest.raises(DataError, match=words):
        load(config(**data), 0)


def test_unknown_dataset_and_partition():
    with pytest.raises(ConfigError, match="mnist5k"):
        load(config("mnist5"), 0)
    with pytest.raises(ConfigError, match="dirichlet"):
        load(config(partition="dirichlett", clients=3), 0)


def thirds(seed: int, size: int = 30) -> RawData:
    x = np.arange(size, dtype=np.float32)[:, None]
    return RawData("thirds", {"x": x, "y": np.arange(size) % 3}, "cross_entropy", 3)


def by_thirds(indices, clients) -> list:
    from fedsim.data import Ragged

    return Ragged.from_lists(np.array_split(indices, clients))


def test_a_users_own_dataset_and_partition(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    data = load(
        config(
            {"name": "mine:thirds", "size": 60},
            partition="mine:by_thirds",
            clients=3,
            central_test_fraction=0.0,
        ),
        0,
    )
    assert sorted(np.concatenate([data.train[1], data.test[1]]).tolist()) == list(range(20, 40))
    monkeypatch.setattr(sys.modules[__name__], "thirds", lambda seed: [1])
    with pytest.raises(ConfigError, match=r"returned list; .*RawData"):
        load(config("mine:thirds", clients=3), 0)


def test_digest_tells_arrays_apart():
    a = np.arange(6)
    assert digest(a) == digest(a.copy())
    others = [a.reshape(2, 3), a.astype(np.int32), a.tolist(), a[:5], np.arange(0)]
    assert len({digest(o) for o in [a, *others]}) == 6
    assert digest("a", "b") != digest("ab")
