"""Single clients: how evenly they are served, and whose replies did not enter the model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict

import numpy as np

from fedsim.results import plots, words
from fedsim.results.blocks import Block, Cell, Section, Table, Text
from fedsim.results.clients import SPREAD, Refusal, facts
from fedsim.results.groups import Runs
from fedsim.results.parts.outcome import best_of, interval_cell, shown, strategy_cell
from fedsim.results.sections import section
from fedsim.results.summary import summarise

MOST = 20
"""Rows of reasons before the rest is summed up."""


@section(order=400)
def clients(runs: Runs) -> Section | None:
    """Worst tenth, median and best tenth of the clients, each with the model meant for it."""
    summary = summarise(runs)
    column = summary.client_column
    if column is None:
        return None
    served = [line for line in summary.lines if line.clients["mean"] is not None]
    heads = {"worst10": "worst 10 %", "median": "median", "best10": "best 10 %", "mean": "mean"}
    cells = []
    for name in SPREAD:
        intervals = [line.clients[name] for line in served]
        digits, best = words.decimals(intervals), best_of(intervals, column)
        cells.append([interval_cell(i, digits, best) for i in intervals])
    rows = [
        [strategy_cell(runs, line.label), *row] for line, *row in zip(served, *cells, strict=True)
    ]
    table = Table(
        ["strategy", *(heads[name] for name in SPREAD)],
        rows,
        f"Final {column} of single clients: mean over seeds ± 95 % CI",
    )
    note = Text(
        "Each client is judged on its own held-out examples, with the model meant for it, in the "
        "last round in which clients were evaluated."
    )
    pictures = shown([plots.clients_ecdf(runs), plots.clients_spread(runs)])
    numbers = {line.label: {k: i and asdict(i) for k, i in line.clients.items()} for line in served}
    return Section("Clients", (note, table, *pictures), {"metric": column, "strategies": numbers})


@section(order=600)
def refused(runs: Runs) -> Section | None:
    """What did not enter the model and why, by strategy, and which rounds were abandoned."""
    if not runs.compared:
        return None
    asked: dict[str, int] = defaultdict(int)
    abandoned: dict[str, int] = defaultdict(int)
    counts: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    examples: dict[tuple[str, str], Refusal] = {}
    for run in runs.finished:
        found = facts(runs, run)
        asked[run.label] += found.asked
        abandoned[run.label] += int(np.nansum(run.series("abandoned")[1]))
        for refusal in found.refusals:
            counts[refusal.status, refusal.code][run.label] += refusal.count
            examples.setdefault((refusal.status, refusal.code), refusal)
    if not any(asked.values()):
        return None
    total = sum(sum(row.values()) for row in counts.values())
    blocks: list[Block] = [Text(_told(total, sum(asked.values()), sum(abandoned.values())))]
    numbers = {
        "replies": {label: asked[label] for label in runs.compared},
        "abandoned_rounds": {label: abandoned[label] for label in runs.compared},
        "reasons": [
            {"status": s, "reason": c, "example": examples[s, c].detail, "replies": dict(row)}
            for (s, c), row in sorted(counts.items())
        ],
    }
    if counts or any(abandoned.values()):
        blocks.append(_table(runs, asked, abandoned, counts, examples))
    return Section("What was refused, and why", tuple(blocks), numbers)


def _told(total: int, asked: int, abandoned: int) -> str:
    if not total:
        text = f"All {words.plural(asked, 'reply').replace('replys', 'replies')} were admitted."
    else:
        share = f"{float(f'{100 * total / asked:.2g}'):g} %"
        text = (
            f"{total:,} of {asked:,} replies ({share}) did not enter a model: the gate refused "
            "them, the client reported an error, or they came too late. "
            "Counts are summed over seeds."
        )
    if abandoned:
        text += (
            f" {words.plural(abandoned, 'round')} had too few admitted replies and changed nothing."
        )
    return text


def _table(
    runs: Runs,
    asked: dict[str, int],
    abandoned: dict[str, int],
    counts: dict[tuple[str, str], dict[str, int]],
    examples: dict[tuple[str, str], Refusal],
) -> Table:
    ordered = sorted(counts.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    rows: list[list[Cell | str]] = []
    for (status, code), row in ordered[:MOST]:
        cell = Cell(code.replace("_", " "), small=examples[status, code].detail)
        rows.append([cell, status, *(f"{row[label]:,}" for label in runs.compared)])
    if rest := [row for _, row in ordered[MOST:]]:
        sums = [f"{sum(row[label] for row in rest):,}" for label in runs.compared]
        rows.append([words.plural(len(rest), "other reason"), words.NONE, *sums])
    rows.append(["rounds abandoned", words.NONE, *(f"{abandoned[b]:,}" for b in runs.compared)])
    rows.append(["replies asked for", words.NONE, *(f"{asked[b]:,}" for b in runs.compared)])
    return Table(
        ["reason", "kind", *runs.compared],
        rows,
        "Replies that were not admitted, by reason and strategy",
        text_columns=(1,),
    )
