"""Devices: how long each kind works, who is late, and the rounds on the virtual clock."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsim.results import words
from fedsim.results.blocks import Block, Cell, Details, Section, Table, Text
from fedsim.results.fleet_plots import Job, timeline
from fedsim.results.groups import Runs
from fedsim.results.parts.outcome import shown, strategy_cell
from fedsim.results.sections import section
from fedsim.results.store import Run

SHOWN = 5
"""Rounds on a timeline."""
MOST = 4
"""Strategies with a timeline."""


@section(order=470)
def fleet(runs: Runs) -> Section | None:
    """What each kind of device did, where there are several."""
    found = {
        label: [job for run in runs.of(label) for job in _jobs(run)] for label in runs.compared
    }
    found = {label: jobs for label, jobs in found.items() if jobs}
    if not found:
        return None
    rows: list[list[Cell | str]] = []
    numbers: dict[str, Any] = {}
    for label, jobs in found.items():
        numbers[label] = {}
        for kind in sorted({job.device for _, job in jobs}):
            mine = [job for _, job in jobs if job.device == kind]
            worked = [job.seconds for job in mine if job.status != "error"]
            late = sum(job.status == "late" for job in mine)
            gone = sum(job.status == "error" for job in mine)
            mean = float(np.mean(worked)) if worked else 0.0
            share = {"jobs": len(mine), "late": late, "dropped_out": gone, "seconds": mean}
            numbers[label][kind] = share
            rows.append(
                [
                    strategy_cell(runs, label),
                    kind.replace("_", " "),
                    f"{len(mine):,}",
                    words.duration(mean),
                    f"{late:,}",
                    f"{gone:,}",
                ]
            )
    heads = ["strategy", "device", "jobs", "mean job", "late", "dropped out"]
    blocks: list[Block] = [
        Text("On the virtual clock: seconds are computed from device profiles, never measured."),
        Table(heads, rows, "All seeds together"),
    ]
    for label in list(found)[:MOST]:
        run = runs.of(label)[0]
        jobs = [(r, job) for r, job in _jobs(run) if 1 <= r <= SHOWN]
        ends = run.cumulative("seconds")[1 : SHOWN + 1].tolist()
        picture = timeline(label, [job for _, job in jobs], ends)
        blocks.append(Details(f"{label}: timeline", tuple(shown([picture]))))
    return Section("Devices", tuple(blocks), {"strategies": numbers})


def _jobs(run: Run) -> list[tuple[int, Job]]:
    """Round and job of every message to a device; nothing where all devices are of one kind."""
    table = run.clients
    names = ["round", "client", "device", "status", "seconds"]
    if not set(names) <= set(table.column_names):
        return []
    begun = run.cumulative("seconds") - run.series("seconds")[1]
    waited = dict(zip(*(column.tolist() for column in run.series("waited")), strict=True))
    jobs = []
    for row in table.select(names).to_pylist():
        at, status = row["round"], row["status"]
        if status is not None:
            start = float(begun[at]) + waited.get(at, 0.0)
            took = row["seconds"] or 0.0
            jobs.append((at, Job(row["client"], row["device"], start, took, status)))
    return jobs
