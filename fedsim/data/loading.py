"""From `[data]` of an experiment to the federation's data."""

from __future__ import annotations

import json
from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedsim.core.errors import ConfigError, DataError
from fedsim.core.rng import SERVER, stream
from fedsim.data.arguments import call
from fedsim.data.federated import FederatedData, Ragged, digest
from fedsim.data.partitions import Fields, Partition
from fedsim.data.raw import RawData

if TYPE_CHECKING:
    from fedsim.config import DataConfig

KEPT = 8
"""So many loaded federations stay in memory; the least recently used one goes first."""

_loaded: OrderedDict[str, FederatedData] = OrderedDict()
_lock = Lock()


def load(data: DataConfig, seed: int) -> FederatedData:
    """The data of an experiment, dealt to its clients; the same for the same arguments, anywhere.

    Args:
        data: the experiment's `[data]`.
        seed: of the run; `data.seed` has precedence.

    Raises:
        ConfigError: unknown dataset or partition, wrong parameters.
        DataError: missing file or package, wrong fields, impossible split.
    """
    seed = seed if data.seed is None else data.seed
    key = json.dumps([data.model_dump(mode="json"), seed], sort_keys=True)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _load(data, seed)
            if len(_loaded) > KEPT:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def _load(data: DataConfig, seed: int) -> FederatedData:
    raw = call("datasets", data.dataset.name, "data.dataset", data.dataset.params, seed=seed)
    if not isinstance(raw, RawData):
        raise ConfigError(
            f"data.dataset = {data.dataset.name!r} returned {type(raw).__name__}; "
            "a dataset function returns fedsim.data.RawData"
        )
    raw.check()
    pool, central = _central_test(raw, data.central_test_fraction, seed)
    pool, public = _public(raw, pool, data.public, seed)
    partition = _partition(data, raw, pool, seed)
    clients = partition.clients
    heldout = _heldout_clients(data.heldout_clients, len(clients), seed)
    is_test = _heldout_examples(clients, len(raw), data.test_fraction, seed)
    fields = _prepared(raw, pool)
    if partition.view is not None:
        rows = np.concatenate([central, public, clients.values])
        nobodys = len(central) + len(public)
        owner = np.concatenate([np.full(nobodys, -1), clients.owners])
        fields = partition.view({name: array[rows] for name, array in fields.items()}, owner)
        clients = Ragged(np.arange(nobodys, len(rows)), clients.offsets)
        central, public = np.arange(len(central)), np.arange(len(central), nobodys)
    train, test = clients.where(~is_test), clients.where(is_test)
    groups = partition.groups
    return FederatedData(
        name=raw.name,
        fields={n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in fields.items()},
        train=train,
        test=test,
        central_test=central,
        criterion=raw.criterion,
        num_outputs=raw.num_outputs,
        input_shape=tuple(fields["x"].shape[1:]),
        client_names=partition.names or tuple(map(str, range(len(clients)))),
        heldout_clients=heldout,
        groups=groups,
        fingerprint=digest(
            *(part for name in sorted(fields) for part in (name, fields[name])),
            *(train.values, train.offsets, test.values, test.offsets),
            *(central, heldout, groups, raw.criterion, raw.num_outputs),
            *((public,) if len(public) else ()),
        ),
        meta=dict(raw.meta),
        public=public,
    )


