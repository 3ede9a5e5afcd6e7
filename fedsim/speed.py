"""Times every executor on the strategies of an experiment: what `fedsim tune` prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedsim.client_app import ProgramApp
from fedsim.config import Experiment, StrategyConfig
from fedsim.core.errors import ConfigError
from fedsim.federation import Federation
from fedsim.runner import build_strategy
from fedsim.runtime.engine import Engine
from fedsim.runtime.grid import LocalGrid
from fedsim.runtime.threads import available_cores, one_thread
from fedsim.runtime.work import Environment

EXECUTORS = ("serial", "threads", "batched")
WARM_UP = 1
"""Rounds that do not count."""


@dataclass(frozen=True)
class Timing:
    """What one executor took for one strategy.

    Attributes:
        strategy: its label.
        executor: ``"serial"``, ``"threads"`` or ``"batched"``.
        workers: threads it had.
        seconds: of the fastest round, training and aggregation without evaluation; None if it
            cannot run this.
        clients: of a round.
        reason: how it ran, or why it cannot.
        automatic: whether ``executor = "auto"`` takes it.
    """

    strategy: str
    executor: str
    workers: int
    seconds: float | None
    clients: int
    reason: str
    automatic: bool


@dataclass(frozen=True)
class Speeds:
    """All timings of an experiment, and what follows.

    Attributes:
        timings: strategy by strategy.
        executor: the value of ``runtime.executor`` with which all strategies together are fastest.
        workers: the value of ``runtime.workers`` that goes with it.
        seconds: of one round of every strategy with these.
    """

    timings: tuple[Timing, ...]
    executor: str
    workers: int
    seconds: float

    @property
    def lines(self) -> str:
        """What to put into the experiment's file."""
        return f'[runtime]\nexecutor = "{self.executor}"\nworkers = {self.workers}'


def measure(
    experiment: Experiment,
    rounds: int = 2,
    seed: int | None = None,
    cores: int | None = None,
    on_timing: Callable[[Timing], None] | None = None,
) -> Speeds:
    """Run some rounds of every strategy with every executor, on one thread and on more.

    Nothing is written. Which executor is fastest depends on the machine and on what else it does;
    the numbers an executor gives do not.

    Args:
        experiment: the configuration.
        rounds: rounds that are timed, after one that warms up.
        seed: of the runs; None takes the first of the experiment.
        cores: threads to try at most; None takes the machine's.
        on_timing: told of every timing as it is there.

    Raises:
        FedsimError: the experiment cannot be run as it is.
    """
    seed = experiment.experiment.seeds[0] if seed is None else seed
    env = Environment.of(experiment, seed)
    found = []
    for entry in experiment.strategy:
        for timing in _timings(experiment, entry, seed, env, rounds, cores or available_cores()):
            found.append(timing)
            if on_timing is not None:
                on_timing(timing)
    return _best(experiment, found)


def _timings(
    experiment: Experiment,
    entry: StrategyConfig,
    seed: int,
    env: Environment,
    rounds: int,
    cores: int,
) -> Iterator[Timing]:
    automatic = _federation(experiment, entry, seed, env, "auto")[0].choice().executor
    for executor in EXECUTORS:
        fed, _ = _federation(experiment, entry, seed, env, executor)
        size = len(fed.trainers)
        try:
            choice = fed.choice()
        except ConfigError as error:
            yield Timing(entry.label, executor, 1, None, size, str(error), False)
            continue
        if choice.executor != executor:  # the program decides: it works on the one resident model
            yield Timing(entry.label, executor, 1, None, size, choice.reason, False)
            continue
        for workers in [1] if executor == "serial" else range(1, cores + 1):
            fed, app = _federation(experiment, entry, seed, env, executor)
            app.engine = Engine(env.model, env.data, choice, workers)
            try:
                seconds, clients = _rounds(fed, rounds)
            finally:
                app.engine.close()
            how = str(choice).partition(":")[0].partition(", ")[2]
            same = executor == automatic
            yield Timing(entry.label, executor, workers, seconds, clients, how, same)


def _federation(
    experiment: Experiment, entry: StrategyConfig, seed: int, env: Environment, executor: str
) -> tuple[Federation, ProgramApp]:
    """A federation in this process that evaluates nothing in its first rounds, and its clients."""
    changed = experiment.model_copy(
        update={
            "experiment": experiment.experiment.model_copy(update={"rounds": 10**6}),
            "evaluate": experiment.evaluate.model_copy(
                update={"central": False, "clients": True, "clients_every": None}
            ),
            "runtime": experiment.runtime.model_copy(update={"executor": executor}),
        }
    )
    app = ProgramApp(env)
    grid = LocalGrid(app, env.data.num_clients)
    return Federation(changed, entry, build_strategy(entry), seed, grid, env), app


@one_thread()
def _rounds(fed: Federation, rounds: int) -> tuple[float, int]:
    """Seconds of the fastest round, and how many clients it asked."""
    progress, taken = fed.begin(), []
    for _ in range(WARM_UP + rounds):
        start = time.perf_counter()
        fed.advance(progress)
        taken.append(time.perf_counter() - start)
    return min(taken[WARM_UP:]), int(progress.rounds[-1]["sampled"])


def _best(experiment: Experiment, timings: list[Timing]) -> Speeds:
    """The values with which a round of every strategy takes the least time in sum."""
    workers = sorted({t.workers for t in timings})
    sums = {}
    for executor in (*EXECUTORS, "auto"):
        for count in workers if executor != "serial" else [1]:
            each = [_with(timings, e.label, executor, count) for e in experiment.strategy]
            whole = [seconds for seconds in each if seconds is not None]
            if len(whole) == len(each):
                sums[executor, count] = sum(whole)
    # Where "auto" takes the fastest anyway, it is what to set: it holds on other machines too.
    executor, count = min(sums, key=lambda key: (sums[key], key[0] != "auto", key[1]))
    return Speeds(tuple(timings), executor, count, sums[executor, count])


def _with(timings: list[Timing], label: str, executor: str, workers: int) -> float | None:
    """Seconds of a strategy with this executor and so many workers; None if it cannot run."""
    for timing in timings:
        wanted = timing.automatic if executor == "auto" else timing.executor == executor
        alike = timing.executor == "serial" or timing.workers == workers
        if timing.strategy == label and wanted and alike and timing.seconds is not None:
            return timing.seconds
    return None
