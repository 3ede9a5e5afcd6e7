"""Local training alone: what stays where, and what one client alone amounts to."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Message

from fedsim.config import StrategyConfig
from tests.contract import toy
from tests.contract.test_hostile import KINDS

EMPTY = ("entry added", "record renamed", "record added", "record missing", "no metrics")
NUMBERS = ("no count", "count negative", "count huge", "count a list", "metric not a number")


def run(name: str, params: dict[str, Any] | None = None, **options: Any) -> Any:
    return toy.run(toy.federation(StrategyConfig(name=name, params=params or {}), **options))


def test_no_parameter_travels() -> None:
    progress = run("local", model="mlp")
    fedavg = run("fedavg", model="mlp")
    parameters = sum(p.numel() for p in toy.module("mlp").parameters())
    assert fedavg.rounds[-1]["bytes_up"] - progress.rounds[-1]["bytes_up"] >= 7 * 4 * parameters


@pytest.mark.parametrize("model", ["mlp", "bn"])
def test_one_client_alone_is_fedavg(model: str) -> None:
    data = toy.federated((9,))
    one, other = (run(name, model=model, data=data) for name in ("local", "fedavg"))
    assert one.rounds[-1]["client_loss"] == other.rounds[-1]["client_loss"]


def test_it_is_what_ditto_keeps_without_a_pull() -> None:
    one, other = run("local"), run("ditto", {"lam": 0})
    assert one.rounds[-1]["client_loss"] == pytest.approx(other.rounds[-1]["client_loss"], rel=1e-6)


def test_hostile_replies_are_refused_one_by_one() -> None:
    kinds = dict(enumerate((*EMPTY, *NUMBERS, "error reply", "no reply")))
    data = toy.federated((8,) * 2 * len(kinds))

    def answer(message: Message, reply: Message) -> list[Message]:
        return KINDS[kinds[message.metadata.dst_node_id - 1]][0](message, reply)

    def wrap(grid: Any) -> Any:
        return toy.Unreliable(grid, [c + 1 for c in kinds], answer, [1])

    progress = run("local", data=data, rounds=2, wrap=wrap, cohort={"quorum": 0.2})
    for client, kind in kinds.items():
        (row,) = [r for r in progress.clients if r["round"] == 1 and r["client"] == client]
        assert row.get("reason", "").partition(":")[0] == KINDS[kind][1]
    assert [r["admitted"] for r in progress.rounds[1:]] == [len(kinds), 2 * len(kinds)]
