"""Federated LoRA that merges into the base; ranks on the wire; adapters that must be refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from fedsim.client_app import ProgramApp
from fedsim.config import StrategyConfig
from fedsim.core.averaging import examples_of
from fedsim.core.errors import ConfigError, RunError
from fedsim.core.lora import Factors, flora
from fedsim.core.lora.patches import Patches, apply, deltas
from fedsim.core.lora.serving import halves
from fedsim.core.model import FlatModel
from fedsim.core.records import from_record
from fedsim.models.exporting import base_digest
from fedsim.runtime.grid import LocalGrid
from tests.contract import toy
from tests.strategies.test_lora import RANKS, exact_mean, factors, federation, one_round

# ------------------------------------------------------------------------ merging into the base


REBASING = [
    ("flora", {}), ("flora", {"ranks": [1, 2]}), ("fedex_lora", {"weighted": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params"), REBASING)
def test_merging_into_the_base_is_exact_in_every_round(name: str, params: dict) -> None:
    """The model moves by the exact mean of what clients trained, from where each began."""
    fed = federation(name, "lora_delta", **params)
    progress = fed.begin()
    for _ in range(3):
        before = total(fed, progress.arrays)
        start = adapters_of(fed, progress.arrays) if name == "fedex_lora" else None
        messages = toy.messages_of(fed, progress.arrays, progress.round + 1)
        contents = toy.contents_of(fed, messages)
        many = [factors(c.array_records["arrays"], fed) for c in contents]
        exact = {m: f.delta() for m, f in
                 flora(many, [examples_of(c) for c in contents]).items()}  # fmt: skip
        fed.advance(progress)
        after = total(fed, progress.arrays)
        for m, change in exact.items():
            begun = start[m].delta() if start else 0
            assert torch.allclose(after[m] - before[m], change - begun, atol=1e-6)
        assert progress.rounds[-1]["mean_gap"] < 1e-6


def adapters_of(fed, arrays) -> dict[str, Factors]:
    return factors(arrays, fed)


def total(fed, arrays) -> dict[str, torch.Tensor]:
    """The whole update of each module: what is merged, and the adapter."""
    state = from_record(arrays)
    return {
        m: state[d] + adapters_of(fed, arrays)[m].delta()
        for m, (d, _) in deltas(fed.setting.info).items()
    }


def kept(fed, client: int):
    """The base that a client keeps, or None."""
    state = fed.grid.context(client + 1).state.array_records
    return next((from_record(r) for n, r in state.items() if n.endswith("private")), None)


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_clients_keep_up_with_the_base_to_the_bit(name: str) -> None:
    """Whoever takes part has the server's base of the round before, however many it missed."""
    fed = toy.federation(
        StrategyConfig(name=name), model="lora_delta", rounds=8, cohort={"fraction": 0.4}
    )
    progress, before = fed.begin(), None
    for _ in range(8):
        before = from_record(progress.arrays)
        fed.advance(progress)
        rows = [r for r in progress.clients if r["round"] == progress.round]
        took_part = [r["client"] for r in rows if r.get("status") == "ok"]
        assert took_part
        for client in took_part:
            own = kept(fed, client)
            assert own is not None
            assert all(torch.equal(own[n], before[n]) for n in own)


def test_a_client_is_sent_what_it_lacks_and_no_more() -> None:
    fed = federation("flora", "lora_delta")
    progress = fed.begin()
    first = toy.messages_of(fed, progress.arrays, 1)
    assert all(set(m.content.array_records) == {"arrays"} for m in first)
    assert not list(first[0].content.array_records["arrays"])  # it begins by itself
    fed.advance(progress)
    stack = toy.messages_of(fed, progress.arrays, 2)[0].content.array_records["patch"]
    # Seven clients of rank 2 are more than a 5 x 4 matrix: it comes densely.
    assert {n.partition("@")[0].rpartition(".")[2] for n in stack} == {"delta"}
    log = fed.strategy.patches
    assert log.since(log.version, progress.arrays) is None


def test_patches_add_up_in_factors_and_densely() -> None:
    info = federation("flora", "lora_delta").setting.info
    fed = federation("flora", "lora_delta")
    patches, record = Patches(info, "flora"), fed.env.model.initial()
    draw = torch.Generator().manual_seed(3)
    versions = [record]
    for _ in range(4):
        update = {m: Factors(torch.randn(1, fed.strategy.shapes[a][1], generator=draw),
                             torch.randn(fed.strategy.shapes[b][0], 1, generator=draw), 0.5)
                  for m, (a, b) in halves(info).items()}  # fmt: skip
        record = patches.merge(record, update)
        versions.append(record)
    wanted = record.state()
    for held, have in [*enumerate(versions), (None, versions[1])]:
        sent = patches.since(held, record)
        state = dict(have.state())
        if sent is not None:
            apply(state, sent, info)
            apply(state, sent, info)  # twice is once
        assert all(torch.equal(state[n], wanted[n]) for n in state)
    short = {n.partition("@")[0].rpartition(".")[2] for n in patches.since(3, record)}
    assert short == {"lora_A", "lora_B"}
    behind = dict(versions[1].state())
    with pytest.raises(RunError, match="this client has lost what it kept"):
        apply(behind, patches.since(3, record), info)


