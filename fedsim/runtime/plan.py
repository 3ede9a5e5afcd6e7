"""Which examples every client's minibatches hold, for many clients at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from fedsim.core import rng
from fedsim.core.program import LocalProgram
from fedsim.data import FederatedData, Ragged
from fedsim.runtime.cohort import Ints, Work

VISITS = 1 << 21
"""Visits to examples that are shuffled at a time."""


def count_steps(program: LocalProgram, lengths: Ints) -> Ints:
    """Local steps of clients with so many training examples."""
    steps: Ints = program.epochs * -(-lengths // program.batch_size)
    return np.minimum(steps, program.max_steps) if program.max_steps else steps


def visits(program: LocalProgram, lengths: Ints) -> Ints:
    """About how many examples clients go through in a round."""
    return np.minimum(
        lengths * program.epochs, count_steps(program, lengths) * program.batch_size + lengths
    )


def plans(work: Work, data: FederatedData) -> Iterator[tuple[Work, Plan]]:
    """The minibatches of a cohort, cut into parts whose shuffles fit into memory."""
    clients, train = work.clients, data.train
    lengths = train.offsets[clients + 1] - train.offsets[clients]
    part = np.cumsum(visits(work.program, lengths)) // VISITS
    cuts = np.flatnonzero(np.diff(part, prepend=-1, append=-1))
    for first, last in pairwise(cuts.tolist()):
        mine = work.part(slice(first, last))
        yield mine, Plan.of(work.program, train, mine.clients, work.seed, work.round)


@dataclass(frozen=True)
class Plan:
    """The minibatches of some clients in one round.

    In every epoch a client's examples are shuffled by themselves: sorted by the random bits that
    belong to (seed, round, client, epoch, example's place). So the order does not depend on who
    else takes part, nor on how clients are put together.

    Attributes:
        counts: training examples of each client, int64 [C].
        steps: local steps of each client, int64 [C].
        batch_size: examples of a full minibatch.
    """

    counts: Ints
    steps: Ints
    batch_size: int
    _first: Ints
    _order: Ints

    @staticmethod
    def of(program: LocalProgram, train: Ragged, clients: Ints, seed: int, round: int) -> Plan:
        """Draw the minibatches.

        Args:
            program: gives epochs, batch size and the limit on steps.
            train: the training examples of all clients.
            clients: whose minibatches, shape [C].
            seed: seed of the run.
            round: number of the round.
        """
        own = train.take(clients)
        counts, steps = own.lengths, count_steps(program, own.lengths)
        per_epoch = np.maximum(-(-counts // program.batch_size), 1)
        epochs = -(-steps // per_epoch)
        # One segment for each (client, epoch), client after client.
        owner = np.repeat(np.arange(len(clients)), epochs)
        epoch = np.arange(len(owner)) - np.repeat(np.cumsum(epochs) - epochs, epochs)
        length = counts[owner]
        start = np.cumsum(length) - length
        segment = np.repeat(np.arange(len(owner)), length)
        place = np.arange(len(segment)) - start[segment]
        holder = owner[segment]
        chance = rng.bits(seed, round, "batches", clients[holder], epoch[segment] << 32 | place)
        # Segment in the high bits, chance in the low ones; 40 bits tie once in a million shuffles.
        ranks = segment.astype(np.uint64) << np.uint64(40) | chance >> np.uint64(24)
        order = own.values[(own.offsets[holder] + place)[np.argsort(ranks, kind="stable")]]
        total = counts * epochs
        return Plan(counts, steps, program.batch_size, np.cumsum(total) - total, order)

    @cached_property
    def per_epoch(self) -> Ints:
        """Minibatches of each client in one epoch, int64 [C]."""
        return np.maximum(-(-self.counts // self.batch_size), 1)

    def batch(self, client: int, step: int) -> tuple[Ints, int]:
        """Example numbers of one client's step, and its epoch; `client` is a place in [C]."""
        epoch, turn = divmod(step, int(self.per_epoch[client]))
        count = int(self.counts[client])
        first = int(self._first[client]) + epoch * count + turn * self.batch_size
        last = first + min(self.batch_size, count - turn * self.batch_size)
        return self._order[first:last], epoch

    def table(self, chosen: Ints, start: int, stop: int) -> tuple[Ints, Ints]:
        """The minibatches of several clients in steps `start` to `stop`, padded.

        Args:
            chosen: places in [C] of n clients.
            start: first step.
            stop: one past the last step.

        Returns:
            example numbers, int64 [stop - start, n, width], 0 where padded; and how many of them
            are real, int64 [stop - start, n], 0 after a client's last step.
        """
        steps = np.arange(start, stop)[:, None]
        count, per_epoch = self.counts[chosen], self.per_epoch[chosen]
        epoch, turn = np.divmod(steps, per_epoch)
        sizes = np.minimum(self.batch_size, count - turn * self.batch_size)
        sizes = np.where(steps < self.steps[chosen], sizes, 0)
        first = self._first[chosen] + epoch * count + turn * self.batch_size
        columns = np.arange(max(1, int(sizes.max(initial=0))))
        inside = columns < sizes[..., None]
        at = np.where(inside, first[..., None] + columns, 0)
        rows = self._order[at] if len(self._order) else np.zeros_like(at)
        return np.where(inside, rows, 0), sizes
