"""FedLD: margin control by golden numbers, and what the server does with every entry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.fedld import FedLD as Client
from clients.fedld import margin
from fedsim.config import StrategyConfig
from fedsim.core.criteria import criterion
from fedsim.core.diagnostics import decompose
from fedsim.core.errors import ConfigError
from fedsim.core.model import FlatModel
from fedsim.core.records import from_record, to_record
from fedsim.core.strategy import Setting
from fedsim.runtime.grid import LocalGrid
from strategies.fedld import FedLD, FedLDOfficial, principal_aggregate
from tests.contract import toy

CE = criterion("cross_entropy")
State = dict[str, Tensor]

# ------------------------------------------------------------------------------- margin control

Z = torch.tensor([[2, 0, -1], [0, 1, 0]], dtype=torch.float64)
Y = torch.tensor([0, 2])


def test_golden_f3() -> None:
    z, y = Z.numpy(), Y.numpy()
    P = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    ce = -np.log(P[[0, 1], y]).mean()
    assert ce == pytest.approx(0.8606453667, abs=1e-10)
    assert (P**2).sum() == pytest.approx(1.1485440558, abs=1e-10)
    prob = ce + 0.1 * np.log(1 + (P**2).sum())
    logit = ce + 0.1 * np.log(1 + (z**2).sum(1)).mean()
    assert (prob, logit) == pytest.approx((0.9371244097, 0.9848906992), abs=1e-10)
    for form, golden in (("prob", prob), ("logit", logit)):
        found = Client(margin_lambda=0.1, margin_form=form).loss(CE, Z, Y, None)
        assert found.item() == pytest.approx(golden, abs=1e-10)


def test_no_margin_is_the_plain_loss_bit_for_bit() -> None:
    assert torch.equal(Client(margin_lambda=0.0).loss(CE, Z, Y, None), CE(Z, Y))


@pytest.mark.parametrize(("B", "C"), [(1, 2), (5, 3), (50, 10)])
def test_the_range_of_the_margin(B: int, C: int) -> None:
    z = torch.from_numpy(np.random.default_rng(B).normal(size=(B, C)) * 3)
    low, high = math.log(1 + B / C), math.log(1 + B)
    assert low < margin(z) < high
    assert margin(torch.zeros(B, C)).item() == pytest.approx(low, rel=1e-6)
    assert margin(z * 1e6).item() == pytest.approx(high, rel=1e-6)
    assert margin(z + 3.7).item() == pytest.approx(margin(z).item(), rel=1e-9)
    assert margin(z, form="logit") > margin(z / 2, form="logit") > 0
    assert margin(0 * z, form="logit") == 0


@pytest.mark.parametrize("form", ["prob", "logit"])
def test_padding_does_not_count(form: str) -> None:
    padded = torch.cat([Z, torch.full((2, 3), 9.0, dtype=Z.dtype)])
    weight = torch.tensor([1.0, 1, 0, 0], dtype=Z.dtype)
    assert margin(padded, weight, form).item() == pytest.approx(margin(Z, None, form).item())


@pytest.mark.parametrize("form", ["prob", "logit"])
def test_it_holds_for_stacked_clients(form: str) -> None:
    program = Client(margin_lambda=0.3, margin_form=form)
    z = torch.stack([Z, 2 * Z, -Z])
    weight = torch.tensor([[1.0, 1], [1, 0], [1, 1]], dtype=Z.dtype)

    def loss(z: Tensor, weight: Tensor) -> Tensor:
        return program.loss(CE, z, Y, weight)

    alone = [loss(a, b) for a, b in zip(z, weight, strict=True)]
    torch.testing.assert_close(torch.func.vmap(loss)(z, weight), torch.stack(alone))
    torch.func.vmap(torch.func.grad(loss))(z, weight)


def test_in_sequences_every_real_position_is_a_row() -> None:
    """Two texts of lengths 2 and 1, padded to 2, against three rows."""
    text, flat = torch.stack([Z, Z.flip(0)]), torch.stack([Z[0], Z[1], Z[1]])
    target = torch.tensor([[0, 2], [2, -100]])
    program = Client(margin_lambda=0.1)
    found = program.loss(criterion("next_token"), text, target, None)
    expected = program.loss(CE, flat, torch.tensor([0, 2, 2]), None)
    assert found.item() == pytest.approx(expected.item())
    weight = torch.tensor([1.0, 0.0], dtype=Z.dtype)
    found = program.loss(criterion("next_token"), text, target, weight)
    assert found.item() == pytest.approx(program.loss(CE, Z, Y, None).item())


def test_margin_needs_classes() -> None:
    with pytest.raises(ConfigError, match="needs classes"):
        Client(margin_lambda=0.1).loss(criterion("mse"), Z[:, 0], Z[:, 1], None)
    with pytest.raises(ConfigError, match="margin_form"):
        Client(margin_form="cosine")


# -------------------------------------------------------------------------------------- server


def one_round(
    strategy: FedLD,
    old: State,
    updates: Sequence[State],
    examples: Sequence[int] | None = None,
) -> tuple[State, Mapping[str, Any]]:
    """What the server makes of these updates."""
    grid = LocalGrid(ClientApp(), len(updates))
    messages = strategy.configure_train(1, to_record(old), ConfigRecord({"lr": 0.1}), grid)
    replies = []
    for message, update, count in zip(messages, updates, examples or [1] * 99, strict=False):
        metrics = MetricRecord({"num-examples": count})
        content = RecordDict({"arrays": to_record(update), "metrics": metrics})
        replies.append(Message(content, reply_to=message))
    arrays, record = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return from_record(arrays), record or {}


def updates(N: int = 5, scale: float = 1.0, seed: int = 0) -> list[State]:
    draw = np.random.default_rng(seed)
    return [
        {n: torch.from_numpy(scale * draw.normal(size=s)).float() for n, s in SHAPES.items()}
        for _ in range(N)
    ]


SHAPES = {"a": (3, 4), "b": (3,), "c": (1,)}
OLD = {n: torch.ones(s) for n, s in SHAPES.items()}


def mean(clients: Sequence[State]) -> State:
    return {n: torch.stack([u[n] for u in clients]).mean(0) for n in clients[0]}


def close(found: State, move: State) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, OLD[name] + move[name], rtol=1e-5, atol=1e-6)


def principal(clients: Sequence[State], **options: Any) -> State:
    stacks = {n: torch.stack([u[n].flatten() for u in clients]) for n in SHAPES}
    return {n: principal_aggregate(G, **options).view(SHAPES[n]) for n, G in stacks.items()}


def test_the_first_round_is_the_plain_mean_and_the_next_are_principal() -> None:
    strategy, first, second = FedLD(), updates(seed=1), updates(seed=2)
    close(one_round(strategy, OLD, first)[0], mean(first))
    close(one_round(strategy, OLD, second)[0], principal(second))
    eager = FedLD(first_round="principal")
    close(one_round(eager, OLD, first)[0], principal(first))


def test_an_entry_is_taken_by_its_mean_until_it_has_moved() -> None:
    """The gate of the authors' code: a round in which nobody moves does not count."""
    strategy, still, clients = FedLD(), updates(scale=0.0), updates()
    for u in still[:2]:
        u["b"] += 1.0
    one_round(strategy, OLD, still)
    assert strategy.state_dict() == {"seen": ["b"]}
    found = one_round(strategy, OLD, clients)[0]
    close(found, mean(clients) | {"b": principal(clients)["b"]})


