"""What only one kind of strategy can suffer: directions, adapters, seeds, gossip.

Elsewhere: clusters that lose everybody or that somebody claims (`tests/strategies/test_fedap.py`);
packets of seeds, ledgers cut anywhere (`test_fedkseed_robust.py`, `test_ferret_robust.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedsim.config import StrategyConfig
from fedsim.core import kseed, principal, rng, topology
from fedsim.core.gossip import consensus, mix
from fedsim.core.records import as_flat, from_record
from fedsim.federation import Federation
from fedsim.gate import Gate
from fedsim.runtime import flower
from tests.contract import toy

Answer = Callable[[Message, Message], list[Message]]
BAD = 2
"""The node that misbehaves."""


def federation(name: str, model: str = "softmax", how: Answer | None = None, **params: Any) -> Any:
    """A toy federation in which a node may misbehave."""
    entry = StrategyConfig(name=name, params=params)
    wrap = (lambda grid: toy.Unreliable(grid, (BAD,), how)) if how else (lambda grid: grid)
    return toy.federation(entry, model=model, wrap=wrap)


def arrays(change: Callable[[dict[str, Array]], dict[str, Array]]) -> Answer:
    """The reply's arrays become others."""

    def answer(message: Message, reply: Message) -> list[Message]:
        entries = {n: Array(t.numpy()) for n, t in from_record(reply.content["arrays"]).items()}
        content = RecordDict({**reply.content, "arrays": ArrayRecord(change(entries))})
        return [Message(content, reply_to=message)]

    return answer


def told(**numbers: float) -> Answer:
    """The reply's metrics become others."""

    def answer(message: Message, reply: Message) -> list[Message]:
        metrics = MetricRecord({**reply.content["metrics"], **numbers})
        return [Message(RecordDict({**reply.content, "metrics": metrics}), reply_to=message)]

    return answer


def without(fed: Federation) -> Federation:
    """The same without the node that misbehaves."""
    fed.trainers = [n for n in fed.trainers if n != BAD]
    return fed


# ------------------------------------------------------------------- FedLD: losses and directions


@pytest.mark.parametrize("loss", [-1.0, 0.0, 1e18])
def test_a_lie_about_the_loss_moves_nothing(loss: float) -> None:
    """Weights come from the updates alone, so no client can raise its own by what it says."""
    lying = toy.run(federation("fedld", how=told(loss=loss)))
    assert toy.sha256(lying.arrays) == toy.sha256(toy.run(federation("fedld")).arrays)


def test_a_loss_that_is_no_number_is_refused() -> None:
    progress = toy.run(federation("fedld", how=told(loss=float("nan"))))
    assert [r["refused"] for r in progress.rounds[1:]] == [1, 1, 1]
    clean = toy.run(without(federation("fedld")))
    assert toy.sha256(progress.arrays) == toy.sha256(clean.arrays)


@pytest.mark.parametrize(
    "gram",
    [
        torch.ones(4, 4),
        torch.zeros(4, 4),
        torch.eye(4) * 1e30,
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),  # not positive semi-definite
        torch.full((3, 3), 1e-300),
    ],
    ids=["identical", "zero", "huge", "indefinite", "tiny"],
)
def test_coefficients_are_finite(gram: torch.Tensor) -> None:
    c = principal.coefficients(gram.double(), 0.8, None, "none", 1e-7)
    assert bool(torch.isfinite(c).all())
    assert float(c.abs().sum()) <= len(c)


def test_a_decomposition_that_fails_leaves_the_mean(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with caplog.at_level(logging.WARNING):
        found = toy.run(federation("fedld"))
    assert "did not converge" in caplog.text
    plain = toy.run(federation("fedld", aggregation="mean"))
    assert toy.close(found.arrays, plain.arrays, 1e-6)


# ------------------------------------------------------------------------------------ adapters


def _swapped(entries: dict[str, Array]) -> dict[str, Array]:
    return {n.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x", "lora_B"): a
            for n, a in entries.items()}  # fmt: skip


def _wider(entries: dict[str, Array]) -> dict[str, Array]:
    """Of another rank."""

    def grown(name: str, array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, array], axis=int("lora_B" in name))

    return {n: Array(grown(n, a.numpy())) for n, a in entries.items()}


def _named(name: str) -> Callable[[dict[str, Array]], dict[str, Array]]:
    def change(entries: dict[str, Array]) -> dict[str, Array]:
        return {**entries, name: Array(np.zeros((5, 4), np.float32))}

    return change


def _times(factor: float) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda entries: {n: Array(a.numpy() * np.float32(factor)) for n, a in entries.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_wider, "wrong_shape"),
        (_swapped, "wrong_shape"),
        (_named("0.base.weight"), "wrong_names"),
        (_named("../x"), "wrong_names"),
        (lambda entries: {f"1{n}": a for n, a in entries.items()}, "wrong_names"),
        (_times(1e30), "too_large"),
    ],
    ids=["rank", "swapped", "base", "path", "target", "huge"],
)
@pytest.mark.parametrize("name", ["fedit", "lora_lego"])
def test_hostile_adapters_are_refused_and_the_base_stays(
    name: str, change: Any, reason: str
) -> None:
    fed = federation(name, "lora", arrays(change))
    module = fed.env.model.module
    base = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    progress = toy.run(fed, 2)
    reasons = [r["reason"] for r in progress.clients if r.get("status") == "refused"]
    assert len(reasons) == 2
    assert all(r.startswith(reason) for r in reasons)
    clean = toy.run(without(federation(name, "lora")), 2)
    assert toy.sha256(progress.arrays) == toy.sha256(clean.arrays)
    assert all(torch.equal(p, base[n]) for n, p in module.named_parameters() if n in base)


