"""Hostile replies are refused one by one, with a reason, and leave no trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedsim.core.averaging import EXAMPLES, metrics_of
from fedsim.core.records import from_record, to_record
from fedsim.data import FederatedData
from fedsim.runtime import flower
from tests.contract import toy
from tests.contract.rows import ROWS, Row, every, honest

HOSTILE = (1, 4, 7)
"""Nodes: the first, one in the middle and the last to answer."""
Kind = Callable[[Message, Message], list[Message]]


def content(change: Callable[[dict[str, object]], object]) -> Kind:
    """A reply whose records were changed in place."""

    def answer(message: Message, reply: Message) -> list[Message]:
        records: dict[str, object] = dict(reply.content)
        change(records)
        return [Message(RecordDict(records), reply_to=message)]  # type: ignore[arg-type]

    return answer


def arrays(change: Callable[[dict[str, Array]], object]) -> Kind:
    """A reply whose model was changed entry by entry."""

    def apply(records: dict[str, object]) -> None:
        entries = dict(records["arrays"].items())  # type: ignore[attr-defined]
        change(entries)
        records["arrays"] = ArrayRecord(entries)

    return content(apply)


def first(change: Callable[[np.ndarray], np.ndarray]) -> Kind:
    """A reply whose model's first entry was changed."""

    def apply(entries: dict[str, Array]) -> None:
        name = next(iter(entries))
        entries[name] = Array(change(entries[name].numpy().copy()))

    return arrays(apply)


