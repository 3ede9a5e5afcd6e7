"""The report's part about devices: only where there are several kinds, and true to the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsim.results.fleet_plots import Job, timeline
from fedsim.results.groups import Runs
from fedsim.results.parts.fleet import fleet
from fedsim.results.store import Run, RunWriter


def job(client: int, device: str | None, status: str, seconds: float = 1.0) -> dict[str, Any]:
    row = {"round": 1, "client": client, "name": str(client), "status": status, "seconds": seconds}
    return row if device is None else {**row, "device": device}


def folder(path: Path, jobs: list[dict[str, Any]], waited: float | None = None) -> Run:
    writer = RunWriter(path)
    writer.write_config(
        {
            "experiment": {"experiment": {"name": "x", "rounds": 1, "seeds": [0]}},
            "strategy": {"name": "fedavg", "label": "fedavg", "params": {}, "train": {}},
            "seed": 0,
        }
    )
    writer.write_environment({})
    writer.write_status({"state": "finished", "round": 1, "rounds": 1, "reason": None})
    rounds = [{"round": 0, "seconds": 0.0}, {"round": 1, "seconds": 7.0, "accuracy": 0.5}]
    if waited is not None:
        rounds[1]["waited"] = waited
    writer.write_tables(rounds, jobs, [])
    return Run.load(path)


def test_nothing_is_said_where_all_devices_are_alike(tmp_path: Path) -> None:
    assert fleet(Runs([folder(tmp_path, [job(0, None, "ok")])])) is None


def test_jobs_late_ones_and_drop_outs_are_counted_by_kind(tmp_path: Path) -> None:
    jobs = [job(0, "phone", "late", 3.0), job(1, "phone", "ok", 1.0), job(2, "pi", "error", 0.0)]
    made = fleet(Runs([folder(tmp_path, jobs)]))
    assert made is not None
    assert made.data["strategies"]["fedavg"] == {
        "phone": {"jobs": 2, "late": 1, "dropped_out": 0, "seconds": 2.0},
        "pi": {"jobs": 1, "late": 0, "dropped_out": 1, "seconds": 0.0},
    }


@pytest.mark.parametrize(("waited", "start"), [(None, 0.0), (5.0, 5.0)])
def test_a_bar_begins_when_the_wait_for_devices_ends(
    tmp_path: Path, waited: float | None, start: float
) -> None:
    from fedsim.results.parts.fleet import _jobs

    run = folder(tmp_path, [job(0, "phone", "ok"), job(1, "pi", "ok")], waited)
    assert [(r, j.start) for r, j in _jobs(run)] == [(1, start), (1, start)]


def test_the_timeline_says_what_it_shows() -> None:
    jobs = [Job(0, "pi", 0.0, 2.0, "ok"), Job(1, "phone", 0.0, 9.0, "late")]
    picture = timeline("FedAvg", jobs, [4.0])
    assert "2 devices over 1 rounds of FedAvg: 2 jobs, 1 late, 0 dropped out" in picture.alt
    assert picture.svg.count("<svg") == 1