def test_a_client_that_failed_is_sent_the_sum() -> None:
    def failing(message, reply):
        return [Message(Error(1, "gone"), reply_to=message)]

    fed = toy.federation(
        StrategyConfig(name="flora"), model="lora_delta", rounds=4,
        wrap=lambda grid: toy.Unreliable(grid, [3], failing, [2]),
    )  # fmt: skip
    progress = toy.run(fed, 2)
    assert fed.strategy.unsure == {3}
    sent = {m.metadata.dst_node_id: m.content.array_records["patch"]
            for m in toy.messages_of(fed, progress.arrays, 3)}  # fmt: skip
    assert {n.partition("@")[0].rpartition(".")[2] for n in sent[3]} == {"delta"}
    fed.advance(progress)
    assert fed.strategy.unsure == set()


def test_a_base_that_nothing_can_be_merged_into_is_refused() -> None:
    for name, params in (("flora", {}), ("fedex_lora", {}), ("lora_lego", {"mode": "residual"})):
        with pytest.raises(ConfigError, match="delta = true"):
            federation(name, "lora", **params)
    with pytest.raises(ConfigError, match="mode = keep"):
        federation("lora_lego", mode="keep")


@pytest.mark.parametrize("mode", ["merge_and_reinit", "residual"])
def test_lego_of_clients_that_begin_apart_does_not_degenerate(mode: str) -> None:
    fed = federation("lora_lego", "lora_delta", mode=mode, mass=True, weighted=True, clusters=14)
    before = fed.env.model.initial()
    progress = fed.begin()
    messages = toy.messages_of(fed, progress.arrays, 1)
    contents = toy.contents_of(fed, messages)
    exact = exact_mean(fed, contents)
    fed.advance(progress)
    # All ranks kept and weighed by mass: the exact mean.
    found = from_record(progress.arrays)
    for m, (d, _) in deltas(fed.setting.info).items():
        assert torch.allclose(found[d], exact[m], atol=1e-6)
    assert progress.rounds[-1]["lego_degenerate"] == 0
    assert all(torch.equal(found[n], before.state()[n]) for pair in
               halves(fed.setting.info).values() for n in pair)  # fmt: skip


def test_a_second_adapter_is_sent_whole_and_nothing_is_kept() -> None:
    fed = federation("lora_lego", "lora_delta", mode="residual", residual_rank=1)
    progress = toy.run(fed, 3)
    patch = toy.messages_of(fed, progress.arrays, 4)[0].content.array_records["patch"]
    assert {n.partition("@")[0].rpartition(".")[2] for n in patch} == {"lora_A", "lora_B"}
    assert all(kept(fed, c) is None for c in range(7))
    for m, (d, _) in deltas(fed.setting.info).items():
        merged = from_record(progress.arrays)[d]
        assert torch.linalg.matrix_rank(merged) == 1
        assert torch.allclose(fed.strategy.second[m].delta(), merged, atol=1e-6)


@pytest.mark.parametrize("name", ["fedit", "flexlora", "ffa_lora", "rolora", "fedsa_lora"])
def test_who_merges_nothing_sends_nothing_merged(name: str) -> None:
    fed, plain = federation(name, "lora_delta"), federation(name)
    progress = toy.run(fed, 2)
    messages = toy.messages_of(fed, progress.arrays, 3)
    assert not any(
        "delta" in n or "merged" in n for n in messages[0].content.array_records["arrays"]
    )
    other = toy.run(plain, 2)
    for column in ("bytes_up", "bytes_down"):
        assert [r[column] for r in progress.rounds] == [r[column] for r in other.rounds]


def test_ranks_by_device() -> None:
    clock = {"fleet": [{"name": "phone", "share": 0.5}, {"name": "workstation", "share": 0.5}]}
    entry = StrategyConfig(name="flexlora", params={"ranks": {"phone": 1, "workstation": 2}})
    fed = toy.federation(entry, model="lora", clock=clock)
    ranks = {"phone": 1, "workstation": 2}
    assert {"phone", "workstation"} == set(fed.setting.devices)
    for client, device in enumerate(fed.setting.devices):
        assert fed.strategy.rank_of(client + 1) == ranks[device]
    with pytest.raises(ConfigError, match="workstation is missing"):
        toy.federation(
            StrategyConfig(name="flexlora", params={"ranks": {"phone": 1}}), model="lora",
            clock=clock,
        )  # fmt: skip