def one(value: float) -> Kind:
    """A reply with one bad number in its model."""

    def put(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[-1] = value
        return array

    return first(put)


def metrics(change: Callable[[dict[str, object]], object]) -> Kind:
    """A reply whose metrics were changed."""

    def apply(records: dict[str, object]) -> None:
        found = dict(records["metrics"].items())  # type: ignore[attr-defined]
        change(found)
        records["metrics"] = MetricRecord(found)  # type: ignore[arg-type]

    return content(apply)


def examples(value: object) -> Kind:
    return metrics(lambda found: found.__setitem__(EXAMPLES, value))


def lying(data: Callable[[Array], bytes], stype: str = "numpy.ndarray") -> Kind:
    """A reply whose first entry declares what its bytes do not hold."""

    def apply(entries: dict[str, Array]) -> None:
        name, array = next(iter(entries.items()))
        entries[name] = Array(array.dtype, tuple(array.shape), stype, data(array))

    return arrays(apply)


def renamed(entries: dict[str, Array]) -> None:
    entries["evil"] = entries.pop(next(iter(entries)))


def halved(entries: dict[str, Array]) -> None:
    name = next(iter(entries))
    entries[name] = Array(torch.from_numpy(entries[name].numpy()).half().numpy())


def error(message: Message, reply: Message) -> list[Message]:
    return [Message(Error(flower.CLIENT_RAISED, "killed"), reply_to=message)]


KINDS: dict[str, tuple[Kind, str]] = {
    "nan": (one(float("nan")), "not_finite"),
    "infinity": (one(float("-inf")), "not_finite"),
    "huge value": (one(1e38), "too_large"),
    "transposed": (first(lambda a: a.T.copy() if a.ndim > 1 else a[None]), "wrong_shape"),
    "broadcastable": (first(lambda a: a[:1].copy()), "wrong_shape"),
    "scalar": (first(lambda a: a.reshape(-1)[:1].reshape(())), "wrong_shape"),
    "float64": (first(lambda a: a.astype(np.float64)), "wrong_dtype"),
    "float16": (arrays(halved), "wrong_dtype"),
    "int64": (first(lambda a: a.astype(np.int64)), "wrong_dtype"),
    "complex64": (first(lambda a: a.astype(np.complex64)), "wrong_dtype"),
    "bool": (first(lambda a: a.astype(bool)), "wrong_dtype"),
    "strings": (first(lambda a: a.astype("U8")), "wrong_dtype"),
    "entry missing": (arrays(lambda e: e.pop(next(iter(e)))), "wrong_names"),
    "entry renamed": (arrays(renamed), "wrong_names"),
    "entry added": (arrays(lambda e: e.update(evil=Array(np.zeros(1)))), "wrong_names"),
    "no entry": (content(lambda r: r.update(arrays=ArrayRecord())), "wrong_names"),
    "record renamed": (content(lambda r: r.update(evil=r.pop("arrays"))), "wrong_records"),
    "record added": (content(lambda r: r.update(evil=r["arrays"])), "wrong_records"),
    "record missing": (content(lambda r: r.pop("arrays")), "wrong_records"),
    "no metrics": (content(lambda r: r.pop("metrics")), "wrong_records"),
    "no count": (metrics(lambda m: m.pop(EXAMPLES)), "examples_missing"),
    "count zero": (examples(0), "examples_invalid"),
    "count negative": (examples(-999), "examples_invalid"),
    "count huge": (examples(10**18), "examples_invalid"),
    "count not a number": (examples(float("nan")), "examples_invalid"),
    "count infinite": (examples(float("inf")), "examples_invalid"),
    "count a list": (examples([1, 2]), "examples_invalid"),
    "metric not a number": (metrics(lambda m: m.update(loss=float("nan"))), "metric_invalid"),
    "pickle": (lying(lambda a: b"\x80\x04N.", "pickle"), "malformed"),
    "truncated": (lying(lambda a: a.data[:-1]), "malformed"),
    "other header": (lying(lambda a: Array(np.zeros((9, 9), np.float32)).data), "malformed"),
    "no bytes": (lying(lambda a: b""), "malformed"),
    "error reply": (error, "error_reply"),
    "no reply": (lambda message, reply: [], "late"),
}


FLOATS = ("nan", "infinity", "huge value")
"""What bytes cannot hold: strategies that pack numbers into bytes test these for themselves."""
PACKED = {"transposed": "wrong_shape", "broadcastable": "malformed"}
"""What else becomes of packed bytes: their own check tells why."""


def kinds_of(row: Row) -> dict[str, str]:
    """The kinds of hostile reply for a row, and the reason for which each is refused."""
    reasons = {kind: reason for kind, (_, reason) in KINDS.items()}
    if not row.packed:
        return reasons
    return {kind: reason for kind, reason in (reasons | PACKED).items() if kind not in FLOATS}


CROWD = toy.federated([8] * 45)
KIND_OF = dict(zip((n for n in range(1, 46) if n % 5), KINDS, strict=False))
"""One hostile node of every kind, between honest ones."""
DATA = toy.federated((*toy.SIZES, 8, 10, 6))
FIRST = {row.strategy: row for row in reversed(ROWS)}


@cache
def without(row: Row, data: FederatedData, hostile: Iterable[int]) -> str:
    """Digest of the run in which the hostile clients are not asked at all."""
    fed = row.federation(data=data)
    fed.trainers = [n for n in fed.trainers if n not in hostile]
    return toy.sha256(toy.run(fed, 2).arrays)


@every(list(FIRST.values()))
def test_every_kind_of_hostile_reply_is_refused_alone(row: Row) -> None:
    kinds = kinds_of(row)
    kind_of = {node: kind for node, kind in KIND_OF.items() if kind in kinds}

    def answer(message: Message, reply: Message) -> list[Message]:
        return KINDS[kind_of[message.metadata.dst_node_id]][0](message, reply)

    fed = row.federation(
        data=CROWD,
        wrap=lambda grid: toy.Unreliable(grid, kind_of, answer),
        cohort={"quorum": 0.2},
    )
    progress = toy.run(fed, 2)
    for number in (1, 2):
        found = {
            kind_of[r["client"] + 1]: r.get("reason", "").partition(":")[0]
            for r in progress.clients
            if r["round"] == number and r.get("status") != "ok" and "status" in r
        }
        assert found == kinds
    assert [r["refused"] for r in progress.rounds[1:]] == [len(kinds)] * 2
    assert not any(r["abandoned"] for r in progress.rounds)
    assert toy.sha256(progress.arrays) == without(row, CROWD, tuple(kind_of))


@every([row for row in ROWS if row.model == "bn" and row.client != "fedbn"])  # its stay at home
def test_buffers_are_checked_too(row: Row) -> None:
    def poisoned(message: Message, reply: Message) -> list[Message]:
        state = {n: t.clone() for n, t in from_record(reply.content["arrays"]).items()}
        state["1.running_var"][0] = float("nan")
        return [
            Message(RecordDict({**reply.content, "arrays": to_record(state)}), reply_to=message)
        ]

    fed = row.federation(data=DATA, wrap=lambda grid: toy.Unreliable(grid, HOSTILE, poisoned))
    progress = toy.run(fed, 2)
    assert progress.rounds[-1]["refused"] == len(HOSTILE)
    assert toy.sha256(progress.arrays) == without(row, DATA, HOSTILE)


@every(list(FIRST.values()))
def test_a_second_reply_does_not_count(row: Row) -> None:
    """A replay of the client's own reply, once forged: the first counts, the run is the honest."""

    def twice(message: Message, reply: Message) -> list[Message]:
        forged = {n: t * 2 for n, t in from_record(reply.content["arrays"]).items()}
        second = RecordDict({**reply.content, "arrays": to_record(forged)})
        return [reply, Message(second, reply_to=message), reply]

    fed = row.federation(wrap=lambda grid: toy.Unreliable(grid, HOSTILE, twice))
    progress = toy.run(fed, 2)
    assert [r["admitted"] for r in progress.rounds[1:]] == [7, 7]
    assert [r["refused"] for r in progress.rounds[1:]] == [6, 6]
    reasons = [r["reason"] for r in progress.clients if "reason" in r]
    assert len(reasons) == 6
    assert all(r.startswith("duplicate:") for r in reasons)
    assert toy.sha256(progress.arrays) == honest(row)


@every(list(FIRST.values()))
def test_a_stale_reply_does_not_count(row: Row) -> None:
    """In the second round the hostile clients answer the first once more."""
    kept: dict[int, Message] = {}

    def stale(message: Message, reply: Message) -> list[Message]:
        node = message.metadata.dst_node_id
        if message.content.config_records["config"]["server-round"] == 1:
            kept[node] = reply
            return [reply]
        return [kept[node]]

    fed = row.federation(data=DATA, wrap=lambda grid: toy.Unreliable(grid, HOSTILE, stale))
    progress = toy.run(fed, 2)
    rows = [r for r in progress.clients if r["round"] == 2 and r["client"] + 1 in HOSTILE]
    assert [r["status"] for r in rows] == ["late"] * len(HOSTILE)
    assert all(r["reason"].startswith("stale_round:") for r in rows)
    assert progress.rounds[2]["admitted"] == len(DATA.train) - len(HOSTILE)

    honest = row.federation(data=DATA)
    expected = honest.begin()
    honest.advance(expected)
    honest.trainers = [n for n in honest.trainers if n not in HOSTILE]
    honest.advance(expected)
    assert toy.sha256(progress.arrays) == toy.sha256(expected.arrays)


def test_lies_about_what_a_client_has_are_refused() -> None:
    """Ten times the examples it was dealt."""

    def exaggerated(message: Message, reply: Message) -> list[Message]:
        count = int(metrics_of(reply.content)[EXAMPLES])  # type: ignore[arg-type]
        return examples(10 * count)(message, reply)

    row = ROWS[0]
    fed = row.federation(data=DATA, wrap=lambda grid: toy.Unreliable(grid, HOSTILE, exaggerated))
    assert toy.sha256(toy.run(fed, 2).arrays) == without(row, DATA, HOSTILE)
