"""Admits or refuses one reply, with a reason, before any strategy sees it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fedsim.core.averaging import EXAMPLES
from fedsim.core.records import BFLOAT16, NPY, FlatRecord, Layout, TensorArray, as_flat

Reason = Literal[
    "error_reply",
    "malformed",
    "wrong_records",
    "wrong_names",
    "wrong_shape",
    "wrong_dtype",
    "not_finite",
    "examples_missing",
    "examples_invalid",
    "metric_invalid",
    "late",
    "unknown_node",
    "stale_round",
    "duplicate",
]


@dataclass(frozen=True)
class Refusal(Exception):
    """Why a reply was refused.

    Attributes:
        code: reason code, for counting.
        detail: one line for a person.
    """

    code: Reason
    detail: str


@dataclass(frozen=True)
class Gate:
    """Checks replies one by one.

    Attributes:
        max_examples: largest number of examples one client may report.
    """

    max_examples: int = 10**7

    def admit(self, reply: Message, expected: Mapping[str, ArrayRecord]) -> RecordDict:
        """The reply's content with every array record checked and flat.

        Args:
            reply: what came back.
            expected: for each array record that must be there, one of the same layout.

        Raises:
            Refusal: the reply must not reach a strategy.
        """
        if reply.has_error():
            raise Refusal("error_reply", reply.error.reason)
        content = reply.content
        if set(content.array_records) != set(expected) or len(content.metric_records) != 1:
            raise Refusal(
                "wrong_records",
                f"has array records {sorted(content.array_records)} and "
                f"{len(content.metric_records)} metric records; expected "
                f"{sorted(expected)} and 1",
            )
        self._check_metrics(next(iter(content.metric_records.values())))
        admitted = RecordDict()
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                record = checked(record, _layout(expected[name]))
            admitted[name] = record
        return admitted

    def _check_metrics(self, metrics: MetricRecord) -> None:
        if EXAMPLES not in metrics:
            raise Refusal("examples_missing", f"metrics lack {EXAMPLES!r}")
        for name, value in metrics.items():
            values = value if isinstance(value, list) else [value]
            if not all(math.isfinite(v) for v in values):
                raise Refusal("metric_invalid", f"metric {name} = {value}")
        count = metrics[EXAMPLES]
        if not isinstance(count, (int, float)) or not 0 < count <= self.max_examples:
            raise Refusal(
                "examples_invalid",
                f"{EXAMPLES} = {count} is outside 1 … {self.max_examples}",
            )


def _layout(record: ArrayRecord) -> Layout:
    return as_flat(record).layout


def checked(record: ArrayRecord, layout: Layout) -> FlatRecord:
    """`record` as a flat record of `layout`.

    Raises:
        Refusal: names, shapes or dtypes differ, bytes do not hold what they declare, or a value
            is not finite.
    """
    if not (isinstance(record, FlatRecord) and record.layout is layout):
        if set(record) != set(layout.names):
            unknown, missing = set(record) - set(layout.names), set(layout.names) - set(record)
            raise Refusal("wrong_names", f"unknown {sorted(unknown)}, missing {sorted(missing)}")
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True):
            _check_array(name, record[name], shape, str(dtype).removeprefix("torch."))
        record = as_flat(record, layout)
    finite = bool(torch.isfinite(record.flat).all()) and all(
        bool(torch.isfinite(t).all()) for t in record.beside.values() if t.is_floating_point()
    )
    if not finite:
        raise Refusal("not_finite", "holds NaN or infinity")
    return record


def _check_array(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> None:
    if tuple(array.shape) != shape:
        raise Refusal("wrong_shape", f"{name}: {tuple(array.shape)}, expected {shape}")
    if array.dtype != dtype:
        raise Refusal("wrong_dtype", f"{name}: {array.dtype}, expected {dtype}")
    if isinstance(array, TensorArray):
        return
    if array.stype != NPY:
        raise Refusal("malformed", f"{name}: serialised as {array.stype!r}, expected {NPY!r}")
    stored = np.dtype("uint16" if dtype == BFLOAT16 else dtype)
    _check_npy(name, array.data, shape, stored)


def _check_npy(name: str, data: bytes, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Compare the header inside the bytes, and their length, before anything is allocated."""
    buffer = io.BytesIO(data[:4096])
    try:
        version = np.lib.format.read_magic(buffer)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        found, fortran, stored = np.lib.format.read_array_header_1_0(buffer)
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        raise Refusal("malformed", f"{name}: {error}") from None
    if found != shape or stored != dtype or (fortran and len(shape) > 1):
        raise Refusal("malformed", f"{name}: the bytes hold {stored}{found}")
    if len(data) - buffer.tell() != math.prod(shape) * dtype.itemsize:
        raise Refusal("malformed", f"{name}: {len(data)} bytes do not hold {dtype}{shape}")