def test_seen_survives_a_restart() -> None:
    strategy, clients = FedLD(), updates()
    one_round(strategy, OLD, clients)
    restarted = FedLD()
    restarted.load_state_dict(strategy.state_dict())
    one, other = (one_round(s, OLD, clients)[0] for s in (strategy, restarted))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_examples_do_not_count() -> None:
    found = [
        one_round(FedLD(first_round=first), OLD, updates(), examples)[0]
        for first in ("mean", "principal")
        for examples in ([1, 1, 1, 1, 1], [1, 1000, 3, 7, 20])
    ]
    for even, uneven in (found[:2], found[2:]):
        assert all(torch.equal(even[n], uneven[n]) for n in even)


def test_the_order_of_entries_does_not_count_but_the_split_does() -> None:
    clients = updates()
    found = one_round(FedLD(first_round="principal"), OLD, clients)[0]
    turned = [{n: u[n] for n in reversed(SHAPES)} for u in clients]
    old = {n: OLD[n] for n in reversed(SHAPES)}
    for name, value in one_round(FedLD(first_round="principal"), old, turned)[0].items():
        assert torch.equal(value, found[name])
    whole = [{"all": torch.cat([u[n].flatten() for n in SHAPES])} for u in clients]
    joined = one_round(FedLD(first_round="principal"), {"all": torch.ones(16)}, whole)[0]["all"]
    assert not torch.allclose(joined[:12].view(3, 4), found["a"], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"server_lr": 0.5}, lambda c: {n: 0.5 * v for n, v in principal(c).items()}),
        ({"rho": 0.4}, lambda c: principal(c, rho=0.4)),
        ({"r_max": 1}, lambda c: principal(c, r_max=1)),
        ({"renorm": "mean_norm"}, lambda c: principal(c, renorm="mean_norm")),
        ({"aggregation": "mean"}, mean),
    ],
)
def test_options_reach_the_aggregate(options: dict[str, Any], expected: Any) -> None:
    strategy, clients = FedLD(**options), updates()
    one_round(strategy, OLD, clients)
    close(one_round(strategy, OLD, clients)[0], expected(clients))


