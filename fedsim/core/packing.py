"""Nested state as one block of bytes: safetensors, with everything else as JSON in its header.

No code can hide in it, and equal content gives equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from fedsim.core.records import from_record, to_record

_TENSOR, _BYTES = "$tensor", "$bytes"


def flatten(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested state into `tensors`; the rest is returned as JSON values.

    Raises:
        TypeError: the state holds something that is no tensor, number, string, bytes, list, dict.
    """
    if isinstance(tree, Tensor):
        # safetensors refuses tensors that share memory.
        tensors[prefix] = tree.detach().cpu().contiguous().clone()
        return {_TENSOR: prefix}
    if isinstance(tree, bytes):
        return {_BYTES: tree.hex()}
    if isinstance(tree, Mapping):
        return {str(k): flatten(v, f"{prefix}/{k}", tensors) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [flatten(v, f"{prefix}/{i}", tensors) for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"state {prefix} holds a {type(tree).__name__}, which cannot be saved")


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        if set(tree) == {_BYTES}:
            return bytes.fromhex(tree[_BYTES])
        return {k: unflatten(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list):
        return [unflatten(v, tensors) for v in tree]
    return tree


def pack(tree: Any) -> bytes:
    """A nested state as bytes. Raises `TypeError` as `flatten` does."""
    tensors: dict[str, Tensor] = {}
    values = flatten(tree, "", tensors)
    return save(tensors, {"fedsim": json.dumps(values)})


def unpack(data: bytes) -> Any:
    """The inverse of `pack`.

    Raises:
        ValueError: the bytes were not made by `pack`.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return unflatten(json.loads(header["__metadata__"]["fedsim"]), load(data))
    except ValueError:
        raise
    except Exception as error:  # whatever safetensors raises for bytes that are none of its own
        raise ValueError(f"not a packed state: {type(error).__name__}: {error}") from None


_KINDS = {"arrays": ArrayRecord, "metrics": MetricRecord, "config": ConfigRecord}


def tree_of(content: RecordDict) -> dict[str, Any]:
    """A `RecordDict` as nested state that `pack` takes."""
    tree: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            tree[name] = {"arrays": from_record(record)}
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            tree[name] = {kind: dict(record)}
    return tree


def content_of(tree: Mapping[str, Any]) -> RecordDict:
    """The inverse of `tree_of`."""
    content = RecordDict()
    for name, entry in tree.items():
        [(kind, values)] = entry.items()
        content[name] = to_record(values) if kind == "arrays" else _KINDS[kind](values)
    return content
