"""A comparison in numbers: each strategy over its seeds, tests between them, one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedsim.results import words
from fedsim.results.clients import client_column, facts, spread
from fedsim.results.groups import Runs, higher_is_better
from fedsim.results.statistics import (
    Interval,
    Pair,
    Test,
    censored_median,
    compare,
    first_reached,
    mean_interval,
    mean_over_rounds,
    seeds_needed,
)
from fedsim.results.store import Run


@dataclass(frozen=True)
class Reach:
    """What a target cost: medians over all runs, a run that never got there counting as later.

    Attributes:
        reached: number of runs that got there.
        n: number of runs.
        rounds, bytes, client_seconds: up to the first evaluation at the target; None if less than
            half the runs got there.
    """

    reached: int
    n: int
    rounds: float | None
    bytes: float | None
    client_seconds: float | None


@dataclass(frozen=True)
class Line:
    """One strategy's numbers over its finished runs; None where it has no such column.

    Attributes:
        clients: `worst10`, `median`, `best10` and `mean` over clients, each over seeds.
        bytes_up, bytes_down, seconds, client_seconds: mean total of a run (seconds are simulated).
        mean_over_rounds: area under the metric's curve, per round.
        values: final metric of each seed.
    """

    label: str
    seeds: tuple[int, ...]
    final: Interval | None
    best: Interval | None
    mean_over_rounds: Interval | None
    clients: Mapping[str, Interval | None]
    bytes_up: float
    bytes_down: float
    seconds: float
    client_seconds: float
    reach: Reach | None
    values: Mapping[int, float]


@dataclass(frozen=True)
class Summary:
    """A comparison in numbers.

    Attributes:
        metric: the column that is compared.
        higher_is_better: its direction.
        target: the value whose cost is given.
        target_is_set: whether it was configured; else it is the first strategy's mean final value.
        client_column: what the clients are judged by, `accuracy` or `loss`.
        tests: pairs of strategies by what is tested: the metric's final value first.
    """

    metric: str
    higher_is_better: bool
    target: float | None
    target_is_set: bool
    client_column: str | None
    lines: tuple[Line, ...]
    tests: Mapping[str, list[Pair]]

    @property
    def pairs(self) -> list[Pair]:
        """The tests on the metric's final value."""
        return self.tests.get(self.metric, [])

    @property
    def ranked(self) -> list[Line]:
        """Strategies with a finite final value, the best mean first."""
        known = [(line.final.mean, line) for line in self.lines if line.final]
        finite = [(mean, line) for mean, line in known if math.isfinite(mean)]
        sign = -1 if self.higher_is_better else 1
        return [line for _, line in sorted(finite, key=lambda item: sign * item[0])]


def summarise(runs: Runs, test: Test = "sign_flip") -> Summary:
    """All numbers of one group of runs."""
    return runs.once(("summary", test), lambda: _summarise(runs, test))


def _summarise(runs: Runs, test: Test) -> Summary:
    metric = runs.metric
    higher = higher_is_better(metric)
    finals, bests = runs.values(metric), runs.values(metric, "best")
    target = runs.option("evaluate", "target")
    set_by_user = target is not None and metric == runs.option("evaluate", "metric")
    if not set_by_user:
        target = _own_target(runs, finals)
    column = client_column(runs)
    over_clients = {name: _over_clients(runs, column, name) for name in ("mean", "worst10")}
    tests = {metric: compare(finals, higher_is_better=higher, test=test)}
    for name, values in over_clients.items():
        if values and (key := f"client_{column}" if name == "mean" else f"client_{name}") != metric:
            tests[key] = compare(values, higher_is_better=column == "accuracy", test=test)
    lines = []
    for label in runs.compared:
        mine = runs.of(label)
        final = finals.get(label, {})
        areas = [mean_over_rounds(*run.series(metric)) for run in mine]
        lines.append(
            Line(
                label,
                tuple(run.seed for run in mine),
                mean_interval(final.values()),
                mean_interval(bests.get(label, {}).values()),
                mean_interval(area for area in areas if area is not None),
                {
                    name: mean_interval(_over_clients(runs, column, name).get(label, {}).values())
                    for name in ("mean", "worst10", "median", "best10")
                },
                _mean_total(mine, "bytes_up"),
                _mean_total(mine, "bytes_down"),
                _mean_total(mine, "seconds"),
                _mean_total(mine, "client_seconds"),
                None if target is None or not final else _reach(mine, metric, target, higher),
                final,
            )
        )
    return Summary(
        metric, higher, target, bool(set_by_user), column, tuple(lines), tests if finals else {}
    )


