"""Partitions of our own: iid, natural ids, planted groups, two labels per client.

A partition function decides which client owns which example. It asks, by name, for what it needs of

- `raw`: the `RawData`;
- `indices`: int64, the examples to deal out (all but the central test set);
- `clients`: number of clients asked for, or None;
- `seed`: of the data;
- `min_examples`: least number of examples a client needs;

has the user's parameters behind them, and returns a `Ragged` of example numbers per client or a
`Partition`. The partitioners of flwr-datasets are in `flower.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedsim.core.errors import DataError
from fedsim.core.rng import SERVER, stream
from fedsim.core.text import shown
from fedsim.data.arguments import call
from fedsim.data.federated import Ragged
from fedsim.data.raw import RawData

Fields = dict[str, np.ndarray]
View = Callable[[Fields, np.ndarray], Fields]
"""`view(fields, owner)`: what the owners see of their examples; owner -1 is the central test set.
`fields` are the rows in question, `owner` int64 [rows]; returns fields of the same length."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Who owns which example, and more.

    Attributes:
        clients: example numbers of each client.
        names: of the clients; ``"0"``, ``"1"``, ... if empty.
        groups: int64 [clients], planted ground truth, or None.
        view: changes what a client sees of its examples, or None. Only with a view may an example
            belong to several clients.
    """

    clients: Ragged
    names: tuple[str, ...] = ()
    groups: np.ndarray | None = None
    view: View | None = None


def refuse(parameter: str, value: object, allowed: str) -> DataError:
    """The error of an impossible parameter of a partition."""
    return DataError(f"{parameter} = {shown(value)} is not possible; allowed: {allowed}")


def needed(clients: int | None, examples: int, partition: str) -> int:
    """The number of clients asked for. Raises `DataError` if there is none or it is impossible."""
    if clients is None:
        raise DataError(f"data.clients is missing; partition {partition} needs it")
    if not 1 <= clients <= examples:
        raise refuse("data.clients", clients, f"1 to {examples}, the examples to deal out")
    return clients


def check_sizes(sizes: list[int], clients: int | None, examples: int) -> None:
    """Raise `DataError` unless the sizes can be dealt out and agree with `data.clients`."""
    where = "data.partition.partition_sizes"
    if not sizes or min(sizes) < 1 or sum(sizes) > examples:
        raise refuse(where, sizes, f"whole numbers > 0 with a sum of at most {examples}")
    if clients is not None and clients != len(sizes):
        raise refuse("data.clients", clients, f"{len(sizes)}, the length of {where}, or nothing")


def iid(indices: np.ndarray, clients: int | None, seed: int) -> Ragged:
    """Shuffled, then cut into equal parts (flwr-datasets' IidPartitioner on a shuffled dataset)."""
    n = needed(clients, len(indices), "iid")
    lengths = np.full(n, len(indices) // n)
    lengths[: len(indices) % n] += 1
    order = stream(seed, 0, SERVER, "partition").permutation(indices)
    return Ragged.from_lengths(order, lengths)


def natural(
    raw: RawData, indices: np.ndarray, clients: int | None, seed: int, min_examples: int = 1
) -> Partition:
    """One client per natural id (flwr-datasets' NaturalIdPartitioner); too small ones are left out.

    With `data.clients` so many of the natural clients are drawn.
    """
    codes = natural_codes(raw, "natural")[indices]
    present, counts = np.unique(codes, return_counts=True)
    everyone = Ragged.from_lengths(indices[np.argsort(codes, kind="stable")], counts)
    chosen = np.flatnonzero(counts >= min_examples)
    if clients is not None:
        if not 1 <= clients <= len(chosen):
            allowed = f"1 to {len(chosen)}, the natural clients of at least {min_examples} examples"
            raise refuse("data.clients", clients, allowed)
        chosen = stream(seed, 0, SERVER, "natural clients").choice(chosen, clients, replace=False)
    chosen = np.sort(chosen)
    names = tuple(raw.client_names[c] for c in present[chosen])
    return Partition(everyone.take(chosen), names)


def natural_codes(raw: RawData, partition: str) -> np.ndarray:
    """Natural client of each example. Raises `DataError` if the dataset has none."""
    if raw.clients is None:
        raise DataError(
            f"data.partition = {partition!r} needs natural client ids; dataset {raw.name} has none"
        )
    return raw.clients


def column(raw: RawData, partition_by: str | None, partition: str) -> np.ndarray:
    """One integer per example, 0, 1, ...: the label that a partition goes by.

    Args:
        raw: the dataset.
        partition_by: ``"y"``, ``"client"`` or another field; None: y where it is one class per
            example, else the natural client.
        partition: name, for the message of the error.
    """
    y = raw.fields["y"]
    if partition_by is None:
        partition_by = "y" if raw.criterion == "cross_entropy" else "client"
    if partition_by == "client":
        return natural_codes(raw, partition)
    allowed = [n for n, a in raw.fields.items() if a.ndim == 1 and a.dtype.kind in "biu"]
    if partition_by not in allowed:
        if raw.clients is not None:
            allowed.append("client")
        raise refuse(
            "data.partition.partition_by",
            partition_by,
            f"{', '.join(allowed) or 'nothing'} (one class per example; y of {raw.name} is "
            f"{y.dtype} {y.shape})",
        )
    return np.unique(raw.fields[partition_by], return_inverse=True)[1]


def two_labels(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    cap: int = 500,
    package: int = 35,
    labels: int = 2,
) -> Ragged:
    """Every client has exactly 2 labels and one package of examples of each (arXiv 2207.03448).

    As the authors' code for HAM10k: of each label at most `cap` examples, drawn at random, are
    used. While enough labels are left, the next client gets `package` unused examples of each of 2
    labels drawn uniformly; a label with fewer than `package` left is out. With
    ``data.test_fraction = 0.2`` a client has 56 training and 14 test examples.

    Args:
        raw: a dataset with classes.
        indices: examples to deal out.
        clients: so many of the clients are made; None: as many as there can be.
        seed: of all draws.
        cap: most examples used of a label.
        package: examples of each label of a client.
        labels: labels per client.
    """
    for name, value in (("cap", cap), ("package", package), ("labels", labels)):
        if value < 1:
            raise refuse(f"data.partition.{name}", value, "1 or more")
    draw = stream(seed, 0, SERVER, "partition")
    classes = column(raw, "y", "two_labels")[indices]
    stock = {int(c): draw.permutation(indices[classes == c])[:cap] for c in np.unique(classes)}
    stock = {c: unused for c, unused in stock.items() if len(unused) >= package}
    dealt: list[np.ndarray] = []
    while len(stock) >= labels and (clients is None or len(dealt) < clients):
        chosen = draw.choice(sorted(stock), labels, replace=False).tolist()
        dealt.append(np.concatenate([stock[c][:package] for c in chosen]))
        stock = {c: u[package:] if c in chosen else u for c, u in stock.items()}
        stock = {c: unused for c, unused in stock.items() if len(unused) >= package}
    if not dealt:
        raise refuse("data.partition.package", package, f"what {labels} labels have examples for")
    if clients is not None and len(dealt) < clients:
        raise refuse("data.clients", clients, f"1 to {len(dealt)} with package = {package}")
    return Ragged.from_lists(dealt)


def planted(
    raw: RawData,
    indices: np.ndarray,
    clients: int | None,
    seed: int,
    min_examples: int,
    groups: int = 4,
    kind: Literal["rotation", "labels"] = "rotation",
    base: str | dict[str, Any] = "iid",
) -> Partition:
    """Groups of clients that differ by rotation or by label permutation: truth for clustering.

    Group k sees its images rotated by k * 90 degrees, or its labels through the k-th of `groups`
    different permutations (the identity is the first). Groups have equally many clients, drawn at
    random. The central test set is an even mixture of all groups. The field ``"group"`` says how
    each example was changed.

    Args:
        raw: the dataset; square images, or classes.
        indices: examples to deal out.
        clients: a multiple of `groups`.
        seed: of all draws.
        min_examples: for `base`.
        groups: number of groups.
        kind: ``"rotation"`` (2 to 4 groups) or ``"labels"``.
        base: partition that deals out the examples: a name, or a table with name and parameters.
    """
    table = {"name": base} if isinstance(base, str) else dict(base)
    inner = call(
        "partitioners",
        str(table.pop("name", "iid")),
        "data.partition.base",
        table,
        raw=raw,
        indices=indices,
        clients=clients,
        seed=seed,
        min_examples=min_examples,
    )
    inner = inner if isinstance(inner, Partition) else Partition(inner)
    if inner.view is not None:
        raise refuse("data.partition.base", base, "a partition that leaves examples as they are")
    if groups < 2:
        raise refuse("data.partition.groups", groups, "2 or more")
    n = len(inner.clients)
    if n % groups:
        raise refuse("data.partition.groups", groups, f"a divisor of the number of clients, {n}")
    draw = stream(seed, 0, SERVER, "planted groups")
    member = draw.permutation(np.arange(n) % groups)
    change = _rotation(raw, groups) if kind == "rotation" else _permutation(raw, groups, draw)

    def view(fields: Fields, owner: np.ndarray) -> Fields:
        group = np.where(owner < 0, np.arange(len(owner)) % groups, member[owner])
        return change(fields, group) | {"group": group}

    return Partition(inner.clients, inner.names, member, view)


def _rotation(raw: RawData, groups: int) -> View:
    x = raw.fields["x"]
    if x.ndim != 4 or x.shape[2] != x.shape[3]:
        raise refuse(
            "data.partition.kind",
            "rotation",
            f"'labels'; rotation needs square images, and x of {raw.name} is {x.shape[1:]}",
        )
    if groups > 4:
        raise refuse("data.partition.groups", groups, "2 to 4 with kind = 'rotation'")

    def change(fields: Fields, group: np.ndarray) -> Fields:
        x = fields["x"].copy()
        for k in range(1, groups):
            x[group == k] = np.rot90(x[group == k], k, axes=(2, 3))
        return fields | {"x": x}

    return change


def _permutation(raw: RawData, groups: int, draw: np.random.Generator) -> View:
    column(raw, "y", "planted")
    found: dict[tuple[int, ...], None] = {tuple(range(raw.num_outputs)): None}
    # With few classes there are few permutations: `groups` different ones may not exist.
    for _ in range(1000 * groups):
        if len(found) < groups:
            found |= {tuple(draw.permutation(raw.num_outputs).tolist()): None}
    if len(found) < groups:
        raise refuse(
            "data.partition.groups", groups, f"2 to {len(found)} with {raw.num_outputs} labels"
        )
    table = np.array(list(found))

    def change(fields: Fields, group: np.ndarray) -> Fields:
        return fields | {"y": table[group, fields["y"]]}

    return change
