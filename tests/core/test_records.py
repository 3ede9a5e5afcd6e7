"""Model states as records: exact, without copies, and countable without serialising."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.records import (
    FlatRecord,
    Layout,
    TensorArray,
    as_flat,
    count_bytes,
    from_record,
    materialise,
    to_record,
    to_tensor,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text("abz._0", min_size=1, max_size=8)


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    entries = draw(st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1))
    return {
        name: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
        for name, (shape, dtype) in entries.items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        for x, y in zip(a.values(), b.values(), strict=True)
    )


@given(states())
def test_a_state_comes_back_from_its_record(state: dict[str, Tensor]) -> None:
    record = to_record(state)
    assert same(from_record(record), state)
    assert list(record) == list(state)  # the order on the wire


@given(states())
def test_a_state_comes_back_over_the_wire(state: dict[str, Tensor]) -> None:
    wire = materialise(RecordDict({"arrays": to_record(state)}))["arrays"]
    assert all(type(array) is Array for array in wire.values())
    assert same(from_record(wire), state)
    assert same(from_record(as_flat(wire, Layout.of(state))), state)


@given(states())
def test_bytes_are_known_without_serialising(state: dict[str, Tensor]) -> None:
    content = RecordDict(
        {
            "arrays": to_record(state),
            "config": ConfigRecord({"name": "ä", "on": True, "ids": [1, 2], "none": []}),
            "metrics": MetricRecord({"loss": 0.5}),
        }
    )
    arrays = sum(len(n) + len(a.data) for n, a in materialise(content)["arrays"].items())
    # "name" + 2 bytes of UTF-8, "on" + 1, "ids" + 2 * 8, "none"; "loss" + 8
    assert count_bytes(content) == arrays + (4 + 2) + (2 + 1) + (3 + 16) + 4 + (4 + 8)
    assert count_bytes(materialise(content)) == count_bytes(content)


def test_entries_are_views_and_built_only_when_asked_for() -> None:
    record = to_record({"a": torch.zeros(2, 3), "b": torch.ones(4)})
    record.flat += 1
    assert record["a"].numpy().tolist() == [[1.0] * 3] * 2
    assert from_record(record)["b"].data_ptr() == record.flat[6:].data_ptr()


def test_flower_reads_it() -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    record = to_record(state)
    assert same(dict(record.to_torch_state_dict()), dict(state))
    assert [a.shape for a in record.to_numpy_ndarrays()] == [tuple(t.shape) for t in state.values()]


def test_it_is_read_only() -> None:
    record = to_record({"a": torch.zeros(1)})
    with pytest.raises(TypeError, match="read-only"):
        record["a"] = Array(np.zeros(1))
    with pytest.raises(TypeError, match="read-only"):
        del record["a"]


def test_a_copy_is_a_plain_record() -> None:
    record = to_record({"a": torch.arange(3.0)})
    for other in (record.copy(), copy.copy(record), copy.deepcopy(record)):
        assert type(other) is ArrayRecord
        assert other["a"].numpy().tolist() == [0.0, 1.0, 2.0]


def test_trainable_entries_come_first_in_the_vector_and_keep_their_place_on_the_wire() -> None:
    state = {"mean": torch.full((2,), 7.0), "n": torch.tensor(3), "w": torch.arange(3.0)}
    record = to_record(state, frozenset({"w"}))
    assert record.flat.tolist() == [0.0, 1.0, 2.0, 7.0, 7.0]
    assert record.layout.trainable == ("w",)
    assert record.layout.num_trainable == 3
    assert record.layout.beside == ("n",)
    assert list(record) == ["mean", "n", "w"]


def test_a_layout_can_be_restricted() -> None:
    layout = Layout.of({"a": torch.zeros(2), "n": torch.tensor(1), "b": torch.zeros(3)})
    part = layout.restrict(frozenset({"n", "b"}))
    assert (part.names, part.order, part.size) == (("n", "b"), ("b",), 3)
    assert part.span("b") == slice(0, 3)


def test_views_keep_leading_axes() -> None:
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(2, 2)})
    stacked = torch.arange(18.0).view(3, 6)
    assert layout.view(stacked, "b").shape == (3, 2, 2)
    assert layout.view(stacked, "b")[1].flatten().tolist() == stacked[1, 2:].tolist()


def test_bfloat16_travels_as_its_bits() -> None:
    tensor = torch.tensor([1.0, 3.140625]).bfloat16()
    sent = Array(*(getattr(TensorArray(tensor), n) for n in ("dtype", "shape", "stype", "data")))
    assert sent.dtype == "bfloat16"
    assert torch.equal(to_tensor(sent), tensor)
    assert TensorArray(tensor).numpy().dtype == np.float32


def test_as_flat_refuses_nothing_it_already_is() -> None:
    record = to_record({"a": torch.zeros(1)})
    assert as_flat(record) is record
    assert as_flat(record, record.layout) is record
    assert isinstance(as_flat(record.copy()), FlatRecord)
