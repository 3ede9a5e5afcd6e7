"""Whole blocks of clients at once: parameters stacked, one product for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from threading import local
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.core.model import FlatModel
from fedsim.core.program import Batch
from fedsim.core.records import FlatRecord
from fedsim.data import FederatedData
from fedsim.runtime.cohort import Floats, Ints, Outcomes, Work
from fedsim.runtime.layers import Stackable
from fedsim.runtime.memory import large_pages
from fedsim.runtime.plan import Plan, plans
from fedsim.runtime.serial import attempt
from fedsim.runtime.stacked import StackedState
from fedsim.runtime.threads import Workers

T = TypeVar("T")
APART = 1e8
"""Operations of a block's step from which blocks are dealt to threads. Smaller ones are over
before another thread has woken up, and Python runs one thread at a time."""
APART_BYTES = 32 << 20
"""Parameters of a block from which it takes long to read and write them."""
WINDOW = 8
"""Blocks whose clients are sorted by number of steps together."""
TABLE = 1 << 20
"""Entries of a block's table of minibatches that are made at a time."""
WINDOW_BYTES = 1 << 20
"""Inputs that are gathered at a time: what stays in the cache until it is used."""


def blocks_of(steps: Ints, size: int, alike: bool = True) -> list[Ints]:
    """Places of clients cut into blocks of about equal size, at most `size`.

    Clients of a window of some blocks are sorted by number of steps, most first, and results still
    come about in order of clients.

    Args:
        steps: of each client.
        size: clients of a block.
        alike: whether clients of one block end at about the same time; otherwise the blocks do.
    """
    blocks: list[Ints] = []
    for first in range(0, len(steps), WINDOW * size):
        window = steps[first : first + WINDOW * size]
        order = first + np.argsort(-window, kind="stable")
        count = -(-len(order) // size)
        blocks += np.array_split(order, count) if alike else [order[i::count] for i in range(count)]
    return blocks


class Batched:
    """Executes blocks of clients on stacked vectors, blocks dealt to threads.

    Args:
        model: the model.
        data: all examples, and who owns which.
        workers: the threads.
        engine: differentiates the model at stacked parameters.
        block_size: clients of a block; it changes last bits, the number of workers does not.
        flops: operations of a forward pass for one example.
    """

    name = "batched"

    def __init__(
        self,
        model: FlatModel,
        data: FederatedData,
        workers: Workers,
        engine: Stackable,
        block_size: int,
        flops: float = math.inf,
    ) -> None:
        self.model, self.data, self.workers = model, data, workers
        self.engine, self.block_size, self.flops = engine, block_size, flops
        self._own = local()

    def map(self, work: Work, then: Callable[[Outcomes], T], keep: bool = True) -> Iterator[T]:
        """Yield `then` of the outcomes of each block, in order of blocks."""
        rows, start = min(self.block_size, len(work)), self.model.initial().flat
        operations = work.program.passes * self.flops * rows * work.program.batch_size
        apart = operations >= APART or rows * start.nbytes >= APART_BYTES
        workers = self.workers if apart else Workers(1)
        for part, plan in plans(work, self.data):
            blocks = blocks_of(plan.steps, self.block_size, not self.engine.looped)

            def do(
                number: int, part: Work = part, plan: Plan = plan, blocks: list[Ints] = blocks
            ) -> T:
                return then(self._attempt(part, plan, blocks[number], keep))

            cost = [float(plan.steps[p].sum() + 2 * plan.steps[p].max()) for p in blocks]
            yield from workers.map(do, len(blocks), cost)

    def _attempt(self, work: Work, plan: Plan, places: Ints, keep: bool) -> Outcomes:
        """A block's outcomes; if its program raises, one client after another to find who."""
        try:
            return self.run(work, plan, places, keep)
        except Exception:
            model = self.model.replica()
            alone = [attempt(work, int(p), plan, model, self.data) for p in places]
            if not any(outcome.faults for outcome in alone):
                raise
            return Outcomes.join(alone)

    def _buffer(self, rows: int, keep: bool) -> Tensor:
        """Room for so many models: new, or the thread's own, whose pages are there already."""
        record = self.model.initial().flat
        if keep:
            return record.new_empty(rows, len(record))
        if getattr(self._own, "buffer", None) is None or len(self._own.buffer) < rows:
            self._own.buffer = large_pages(record.new_empty(rows, len(record)))
        buffer: Tensor = self._own.buffer[:rows]
        return buffer

    @torch.no_grad()
    def run(self, work: Work, plan: Plan, places: Ints, keep: bool = True) -> Outcomes:
        """Do the work of one block of clients, given by their places, most steps first."""
        program, steps = work.program, plan.steps[places]
        start = _start(work, places)
        s = StackedState(
            start,
            len(places),
            lambda: self._buffer(len(places), keep),
            program,
            self.model,
            self.engine,
            self.engine.thin(int(steps.max(initial=0)) * program.batch_size),
        )
        s.round = work.round
        s.num_steps, s.num_examples = (
            torch.from_numpy(n[places, None]).to(start) for n in (plan.steps, plan.counts)
        )
        _receive(s, work, places)
        program.init(s)
        for n, batch in minibatches(plan, places, self.data.fields):
            s.prefix.active = n
            program.step(s, batch)
        s.prefix.active = s.prefix.size
        program.final(s)
        return _outcomes(s, work.clients[places], plan.counts[places], steps)


class Window:
    """The examples of a few steps of a block; of a field all are gathered when one is asked for.

    Args:
        fields: all examples of all clients.
        rows: numbers of the examples, int64 [visits].
    """

    def __init__(self, fields: Mapping[str, Tensor], rows: Tensor) -> None:
        self.fields, self._rows = fields, rows
        self._done: dict[str, Tensor] = {}

    def take(self, name: str, first: int, shape: tuple[int, int]) -> Tensor:
        """A field of one step's clients, shape [clients, examples, ...]."""
        if name not in self._done:
            self._done[name] = self.fields[name].index_select(0, self._rows)
        found = self._done[name]
        part = found.narrow(0, first, shape[0] * shape[1])
        return part.view(*shape, *found.shape[1:])


class Step(Mapping[str, Tensor]):
    """The fields of one step of a block.

    Args:
        window: has its examples.
        first: place of the first of them in the window.
        shape: clients, and examples of each.
        weight: weights of the examples, of this shape, where some of them are padding.
    """

    def __init__(
        self, window: Window, first: int, shape: tuple[int, int], weight: Tensor | None
    ) -> None:
        self._window, self._first, self._shape, self._weight = window, first, shape, weight

    def __getitem__(self, name: str) -> Tensor:
        if name == "weight" and self._weight is not None:
            return self._weight
        return self._window.take(name, self._first, self._shape)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._window.fields, *(["weight"] if self._weight is not None else [])))

    def __len__(self) -> int:
        return len(self._window.fields) + (self._weight is not None)


