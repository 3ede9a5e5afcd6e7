"""The gate: one reply is admitted or refused by itself, before anything is decoded."""

from __future__ import annotations

import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.averaging import EXAMPLES
from fedsim.core.records import NPY, FlatRecord, from_record, materialise, to_record
from fedsim.gate import Gate, Refusal, few, one_line
from fedsim.runtime import flower

STATE = {
    "w": torch.arange(6.0).reshape(2, 3),
    "scalar": torch.tensor(1.5),
    "none": torch.empty(0, 4),
    "half": torch.tensor([1.0, 2.0]).half(),
    "brain": torch.tensor([1.0, 2.0]).bfloat16(),
    "count": torch.tensor(7),
    "on": torch.tensor([True, False]),
}
EXPECTED = {"arrays": to_record(STATE)}


def content(arrays: ArrayRecord | None = None, **metrics: Any) -> RecordDict:
    """An honest reply as it comes over the wire, but for what is given."""
    return RecordDict(
        {
            "arrays": materialise(RecordDict(EXPECTED))["arrays"] if arrays is None else arrays,  # type: ignore[arg-type]
            "metrics": MetricRecord({EXAMPLES: 5, "loss": 0.5, **metrics}),
        }
    )


def changed(**arrays: Array) -> RecordDict:
    """A reply with some entries replaced."""
    honest = dict(content().array_records["arrays"])
    return content(ArrayRecord({**honest, **arrays}))


def refused(found: RecordDict, **options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        Gate().check(found, EXPECTED, **options)
    return caught.value


def npy(
    descr: str = "<f4", shape: str = "(2, 3)", body: bytes = bytes(24), version: int = 1
) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2, "little") + header + body


def test_an_honest_reply_is_admitted_and_flat() -> None:
    found = Gate().check(content(), EXPECTED)
    record = found["arrays"]
    assert isinstance(record, FlatRecord)
    state = from_record(record)
    assert list(state) == list(STATE)
    assert all(torch.equal(state[n], t) and state[n].dtype == t.dtype for n, t in STATE.items())
    assert found["metrics"] == MetricRecord({EXAMPLES: 5, "loss": 0.5})


def test_a_reply_from_this_process_is_not_copied() -> None:
    mine = EXPECTED["arrays"].with_flat(EXPECTED["arrays"].flat + 1)
    found = Gate().check(content(mine), EXPECTED)
    assert found["arrays"] is mine


