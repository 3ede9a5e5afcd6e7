"""k-means in Gram space: from inner products alone, many pools at once.

The distance of a point u to the centre of a cluster c of weight ``pi_c`` is
``G_uu - 2 / pi_c * sum_v w_v G_uv + 1 / pi_c^2 * sum_vv' w_v w_v' G_vv'`` with v in c, so after
the Gram matrix an iteration costs O(points^2 * clusters), whatever the dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.core.rng import SERVER, stream

TOGETHER = 8
"""Pools worked on at once: so many that calls cost little and temporaries stay in the cache."""


class Clustering(NamedTuple):
    """What k-means found, for each of L pools.

    Attributes:
        labels: cluster of each point, int64 [L, M]; not every number need occur.
        signs: 1 or -1, the sign with which a point counts, [L, M].
        inertia: weighted sum of squared distances to the centres, [L].
        history: inertia after each assignment of the last pass, one [L] a step.
    """

    labels: Tensor
    signs: Tensor
    inertia: Tensor
    history: list[Tensor]


def kmeans(
    gram: Tensor,
    weight: Tensor,
    k: int,
    *,
    n_init: int = 10,
    max_iter: int = 300,
    seed: int = 0,
    signed: bool = False,
) -> Clustering:
    """Weighted Lloyd iterations from greedy k-means++ starts; the best of `n_init` restarts.

    The same draws serve every pool, so a pool's result does not depend on what it is batched
    with. A cluster that runs empty takes the point farthest from its own centre; it stays empty
    where all points lie on centres (fewer distinct points than k).

    Args:
        gram: inner products, [L, M, M]; float64 keeps distances of near points exact enough.
        weight: of the points, [L, M], positive.
        k: clusters, 1 to M.
        n_init: restarts.
        max_iter: iterations of a restart.
        seed: of the starts.
        signed: points count up to sign: a point is flipped where it lies opposite to its centre.
    """
    pools = len(weight)
    if pools > TOGETHER:
        parts = [
            kmeans(g, w, k, n_init=n_init, max_iter=max_iter, seed=seed, signed=signed)
            for g, w in zip(gram.split(TOGETHER), weight.split(TOGETHER), strict=True)
        ]
        longest = max(len(p.history) for p in parts)
        full = [[*p.history, *[p.history[-1]] * (longest - len(p.history))] for p in parts]
        return Clustering(
            torch.cat([p.labels for p in parts]),
            torch.cat([p.signs for p in parts]),
            torch.cat([p.inertia for p in parts]),
            [torch.cat(step) for step in zip(*full, strict=True)],
        )
    starts = _starts(gram, weight, k, n_init, seed, signed)
    labels, signs = _assign(_to_points(gram, starts, signed))
    history: list[Tensor] = []
    for _ in range(max_iter):
        near = _to_centres(gram, weight, labels, signs, k, signed)
        new, new_signs = _assign(near)
        inertia = _inertia(near, weight)
        _fill_empty(near[0], new, k)
        history.append(inertia)
        if bool((new == labels).all()) and bool((new_signs == signs).all()):
            break
        labels, signs = new, new_signs
    inertia = _inertia(_to_centres(gram, weight, labels, signs, k, signed), weight, labels)
    best = inertia.argmin(1)
    row = torch.arange(pools, device=gram.device)
    steps = [step[row, best] for step in history]
    return Clustering(labels[row, best], signs[row, best], inertia[row, best], steps)


Near = tuple[Tensor, Tensor]
"""Squared distances [L, n_init, M, k] and the signs of the inner products with the centres."""


def _to_points(gram: Tensor, starts: Tensor, signed: bool) -> Near:
    """Distances to points that serve as centres; `starts` [L, n_init, k]."""
    pools, restarts, k = starts.shape
    norms = gram.diagonal(dim1=-2, dim2=-1)
    flat = starts.reshape(pools, -1)
    inner = gram.gather(2, flat.unsqueeze(1).expand(-1, gram.shape[1], -1))
    inner = inner.view(pools, -1, restarts, k).transpose(1, 2)
    of_start = norms.gather(1, flat).view(pools, restarts, 1, k)
    return _distances(norms, inner, of_start, signed)


def _to_centres(
    gram: Tensor, weight: Tensor, labels: Tensor, signs: Tensor, k: int, signed: bool
) -> Near:
    """Distances to the centres of clusters; infinite to empty ones."""
    pools, restarts, points = labels.shape
    share = torch.zeros(pools, restarts, points, k, dtype=gram.dtype, device=gram.device)
    share.scatter_(3, labels.unsqueeze(-1), weight[:, None, :, None].expand_as(share[..., :1]))
    mass = share.sum(2, keepdim=True)
    share = share / mass.clamp_min(torch.finfo(gram.dtype).tiny)
    if signed:
        share = share * signs.unsqueeze(-1)
    wide = share.permute(0, 2, 1, 3).reshape(pools, points, restarts * k)
    inner = (gram @ wide).view(pools, points, restarts, k).transpose(1, 2)
    square = (share * inner).sum(2, keepdim=True)
    near, sign = _distances(gram.diagonal(dim1=-2, dim2=-1), inner, square, signed)
    return near.masked_fill_(mass == 0, math.inf), sign


def _distances(norms: Tensor, inner: Tensor, square: Tensor, signed: bool) -> Near:
    size = inner.abs() if signed else inner
    near = (norms[:, None, :, None] + square - 2 * size).clamp_min_(0)
    sign = torch.where(inner < 0, -1.0, 1.0) if signed else torch.ones(())
    return near, sign.to(inner.dtype).expand_as(inner)


def _assign(near: Near) -> tuple[Tensor, Tensor]:
    labels = near[0].argmin(-1)
    return labels, near[1].gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _inertia(near: Near, weight: Tensor, labels: Tensor | None = None) -> Tensor:
    own = near[0].amin(-1) if labels is None else near[0].gather(-1, labels[..., None])[..., 0]
    return (own * weight[:, None]).sum(-1)


def _fill_empty(near: Tensor, labels: Tensor, k: int) -> None:
    """Give every empty cluster the point that lies farthest from its centre, in place."""
    counts = torch.zeros((*labels.shape[:2], k), dtype=labels.dtype, device=labels.device)
    counts.scatter_add_(2, labels, torch.ones_like(labels))
    for pool, restart in (counts == 0).any(-1).nonzero().tolist():
        own, count = near[pool, restart].amin(-1), counts[pool, restart]
        queue = own.argsort(descending=True, stable=True).tolist()
        for empty in (count == 0).nonzero().flatten().tolist():
            # Not the last point of its cluster, and not one that lies on its centre already.
            scale = float(own.max())
            able = (
                u for u in queue
                if count[labels[pool, restart, u]] > 1 and float(own[u]) > 1e-12 * scale
            )  # fmt: skip
            if (point := next(able, None)) is None:
                break
            queue.remove(point)
            count[labels[pool, restart, point]] -= 1
            labels[pool, restart, point] = empty
            count[empty] = 1


def _starts(gram: Tensor, weight: Tensor, k: int, n_init: int, seed: int, signed: bool) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007, with scikit-learn's 2 + log k trials).

    Returns:
        Numbers of the chosen points, [L, n_init, k].
    """
    pools, points = weight.shape
    trials = 2 + int(math.log(k))
    draws = stream(seed, 0, SERVER, "lora-kmeans").random((k, n_init, trials))
    uniform = torch.from_numpy(np.ascontiguousarray(draws)).to(gram)
    chosen = torch.empty(pools, n_init, k, dtype=torch.int64, device=gram.device)
    weights = weight.to(gram.dtype)[:, None].expand(-1, n_init, -1)
    nearest = torch.full((pools, n_init, points), math.inf, dtype=gram.dtype, device=gram.device)
    for step in range(k):
        chance = weights if step == 0 else weights * nearest
        sums = chance.cumsum(-1)
        number = 1 if step == 0 else trials
        target = uniform[step, :, :number].expand(pools, -1, -1) * sums[..., -1:]
        candidates = torch.searchsorted(sums, target.contiguous(), right=True)
        candidates = candidates.clamp_(max=points - 1)
        near = _to_points(gram, candidates, signed)[0].transpose(2, 3)
        near = torch.minimum(near, nearest.unsqueeze(2))
        best = (near * weights.unsqueeze(2)).sum(-1).argmin(-1, keepdim=True)
        chosen[:, :, step] = candidates.gather(-1, best)[..., 0]
        nearest = near.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, points))[:, :, 0]
    return chosen
