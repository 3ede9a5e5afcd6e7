"""Agglomerative clustering of clients: the tree, where to cut it, and why there.

Clients are points (rows of a matrix), sorted by id before anything else, so that neither the order
in which they answered nor their numbering changes who is with whom. Labels are canonical: cluster 0
is that of the smallest id, cluster 1 that of the smallest id outside it, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from fedsim.core.directions import dots
from fedsim.core.errors import ConfigError
from fedsim.core.rng import SERVER, stream

Linkage = Literal["ward", "average", "complete", "single", "weighted"]
Metric = Literal["euclidean", "cosine", "cityblock"]
Cut = Literal["gap", "relative", "distance", "k"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
EXPLAINED = 2000
"""Most points for which silhouettes are computed: they take every pair of points."""
CANDIDATES = 10
"""Numbers of clusters that an explanation looks at."""


@dataclass(frozen=True)
class Rule:
    """How points become clusters.

    Attributes:
        linkage: how far two clusters are apart. ``"ward"`` is ``sqrt(2 |A||B| / (|A| + |B|)) *
            ||mean_A - mean_B||`` (scipy's convention) and needs the Euclidean metric.
        metric: distance of two points.
        cut: where the tree is cut. ``"gap"``: at the largest ratio of successive merge heights,
            if it is at least `gap`, else not at all (one cluster). ``"relative"``: at `t` times
            the median distance of two points. Both are free of scale. ``"distance"``: at `t`.
            ``"k"``: into `k` clusters.
        t: threshold of ``"relative"`` and ``"distance"``.
        k: clusters of ``"k"``.
        gap: least ratio of ``"gap"``.
        min_size: smaller clusters join the one with the nearest centroid.

    Raises:
        ConfigError: Ward's linkage with another metric, or a number out of range.
    """

    linkage: Linkage = "ward"
    metric: Metric = "euclidean"
    cut: Cut = "gap"
    t: float = 1.5
    k: int = 2
    gap: float = 1.3
    min_size: int = 1

    def __post_init__(self) -> None:
        if self.linkage == "ward" and self.metric != "euclidean":
            raise ConfigError(
                f"metric = {self.metric!r} must be 'euclidean' with linkage = 'ward'; "
                "choose linkage 'average' or 'complete'"
            )
        for name, value, least in (("t", self.t, 0), ("gap", self.gap, 1)):
            if not value >= least:
                raise ConfigError(f"{name} = {value} must be {least} or above")
        for name, value in (("k", self.k), ("min_size", self.min_size)):
            if value < 1:
                raise ConfigError(f"{name} = {value} must be 1 or above")


@dataclass(frozen=True)
class Clustering:
    """Who is with whom, and why.

    Attributes:
        ids: of the points, ascending, int64 [N].
        labels: canonical cluster of each, int64 [N].
        tree: scipy's linkage matrix, float64 [N - 1, 4]; row i merges two of the N points or of
            the merges before it at height ``tree[i, 2]``.
        threshold: height of the cut.
        reason: one line that says why the tree was cut there.
    """

    ids: Ints
    labels: Ints
    tree: Floats
    threshold: float
    reason: str

    @property
    def count(self) -> int:
        """Number of clusters."""
        return int(self.labels.max()) + 1

    def members(self) -> dict[int, int]:
        """Cluster by id."""
        return dict(zip(self.ids.tolist(), self.labels.tolist(), strict=True))


def sorted_points(ids: Sequence[int], points: Any) -> tuple[Ints, Floats]:
    """Ids ascending and the points in that order, as float64."""
    order = np.argsort(np.asarray(ids, dtype=np.int64))
    return np.asarray(ids, dtype=np.int64)[order], np.asarray(points, dtype=np.float64)[order]


def distances(points: Floats, metric: Metric = "euclidean") -> Floats:
    """Distances of all pairs, condensed as scipy wants them, float64 [N (N - 1) / 2].

    A zero vector has cosine distance 1 to everything but itself.
    """
    if metric == "cosine":
        lengths = np.linalg.norm(points, axis=1, keepdims=True)
        points = points / np.where(lengths > 0, lengths, 1.0)
    if metric == "cityblock":
        return np.asarray(pdist(points, "cityblock"))
    count = len(points)
    out = np.empty(count * (count - 1) // 2)
    squares = np.einsum("ij,ij->i", points, points)
    done, block = 0, max(1, 2**22 // max(count, 1))
    for first in range(0, count, block):  # as matrix products: pdist takes one pair at a time
        rows = points[first : first + block]
        products = rows @ points[first:].T  # what lies before was done with an earlier block
        for i, row in enumerate(products, first):
            rest, there = slice(i + 1, count), slice(i + 1 - first, count - first)
            if metric == "cosine":
                values = 1.0 - row[there]
            else:
                values = squares[i] + squares[rest] - 2.0 * row[there]
            out[done : done + count - i - 1] = values
            done += count - i - 1
    np.maximum(out, 0.0, out=out)
    return out if metric == "cosine" else np.sqrt(out, out=out)


def cluster(ids: Sequence[int], points: Any, rule: Rule | None = None) -> Clustering:
    """Cluster the points.

    Args:
        ids: of the points; all different.
        points: shape [N, d].
        rule: how; default `Rule()`.
    """
    rule = rule or Rule()
    names, x = sorted_points(ids, points)
    if len(names) == 1:
        none = np.empty((0, 4))
        return Clustering(names, np.zeros(1, np.int64), none, 0.0, "there is one client")
    pairs = distances(x, rule.metric)
    return from_distances(names, pairs, rule, x)


def from_distances(
    ids: Ints, pairs: Floats, rule: Rule, points: Floats | None = None
) -> Clustering:
    """As `cluster`, from condensed distances of points sorted by id.

    Args:
        ids: ascending.
        pairs: float64 [N (N - 1) / 2].
        rule: how.
        points: needed for ``rule.min_size > 1``.
    """
    median = float(np.median(pairs)) if rule.cut == "relative" else 0.0
    tree = np.asarray(linkage(pairs, rule.linkage))
    labels, threshold, reason = _cut(tree, rule, median)
    if rule.min_size > 1 and points is not None:
        labels = _absorb(labels, points, rule.min_size)
    return Clustering(ids, canonical(labels), tree, threshold, reason)


def _cut(tree: Floats, rule: Rule, median: float) -> tuple[Ints, float, str]:
    heights = np.maximum.accumulate(tree[:, 2])
    if rule.cut == "k":
        wanted = min(rule.k, len(tree) + 1)
        height = _between(heights, wanted)
        return _flat(tree, wanted, "maxclust"), height, f"{wanted} clusters were asked for"
    if rule.cut == "gap":
        count, ratio = largest_gap(heights)
        count, told = (count, "at least") if ratio >= rule.gap else (1, "below")
        height = _between(heights, count)
        reason = f"the largest ratio of successive merge heights is {ratio:.3g}, {told} {rule.gap}"
        return _flat(tree, height, "distance"), height, reason
    height = rule.t * median if rule.cut == "relative" else rule.t
    reason = f"merges above {height:.4g} were undone"
    if rule.cut == "relative":
        reason += f", {rule.t:g} times the median distance"
    return _flat(tree, height, "distance"), height, reason


def _flat(tree: Floats, t: float, criterion: Literal["maxclust", "distance"]) -> Ints:
    return np.asarray(fcluster(tree, t, criterion), dtype=np.int64)


def _between(heights: Floats, count: int) -> float:
    """A height that cuts the tree into so many clusters: between two merges."""
    n = len(heights) + 1
    if count <= 1:
        return float(heights[-1])
    above = heights[n - count]
    below = heights[n - count - 1] if count < n else 0.0
    return float((above + below) / 2)


def largest_gap(heights: Floats) -> tuple[int, float]:
    """Number of clusters with the largest ratio of the heights above and below the cut.

    Only cuts into at most half as many clusters as points are considered: the first merges are
    those of the few closest pairs, whose ratios say nothing.

    Returns:
        number of clusters, ratio; 1 and 1.0 where there is nothing to compare.
    """
    n = len(heights) + 1
    if n < 4 or heights[-1] <= 0:
        return (2, np.inf) if n >= 4 and heights[-1] > 0 else (1, 1.0)
    most = n // 2
    above = heights[n - most :]
    below = np.maximum(heights[n - most - 1 : -1], 1e-9 * heights[-1])
    ratios = above / below
    at = int(ratios.argmax())
    return most - at, float(ratios[at])


def canonical(labels: Any) -> Ints:
    """Labels renumbered in the order in which they first appear."""
    known: dict[int, int] = {}
    return np.array([known.setdefault(int(c), len(known)) for c in labels], dtype=np.int64)


def _absorb(labels: Ints, points: Floats, least: int) -> Ints:
    """Move clusters smaller than `least` into the nearest one, the smallest first."""
    labels = labels.copy()
    while True:
        names, sizes = np.unique(labels, return_counts=True)
        if len(names) == 1 or sizes.min() >= least:
            return labels
        small = names[np.lexsort((names, sizes))][0]
        rest = names[names != small]
        centres = np.stack([points[labels == c].mean(0) for c in rest])
        mean = points[labels == small].mean(0)
        labels[labels == small] = rest[((centres - mean) ** 2).sum(1).argmin()]


def merge_cost(point: Floats, centres: Floats, sizes: Sequence[int]) -> Floats:
    """Ward heights at which a new point would merge with each cluster, float64 [K].

    ``sqrt(2 n / (n + 1)) ||mean - point||``, which is scipy's merge height exactly.
    """
    n = np.asarray(sizes, dtype=np.float64)
    cost: Floats = np.sqrt(2 * n / (n + 1)) * np.linalg.norm(centres - point, axis=1)
    return cost


def assign(point: Floats, centres: Floats, sizes: Sequence[int], limit: float) -> int | None:
    """The cluster that a late joiner merges with first; None if that is above `limit`."""
    cost = merge_cost(point, centres, sizes)
    best = int(cost.argmin())
    return best if cost[best] <= limit else None


def centres_of(points: Floats, labels: Ints) -> Floats:
    """Mean of each cluster's points, float64 [K, d]."""
    return np.stack([points[labels == c].mean(0) for c in range(int(labels.max()) + 1)])


def scatter(points: Floats, labels: Ints) -> float:
    """Sum of squared distances to the clusters' centroids: what Ward's method keeps low."""
    return float(((points - centres_of(points, canonical(labels))[canonical(labels)]) ** 2).sum())


def match(old: dict[int, int], new: dict[int, int], fresh: int) -> dict[int, int]:
    """`new` renamed so that clusters keep their identity (Hungarian method on shared members).

    Args:
        old: cluster by id, before.
        new: cluster by id, now.
        fresh: the first number that no cluster has ever had.
    """
    before, after = sorted(set(old.values())), sorted(set(new.values()))
    shared = np.zeros((len(after), len(before)))
    for node, name in new.items():
        if node in old:
            shared[after.index(name), before.index(old[node])] += 1
    names: dict[int, int] = {}
    for row, place in zip(*linear_sum_assignment(-shared), strict=True):
        if shared[row, place]:
            names[after[row]] = before[place]
    for name in after:
        if name not in names:
            names[name], fresh = fresh, fresh + 1
    return {node: names[name] for node, name in new.items()}


def sketch(vector: Tensor, size: int, seed: int) -> Floats:
    """A seeded random projection: ``S vector / sqrt(size)`` with independent signs in S.

    Squared distances of sketches are unbiased, with a relative deviation of ``sqrt(2 / size)`` at
    most (Johnson and Lindenstrauss). The signs are those of `fedsim.core.directions`, so whoever
    knows the seed can make the sketch, on any device.

    Args:
        vector: shape [d].
        size: length of the sketch.
        seed: seed of the run.
    """
    seeds = stream(seed, 0, SERVER, "sketch").integers(0, 2**63, size)
    products = dots(vector.contiguous(), seeds, basis="rademacher")
    return np.asarray(products.cpu().numpy() / np.sqrt(size))


def agreement(labels: Any, truth: Any) -> tuple[float, float]:
    """Adjusted Rand index and normalised mutual information of two partitions.

    Hubert and Arabie, *Comparing partitions*, 1985; 1 for equal partitions, for ARI about 0 for
    independent ones. Two partitions into a single cluster agree fully.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return float(adjusted_rand_score(truth, labels)), float(
        normalized_mutual_info_score(truth, labels)
    )


def silhouettes(pairs: Floats, tree: Floats) -> dict[int, float]:
    """Mean silhouette of the tree cut into 2, 3, ... clusters; empty if there are many points.

    Rousseeuw, *Silhouettes*, 1987: ``(b - a) / max(a, b)`` with a the mean distance to the own
    cluster and b that to the nearest other one; 0 for a cluster of one.
    """
    n = len(tree) + 1
    if not 4 <= n <= EXPLAINED:
        return {}
    square, found = squareform(pairs), {}
    for k in range(2, min(CANDIDATES, n - 1) + 1):
        labels = canonical(fcluster(tree, k, "maxclust"))
        if not labels.any():  # all points coincide
            continue
        one = np.eye(labels.max() + 1)[labels]
        sizes, sums = one.sum(0), square @ one
        own = sums[np.arange(n), labels] / np.maximum(sizes[labels] - 1, 1)
        others = sums / sizes
        others[np.arange(n), labels] = np.inf
        near = others.min(1)
        width = np.where(sizes[labels] > 1, (near - own) / np.maximum(near, own).clip(1e-300), 0.0)
        found[k] = float(width.mean())
    return found


def explain(found: Clustering, pairs: Floats | None = None) -> dict[str, Any]:
    """Why the tree was cut where it was, as JSON values.

    Args:
        found: the clustering.
        pairs: condensed distances, for silhouettes.
    """
    heights, n = found.tree[:, 2], len(found.ids)
    last = heights[::-1][:CANDIDATES]
    widths = silhouettes(pairs, found.tree) if pairs is not None else {}
    return {
        "clusters": found.count,
        "threshold": found.threshold,
        "reason": found.reason,
        "heights": last.tolist(),
        "ratios": {
            str(k): float(last[k - 2] / last[k - 1])
            for k in range(2, len(last) + 1)
            if last[k - 1] > 0 and k <= n // 2
        },
        "silhouettes": {str(k): v for k, v in widths.items()},
        "tree": found.tree.tolist() if n <= EXPLAINED else [],
    }
