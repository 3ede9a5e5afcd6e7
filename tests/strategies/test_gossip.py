"""Gossip among nodes: what must hold of any network, whole, cut, or with nodes missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message

from clients.dispfl import evolved
from fedsim.client_app import ProgramApp
from fedsim.config import StrategyConfig
from fedsim.core import gossip, topology
from fedsim.core.errors import ConfigError
from fedsim.core.records import from_record, plain, record_bytes, to_record
from fedsim.data import Ragged
from fedsim.runner import build_strategy
from fedsim.runtime import flower
from fedsim.runtime.grid import LocalGrid
from strategies.dfedavg import DFedAvg
from strategies.dispfl import DisPFL
from tests.contract import toy


def entry(name="dfedavg", **params):
    return StrategyConfig(name=name, params=params)


def nodes(fed):
    return fed.strategy.nodes


# ---------------------------------------------------------------------------- the routine


@pytest.mark.parametrize("kind", [*topology.FIXED, "directed"])
def test_a_node_that_mixes_for_itself_gets_the_bits_of_the_server(kind):
    m = 12
    weights = (
        topology.directed_exponential(m) if kind == "directed"
        else topology.metropolis(topology.FIXED[kind](m))
    )  # fmt: skip
    models = torch.randn(m, 33, generator=torch.Generator().manual_seed(0))
    together = gossip.mix(models, weights)
    for node in range(m):
        who = gossip.neighbours(weights, node)
        alone = gossip.combine(models[who], torch.from_numpy(weights[node, who]))
        assert torch.equal(alone, together[node])
    steps = gossip.mix(gossip.mix(models, weights), weights)
    assert torch.equal(gossip.mix(models, weights, 2), steps)
    power = torch.from_numpy(np.linalg.matrix_power(weights, 3)) @ models.double()
    torch.testing.assert_close(
        gossip.mix(models.double(), weights, 3), power, rtol=1e-12, atol=1e-12
    )


def test_golden_contraction_on_a_ring_of_five():
    # lambda = 1/3 + 2/3 cos(2 pi / 5) = 0.53934; its eigenvector shrinks by just that
    weights = topology.metropolis(topology.ring(5))
    rate = topology.second_eigenvalue(weights)
    assert rate == pytest.approx(1 / 3 + 2 / 3 * np.cos(2 * np.pi / 5))
    wave = torch.from_numpy(np.cos(2 * np.pi * np.arange(5) / 5))[:, None]
    for steps, bound in enumerate((0.539, 0.291, 0.157, 0.085), 1):
        shrunk = (
            gossip.consensus(gossip.mix(wave, weights, steps)) / gossip.consensus(wave)
        ) ** 0.5
        assert shrunk == pytest.approx(rate**steps, rel=1e-9)
        assert shrunk == pytest.approx(bound, abs=5e-4)


# ---------------------------------------------------------------------------- the network


def test_without_edges_it_is_local_training():
    fed = toy.federation(entry(edges=[]), rounds=3)
    toy.run(fed, 3)
    alone = toy.federation(entry("local_only"), rounds=3)
    toy.run(alone, 3)
    layout = fed.env.model.layout
    for client in range(7):
        state = from_record(alone.grid.context(client + 1).state["KnFu.model"])
        assert torch.equal(nodes(fed)[client], layout.flatten(state))


def test_on_the_complete_graph_all_nodes_agree_after_every_round():
    for steps in (1, 3):
        fed = toy.federation(entry(topology="full", gossip_steps=steps), rounds=2)
        row = toy.run(fed, 2).rounds[-1]
        assert (nodes(fed) == nodes(fed)[0]).all()
        assert row["consensus"] < 1e-12 < row["consensus_before"]
        assert row["spectral_gap"] == pytest.approx(1)


def test_gossip_keeps_the_averaged_model():
    fed = toy.federation(entry("dfedsam_mgs", rho=0.05), rounds=1)
    progress = fed.begin()
    fed.advance(progress)
    trained = fed.strategy.last["trained"]
    torch.testing.assert_close(nodes(fed).double().mean(0), trained.double().mean(0),
                               rtol=1e-6, atol=1e-7)  # fmt: skip
    row = progress.rounds[-1]
    assert row["consensus"] < row["consensus_before"]
    assert {"accuracy", "averaged_accuracy", "spectral_gap", "peer_bytes"} <= set(row)


def test_relabelling_nodes_and_edges_relabels_the_models():
    order = [3, 0, 6, 2, 5, 1, 4]
    place = {old: new for new, old in enumerate(order)}
    edges = [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [0, 4]]
    data = toy.federated()
    moved = replace(data, train=Ragged.from_lists([data.train[c] for c in order]))
    options = {"rounds": 2, "train": {"batch_size": 99, "epochs": 2}}
    one = toy.federation(entry(edges=edges), data=data, **options)
    other = toy.federation(
        entry(edges=[[place[a], place[b]] for a, b in edges]), data=moved, **options
    )
    for fed in (one, other):
        toy.run(fed, 2)
    torch.testing.assert_close(nodes(other), nodes(one)[order], rtol=1e-5, atol=1e-6)


def dead(message, reply):
    return [Message(Error(flower.CLIENT_RAISED, "gone"), reply_to=message)]


@pytest.mark.parametrize("name", ["dfedavg", "gossip_relay"])
def test_nodes_that_are_missing_keep_their_models_and_the_others_mix_without_them(name):
    gone = (2, 5)
    fed = toy.federation(
        entry(name), rounds=2, wrap=lambda grid: toy.Unreliable(grid, gone, dead, [2])
    )
    progress = fed.begin()
    fed.advance(progress)
    before = nodes(fed).clone()
    fed.advance(progress)
    for node in gone:
        assert torch.equal(nodes(fed)[node - 1], before[node - 1])
    here = [row for row in range(7) if row + 1 not in gone]
    weights = fed.strategy.last["weights"]
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (weights[np.ix_([1, 4], here)] == 0).all()
    trained = fed.strategy.last["trained"].double()
    torch.testing.assert_close(nodes(fed)[here].double().mean(0), trained[here].mean(0),
                               rtol=1e-6, atol=1e-6)  # fmt: skip


def test_a_third_of_the_nodes_coming_and_going():
    """Every round some are missing; weights stay doubly stochastic, and nodes come together."""
    fed = toy.federation(
        entry(topology="full"), rounds=12, cohort={"fraction": 0.7}, train={"lr": 1e-6}
    )
    progress = fed.begin()
    draw = torch.Generator().manual_seed(0)
    fed.strategy.nodes = torch.randn(nodes(fed).shape, generator=draw)
    mean = nodes(fed).double().mean(0)
    apart = [gossip.consensus(nodes(fed))]
    for _ in range(12):
        fed.advance(progress)
        weights = fed.strategy.last["weights"]
        np.testing.assert_allclose(weights.sum(0), 1)
        np.testing.assert_allclose(weights.sum(1), 1)
        apart.append(gossip.consensus(nodes(fed)))
    assert apart[-1] < 1e-3 * apart[0]
    torch.testing.assert_close(nodes(fed).double().mean(0), mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_network_that_was_cut_heals(parts):
    """Within twice the diameter in rounds the nodes are nearer than when the cut ended."""
    sizes = (8,) * 12
    fed = toy.federation(
        entry(topology="torus", cuts=[[1, 6, parts]]), data=toy.federated(sizes), rounds=20
    )
    progress = fed.begin()
    for _ in range(6):
        fed.advance(progress)
    assert progress.rounds[-1]["spectral_gap"] == pytest.approx(0, abs=1e-9)
    part = np.arange(12) * parts // 12
    means = torch.stack([nodes(fed)[torch.from_numpy(part == p)].mean(0) for p in range(parts)])
    assert gossip.consensus(means) > 0
    apart = gossip.consensus(nodes(fed))
    diameter = 3  # of the 3 x 4 torus
    for _ in range(2 * diameter):
        fed.advance(progress)
    assert progress.rounds[-1]["spectral_gap"] > 0.1
    assert gossip.consensus(nodes(fed)) < 0.5 * apart


@pytest.mark.parametrize("name", ["dfedavg", "dispfl", "gossip_relay"])
def test_the_picture_shows_the_graph_of_the_run_also_when_it_is_only_reloaded(name):
    """The random graph hangs on the run's seed, which no round tells a run that has none left."""
    drawn = entry(name, topology="random", degree=1)
    fed = toy.federation(drawn, rounds=2)
    toy.run(fed, 2)
    seen = fed.strategy.last["weights"] > 0
    again = toy.federation(drawn, rounds=2)
    again.strategy.load_state_dict(fed.strategy.state_dict())
    told = again.artefacts()
    assert told == fed.artefacts()
    assert {tuple(sorted(e)) for e in told["topology"]["edges"]} == {
        (i, j) for i, j in np.argwhere(seen).tolist() if i < j
    }


