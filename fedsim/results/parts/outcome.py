"""What came out: the finding in words, one line a strategy, what it cost, the first pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from fedsim.results import plots, words
from fedsim.results.blocks import Block, Cell, Picture, Pictures, Section, Table, Text, Warn
from fedsim.results.groups import Runs, higher_is_better
from fedsim.results.sections import section
from fedsim.results.statistics import Interval
from fedsim.results.summary import Line, Reach, Summary, finding, summarise

Column = tuple[str, Callable[[Line], Interval | None], bool]


@section(order=100)
def outcome(runs: Runs) -> Section | None:
    """The finding, quality and cost of every strategy, the metric's course and its final values."""
    summary = summarise(runs)
    if not summary.lines:
        nothing = Text("No run has finished yet.", lead=True)
        return Section("Result", (nothing, *_left_out(runs)))
    blocks: list[Block] = [Text(finding(summary), lead=True)]
    blocks += _left_out(runs)
    blocks += [_quality(runs, summary), Text(_quality_note(summary, runs))]
    pictures = [plots.curves(runs, summary.metric, first_axis(summary), summary.target)]
    pictures.append(plots.seeds(runs, summary.metric))
    blocks += shown(pictures)
    blocks += [_cost(runs, summary), Text(_cost_note(summary))]
    return Section("Result", tuple(blocks), _numbers(summary))


@section(order=50, scope="whole")
def sweep(runs: Runs) -> Section | None:
    """Every strategy at every value of a sweep; nothing where nothing was swept."""
    groups = runs.groups
    if len(groups) < 2:
        return None
    key = ", ".join(groups[0].setting)
    summaries = [summarise(group) for group in groups]
    metrics = {summary.metric for summary in summaries if summary.lines}
    if len(metrics) != 1:
        return None
    [metric] = metrics
    found = [{line.label: line for line in summary.lines} for summary in summaries]
    digits = words.decimals(line.final for s in summaries for line in s.lines)
    labels = [label for label in runs.labels if any(label in lines for lines in found)]
    rows: list[list[Cell | str]] = []
    for group, lines in zip(groups, found, strict=True):
        finals = [lines[label].final if label in lines else None for label in labels]
        best = best_of(finals, metric)
        cells = [interval_cell(final, digits, best) for final in finals]
        rows.append([", ".join(map(str, group.setting.values())), *cells])
    name = words.name(metric)
    table = Table([key, *labels], rows, f"Final {name} at each value of {key}, mean ± 95 % CI")
    findings = [
        Text(f"{group.name}: {finding(summary)}")
        for group, summary in zip(groups, summaries, strict=True)
    ]
    pictures = [plots.sweep(groups, metric)]
    if any(line.clients["worst10"] for s in summaries for line in s.lines):
        pictures.append(plots.sweep(groups, "client_worst10"))
    return Section(f"Across {key}", (table, *shown(pictures), *findings))


def _left_out(runs: Runs) -> list[Block]:
    """A warning where runs are left out: what fails is seldom what would have done well."""
    told = []
    for label in runs.labels:
        failed = [run for run in runs if run.label == label and not run.finished]
        if failed:
            states = words.listed(sorted({str(run.status.get("state")) for run in failed}))
            told.append(f"{words.plural(len(failed), 'run')} of {label} ({states})")
    if not told:
        return []
    return [Warn(f"Not counted, because not finished: {words.listed(told)}; see “Runs” below.")]


def shown(pictures: Iterable[Picture | None]) -> list[Block]:
    """Those pictures that there are, side by side."""
    there = tuple(picture for picture in pictures if picture is not None)
    return [Pictures(there)] if there else []


def first_axis(summary: Summary) -> plots.Axis:
    """Against what the metric is drawn first: bytes for losses, by which language models are judged
    and of which every byte counts, and where strategies differ by ten times or more; else rounds.
    """
    totals = [line.bytes_up + line.bytes_down for line in summary.lines]
    first = not summary.higher_is_better or max(totals) >= 10 * min(totals)
    return "bytes" if first and min(totals) > 0 else "rounds"


def strategy_cell(runs: Runs, label: str) -> Cell:
    """A strategy's name with its colour."""
    return Cell(label, colour=runs.colour(label))