def _central_test(raw: RawData, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(examples to deal out, central test set), both ascending."""
    everyone = np.arange(len(raw))
    if raw.test is not None:
        central = np.sort(raw.test)
    else:
        if not 0 <= fraction < 1:
            raise DataError(
                f"data.central_test_fraction = {fraction} is not possible; allowed: 0 to below 1"
            )
        order = stream(seed, 0, SERVER, "central test").permutation(everyone)
        central = np.sort(order[: round(fraction * len(raw))])
    pool = np.setdiff1d(everyone, central, assume_unique=True)
    if not len(pool):
        raise DataError(f"dataset {raw.name} has no example left to deal to clients")
    return pool, central


def _public(
    raw: RawData, pool: np.ndarray, wanted: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(examples to deal out, public ones); of every class as many, as far as they go."""
    if not wanted:
        return pool, pool[:0]
    if wanted >= len(pool):
        raise DataError(
            f"data.public = {wanted} leaves no example for the clients; allowed: below {len(pool)}"
        )
    order = stream(seed, 0, SERVER, "public").permutation(pool)
    labels = raw.fields["y"]
    if raw.criterion == "cross_entropy" and labels.ndim == 1:
        own = labels[order]
        turn = np.empty(len(order), np.int64)  # the how manieth of its class it is
        for label in np.unique(own):
            turn[own == label] = np.arange(int((own == label).sum()))
        order = order[np.argsort(turn, kind="stable")]
    public = np.sort(order[:wanted])
    return np.setdiff1d(pool, public, assume_unique=True), public


def _partition(data: DataConfig, raw: RawData, pool: np.ndarray, seed: int) -> Partition:
    found = call(
        "partitioners",
        data.partition.name,
        "data.partition",
        data.partition.params,
        raw=raw,
        indices=pool,
        clients=data.clients,
        seed=seed,
        min_examples=data.min_examples,
    )
    partition = found if isinstance(found, Partition) else Partition(found)
    lengths = partition.clients.lengths
    if not len(lengths):
        raise DataError(f"data.partition = {data.partition.name!r} leaves no client")
    if lengths.min() < data.min_examples:
        poor = int(lengths.argmin())
        raise DataError(
            f"data.min_examples = {data.min_examples}, but partition {data.partition.name} gives "
            f"{int((lengths < data.min_examples).sum())} client(s) fewer (client {poor}: "
            f"{lengths[poor]}); lower it, or ask for fewer clients"
        )
    return partition


def _heldout_clients(wanted: float, clients: int, seed: int) -> np.ndarray:
    count = wanted if isinstance(wanted, int) else round(wanted * clients)
    if not 0 <= count < clients or (isinstance(wanted, float) and not 0 <= wanted < 1):
        raise DataError(
            f"data.heldout_clients = {wanted} is not possible; allowed: a number of clients from 0 "
            f"to {clients - 1}, or a fraction below 1"
        )
    return np.sort(stream(seed, 0, SERVER, "held-out clients").permutation(clients)[:count])


def _heldout_examples(clients: Ragged, examples: int, fraction: float, seed: int) -> np.ndarray:
    """Which entries of `clients.values` are held out; every client keeps at least one."""
    if not 0 <= fraction < 1:
        raise DataError(f"data.test_fraction = {fraction} is not possible; allowed: 0 to below 1")
    # One number per example, not per client: an example that two clients share (vertical
    # partitions) is held out from both or from neither.
    chance = stream(seed, 0, SERVER, "held-out examples").random(examples)[clients.values]
    rank = np.empty(len(chance), np.int64)
    starts = np.repeat(clients.offsets[:-1], clients.lengths)
    rank[np.lexsort((chance, clients.owners))] = np.arange(len(chance)) - starts
    wanted = np.floor(clients.lengths * fraction + 0.5).astype(np.int64)
    held: np.ndarray = rank < np.repeat(np.minimum(wanted, clients.lengths - 1), clients.lengths)
    return held


def _prepared(raw: RawData, pool: np.ndarray) -> Fields:
    """Fields as models want them: x float32 or int64, y int64 or float32."""
    fields: dict[str, Any] = {name: _plain(array) for name, array in raw.fields.items()}
    if raw.fields["x"].dtype == np.uint8:
        fields["x"] = fields["x"].astype(np.float32) / np.float32(255)
    if raw.standardise:
        x = fields["x"]
        over = tuple(axis for axis in range(x.ndim) if axis != 1)
        mean, deviation = (
            # Rounded, so that the last bit of a sum, which depends on the processor, is no matter.
            np.round(f(x[pool], axis=over, dtype=np.float64, keepdims=True), 6)
            for f in (np.mean, np.std)
        )
        deviation[deviation == 0] = 1
        fields["x"] = (x - mean.astype(np.float32)) / deviation.astype(np.float32)
    return fields


def _plain(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
