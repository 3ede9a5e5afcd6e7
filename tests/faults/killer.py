"""Runs an experiment over and over, kills it at chosen places, and resumes it.

A program of its own, because it forks: ``python -m tests.faults.killer JOB`` reads a JSON object
(`rows`, `points` per row, `seed`, `folder`, `only` places of that name, a fault to `plant`) and
prints one JSON line for each row. Everything is imported once; every trial is a child process that
dies by SIGKILL, as the server would. ``FL_CRASH_LOG`` must name a file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim import api, failpoints, journal
from fedsim.journal import Journal
from fedsim.runner import Task
from tests.faults.runs import digest, experiment

torch.set_num_threads(1)
LOG = Path(os.environ["FL_CRASH_LOG"])
KILLED = -signal.SIGKILL


def child(work: Callable[[], object], at: int = 0) -> int:
    """Run in a process that is killed at the `at`-th failpoint; its exit status."""
    process = os.fork()
    if process == 0:
        failpoints._passed, failpoints._AT = 0, at
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def places(task: Task) -> list[str]:
    """The failpoints that one whole run passes. It is run here: its children find all imported."""
    LOG.unlink(missing_ok=True)
    api.execute(task)
    return LOG.read_text().split("\n")[:-1]


def trial(task: Task, at: int) -> tuple[str, float]:
    """Kill at a place, go on until the run is finished: its digest, seconds until it went on."""
    assert child(lambda: api.execute(task), at) == KILLED
    start = time.monotonic()
    status = child(lambda: api.execute(task))
    assert status == 0, f"resuming after a kill at place {at} ended with {status}"
    return digest(task.path), time.monotonic() - start


def row(
    spec: dict[str, Any], points: int, seed: int, folder: Path, only: str = ""
) -> dict[str, Any]:
    """All trials of one strategy."""
    strategy = {"name": spec["strategy"], "params": spec["params"], "train": spec["train"]}
    made = experiment(strategy, **spec.get("sections", {}))
    entry = made.strategy[0]
    whole = Task(made, entry, 3, folder / "whole")
    passed = places(whole)
    wanted = digest(whole.path)
    draw = np.random.default_rng(seed)
    possible = [n for n, name in enumerate(passed, 1) if only in ("", name)]
    first, rest = possible[0], possible[1:]  # before the first file there is nothing to resume
    chosen = [first, *sorted(draw.choice(rest, min(points - 1, len(rest)), replace=False).tolist())]
    failures, slowest = [], 0.0
    for at in chosen:
        task = Task(made, entry, 3, folder / f"killed-{at}")
        try:
            found, seconds = trial(task, at)
        except AssertionError as error:
            failures.append(f"{at}: {error}")
            continue
        slowest = max(slowest, seconds)
        if found != wanted:
            failures.append(f"{at}: other bits")
    return {"id": spec["id"], "tries": len(chosen), "places": len(passed), "failures": failures,
            "slowest": slowest}  # fmt: skip


def main() -> None:
    """See above."""
    job = json.loads(sys.argv[1])
    if job.get("plant"):
        PLANTS[job["plant"]]()
    for number, spec in enumerate(job["rows"]):
        folder = Path(job["folder"]) / str(number)
        found = row(spec, job["points"], job["seed"] + number, folder, job.get("only", ""))
        print(json.dumps(found), flush=True)


def _forget(part: str) -> Callable[[], None]:
    """Plant: checkpoints lack a part."""

    def plant() -> None:
        save = Journal.save

        def without(self: Journal, snapshot: Any) -> None:
            setattr(snapshot, part, {})
            save(self, snapshot)

        Journal.save = without  # type: ignore[method-assign]

    return plant


def _in_place() -> None:
    """Plant: checkpoints are written where they are read, and believed."""

    def write(self: Journal, path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            failpoints.crash_here("half written")
            file.write(data[len(data) // 2 :])

    Journal._write = write  # type: ignore[method-assign]
    journal._sound = Path.read_bytes


PLANTS: dict[str, Callable[[], None]] = {
    "client states are not saved": _forget("clients"),
    "the strategy's state is not saved": _forget("strategy"),
    "files are written in place": _in_place,
}

if __name__ == "__main__":
    main()
