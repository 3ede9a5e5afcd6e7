"""Numbers as a reader wants them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.results import words
from fedsim.results.statistics import Interval


def interval(mean: float, half: float | None) -> Interval:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Interval(mean, low, high, 1 if half is None else 5)


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.9134, 0.0073, "0.913 ± 0.007"),
        (0.9134, 0.00012, "0.9134 ± 0.0001"),
        (0.9134, None, "0.913"),
        (123.456, 2.34, "123.5 ± 2.3"),
        (12.3456, 0.0, "12.35 ± 0.00"),
        (math.nan, None, "diverged"),
    ],
)
def test_a_column_shows_its_narrowest_interval(mean: float, half: float | None, text: str) -> None:
    given = interval(mean, half)
    assert words.plus_minus(given, words.decimals([given])) == text


def test_no_interval() -> None:
    assert words.plus_minus(None, 3) == "–"
    assert words.decimals([None]) == 3
    assert words.span(interval(1.0, None), 3) == "–"
    assert words.span(interval(0.0, 0.5), 1) == "−0.5 to 0.5"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "+0.012"), (-0.0123, "−0.012"), (-0.0001, "0.000"), (0, "0.000")]
)
def test_signed(value: float, text: str) -> None:
    assert words.signed(value, 3) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (20.0, "20"), (12.5, "12.5"), (0.87654, "0.8765"), (123456.7, "123,457"),
     (1000, "1000"), (-3.0, "−3"), (math.inf, "–")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (53_100_000, "53.1 MB"),
     (1.2345e16, "12.3 PB"), (None, "–")],
)  # fmt: skip
def test_size(count: float | None, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.0123, "12.3 ms"), (0.9999, "1 s"), (119, "119 s"), (120, "2 min"),
     (7200, "2 h"), (864_000, "10 d"), (None, "–")],
)  # fmt: skip
def test_duration(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


@given(st.floats(0, 1e15))
def test_sizes_and_durations_are_short(value: float) -> None:
    assert len(words.size(value)) <= 12
    assert "e" not in words.size(value)
    assert "e" not in words.duration(value)


@pytest.mark.parametrize(
    ("p", "text"), [(0.03125, "0.031"), (0.0001, "< 0.001"), (1.0, "1"), (0.5, "0.5"), (None, "–")]
)
def test_p_value(p: float | None, text: str) -> None:
    assert words.p_value(p) == text


def test_lists_and_plurals() -> None:
    assert words.listed([]) == ""
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert (words.plural(1, "seed"), words.plural(1200, "seed")) == ("1 seed", "1,200 seeds")
    assert words.name("cluster_ari") == "adjusted Rand index of the clusters"
    assert words.name("kept_directions") == "kept directions"
    assert words.slug("Cluster_ARI (mean)") == "cluster-ari-mean"
