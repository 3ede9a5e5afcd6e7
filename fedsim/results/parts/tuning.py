"""What was tried before the comparison to choose each strategy's parameters."""

from __future__ import annotations

import json
from typing import Any

from fedsim.results import words
from fedsim.results.blocks import Block, Cell, Details, Section, Table, Text
from fedsim.results.groups import Runs
from fedsim.results.parts.outcome import strategy_cell
from fedsim.results.sections import section

MOST = 20
"""Rows of a table that is shown unfolded."""


@section(order=650)
def tuning(runs: Runs) -> Section | None:
    """Every candidate with its score, or the reason why it failed; the chosen one stands out."""
    tried = _tried(runs)
    if not tried:
        return None
    rows: list[list[Cell | str]] = []
    for label, told in tried.items():
        for candidate in told["candidates"]:
            chosen = candidate["values"] == told["best"]
            values = ", ".join(f"{k} = {v}" for k, v in candidate["values"].items())
            failed = candidate.get("failed")
            rows.append(
                [
                    strategy_cell(runs, label),
                    Cell(values or "as it is", strong=chosen),
                    Cell(words.number(candidate["score"]), strong=chosen),
                    f"failed: {failed}" if failed else "chosen" if chosen else "",
                ]
            )
    metric = words.name(str(next(iter(tried.values()))["metric"]))
    heads = ["strategy", "values", f"final {metric}", "what became of it"]
    table: Block = Table(heads, rows, "Candidates: mean over the tuning seeds", text_columns=(1, 3))
    if len(rows) > MOST:
        table = Details(words.plural(len(rows), "candidate"), (table,))
    seeds = [str(seed) for seed in runs.option("tune", "seeds") or ()]
    note = (
        f"Parameters were chosen by the final {metric} on seeds of their own "
        f"({words.listed(seeds)}), before the comparison. A candidate that failed on one of them "
        "could not win."
    )
    return Section("Tuning", (Text(note), table), tried)


def _tried(runs: Runs) -> dict[str, Any]:
    """What `fedsim.tuning` left beside these runs, in the order of their strategies."""
    found: dict[str, Any] = {}
    for folder in dict.fromkeys(run.path.parent for run in runs):
        try:
            found = json.loads((folder / "tune" / "tuning.json").read_text()) | found
        except (OSError, ValueError, TypeError):  # not tuned, not by a comparison, or damaged
            continue
    return {label: found[label] for label in runs.labels if "candidates" in found.get(label, ())}
