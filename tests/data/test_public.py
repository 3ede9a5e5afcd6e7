"""The public set: balanced, nobody's own, and known by a digest of its order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedsim.config import DataConfig
from fedsim.core.errors import DataError
from fedsim.data import load


def config(**more: object) -> DataConfig:
    return DataConfig.model_validate({"dataset": "digits", "clients": 5, **more})


def test_it_is_balanced_and_belongs_to_nobody() -> None:
    data = load(config(public=100), 3)
    labels = data.fields["y"][data.public]
    assert np.bincount(labels, minlength=10).tolist() == [10] * 10
    everything = [data.public, data.train.values, data.test.values, data.central_test]
    joined = np.concatenate(everything)
    assert len(np.unique(joined)) == len(joined) == 1797
    assert (np.diff(data.public) > 0).all()


def test_without_one_nothing_is_as_it_was_not() -> None:
    plain, none = load(config(), 3), load(config(public=0), 3)
    assert plain.fingerprint == none.fingerprint
    assert len(none.public) == 0
    assert none.public_digest == ""
    with_it = load(config(public=50), 3)
    assert with_it.fingerprint != plain.fingerprint
    assert np.array_equal(with_it.central_test, plain.central_test)


def test_its_digest_is_that_of_inputs_and_order() -> None:
    data = load(config(public=40), 3)
    assert len(data.public_digest) == 32
    assert data.public_digest == load(config(public=40, clients=9), 3).public_digest
    turned = replace(data, public=data.public[::-1].copy())
    assert turned.public_digest != data.public_digest


def test_with_planted_groups_it_has_examples_of_every_kind() -> None:
    partition = {"name": "planted", "kind": "rotation", "groups": 2}
    data = load(config(public=30, clients=6, partition=partition), 3)
    assert np.bincount(data.fields["group"][data.public]).tolist() == [15, 15]


def test_it_cannot_be_everything() -> None:
    with pytest.raises(DataError, match=r"data\.public = 5000 leaves no example"):
        load(config(public=5000), 3)
