"""One client after another on one resident model: the reference, and the debugger's friend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.core import rng
from fedsim.core.bulk import Rows
from fedsim.core.model import FlatModel
from fedsim.core.program import Batch, Gradient, LocalState
from fedsim.core.records import FlatRecord, Layout
from fedsim.data import FederatedData
from fedsim.runtime.cohort import Outcomes, Work
from fedsim.runtime.plan import Plan, plans

T = TypeVar("T")


class Fields(Mapping[str, Tensor]):
    """Some examples of all fields; a field is gathered when first asked for.

    Args:
        fields: all examples.
        rows: numbers of the examples, int64 of any shape; it becomes the leading shape.
        more: fields that are there already.
    """

    def __init__(
        self, fields: Mapping[str, Tensor], rows: Tensor, more: dict[str, Tensor] | None = None
    ) -> None:
        self._fields, self._rows, self._done = fields, rows, more or {}
        self._extra = tuple(self._done)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._done:
            field = self._fields[name]
            taken = field.index_select(0, self._rows.reshape(-1))
            self._done[name] = taken.view(*self._rows.shape, *field.shape[1:])
        return self._done[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._fields, *self._extra))

    def __len__(self) -> int:
        return len(self._fields) + len(self._extra)


class PartGradient(Gradient):
    """A gradient in one tensor for each trainable entry; joined only when somebody asks."""

    def __init__(self, layout: Layout, parts: list[Tensor | None], like: Tensor) -> None:
        self._layout, self._like = layout, like
        self._parts = [
            (n, p) for n, p in zip(layout.trainable, parts, strict=True) if p is not None
        ]

    def dense(self) -> Tensor:
        """The gradient as a vector of shape [p], or stacked [C, p]."""
        whole = len(self._parts) == len(self._layout.trainable)
        out = torch.empty_like(self._like) if whole else torch.zeros_like(self._like)
        for name, part in self._parts:
            self._layout.view(out, name).copy_(part)
        return out

    def add_to(self, target: Tensor, alpha: float = 1.0) -> None:
        """``target += alpha * gradient`` in place."""
        for name, part in self._parts:
            self._layout.view(target, name).add_(part, alpha=alpha)


class SerialState(LocalState):
    """A `LocalState` for one client, over a resident model."""

    def __init__(self, work: Work, place: int, model: FlatModel) -> None:
        super().__init__()
        record = work.record_of(place)
        self._model, self._program = model, work.program
        self._flat = record.flat.clone()
        self._trainable = model.layout.num_trainable
        self.beside = {n: t.clone() for n, t in record.beside.items()}
        self.start = record.flat[: self._trainable]
        self.received = dict(work.received_by(place))
        self.kept = dict(work.kept.get(int(work.clients[place]), {}))
        for name in work.program.keeps:
            self.kept.setdefault(name, torch.zeros_like(self.start))
        self.round = work.round
        self.losses: list[Tensor] = []

    @property
    def w(self) -> Tensor:
        return self._flat[: self._trainable]

    @w.setter
    def w(self, value: Tensor) -> None:
        self._flat[: self._trainable] = value

    def gradient(self, batch: Batch, at: Tensor | None = None, training: bool = True) -> Gradient:
        flat, beside, model = self._flat, self.beside, self._model
        if at is not None:
            flat = flat.clone()
            flat[: self._trainable] = at
            beside = {n: t.clone() for n, t in beside.items()}
        loss = partial(self._program.loss, model.criterion)
        value, parts = model.gradients(flat, beside, batch.fields, loss, training)
        self.losses.append(value)
        return PartGradient(model.layout, parts, self.w)

    def outcomes(self, client: int) -> Outcomes:
        """What the client's work gave."""
        losses = {"loss": torch.stack(self.losses).mean().item()} if self.losses else {}
        metrics = {**losses, **{n: float(v) for n, v in self.metrics.items()}}
        return Outcomes(
            np.array([client]),
            Rows(self._flat[None]),
            [self.beside] if self.beside else [],
            {n: v[None] for n, v in self.sent.items()},
            {n: v[None] for n, v in self.kept.items()},
            {n: np.array([v]) for n, v in metrics.items()},
            np.array([self.num_examples]),
            np.array([self.num_steps]),
        )


def run_one(work: Work, place: int, plan: Plan, model: FlatModel, data: FederatedData) -> Outcomes:
    """Do one client's work on a resident model: the reference that other executors must match.

    Args:
        work: the work of the cohort.
        place: which of its clients.
        plan: the cohort's minibatches.
        model: the resident model.
        data: all examples.
    """
    if not model.stochastic:
        return _run(work, place, plan, model, data)
    key = rng.key(work.seed, work.round, int(work.clients[place]), "module")
    with rng.isolated(key):
        return _run(work, place, plan, model, data)


def _run(work: Work, place: int, plan: Plan, model: FlatModel, data: FederatedData) -> Outcomes:
    program, s = work.program, SerialState(work, place, model)
    s.num_steps, s.num_examples = int(plan.steps[place]), int(plan.counts[place])
    program.init(s)
    for step in range(s.num_steps):
        rows, epoch = plan.batch(place, step)
        program.step(s, Batch(Fields(data.fields, torch.from_numpy(rows)), epoch, step))
    program.final(s)
    return s.outcomes(int(work.clients[place]))


class Serial:
    """Executes clients one after another, in the order given.

    Args:
        model: the resident model.
        data: all examples, and who owns which.
        debug: let exceptions of programs pass.
    """

    name = "serial"

    def __init__(self, model: FlatModel, data: FederatedData, debug: bool = False) -> None:
        self.model, self.data, self.debug = model, data, debug

    def map(self, work: Work, then: Callable[[Outcomes], T], keep: bool = True) -> Iterator[T]:
        """Yield `then` of each client's outcome as it is done."""
        for part, plan in plans(work, self.data):
            for place in range(len(part)):
                yield then(attempt(part, place, plan, self.model, self.data, self.debug))

    def measure(self, work: Work, batch_size: int) -> Iterator[tuple[float, float, int]]:
        """Judge each client's model on the client's held-out examples.

        A program that personalises trains first, from the model it was sent.

        Args:
            work: clients, models, and the program that may personalise.
            batch_size: examples per forward pass.

        Yields:
            mean loss, share of positions predicted right, number of held-out examples.
        """
        tuning = work.program.personalise()
        for place, client in enumerate(work.clients.tolist()):
            record = work.record_of(place)
            if tuning is not None:
                alone = replace(work.part(slice(place, place + 1)), program=tuning, received={})
                (tuned,) = Serial(self.model, self.data, True).map(alone, lambda outcomes: outcomes)
                record = FlatRecord(record.layout, tuned.flat[0], *tuned.beside[:1])
            index = torch.from_numpy(self.data.test[client])
            sums = self.model.measure(record, self.data.fields, index, batch_size).sum(1)
            loss, right, count = sums.tolist()
            total = max(count, 1.0)
            yield loss / total, right / total, len(index)


def attempt(
    work: Work, place: int, plan: Plan, model: FlatModel, data: FederatedData, debug: bool = False
) -> Outcomes:
    """As `run_one`, with an exception of the program as a fault of its client."""
    try:
        return run_one(work, place, plan, model, data)
    except Exception as error:  # a user's program raises whatever it raises
        if debug:
            raise
        return Outcomes.failed(int(work.clients[place]), error)
