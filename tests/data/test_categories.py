"""Instruction data dealt by category: iid, Dirichlet over categories, whole categories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.config import DataConfig
from fedsim.data import FederatedData, load

CATEGORIES = ("brainstorming", "closed_qa", "creative_writing", "general_qa", "open_qa")
SIZES = (40, 60, 80, 100, 120)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of six categories in the shape of Dolly, in no order; one category is held out."""
    names = np.repeat((*CATEGORIES, "summarization"), (*SIZES, 30))
    rows = [
        {"instruction": f"Ask {i}", "context": "", "response": f"r{i}", "category": str(name)}
        for i, name in enumerate(np.random.default_rng(0).permutation(names))
    ]
    path = tmp_path_factory.mktemp("dolly") / "dolly.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def dealt(file: Path, partition: str | dict[str, Any], clients: int | None = None,
          seed: int = 0) -> FederatedData:  # fmt: skip
    config = {
        "dataset": {"name": "dolly", "path": str(file), "length": 160},
        "partition": partition, "clients": clients, "test_fraction": 0.25,
    }  # fmt: skip
    return load(DataConfig.model_validate(config), seed)


def counts(data: FederatedData, which: str = "train") -> np.ndarray:
    """Examples of each category that each client has, [clients, categories]."""
    group, rows = data.fields["group"].numpy(), getattr(data, which)
    return np.stack([np.bincount(group[own], minlength=6) for own in rows])


DEALS: list[tuple[str | dict[str, Any], int | None]] = [
    ("iid", 4),
    ({"name": "dirichlet", "alpha": 0.5, "partition_by": "group"}, 4),
    ("natural", None),
    ({"name": "grouped_natural", "group_size": 2, "mode": "allow-smaller"}, None),
]


@pytest.mark.parametrize(("partition", "clients"), DEALS)
def test_every_example_goes_to_one_client_and_one_side(
    partition: Any, clients: int | None, file: Path
) -> None:
    data = dealt(file, partition, clients)
    sides = [data.train.values, data.test.values, data.central_test]
    everything = np.concatenate(sides)
    assert len(np.unique(everything)) == len(everything) == sum(SIZES) + 30
    assert data.train.lengths.min() > 0
    assert data.test.lengths.min() > 0
    # The category that is held out is nobody's.
    group = data.fields["group"].numpy()
    assert not set(group[data.central_test]) & set(group[everything[: -len(data.central_test)]])


def test_by_category_training_and_validation_have_the_same_one(file: Path) -> None:
    data = dealt(file, "natural")
    assert data.client_names == CATEGORIES
    train, test = counts(data) > 0, counts(data, "test") > 0
    assert (train.sum(1) == 1).all()
    assert np.array_equal(train, test)
    assert len(np.unique(train.argmax(1))) == len(CATEGORIES)


def test_fewer_clients_than_categories_share_them_whole(file: Path) -> None:
    data = dealt(file, {"name": "grouped_natural", "group_size": 2, "mode": "allow-smaller"})
    train, test = counts(data) > 0, counts(data, "test") > 0
    assert sorted(train.sum(1).tolist()) == [1, 2, 2]
    assert (train.sum(0)[train.any(0)] == 1).all(), "a category is split"
    assert np.array_equal(train, test)


def test_dirichlet_over_categories_goes_from_uniform_to_one_owner(file: Path) -> None:
    def shares(alpha: float) -> np.ndarray:
        partition = {"name": "dirichlet", "alpha": alpha, "partition_by": "group",
                     "self_balancing": False}  # fmt: skip
        data = dealt(file, partition, 4, seed=3)
        table = counts(data) + counts(data, "test")
        table = table[:, table.any(0)]
        return table / table.sum(0)

    assert np.abs(shares(1e5) - 1 / 4).max() < 0.04
    assert (shares(0.05).max(0) > 0.7).sum() >= 4


def test_iid_has_every_category_everywhere(file: Path) -> None:
    table = counts(dealt(file, "iid", 4))
    mine = table[:, table.any(0)] / table.sum(1, keepdims=True)
    assert np.abs(mine - np.array(SIZES) / sum(SIZES)).max() < 0.12
