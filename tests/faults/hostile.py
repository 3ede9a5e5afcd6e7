"""Hostile replies: 28 kinds, each in many variants, and a grid whose clients send them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fedsim.core.averaging import EXAMPLES
from fedsim.core.nodes import client_at
from fedsim.core.packets import PACKET
from fedsim.core.records import plain
from fedsim.runtime.grid import LocalGrid
from tests.contract import toy

Content = dict[str, ArrayRecord | MetricRecord]
Spoil = Callable[[Content, np.random.Generator], None]


@dataclass(frozen=True)
class Kind:
    """A way to misbehave.

    Attributes:
        reason: the code it must be refused with.
        spoil: changes the content of an honest reply, in one of many ways.
    """

    reason: str
    spoil: Spoil


def npy(values: np.ndarray) -> bytes:
    """What `numpy.save` writes."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """Only the header of an npy file."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _entry(
    content: Content, draw: np.random.Generator, numbers: bool = False
) -> tuple[str, str, np.ndarray]:
    """Some array of the reply, one of numbers if asked for: record, name, a copy of its values."""
    records = sorted(n for n, r in content.items() if isinstance(r, ArrayRecord) and len(r))
    if numbers:  # others hold masks, packed
        real = [n for n in records if any("float" in a.dtype for a in content[n].values())]  # type: ignore[union-attr]
        records = real or records
    record = records[draw.integers(len(records))]
    floats = sorted(n for n, a in content[record].items() if "float" in a.dtype)  # type: ignore[union-attr]
    names = floats or sorted(content[record])  # packed bytes, where a strategy sends no model
    name = names[draw.integers(len(names))]
    return record, name, content[record][name].numpy().copy()  # type: ignore[union-attr, index]


def value(number: float) -> Spoil:
    """One entry of one array becomes this number, of either sign.

    Packed bytes end in a number, a float32: that one.
    """

    def spoil(content: Content, draw: np.random.Generator) -> None:
        record, name, values = _entry(content, draw, numbers=True)
        wrong = number * draw.choice([-1, 1])
        if name == PACKET:
            values[-4:] = np.frombuffer(np.array(wrong, "<f4").tobytes(), np.uint8)
        else:
            values.reshape(-1)[draw.integers(values.size)] = wrong
        content[record][name] = Array(values)  # type: ignore[index]

    return spoil


