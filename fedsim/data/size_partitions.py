"""Partitions of flwr-datasets that go by sizes, by groups of natural ids, or by columns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedsim.core.errors import DataError
from fedsim.core.rng import SERVER, stream
from fedsim.data import cache
from fedsim.data.federated import Ragged, digest
from fedsim.data.flower import deal, light_dataset, partitioner
from fedsim.data.partitions import (
    Fields,
    Partition,
    check_sizes,
    natural_codes,
    needed,
    refuse,
)
from fedsim.data.raw import RawData


def size(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    partition_sizes: list[int],
) -> Ragged:
    """Client i gets `partition_sizes[i]` examples, drawn at random."""
    check_sizes(partition_sizes, clients, len(indices))
    settings = {"partition_sizes": partition_sizes}
    return deal("SizePartitioner", raw, indices, seed, None, settings, seeded=False)


def linear(raw: RawData, indices: np.ndarray, clients: int | None, seed: int) -> Ragged:
    """Client i gets a number of examples proportional to i + 1."""
    return _by_size("LinearPartitioner", raw, indices, clients, seed)


def square(raw: RawData, indices: np.ndarray, clients: int | None, seed: int) -> Ragged:
    """Client i gets a number of examples proportional to (i + 1) squared."""
    return _by_size("SquarePartitioner", raw, indices, clients, seed)


def exponential(raw: RawData, indices: np.ndarray, clients: int | None, seed: int) -> Ragged:
    """Client i gets a number of examples proportional to exp(i + 1): for few clients."""
    return _by_size("ExponentialPartitioner", raw, indices, clients, seed)


def id_to_size(
    raw: RawData, indices: np.ndarray, clients: int | None, seed: int, function: str = "sqrt"
) -> Ragged:
    """Client i gets a number of examples proportional to function(i + 1).

    `function`: ``"sqrt"``, ``"log1p"``, ``"cbrt"``, or yours as ``"module:function"``, from
    an array of the numbers 1 ... clients to an array of sizes > 0.
    """
    from fedsim.registry import resolve

    if function in ("sqrt", "log1p", "cbrt"):
        scale = getattr(np, function)
    elif ":" in function:
        scale = resolve("partitioners", function)
    else:
        raise refuse("data.partition.function", function, "sqrt, log1p, cbrt, module:function")
    n = needed(clients, len(indices), "id_to_size")
    # A user's function may change while its name stays: its values are part of the cache's key.
    units = np.asarray(scale(np.arange(1.0, n + 1)))
    return deal(
        "IdToSizeFncPartitioner",
        raw,
        indices,
        seed,
        None,
        {"num_partitions": n},
        seeded=False,
        key=units.tolist(),
        convert=lambda s: s | {"partition_id_to_size_fn": scale},
    )


def _by_size(
    kind: str, raw: RawData, indices: np.ndarray, clients: int | None, seed: int
) -> Ragged:
    n = needed(clients, len(indices), kind)
    return deal(kind, raw, indices, seed, None, {"num_partitions": n}, seeded=False)


def grouped_natural(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    group_size: int,
    mode: str = "allow-smaller",
) -> Partition:
    """Each client is `group_size` natural ids together (a region of users, a shelf of topics).

    `mode`: what becomes of a remainder: ``"allow-smaller"``, ``"allow-bigger"``,
    ``"drop-reminder"`` or ``"strict"``. `data.clients` must be absent or agree.
    """
    codes = natural_codes(raw, "grouped_natural")
    modes = ("allow-smaller", "allow-bigger", "drop-reminder", "strict")
    if mode not in modes:
        raise refuse("data.partition.mode", mode, ", ".join(modes))
    present = len(np.unique(codes[indices]))
    if not 1 <= group_size <= present:
        raise refuse("data.partition.group_size", group_size, f"1 to {present}, the natural ids")
    settings = {"partition_by": "label", "group_size": group_size, "mode": mode}
    parts = deal("GroupedNaturalIdPartitioner", raw, indices, seed, codes, settings, seeded=False)
    if clients is not None and clients != len(parts):
        raise refuse("data.clients", clients, f"{len(parts)} with this group_size, or nothing")
    members = [np.unique(codes[part]) for part in (parts[i] for i in range(len(parts)))]
    names = (raw.client_names[m[0]] + (f" +{len(m) - 1}" if len(m) > 1 else "") for m in members)
    return Partition(parts, tuple(names))


def vertical_even(
    raw: RawData, indices: np.ndarray, clients: int | None, seed: int, shuffle: bool = True
) -> Partition:
    """Vertical: every client has all examples, but an equal share of their columns (rest 0).

    `shuffle`: columns (pixels) are dealt at random, else in order. The held-out examples are the
    same for all clients; the central test set has all columns.
    """
    columns = math.prod(raw.fields["x"].shape[1:])
    n = needed(clients, columns, "vertical_even")
    settings = {"num_partitions": n, "shuffle": shuffle}
    return _vertical("VerticalEvenPartitioner", raw, indices, seed, settings)


def vertical_size(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    partition_sizes: list[int] | list[float],
    shuffle: bool = True,
) -> Partition:
    """Vertical: every client has all examples, but only so many of their columns (rest 0).

    `partition_sizes`: columns of each client, their sum the number of columns; or fractions with
    sum 1. Otherwise as `vertical_even`.
    """
    columns, total = math.prod(raw.fields["x"].shape[1:]), sum(partition_sizes)
    fractions = all(isinstance(s, float) for s in partition_sizes)
    if min(partition_sizes, default=0) <= 0 or not (
        math.isclose(total, 1, abs_tol=1e-9) if fractions else total == columns
    ):
        where = "data.partition.partition_sizes"
        raise refuse(where, partition_sizes, f"numbers > 0 with sum {columns}, or fractions with 1")
    if clients is not None and clients != len(partition_sizes):
        raise refuse("data.clients", clients, f"{len(partition_sizes)}, or nothing")
    # Whole numbers, because the class rejects fractions whose float sum is not exactly 1.
    ends = np.round(np.cumsum(partition_sizes) * (columns if fractions else 1)).astype(int)
    counts = np.diff(ends, prepend=0).tolist()
    settings = {"partition_sizes": counts, "shuffle": shuffle}
    return _vertical("VerticalSizePartitioner", raw, indices, seed, settings)


_LIMIT = 8 * 2**30


def _vertical(
    kind: str, raw: RawData, indices: np.ndarray, seed: int, settings: dict[str, Any]
) -> Partition:
    if raw.criterion == "next_token":
        raise DataError(f"data.partition: {kind} needs columns of numbers; {raw.name} is text")
    shape = raw.fields["x"].shape[1:]
    columns = math.prod(shape)
    n = settings.get("num_partitions") or len(settings["partition_sizes"])
    if n * len(indices) * columns * 4 > _LIMIT:
        raise refuse(
            "data.clients", n, f"at most {_LIMIT // (4 * columns * len(indices))} (8 GiB of copies)"
        )
    settings |= {"seed": int(stream(seed, 0, SERVER, "partition").integers(2**31))}

    def run() -> dict[str, np.ndarray]:
        dealer = partitioner(kind, settings)
        dealer.dataset = light_dataset({str(c): [0] for c in range(columns)})
        seen = np.zeros((n, columns), np.float32)
        for i in range(n):
            seen[i, [int(c) for c in dealer.load_partition(i).column_names]] = 1
        return {"seen": seen}

    seen = cache.arrays(digest("columns", kind, columns, sorted(settings.items())), run)["seen"]
    masks = np.concatenate([seen, np.ones((1, columns), np.float32)]).reshape(-1, *shape)

    def view(fields: Fields, owner: np.ndarray) -> Fields:
        return fields | {"x": fields["x"] * masks[owner]}

    return Partition(Ragged.from_lists([indices] * n), view=view)