class Numbered(flower.OwnGrid):
    """Nodes with ids as Flower's: large, without a gap-free order."""

    def __init__(self, inner, ids):
        self.inner, self.ids = inner, ids

    set_run = push_messages = pull_messages = run = None

    def get_node_ids(self):
        return self.ids

    def send_and_receive(self, messages, *, timeout=None):
        near = [
            Message(m.content, self.ids.index(m.metadata.dst_node_id) + 1, m.metadata.message_type)
            for m in messages
        ]
        for message, reply in zip(messages, self.inner.send_and_receive(near), strict=True):
            yield Message(reply.content, reply_to=message)


@pytest.mark.parametrize("name", ["dfedavg", "dispfl", "gossip_relay"])
def test_flowers_own_loop_with_flowers_own_node_ids(name):
    fed = toy.federation(entry(name, topology="random", degree=2), rounds=2)
    told = ConfigRecord(dict(fed.told(1)))
    strategy = build_strategy(entry(name, topology="random", degree=2))
    ids = [10**15 + 7919 * c for c in range(7)]
    initial = plain(fed.env.model.initial())
    grid = Numbered(LocalGrid(ProgramApp(fed.env), 7), ids)
    strategy.start(grid, initial, 2, train_config=told, evaluate_config=told)
    toy.run(fed, 2)
    assert strategy.ids == ids
    assert torch.equal(strategy.nodes, nodes(fed))


