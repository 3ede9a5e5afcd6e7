"""FedSpine: pruning goes on round by round, everybody keeps its own model, the policy learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import nn

from clients.fedspine import FedSpine as Client
from fedsim.core.criteria import criterion
from fedsim.core.errors import ConfigError
from fedsim.core.model import FlatModel
from fedsim.core.packets import packet, packet_of
from fedsim.core.policy import TreeUCB
from fedsim.core.records import from_record, to_record
from fedsim.core.structure import removed
from fedsim.federation import Federation
from fedsim.models.lora import adapt
from fedsim.models.pruning import gated
from strategies.fedspine import FedSpine
from tests.contract.rows import Row
from tests.contract.toy import Unreliable, messages_of, run, sha256

FLEET = {"fleet": [{"name": "jetson_tx2"}, {"name": "workstation"}]}


def federation(rounds: int = 4, clock: dict[str, Any] | None = None, **params: Any) -> Federation:
    row = Row("fedspine", {"step": 0.25, "interval": 2, **params}, model="prunable")
    return row.federation(rounds=rounds, clock=clock or {})


def spine(fed: Federation) -> FedSpine:
    assert isinstance(fed.strategy, FedSpine)
    return fed.strategy


def test_groups_go_round_by_round_and_never_come_back() -> None:
    fed = federation(policy="fixed", target=0.6)
    progress, strategy = fed.begin(), spine(fed)
    before = {n: strategy.kept(n) for n in fed.trainers}
    for _ in range(4):
        fed.advance(progress)
        for node, old in before.items():
            now = strategy.kept(node)
            assert not any((now[s] & ~old[s]).any() for s in now)
            before[node] = now
    (item,) = strategy.plan.items
    for node in fed.trainers:
        assert int((~strategy.kept(node)[item.name]).sum()) == removed(0.6, item)


def test_ranked_in_the_whole_model_groups_go_until_that_share_of_weights_is_gone() -> None:
    """The adapter travels in the sizes that were asked for; what is gone by then counts as zero."""
    fed = federation(policy="fixed", target=0.5, scope="global")
    progress, strategy = fed.begin(), spine(fed)
    for _ in range(3):
        asked = {n: int(strategy.kept(n)["2.channels"].sum()) for n in fed.trainers}
        fed.advance(progress)
        for node, before in asked.items():
            assert int(strategy.kept(node)["2.channels"].sum()) <= before
    assert progress.rounds[-1]["refused"] == 0
    for node in fed.trainers:
        kept = strategy.kept(node)["2.channels"]
        assert int((~kept).sum()) == 3  # of five: a half, to the nearest group
        message = strategy.message_for("train", node, progress.arrays, {}, 2)
        assert tuple(message.content["arrays"]["0.lora_B"].shape) == (2, 2)


def test_what_is_sent_of_groups_that_are_gone_counts_as_zero() -> None:
    params = {"step": 0.4, "interval": 2, "policy": "fixed", "scope": "global"}
    row = Row("fedspine", params, model="prunable")

    def answer(message: Message, reply: Message, value: float) -> list[Message]:
        bits = np.frombuffer(packet_of(reply.content["kept"]), np.uint8)
        gone = np.unpackbits(bits)[:5] == 0
        state = {n: t.clone() for n, t in from_record(reply.content["arrays"]).items()}
        assert gone.any()
        assert not state["0.lora_B"][gone].any()
        state["0.lora_B"][gone] = value
        reply.content["arrays"] = to_record(state)
        return [reply]

    def result(value: float) -> str:
        def lie(message: Message, reply: Message) -> list[Message]:
            return answer(message, reply, value)

        fed = row.federation(rounds=1, wrap=lambda grid: Unreliable(grid, [3], lie))
        return sha256(run(fed).arrays)

    assert result(3.0) == result(0.0)


def test_a_layer_without_factors_is_judged_by_its_weights() -> None:
    """Where nothing has a gradient, what is left of the scores is the other layer's magnitude."""
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = FlatModel(gated(adapt(layers, 2, 2.0, targets=["0"])), criterion("cross_entropy"))
    state = model.module.state_dict()

    class State:
        info = model.info
        tensor = staticmethod(lambda name: state[name])

    scores = Client(last=False).scores(State, torch.zeros(model.layout.size))  # type: ignore[arg-type]
    sums = state["2.weight"].abs().sum(0)
    torch.testing.assert_close(scores["2.channels"], sums / sums.norm())


def test_clients_differ_in_what_they_keep() -> None:
    fed = federation(policy="fixed")
    run(fed)
    masks = {tuple(spine(fed).kept(n)["2.channels"].tolist()) for n in fed.trainers}
    assert len(masks) > 1


