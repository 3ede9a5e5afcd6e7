"""What happened to single clients: how well each is served, and whose replies were refused."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedsim.results.groups import Runs
from fedsim.results.store import Floats, Run

SPREAD = ("worst10", "median", "best10", "mean")
"""What `spread` tells of a distribution over clients."""


@dataclass(frozen=True)
class Refusal:
    """Replies of one strategy that did not enter the model, for one reason.

    Attributes:
        status: `refused`, `error` or `late`.
        code: the reason's first part, for counting.
        detail: the rest of it, of the first such reply.
        count: number of replies.
    """

    status: str
    code: str
    detail: str
    count: int


@dataclass(frozen=True)
class ClientFacts:
    """One run's clients.

    Attributes:
        accuracy: of each client's held-out examples in the last round that evaluated clients.
        loss: the same of its loss.
        refusals: what was refused, most frequent first.
        asked: replies that were asked for, admitted or not.
    """

    accuracy: Floats
    loss: Floats
    refusals: tuple[Refusal, ...]
    asked: int

    def values(self, column: str) -> Floats:
        """`accuracy` or `loss`."""
        return self.accuracy if column == "accuracy" else self.loss


def facts(runs: Runs, run: Run) -> ClientFacts:
    """Read the clients of one of the runs; remembered as long as `runs` are."""
    return runs.once(("facts", run.path), lambda: _facts(run))


def client_column(runs: Runs) -> str | None:
    """What clients can be judged by: `accuracy`, else `loss`, else nothing."""
    for column in ("accuracy", "loss"):
        if any(len(facts(runs, run).values(column)) for run in runs.finished):
            return column
    return None


def spread(values: Floats, higher_is_better: bool) -> dict[str, float]:
    """Mean over the worst and best tenth of the clients (at least one), median and mean."""
    ordered = np.sort(values) if higher_is_better else np.sort(values)[::-1]
    tenth = max(1, math.ceil(0.1 * len(ordered)))
    return {
        "worst10": float(ordered[:tenth].mean()),
        "median": float(np.median(ordered)),
        "best10": float(ordered[-tenth:].mean()),
        "mean": float(ordered.mean()),
    }


def untrained(run: Run) -> str | None:
    """Why no round of a run counted, so that its model is the one it started from; None: one did.

    The reason is the one most replies were not admitted for.
    """
    if "abandoned" not in run.rounds.column_names:
        return None
    rounds = run.rounds.filter(pc.greater(run.rounds["round"], 0))
    if not rounds.num_rows or not pc.all(rounds["abandoned"]).as_py():
        return None
    found = _facts(run)
    if not found.refusals:
        return "no round counted: too few clients were there"
    most = found.refusals[0]
    why = f"{most.code}: {most.detail}" if most.detail else most.code
    return f"no round counted: {why} ({most.count:,} of {found.asked:,} replies)"


def _facts(run: Run) -> ClientFacts:
    table = run.client_columns("round", "status", "reason", "eval_accuracy", "eval_loss")
    asked = table.num_rows - table["status"].null_count
    return ClientFacts(
        _final(table, "eval_accuracy"), _final(table, "eval_loss"), tuple(_refusals(table)), asked
    )


def _final(table: pa.Table, column: str) -> Floats:
    measured = table.filter(pc.is_valid(table[column])) if column in table.column_names else table
    if column not in table.column_names or not measured.num_rows:
        return np.empty(0)
    last = pc.equal(measured["round"], pc.max(measured["round"]))
    return measured.filter(last)[column].to_numpy().astype(np.float64)


def _refusals(table: pa.Table) -> list[Refusal]:
    bad = table.filter(pc.fill_null(pc.not_equal(table["status"], "ok"), False))
    counts: Counter[tuple[str, str]] = Counter()
    details: dict[tuple[str, str], str] = {}
    grouped = bad.group_by(["status", "reason"], use_threads=False).aggregate([("round", "count")])
    for row in grouped.to_pylist():
        code, _, detail = str(row["reason"] or "no reason given").partition(":")
        counts[row["status"], code] += row["round_count"]
        details.setdefault((row["status"], code), detail.strip())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Refusal(status, code, details[status, code], n) for (status, code), n in ordered]
