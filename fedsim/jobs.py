"""Runs of a comparison, one after another or several at a time, each in a process of its own.

A process (`fedsim.worker`) is told its task in one line of JSON and says what happens in others. It
ends when the pipe to its parent closes, so that none is left behind by a parent that was killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fedsim.config import StrategyConfig, parse
from fedsim.core.errors import ConfigError, DataError, FedsimError, RunError, require
from fedsim.core.events import Notice, RoundFinished, RunFinished, RunStarted
from fedsim.runner import OnEvent, RunResult, Task
from fedsim.runtime.threads import available_cores


class _Elsewhere(Exception):
    """What was raised in another process, with its traceback."""


Outcome = RunResult | FedsimError
"""What came of a task; an error is that task's alone."""
Execute = Callable[[Task, OnEvent | None], RunResult]
EVENTS = {kind.__name__: kind for kind in (RunStarted, RoundFinished, RunFinished, Notice)}
ERRORS = {kind.__name__: kind for kind in (ConfigError, DataError, RunError)}
GRACE = 10.0
"""Seconds that a process has to write down how far it got when it is to end."""
WORKER = [sys.executable, "-P", "-m", "fedsim.worker"]
ROOT = str(Path(__file__).parents[1])
"""Where fedsim is imported from, wherever that may be."""


class Jobs:
    """Runs tasks, here or in processes that take one after another.

    Every process takes its share of the cores, unless ``runtime.workers`` says otherwise; that
    changes no bit. Processes that are left when the block ends note how far they got.

    Args:
        count: tasks at a time; 1 runs them in this process.
        execute: runs a task in this process.
        on_event: told of every start, round and end, in this thread.

    Raises:
        ConfigError: `count` is below 1.
    """

    def __init__(self, count: int, execute: Execute, on_event: OnEvent | None = None) -> None:
        require(count >= 1, "jobs", count, "1 or above")
        self.count, self._execute, self._on_event = count, execute, on_event
        self._said: SimpleQueue[tuple[_Process, dict[str, Any]]] = SimpleQueue()
        self._idle: list[_Process] = []
        self._busy: dict[_Process, int] = {}

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        processes = [*self._idle, *self._busy]
        for process in processes:
            process.close()
        until = time.monotonic() + GRACE
        for process in processes:
            process.end(until)

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """What came of each task, in their order.

        Raises:
            ConfigError: a task cannot be run as it is, or not several at a time.
            RuntimeError: a process met a bug; the cause has its traceback.
        """
        if self.count == 1:
            yield from self._here(tasks)
            return
        for task in tasks:
            if task.experiment.runtime.name != "local":
                raise ConfigError(
                    f"jobs = {self.count} needs runtime.name = 'local': Flower's simulation "
                    "engine has processes of its own; give jobs = 1"
                )
        waiting, done = deque(range(len(tasks))), dict[int, Outcome]()
        for number in range(len(tasks)):
            while number not in done:
                while waiting and len(self._busy) < self.count:
                    self._give(tasks, waiting.popleft())
                who, said = self._said.get()
                outcome = self._heard(tasks, who, said)
                if outcome is not None:
                    done[self._busy.pop(who)] = outcome
            yield done.pop(number)

    def _here(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        for task in tasks:
            try:
                yield self._execute(task, self._on_event)
            except ConfigError:
                raise
            except FedsimError as error:
                yield error

    def _give(self, tasks: Sequence[Task], number: int) -> None:
        process = self._idle.pop() if self._idle else _Process(self._said)
        self._busy[process] = number
        process.write(written(tasks[number], max(1, available_cores() // self.count)))

    def _heard(self, tasks: Sequence[Task], who: _Process, said: dict[str, Any]) -> Outcome | None:
        """Take note of what a process says; the outcome of its task if it is one."""
        if who not in self._busy:  # it ended after its last task
            self._idle.remove(who)
            return None
        task = tasks[self._busy[who]]
        if "event" in said:
            if self._on_event is not None:
                self._on_event(EVENTS[said.pop("event")](**said))
            return None
        if "ended" in said:
            return RunError(_lost(task, said["ended"]))
        if "bug" in said:
            cause = _Elsewhere(f"\n{said['traceback']}")
            raise RuntimeError(f"run {task.name} failed: {said['bug']}") from cause
        self._idle.append(who)
        return _outcome(said)


class _Process:
    """A process that runs tasks; what it says is put into a queue, its end too.

    Args:
        said: the queue.
    """

    def __init__(self, said: SimpleQueue[tuple[_Process, dict[str, Any]]]) -> None:
        path = filter(None, (os.environ.get("PYTHONPATH"), ROOT))
        self._process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            process_group=0,  # Ctrl-C is the parent's to handle
        )
        threading.Thread(target=self._listen, args=(said,), daemon=True).start()

    def _listen(self, said: SimpleQueue[tuple[_Process, dict[str, Any]]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said.put((self, json.loads(line)))
        said.put((self, {"ended": self._process.wait()}))

    def write(self, line: str) -> None:
        """Tell it something; if it has ended, that is said elsewhere."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def close(self) -> None:
        """Have it end."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def end(self, until: float) -> None:
        """Wait for its end until then (of `time.monotonic`), and no longer."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _lost(task: Task, status: int) -> str:
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"the process of {task.name} ended with {how}; fedsim resume goes on with it"


def _outcome(said: dict[str, Any]) -> Outcome:
    if "failed" in said:
        error = ERRORS[said["failed"]](said["text"])
        if isinstance(error, ConfigError):
            raise error
        return error
    return RunResult(Path(said["path"]), said["label"], said["seed"], said["metrics"])


def written(task: Task, share: int) -> str:
    """A task as one line of JSON.

    Args:
        task: the task.
        share: threads it may take where the experiment does not say.
    """
    content = {
        "experiment": task.experiment.model_dump(mode="json"),
        "entry": task.entry.model_dump(mode="json"),
        "seed": task.seed,
        "path": str(task.path),
        "index": task.index,
        "total": task.total,
        "workers": 0 if task.experiment.runtime.workers else share,
    }
    return json.dumps(content) + "\n"


def read(line: str) -> Task:
    """The task of such a line.

    Raises:
        ConfigError: its experiment is not possible.
    """
    content = json.loads(line)
    experiment = parse(content.pop("experiment"), "the comparison's experiment")
    entry = StrategyConfig.model_validate(content.pop("entry"))
    return Task(experiment, entry, path=Path(content.pop("path")), **content)
