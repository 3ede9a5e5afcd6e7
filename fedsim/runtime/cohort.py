"""Runs the programs of a cohort."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedsim.core import rng
from fedsim.core.model import FlatModel
from fedsim.core.program import Batch, Gradient, LocalProgram, LocalState
from fedsim.core.records import FlatRecord
from fedsim.data import FederatedData


@dataclass(frozen=True)
class Job:
    """One client's work in one round.

    Attributes:
        program: what to do.
        client: partition number of the client.
        round: number of the round, from 1.
        seed: seed of the run.
        record: the model to start from, every entry of the model's layout.
        received: other vectors from the server, by name, shape [p].
        kept: vectors the client kept, by name, shape [p].
    """

    program: LocalProgram
    client: int
    round: int
    seed: int
    record: FlatRecord
    received: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a client's work gave.

    Attributes:
        client: partition number of the client.
        record: the client's model after its work.
        sent: other vectors for the server, by name, shape [p].
        kept: vectors to keep on the client, by name, shape [p].
        metrics: numbers for the server; `loss` is the mean training loss over the steps.
        num_examples: training examples of the client.
        num_steps: local steps done.
    """

    client: int
    record: FlatRecord
    sent: dict[str, Tensor]
    kept: dict[str, Tensor]
    metrics: dict[str, float]
    num_examples: int
    num_steps: int


def batches_of(
    program: LocalProgram, index: np.ndarray, stream: np.random.Generator
) -> list[tuple[np.ndarray, int]]:
    """The minibatches of one client's round: (example indices, epoch) for each step.

    Args:
        program: gives epochs, batch size and the limit on steps.
        index: the client's training examples.
        stream: the client's stream for this round; one permutation is drawn per epoch.
    """
    steps: list[tuple[np.ndarray, int]] = []
    for epoch in range(program.epochs):
        order = stream.permutation(index)
        for first in range(0, len(order), program.batch_size):
            if program.max_steps and len(steps) == program.max_steps:
                return steps
            steps.append((order[first : first + program.batch_size], epoch))
    return steps


class SerialState(LocalState):
    """A `LocalState` for one client, over a resident model."""

    def __init__(self, job: Job, model: FlatModel) -> None:
        super().__init__()
        self._model, self._program = model, job.program
        self._flat = job.record.flat.clone()
        self._trainable = model.layout.num_trainable
        self.beside = {n: t.clone() for n, t in job.record.beside.items()}
        self.start = job.record.flat[: self._trainable]
        self.received, self.kept = dict(job.received), dict(job.kept)
        for name in job.program.keeps:
            self.kept.setdefault(name, torch.zeros_like(self.start))
        self.round = job.round
        self.losses: list[Tensor] = []

    @property
    def w(self) -> Tensor:  # type: ignore[override]
        return self._flat[: self._trainable]

    @w.setter
    def w(self, value: Tensor) -> None:
        self._flat[: self._trainable] = value

    def gradient(self, batch: Batch, at: Tensor | None = None, training: bool = True) -> Gradient:
        flat, beside = self._flat, self.beside
        if at is not None:
            flat = flat.clone()
            flat[: self._trainable] = at
            beside = {n: t.clone() for n, t in beside.items()}

        def loss(outputs: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
            return self._program.loss(self._model.criterion, outputs, target, weight)

        value, gradient = self._model.gradient(flat, beside, batch.fields, loss, training)
        self.losses.append(value)
        return Gradient(gradient)

    def record(self) -> FlatRecord:
        return FlatRecord(self._model.layout, self._flat, self.beside)


def run_one(job: Job, model: FlatModel, data: FederatedData) -> Outcome:
    """Do one client's work on a resident model: the reference that other executors must match."""
    program, index = job.program, data.train[job.client]
    steps = batches_of(program, index, rng.stream(job.seed, job.round, job.client, "batches"))
    s = SerialState(job, model)
    s.num_steps, s.num_examples = len(steps), len(index)
    program.init(s)
    for number, (rows, epoch) in enumerate(steps):
        taken = torch.from_numpy(rows)
        batch = Batch({n: t[taken] for n, t in data.fields.items()}, epoch, number)
        program.step(s, batch)
    program.final(s)
    losses = torch.stack(s.losses).mean().item() if s.losses else float("nan")
    return Outcome(
        job.client,
        s.record(),
        s.sent,
        s.kept,
        {"loss": losses, **{n: float(v) for n, v in s.metrics.items()}},
        len(index),
        len(steps),
    )


class Cohort:
    """Executes jobs one after another on one resident model, in the order given."""

    name = "serial"

    def __init__(self, model: FlatModel, data: FederatedData) -> None:
        self.model, self.data = model, data

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Yield the outcome of each job as it is done."""
        for job in jobs:
            yield self._isolated(job)

    def _isolated(self, job: Job) -> Outcome:
        if not self.model.stochastic:
            return run_one(job, self.model, self.data)
        with rng.isolated(rng.key(job.seed, job.round, job.client, "module")):
            return run_one(job, self.model, self.data)

    def measure(self, jobs: Sequence[Job], batch_size: int) -> Iterator[tuple[float, float, int]]:
        """Judge each job's model on its client's held-out examples.

        A program that personalises trains first, from the job's model.

        Yields:
            mean loss, share of positions predicted right, number of held-out examples.
        """
        for job in jobs:
            record, tuning = job.record, job.program.personalise()
            if tuning is not None:
                record = self._isolated(
                    Job(tuning, job.client, job.round, job.seed, record, kept=job.kept)
                ).record
            index = torch.from_numpy(self.data.test[job.client])
            loss, right, count = (
                self.model.measure(record, self.data.fields, index, batch_size).sum(1).tolist()
            )
            total = max(count, 1.0)
            yield loss / total, right / total, len(index)
