"""Row 1: a run that is killed at any moment and resumed ends in the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.rows import ROWS, Row
from tests.faults.runs import digest

ROOT = Path(__file__).parents[2]
STATEFUL = Row("scaffold")


def kill(
    rows: list[Row], points: int, seed: int, folder: Path, plant: str = "", only: str = ""
) -> list[dict[str, Any]]:
    """What `tests.faults.killer` found, one entry for each row."""
    specs = [
        {"id": r.id, "strategy": r.strategy, "params": dict(r.params), "train": dict(r.train)}
        for r in rows
    ]
    job = {
        "rows": specs,
        "points": points,
        "seed": seed,
        "folder": str(folder),
        "plant": plant,
        "only": only,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killer", json.dumps(job)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FL_CRASH_LOG": str(folder / "places")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_fourteen_kills(tmp_path: Path) -> None:
    for found in kill([STATEFUL, Row("fedadam", {"eta": 0.01})], 7, 1, tmp_path):
        assert found["failures"] == []
        assert found["tries"] == 7
        assert found["slowest"] < 5


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("client states are not saved", "round.begin"),
        ("the strategy's state is not saved", "round.begin"),
        ("files are written in place", "half written"),
    ],
)
def test_planted_fault_is_found(fault: str, place: str, tmp_path: Path) -> None:
    [found] = kill([STATEFUL], 4, 2, tmp_path, plant=fault, only=place)
    assert found["failures"]


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("row", {r.strategy: r for r in ROWS}.values(), ids=lambda r: r.strategy)
def test_row_1(row: Row, tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """50 kills of every strategy."""
    [found] = kill([row], 50, 100, tmp_path)
    scorecard("1", f"kills, {row.strategy}", found["tries"], len(found["failures"]))
    assert found["failures"] == []
    assert found["tries"] == 50
    assert found["slowest"] < 5


RUN = """
import sys
from pathlib import Path
from fedsim import api
from fedsim.runner import Task
from tests.faults.runs import experiment
made = experiment({"name": "scaffold"})
api.execute(Task(made, made.strategy[0], 3, Path(sys.argv[1])))
"""


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("strace") is None, reason="a cross-check that needs strace")
def test_row_1_by_system_call(tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """The same from outside: the kernel kills the process at its n-th rename or fsync."""

    def run(folder: Path, *before: str) -> int:
        command = [*before, sys.executable, "-c", RUN, str(folder)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True).returncode

    assert run(tmp_path / "whole") == 0
    wanted, failures = digest(tmp_path / "whole"), 0
    places = [(call, n) for call in ("rename", "fsync") for n in (1, 3, 6, 10, 15)]
    for call, n in places:
        folder = tmp_path / f"{call}-{n}"
        inject = f"inject={call}:signal=SIGKILL:when={n}"
        assert run(folder, "strace", "-f", "-o", os.devnull, "-e", f"trace={call}", "-e", inject)
        failures += run(folder) != 0 or digest(folder) != wanted
    scorecard("1", "kills at a system call", len(places), failures)
    assert failures == 0
