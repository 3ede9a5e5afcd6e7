"""What the tests of deployments share: an experiment, devices to kill, what became of both."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from fedsim import api
from fedsim.config import Experiment, load_experiment
from fedsim.deploy import device, guard
from fedsim.deploy.loopback import Deployment
from fedsim.deploy.session import conduct
from fedsim.runner import Task

ROOT = Path(__file__).parents[2]
TOY = ROOT / "experiments" / "toy.toml"


def until(true: Callable[[], bool], seconds: float = 15.0) -> bool:
    """Wait for something; whether it came."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def attentive() -> None:
    """To be run in a new process: Ctrl-C reaches it, also if we were started to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes() -> Iterator[tuple[int, Path]]:
    """All that have not ended."""
    for place in Path("/proc").glob("[0-9]*"):
        if not guard.is_gone(int(place.name)):
            yield int(place.name), place


def alive(mark: str) -> list[int]:
    """Processes whose command line contains this."""
    found = []
    for pid, place in processes():
        with suppress(OSError):
            if mark in (place / "cmdline").read_text():
                found.append(pid)
    return found


def belonging(folder: Path) -> list[int]:
    """Processes that name a folder in their command line or environment."""
    mark, found = str(folder).encode(), []
    for pid, place in processes():
        with suppress(OSError):
            if mark in (place / "cmdline").read_bytes() + (place / "environ").read_bytes():
                found.append(pid)
    return [pid for pid in found if pid != os.getpid()]


def children(pids: list[int]) -> list[int]:
    """Direct children."""
    found = []
    for pid, place in processes():
        with suppress(OSError, ValueError):
            if int((place / "stat").read_text().rpartition(")")[2].split()[1]) in pids:
                found.append(pid)
    return found


def toy(*overrides: str) -> Experiment:
    """The toy."""
    return load_experiment(TOY, overrides)


def task_of(experiment: Experiment, out: Path, strategy: str = "scaffold", seed: int = 0) -> Task:
    """One run of an experiment."""
    return Task(experiment, api.find_strategy(experiment, strategy), seed, out)


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of what must be the same wherever a run was made; Ray's clients keep a folder too."""
    names = ["rounds.parquet", "clients.parquet"]
    names += [str(p.relative_to(folder)) for p in sorted(folder.glob("**/*.safetensors"))]
    kept = [n for n in names if not n.startswith(("checkpoints", "client-state"))]
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in kept}


def rows(folder: Path, table: str = "clients") -> list[dict[str, Any]]:
    """A table of a run folder."""
    return parquet.read_table(folder / f"{table}.parquet").to_pylist()


def reached(out: Path, server_round: int) -> bool:
    """Whether a run has a checkpoint of that round, or of a later one."""
    names = [p.name for p in out.glob("checkpoints/round-*-*.safetensors")]
    return max((int(n.split("-")[1]) for n in names), default=-1) >= server_round


@dataclass
class Background:
    """A run on a deployment, in a thread."""

    deployment: Deployment
    task: Task
    faults: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            conduct(self.deployment, self.task)
        except BaseException as fault:
            self.faults.append(fault)

    def finish(self, seconds: float = 600.0) -> Path:
        """Wait for its end; the run folder."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the run hangs"
        assert not self.faults, self.faults
        return self.task.path


@dataclass
class Edge:
    """A device of its own, started and stopped as its owner would, killed as by a power cut."""

    folder: Path
    deployment: Deployment

    @property
    def log(self) -> str:
        """What its SuperNodes have said."""
        file = self.folder / "supernode.log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def joined(self) -> int:
        """How often the server has let it in."""
        node = device.node_id_in(self.log)
        log = (self.deployment.group.logs / "superlink.log").read_text(errors="replace")
        return log.count(f"Activated node_id={node}\n") if node else 0

    def tasks(self, kind: str = "train") -> int:
        """How many messages of a kind it has taken."""
        return self.log.count(f"Receiving: {kind}")

    def start(self) -> None:
        """``fedsim device start``."""
        device.start(self.folder)

    def pids(self) -> list[int]:
        """All of its processes, the guard among them."""
        found = belonging(self.folder)
        return sorted({*found, *children(found)})

    def cut(self) -> None:
        """Kill everything at once."""
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send all of its processes a signal."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def back(self, before: int, seconds: float = 60.0) -> None:
        """Wait until the server has let it in once more than before."""
        assert until(lambda: self.joined > before, seconds), "it is not back"


@contextmanager
def federation(folder: Path, devices: int) -> Iterator[tuple[Deployment, list[Edge]]]:
    """A deployment with devices started by their owners; nothing of it is left in the end."""
    made = Deployment(folder)
    edges = [Edge(made.device(i, devices), made) for i in range(devices)]
    try:
        made.start()
        made.register([e.folder / "key.pub" for e in edges])
        for edge in edges:
            edge.start()
        assert until(lambda: all(e.joined for e in edges), 90), "the devices did not come in"
        yield made, edges
    finally:
        for edge in edges:
            edge.signal(signal.SIGCONT)
            device.stop(edge.folder)
        made.close()
        assert until(lambda: not belonging(made.folder), 5), "something was left over"