def _own_target(runs: Runs, finals: Mapping[str, Mapping[int, float]]) -> float | None:
    """The first strategy's mean final value, to three digits that are not harder to reach."""
    for label in runs.compared if len(finals) > 1 else []:
        mean = mean_interval(finals.get(label, {}).values())
        if mean is not None and math.isfinite(mean.mean):
            scale = 10.0 ** (math.floor(math.log10(abs(mean.mean) or 1.0)) - 2)
            away = math.floor if higher_is_better(runs.metric) else math.ceil
            return float(f"{away(mean.mean / scale) * scale:.3g}")
    return None


def _over_clients(runs: Runs, column: str | None, name: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for run in runs.finished if column else []:
        values = facts(runs, run).values(str(column))
        if len(values):
            found.setdefault(run.label, {})[run.seed] = spread(values, column == "accuracy")[name]
    return found


def _mean_total(runs: list[Run], column: str) -> float:
    return sum(float(run.cumulative(column)[-1]) for run in runs) / len(runs)


def _reach(runs: list[Run], metric: str, target: float, higher: bool) -> Reach:
    costs: list[tuple[float, float, float] | None] = []
    for run in runs:
        at, values = run.series(metric)
        index = first_reached(values, target, higher)
        if index is None:
            costs.append(None)
            continue
        row = int(run.rounds["round"].to_numpy().searchsorted(at[index]))
        size, seconds = run.cumulative("bytes_up", "bytes_down"), run.cumulative("client_seconds")
        costs.append((float(at[index]), float(size[row]), float(seconds[row])))
    medians = [censored_median(None if c is None else c[i] for c in costs) for i in range(3)]
    return Reach(sum(c is not None for c in costs), len(runs), *medians)


def finding(summary: Summary) -> str:
    """The result in plain language, with its uncertainty, or why there is none."""
    ranked = summary.ranked
    if not ranked:
        return "No run has finished with a value to compare."
    digits = words.decimals(line.final for line in summary.lines)
    best, metric = ranked[0], words.name(summary.metric)
    assert best.final is not None
    n = words.plural(best.final.n, "seed")
    where = f"{best.final.mean:.{digits}f}"
    where += f" ({_interval(best.final, digits)}{n})"
    if len(summary.lines) == 1:
        return f"{best.label} ends at {metric} {where}."
    way = "highest" if summary.higher_is_better else "lowest"
    text = f"{best.label} ends with the {way} {metric}, {where}"
    if len(ranked) > 1:
        text += _margin(summary, best.label, ranked[1].label, digits)
    text += "."
    diverged = [line.label for line in summary.lines if line.final and math.isnan(line.final.mean)]
    if diverged:
        text += f" {words.listed(diverged)} diverged."
    return f"{text} {_tested(summary, best.label)}".strip()


def _interval(interval: Interval, digits: int) -> str:
    return "" if interval.half is None else f"95 % CI {words.span(interval, digits)}, "


def _margin(summary: Summary, best: str, second: str, digits: int) -> str:
    pair = next(p for p in summary.pairs if {p.a, p.b} == {best, second})
    if pair.difference is None:
        return ""
    difference = pair.difference
    higher = (pair.a == best) == (difference.mean >= 0)
    sign = 1 if difference.mean >= 0 else -1
    text = f", {abs(difference.mean):.{digits}f} {'above' if higher else 'below'} {second}"
    if difference.low is not None and difference.high is not None:
        low, high = sorted((sign * difference.low, sign * difference.high))
        text += (
            f" (95 % CI of that difference {words.minus(low, digits)} to "
            f"{words.minus(high, digits)})"
        )
    return text


def _tested(summary: Summary, best: str) -> str:
    mine = [pair for pair in summary.pairs if best in (pair.a, pair.b)]
    told = [pair for pair in mine if pair.enough]
    other = {id(pair): pair.b if pair.a == best else pair.a for pair in mine}
    better = [pair for pair in told if pair.better == best]
    open_ = [pair for pair in told if not pair.better]
    parts = []
    if better:
        p = words.p_value(max(pair.p_holm or 0.0 for pair in better))
        sign = "" if p.startswith("<") else "= " if len(better) == 1 else "≤ "
        parts.append(
            f"It is better than {words.listed([other[id(p)] for p in better])} "
            f"(paired permutation test, Holm-corrected p {sign}{p})."
        )
    if open_:
        parts.append(
            f"Against {words.listed([other[id(p)] for p in open_])} no difference was found."
        )
    short = [pair for pair in mine if pair.smallest_p_holm is not None and not pair.enough]
    if short:
        family = len([pair for pair in summary.pairs if pair.p is not None])
        fewest = min(len(pair.seeds) for pair in short)
        smallest = max(pair.smallest_p_holm or 0.0 for pair in short)
        seeds, pairs = words.plural(fewest, "common seed"), words.plural(family, "pair")
        parts.append(
            f"There are not enough seeds to tell by a test: with {seeds} and {pairs} of strategies "
            f"the corrected p value cannot fall below {words.p_value(smallest)}; it takes "
            f"{seeds_needed(family)} seeds."
        )
    return " ".join(parts)
