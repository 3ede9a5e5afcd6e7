"""What an experiment would do and cost, before it is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from fedsim.client_app import ProgramApp
from fedsim.collector import RoundAbandoned
from fedsim.config import ClockConfig, Experiment
from fedsim.core.errors import RunError
from fedsim.core.records import count_bytes
from fedsim.federation import Federation
from fedsim.intake import Tally
from fedsim.runner import build_strategy
from fedsim.runtime.grid import LocalGrid, View
from fedsim.runtime.threads import one_thread
from fedsim.runtime.work import Environment
from fedsim.tuning import candidates


@dataclass(frozen=True)
class Cost:
    """What one strategy costs in the plan.

    Attributes:
        label: the strategy.
        bytes_down: bytes to the cohort in one round.
        bytes_up: bytes back.
        seconds: estimated seconds of one run on this machine.
    """

    label: str
    bytes_down: int
    bytes_up: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What an experiment would do.

    Attributes:
        name: of the experiment.
        runs: number of runs, tuning included.
        rounds: rounds per run.
        clients: size of the population.
        cohort: clients asked per round.
        examples: min, median and max of training examples per client.
        test_examples: size of the central test set.
        parameters: trainable parameters of the model.
        costs: one entry per strategy.
        seconds: estimated seconds of all runs on this machine.
    """

    name: str
    runs: int
    rounds: int
    clients: int
    cohort: int
    examples: tuple[int, float, int]
    test_examples: int
    parameters: int
    costs: tuple[Cost, ...]
    seconds: float


PROBED = 3
"""Clients of each strategy that the plan times; the first one warms up and does not count."""


@one_thread()
def plan(experiment: Experiment) -> Plan:
    """What an experiment would do and cost; the time is measured on some clients of each strategy.

    Raises:
        FedsimError: the experiment cannot be run as it is.
    """
    seed = experiment.experiment.seeds[0]
    env = Environment.of(experiment, seed)
    rounds, costs, cohort = experiment.experiment.rounds, [], 0
    punctual = experiment.model_copy(update={"clock": ClockConfig()})  # the probe needs replies
    for entry in experiment.strategy:
        alone = entry.pooled or entry.model
        own = Environment.of(experiment, seed, entry) if alone else env
        grid = LocalGrid(ProgramApp(own), own.data.num_clients)
        fed = Federation(punctual, entry, build_strategy(entry), seed, grid, own)
        start = time.perf_counter()
        progress = fed.begin()
        evaluation = time.perf_counter() - start
        nodes, _ = fed.cohort(1)
        cohort = max(cohort, len(nodes))
        messages = next(fed.strategy.exchange(1, progress.arrays, fed.told(1), View(grid, nodes)))
        reply, one = _probe(fed, messages[:PROBED], entry.label)
        down = sum(count_bytes(m.content) for m in messages)
        costs.append(
            Cost(
                entry.label,
                down,
                count_bytes(reply.content) * len(messages),
                rounds * (len(nodes) * one + evaluation / experiment.evaluate.every),
            )
        )
    seeds = len(experiment.experiment.seeds)
    variants = 1 if experiment.sweep is None else len(experiment.sweep.values)
    tuning = _tuning_runs(experiment)
    lengths = env.data.train.lengths
    return Plan(
        experiment.experiment.name,
        variants * (seeds * len(costs) + sum(tuning)),
        rounds,
        env.data.num_clients,
        cohort,
        (int(lengths.min()), float(np.median(lengths)), int(lengths.max())),
        len(env.data.central_test),
        env.model.layout.num_trainable,
        tuple(costs),
        variants * sum(c.seconds * (seeds + t) for c, t in zip(costs, tuning, strict=True)),
    )


def _probe(fed: Federation, messages: Sequence[Message], label: str) -> tuple[Message, float]:
    """A reply to one of these messages, and the seconds that a client takes.

    Raises:
        RunError: the gate lets none of the replies in, as it would in every round.
    """
    tally, more = Tally(1, fed.env.data.client_names), -1
    start, reply = 0.0, None
    with suppress(RoundAbandoned):  # a few clients are no quorum
        for more, reply in enumerate(fed.collector.admitted(messages, tally, 0)):  # noqa: B007
            start = start or time.perf_counter()
    if reply is None:
        reason = next((r["reason"] for r in tally.rows.values() if r.get("reason")), "no reply")
        code, _, detail = reason.partition(": ")
        if code == "error_reply":
            raise RunError(f"{label}: its clients fail, as they would in every round: {detail}")
        raise RunError(
            f"{label}: what its clients send back is refused ({reason}), so that every round would "
            "be abandoned; try a smaller train.lr, or look at the parameters of the strategy"
        )
    return reply, (time.perf_counter() - start) / max(more, 1)


def _tuning_runs(experiment: Experiment) -> list[int]:
    if experiment.tune is None:
        return [0] * len(experiment.strategy)
    seeds = len(experiment.tune.seeds)
    return [len(candidates(experiment, entry)) * seeds for entry in experiment.strategy]