def test_numpy_save_is_understood_in_every_order() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)))
    found = Gate().check(changed(w=Array("float32", (2, 3), NPY, buffer.getvalue())), EXPECTED)
    assert from_record(found["arrays"])["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


@given(
    st.sampled_from(["w", "scalar", "half", "brain"]),
    st.integers(0, 5),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.booleans(),
)
def test_one_number_that_is_none_is_found(name: str, at: int, bad: float, wire: bool) -> None:
    state = {n: t.clone() for n, t in STATE.items()}
    flat = state[name].view(-1)
    flat[at % len(flat)] = bad
    reply = content(to_record(state))
    assert refused(materialise(reply) if wire else reply).code == "not_finite"


@pytest.mark.parametrize("value", [1.1e15, -1.1e15, 3e38])
def test_numbers_beyond_any_models_are_refused(value: float) -> None:
    big = torch.full((2, 3), value)
    assert refused(changed(w=Array(big.numpy()))).code == "too_large"
    Gate().check(changed(w=Array((big / big.abs() * 1e15).numpy())), EXPECTED)


LIES: dict[str, tuple[bytes, str, str]] = {
    "other dtype": (npy("<f8"), NPY, "malformed"),
    "big endian": (npy(">f4"), NPY, "malformed"),
    "objects": (npy("|O"), NPY, "malformed"),
    "other shape": (npy(shape="(3, 2)"), NPY, "malformed"),
    "broadcast shape": (npy(shape="(3,)", body=bytes(12)), NPY, "malformed"),
    "400 GB": (npy(shape="(100000, 1000000)"), NPY, "malformed"),
    "negative": (npy(shape="(-2, 3)"), NPY, "malformed"),
    "too short": (npy(body=bytes(23)), NPY, "malformed"),
    "too long": (npy(body=bytes(25)), NPY, "malformed"),
    "version 2": (npy(version=2), NPY, "malformed"),
    "bytes that are no text": (npy().replace(b"<f4", b"<\xff4"), NPY, "malformed"),
    "empty": (b"", NPY, "malformed"),
    "magic only": (b"\x93NUMPY", NPY, "malformed"),
    "code in the header": (npy(shape="(__import__('os'), 3)"), NPY, "malformed"),
    "pickle": (b"\x80\x04\x95", "cloudpickle", "malformed"),
    "unknown serialisation": (npy(), "torch", "malformed"),
}


@pytest.mark.parametrize("kind", LIES)
def test_bytes_that_do_not_hold_what_is_declared(kind: str) -> None:
    data, stype, code = LIES[kind]
    tracemalloc.start()
    assert refused(changed(w=Array("float32", (2, 3), stype, data))).code == code
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_the_helper_of_these_tests_writes_what_numpy_reads() -> None:
    assert np.load(io.BytesIO(npy())).shape == (2, 3)
    Gate().check(changed(w=Array("float32", (2, 3), NPY, npy())), EXPECTED)


@given(st.data())
def test_a_flipped_byte_is_refused_or_harmless(data: st.DataObject) -> None:
    """Nothing but a refusal is ever raised, and what is admitted has the declared form."""
    honest = Array(STATE["w"].numpy())
    raw = bytearray(honest.data)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = Gate().check(changed(w=Array("float32", (2, 3), NPY, bytes(raw))), EXPECTED)
    except Refusal:
        return
    w = from_record(found["arrays"])["w"]
    assert w.shape == (2, 3)
    assert bool(torch.isfinite(w).all())


def test_declared_shape_and_dtype_are_compared_first() -> None:
    huge = Array("float32", (10**6, 10**6), NPY, npy())
    assert refused(changed(w=huge)).code == "wrong_shape"
    assert refused(changed(w=Array("float64", (2, 3), NPY, npy()))).code == "wrong_dtype"
    assert refused(changed(count=Array(np.array(7, np.float32)))).code == "wrong_dtype"


def test_names_and_records() -> None:
    arrays = dict(content().array_records["arrays"])
    arrays.pop("w")
    assert "missing [w]" in str(refused(content(ArrayRecord(arrays))))
    two = RecordDict({**content(), "more": MetricRecord({EXAMPLES: 5})})
    none = RecordDict({k: v for k, v in content().items() if k != "metrics"})
    renamed = RecordDict({("evil" if k == "arrays" else k): v for k, v in content().items()})
    extra = RecordDict({**content(), "control": EXPECTED["arrays"]})
    for found in (two, none, renamed, extra, RecordDict()):
        assert refused(found).code == "wrong_records"


@pytest.mark.parametrize("count", [0, -1, 1.5, float("nan"), float("inf"), 10**7 + 1, [5], 10**30])
def test_a_count_must_be_a_whole_number_in_range(count: Any) -> None:
    try:
        found = content(**{EXAMPLES: count})
    except (TypeError, ValueError, OverflowError):
        pytest.skip("Flower refuses to make it")
    assert refused(found).code == "examples_invalid"


def test_a_client_cannot_report_more_examples_than_it_has() -> None:
    assert refused(content(), most=4).code == "examples_invalid"
    Gate().check(content(), EXPECTED, most=5)
    Gate().check(content(**{EXAMPLES: 5.0}), EXPECTED, most=5)
    assert refused(content(), most=0).code == "examples_invalid"


def test_metrics_must_be_numbers() -> None:
    without = RecordDict({**content(), "metrics": MetricRecord({"loss": 0.5})})
    assert refused(without).code == "examples_missing"
    assert refused(content(loss=float("nan"))).code == "metric_invalid"
    assert refused(content(losses=[0.1, float("inf")])).code == "metric_invalid"
    Gate().check(content(losses=[0.1, 0.2]), EXPECTED)


def test_what_is_beside_the_arrays_must_be_small() -> None:
    found = RecordDict({**content(), "notes": ConfigRecord({"x": bytes(2**20)})})
    assert refused(found).code == "too_large"


def test_an_error_reply_says_why_on_one_line() -> None:
    flower.become_server()
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    reply = Message(
        Error(flower.CLIENT_RAISED, "no\nmemory\x1b[31m" + "!" * 1000), reply_to=message
    )
    with pytest.raises(Refusal) as caught:
        Gate().admit(reply, EXPECTED)
    assert str(caught.value).startswith("error_reply: no memory [31m!!!")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.text(), st.lists(st.text()))
def test_foreign_text_is_made_fit_for_a_table(text: str, names: list[str]) -> None:
    for shown in (one_line(text), few(names)):
        assert shown.isprintable()
        assert len(shown) <= 300