def test_a_client_of_low_rank_is_sent_and_sends_so_many_rows() -> None:
    for name, model in (("flexlora", "lora"), ("hetlora", "lora"), ("flora", "lora_delta")):
        fed = federation(name, model, **RANKS)
        messages, contents, _ = one_round(fed, 1)
        for message, content in zip(messages, contents, strict=True):
            rank = RANKS["ranks"][(message.metadata.dst_node_id - 1) % 2]
            back = from_record(content.array_records["arrays"])
            sizes = {back[a].shape[0] for a, _ in halves(fed.setting.info).values()}
            assert sizes == {rank}
    rows = toy.run(federation("flexlora", **RANKS), 2).clients
    up = {r["client"] % 2: r["bytes_up"] for r in rows if r["bytes_up"]}
    head = 4 * (4 + 5 + 5 + 3)  # bytes of one rank of both layers
    assert up[1] - up[0] == head


def test_rolora_sends_back_one_factor() -> None:
    fed = federation("rolora")
    for number, letter in ((1, "lora_B"), (2, "lora_A")):
        _, contents, _ = one_round(federation("rolora"), number - 1)
        names = {n.rpartition(".")[2] for n in contents[0].array_records["arrays"]}
        assert names == {letter}
    rows = toy.run(fed, 2).rounds[1:]
    assert all(r["bytes_up"] < r["bytes_down"] for r in rows)


# ------------------------------------------------------------------------ hostile adapters


A, B = "0.lora_A", "0.lora_B"


def renamed(entries: dict, old: str, new: str) -> None:
    entries[new] = entries.pop(old)


WRONG = {
    "rank": lambda e: e.update({A: grown(e[A], 0), B: grown(e[B], 1)}),
    "swapped": lambda e: e.update({A: e[B], B: e[A]}),
    "module": lambda e: renamed(e, A, "7.lora_A"),
    "missing": lambda e: e.pop(B),
    "base weight": lambda e: e.update({"0.base.weight": e[A]}),
    "path": lambda e: renamed(e, A, "../x"),
    "merged": lambda e: e.update({"0.delta": e[A]}),
}


def grown(array: Array, axis: int) -> Array:
    return Array(np.repeat(array.numpy(), 2, axis))


HALVES = {
    "rank": lambda e: e.update({n: grown(a, "AB".index(n[-1])) for n, a in e.items()}),
    "transposed": lambda e: e.update({n: Array(a.numpy().T.copy()) for n, a in e.items()}),
    "module": lambda e: renamed(e, next(iter(e)), "7.lora_A"),
    "other factor": lambda e: e.update({A: FACTOR, B: FACTOR}),
    "base weight": lambda e: e.update({"0.base.weight": FACTOR}),
    "path": lambda e: renamed(e, next(iter(e)), "../x"),
}
"""The same for those of whom one factor is expected."""
FACTOR = Array(np.zeros((2, 4), np.float32))
WHOLE = [("fedit", "lora"), ("flexlora", "lora"), ("hetlora", "lora"), ("lora_lego", "lora"),
         ("flora", "lora_delta"), ("fedex_lora", "lora_delta")]  # fmt: skip
CASES = [(*case, fault) for case in WHOLE for fault in WRONG]
CASES += [(n, "lora", f) for n in ("ffa_lora", "fedsa_lora", "rolora") for f in HALVES]


@pytest.mark.parametrize(("name", "model", "fault"), CASES)
def test_hostile_adapters_are_refused_in_a_round(name: str, model: str, fault: str) -> None:
    def answer(message, reply):
        entries = dict(reply.content.array_records["arrays"].items())
        (WRONG if (name, model) in WHOLE else HALVES)[fault](entries)
        content = {**reply.content, "arrays": ArrayRecord(entries)}
        return [Message(RecordDict(content), reply_to=message)]

    fed = toy.federation(
        StrategyConfig(name=name), model=model,
        wrap=lambda grid: toy.Unreliable(grid, [2, 5], answer),
    )  # fmt: skip
    before = base_digest(fed.env.model.module)
    progress = toy.run(fed, 2)
    refused = [r for r in progress.clients if r["status"] == "refused"]
    assert {r["client"] for r in refused} == {1, 4}
    assert all(r["reason"].startswith(("wrong_names", "wrong_shape")) for r in refused)
    assert base_digest(fed.env.model.module) == before
    assert all(bool(torch.isfinite(t).all()) for t in from_record(progress.arrays).values())


def test_a_client_with_another_base_or_alpha_refuses() -> None:
    """Shapes cannot tell; the digest that the server sends can."""
    fed = federation("fedit")
    messages = toy.messages_of(fed, fed.begin().arrays, 1)
    for change in ("weight", "alpha"):
        other = federation("fedit")
        module = other.env.model.module
        if change == "weight":
            with torch.no_grad():
                module[0].base.weight[0, 0] += 1
        else:
            module[0].scaling *= 2
        env = replace(other.env, model=FlatModel(module, other.env.model.criterion))
        grid = LocalGrid(ProgramApp(env), 7)
        (reply,) = grid.send_and_receive(messages[:1])
        assert reply.has_error()
        assert "other weights, or another alpha" in reply.error.reason
