"""Weighted means of replies, one reply in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.core.records import FlatRecord, as_flat

EXAMPLES = "num-examples"
"""Key of the number of training examples in a reply's metrics, as in Flower."""


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
        self._sum.add_(flat.flat, alpha=weight)
        for name, value in flat.beside.items():
            if value.is_floating_point():
                term = value.double() * weight
                self._beside[name] = term + self._beside.get(name, 0.0)
            else:
                seen = self._beside.get(name, value)
                self._beside[name] = torch.maximum(seen, value)
        self.total += weight

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
    mean, metrics = Mean(), MetricMean()
    for reply in replies:
        if reply.has_error():
            continue
        weight = examples_of(reply.content) if weighted else 1.0
        mean.add(reply.content.array_records[key], weight)
        metrics.add(metrics_of(reply.content), weight)
    return mean.record(), metrics.record()


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
