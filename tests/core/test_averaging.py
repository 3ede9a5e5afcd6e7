"""Means of replies: weighted, canonical, in the dtypes of what is averaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.averaging import (
    Mean,
    MetricMean,
    examples_of,
    mean_of,
    metrics_of,
    server_step,
)
from fedsim.core.records import from_record, materialise, to_record
from fedsim.runtime import flower

values = st.floats(-1e3, 1e3, width=32)
replies = st.lists(
    st.tuples(st.lists(values, min_size=3, max_size=3), st.integers(1, 1000)), min_size=1
)


def mean(items: list[tuple[list[float], int]]) -> Mean:
    made = Mean()
    for numbers, weight in items:
        made.add(to_record({"w": torch.tensor(numbers)}), weight)
    return made


@given(replies)
def test_the_mean_is_the_weighted_mean(items: list[tuple[list[float], int]]) -> None:
    found = mean(items).record()
    assert found is not None
    numbers, weights = zip(*items, strict=True)
    expected = np.average(np.array(numbers, np.float64), axis=0, weights=weights)
    assert found.flat.dtype == torch.float32
    np.testing.assert_allclose(found.flat, expected, rtol=1e-6, atol=1e-5)


@given(replies, st.sampled_from([2.0, 4.0, 0.5]))
def test_weights_have_no_scale(items: list[tuple[list[float], int]], scale: float) -> None:
    scaled = [(n, w * scale) for n, w in items]
    one, other = mean(items).record(), mean(scaled).record()  # type: ignore[arg-type]
    assert one is not None
    assert other is not None
    assert torch.equal(one.flat, other.flat)


@given(st.lists(values, min_size=1, max_size=4), st.lists(st.integers(1, 10**6), min_size=1))
def test_equal_replies_have_themselves_as_mean(numbers: list[float], weights: list[int]) -> None:
    found = mean([(numbers, w) for w in weights]).record()
    assert found is not None
    assert found.flat.tolist() == torch.tensor(numbers).tolist()


def test_cancelling_models_do_not_lose_the_small_one() -> None:
    """Sums are float64: in float32 the one is lost."""
    found = mean([([1e8] * 3, 1), ([1.0] * 3, 1), ([-1e8] * 3, 1)]).record()
    assert found is not None
    assert found.flat.tolist() == pytest.approx([1 / 3] * 3)


def test_buffers_are_averaged_and_counters_take_the_maximum() -> None:
    states = [
        {
            "w": torch.tensor([float(i)]),
            "half": torch.tensor([2.0 * i]).half(),
            "count": torch.tensor(5 - i),
            "on": torch.tensor(i == 1),
        }
        for i in range(3)
    ]
    made = Mean()
    for state, weight in zip(states, (1, 1, 2), strict=True):
        made.add(to_record(state), weight)
    record = made.record()
    assert record is not None
    found = from_record(record)
    assert found["w"].tolist() == [1.25]
    assert found["half"].dtype == torch.float16
    assert found["half"].tolist() == [2.5]
    assert found["count"].item() == 5
    assert found["on"].item() is True


def test_nothing_has_no_mean() -> None:
    assert Mean().record() is None
    assert MetricMean().record() == {}


def test_a_plain_record_has_the_same_mean() -> None:
    record = to_record({"b": torch.tensor([1.0]), "a": torch.tensor(2.0)})
    made = Mean()
    for content in (RecordDict({"arrays": record}), materialise(RecordDict({"arrays": record}))):
        made.add(content["arrays"], 1.0)
    found = made.record()
    assert found is not None
    assert list(found) == ["b", "a"]
    assert found.flat.tolist() == record.flat.tolist()


def test_metrics_that_all_report_are_averaged() -> None:
    made = MetricMean()
    made.add(MetricRecord({"loss": 1.0, "extra": 5, "list": [1, 2], "num-examples": 9}), 1)
    made.add(MetricRecord({"loss": 4, "num-examples": 9}), 2)
    assert made.record() == {"loss": pytest.approx(3.0)}


def content(number: float, examples: int) -> RecordDict:
    metrics = MetricRecord({"num-examples": examples, "loss": number})
    return RecordDict({"arrays": to_record({"w": torch.tensor([number])}), "metrics": metrics})


@pytest.mark.parametrize(("weighted", "expected"), [(True, 2.5), (False, 2.0)])
def test_the_mean_of_replies_leaves_errors_out(weighted: bool, expected: float) -> None:
    flower.become_server()
    asked = [Message(RecordDict(), dst_node_id=n, message_type="train") for n in (1, 2, 3)]
    answers = [
        Message(content(1.0, 1), reply_to=asked[0]),
        Message(Error(flower.CLIENT_RAISED, "failed"), reply_to=asked[1]),
        Message(content(3.0, 3), reply_to=asked[2]),
    ]
    found, metrics = mean_of(iter(answers), weighted=weighted)
    assert found is not None
    assert found.flat.tolist() == [expected]
    assert metrics == {"loss": expected}
    assert examples_of(answers[2].content) == 3.0
    assert metrics_of(answers[0].content)["loss"] == 1.0
    assert mean_of([])[0] is None


def test_the_server_step_moves_parameters_and_takes_buffers() -> None:
    old, new = (
        to_record({"w": torch.tensor([x]), "mean": torch.tensor([x])}, frozenset({"w"}))
        for x in (1.0, 3.0)
    )
    assert server_step(old, new, 1.0) is new
    assert server_step(old, new, 0.5).flat.tolist() == [2.0, 3.0]
    assert server_step(materialise(RecordDict({"m": old}))["m"], new, 2.0).flat.tolist() == [5, 3]
