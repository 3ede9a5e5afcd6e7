"""A server's program that died is followed by another before Flower is told to stop the dead run.

No process is started: a script says at each look of `Deployment.run` what the next one finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fedsim.deploy import loopback
from fedsim.deploy.loopback import Deployment

LIVING = {2, 3}
"""Processes of servers' programs that have not ended; 1 has."""


class Process:
    """A command of Flower's that has ended once its code is set."""

    def __init__(self) -> None:
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code


class Commands:
    """In the place of `Group`: starts nothing, and notes what would have been started when."""

    def __init__(self, logs: Path, held: object = ()) -> None:
        self.logs, self.story = logs, list[str]()
        self.running: dict[str, Any] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, arguments: list[str], **_: object) -> Process:
        what, *more = arguments[1:]
        runs = sum(step.startswith("run") for step in self.story) + 1
        self.story.append(f"stop {more[0]}" if what == "stop" else f"run {runs}")
        said = f"Successfully started run {40 + runs}\n" if what == "run" else ""
        (self.logs / f"{name}.log").write_text(said)
        self.running[name] = Process()
        return self.running[name]  # type: ignore[no-any-return]

    def end(self, name: str) -> None:
        self.running.pop(name)


class Stage:
    """A deployment whose world moves on only while `Deployment.run` sleeps."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loopback, "Group", Commands)
        monkeypatch.setattr(loopback, "certificates", lambda *_: None)
        monkeypatch.setattr(loopback, "is_gone", lambda pid: pid not in LIVING)
        monkeypatch.setattr(loopback.time, "sleep", lambda _: self.step())
        self.out = folder / "run"
        self.out.mkdir()
        self.deployment = Deployment(folder / "federation")
        self.commands: Any = self.deployment.group
        self._script: list[Callable[[], object]] = []

    @property
    def story(self) -> list[str]:
        return list(self.commands.story)

    def run(self, script: Iterable[Callable[[], object]]) -> None:
        """One start of the server's program, through this script."""
        self._script = list(script)
        assert self.deployment.run({}, self.out) is None
        assert not self._script, "it looked away too early"

    def step(self) -> None:
        self._script.pop(0)()

    def owner(self, process: int) -> Callable[[], object]:
        """The run folder is taken by this process."""

        def take() -> None:
            (self.out / ".lock").write_text(f"process {process}")
            self.commands.story.append(f"{process} is {'up' if process in LIVING else 'dead'}")

        return take

    def nothing(self) -> None:
        """Nothing happens between two looks."""
        self.commands.story.append("wait")

    def done(self) -> None:
        """The running command ends by itself, all being well."""
        next(p for n, p in self.commands.running.items() if "-run-" in n).code = 0


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def test_a_dead_run_is_stopped_when_its_successor_is_up(stage: Stage) -> None:
    stage.run([stage.nothing, stage.owner(1)])
    assert stage.story == ["run 1", "wait", "1 is dead"], "nobody is up yet"
    stage.run([stage.nothing, stage.owner(2), stage.nothing, stage.done])
    assert stage.story[3:] == ["run 2", "wait", "2 is up", "stop 41", "wait"], "and once only"


def test_dead_runs_add_up_until_one_is_up(stage: Stage) -> None:
    """The second program dies, too, after Flower had taken it and before it held the folder."""
    stage.run([stage.owner(1)])
    stage.deployment.look_after = lambda: ["superlink"]  # type: ignore[method-assign]
    stage.commands.until = lambda *_: None
    stage.run([])
    del stage.deployment.look_after  # type: ignore[method-assign]
    assert stage.story == ["run 1", "1 is dead", "run 2"]
    stage.run([stage.owner(3), stage.done])
    assert stage.story[3:] == ["run 3", "3 is up", "stop 41", "stop 42"]


def test_a_stop_at_once_is_found(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would look like if the dead run was stopped as soon as its end is seen."""
    numbers = stage.deployment._numbers

    def at_once(name: str) -> list[str]:
        for number in numbers(name):
            stage.deployment.flwr("stop", number, "here")
        return []

    monkeypatch.setattr(stage.deployment, "_numbers", at_once)
    stage.run([stage.owner(1)])
    stage.run([stage.owner(2), stage.done])
    story = stage.story
    assert story.index("stop 41") < story.index("2 is up")
