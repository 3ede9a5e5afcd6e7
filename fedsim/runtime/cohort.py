"""What the clients of a cohort are to do, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.bulk import Rows
from fedsim.core.program import LocalProgram
from fedsim.core.records import FlatRecord

T = TypeVar("T")
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Vectors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Work:
    """The work of many clients in one round, who run the same program.

    Attributes:
        program: what to do.
        clients: partition numbers, ascending, int64 [n].
        round: number of the round, from 1.
        seed: seed of the run.
        record: the model to start from: one for all, or one for each client.
        received: other vectors from the server, shape [p], by name: for all, or for each client.
        kept: vectors of shape [p] that clients kept, by client and name; empty for a client that
            has none yet.
    """

    program: LocalProgram
    clients: Ints
    round: int
    seed: int
    record: FlatRecord | Sequence[FlatRecord]
    received: Vectors | Sequence[Vectors] = field(default_factory=dict)
    kept: Mapping[int, Vectors] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clients)

    def record_of(self, place: int) -> FlatRecord:
        """The model that the client at this place starts from."""
        return self.record if isinstance(self.record, FlatRecord) else self.record[place]

    def part(self, places: slice) -> Work:
        """The work of some of the clients."""
        record, received = self.record, self.received
        return replace(
            self,
            clients=self.clients[places],
            record=record if isinstance(record, FlatRecord) else record[places],
            received=received if isinstance(received, Mapping) else received[places],
        )

    def received_by(self, place: int) -> Vectors:
        """The other vectors that the client at this place was sent."""
        return self.received if isinstance(self.received, Mapping) else self.received[place]


@dataclass
class Outcomes:
    """What the work of some clients gave, in columns: row i belongs to ``clients[i]``.

    Attributes:
        clients: partition numbers, int64 [C].
        rows: the clients' models as vectors.
        beside: entries of the models that are not in the vectors.
        sent: other vectors for the server, by name, shape [C, p].
        kept: vectors to keep on the clients, by name, shape [C, p].
        metrics: numbers for the server, by name, float64 [C]; `loss` is the mean training loss
            over the steps, and missing where no gradient was taken.
        num_examples: training examples of each client, int64 [C].
        num_steps: local steps done, int64 [C].
        faults: what a client's program raised; these clients have no row.
    """

    clients: Ints
    rows: Rows
    beside: list[dict[str, Tensor]]
    sent: dict[str, Tensor]
    kept: dict[str, Tensor]
    metrics: dict[str, Floats]
    num_examples: Ints
    num_steps: Ints
    faults: dict[int, Exception] = field(default_factory=dict)

    @property
    def flat(self) -> Tensor:
        """The models as vectors, shape [C, layout.size]."""
        return self.rows.dense()

    @staticmethod
    def failed(client: int, error: Exception) -> Outcomes:
        """No row, and one fault."""
        none = np.empty(0, np.int64)
        return Outcomes(none, Rows(torch.empty(0, 0)), [], {}, {}, {}, none, none, {client: error})

    @staticmethod
    def join(parts: Sequence[Outcomes]) -> Outcomes:
        """All rows and all faults of some outcomes."""
        some = [p for p in parts if len(p.clients)] or parts[:1]
        first = some[0]

        def columns(name: str) -> dict[str, Any]:
            values = [getattr(p, name) for p in some]
            join = np.concatenate if name == "metrics" else torch.cat
            return {n: join([v[n] for v in values]) for n in getattr(first, name)}

        return Outcomes(
            np.concatenate([p.clients for p in some]),
            Rows(torch.cat([p.flat for p in some])),
            [b for p in some for b in p.beside],
            columns("sent"),
            columns("kept"),
            columns("metrics"),
            np.concatenate([p.num_examples for p in some]),
            np.concatenate([p.num_steps for p in some]),
            {c: e for p in parts for c, e in p.faults.items()},
        )


class Executor(Protocol):
    """One way to execute a cohort's work."""

    name: str

    def map(self, work: Work, then: Callable[[Outcomes], T], keep: bool) -> Iterator[T]:
        """Do the work and yield `then` of every part of the outcomes, in a fixed order.

        Args:
            work: what to do.
            then: called on the thread that did the part.
            keep: whether tensors of the outcomes outlive the call of `then`.
        """
        ...