def minibatches(
    plan: Plan, places: Ints, fields: Mapping[str, Tensor]
) -> Iterator[tuple[int, Batch]]:
    """For each step of a block, how many of its clients take it, and their minibatches.

    Fields have shape [clients, examples, ...]; smaller minibatches are padded, with weight 0.

    Args:
        plan: the cohort's minibatches.
        places: the block's clients, most steps first.
        fields: all examples.
    """
    device, each = fields["x"].device, max(1, fields["x"][:1].nbytes)
    steps, per_epoch = plan.steps[places], plan.per_epoch[places]
    last, stride = int(steps.max(initial=0)), max(1, TABLE // (len(places) * plan.batch_size))
    for first in range(0, last, stride):
        numbers = np.arange(first, min(first + stride, last))
        table, sizes = plan.table(places, first, first + len(numbers))
        active, widths = np.searchsorted(-steps, -numbers), sizes.max(1)
        inside = np.arange(len(places)) < active[:, None]
        columns = np.arange(table.shape[2])
        taken = inside[..., None] & (columns < widths[:, None, None])
        rows = torch.from_numpy(table[taken]).to(device)
        real = torch.from_numpy((columns < sizes[..., None])[taken]).to(device, torch.float32)
        even = (sizes == widths[:, None]).sum(1) == active
        epochs = numbers[:, None] // per_epoch
        mixed = ((epochs != epochs[:, :1]) & inside).any(1)
        ends = np.cumsum(active * widths)
        part = ends // max(1, WINDOW_BYTES // each)
        cuts = np.flatnonzero(np.diff(part, prepend=-1, append=-1)).tolist()
        for begin, end in pairwise(cuts):
            at = int(ends[begin - 1]) if begin else 0
            window = Window(fields, rows[at : int(ends[end - 1])])
            weights = real[at : int(ends[end - 1])]
            place = 0
            for i in range(begin, end):
                n, width = int(active[i]), int(widths[i])
                weight = None if even[i] else weights.narrow(0, place, n * width).view(n, width)
                epoch: int | Tensor = int(epochs[i, 0])
                if mixed[i]:
                    epoch = torch.from_numpy(epochs[i, :n, None]).to(device)
                yield n, Batch(Step(window, place, (n, width), weight), epoch, first + i)
                place += n * width


def _start(work: Work, places: Ints) -> Tensor:
    """Where clients start: one vector if it is the same for all, else one for each."""
    if isinstance(work.record, FlatRecord):
        return work.record.flat
    return torch.stack([work.record[place].flat for place in places.tolist()])


def _receive(s: StackedState, work: Work, places: Ints) -> None:
    """Give the state what the server sent, and what the clients kept."""
    if isinstance(work.received, Mapping):
        s.received.update(work.received)
    else:
        sent = [work.received[place] for place in places.tolist()]
        s.received.update({n: torch.stack([v[n] for v in sent]) for n in sent[0]})
    for name in work.program.keeps:
        kept = s.start.new_zeros(len(places), s.start.shape[-1])
        for row, client in zip(kept, work.clients[places].tolist(), strict=True):
            own = work.kept.get(client, {})
            if name in own:
                row.copy_(own[name])
        s.kept[name] = kept


def _outcomes(s: StackedState, clients: Ints, counts: Ints, steps: Ints) -> Outcomes:
    size = len(clients)

    def rows(vectors: Any) -> dict[str, Tensor]:
        return {n: v.expand(size, v.shape[-1]) for n, v in vectors.items()}

    metrics = {**({"loss": s.mean_losses()} if s.losses else {}), **s.metrics}
    return Outcomes(
        clients,
        s.rows(),
        [],
        rows(s.sent),
        rows(s.kept),
        {n: _column(v, size) for n, v in metrics.items()},
        counts,
        steps,
    )


def _column(value: Any, size: int) -> Floats:
    """One number for each client, from a tensor or one number for all."""
    if isinstance(value, Tensor):
        value = value.detach().double().reshape(-1).cpu().numpy()
    column: Floats = np.broadcast_to(np.asarray(value, np.float64), size)
    return column
