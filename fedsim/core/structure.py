"""Structured pruning: groups of a model that are removed whole, and which of them to remove.

A structure is one attention (its groups are heads, or key-value heads with their query heads) or
one feed-forward network (its groups are channels). Removing a group removes outputs of some linear
layers and the inputs of another that they feed, so the rest of the model keeps its shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GATE = "gate"
"""Name of the buffer that switches off inputs of a layer, one number for each group."""


@dataclass(frozen=True, eq=False)
class Structure:
    """Groups that can be removed from one attention or one network.

    Attributes:
        name: of the structure, unique in the model.
        layer: number of the layer of the model that it is in, from 0.
        rows: for each linear layer whose outputs go, by path: which, int64 [parts, groups, k]. A
            fused layer has a part for each of queries, keys and values.
        columns: the layer whose inputs go, and which, int64 [groups, k].
    """

    name: str
    layer: int
    rows: Mapping[str, Tensor]
    columns: tuple[str, Tensor]

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.columns[1].shape[0]


Kept = Mapping[str, Tensor]
"""Which groups are left, by structure, bool [groups]."""


@dataclass(frozen=True, eq=False)
class Structures:
    """Everything of a model that can be pruned.

    Attributes:
        items: the structures, in the order of the model.
        weights: name of the weight matrix of every linear layer above, by path.
        shapes: of these matrices, [out, in], by path.
        scalings: what its low-rank update is multiplied by, where it has one, by path.
        elements: weights of all linear layers of the model, prunable or not.
    """

    items: tuple[Structure, ...]
    weights: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    scalings: Mapping[str, float]
    elements: int

    def inner(self, first: float = 0.1, last: bool = True) -> tuple[Structure, ...]:
        """Those that may be pruned.

        Args:
            first: share of the layers at the beginning that are left alone (LoRAPrune: a tenth).
            last: leave the last layer alone.
        """
        count = max((s.layer for s in self.items), default=-1) + 1
        end = count - 1 if last and count > 1 else count
        return tuple(s for s in self.items if int(first * count) <= s.layer < end)

    def whole(self) -> dict[str, Tensor]:
        """Nothing is removed yet."""
        return {s.name: torch.ones(s.groups, dtype=torch.bool) for s in self.items}

    def size(self, structure: Structure) -> int:
        """Weights that go with one group of a structure."""
        path, index = structure.columns
        size = index.shape[1] * self.shapes[path][0]
        for path, index in structure.rows.items():
            size += index.shape[0] * index.shape[2] * self.shapes[path][1]
        return size

    def left(self, kept: Kept) -> float:
        """Share of the linear layers' weights that is left, and so of their arithmetic."""
        rows, columns = self.sides(kept)
        gone = 0
        for path, (out, width) in self.shapes.items():
            here = len(rows[path]) if path in rows else out
            gone += out * width - here * (len(columns[path]) if path in columns else width)
        return 1.0 - gone / self.elements

    def sides(self, kept: Kept) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs and inputs of each layer that are left, as positions, int64.

        A layer that loses no outputs, or no inputs, has no entry in the first, or second.
        """
        rows: dict[str, list[Tensor]] = {}
        columns: dict[str, list[Tensor]] = {}
        for s in self.items:
            for path, index in s.rows.items():
                rows.setdefault(path, []).append(index[:, kept[s.name]].flatten())
            path, index = s.columns
            columns.setdefault(path, []).append(index[kept[s.name]].flatten())
        found = []
        for side, axis in ((rows, 0), (columns, 1)):
            left = {path: torch.cat(parts).sort().values for path, parts in side.items()}
            found.append({p: i for p, i in left.items() if len(i) < self.shapes[p][axis]})
        return found[0], found[1]


def packed(kept: Kept, items: Iterable[Structure]) -> Tensor:
    """One bit for each group, uint8."""
    bits = [kept[s.name].numpy() for s in items]
    return torch.from_numpy(np.packbits(np.concatenate(bits)))


def unpacked(data: Tensor, items: Sequence[Structure]) -> dict[str, Tensor]:
    """The inverse of `packed`.

    Raises:
        ValueError: it has another length, or leaves a structure nothing.
    """
    total = sum(s.groups for s in items)
    if data.dtype != torch.uint8 or data.numel() != -(-total // 8):
        raise ValueError(
            f"{data.numel()} bytes of {data.dtype} cannot say which of {total} groups are left"
        )
    bits = torch.from_numpy(np.unpackbits(data.numpy())[:total].astype(bool))
    kept = dict(zip((s.name for s in items), bits.split([s.groups for s in items]), strict=True))
    if not all(bool(k.any()) for k in kept.values()):
        raise ValueError("a structure has no group left")
    return kept


def removed(share: float, structure: Structure) -> int:
    """How many groups a share of a structure is; one group always stays."""
    return min(structure.groups - 1, int(share * structure.groups + 0.5))


def lowered(
    kept: Kept, scores: Mapping[str, Tensor], share: float, items: Iterable[Structure]
) -> dict[str, Tensor]:
    """Remove the least important groups until that share of each structure is gone.

    What is gone stays gone. Of equal groups the first goes first.

    Args:
        kept: what is left.
        scores: importance of the groups, by structure, [groups].
        share: of each structure, cumulative.
        items: the structures that may be pruned.
    """
    found = dict(kept)
    for s in items:
        mask = kept[s.name].clone()
        more = removed(share, s) - int((~mask).sum())
        if more > 0:
            order = scores[s.name].masked_fill(~mask, float("inf")).argsort(stable=True)
            mask[order[:more]] = False
        found[s.name] = mask
    return found


def ramp(
    step: int, steps: int, start: float, end: float, warm: float = 0.0, cool: float = 0.0
) -> float:
    """LoRAPrune's cubic schedule of sparsity.

    ``end + (start - end) (1 - (step - warm T) / (T - (warm + cool) T))^3`` with T = steps, `start`
    before and `end` after.

    Args:
        step: steps taken, from 0 to `steps`.
        steps: of the whole schedule.
        start: sparsity before it.
        end: sparsity after it.
        warm: share of the steps at the beginning without pruning.
        cool: share of the steps at the end without pruning.
    """
    length = steps * (1 - warm - cool)
    done = min(1.0, max(0.0, (step - warm * steps) / length)) if length > 0 else 1.0
    return end + (start - end) * (1 - done) ** 3


def sensitivity(
    weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float
) -> Tensor:
    """First-order importance of every weight of a layer, from gradients of its LoRA factors.

    Zhang et al., *LoRAPrune*, ACL Findings 2024, as its code computes it: with the estimate
    ``G = g_B A + B g_A - g_B g_A`` (minus the change of BA in one step of SGD with rate 1) it is
    ``|G * (W + s B A)|``. The dense gradient of W is never needed.

    Args:
        weight: W, shape [out, in].
        a: A, shape [rank, in].
        b: B, shape [out, rank].
        grad_a: gradient of A.
        grad_b: gradient of B.
        scaling: s.
    """
    estimate = torch.cat([grad_b, b - grad_b], 1) @ torch.cat([a, grad_a])
    return (estimate * torch.addmm(weight.to(a.dtype), b, a, alpha=scaling)).abs_()


def group_scores(structure: Structure, elements: Mapping[str, Tensor]) -> Tensor:
    """Importance of the groups of a structure, [groups]: sums over its layers.

    In each layer (in each part of a fused one) the groups' sums are scaled to norm 1 first.

    Args:
        structure: the groups.
        elements: importance of every weight of its layers, by path, [out, in].
    """
    total = torch.zeros(structure.groups)
    for path, index in structure.rows.items():
        sums = elements[path].sum(1)
        for part in index:
            total += _unit(sums[part].sum(1))
    path, index = structure.columns
    return total + _unit(elements[path].sum(0)[index].sum(1))


def _unit(x: Tensor) -> Tensor:
    return x.float() / (torch.linalg.vector_norm(x.float()) + 1e-8)
