"""k-means from inner products, against k-means on vectors."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from fedsim.core.lora.kmeans import kmeans


def points(seed: int, count: int, width: int = 20) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=g, dtype=torch.float64)


def planted(seed: int, k: int, each: int, noise: float = 0.05) -> Tensor:
    return points(seed, k).repeat(each, 1) + noise * points(seed + 1000, k * each)


def ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:-1], dtype=x.dtype)


def grouped(labels: Tensor) -> set[frozenset[int]]:
    return {frozenset((labels == c).nonzero().flatten().tolist()) for c in labels.unique()}


def inertia(x: Tensor, w: Tensor, labels: Tensor) -> float:
    total = 0.0
    for c in labels.unique():
        mine, share = x[labels == c], w[labels == c]
        centre = (share[:, None] * mine).sum(0) / share.sum()
        total += float((share * (mine - centre).square().sum(1)).sum())
    return total


def test_labels_of_direct_lloyd_on_separated_data_for_a_batch() -> None:
    x = torch.stack([planted(seed, 6, 9) for seed in range(4)])
    found = kmeans(x @ x.mT, ones(x), 6)
    for i, pool in enumerate(x):
        direct = KMeans(6, n_init=10, random_state=0).fit(pool.numpy())
        assert grouped(found.labels[i]) == grouped(torch.from_numpy(direct.labels_))
        assert float(found.inertia[i]) == pytest.approx(direct.inertia_)


def test_as_good_as_scikit_learn_on_noise() -> None:
    x = torch.stack([points(seed, 60) for seed in range(8)])
    found = kmeans(x @ x.mT, ones(x), 7)
    theirs = sum(KMeans(7, n_init=10, random_state=0).fit(p.numpy()).inertia_ for p in x)
    assert float(found.inertia.sum()) < 1.01 * theirs
    for i, pool in enumerate(x):
        assert inertia(pool, ones(pool), found.labels[i]) == pytest.approx(float(found.inertia[i]))


def test_weights_count_like_copies() -> None:
    x, w = planted(1, 3, 4, noise=0.3), torch.ones(12, dtype=torch.float64)
    w[:4] = 3
    copies = torch.cat([x, x[:4], x[:4]])
    one = kmeans((x @ x.T)[None], w[None], 3)
    two = kmeans((copies @ copies.T)[None], ones(copies)[None], 3)
    assert float(one.inertia) == pytest.approx(float(two.inertia))
    assert grouped(one.labels[0]) == grouped(two.labels[0, :12])


@pytest.mark.parametrize("signed", [False, True])
def test_inertia_never_rises(signed: bool) -> None:
    x = torch.stack([points(seed, 50, 8) for seed in range(5)])
    steps = torch.stack(kmeans(x @ x.mT, ones(x), 5, n_init=3, signed=signed).history)
    assert len(steps) > 2
    assert (steps.diff(dim=0) <= 1e-9).all()


def test_global_optimum_of_tiny_pools() -> None:
    last = float("inf")
    x = points(3, 7, 3)
    for k in range(1, 8):
        best = min(
            inertia(x, ones(x), torch.tensor(labels))
            for labels in itertools.product(range(min(k, 3)), repeat=7)
        ) if k <= 3 else None  # fmt: skip
        found = float(kmeans((x @ x.T)[None], ones(x)[None], k, n_init=50).inertia)
        if best is not None:
            assert found == pytest.approx(best)
        assert found <= last + 1e-9
        last = found
    assert last == pytest.approx(0, abs=1e-9)


def test_signed_points_meet_their_opposites() -> None:
    x = planted(1, 3, 6)
    sign = torch.ones(18, 1, dtype=x.dtype)
    sign[::2] = -1
    turned = x * sign
    found = kmeans((turned @ turned.T)[None], ones(x)[None], 3, signed=True)
    plain = kmeans((x @ x.T)[None], ones(x)[None], 3)
    assert grouped(found.labels[0]) == grouped(plain.labels[0])
    assert float(found.inertia) == pytest.approx(float(plain.inertia))


def test_fewer_distinct_points_than_clusters() -> None:
    x = points(1, 2).repeat(3, 1)
    found = kmeans((x @ x.T)[None], ones(x)[None], 4)
    assert float(found.inertia) == pytest.approx(0, abs=1e-9)
    assert len(found.labels.unique()) >= 2
