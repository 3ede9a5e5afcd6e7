"""Datasets, partitions, and the federation's data."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.data.federated import FederatedData, Ragged
    from fedsim.data.loading import load
    from fedsim.data.partitions import Partition
    from fedsim.data.plot import plot_partition
    from fedsim.data.pooling import pooled
    from fedsim.data.raw import RawData, supervised

__all__ = [
    "FederatedData",
    "Partition",
    "Ragged",
    "RawData",
    "load",
    "plot_partition",
    "pooled",
    "supervised",
]

# Imported when first used: the catalogue of names must not cost an import of torch.
_HOMES = {
    "FederatedData": "federated",
    "Partition": "partitions",
    "Ragged": "federated",
    "RawData": "raw",
    "load": "loading",
    "plot_partition": "plot",
    "pooled": "pooling",
    "supervised": "raw",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