# ---------------------------------------------------------------------------- the relay


def held(fed, client):
    """The model that a node holds."""
    state = from_record(fed.grid.context(client + 1).state["Gossip.model"])
    return fed.env.model.layout.flatten(state)


def test_both_transports_give_the_same_models():
    options = {"rho": 0.05, "gossip_steps": 3, "topology": "exponential"}
    server = toy.federation(entry("dfedsam", **options), rounds=3)
    relay = toy.federation(entry("gossip_relay", **options), rounds=3)
    one, other = toy.run(server, 3), toy.run(relay, 3)
    for client in range(7):
        assert torch.equal(held(relay, client), nodes(server)[client])
    for a, b in zip(one.rounds, other.rounds, strict=True):
        for name in ("averaged_accuracy", "consensus", "consensus_before", "peer_bytes"):
            assert a.get(name) == b.get(name), name
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=1e-12)


def test_a_relay_carries_what_gossip_costs():
    """Q models up a node and round, and Q times its neighbours' models down."""
    fed = toy.federation(entry("gossip_relay", gossip_steps=2), rounds=1)
    progress = toy.run(fed, 1)
    model = record_bytes(fed.env.model.layout)
    row = progress.rounds[1]
    assert 7 * 2 * model <= row["bytes_up"] < 7 * 2 * model + 7 * 200
    numbers = fed.env.model.layout.size
    assert row["bytes_down"] >= 7 * 2 * 2 * 4 * numbers


def test_a_node_lost_between_gossip_steps_misses_the_rest():
    class Lossy(toy.Wrapped):
        def answer(self, message, reply):
            config = message.content.config_records["config"]
            mixing = config.get("phase") == "mix"
            if mixing and message.metadata.dst_node_id == 3:
                return dead(message, reply)
            return [reply]

    fed = toy.federation(entry("gossip_relay", gossip_steps=3), rounds=2, wrap=Lossy)
    progress = toy.run(fed, 2)
    assert not any(r["abandoned"] for r in progress.rounds)
    assert progress.rounds[-1]["admitted"] == 6


# ---------------------------------------------------------------------------- DisPFL


def test_a_mask_keeps_its_size_and_drops_the_smallest():
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    weight = torch.tensor([5.0, 0.1, 3, 0.2, 0, 0, 0, 0])
    slope = torch.tensor([0.0, 0, 0, 0, 1, 9, 2, 8])
    assert evolved(mask, weight, slope, 0.5).tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    assert evolved(mask, weight, slope, 0.0).tolist() == mask.tolist()
    both = evolved(mask.repeat(3, 1), weight.repeat(3, 1), slope.repeat(3, 1), 0.5)
    assert both.sum(1).tolist() == [4, 4, 4]


def test_models_stay_within_masks_and_masks_come_apart():
    fed = toy.federation(entry("dispfl", density=0.5), rounds=4, model="mlp")
    progress = toy.run(fed, 4)
    masks, layout = fed.strategy.masks, fed.env.model.layout
    assert (nodes(fed)[:, : layout.num_trainable][masks == 0] == 0).all()
    for name in layout.trainable:
        span = layout.span(name)
        count = span.stop - span.start
        dense = len(layout.shapes[layout.names.index(name)]) < 2
        assert set(masks[:, span].sum(1).tolist()) == {count if dense else round(0.5 * count)}
    overlap = [r["overlap"] for r in progress.rounds[1:]]
    assert 0.5 < overlap[-1] < 1
    dense = toy.run(toy.federation(entry("dfedavg"), rounds=1, model="mlp"), 1)
    assert progress.rounds[1]["peer_bytes"] < dense.rounds[1]["peer_bytes"]


def test_a_mask_that_is_no_mask_is_refused():
    def half(message, reply):
        mask = {n: t * 0.5 for n, t in from_record(reply.content["mask"]).items()}
        content = type(reply.content)({**reply.content, "mask": to_record(mask)})
        return [Message(content, reply_to=message)]

    fed = toy.federation(entry("dispfl"), wrap=lambda grid: toy.Unreliable(grid, [2], half))
    progress = toy.run(fed, 1)
    (reason,) = [r["reason"] for r in progress.clients if "reason" in r]
    assert reason.startswith("malformed: a mask with entries that are neither 0 nor 1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DFedAvg(cuts=[[3, 2, 2]]), "cuts = "),
        (lambda: DFedAvg(cuts=[[1, 2, 1]]), "cuts = "),
        (lambda: DisPFL(density=0.0), "density = 0"),
        (lambda: DisPFL(anneal=2.0), "anneal = 2"),
        (lambda: DisPFL(gossip_steps=2), "gossip_steps = 2 must be 1"),
    ],
)
def test_wrong_parameters_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
