"""Runs experiments over and over, kills them at chosen places, and lets them go on.

A program of its own, because it forks: ``python -m tests.faults.killer JOBS`` reads a list of JSON
objects (the fields of `Job`) and prints one JSON line for each. Everything is imported once; every
trial is a child process that dies by SIGKILL, as the server would. ``FL_CRASH_LOG`` must name a
file. Places are chosen in three ways: a failpoint, the n-th system call of a kind (strace makes the
kernel kill the process as it enters the call), and a moment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim import api, failpoints, journal
from fedsim.journal import Journal
from fedsim.results import files
from fedsim.runner import Run, Task
from fedsim.runtime.oracles import BOOK
from tests.faults.runs import comparison_digest, digest, experiment

LOG = Path(os.environ["FL_CRASH_LOG"])
KILLED = -signal.SIGKILL
CALLS = ("write", "fsync", "rename", "ftruncate", "unlink", "mkdir")
"""System calls that change a disk."""


@dataclass(frozen=True)
class Job:
    """Trials with one experiment.

    Attributes:
        name: to tell results apart.
        strategies: entries of the experiment; with several it is a comparison.
        points: how many kills.
        seed: of the choice of places.
        folder: where to work.
        how: ``"failpoint"``, ``"call"`` or ``"moment"``.
        only: failpoints of that name.
        plant: a fault to plant, one of `PLANTS`.
        sections: of the experiment.
        book: where an oracle keeps its book; every trial begins a new one.
    """

    name: str
    strategies: list[dict[str, Any]]
    points: int
    seed: int
    folder: str
    how: str = "failpoint"
    only: str = ""
    plant: str = ""
    sections: dict[str, Any] = field(default_factory=dict)
    book: str = ""


class Work:
    """What is killed: a run or a comparison, in a folder of its own for every trial."""

    def __init__(self, job: Job) -> None:
        first, *more = job.strategies
        made = experiment(first, **job.sections)
        if more:
            sections = {**made.model_dump(mode="json"), "strategy": job.strategies}
            made = type(made).model_validate(sections)
        self.made, self.comparison, self.home = made, bool(more), Path(job.folder)

    def do(self, name: str) -> None:
        """Begin, or go on."""
        if self.comparison:
            api.compare(self.made, out=self.home / name)
        else:
            api.execute(Task(self.made, self.made.strategy[0], 3, self.home / name))

    def digest(self, name: str) -> str:
        """Of what it leaves."""
        return (comparison_digest if self.comparison else digest)(self.home / name)


def child(work: Callable[[], object], at: int = 0, stopped: bool = False) -> int:
    """Fork a process that is killed at the `at`-th failpoint; it may wait for SIGCONT first."""
    process = os.fork()
    if process == 0:
        failpoints._passed, failpoints._AT, failpoints._LOG = 0, at, ""
        try:
            if stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return process


def ended(process: int) -> int:
    """Exit status of a child; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def traced(work: Callable[[], object], *options: str) -> int:
    """Run in a child under strace; its exit status."""
    process = child(work, stopped=True)
    os.waitpid(process, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-qq", "-p", str(process), *options])
    status = Path(f"/proc/{process}/status")
    while "TracerPid:\t0" in status.read_text():
        assert tracer.poll() is None, "strace cannot trace"
        time.sleep(0.01)
    os.kill(process, signal.SIGCONT)
    code = ended(process)
    tracer.wait()
    return code


def failpoint_places(work: Work, job: Job) -> list[int]:
    """Failpoints that a whole run passes. It is run here: its children find all imported."""
    LOG.unlink(missing_ok=True)
    work.do("whole")
    passed = LOG.read_text().split("\n")[:-1]
    return [n for n, name in enumerate(passed, 1) if job.only in ("", name)]


def call_places(work: Work) -> list[tuple[str, int]]:
    """System calls of a whole run."""
    work.do("whole")
    log = work.home / "calls"
    options = ("-o", str(log), "-e", f"trace={','.join(CALLS)}")
    assert traced(lambda: work.do("counted"), *options) == 0
    counts = Counter(re.findall(r"^(\w+)\(", log.read_text(), re.MULTILINE))
    return [(call, n) for call in CALLS for n in range(1, counts[call] + 1)]


def moments(work: Work) -> list[float]:
    """Many moments of a whole run, in seconds."""
    work.do("whole")
    start = time.monotonic()
    assert ended(child(lambda: work.do("timed"))) == 0
    return np.linspace(0.0, time.monotonic() - start, 10_000).tolist()


def kill(work: Work, name: str, how: str, at: Any) -> bool:
    """Begin and be killed at a place; False if it was done before."""

    def do() -> None:
        work.do(name)

    if how == "failpoint":
        code = ended(child(do, at))
    elif how == "call":
        inject = f"inject={at[0]}:signal=SIGKILL:when={at[1]}"
        code = traced(do, "-o", os.devnull, "-e", f"trace={at[0]}", "-e", inject)
    else:
        process = child(do)
        time.sleep(at)
        os.kill(process, signal.SIGKILL)
        code = ended(process)
    assert code in (KILLED, 0), f"ended with {code} before it was killed"
    return code == KILLED


def paid_once(book: Path) -> bool:
    """Whether every item was asked for once, and answered."""
    entries = [json.loads(line) for line in (book / BOOK).read_text().splitlines()]
    asked = [e["item"] for e in entries if "label" not in e]
    labelled = {e["item"] for e in entries if "label" in e}
    return len(asked) == len(set(asked)) > 0 and set(asked) == labelled


def trials(job: Job) -> dict[str, Any]:
    """Kill, go on until it is finished, compare with what was never killed."""
    if job.plant:
        PLANTS[job.plant]()
    work = Work(job)
    if job.how == "failpoint":
        places: list[Any] = failpoint_places(work, job)
    else:
        places = call_places(work) if job.how == "call" else moments(work)
    wanted = work.digest("whole")
    draw = np.random.default_rng(job.seed)
    order = [*(draw.permutation(len(places) - 1) + 1).tolist(), 0]  # taken from the end
    failures, tries, slowest = [], 0, 0.0
    while tries < job.points and order:
        at, name = places[order.pop()], f"killed-{tries}"
        try:
            if job.book:
                shutil.rmtree(job.book, ignore_errors=True)
            if not kill(work, name, job.how, at):
                continue
            tries += 1
            start = time.monotonic()
            status = ended(child(lambda name=name: work.do(name)))  # type: ignore[misc]
            slowest = max(slowest, time.monotonic() - start)
            assert status == 0, f"went on and ended with {status}"
            assert work.digest(name) == wanted, "other bits"
            assert not job.book or paid_once(Path(job.book)), "paid twice"
        except AssertionError as error:
            failures.append(f"{job.how} {at}: {error}")
    return {"name": job.name, "tries": tries, "places": len(set(map(str, places))),
            "failures": failures, "slowest": slowest}  # fmt: skip


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    jobs = [Job(**job) for job in json.loads(sys.argv[1])]
    warm = Job("", [{"name": "fedavg"}], 0, 0, str(Path(jobs[0].folder) / "warm"))
    Work(warm).do("run")  # imports, and the data's cache
    for job in jobs:  # each in a process of its own: a plant stays in there
        code = ended(child_of(job))
        assert code == 0, f"{job.name} ended with {code}"


def child_of(job: Job) -> int:
    """Fork a process that does a job and prints what it found."""
    process = os.fork()
    if process == 0:
        try:
            print(json.dumps(trials(job)), flush=True)
            os._exit(0)
        except BaseException as error:
            print(f"{job.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return process


# ---------------------------------------------------------------------------------- planted faults


def _forget(part: str) -> Callable[[], None]:
    """Checkpoints lack a part."""

    def plant() -> None:
        save = Journal.save

        def without(self: Journal, snapshot: Any) -> None:
            setattr(snapshot, part, {})
            save(self, snapshot)

        Journal.save = without  # type: ignore[method-assign]

    return plant


def _in_place() -> None:
    """Checkpoints are written where they are read, and believed."""

    def write(self: Journal, path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            failpoints.crash_here("half written")
            file.write(data[len(data) // 2 :])

    Journal._write = write  # type: ignore[method-assign]
    journal._sound = Path.read_bytes


def _again() -> None:
    """A run that goes on enters its last round again."""
    restore = Run._restore

    def twice(self: Run, snapshot: Any) -> Any:
        progress = restore(self, snapshot)
        progress.clients += [r for r in progress.clients if r["round"] == progress.round]
        return progress

    Run._restore = twice  # type: ignore[method-assign]


def _litter() -> None:
    """Nobody removes what a killed writer left."""
    from fedsim.results import store

    store.remove_leftovers = lambda *folders: None
    api.remove_leftovers = lambda *folders: None  # type: ignore[attr-defined]


def _torn() -> None:
    """Files of a comparison are written where they are read."""

    def write(path: Path, fill: Callable[[Any], object]) -> None:
        with open(path, "wb") as file:
            failpoints.crash_here("torn")
            fill(file)

    files.write_atomic = write


PLANTS: dict[str, Callable[[], None]] = {
    "client states are not saved": _forget("clients"),
    "the strategy's state is not saved": _forget("strategy"),
    "files are written in place": _in_place,
    "clients are counted again": _again,
    "leftovers stay": _litter,
    "a comparison's files are written in place": _torn,
}

if __name__ == "__main__":
    main()
