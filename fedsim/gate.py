"""Admits or refuses one reply, with a reason, before any strategy sees it.

A refusal concerns that reply alone: the round goes on with the others. Sizes, names and headers are
compared before anything is decoded, so a reply that lies about its size costs no memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.core.averaging import EXAMPLES
from fedsim.core.packets import PACKET, Checked, Expected, packet_of
from fedsim.core.records import (
    BFLOAT16,
    NPY,
    FlatRecord,
    Layout,
    TensorArray,
    as_flat,
    count_bytes,
)

Reason = Literal[
    "error_reply",  # the client, or Flower in its name, answered with an error
    "late",  # no reply before the cut-off
    "stale_round",  # answers a message of an earlier round
    "duplicate",  # a second reply to one message
    "unknown_node",  # from a node that was not asked
    "wrong_records",  # records are missing, too many, or under other names
    "wrong_names",  # a record holds other entries than the one that was sent
    "wrong_shape",  # an entry declares another shape
    "wrong_dtype",  # an entry declares another dtype
    "malformed",  # the bytes do not hold what is declared
    "not_finite",  # NaN or infinity
    "too_large",  # a value beyond any model's, or too many bytes beside the arrays
    "examples_missing",  # no number of examples
    "examples_invalid",  # it is no whole number from 1 to what the client has
    "metric_invalid",  # NaN or infinity in a metric
]


@dataclass(eq=False)
class Refusal(Exception):
    """Why a reply was refused.

    Attributes:
        code: reason code, for counting.
        detail: one line for a person.
    """

    code: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True)
class Gate:
    """Checks replies one by one.

    Attributes:
        max_examples: largest number of examples one client may report, whatever it declared.
        max_magnitude: largest absolute value of an array's entry.
        max_beside: largest payload in bytes of all records that are no arrays.
    """

    max_examples: int = 10**7
    max_magnitude: float = 1e15
    max_beside: int = 2**20

    def admit(
        self, reply: Message, expected: Mapping[str, ArrayRecord], most: int | None = None
    ) -> RecordDict:
        """The reply's content with every array record checked and flat.

        Args:
            reply: what came back.
            expected: for each array record that must be there, one of the same layout.
            most: the number of examples the client has; it may report fewer. None: not known.

        Raises:
            Refusal: the reply must not reach a strategy.
        """
        if reply.has_error():
            raise Refusal("error_reply", one_line(reply.error.reason or ""))
        return self.check(reply.content, expected, most)

    def check(
        self, content: RecordDict, expected: Mapping[str, ArrayRecord], most: int | None = None
    ) -> RecordDict:
        """As `admit`, for the content of a reply."""
        if set(content.array_records) != set(expected) or len(content.metric_records) != 1:
            raise Refusal(
                "wrong_records",
                f"has array records {few(content.array_records)} and "
                f"{len(content.metric_records)} metric records; expected {few(expected)} and 1",
            )
        beside = RecordDict({**content.metric_records, **content.config_records})
        if (size := count_bytes(beside)) > self.max_beside:
            raise Refusal("too_large", f"{size} bytes beside the arrays")
        self._check_metrics(next(iter(content.metric_records.values())), most)
        admitted = RecordDict()
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                want = expected[name]
                if isinstance(want, Expected):
                    _check_packet(record, want)
                else:
                    record = self.checked(record, as_flat(want).layout)
                if isinstance(want, Checked):
                    _check_record(cast(FlatRecord, record), want)
            admitted[name] = record
        return admitted

    def _check_metrics(self, metrics: MetricRecord, most: int | None) -> None:
        if EXAMPLES not in metrics:
            raise Refusal("examples_missing", f"metrics lack {EXAMPLES!r}")
        count = metrics[EXAMPLES]
        most = self.max_examples if most is None else min(most, self.max_examples)
        if not isinstance(count, (int, float)) or not 0 < count <= most or count != int(count):
            raise Refusal(
                "examples_invalid",
                f"{EXAMPLES} = {one_line(str(count))} is no whole number from 1 to {most}",
            )
        for name, value in metrics.items():
            values = value if isinstance(value, list) else [value]
            if not all(math.isfinite(v) for v in values):
                raise Refusal("metric_invalid", f"metric {one_line(name)} holds NaN or infinity")

    def checked(self, record: ArrayRecord, layout: Layout) -> FlatRecord:
        """`record` as a flat record of `layout`.

        Raises:
            Refusal: names, shapes or dtypes differ, bytes do not hold what they declare, or a
                value is not finite or beyond `max_magnitude`.
        """
        if not (isinstance(record, FlatRecord) and record.layout is layout):
            if set(record) != set(layout.names):
                unknown, missing = set(record) - set(layout.names), set(layout.names) - set(record)
                raise Refusal("wrong_names", f"unknown {few(unknown)}, missing {few(missing)}")
            for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True):
                _check_array(name, record[name], shape, str(dtype).removeprefix("torch."))
            record = as_flat(record, layout)
        for tensor in (record.flat, *record.beside.values()):
            self._check_values(tensor)
        return record

    def _check_values(self, tensor: Tensor) -> None:
        if not tensor.numel() or tensor.is_complex():
            return
        low, high = (float(v) for v in torch.aminmax(tensor))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise Refusal("not_finite", "holds NaN or infinity")
        if max(-low, high) > self.max_magnitude:
            raise Refusal("too_large", f"holds a value beyond {self.max_magnitude:g}")


def _check_array(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> None:
    if tuple(array.shape) != shape:
        raise Refusal("wrong_shape", f"{name}: {one_line(str(array.shape))}, expected {shape}")
    if array.dtype != dtype:
        raise Refusal("wrong_dtype", f"{name}: {one_line(str(array.dtype))}, expected {dtype}")
    if isinstance(array, TensorArray):
        return
    if array.stype != NPY:
        raise Refusal("malformed", f"{name}: serialised as {one_line(str(array.stype))}")
    _check_npy(name, array.data, shape, np.dtype("uint16" if dtype == BFLOAT16 else dtype))


def _check_packet(record: ArrayRecord, want: Expected) -> None:
    """Compare a record of packed bytes with what may come; see `fedsim.core.packets`."""
    if set(record) != {PACKET}:
        raise Refusal("wrong_names", f"has {few(record)}, expected [{PACKET}]")
    array = record[PACKET]
    if len(array.shape) != 1 or not 0 <= array.shape[0] <= want.limit:
        shape = one_line(str(tuple(array.shape)))
        raise Refusal("wrong_shape", f"{PACKET}: {shape}, expected ({want.limit},) or shorter")
    _check_array(PACKET, array, tuple(array.shape), "uint8")
    try:
        want.check(packet_of(record))
    except ValueError as error:
        raise Refusal("malformed", one_line(str(error))) from None


def _check_record(record: FlatRecord, want: Checked) -> None:
    """The strategy's own test of a record that is in order otherwise."""
    try:
        want.check(record)
    except ValueError as error:
        raise Refusal("malformed", one_line(str(error))) from None


