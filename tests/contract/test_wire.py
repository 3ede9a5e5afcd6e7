"""Messages and kept states that go through Flower's serialisation give the same run, bit for bit.

That is what devices and Ray do to them; here no process is needed. For the LoRA family, whose
messages have the most shapes: adapters, one factor, ranks of clients, merges, second adapters.
"""

from __future__ import annotations

import copy

from flwr.app import Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedsim.core.records import materialise
from fedsim.federation import Progress
from fedsim.runtime.grid import LocalGrid
from tests.contract import toy
from tests.contract.rows import ROWS, Row, every


def through(content: RecordDict) -> RecordDict:
    """The records as bytes, and back."""
    sent = recorddict_to_proto(materialise(content))
    return recorddict_from_proto(type(sent).FromString(sent.SerializeToString()))


class Wire(LocalGrid):
    """Whatever comes to a client or leaves it has been bytes, its state too."""

    crossed = 0

    def execute(self, message: Message) -> Message:
        """As a client in another process."""
        own, context = copy.copy(message), self.context(message.metadata.dst_node_id)
        own.content, context.state = through(message.content), through(context.state)
        reply = super().execute(own)
        reply.content, context.state = through(reply.content), through(context.state)
        self.crossed += 1
        return reply


def tables(progress: Progress) -> list[list[str]]:
    return [[repr(sorted(r.items())) for r in t] for t in (progress.rounds, progress.clients)]


@every([row for row in ROWS if row.model in ("lora", "lora_delta", "prunable")])
def test_what_was_bytes_gives_the_same_bits(row: Row) -> None:
    wires: list[Wire] = []

    def wire(grid: LocalGrid) -> Wire:
        wires.append(Wire(grid._app, grid.num_nodes))
        return wires[0]

    sections = {"evaluate": {"clients_every": 1}, "cohort": {"size": 5, "patience": 1}}
    here = toy.run(row.federation(**sections))
    there = toy.run(row.federation(wrap=wire, **sections))
    assert wires[0].crossed >= 3 * 5
    assert tables(there) == tables(here)
    assert toy.sha256(there.arrays) == toy.sha256(here.arrays)
