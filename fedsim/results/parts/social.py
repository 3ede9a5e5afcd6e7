"""Shapes beyond one global model: gossip, labels on a budget, knowledge that is shared."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fedsim.results import social_plots as draw
from fedsim.results import words
from fedsim.results.blocks import Block, Cell, Pictures, Section, Table, Text
from fedsim.results.groups import Runs
from fedsim.results.parts.outcome import shown, strategy_cell
from fedsim.results.sections import section
from fedsim.results.statistics import mean_interval
from fedsim.results.store import Run

MOST = 4
"""Heat maps that are drawn."""


@section(order=455)
def gossip(runs: Runs) -> Section | None:
    """Topologies, consensus over rounds, and the three ways of judging many models."""
    labels = [label for label in runs.compared if _last(runs, label, "consensus")]
    if not labels:
        return None
    graphs: dict[str, dict[str, Any]] = {}
    for label in labels:
        facts = _artefact(runs.of(label)[0], "topology")
        if facts:
            graphs.setdefault(str(facts["name"]), facts)
    blocks: list[Block] = [_models(runs, labels)]
    blocks += shown([draw.consensus(runs, labels)])
    if graphs:
        blocks.append(Pictures(tuple(draw.topology(n, facts) for n, facts in graphs.items())))
    numbers = {label: _last(runs, label, "consensus") for label in labels}
    return Section("Gossip", tuple(blocks), {"consensus": numbers})


def _models(runs: Runs, labels: list[str]) -> Table:
    columns = {
        "accuracy": "mean over nodes",
        "averaged_accuracy": "averaged model",
        "client_accuracy": "own held-out examples",
        "spectral_gap": "spectral gap",
        "consensus": "consensus distance",
    }
    rows: list[list[Cell | str]] = []
    for label in labels:
        found = [_last(runs, label, column) for column in columns]
        sent = [float(run.cumulative("peer_bytes")[-1]) for run in runs.of(label)]
        cells = [words.number(float(np.mean(v))) if v else words.NONE for v in found]
        rows.append([strategy_cell(runs, label), *cells, words.size(float(np.mean(sent)))])
    heads = ["strategy", *columns.values(), "sent between nodes"]
    caption = (
        "At the end, mean over seeds. Accuracy on the central test set of the nodes' models and of "
        "their average, and of each node's model on the node's own held-out examples"
    )
    return Table(heads, rows, caption)


@section(order=460)
def labels(runs: Runs) -> Section | None:
    """The metric at the ends of labelling cycles, against the labels paid for."""
    found = {}
    for label in runs.compared:
        ends = [_ends(run, runs.metric) for run in runs.of(label)]
        ends = [pair for pair in ends if len(pair[0])]
        if not ends:
            continue
        count = min(len(x) for x, _ in ends)
        x = np.mean([x[:count] for x, _ in ends], axis=0)
        found[label] = (x, np.array([y[:count] for _, y in ends]))
    if not found:
        return None
    widest = max(found.values(), key=lambda pair: len(pair[0]))[0]
    rows: list[list[Cell | str]] = []
    for label, (x, y) in found.items():
        cells = [_with_interval(y[:, i]) for i in range(len(x))]
        cells += [words.NONE] * (len(widest) - len(cells))
        rows.append([strategy_cell(runs, label), *cells])
    heads = ["strategy", *(f"{n:,.0f} labels" for n in widest)]
    name = words.name(runs.metric)
    table = Table(heads, rows, f"{name.capitalize()} at the ends of cycles, 95 % intervals")
    blocks: list[Block] = [*shown([draw.budgets(runs, found, runs.metric)]), table]
    numbers = {k: {"labels": x.tolist(), "values": y.tolist()} for k, (x, y) in found.items()}
    return Section("Label budgets", tuple(blocks), {"strategies": numbers})


def _ends(run: Run, metric: str) -> tuple[Any, Any]:
    """Labels, and the metric, in the last round of every cycle that was evaluated."""
    names = run.rounds.column_names
    if not {"cycle", "labels"} <= set(names):
        return np.empty(0), np.empty(0)
    rounds, values = run.series(metric)
    at = {int(r): float(v) for r, v in zip(rounds, values, strict=True)}
    last: dict[int, tuple[float, float]] = {}
    table = run.rounds.select(["round", "cycle", "labels"]).drop_null().to_pylist()
    for row in table:
        if row["round"] in at:
            last[int(row["cycle"])] = (float(row["labels"]), at[row["round"]])
    pairs = [last[cycle] for cycle in sorted(last)]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


def _with_interval(values: Any) -> str:
    return words.plus_minus(mean_interval(values), 3)


@section(order=465)
def knowledge(runs: Runs) -> Section | None:
    """Who learns how much from whom."""
    pictures, numbers = [], {}
    for label in runs.compared:
        facts = _artefact(runs.of(label)[0], "knowledge")
        if not facts:
            continue
        weights = np.array(facts["weights"], dtype=np.float64)
        numbers[label] = float(np.mean(np.diag(weights)))
        pictures.append(draw.teachers(label, facts["clients"], weights))
    if not pictures:
        return None
    text = Text(
        "A client is given a fusion of what the others say of public examples; more of it comes "
        "from those whose predicted labels are distributed like its own."
    )
    blocks = (text, Pictures(tuple(pictures[:MOST])))
    return Section("Who learns from whom", blocks, {"self_weight": numbers})


def _last(runs: Runs, label: str, column: str) -> list[float]:
    found = [run.series(column)[1] for run in runs.of(label) if column in run.rounds.column_names]
    return [float(v[-1]) for v in found if len(v)]


def _artefact(run: Run, name: str) -> dict[str, Any]:
    file = run.path / "artefacts" / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found
