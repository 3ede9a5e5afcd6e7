"""Golden numbers beside the lines that derive them, scipy as oracle, and properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsim.results import statistics as s

numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))
samples = st.lists(numbers, min_size=1, max_size=12)
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_golden_interval() -> None:
    # mean of 0.8, 0.9, 1.0 is 0.9, its standard error 0.1 / sqrt(3), t(0.975; 2) = 4.302653
    interval = s.mean_interval([0.8, 0.9, 1.0])
    assert interval is not None
    assert interval.mean == pytest.approx(0.9)
    assert interval.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)


@given(st.lists(numbers, min_size=2, max_size=20))
def test_interval_is_scipys_and_symmetric(x: list[float]) -> None:
    interval = s.mean_interval(x)
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    assert interval.high - interval.mean == pytest.approx(interval.mean - interval.low, abs=1e-9)
    scale = np.std(x, ddof=1) / math.sqrt(len(x))
    if scale > 0:
        low, high = stats.t.interval(0.95, len(x) - 1, np.mean(x), scale)
        assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_no_interval_where_there_is_none() -> None:
    assert s.mean_interval([]) is None
    single = s.mean_interval([0.5])
    assert single == s.Interval(0.5, None, None, 1)
    assert single.half is None
    diverged = s.mean_interval([0.5, math.inf, 0.7])
    assert diverged is not None
    assert math.isnan(diverged.mean)
    assert diverged.half is None


def test_golden_sign_flip() -> None:
    # |±1 ±2 ±3| >= 6 only for +++ and ---; with d = 1, 2, -3 every sum is as far from 0 as 0 is
    assert s.sign_flip([1, 2, 3]) == 2 / 8
    assert s.sign_flip([1, 2, -3]) == 1
    # 1 + 2 + 3 - 1 = 5; sums of magnitude >= 5 of (1, 2, 3, 1): 7 once, 5 twice, and mirrored
    assert s.sign_flip([1, 2, 3, -1]) == 2 * 3 / 16
    assert s.sign_flip([0.0, 0.0]) == 1
    assert s.sign_flip([]) == 1


@settings(deadline=None, max_examples=60)
@given(samples)
def test_sign_flip_is_the_enumeration(d: list[float]) -> None:
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((-1, 1), repeat=len(d))]
    expected = np.mean(np.array(sums) >= abs(sum(d)) - 1e-9)
    assert s.sign_flip(d) == pytest.approx(expected)
    assert s.sign_flip(d) >= s.smallest_p(len(d))
    assert s.sign_flip([-x for x in d]) == pytest.approx(s.sign_flip(d))
    assert s.sign_flip(d[::-1]) == pytest.approx(s.sign_flip(d))


def test_sign_flip_agrees_with_scipy() -> None:
    d = np.random.default_rng(0).normal(0.4, 1, 9)
    oracle = stats.permutation_test(
        (d, np.zeros(9)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert s.sign_flip(d.tolist()) == pytest.approx(oracle.pvalue)


def test_sign_flip_of_many_seeds() -> None:
    d = np.random.default_rng(1).normal(0.3, 1, 60)
    exact, drawn = s.sign_flip(d[:40].tolist()), s.sign_flip(d.tolist())
    assert exact == pytest.approx(stats.ttest_1samp(d[:40], 0).pvalue, abs=0.01)
    assert drawn == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.01)
    assert drawn == s.sign_flip(d.tolist())
    assert s.sign_flip([1.0] * 60) == pytest.approx(1 / (1 + (1 << 18)))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=10, unique=True), st.data())
def test_wilcoxon_is_the_enumeration_of_ranks(ranks: list[int], data: st.DataObject) -> None:
    signs = data.draw(st.lists(st.sampled_from([-1, 1]), min_size=len(ranks), max_size=len(ranks)))
    order = stats.rankdata(ranks)
    sums = [abs(np.dot(flips, order)) for flips in itertools.product((-1, 1), repeat=len(ranks))]
    expected = np.mean(np.array(sums) >= abs(np.dot(signs, order)))
    assert s.wilcoxon([r * z for r, z in zip(ranks, signs, strict=True)]) == pytest.approx(expected)


def test_wilcoxon_of_zeros() -> None:
    assert s.wilcoxon([0.0, 0.0, 0.0]) == 1


def test_golden_holm() -> None:
    # sorted 0.01, 0.02, 0.04 times 3, 2, 1 = 0.03, 0.04, 0.04
    assert s.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    # 2 · 0.9 stops at 1
    assert s.holm([0.9, 0.95]) == [1, 1]
    assert s.holm([]) == []


@given(probabilities, st.randoms(use_true_random=False))
def test_holm_properties(p: list[float], random: object) -> None:
    corrected = s.holm(p)
    assert all(a <= c <= 1 for a, c in zip(p, corrected, strict=True))
    assert all(c <= min(1, len(p) * a) + 1e-12 for a, c in zip(p, corrected, strict=True))
    pairs = sorted(zip(p, corrected, strict=True))
    assert [c for _, c in pairs] == sorted(corrected)
    assert s.holm(p[::-1]) == corrected[::-1]
    assert s.holm(p[:1]) == p[:1]


@given(probabilities, st.integers(0, 11), st.floats(0, 1))
def test_holm_grows_with_every_p(p: list[float], index: int, more: float) -> None:
    larger = list(p)
    larger[index % len(p)] = max(more, larger[index % len(p)])
    assert all(b >= a - 1e-12 for a, b in zip(s.holm(p), s.holm(larger), strict=True))


def test_golden_effect_size() -> None:
    # mean 2, standard deviation 1
    assert s.effect_size([1, 2, 3]) == pytest.approx(2)
    assert s.effect_size([1]) is None
    assert s.effect_size([0.1, 0.1, 0.1]) is None
    assert s.effect_size([1, math.nan]) is None


@pytest.mark.parametrize(("pairs", "seeds"), [(1, 6), (3, 7), (6, 8), (0, 6)])
def test_seeds_needed(pairs: int, seeds: int) -> None:
    # 2 / 2^6 = 0.031; 3 · 2 / 2^7 = 0.047; 6 · 2 / 2^8 = 0.047
    assert s.seeds_needed(pairs) == seeds
    assert max(1, pairs) * s.smallest_p(seeds) <= s.ALPHA < max(1, pairs) * s.smallest_p(seeds - 1)


def values(*rows: list[float]) -> dict[str, dict[int, float]]:
    return {name: dict(enumerate(row)) for name, row in zip("abc", rows, strict=False)}


def test_five_seeds_are_not_enough_for_two_strategies_and_six_are() -> None:
    base = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    above = [x + 0.05 + x / 10 for x in base]
    [five] = s.compare(values(above[:5], base[:5]))
    assert five.p == 2 / 2**5
    assert (five.verdict, five.better, five.significant) == (s.NOT_ENOUGH, None, False)
    assert five.difference is not None
    assert five.difference.low is not None
    assert five.difference.low > 0
    [six] = s.compare(values(above, base))
    assert six.p_holm == 2 / 2**6
    assert six.verdict == "a is better"
    [lower] = s.compare(values(above, base), higher_is_better=False)
    assert lower.better == "b"


def test_correction_counts_into_what_is_attainable() -> None:
    """Three pairs of six seeds: 3 · 2 / 2^6 = 0.094 is the least that can come out."""
    base = np.arange(6) / 10
    pairs = s.compare(values(base.tolist(), (base * 1.1 + 1).tolist(), (base * 1.3 + 2).tolist()))
    assert [pair.p_holm for pair in pairs] == pytest.approx([3 * 2 / 64] * 3)
    assert {pair.verdict for pair in pairs} == {s.NOT_ENOUGH}


def test_no_difference_found() -> None:
    [pair] = s.compare(values([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5]))
    assert pair.p == 1
    assert pair.verdict == "no difference found"
    [same] = s.compare(values([1] * 8, [1] * 8))
    assert same.verdict == "no difference found"
    assert same.effect_size is None


def test_pairs_without_a_test_leave_the_family() -> None:
    found = values([1.0, 2, 3, 4, 5, 6], [2.0, 3.5, 4, 5, 6, 8], [math.nan, 1, 1, 1, 1, 1])
    pairs = s.compare(found)
    assert [pair.verdict for pair in pairs] == ["b is better", "a run diverged", "a run diverged"]
    assert pairs[0].p_holm == pairs[0].p
    [apart] = s.compare({"a": {0: 1.0}, "b": {1: 2.0}})
    assert (apart.verdict, apart.p, apart.difference) == ("no common seeds", None, None)


@settings(deadline=None, max_examples=50)
@given(samples, samples)
def test_swapping_labels_flips_the_sign_and_nothing_else(a: list[float], b: list[float]) -> None:
    rows = values(a, b)
    [there] = s.compare(rows)
    [back] = s.compare({"b": rows["b"], "a": rows["a"]})
    assert there.p == pytest.approx(back.p)
    assert there.difference is not None
    assert back.difference is not None
    assert there.difference.mean == pytest.approx(-back.difference.mean)
    assert there.better == back.better
    if there.effect_size is not None:
        assert back.effect_size == pytest.approx(-there.effect_size)
    if there.difference.low is not None and back.difference.high is not None:
        assert there.difference.low == pytest.approx(-back.difference.high)


def test_wilcoxon_as_the_test() -> None:
    rows = values([1, 2, 3, 4, 5, 9], [0.5, 1.2, 1, 1, 1, 10])
    [pair] = s.compare(rows, test="wilcoxon")
    assert pair.p == pytest.approx(stats.wilcoxon([0.5, 0.8, 2, 3, 4, -1]).pvalue)


def test_first_reached() -> None:
    curve = np.array([0.1, 0.5, 0.4, 0.7])
    assert s.first_reached(curve, 0.5, True) == 1
    assert s.first_reached(curve, 0.8, True) is None
    assert s.first_reached(-curve, -0.45, False) == 1
    assert s.first_reached(np.array([math.nan, 0.9]), 0.5, True) == 1


@pytest.mark.parametrize(
    ("times", "median"),
    [([3, 1, 2], 2), ([1, 2, None], 2), ([1, 2, 5, None], 3.5), ([1, None], None), ([], None)],
)
def test_censored_median(times: list[float | None], median: float | None) -> None:
    assert s.censored_median(times) == median


def test_mean_over_rounds() -> None:
    # trapezoids (0 + 1) / 2 · 1 and (1 + 1) / 2 · 2 over 3 rounds
    assert s.mean_over_rounds(np.array([0, 1, 3]), np.array([0.0, 1, 1])) == pytest.approx(2.5 / 3)
    assert s.mean_over_rounds(np.array([4]), np.array([1.0])) is None
