"""One run: one strategy, one seed, one folder."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from flwr.app import ArrayRecord, RecordDict
from safetensors.torch import save

from fedsim import registry
from fedsim.client_app import ProgramApp
from fedsim.columns import Chunk, Rows
from fedsim.config import Experiment, StrategyConfig
from fedsim.core.adapter import adapt
from fedsim.core.errors import FedsimError, RunError
from fedsim.core.events import Event, Notice, RoundFinished, RunFinished, RunStarted
from fedsim.core.packing import content_of, tree_of
from fedsim.core.records import as_flat, from_record, to_record
from fedsim.core.strategy import Strategy
from fedsim.failpoints import crash_here
from fedsim.federation import Federation, Progress
from fedsim.journal import Journal, Snapshot
from fedsim.ledger import Ledger
from fedsim.models.exporting import save_adapter, source_of
from fedsim.results import Run as Folder
from fedsim.results import RunWriter, environment
from fedsim.results.clients import untrained
from fedsim.results.files import write_atomic
from fedsim.runtime.choose import ON_NODES, Choice
from fedsim.runtime.engine import Engine
from fedsim.runtime.grid import LocalGrid
from fedsim.runtime.remote import RemoteGrid
from fedsim.runtime.threads import available_cores, one_thread
from fedsim.runtime.work import Environment, client_of

OnEvent = Callable[[Event], None]
LEDGER = "ledger.bin"
"""Name of the ledger in the run folder, for strategies that keep one."""
TABLES_EVERY = 5.0
"""Seconds between writes of the tables while a run goes on; the journal has every round."""


@dataclass(frozen=True)
class Task:
    """What to run and where.

    Attributes:
        experiment: the whole configuration.
        entry: the strategy.
        seed: the seed.
        path: the run folder.
        index: number of this run in a comparison, from 1.
        total: number of runs in the comparison.
        workers: threads it may take; 0: as many as the experiment says.
    """

    experiment: Experiment
    entry: StrategyConfig
    seed: int
    path: Path
    index: int = 1
    total: int = 1
    workers: int = 0

    @property
    def name(self) -> str:
        """Name of the run in messages."""
        return self.path.name

    def config(self, choice: Choice, fingerprint: str) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "experiment": self.experiment.model_dump(mode="json"),
            "strategy": self.entry.model_dump(mode="json"),
            "seed": self.seed,
            "executor": choice.executor,
            "engine": choice.config(),
            "data_fingerprint": fingerprint,
        }


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        path: its folder.
        label: label of the strategy.
        seed: its seed.
        metrics: the last value of every column of the rounds table.
    """

    path: Path
    label: str
    seed: int
    metrics: dict[str, float]


def build_strategy(entry: StrategyConfig) -> Strategy:
    """The server half of a configured strategy.

    Raises:
        ConfigError: there is no such strategy, or it refuses its parameters.
    """
    made = registry.resolve("strategies", entry.name)(**entry.params)
    strategy = adapt(made, client_of(entry.name, entry.client))
    if entry.client:
        strategy.client = entry.client  # type: ignore[misc]
    return strategy


def saved_config(path: Path) -> dict[str, Any] | None:
    """The `config.json` of a run folder, or None if the folder is no run."""
    file = path / "config.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {error}") from None
    return content or None


