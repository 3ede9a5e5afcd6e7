"""A cache folder of the tests' own, small data, and a way to deal them."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.data import Partition, RawData, loading
from fedsim.data.arguments import call


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FEDSIM_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def nothing_loaded():
    loading._loaded.clear()


def toy(examples: int = 200, classes: int = 4, seed: int = 0, users: int = 6) -> RawData:
    draw = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), draw.integers(classes, size=examples - classes)])
    return RawData(
        "toy",
        {"x": draw.random((examples, 1, 4, 4), dtype=np.float32), "y": draw.permutation(y)},
        "cross_entropy",
        classes,
        clients=draw.integers(users, size=examples),
        client_names=tuple(f"user{u}" for u in range(users)),
    )


def deal_out(name, raw, clients, seed=0, indices=None, min_examples=1, **params) -> Partition:
    found = call(
        "partitioners",
        name,
        "data.partition",
        params,
        raw=raw,
        indices=np.arange(len(raw)) if indices is None else indices,
        clients=clients,
        seed=seed,
        min_examples=min_examples,
    )
    return found if isinstance(found, Partition) else Partition(found)


@pytest.fixture(scope="session")
def dataset():
    """`dataset(examples, classes, seed, users)`: random 4x4 images with labels and users."""
    return toy


@pytest.fixture(scope="session")
def deal():
    """`deal(name, raw, clients, seed, indices, **params)`: one partition by name."""
    return deal_out