def test_an_adapter_of_zeros_is_an_update_of_nothing() -> None:
    progress = toy.run(federation("fedit", "lora", arrays(_times(0.0))), 2)
    assert [r["admitted"] for r in progress.rounds[1:]] == [7, 7]
    assert bool(torch.isfinite(as_flat(progress.arrays).flat).all())


# --------------------------------------------------------------------------------------- seeds


def test_a_model_is_rebuilt_to_the_same_bits_on_any_number_of_threads() -> None:
    seeds, sums = np.arange(8, dtype=np.uint64), np.linspace(-1, 1, 8)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            w = torch.ones(100_003)
            kseed.rebuild(w, seeds, sums, 0.1, "gaussian")
            found.append(w)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(w, found[0]) for w in found)


# --------------------------------------------------------------------------------------- gossip

NODES, DIAMETER = 12, 6


@pytest.mark.parametrize("parts", [2, 3])
def test_a_network_that_falls_apart_and_heals(parts: int) -> None:
    """A ring in pieces: each agrees within itself, nothing is lost; whole again, all agree."""
    x = torch.from_numpy(rng.stream(3, 0, rng.SERVER, "gossip").normal(size=(NODES, 5)))
    mean, part = x.mean(0), np.arange(NODES) * parts // NODES
    ring = topology.ring(NODES)
    broken = topology.metropolis(ring & (part[:, None] == part))
    own = [x[part == p].mean(0) for p in range(parts)]
    for _ in range(20):
        x = mix(x, broken)
        for p in range(parts):
            assert torch.allclose(x[part == p].mean(0), own[p], atol=1e-9)
    apart = [consensus(x)]
    for _ in range(2 * DIAMETER):
        x = mix(x, topology.metropolis(ring))
        apart.append(consensus(x))
    assert all(after < before for before, after in pairwise(apart))
    assert apart[-1] < apart[0] / 3
    assert torch.allclose(x.mean(0), mean, atol=1e-9)


def test_a_third_of_the_nodes_comes_and_goes() -> None:
    x = torch.from_numpy(rng.stream(4, 0, rng.SERVER, "gossip").normal(size=(NODES, 5)))
    mean, draw, first = x.mean(0), rng.stream(4, 0, rng.SERVER, "churn"), consensus(x)
    for _ in range(60):
        there = np.flatnonzero(draw.random(NODES) < 0.7)
        w = topology.metropolis(topology.among(topology.ring(NODES), there))
        assert np.allclose(w.sum(1), 1)
        assert np.allclose(w.sum(0), 1)
        away = np.setdiff1d(np.arange(NODES), there)
        mixed = mix(x, w)
        assert torch.equal(mixed[away], x[away])
        x = mixed
    assert torch.allclose(x.mean(0), mean, atol=1e-9)
    assert consensus(x) < first / 10


def test_a_node_goes_on_alone() -> None:
    """Everybody else is gone for a round: who is there trains, the others keep what they have."""

    def gone(message: Message, reply: Message) -> list[Message]:
        return [Message(Error(flower.CLIENT_RAISED, "gone"), reply_to=message)]

    fed = toy.federation(
        StrategyConfig(name="dfedavg"),
        wrap=lambda grid: toy.Unreliable(grid, range(2, 8), gone, [2]),
        cohort={"quorum": 0.1},
    )
    strategy: Any = fed.strategy
    progress = fed.begin()
    fed.advance(progress)
    before = strategy.nodes.clone()
    fed.advance(progress)
    assert not torch.equal(strategy.nodes[0], before[0])
    assert torch.equal(strategy.nodes[1:], before[1:])
    fed.advance(progress)
    assert not torch.equal(strategy.nodes[1:], before[1:])


# ---------------------------------------------------------------------------------- planted faults


def _biased(patch: pytest.MonkeyPatch) -> None:
    """Gossip weights that only sum to one over the rows."""

    def weights(graph: topology.Graph) -> np.ndarray:
        linked = graph | np.eye(len(graph), dtype=bool)
        linked[0] = np.eye(len(graph), dtype=bool)[0]
        return linked / linked.sum(1, keepdims=True)

    patch.setattr(topology, "metropolis", weights)


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "gossip loses mass": (_biased, test_a_third_of_the_nodes_comes_and_goes),
    "pieces of a network cannot agree": (
        lambda patch: patch.setattr(topology, "ring", lambda m: np.zeros((m, m), dtype=bool)),
        lambda: test_a_network_that_falls_apart_and_heals(2),
    ),
    "who is away is mixed": (
        lambda patch: patch.setattr(topology, "among", lambda graph, active: graph),
        test_a_node_goes_on_alone,
    ),
    "metrics are believed": (
        lambda patch: patch.setattr(Gate, "_check_metrics", lambda *_: None),
        test_a_loss_that_is_no_number_is_refused,
    ),
    "adapters are not looked at": (
        lambda patch: patch.setattr(Gate, "checked", lambda self, record, layout: record),
        lambda: test_hostile_adapters_are_refused_and_the_base_stays(
            "fedit", _times(1e30), "too_large"
        ),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test = PLANTED[fault]
    plant(monkeypatch)
    try:
        test()
    except Exception:
        return
    pytest.fail("nothing was noticed")
