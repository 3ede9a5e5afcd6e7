"""Weighted means of replies, one reply or one block of them in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.bulk import EXAMPLES, Block, Replies
from fedsim.core.records import FlatRecord, as_flat

__all__ = [
    "EXAMPLES",
    "Mean",
    "MetricMean",
    "examples_of",
    "mean_of",
    "means_of",
    "metrics_of",
    "server_step",
]

Weights = NDArray[np.float64]
PIECE = 1 << 16
"""Entries that are converted and added at a time."""


class Mean:
    """A running weighted mean of records of equal layout, summed in float64.

    Entries outside the flat vector are buffers: floating-point ones are averaged, integer ones
    (BatchNorm counters) take the maximum.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._sum: Tensor | None = None
        self._beside: dict[str, Tensor] = {}
        self._like: FlatRecord | None = None

    def add(self, record: ArrayRecord, weight: float) -> None:
        """Add one record with its weight (> 0)."""
        flat = as_flat(record, self._like.layout if self._like else None)
        if self._sum is None:
            self._like = flat
            self._sum = torch.zeros_like(flat.flat, dtype=torch.float64)
        _add(self._sum, flat.flat, weight)
        self._add_beside(flat.beside, weight)
        self.total += weight

    def add_mean(self, block: Block, name: str, vector: Tensor, weights: Weights) -> None:
        """Add the mean of a block's rows.

        Args:
            block: whose record `name` it is.
            name: of the array record.
            vector: ``block.mean(name, weights)``.
            weights: weight of each row.
        """
        total = float(weights.sum())
        if self._sum is None:
            beside = block.beside[0] if block.beside and name == "arrays" else None
            like = torch.empty((), dtype=block.rows[name].dtype, device=vector.device)
            self._like = FlatRecord(block.layouts[name], like, beside)
            self._sum = torch.zeros_like(vector, dtype=torch.float64)
        _add(self._sum, vector, total)
        if name == "arrays":
            for beside, weight in zip(block.beside, weights.tolist(), strict=False):
                self._add_beside(beside, weight)
        self.total += total

    def _add_beside(self, beside: Mapping[str, Tensor], weight: float) -> None:
        for name, value in beside.items():
            if value.is_floating_point():
                term = value.double() * weight
                self._beside[name] = term + self._beside.get(name, 0.0)
            else:
                seen = self._beside.get(name, value)
                self._beside[name] = torch.maximum(seen, value)

    def record(self) -> FlatRecord | None:
        """The mean, in the records' dtypes; None if nothing was added."""
        if self._sum is None or self._like is None:
            return None
        beside = {
            name: (value / self.total).to(self._like.beside[name].dtype)
            if value.is_floating_point()
            else value
            for name, value in self._beside.items()
        }
        return self._like.with_flat((self._sum / self.total).to(self._like.flat.dtype), beside)


def _add(total: Tensor, vector: Tensor, weight: float) -> None:
    """``total += weight * vector`` in float64.

    A cacheful at a time: torch is slow where an operation mixes dtypes, and a vector that was
    converted as a whole would go through memory once more.
    """
    size = PIECE if total.device.type == "cpu" else max(1, len(total))
    for part, own in zip(total.split(size), vector.split(size), strict=True):
        part.add_(own.double(), alpha=weight)


class MetricMean:
    """A running weighted mean of the scalar metrics that all replies carry."""

    def __init__(self) -> None:
        self.total = 0.0
        self._sums: dict[str, float] | None = None

    def add(self, metrics: MetricRecord, weight: float) -> None:
        """Add one reply's metrics with its weight."""
        values = {
            name: float(value)
            for name, value in metrics.items()
            if name != EXAMPLES and isinstance(value, (int, float))
        }
        if self._sums is None:
            self._sums = dict.fromkeys(values, 0.0)
        self._sums = {
            name: total + weight * values[name]
            for name, total in self._sums.items()
            if name in values
        }
        self.total += weight

    def add_columns(self, block: Block, weights: Weights) -> None:
        """Add the metrics of a block's rows with their weights."""
        sums = {n: float((weights * v).sum()) for n, v in block.metrics.items() if n != EXAMPLES}
        if self._sums is None:
            self._sums = dict.fromkeys(sums, 0.0)
        self._sums = {n: total + sums[n] for n, total in self._sums.items() if n in sums}
        self.total += float(weights.sum())

    def record(self) -> MetricRecord:
        """The means by name; empty if nothing was added."""
        sums = self._sums or {}
        return MetricRecord({name: value / self.total for name, value in sums.items()})


def metrics_of(content: RecordDict) -> MetricRecord:
    """The only `MetricRecord` of a reply."""
    return next(iter(content.metric_records.values()))


def examples_of(content: RecordDict) -> float:
    """Number of training examples that a reply reports."""
    value = metrics_of(content)[EXAMPLES]
    assert isinstance(value, (int, float))
    return float(value)


def mean_of(
    replies: Iterable[Message], key: str = "arrays", weighted: bool = True
) -> tuple[FlatRecord | None, MetricRecord]:
    """Mean of the replies' array record `key` and of their metrics.

    Args:
        replies: admitted replies in canonical order; each is dropped after it was added.
        key: name of the array record.
        weighted: weigh by the number of examples; otherwise all alike.
    """
    means, metrics = means_of(replies, {key: weighted}, weighted)
    return means[key].record(), metrics


def means_of(
    replies: Iterable[Message], weighted: Mapping[str, bool], metrics_weighted: bool = True
) -> tuple[dict[str, Mean], MetricRecord]:
    """Means of several array records of the replies, and of their metrics, in one pass.

    Replies that come in blocks are averaged block by block, where a block was computed.

    Args:
        replies: admitted replies in canonical order; each is dropped after it was added.
        weighted: for each array record, whether to weigh by the number of examples.
        metrics_weighted: the same for the metrics.
    """
    means, metrics = {name: Mean() for name in weighted}, MetricMean()
    if isinstance(replies, Replies):

        def weights(block: Block, wanted: bool) -> Weights:
            return block.examples if wanted else np.ones(len(block))

        def average(block: Block) -> tuple[Block, dict[str, Tensor]]:
            return block, {n: block.mean(n, weights(block, w)) for n, w in weighted.items()}

        for block, vectors in replies.map(average):
            for name, vector in vectors.items():
                means[name].add_mean(block, name, vector, weights(block, weighted[name]))
            metrics.add_columns(block, weights(block, metrics_weighted))
        return means, metrics.record()
    for reply in replies:
        if reply.has_error():
            continue
        examples = examples_of(reply.content)
        for name, mean in means.items():
            mean.add(reply.content.array_records[name], examples if weighted[name] else 1.0)
        metrics.add(metrics_of(reply.content), examples if metrics_weighted else 1.0)
    return means, metrics.record()


def server_step(old: ArrayRecord, mean: FlatRecord, lr: float) -> FlatRecord:
    """``old + lr * (mean - old)`` on trainable entries; buffers are those of the mean.

    Args:
        old: the model that was sent.
        mean: the clients' mean model.
        lr: server learning rate; 1 returns the mean itself, bit for bit.
    """
    if lr == 1.0:
        return mean
    before, trainable = as_flat(old, mean.layout).flat, mean.layout.num_trainable
    flat = mean.flat.clone()
    flat[:trainable] = before[:trainable] + lr * (mean.flat[:trainable] - before[:trainable])
    return mean.with_flat(flat)
