"""Row 1: a run or a comparison that is killed at any moment goes on to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.rows import Row
from tests.faults.runs import MODELS, STRATEGIES, entry

ROOT = Path(__file__).parents[2]
STATEFUL, ADAM = Row("scaffold"), Row("fedadam", {"eta": 0.01})
FAMILIES = ("fedavg", "scaffold", "fedap", "fedkseed", "dfedsam", "fedit", "ditto")
"""One model, control variates, clusters, seeds, gossip, adapters, personal models."""
PHASES = [
    ("kafal", "oracle.asked", 1),
    ("kafal", "oracle.answered", 1),
    ("knfu", "reply.judged", 2),
    ("gossip_relay", "reply.judged", 1),
    ("dispfl", "reply.judged", 1),
    ("fedspine", "reply.judged", 1),
]
"""Strategies whose rounds have phases, or whose clients hold what no server has; where, how often.

Replies are judged in every phase, so kills at ``reply.judged`` fall into all of them.
"""
SOON = 5.0
"""Seconds from a restart to the first dispatch."""
STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
COMPARED = {
    "experiment": {"name": "kill", "rounds": 2, "seeds": [3, 4]},
    "tune": {"seeds": [9], "rounds": 1, "grid": {"train.lr": [0.1, 0.2]}},
}
"""Sections of a comparison, with tuning before it."""


def kill(folder: Path, *jobs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `tests.faults.killer` found, by name of the job."""
    for number, job in enumerate(jobs):
        job |= {"folder": str(folder / str(number))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killer", json.dumps(jobs)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FL_CRASH_LOG": str(folder / "places")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {f["name"]: f for f in found}


def job(row: Row, points: int, seed: int, name: str = "", **more: Any) -> dict[str, Any]:
    """Kills of one strategy."""
    sections = {"model": MODELS[row.model]}
    return {"name": name or row.strategy, "strategies": [entry(row)], "points": points,
            "seed": seed, "sections": sections, **more}  # fmt: skip


def row_of(name: str) -> Row:
    """A strategy's row of the contract."""
    return next(r for r in STRATEGIES if r.strategy == name)


def compared(points: int, seed: int, name: str = "comparison", **more: Any) -> dict[str, Any]:
    """Kills of a comparison."""
    return {"name": name, "strategies": [entry(STATEFUL), entry(ADAM)], "points": points,
            "seed": seed, "sections": COMPARED, **more}  # fmt: skip


def test_kills(tmp_path: Path) -> None:
    """Fourteen runs and three comparisons, killed at failpoints, system calls and moments."""
    jobs = [
        job(STATEFUL, 5, 1),
        job(ADAM, 5, 2),
        job(STATEFUL, 2, 3, "moments", how="moment"),
        compared(3, 4),
    ]
    if shutil.which("strace"):
        jobs.append(job(STATEFUL, 2, 5, "calls", how="call"))
    found = kill(tmp_path, *jobs)
    assert [f["failures"] for f in found.values()] == [[]] * len(jobs)
    assert [f["tries"] for f in found.values()] == [j["points"] for j in jobs]


def test_kills_inside_phases(tmp_path: Path) -> None:
    """While labels are bought, knowledge is fused, neighbours mix, models are pruned."""
    jobs = []
    for seed, (name, place, points) in enumerate(PHASES):
        made = job(row_of(name), points, seed, f"{name} at {place}", only=place)
        if place.startswith("oracle"):
            made["book"] = str(tmp_path / place)
            asked = {"name": "called", "function": "tests.faults.runs:labels"}
            made["sections"] |= {"oracle": {**asked, "book": made["book"]}}
        jobs.append(made)
    found = kill(tmp_path, *jobs)
    assert {name: f["failures"] for name, f in found.items()} == {j["name"]: [] for j in jobs}
    assert [f["tries"] for f in found.values()] == [points for _, _, points in PHASES]


def test_planted_faults_are_found(tmp_path: Path) -> None:
    planted = [
        job(STATEFUL, 2, 1, plant="client states are not saved", only="round.begin"),
        job(STATEFUL, 2, 2, plant="the strategy's state is not saved", only="round.begin"),
        job(STATEFUL, 3, 3, plant="files are written in place", only="half written"),
        job(STATEFUL, 2, 4, plant="clients are counted again", only="round.begin"),
        job(STATEFUL, 2, 5, plant="leftovers stay", only="file.temporary"),
        compared(4, 6, plant="a comparison's files are written in place", only="torn"),
    ]
    for each in planted:
        each["name"] = each["plant"]
    missed = [name for name, found in kill(tmp_path, *planted).items() if not found["failures"]]
    assert not missed


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("row", STRATEGIES, ids=lambda r: r.strategy)
def test_row_1(row: Row, tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """50 kills of every strategy."""
    [found] = kill(tmp_path, job(row, 50, 100)).values()
    scorecard("1", f"kills at failpoints, {row.strategy}", found["tries"], len(found["failures"]))
    assert found["failures"] == []
    assert found["tries"] == 50
    assert found["slowest"] < SOON


@pytest.mark.faults
@pytest.mark.timeout(3600)
@STRACE
@pytest.mark.parametrize("name", FAMILIES)
def test_row_1_by_system_call(name: str, tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """The same from outside: the kernel kills the process at a write, an fsync, a rename, ..."""
    [found] = kill(tmp_path, job(row_of(name), 50, 200, how="call")).values()
    scorecard("1", f"kills at system calls, {name}", found["tries"], len(found["failures"]))
    assert found["failures"] == []
    assert found["tries"] == 50


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["failpoint", "moment", pytest.param("call", marks=STRACE)])
def test_row_1_comparisons(how: str, tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """Whole comparisons with tuning: runs, tables and reports are the same in every byte."""
    [found] = kill(tmp_path, compared(50, 300, how=how)).values()
    what = {"failpoint": "failpoints", "moment": "random moments", "call": "system calls"}[how]
    scorecard("1", f"kills of a comparison at {what}", found["tries"], len(found["failures"]))
    assert found["failures"] == []
    assert found["tries"] == 50


# --------------------------------------------------------------------------- from the command line

FILE = """
experiment = { name = "restart", rounds = 3, seeds = [3] }
data = { dataset = "digits", clients = 9, central_test_fraction = 0.6 }
model = "logistic"
train = { max_steps = 3 }
strategy = [{ name = "scaffold" }]
"""


def fedsim(*arguments: object, **env: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedsim", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def restart(folder: Path) -> float:
    """Kill `fedsim run` in its second round; seconds of `fedsim resume` to its first dispatch."""
    folder.mkdir()
    (folder / "run.toml").write_text(FILE)
    log = folder / "places"
    begun = ["run", folder / "run.toml", "--out", folder / "run"]
    killed = fedsim(*begun, FL_CRASH_AT="30", FL_CRASH_LOG=str(log))
    assert killed.wait(100) == -9
    log.unlink()
    start = time.monotonic()
    again = fedsim("resume", folder / "run", FL_CRASH_LOG=str(log))
    while not log.exists() or "round.sampled" not in log.read_text():
        assert again.poll() is None
        time.sleep(0.01)
    seconds = time.monotonic() - start
    assert again.wait(100) == 0
    return seconds


def test_restart_from_the_command_line(tmp_path: Path) -> None:
    restart(tmp_path / "run")
    assert '"finished"' in (tmp_path / "run" / "run" / "status.json").read_text()


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_row_1_restart(tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """From `fedsim resume`, imports and all, until clients are asked; meant for a quiet machine."""
    seconds = [restart(tmp_path / str(n)) for n in range(20)]
    shown = f"median {statistics.median(seconds):.1f} s, slowest {max(seconds):.1f} s"
    late = sum(s > SOON for s in seconds)
    scorecard("1", f"restarts to the first dispatch ({shown})", len(seconds), late)
    assert late == 0
