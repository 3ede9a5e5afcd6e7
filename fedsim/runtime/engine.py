"""The engine of one run: an executor, its threads, and evaluation by the same means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.core.model import FlatModel
from fedsim.core.records import FlatRecord
from fedsim.data import FederatedData
from fedsim.runtime.batched import Batched
from fedsim.runtime.choose import Choice, stackable
from fedsim.runtime.clock import forward_flops
from fedsim.runtime.cohort import Executor, Floats, Ints, Outcomes, Work
from fedsim.runtime.memory import keep_freed
from fedsim.runtime.serial import Serial
from fedsim.runtime.threads import Threads, Workers

T = TypeVar("T")
PERSONAL = 16
"""Models of their own that are judged together."""


@dataclass(frozen=True)
class Judged:
    """How models did on their clients' held-out examples; row i belongs to ``clients[i]``.

    Attributes:
        clients: partition numbers, int64 [n].
        loss: mean loss.
        accuracy: share of positions predicted right.
        examples: number of held-out examples, int64 [n].
        faults: what a program raised while it personalised; these clients have no row.
    """

    clients: Ints
    loss: Floats
    accuracy: Floats
    examples: Ints
    faults: dict[int, Exception]

    @staticmethod
    def of(
        clients: Ints, sums: Floats, examples: Ints, faults: dict[int, Exception] | None = None
    ) -> Judged:
        """From sums of loss, right predictions and positions, shape [n, 3]."""
        total = np.maximum(sums[:, 2], 1.0)
        return Judged(clients, sums[:, 0] / total, sums[:, 1] / total, examples, faults or {})


class Engine:
    """Executes a run's work.

    Args:
        model: the model.
        data: the federated data.
        choice: the executor and what it depends on.
        workers: threads; results do not depend on them.
        debug: let exceptions of programs pass, where the executor is serial.
    """

    def __init__(
        self,
        model: FlatModel,
        data: FederatedData,
        choice: Choice,
        workers: int = 1,
        debug: bool = False,
    ) -> None:
        self.model, self.data, self.choice = model, data, choice
        keep_freed()
        self.workers = Workers(workers)
        self._threads = Threads(model, data, self.workers, choice.channels_last)
        self._stack = stackable(model, data) if choice.executor == "batched" else None
        self.executor: Executor = Serial(model, data, debug)
        if choice.executor == "threads":
            self.executor = self._threads
        elif self._stack is not None:
            flops = forward_flops(model, data.fields["x"][:1])
            size = choice.block_size
            self.executor = Batched(model, data, self.workers, self._stack, size, flops)

    def map(self, work: Work, then: Callable[[Outcomes], T], keep: bool = True) -> Iterator[T]:
        """See `Executor`."""
        return self.executor.map(work, then, keep)

    def close(self) -> None:
        """End the threads."""
        self.workers.close()

    def measure(self, work: Work, batch_size: int) -> Iterator[Judged]:
        """Judge each client's model on the client's held-out examples.

        A program that personalises trains first, from the model it was sent.

        Args:
            work: clients, models, and the program that may personalise.
            batch_size: examples per forward pass.
        """
        tuning = work.program.personalise()
        if self.choice.executor == "serial":
            yield from self._alone(work, batch_size)
        elif tuning is not None:
            own = replace(work, program=tuning, received={})
            yield from self.map(own, lambda o: self._rows(o.clients, o, batch_size), keep=False)
        elif isinstance(work.record, FlatRecord):
            yield self._shared(work.clients, work.record, batch_size)
        else:
            yield from self._personal(work, batch_size)

    def _alone(self, work: Work, batch_size: int) -> Iterator[Judged]:
        """One client after another, as a device would judge its model."""
        serial = Serial(self.model, self.data)
        for place, client in enumerate(work.clients):
            one, none = work.part(slice(place, place + 1)), np.zeros(0)
            try:
                ((loss, accuracy, examples),) = serial.measure(one, batch_size)
            except Exception as error:  # a user's program raises whatever it raises
                gone = {int(client): error}
                yield Judged(one.clients[:0], none, none, none.astype(np.int64), gone)
                continue
            yield Judged(
                one.clients, np.array([loss]), np.array([accuracy]), np.array([examples]), {}
            )

    def sums(self, record: FlatRecord, index: Tensor, batch_size: int) -> Tensor:
        """Loss, right predictions and positions of each example, shape [3, len(index)].

        Batches are dealt to the threads; what they give does not depend on how.
        """
        if not len(index):
            return torch.zeros(3, 0)
        parts = index.split(batch_size)

        def judge(part: int) -> Tensor:
            model = self._threads.resident()
            return model.measure(record, self.data.fields, parts[part], batch_size)

        return torch.cat(list(self.workers.map(judge, len(parts))), 1)

    def _shared(self, clients: Ints, record: FlatRecord, batch_size: int) -> Judged:
        """One model for all: all clients' examples in the same forward passes."""
        own = self.data.test.take(clients)
        each = self.sums(record, torch.from_numpy(own.values), batch_size).double().cpu().numpy()
        sums = [np.bincount(own.owners, column, len(clients)) for column in each]
        return Judged.of(clients, np.stack(sums, 1), own.lengths)

    def _personal(self, work: Work, batch_size: int) -> Iterator[Judged]:
        """A model of its own for each client."""
        parts = [slice(i, i + PERSONAL) for i in range(0, len(work), PERSONAL)]

        def judge(part: int) -> Judged:
            some = work.part(parts[part])
            records = [some.record_of(i) for i in range(len(some))]
            return self._judge(
                some.clients,
                torch.stack([r.flat for r in records]),
                [r.beside for r in records],
                batch_size,
            )

        yield from self.workers.map(judge, len(parts))

    def _rows(self, clients: Ints, outcomes: Outcomes, batch_size: int) -> Judged:
        judged = self._judge(clients, outcomes.flat, outcomes.beside, batch_size)
        return replace(judged, faults=outcomes.faults)

    @torch.no_grad()
    def _judge(
        self, clients: Ints, flat: Tensor, beside: list[dict[str, Tensor]], batch_size: int
    ) -> Judged:
        """Models in rows of `flat`, each on its own client's examples."""
        own, fields = self.data.test.take(clients), self.data.fields
        sums = np.zeros((len(clients), 3))
        if self._stack is None or self._stack.looped or self.choice.block_size == 1:
            model, layout = self._threads.resident(), self.model.layout
            for i in range(len(clients)):
                record = FlatRecord(layout, flat[i], beside[i] if beside else None)
                index = torch.from_numpy(own[i])
                sums[i] = model.measure(record, fields, index, batch_size).double().sum(1)
            return Judged.of(clients, sums, own.lengths)
        values, most = self.model.layout.views(flat), int(own.lengths.max(initial=0))
        for first in range(0, most, batch_size):
            columns = np.arange(first, min(first + batch_size, most))
            inside = columns < own.lengths[:, None]
            at = np.where(inside, own.offsets[:-1, None] + columns, 0)
            rows = torch.from_numpy(own.values[at]).to(flat.device)
            x, y = (
                fields[n].index_select(0, rows.flatten()).view(*rows.shape, *fields[n].shape[1:])
                for n in ("x", "y")
            )
            outputs = self._stack.outputs(values, x)
            each = self.model.criterion.measure(outputs.flatten(0, 1), y.flatten(0, 1))
            each = each.view(3, *rows.shape).double() * torch.from_numpy(inside).to(flat.device)
            sums += each.sum(2).t().cpu().numpy()
        return Judged.of(clients, sums, own.lengths)
