"""Partitions of flwr-datasets that go by a label, or another property, of the examples."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedsim.core.rng import SERVER, stream
from fedsim.data.federated import Ragged
from fedsim.data.flower import deal
from fedsim.data.partitions import check_sizes, column, needed, refuse
from fedsim.data.raw import RawData


def _positive(name: str, value: float | list[float]) -> None:
    values = value if isinstance(value, list) else [value]
    if not values or not all(0 < v < float("inf") for v in values):
        raise refuse(f"data.partition.{name}", value, "numbers > 0")


def dirichlet(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    min_examples: int,
    alpha: float | list[float],
    min_partition_size: int | None = None,
    self_balancing: bool = False,
    partition_by: str | None = None,
    attempts: int = 20,
) -> Ragged:
    """Each label's examples are shared out by a draw from Dirichlet(alpha): label skew.

    Args:
        raw: the dataset.
        indices: examples to deal out.
        clients: number of clients.
        seed: of all draws.
        min_examples: default of `min_partition_size`.
        alpha: concentration, > 0; small means few labels per client. One number, or one per client.
        min_partition_size: drawn again until every client has so many examples.
        self_balancing: a client that has its fair share gets no more.
        partition_by: what to skew: ``"y"``, ``"client"`` or another integer field.
        attempts: seeds to try before giving up; each stands for 11 draws.
    """
    n = needed(clients, len(indices), "dirichlet")
    _positive("alpha", alpha)
    if isinstance(alpha, list) and len(alpha) != n:
        raise refuse("data.partition.alpha", alpha, f"one number, or one for each of {n} clients")
    least = min_examples if min_partition_size is None else min_partition_size
    if not 0 <= least * n <= len(indices):
        allowed = f"0 to {len(indices) // n} ({len(indices)} examples, {n} clients)"
        raise refuse("data.partition.min_partition_size", least, allowed)
    if attempts < 1:
        raise refuse("data.partition.attempts", attempts, "1 or more")
    settings = {
        "num_partitions": n,
        "partition_by": "label",
        "alpha": alpha,
        "min_partition_size": least,
        "self_balancing": self_balancing,
    }
    labels = column(raw, partition_by, "dirichlet")
    return deal("DirichletPartitioner", raw, indices, seed, labels, settings, attempts=attempts)


def inner_dirichlet(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    alpha: float | list[float],
    partition_sizes: list[int] | None = None,
    partition_by: str | None = None,
) -> Ragged:
    """Each client's labels are drawn from its own Dirichlet(alpha), with sizes as given.

    `partition_sizes`: examples per client; equal sizes if missing. `alpha`: > 0, one number or one
    per label.
    """
    if partition_sizes is None:
        n = needed(clients, len(indices), "inner_dirichlet")
        partition_sizes = [len(indices) // n] * n
    check_sizes(partition_sizes, clients, len(indices))
    _positive("alpha", alpha)
    settings = {"partition_sizes": partition_sizes, "partition_by": "label", "alpha": alpha}
    # The class expects labels 0 ... k-1 that all occur.
    labels = np.zeros(len(raw), np.int64)
    labels[indices] = np.unique(
        column(raw, partition_by, "inner_dirichlet")[indices], return_inverse=True
    )[1]
    return deal("InnerDirichletPartitioner", raw, indices, seed, labels, settings)


def pathological(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    num_classes_per_partition: int = 2,
    class_assignment_mode: Literal["random", "deterministic", "first-deterministic"] = "random",
    partition_by: str | None = None,
) -> Ragged:
    """Each client has examples of a few labels only, shared evenly among those that have the label.

    `num_classes_per_partition`: labels per client. `class_assignment_mode`: how labels are given to
    clients; with ``"random"`` a label that no client draws is not used.
    """
    n = needed(clients, len(indices), "pathological")
    labels = column(raw, partition_by, "pathological")
    classes = len(np.unique(labels[indices]))
    if not 1 <= num_classes_per_partition <= classes:
        where = "data.partition.num_classes_per_partition"
        raise refuse(where, num_classes_per_partition, f"1 to {classes}, the number of labels")
    settings = {
        "num_partitions": n,
        "partition_by": "label",
        "num_classes_per_partition": num_classes_per_partition,
        "class_assignment_mode": class_assignment_mode,
    }
    return deal("PathologicalPartitioner", raw, indices, seed, labels, settings)


def shard(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    num_shards_per_partition: int | None = None,
    shard_size: int | None = None,
    keep_incomplete_shard: bool = False,
    partition_by: str | None = None,
) -> Ragged:
    """Sorted by label, cut into shards, each client gets some (McMahan et al. 2017: 2 shards).

    `num_shards_per_partition`: shards per client (2 if neither is given). `shard_size`: examples
    per shard.
    """
    n = needed(clients, len(indices), "shard")
    if num_shards_per_partition is None and shard_size is None:
        num_shards_per_partition = 2
    for name, value in (
        ("num_shards_per_partition", num_shards_per_partition),
        ("shard_size", shard_size),
    ):
        if value is not None and not 1 <= value <= len(indices) // n:
            raise refuse(f"data.partition.{name}", value, f"1 to {len(indices) // n}")
    settings = {
        "num_partitions": n,
        "partition_by": "label",
        "num_shards_per_partition": num_shards_per_partition,
        "shard_size": shard_size,
        "keep_incomplete_shard": keep_incomplete_shard,
    }
    labels = column(raw, partition_by, "shard")
    return deal("ShardPartitioner", raw, indices, seed, labels, settings)


def distribution(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    distribution_array: list[list[float]] | None = None,
    num_unique_labels_per_partition: int = 2,
    preassigned_num_samples_per_label: int = 5,
    rescale: bool = True,
    partition_by: str | None = None,
) -> Ragged:
    """Each label is shared out by a row of a matrix [labels, clients * labels per client / labels].

    `distribution_array`: the matrix; lognormal(0, 2) if missing, as in FedProx (Li et al. 2020).
    `num_unique_labels_per_partition`: labels per client; client c starts with label c.
    `preassigned_num_samples_per_label`: examples of each of its labels a client has at least.
    `rescale`: rows are proportions; else they are counts.
    """
    n = needed(clients, len(indices), "distribution")
    labels = column(raw, partition_by, "distribution")
    classes = len(np.unique(labels[indices]))
    per_client = num_unique_labels_per_partition
    if not 1 <= per_client <= classes or per_client * n % classes:
        where = "data.partition.num_unique_labels_per_partition"
        allowed = f"1 to {classes}, and times {n} clients a multiple of {classes} labels"
        raise refuse(where, per_client, allowed)
    shape = (classes, per_client * n // classes)
    if distribution_array is None:
        spread = stream(seed, 0, SERVER, "partition distribution").lognormal(0, 2, shape)
        distribution_array = spread.tolist()
    if np.shape(distribution_array) != shape:
        shown = np.shape(distribution_array)
        raise refuse("data.partition.distribution_array", f"matrix {shown}", f"matrix {shape}")
    settings = {
        "distribution_array": distribution_array,
        "num_partitions": n,
        "num_unique_labels_per_partition": per_client,
        "partition_by": "label",
        "preassigned_num_samples_per_label": preassigned_num_samples_per_label,
        "rescale": rescale,
    }
    return deal(
        "DistributionPartitioner",
        raw,
        indices,
        seed,
        labels,
        settings,
        convert=lambda s: s | {"distribution_array": np.array(s["distribution_array"])},
    )


def continuous(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    strictness: float = 0.5,
    partition_by: str = "mean",
) -> Ragged:
    """Sorted by a continuous property blended with noise, then cut: feature skew.

    `strictness`: 0 is iid, 1 strictly sorted. `partition_by`: ``"mean"`` (of each example's x) or a
    field of one number per example.
    """
    n = needed(clients, len(indices), "continuous")
    if not 0 <= strictness <= 1:
        raise refuse("data.partition.strictness", strictness, "0 to 1")
    if partition_by == "mean":
        values = raw.fields["x"].reshape(len(raw), -1).mean(1)
    else:
        fields = [k for k, v in raw.fields.items() if v.ndim == 1]
        if partition_by not in fields:
            raise refuse("data.partition.partition_by", partition_by, ", ".join(["mean", *fields]))
        values = raw.fields[partition_by]
    settings = {"num_partitions": n, "partition_by": "label", "strictness": strictness}
    return deal("ContinuousPartitioner", raw, indices, seed, values.astype(np.float64), settings)