class Run:
    """Executes one task, from the start or from its last checkpoint.

    Whoever makes it holds the lock of the run folder.

    Args:
        task: what to run.
        on_event: told of every start, round and end.
        grid: where clients are; None makes a grid in this process.
        env: data and model on the server's side; None loads them.
    """

    def __init__(
        self,
        task: Task,
        on_event: OnEvent | None = None,
        grid: LocalGrid | RemoteGrid | None = None,
        env: Environment | None = None,
    ) -> None:
        self.task = task
        self._tell: OnEvent = on_event or (lambda event: None)
        self.env = env or Environment.of(task.experiment, task.seed, task.entry)
        self._app = ProgramApp(self.env)
        self.grid = grid or LocalGrid(self._app, self.env.data.num_clients)
        self.federation = Federation(
            task.experiment, task.entry, build_strategy(task.entry), task.seed, self.grid, self.env
        )
        self.writer = RunWriter(task.path)
        self.journal = Journal(task.path / "checkpoints", task.experiment.journal.keep)
        self.ledger = Ledger(task.path / LEDGER)
        self._tables_written = time.monotonic()

    @property
    def _rounds(self) -> int:
        return self.task.experiment.experiment.rounds

    @property
    def _budget(self) -> int:
        return self.task.experiment.runtime.state_budget

    @one_thread()
    def execute(self, resume: bool = False) -> RunResult:
        """Run all rounds that are left.

        Args:
            resume: go on from the last checkpoint where there is one.

        Raises:
            RunError: the run cannot go on; what is finished stays on disk.
        """
        snapshot = self.journal.load() if resume else None
        choice = self._choice(snapshot is not None)
        if snapshot is None:
            self.writer.write_config(self.task.config(choice, self.env.data.fingerprint))
            self.writer.write_environment(environment())
            if isinstance(self.grid, LocalGrid):
                self.journal.clear()
            self.ledger.keep_until(0)
            crash_here("run.begun")
        self._tell(
            RunStarted(
                self.task.name,
                self.task.entry.label,
                self.task.seed,
                self._rounds,
                self.task.index,
                self.task.total,
                self.task.experiment.evaluate.metric,
            )
        )
        self._tell(Notice(self.task.name, str(choice)))
        workers = self.task.workers or self.task.experiment.runtime.workers or available_cores()
        self._app.engine = Engine(self.env.model, self.env.data, choice, workers)
        progress = self._restore(snapshot) if snapshot else self._begin()
        try:
            self._loop(progress)
        except KeyboardInterrupt:
            self._stop(progress, "interrupted", "interrupted by the user")
            raise
        except BaseException as error:
            self._stop(progress, "failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self._app.engine.close()
        return self._finish(progress)

    def _choice(self, resumed: bool) -> Choice:
        """The executor: that of the run's first start, or the one for this model and program."""
        if resumed:
            return Choice(**(saved_config(self.task.path) or {}).get("engine", {}))
        if not isinstance(self.grid, LocalGrid):
            return ON_NODES
        return self.federation.choice()

    def _begin(self) -> Progress:
        self._status("running", 0)
        progress = self.federation.begin()
        self._save(progress)
        return progress

    def _loop(self, progress: Progress) -> None:
        every = self.task.experiment.journal.every
        while progress.round < self._rounds:
            crash_here("round.begin")
            self.federation.advance(progress)
            crash_here("round.end")
            self.federation.check_finite(progress)
            due = progress.round % every == 0 or progress.round == self._rounds
            if due or self._crowded():
                self._save(progress)
            row = progress.rounds[-1]
            self._tell(
                RoundFinished(
                    self.task.name,
                    progress.round,
                    self._rounds,
                    numbers(row),
                    row["admitted"],
                    row["bytes_up"],
                    row["bytes_down"],
                    progress.timings[-1]["wall_seconds"],
                )
            )

    def _crowded(self) -> bool:
        """Whether clients' states that no checkpoint has yet take more memory than they may."""
        return isinstance(self.grid, LocalGrid) and self.grid.unsaved > self._budget

    def _save(self, progress: Progress) -> None:
        states = {str(node): tree_of(state) for node, state in self.grid.changed_states().items()}
        self.ledger.append(progress.ledger)
        progress.ledger.clear()
        self.journal.save(
            Snapshot(
                progress.round,
                from_record(progress.arrays),
                self.federation.strategy.state_dict(),
                states,
                progress.rounds,
                progress.clients,
                progress.timings,
            )
        )
        if isinstance(self.grid, RemoteGrid):
            self.grid.floor = self.journal.floor
        else:
            self.grid.spill(_States(self.journal.states), self._budget)
        if time.monotonic() - self._tables_written > TABLES_EVERY:
            self.writer.write_tables(progress.rounds, progress.clients, progress.timings)
            self._tables_written = time.monotonic()

    def _restore(self, snapshot: Snapshot) -> Progress:
        self.ledger.keep_until(snapshot.round)
        initial = self.env.model.initial()
        names = set(snapshot.server)
        arrays: ArrayRecord = to_record(snapshot.server)
        if names == set(initial.layout.names):
            arrays = as_flat(arrays, initial.layout)
        self.federation.strategy.load_state_dict(snapshot.strategy)
        self.grid.load_states(_States(snapshot.clients))
        if isinstance(self.grid, RemoteGrid):
            self.grid.floor = self.journal.floor
        self._status("running", snapshot.round)
        clients = snapshot.client_rows
        clients = clients if isinstance(clients, Rows) else Rows([Chunk.of(clients)])
        progress = Progress(snapshot.round, arrays, snapshot.rounds, clients, snapshot.timings)
        self.federation.recall(progress)
        return progress

    def _status(self, state: str, done: int, reason: str | None = None) -> None:
        self.writer.write_status(
            {"state": state, "round": done, "rounds": self._rounds, "reason": reason}
        )

    def _stop(self, progress: Progress, state: str, reason: str) -> None:
        with suppress(FedsimError):  # what stopped the run is the error to show
            self._status(state, progress.round, reason)
            self.writer.write_tables(progress.rounds, progress.clients, progress.timings)

    def _finish(self, progress: Progress) -> RunResult:
        self.writer.write_tables(progress.rounds, progress.clients, progress.timings)
        crash_here("run.tables")
        models = self.federation.final_models(progress)
        save_models(self.task.path, models)
        module, layout = self.env.model.module, self.env.model.layout
        base = source_of(self.task.experiment.model.model_dump(mode="json"))
        save_adapter(self.task.path / "adapter", module, models, layout, base)
        save_artefacts(self.task.path, self.federation.artefacts())
        crash_here("run.models")
        self._status("finished", progress.round)
        abandoned = all(row["abandoned"] for row in progress.rounds[1:])
        if abandoned and (reason := untrained(Folder.load(self.task.path))):
            self._tell(Notice(self.task.name, f"{reason}; the model is the one it started from"))
        metrics = numbers(progress.rounds[-1])
        self._tell(RunFinished(self.task.name, str(self.task.path), metrics))
        return RunResult(self.task.path, self.task.entry.label, self.task.seed, metrics)


class _States(Mapping[int, RecordDict]):
    """Clients' states by node, each unpacked when it is asked for.

    Args:
        saved: nested states by node, as a checkpoint holds them.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self._saved = saved

    def __getitem__(self, node: int) -> RecordDict:
        return content_of(self._saved[str(node)])

    def __iter__(self) -> Iterator[int]:
        return map(int, self._saved)

    def __len__(self) -> int:
        return len(self._saved)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numeric columns of a row."""
    return {n: float(v) for n, v in row.items() if isinstance(v, (int, float)) and n != "round"}


def save_models(path: Path, models: dict[str, dict[str, Any]]) -> None:
    """Write `model.safetensors`, or `models/NAME.safetensors` where there are several."""
    for name, state in models.items():
        file = path / "model.safetensors"
        if len(models) > 1:
            file = path / "models" / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.safetensors"
            file.parent.mkdir(exist_ok=True)
        data = save({n: t.contiguous().clone() for n, t in state.items()})
        write_atomic(file, partial(_fill, data))


def save_artefacts(path: Path, artefacts: dict[str, Any]) -> None:
    """Write `artefacts/NAME.json` for each of them."""
    for name, content in artefacts.items():
        file = path / "artefacts" / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.json"
        file.parent.mkdir(exist_ok=True)
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        write_atomic(file, partial(_fill, text.encode()))


def _fill(data: bytes, file: BinaryIO) -> None:
    file.write(data)
