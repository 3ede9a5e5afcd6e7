"""Our strategies are Flower strategies: Flower's own loop runs them, to the bits of ours."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message

from fedsim.client_app import ProgramApp
from fedsim.core.adapter import Adapted
from fedsim.core.records import from_record, plain
from fedsim.runner import build_strategy
from fedsim.runtime import flower
from fedsim.runtime.grid import LocalGrid
from tests.contract import toy
from tests.contract.rows import ROWS, Row, every

OWN = [row for row in ROWS if not isinstance(build_strategy(row.entry), Adapted)]


def start(row: Row, *, failing: int = 0) -> ArrayRecord:
    """Two rounds of `Strategy.start`, from plain Flower arrays."""
    fed = row.federation()

    class Grid(LocalGrid):
        def execute(self, message: Message) -> Message:
            if message.metadata.dst_node_id == failing:
                return Message(Error(flower.CLIENT_RAISED, "failed"), reply_to=message)
            return super().execute(message)

    grid = Grid(ProgramApp(fed.env), fed.env.data.num_clients)
    told = ConfigRecord(dict(fed.told(1)))
    initial = plain(fed.env.model.initial())
    strategy = build_strategy(row.entry)
    result = strategy.start(grid, initial, 2, train_config=told, evaluate_config=told)
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    return result.arrays


@every([row for row in OWN if row.model == "softmax"])
def test_flowers_own_loop_gives_the_same_bits(row: Row) -> None:
    assert toy.sha256(start(row)) == toy.sha256(toy.run(row.federation(), 2).arrays)


@pytest.mark.parametrize("failing", [0, 3])
@every([row for row in OWN if row.model == "bn"])
def test_it_copes_with_batchnorm_and_a_failing_client(row: Row, failing: int) -> None:
    for name, tensor in from_record(start(row, failing=failing)).items():
        assert bool(torch.isfinite(tensor).all()), name