_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([!-&(-~]{2,8})', 'fortran_order': (?:True|False), "
    rb"'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)


def _check_npy(name: str, data: bytes, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Compare the header inside the bytes, and their length, before anything is allocated."""
    found = _HEADER.match(data[:4096])
    if found is None or int.from_bytes(data[8:10], "little") != found.end() - 10:
        raise Refusal("malformed", f"{name}: not what numpy.save writes")
    descr, axes = (group.decode() for group in found.groups())
    if descr != dtype.str or [a.strip() for a in axes.split(",") if a.strip()] != [
        *map(str, shape)
    ]:
        raise Refusal("malformed", f"{name}: the bytes hold {descr} ({one_line(axes)})")
    if len(data) - found.end() != math.prod(shape) * dtype.itemsize:
        raise Refusal("malformed", f"{name}: {len(data)} bytes do not hold {dtype}{shape}")


def one_line(text: str, most: int = 300) -> str:
    """Foreign text made fit for a table: printable, on one line, not too long."""
    shown = "".join(c if c.isprintable() else " " for c in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def few(names: Iterable[str], most: int = 3) -> str:
    """Some foreign names, however many there are."""
    listed = sorted(names)
    shown = ", ".join(one_line(name, 40) for name in listed[:most])
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"[{shown}{rest}]"
