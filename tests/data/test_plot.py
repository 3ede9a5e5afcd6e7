"""The picture of a partition, and the counts behind it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fedsim.config import DataConfig
from fedsim.data import load, plot_partition
from fedsim.data.plot import composition


def data_of(**data):
    return load(DataConfig.model_validate(data), 0)


def test_counts_of_labels():
    data = data_of(dataset="digits", clients=7, partition={"name": "dirichlet", "alpha": 0.3})
    counts, names = composition(data)
    assert names == [str(i) for i in range(10)]
    assert np.array_equal(counts.sum(0), data.train.lengths + data.test.lengths)
    mine = np.concatenate([data.train[3], data.test[3]])
    assert np.array_equal(counts[:, 3], np.bincount(data.fields["y"][mine], minlength=10))


def test_counts_of_characters_and_ranges():
    counts, names = composition(data_of(dataset="pydoc", partition="natural", clients=5))
    assert names[0] == "space"
    assert (np.diff(counts.sum(1)) <= 0).all()
    counts, names = composition(data_of(dataset="synthetic", clients=4))
    assert len(names) == 8
    assert np.ptp(counts.sum(1)) <= 1


@pytest.mark.parametrize(
    "data",
    [
        {"dataset": "digits", "clients": 1},
        {"dataset": "digits", "partition": "planted", "clients": 12, "heldout_clients": 3},
        {"dataset": "mnist5k", "clients": 1000, "heldout_clients": 0.1},
        {"dataset": "digits", "partition": "planted", "clients": 100},
        {"dataset": "pydoc", "partition": "natural"},
        {"dataset": "synthetic", "partition": "natural"},
    ],
    ids=lambda d: f"{d['dataset']}-{d.get('clients')}",
)
def test_a_picture(tmp_path, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = plot_partition(data_of(**data), tmp_path / "who.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    import matplotlib.image

    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 400
    assert pixels[..., :3].std() > 0.05
