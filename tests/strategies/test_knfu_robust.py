"""Knowledge that must not count: another public set's, spoiled, flooding, of abandoned rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flwr.app import Message, RecordDict

from fedsim.config import StrategyConfig
from fedsim.core.records import from_record, to_record
from tests.contract import toy
from tests.contract.test_state import failing


def entry(name="knfu", **params):
    return StrategyConfig(name=name, params=params)


def spoiled(change):
    """A grid whose third client says something else."""

    def answer(message, reply):
        state = {n: t.clone() for n, t in from_record(reply.content["arrays"]).items()}
        content = RecordDict({**reply.content, "arrays": to_record(change(state))})
        return [Message(content, reply_to=message)]

    return lambda grid: toy.Unreliable(grid, [3], answer)


def unnormalised(state):
    state["knowledge"][0] *= 1.5
    return state


def negative(state):
    state["knowledge"][0] = torch.tensor([1.5, -0.5, 0.0])
    return state


def elsewhere(state):
    state["public"] = state["public"].flip(0)
    return state


def wide(state):
    state["knowledge"] = torch.cat([state["knowledge"], state["knowledge"]], 1)
    return state


def flood(state):
    state["knowledge"] = state["knowledge"].repeat(1000, 1)
    return state


def nan(state):
    state["knowledge"][2, 1] = torch.nan
    return state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unnormalised, "malformed: knowledge whose rows are no distributions"),
        (negative, "malformed: knowledge whose rows are no distributions"),
        (elsewhere, "malformed: knowledge of another public set"),
        (wide, "wrong_shape"),
        (flood, "wrong_shape"),
        (nan, "not_finite"),
    ],
)
def test_spoiled_knowledge_is_refused_and_reaches_nobody(change, reason):
    fed = toy.federation(entry(), rounds=2, wrap=spoiled(change))
    progress = toy.run(fed, 2)
    found = [r["reason"] for r in progress.clients if r.get("status") == "refused"]
    assert len(found) == 2
    assert all(r.startswith(reason) for r in found)
    honest = toy.federation(entry(), rounds=2)
    honest.trainers = [n for n in honest.trainers if n != 3]
    toy.run(honest, 2)
    grid = fed.grid.inner
    for client in (0, 1, 3, 4, 5, 6):  # what the others hold is as if it had not been there
        one = from_record(grid.context(client + 1).state["KnFu.model"])
        other = from_record(honest.grid.context(client + 1).state["KnFu.model"])
        assert all(torch.equal(one[n], other[n]) for n in one)


def test_a_client_with_another_public_set_says_so():
    fed = toy.federation(entry(), rounds=1)
    message = toy.messages_of(fed, fed.begin().arrays, 1)[0]
    message.content["config"]["public"] = "00" * 16
    reply = next(iter(fed.grid.send_and_receive([message])))
    assert "the server's public set" in reply.error.reason


def test_the_order_of_the_public_examples_is_part_of_their_digest():
    data = toy.federated()
    other = replace(data, public=data.public[::-1].copy())
    assert data.public_digest != other.public_digest
    assert replace(data, public=data.public.copy()).public_digest == data.public_digest


def test_a_round_that_is_abandoned_leaves_no_trace_on_the_clients():
    bad = toy.federation(
        entry(), rounds=3, wrap=lambda grid: toy.Unreliable(grid, (1, 2, 4, 5, 7), failing, [2])
    )
    progress = toy.run(bad, 3)
    assert [r["abandoned"] for r in progress.rounds] == [False, False, True, False]
    assert progress.rounds[2]["loss"] == progress.rounds[1]["loss"]