@pytest.mark.parametrize("buffers", ["mean", "principal", "skip"])
def test_buffers(buffers: Any) -> None:
    """Statistics by the option, counters by their maximum, parameters as ever."""
    model = FlatModel(toy.module("bn"), CE)
    strategy = FedLD(buffers=buffers, first_round="principal")
    strategy.setup(Setting(model.info, 3, 0, 1))
    grid, old = LocalGrid(ClientApp(), 3), model.initial()
    messages = strategy.configure_train(1, old, ConfigRecord(), grid)
    replies, G = [], torch.tensor([[3.0, 0, 1, 0, 0], [0, 2, 0, 1, 0], [1, 1, 0, 0, 4]])
    for i, message in enumerate(messages):
        state = {n: torch.zeros_like(t) for n, t in old.state().items()}
        state |= {"1.running_mean": G[i], "1.bias": G[i], "1.num_batches_tracked": torch.tensor(i)}
        metrics = MetricRecord({"num-examples": 1})
        update = to_record(state, frozenset(old.layout.trainable))
        replies.append(Message(RecordDict({"arrays": update, "m": metrics}), reply_to=message))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    moved = {n: t - old.state()[n] for n, t in from_record(arrays).items()}
    expected = {"mean": G.mean(0), "principal": principal_aggregate(G), "skip": 0 * G[0]}
    torch.testing.assert_close(moved["1.running_mean"], expected[buffers])
    torch.testing.assert_close(moved["1.bias"], principal_aggregate(G))
    assert moved["1.num_batches_tracked"] == (0 if buffers == "skip" else 2)


def test_500_rounds_with_a_client_that_does_not_move_stay_finite() -> None:
    strategy, state = FedLD(), {n: v.clone() for n, v in OLD.items()}
    for number in range(500):
        clients = updates(4, scale=1e-3, seed=number)
        for u in clients[:1]:
            u.update({n: torch.zeros(s) for n, s in SHAPES.items()})
        state, _ = one_round(strategy, state, clients)
    assert all(bool(torch.isfinite(v).all()) for v in state.values())


def test_warm_up() -> None:
    ramp, official = FedLD(warmup_rounds=5), FedLDOfficial()
    rounds = range(1, 8)
    assert [ramp.warmup_factor(r, 1) for r in rounds] == [0.2, 0.4, 0.6, 0.8, 1, 1, 1]
    assert [official.warmup_factor(r, 1) for r in rounds] == [0, 0.2, 0.4, 0.6, 0.8, 1, 1]
    assert [official.warmup_factor(r, 5) for r in rounds] == [0, 1, 1, 1, 1, 1, 1]
    assert [FedLD().warmup_factor(r, 1) for r in rounds] == [1.0] * 7
    grid, old = LocalGrid(ClientApp(), 2), to_record(OLD)
    told = ConfigRecord({"lr": 0.01, "epochs": 1})
    (message, _) = ramp.configure_train(2, old, told, grid)
    assert message.content["config"]["lr"] == pytest.approx(0.004)
    assert told["lr"] == 0.01
    with pytest.raises(ConfigError, match="lr"):
        ramp.configure_train(2, old, ConfigRecord(), grid)


def test_the_official_preset() -> None:
    """BatchNorm statistics stay, nobody moves in round 1, and rounds 1 and 2 are means."""
    official, mean_only = (
        toy.federation(
            StrategyConfig(name="fedld_official", params={"aggregation": aggregation}),
            model="bn",
            train={"momentum": 0.5, "weight_decay": 5e-4},
        )
        for aggregation in ("principal", "mean")
    )
    one, other = official.begin(), mean_only.begin()
    digests = []
    for _ in range(3):
        official.advance(one)
        mean_only.advance(other)
        digests.append((toy.sha256(one.arrays), toy.sha256(other.arrays)))
    assert digests[0][0] == toy.sha256(official.env.model.initial())
    assert digests[1][0] == digests[1][1] != digests[0][0]
    assert digests[2][0] != digests[2][1]
    state, initial = from_record(one.arrays), official.env.model.initial().state()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(state[name], initial[name])
    assert FedLDOfficial().margin_lambda == 0.03