def test_less_travels_and_less_is_computed_the_more_is_pruned() -> None:
    fed = federation(policy="fixed", target=0.8, step=0.4)
    rows = run(fed).rounds
    assert rows[4]["bytes_up"] < rows[1]["bytes_up"]
    assert rows[4]["bytes_down"] < rows[1]["bytes_down"]
    assert rows[4]["compute"] < rows[1]["compute"] <= 1
    whole = run(federation(policy="fixed", target=0.0)).rounds
    assert whole[4]["compute"] == 1
    assert rows[4]["client_seconds"] < whole[4]["client_seconds"]


def test_a_smaller_rank_is_a_smaller_message() -> None:
    ranks = run(federation(policy={"name": "random", "lowest": 1}, target=0.0)).rounds
    fixed = run(federation(policy="fixed", target=0.0)).rounds
    assert ranks[1]["bytes_up"] < fixed[1]["bytes_up"]
    assert 1 <= ranks[1]["rank_mean"] <= 2


def test_everybody_is_judged_with_its_own_model() -> None:
    """Evaluate messages carry the node's groups, and adapters of that size."""
    fed = federation(policy="fixed")
    progress = run(fed)
    messages = fed.strategy.configure_evaluate(5, progress.arrays, fed.told(5), fed.grid)
    for message in messages:
        node, records = message.metadata.dst_node_id, message.content.array_records
        wanted = spine(fed).plan.packed(spine(fed).kept(node))
        assert packet_of(records["kept"]) == wanted
        left = int(spine(fed).kept(node)["2.channels"].sum())
        assert tuple(records["arrays"]["0.lora_B"].shape) == (left, 2)


def test_the_bandit_learns_from_simulated_time() -> None:
    fed = federation(rounds=6, clock=FLEET, policy={"name": "ucb_tree", "lowest": 1})
    run(fed)
    policy = spine(fed).policy
    assert isinstance(policy, TreeUCB)
    assert all(len(policy.trees[c].points) == 6 for c in range(7))
    assert all(0 <= r <= 1 for tree in policy.trees.values() for *_, r in tree.points)
    assert max(len(tree.leaves) for tree in policy.trees.values()) > 1
    assert len(set(spine(fed).seconds.values())) > 1


def test_the_oracle_is_told_the_devices() -> None:
    speeds = {"jetson_tx2": 1.0, "workstation": 5.0}
    fed = federation(clock=FLEET, policy={"name": "oracle", "speeds": speeds})
    run(fed)
    pruned = {n: spine(fed).plan.gone(spine(fed).kept(n)) for n in fed.trainers}
    for node, share in pruned.items():
        assert (share > 0) == (fed.fleet.names[fed.fleet.kind[node - 1]] == "jetson_tx2")
    with pytest.raises(ConfigError, match=r"policy.speeds"):
        federation(clock=FLEET, policy={"name": "oracle", "speeds": {"phone": 1.0}})


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("lie", ["regrown", "more", "bits"])
def test_a_client_that_lies_about_its_groups_is_refused(lie: str, scope: str) -> None:
    """Groups that were gone are back, more are gone than asked for, or the bits are none."""
    bits = {"regrown": [1, 1, 1, 1, 1], "more": [1, 0, 0, 0, 0], "bits": [1] * 16}[lie]

    def answer(message: Message, reply: Message) -> list[Message]:
        data = torch.tensor(bits, dtype=torch.bool).numpy()
        record = packet(np.packbits(data).tobytes())
        reply.content["kept"] = record
        return [reply]

    params = {"step": 0.4, "interval": 2, "policy": "fixed", "scope": scope}
    row = Row("fedspine", params, model="prunable")
    fed = row.federation(rounds=2, wrap=lambda grid: Unreliable(grid, [3], answer, [2]))
    progress = run(fed)
    assert progress.rounds[2]["refused"] == 1
    (told,) = [r for r in progress.clients if r["client"] == 2 and r["round"] == 2]
    assert told["status"] == "refused"


def test_a_model_without_structures_is_told_what_is_needed() -> None:
    with pytest.raises(ConfigError, match="prunable = true"):
        Row("fedspine", model="lora").federation()


def test_messages_name_target_and_rank() -> None:
    fed = federation(policy="fixed", target=0.5)
    progress = fed.begin()
    for message in messages_of(fed, progress.arrays, 1):
        config = message.content.config_records["config"]
        assert config["target"] == pytest.approx(0.25)
        assert config["rank"] == 2


@pytest.mark.parametrize(("aggregation", "simpler"), [("dense", "flexlora"), ("pad", "fedit")])
def test_without_pruning_it_is_the_simpler_strategy_bit_for_bit(
    aggregation: str, simpler: str
) -> None:
    options = {"target": 0.0, "policy": "fixed", "aggregation": aggregation}
    mine = Row("fedspine", options, model="prunable").federation(runtime={"executor": "serial"})
    theirs = Row(simpler, model="prunable").federation(runtime={"executor": "serial"})
    assert sha256(run(mine).arrays) == sha256(run(theirs).arrays)