def array(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Spoil:
    """One array becomes another one."""

    def spoil(content: Content, draw: np.random.Generator) -> None:
        record, name, values = _entry(content, draw)
        made = change(values, draw)
        content[record][name] = Array(str(made.dtype), made.shape, "numpy.ndarray", npy(made))  # type: ignore[index]

    return spoil


def data(change: Callable[[np.ndarray, np.random.Generator], bytes]) -> Spoil:
    """One array keeps what it declares; its bytes are others."""

    def spoil(content: Content, draw: np.random.Generator) -> None:
        record, name, values = _entry(content, draw)
        content[record][name] = Array(  # type: ignore[index]
            str(values.dtype), values.shape, "numpy.ndarray", change(values, draw)
        )

    return spoil


def metric(**numbers: float) -> Spoil:
    """Some metrics become these numbers."""

    def spoil(content: Content, draw: np.random.Generator) -> None:
        for name, number in numbers.items():
            content["metrics"][name.replace("_", "-")] = number  # type: ignore[index]

    return spoil


def _wrong_shape(shape: tuple[int, ...]) -> Spoil:
    def change(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        wrong = shape if values.shape != shape else (*shape, 2)
        return draw.normal(size=wrong).astype(values.dtype)

    return array(change)


def _extra_tensor(content: Content, draw: np.random.Generator) -> None:
    record, _, values = _entry(content, draw)
    names = ["backdoor", "../../etc/passwd", "x" * 10_000, "\x1b[2J"]
    content[record][names[draw.integers(len(names))]] = Array(values)  # type: ignore[index]


def _renamed_tensor(content: Content, draw: np.random.Generator) -> None:
    record, name, _ = _entry(content, draw)
    content[record] = ArrayRecord(
        {n + "x" if n == name else n: a for n, a in content[record].items()}  # type: ignore[misc]
    )


def _renamed_record(content: Content, draw: np.random.Generator) -> None:
    record, _, _ = _entry(content, draw)
    content[["model", "", "Arrays"][draw.integers(3)]] = content.pop(record)


def _second_record(content: Content, draw: np.random.Generator) -> None:
    record, _, _ = _entry(content, draw)
    content["again"] = content[record] if draw.random() < 0.5 else MetricRecord({EXAMPLES: 1})


def _no_examples(content: Content, draw: np.random.Generator) -> None:
    del content["metrics"][EXAMPLES]  # type: ignore[attr-defined]


def _nan_metric(content: Content, draw: np.random.Generator) -> None:
    content["metrics"]["loss"] = [float("nan"), [1.0, float("inf")]][draw.integers(2)]  # type: ignore[index]


PICKLE = b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."

KINDS: Mapping[str, Kind] = {
    "NaN": Kind("not_finite", value(float("nan"))),
    "infinity": Kind("not_finite", value(float("inf"))),
    "1e38": Kind("too_large", value(1e38)),
    "shape (4, 4)": Kind("wrong_shape", _wrong_shape((4, 4))),
    "shape (1, 3)": Kind("wrong_shape", _wrong_shape((1, 3))),
    "a scalar": Kind("wrong_shape", _wrong_shape(())),
    "float64": Kind("wrong_dtype", array(lambda v, _: v.astype(np.float64))),
    "complex64": Kind("wrong_dtype", array(lambda v, _: v.astype(np.complex64))),
    "int64": Kind("wrong_dtype", array(lambda v, _: v.astype(np.int64))),
    "strings": Kind("wrong_dtype", array(lambda v, _: np.full(v.shape, "abc"))),
    "bool": Kind("wrong_dtype", array(lambda v, _: v > 0)),
    "weight -999": Kind("examples_invalid", metric(num_examples=-999)),
    "weights that sum to 0": Kind("examples_invalid", metric(num_examples=-150)),
    "weight 0": Kind("examples_invalid", metric(num_examples=0)),
    "weight 1e18": Kind("examples_invalid", metric(num_examples=1e18)),
    "weight NaN": Kind("examples_invalid", metric(num_examples=float("nan"))),
    "weight infinity": Kind("examples_invalid", metric(num_examples=float("inf"))),
    "weight missing": Kind("examples_missing", _no_examples),
    "an extra tensor": Kind("wrong_names", _extra_tensor),
    "a renamed tensor": Kind("wrong_names", _renamed_tensor),
    "a renamed record": Kind("wrong_records", _renamed_record),
    "two records": Kind("wrong_records", _second_record),
    "a NaN metric": Kind("metric_invalid", _nan_metric),
    "pickle bytes": Kind("malformed", data(lambda v, _: PICKLE)),
    "truncated npy": Kind("malformed", data(lambda v, d: npy(v)[: -int(d.integers(1, 5))])),
    "declared shape lies": Kind("malformed", data(lambda v, _: npy(np.append(v, v[:1])))),
    "header claims 400 GB": Kind("malformed", data(lambda v, _: header((10**11,)) + b"\0" * 64)),
    "header claims 2 GB": Kind("malformed", data(lambda v, _: header((5 * 10**8,)) + b"\0" * 4)),
}


def spoilt(reply: Message, kind: Kind, draw: np.random.Generator) -> RecordDict:
    """A hostile version of an honest reply's content."""
    content: Content = {
        n: plain(r) if isinstance(r, ArrayRecord) else type(r)(dict(r))
        for n, r in reply.content.items()
    }
    kind.spoil(content, draw)
    return RecordDict(content)


@dataclass(frozen=True)
class Attack:
    """Who sends what in one round.

    Attributes:
        kinds: kind by client.
        order: where the hostile replies arrive: ``"first"``, ``"middle"`` or ``"last"``.
    """

    kinds: Mapping[int, Kind]
    order: str = "last"


class HostileGrid(toy.Wrapped):
    """Some clients train and answer with something else.

    Args:
        inner: the grid in front of which it stands.
        attacks: attack by round.
        seed: of the variants.
        drop: the hostile replies do not arrive at all: the run that the others must equal.
    """

    def __init__(
        self, inner: LocalGrid, attacks: Mapping[int, Attack], seed: int, drop: bool = False
    ) -> None:
        super().__init__(inner)
        self._attacks, self._drop = attacks, drop
        self._draw = np.random.default_rng(seed)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Honest replies, and the hostile ones among them."""
        sent = list(messages)
        if not sent or not sent[0].metadata.message_type.startswith("train"):
            return super().send_and_receive(sent)
        attack = self._attacks[int(sent[0].content["config"]["server-round"])]  # type: ignore[index, call-overload]
        honest, hostile = [], []
        for message, reply in zip(sent, list(super().send_and_receive(sent)), strict=True):
            kind = attack.kinds.get(client_at(message.metadata.dst_node_id))
            if kind is None:
                honest.append(reply)
            else:
                reply.content = spoilt(reply, kind, self._draw)
                hostile.append(reply)
        if self._drop:
            return honest
        place = {"first": 0, "middle": len(honest) // 2, "last": len(honest)}[attack.order]
        return honest[:place] + hostile + honest[place:]