# --------------------------------------------------------------------------------- diagnostics


def test_diagnostics_are_those_of_the_whole_model() -> None:
    strategy, clients = FedLD(diagnostics=True), updates()
    _, first = one_round(strategy, OLD, clients)
    assert first["fedld_norm_ratio"] == pytest.approx(1)
    assert first["fedld_cosine"] == pytest.approx(1)
    _, second = one_round(strategy, OLD, clients)
    g, m = (
        torch.cat([v.flatten() for v in move.values()])
        for move in (principal(clients), mean(clients))
    )
    assert second["fedld_norm_ratio"] == pytest.approx((g.norm() / m.norm()).item(), rel=1e-5)
    cosine = (g @ m / g.norm() / m.norm()).item()
    assert second["fedld_cosine"] == pytest.approx(cosine, rel=1e-5)
    energies = [
        torch.linalg.svdvals(torch.stack([u[n].flatten() for u in clients])) ** 2 for n in SHAPES
    ]
    top = sum(e[0] for e in energies) / sum(e.sum() for e in energies)
    assert second["fedld_top_energy"] == pytest.approx(float(top), rel=1e-5)
    _, none = one_round(FedLD(diagnostics=True), OLD, updates(scale=0.0))
    assert set(none.values()) == {1.0}


def test_the_terms_of_a_run_add_up_to_its_loss() -> None:
    entry = StrategyConfig(name="fedld", params={"diagnostics": True})
    for row in toy.run(toy.federation(entry)).rounds[1:]:
        terms = [row[f"fedld_{name}_loss"] for name in ("local", "shift", "aggregation")]
        assert sum(terms) == pytest.approx(row["loss"], rel=1e-6)
        assert all(map(math.isfinite, terms))


def test_the_decomposition_of_quadratic_losses() -> None:
    """F_m(w) = (w - b_m)^2 / 2 on client m, their mean on the test set."""
    b = {1: -1.0, 2: 0.5, 3: 2.0}

    def evaluate(model: Any, node: int | None) -> float:
        w = from_record(model)["w"].item()
        values = {n: 0.5 * (w - x) ** 2 for n, x in b.items()}
        return sum(values.values()) / 3 if node is None else values[node]

    def at(w: float) -> Any:
        return to_record({"w": torch.tensor([w], dtype=torch.float64)})

    clients = {n: at(0.8 * x) for n, x in b.items()}
    average = at(0.8 * sum(b.values()) / 3)
    terms = decompose(average, clients, evaluate)
    assert sum(terms.values()) == pytest.approx(evaluate(average, None), rel=1e-12)
    assert terms["aggregation"] < 0  # Jensen: the loss is convex
    same = decompose(at(0.3), dict.fromkeys(b, at(0.3)), evaluate)
    assert same["aggregation"] == pytest.approx(0)
    assert same["shift"] == pytest.approx(0)
    b |= dict.fromkeys(b, 0.5)
    assert decompose(average, clients, evaluate)["shift"] == pytest.approx(0)


# ------------------------------------------------------------------------------------ end to end


@pytest.mark.parametrize("rho", [0.1, 0.8, 1.0])
def test_clients_that_agree_follow_fedavg(rho: float) -> None:
    """Same data, all of it in one batch, no margin: the trajectory of FedAvg."""
    options = {"data": toy.federated(toy.EQUAL, identical=True), "train": {"batch_size": 8}}
    one, other = (
        toy.run(toy.federation(StrategyConfig(name=n, params=p), model="mlp", **options), 5)  # type: ignore[arg-type]
        for n, p in (("fedld", {"margin_lambda": 0.0, "rho": rho}), ("fedavg", {}))
    )
    assert toy.close(one.arrays, other.arrays, 1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rho", 0), ("rho", 1.1), ("margin_lambda", -1), ("r_max", 0), ("warmup_rounds", -1),
     ("server_lr", 0), ("renorm", "max"), ("buffers", "sum"), ("bn_mode", "off"),
     ("first_round", "none"), ("warmup", "cosine"), ("margin_form", "softmax"),
     ("rho", float("nan"))],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = {value} must be"):
        FedLD(**{name: value})
