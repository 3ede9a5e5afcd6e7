"""The partitioners of flwr-datasets, through their public API only.

Each runs on a light `datasets.Dataset` that holds only a label and the example's number; the index
arrays are kept on disk (`cache.py`), so that a partition is made once, not once per process. The
examples come to the partitioner in a seeded random order. Parameters keep Flower's names.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fedsim.core.errors import DataError
from fedsim.core.rng import SERVER, stream
from fedsim.core.text import shown, tame
from fedsim.data import cache
from fedsim.data.arguments import require
from fedsim.data.federated import Ragged, digest
from fedsim.data.raw import RawData

_OURS = {"num_partitions": "data.clients"}


def partitioner(kind: str, settings: dict[str, Any]) -> Any:
    """A partitioner of flwr-datasets. Raises `DataError` if the package is missing."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read at import
    module = require("flwr_datasets.partitioner", f"data.partition ({kind})", "data")
    return getattr(module, kind)(**settings)


def light_dataset(columns: dict[str, Any]) -> Any:
    """A `datasets.Dataset` of these columns."""
    return require("datasets", "data.partition", "data").Dataset.from_dict(columns)


def deal(
    kind: str,
    raw: RawData,
    indices: np.ndarray,
    seed: int,
    labels: np.ndarray | None,
    settings: dict[str, Any],
    seeded: bool = True,
    attempts: int = 1,
    key: object = None,
    convert: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Ragged:
    """Run one partitioner, or take its result from the cache.

    Raises `DataError`, with the partitioner's own words, if it refuses.

    Args:
        kind: name of the class.
        raw: the dataset.
        indices: examples to deal out.
        seed: of the order of the examples and of the partitioner.
        labels: one number per example of `raw`, or None for partitioners that need no label.
        settings: arguments of the class, printable.
        seeded: whether the class takes a seed.
        attempts: seeds to try, for partitioners that give up on unlucky draws.
        key: what the result depends on beside all this.
        convert: makes the class's arguments from `settings`.
    """
    draw = stream(seed, 0, SERVER, "partition")
    order = draw.permutation(indices)
    values = np.zeros(len(order)) if labels is None else labels[order]

    def run() -> dict[str, np.ndarray]:
        dataset = light_dataset({"label": values, "index": order})
        errors: list[Exception] = []
        for _ in range(attempts):
            more = {"seed": int(draw.integers(2**31))} if seeded else {}
            try:
                with warnings.catch_warnings(), np.errstate(all="ignore"):
                    warnings.simplefilter("ignore")
                    dealer = partitioner(kind, convert(settings) | more)
                    dealer.dataset = dataset
                    parts = [
                        dealer.load_partition(i).with_format("arrow")[:]["index"].to_numpy()
                        for i in range(dealer.num_partitions)
                    ]
                ragged = Ragged.from_lists(parts)
                return {"values": ragged.values, "offsets": ragged.offsets}
            except (ValueError, TypeError, IndexError, AssertionError, ZeroDivisionError) as error:
                errors.append(error)
        tried = f" in {attempts} attempts" if attempts > 1 else ""
        asked = ", ".join(
            f"{_OURS.get(k, f'data.partition.{k}')} = {shown(v)}"
            for k, v in settings.items()
            if k != "partition_by"
        )
        raise DataError(
            f"{asked}: {kind} cannot deal out {len(order)} examples like this{tried}: "
            f"{tame(str(errors[-1])) or type(errors[-1]).__name__}"
        ) from errors[-1]

    version = importlib.metadata.version("flwr-datasets") if _installed() else None
    name = digest("partition", kind, version, seed, sorted(settings.items()), key, values, order)
    return Ragged(**cache.arrays(name, run))


def _installed() -> bool:
    try:
        return bool(importlib.metadata.version("flwr-datasets"))
    except importlib.metadata.PackageNotFoundError:
        return False
