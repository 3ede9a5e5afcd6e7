"""What a run reports: the bytes that would be sent, and the same numbers every time."""

from __future__ import annotations

import io
import random
from collections import Counter

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from fedsim.core.records import materialise
from fedsim.runtime.grid import LocalGrid
from tests.contract import toy
from tests.contract.rows import Row, every


def serialised(content: RecordDict) -> int:
    """Bytes of a message: arrays by `numpy.save`, the rest by the rule of `count_bytes`."""
    total = 0
    for record in materialise(content).values():
        for name, value in record.items():
            total += len(name)
            if isinstance(record, ArrayRecord):
                buffer = io.BytesIO()
                np.save(buffer, value.numpy())
                total += buffer.tell()
            elif isinstance(value, str):
                total += len(value)
            else:
                total += 1 if isinstance(value, bool) else 8
    return total


class Scales(toy.Wrapped):
    """Weighs every training message and its reply, by client."""

    def __init__(self, inner: LocalGrid) -> None:
        super().__init__(inner)
        self.down, self.up = Counter[int](), Counter[int]()

    def answer(self, message: Message, reply: Message) -> list[Message]:
        """The reply, weighed."""
        if message.metadata.message_type.startswith("train"):
            client = message.metadata.dst_node_id - 1
            self.down[client] += serialised(message.content)
            self.up[client] += serialised(reply.content)
        return [reply]


@every()
def test_bytes_reported_are_bytes_serialised(row: Row) -> None:
    scales: list[Scales] = []

    def weigh(grid: LocalGrid) -> Scales:
        scales.append(Scales(grid))
        return scales[0]

    progress = toy.run(row.federation(wrap=weigh), 2)
    down, up = Counter[int](), Counter[int]()
    for r in progress.clients:
        down[r["client"]] += r.get("bytes_down", 0)
        up[r["client"]] += r.get("bytes_up", 0)
    assert (down, up) == (scales[0].down, scales[0].up)
    assert sum(r["bytes_down"] for r in progress.rounds) == down.total() > 0
    assert sum(r["bytes_up"] for r in progress.rounds) == up.total() > 0


@every()
def test_the_same_run_twice_gives_the_same_bits_whatever_the_global_generators(row: Row) -> None:
    one = toy.run(row.federation())
    torch_state = torch.default_generator.get_state()
    numpy_state = np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]  # noqa: NPY002
    random.seed(row.id)  # Flower draws from it
    other = toy.run(row.federation())
    assert toy.sha256(one.arrays) == toy.sha256(other.arrays)
    assert one.rounds == other.rounds
    assert one.clients == other.clients
    assert torch.equal(torch.default_generator.get_state(), torch_state)
    assert np.random.get_state()[1].tobytes() == numpy_state  # type: ignore[index,union-attr]  # noqa: NPY002
