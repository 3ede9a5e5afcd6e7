"""Clusters: how many, how true, why there, and what they are worth to each client."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fedsim.results import cluster_plots as draw
from fedsim.results import words
from fedsim.results.blocks import Block, Cell, Details, Section, Table, Text
from fedsim.results.groups import Runs
from fedsim.results.parts.outcome import shown, strategy_cell
from fedsim.results.sections import section
from fedsim.results.store import Run

COLUMNS = ("clusters", "cluster_ari", "cluster_nmi")
MOST = 6
"""Strategies of which all pictures are drawn; those that gain most come first."""


@section(order=450)
def clusters(runs: Runs) -> Section | None:
    """Who was in which cluster, and who gains from having a model of its own."""
    clustered = [label for label in runs.compared if _last(runs, label, "clusters")]
    blocks: list[Block] = []
    if clustered:
        blocks.append(_table(runs, clustered))
    gained = _gains(runs)
    if not clustered:
        return None
    for label in clustered[:MOST]:
        first = runs.of(label)[0]
        pictures = [*_pictures(label, first)]
        if pictures:
            blocks.append(Details(f"{label}: clusters, tree, labels", tuple(shown(pictures))))
    if gained:
        base = next(iter(gained.values()))[0]
        order = sorted(gained, key=lambda label: -float(gained[label][1].mean()))
        many = [draw.gains(b, base, runs.colour(b), gained[b][1]) for b in order[:MOST]]
        blocks.append(Text(f"Gain and loss of single clients against {base}:"))
        blocks += shown(many)
    numbers = {b: {c: _last(runs, b, c) for c in COLUMNS} for b in clustered}
    return Section("Clusters", tuple(blocks), {"strategies": numbers})


def _last(runs: Runs, label: str, column: str) -> list[float]:
    """The last value of a column in each run of a strategy that has it."""
    found = [run.series(column)[1] for run in runs.of(label) if column in run.rounds.column_names]
    return [float(v[-1]) for v in found if len(v)]


def _table(runs: Runs, labels: list[str]) -> Table:
    rows: list[list[Cell | str]] = []
    for label in labels:
        cells = []
        for column in COLUMNS:
            values = _last(runs, label, column)
            cells.append(", ".join(f"{v:.3g}" for v in values) if values else words.NONE)
        rows.append([strategy_cell(runs, label), *cells])
    heads = ["strategy", "clusters", "adjusted Rand index", "mutual information"]
    return Table(heads, rows, "At the end, for each seed; 1: exactly the planted groups")


def _artefact(run: Run, name: str) -> dict[str, Any]:
    file = run.path / "artefacts" / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _pictures(label: str, run: Run) -> list[Any]:
    names = ["round", "client", "cluster"]
    table = pq.read_table(run.path / "clients.parquet")
    pictures: list[Any] = []
    if set(names) <= set(table.column_names):
        whole = table.select(names).drop_null()
        rounds, clients, found = (whole[n].to_numpy().astype(np.int64) for n in names)
        if len(rounds):
            pictures.append(draw.over_time(label, rounds, clients, found))
    events = [e for e in _artefact(run, "clustering").get("events", []) if "tree" in e]
    if events:
        pictures.append(draw.tree(label, events[-1]))
    facts = _artefact(run, "clients")
    if facts.get("labels"):
        pictures.append(draw.labels(label, facts["cluster"], facts["labels"]))
    return pictures


def _gains(runs: Runs) -> dict[str, tuple[str, Any]]:
    """Gain of every client over the first FedAvg, or else the first strategy; all seeds."""
    scores = {label: _scores(runs, label) for label in runs.compared}
    scores = {label: found for label, found in scores.items() if found}
    if len(scores) < 2:
        return {}
    base = "fedavg" if "fedavg" in scores else next(iter(scores))
    gained = {}
    for label, found in scores.items():
        if label == base:
            continue
        values = [
            found[seed][client] - value
            for seed, own in scores[base].items()
            for client, value in own.items()
            if client in found.get(seed, {})
        ]
        if values:
            gained[label] = (base, np.array(values))
    return gained


def _scores(runs: Runs, label: str) -> dict[int, dict[int, float]]:
    """Final accuracy by seed and client."""
    found = {}
    for run in runs.of(label):
        table = pq.read_table(run.path / "clients.parquet")
        names = ["round", "client", "eval_accuracy"]
        if not set(names) <= set(table.column_names):
            continue
        whole = table.select(names).drop_null()
        rounds, clients, values = (whole[n].to_numpy() for n in names)
        if len(rounds):
            last = rounds == rounds.max()
            found[run.seed] = dict(zip(clients[last].tolist(), values[last].tolist(), strict=True))
    return found
