"""What the commands print at their end: results, plans, names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fedsim.progress import duration, metric_text, size, to_json

if TYPE_CHECKING:
    from rich.table import Table

    from fedsim.api import Comparison, Plan
    from fedsim.results.groups import Runs
    from fedsim.runner import RunResult
    from fedsim.speed import Speeds


def show_run(result: RunResult, as_json: bool) -> None:
    """Say where a run is and what it gave."""
    if as_json:
        print(to_json({"event": "Result", **asdict(result)}))
    else:
        print(f"{result.path}  {metric_text(result.metrics)}".rstrip())


def show_metrics(rows: Mapping[str, Mapping[str, float]], as_json: bool) -> None:
    """Print the metrics of a model on one set of data after another."""
    for data, row in rows.items():
        if as_json:
            print(to_json({"data": data, **row}))
        else:
            print(f"{data}  " + "  ".join(f"{name} {value:.4f}" for name, value in row.items()))


def show_comparison(result: Comparison, as_json: bool) -> None:
    """Print the strategies' numbers, and where the report is."""
    if as_json:
        content = {"event": "Result", **asdict(result)}
        print(to_json(content))
        return
    from fedsim.results import find_runs
    from fedsim.results.groups import Runs

    for group in Runs(find_runs(result.path)).groups if result.results else ():
        if group.compared:
            _print(_strategies(group))
    print(f"{result.html}\n{result.markdown}")


def _strategies(runs: Runs) -> Table:
    """A line for each strategy: final and best metric with 95 % intervals, and the cost."""
    from fedsim.results import words
    from fedsim.results.summary import summarise

    summary = summarise(runs)
    table = _table(runs.name, "strategy")
    name = words.name(summary.metric)
    for heading in (f"final {name}", f"best {name}", "bytes per run", "simulated time", "seeds"):
        table.add_column(heading, justify="right")
    digits = words.decimals([line.final for line in summary.lines])
    for line in summary.lines:
        table.add_row(
            line.label,
            words.plus_minus(line.final, digits),
            words.plus_minus(line.best, digits),
            size(line.bytes_up + line.bytes_down),
            duration(line.seconds),
            str(len(line.seeds)),
        )
    table.caption = "mean ± 95 % confidence interval over seeds"
    return table


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print what an experiment would do, and what it would cost."""
    if as_json:
        print(to_json(asdict(plan)))
        return
    low, median, high = plan.examples
    facts = {
        "runs": f"{plan.runs:,}, each of {plan.rounds:,} rounds",
        "clients": f"{plan.clients:,}, of which {plan.cohort:,} in a round",
        "examples per client": f"{low:,} min, {median:,.0f} median, {high:,} max",
        "central test examples": f"{plan.test_examples:,}",
        "trainable parameters": f"{plan.parameters:,}",
        "time on this machine": f"about {duration(plan.seconds)} for all runs",
    }
    table = _table(plan.name, "", "")
    table.show_header = False
    for fact in facts.items():
        table.add_row(*fact)
    _print(table)
    costs = _table("", "strategy")
    for heading in ("down per round", "up per round", "bytes per run", "time per run"):
        costs.add_column(heading, justify="right")
    for cost in plan.costs:
        costs.add_row(
            cost.label,
            size(cost.bytes_down),
            size(cost.bytes_up),
            size((cost.bytes_down + cost.bytes_up) * plan.rounds),
            f"about {duration(cost.seconds)}",
        )
    _print(costs)


def show_speeds(speeds: Speeds, as_json: bool) -> None:
    """Print what every executor took, and the lines to set."""
    if as_json:
        print(to_json({**asdict(speeds), "lines": speeds.lines}))
        return
    table = _table("", "strategy", "executor")
    for heading in ("workers", "s/round", "clients/s", "serial ÷ it"):
        table.add_column(heading, justify="right")
    table.add_column("how, or why not")
    serial = {t.strategy: t.seconds for t in speeds.timings if t.executor == "serial"}
    for t in speeds.timings:
        numbers = ["–"] * 3
        if t.seconds is not None:
            base = serial[t.strategy]
            numbers = [f"{t.seconds:.4g}", f"{t.clients / t.seconds:.4g}"]
            numbers.append("–" if base is None else f"{base / t.seconds:.2f}")
        name = f"{t.executor} (auto)" if t.automatic else t.executor
        table.add_row(t.strategy, name, str(t.workers), *numbers, t.reason)
    _print(table)
    print(f"Fastest for all strategies together, {speeds.seconds:.4g} s a round of each:\n")
    print(speeds.lines)


def show_sliced(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print what `fedsim slice` wrote."""
    if as_json:
        for row in rows:
            print(to_json(row))
        return
    table = _table("", "client")
    for heading in ("weights", "groups removed"):
        table.add_column(heading, justify="right")
    table.add_column("file")
    for row in rows:
        table.add_row(
            str(row["client"]), f"{row['weights']:,}", f"{row['pruned']:.1%}", row["file"]
        )
    _print(table)


def show_names(names: Mapping[str, str], as_json: bool) -> None:
    """Print names with what they stand for."""
    if as_json:
        print(to_json(names))
        return
    width = max(map(len, names), default=0)
    for name, description in names.items():
        print(f"{name:<{width}}  {description}".rstrip())


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table


def _print(table: Any) -> None:
    """Print a table, as wide as it needs to be where the output is no terminal."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=200)
    console.print(table)