def best_of(intervals: Sequence[Interval | None], column: str) -> float | None:
    """The best mean, if there are several to choose from."""
    means = [i.mean for i in intervals if i is not None and math.isfinite(i.mean)]
    if len(means) < 2:
        return None
    return max(means) if higher_is_better(column) else min(means)


def interval_cell(interval: Interval | None, digits: int, best: float | None) -> Cell:
    """Mean ± half the interval, standing out where it is the best mean."""
    return Cell(
        words.plus_minus(interval, digits), strong=interval is not None and interval.mean == best
    )


def _quality(runs: Runs, summary: Summary) -> Table:
    name = words.name(summary.metric)
    clients = summary.client_column or ""
    columns: list[tuple[str, str, list[Interval | None]]] = [
        (f"final {name}", summary.metric, [line.final for line in summary.lines]),
        (f"best {name}", summary.metric, [line.best for line in summary.lines]),
        (f"mean client {clients}", clients, [line.clients["mean"] for line in summary.lines]),
        (
            f"{clients} of the worst 10 % of clients",
            clients,
            [line.clients["worst10"] for line in summary.lines],
        ),
    ]
    columns = [column for column in columns if any(i is not None for i in column[2])]
    cells = []
    for _, column, intervals in columns:
        digits, best = words.decimals(intervals), best_of(intervals, column)
        cells.append([interval_cell(i, digits, best) for i in intervals])
    rows: list[list[Cell | str]] = [
        [strategy_cell(runs, line.label), str(len(line.seeds)), *row]
        for line, *row in zip(summary.lines, *cells, strict=True)
    ]
    heads = ["strategy", "seeds", *(title for title, _, _ in columns)]
    return Table(heads, rows, "How good: mean ± 95 % confidence interval over seeds")


def _quality_note(summary: Summary, runs: Runs) -> str:
    note = (
        "± is half the width of the 95 % confidence interval of the mean over seeds (Student t). "
    )
    if len(runs.seeds) < 2:
        note = "One seed gives no confidence interval. "
    note += (
        "“Best” is the best round of each run, chosen on the data it is measured on, and so too "
        "good to expect again."
    )
    if len(summary.lines) > 1:
        note += " Bold marks the best mean, not a significant difference."
    return note


def _cost(runs: Runs, summary: Summary) -> Table:
    heads = ["strategy", "sent up", "sent down", "client time", "simulated time"]
    rows: list[list[Cell | str]] = [
        [
            strategy_cell(runs, line.label),
            words.size(line.bytes_up),
            words.size(line.bytes_down),
            words.duration(line.client_seconds),
            words.duration(line.seconds),
        ]
        for line in summary.lines
    ]
    if summary.target is not None:
        goal = f"{words.name(summary.metric)} {words.number(summary.target)}"
        heads += [f"reached {goal}", "rounds to it", "bytes to it", "client time to it"]
        for row, line in zip(rows, summary.lines, strict=True):
            row += _reach(line.reach)
    return Table(heads, rows, "What it cost: mean of a run, and medians up to the target")


def _reach(reach: Reach | None) -> list[str]:
    if reach is None:
        return [words.NONE] * 4
    return [
        f"{reach.reached} of {reach.n}",
        words.number(reach.rounds),
        words.size(reach.bytes),
        words.duration(reach.client_seconds),
    ]


def _cost_note(summary: Summary) -> str:
    note = (
        "Bytes are the payload as serialised, summed over clients. Times are simulated by the "
        "device profile, client time summed over clients."
    )
    if summary.target is None:
        return note
    note += (
        " To the target: the median over runs, a run that did not reach it counting as later than "
        "any that did; a dash where at least half did not."
    )
    if not summary.target_is_set:
        first = summary.lines[0].label
        note += f" No target was set, so it is the mean final value of {first}."
    return note


def _numbers(summary: Summary) -> dict[str, object]:
    return {
        "finding": finding(summary),
        "metric": summary.metric,
        "higher_is_better": summary.higher_is_better,
        "target": summary.target,
        "target_is_set": summary.target_is_set,
        "strategies": [asdict(line) for line in summary.lines],
    }
