"""What a handful of seeds can say: intervals, paired tests, correction, and when they say nothing.

Runs of two strategies with the same seed share data, split, initial model and cohorts, so they are
compared in pairs. The sign-flip test asks how often the mean difference would be as large if every
difference could as well have had the other sign; with n seeds it cannot give less than p = 2 / 2^n,
and `Pair.verdict` says so instead of calling a small study inconclusive or a lucky one proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

ALPHA = 0.05
"""Level of every test and, as 1 - ALPHA, of every interval."""

NOT_ENOUGH = "not enough seeds to tell"

Test = Literal["sign_flip", "wilcoxon"]
Floats = NDArray[np.float64]
Values = Mapping[int, float]

_EXACT = 40  # seeds up to which all 2^n sign vectors are counted
_DRAWS = 1 << 18


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values and its confidence interval; no bounds for fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the interval's width: the number after ±."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean_interval(values: Iterable[float], level: float = 1 - ALPHA) -> Interval | None:
    """Mean and Student-t interval; None without values, NaN (no interval) if one diverged."""
    x = np.asarray(list(values), dtype=np.float64)
    if not len(x):
        return None
    mean = float(x.mean()) if np.isfinite(x).all() else math.nan
    if len(x) < 2 or math.isnan(mean):
        return Interval(mean, None, None, len(x))
    quantile = float(special.stdtrit(len(x) - 1, (1 + level) / 2))
    half = quantile * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half, len(x))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p value of the paired permutation test on the mean difference.

    Exact up to 40 pairs: the sums of all sign vectors of one half of the differences are matched
    with those of the other half. Beyond, 2^18 seeded draws, the observed one counted among them.
    """
    d = np.asarray(differences, dtype=np.float64)
    reach = abs(d.sum()) - 1e-12 * np.abs(d).sum()  # sums that tie but for rounding are equal
    if reach <= 0:
        return 1.0
    if len(d) > _EXACT:
        signs = np.random.Generator(np.random.Philox(key=len(d)))
        sums = np.concatenate(
            [(2 * signs.integers(0, 2, (4096, len(d))) - 1) @ d for _ in range(_DRAWS // 4096)]
        )
        return float((1 + (np.abs(sums) >= reach).sum()) / (1 + _DRAWS))
    left, right = _signed_sums(d[: len(d) // 2]), np.sort(_signed_sums(d[len(d) // 2 :]))
    above = len(right) - np.searchsorted(right, reach - left, side="left")
    below = np.searchsorted(right, -reach - left, side="right")
    return float((above.sum() + below.sum()) / 2.0 ** len(d))


def _signed_sums(d: Floats) -> Floats:
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p value of Wilcoxon's signed-rank test (Wilcoxon 1945), exact for small samples."""
    from scipy import stats  # slow to import, and rarely asked for

    d = np.asarray(differences, dtype=np.float64)
    return float(stats.wilcoxon(d).pvalue) if d.any() else 1.0


_TESTS = {"sign_flip": sign_flip, "wilcoxon": wilcoxon}


def smallest_p(n: int) -> float:
    """The smallest two-sided p value that n pairs can give in either test: 2 / 2^n."""
    return min(1.0, 2.0 ** (1 - n))


def seeds_needed(pairs: int) -> int:
    """Seeds from which a corrected p value of at most `ALPHA` is attainable for `pairs` pairs."""
    return math.ceil(math.log2(2 * max(1, pairs) / ALPHA))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): adjusted p values, in the order given."""
    corrected = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def effect_size(differences: Sequence[float]) -> float | None:
    """Paired Cohen's d_z: mean difference in units of the differences' standard deviation.

    None for fewer than two differences or if they are all the same.
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2 or not np.isfinite(d).all():
        return None
    spread = float(d.std(ddof=1))
    return float(d.mean()) / spread if spread > 1e-12 * float(np.abs(d).max()) else None


@dataclass(frozen=True)
class Pair:
    """Strategy `a` against `b` over their common seeds; `difference` is a minus b."""

    a: str
    b: str
    seeds: tuple[int, ...]
    difference: Interval | None
    effect_size: float | None
    p: float | None
    p_holm: float | None
    smallest_p_holm: float | None
    higher_is_better: bool

    @property
    def enough(self) -> bool:
        """Whether these seeds could have given a significant corrected p value at all."""
        return self.smallest_p_holm is not None and self.smallest_p_holm <= ALPHA

    @property
    def significant(self) -> bool:
        """Whether the corrected p value is at most `ALPHA`."""
        return self.enough and self.p_holm is not None and self.p_holm <= ALPHA

    @property
    def better(self) -> str | None:
        """The significantly better one, if there is one."""
        if not self.significant or self.difference is None:
            return None
        return self.a if (self.difference.mean > 0) == self.higher_is_better else self.b

    def better_first(self) -> Pair:
        """The same pair, the strategy with the better mean named first."""
        d = self.difference
        if d is None or (d.mean >= 0) == self.higher_is_better or math.isnan(d.mean):
            return self
        low, high = (None, None) if d.low is None or d.high is None else (-d.high, -d.low)
        effect = None if self.effect_size is None else -self.effect_size
        turned = Interval(-d.mean, low, high, d.n)
        return replace(self, a=self.b, b=self.a, difference=turned, effect_size=effect)

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.difference is None:
            return "no common seeds"
        if math.isnan(self.difference.mean):
            return "a run diverged"
        if not self.enough:
            return NOT_ENOUGH
        return f"{self.better} is better" if self.better else "no difference found"


def compare(
    values: Mapping[str, Values], *, higher_is_better: bool = True, test: Test = "sign_flip"
) -> list[Pair]:
    """Test every pair of strategies over their common seeds, corrected over the family of pairs.

    Args:
        values: for each label, the metric of each seed. A NaN (a diverged run) leaves its pairs
            without a test.
        higher_is_better: whether a larger value is a better one.
        test: `sign_flip` or `wilcoxon`.

    Returns:
        One `Pair` for each two labels, in the order of `values`.
    """
    couples = list(combinations(values, 2))
    seeds = [tuple(sorted(set(values[a]) & set(values[b]))) for a, b in couples]
    differences = [
        [values[a][seed] - values[b][seed] for seed in common]
        for (a, b), common in zip(couples, seeds, strict=True)
    ]
    tested = [i for i, d in enumerate(differences) if d and np.isfinite(d).all()]
    p = {i: _TESTS[test](differences[i]) for i in tested}
    corrected = dict(zip(tested, holm(list(p.values())), strict=True))
    attainable = dict(
        zip(tested, holm([smallest_p(len(differences[i])) for i in tested]), strict=True)
    )
    return [
        Pair(
            a,
            b,
            seeds[i],
            mean_interval(differences[i]),
            effect_size(differences[i]),
            p.get(i),
            corrected.get(i),
            attainable.get(i),
            higher_is_better,
        )
        for i, (a, b) in enumerate(couples)
    ]


def by_size(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs, each with the better strategy first, in falling order of their differences."""
    return sorted(
        (pair.better_first() for pair in pairs),
        key=lambda p: -abs(p.difference.mean) if p.difference is not None else math.inf,
    )


def first_reached(values: Floats, target: float, higher_is_better: bool) -> int | None:
    """Index of the first value that is at least as good as `target`."""
    hits = np.flatnonzero(values >= target if higher_is_better else values <= target)
    return int(hits[0]) if len(hits) else None


def censored_median(values: Iterable[float | None]) -> float | None:
    """Median in which None stands for "later than any other"; None if the median is such a one."""
    x = sorted(math.inf if value is None else value for value in values)
    if not x:
        return None
    middle = (x[(len(x) - 1) // 2] + x[len(x) // 2]) / 2
    return None if math.isinf(middle) else middle


def mean_over_rounds(rounds: NDArray[np.int64], values: Floats) -> float | None:
    """Area under the curve by the trapezoid rule, divided by the rounds it spans."""
    if len(rounds) < 2:
        return None
    return float(np.trapezoid(values, rounds) / (rounds[-1] - rounds[0]))
