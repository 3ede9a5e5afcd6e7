"""What all clustered strategies owe: late clients, hostile members, crashes, other node ids."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MetricRecord, RecordDict

from fedsim import api, load_experiment
from fedsim.config import StrategyConfig
from fedsim.core.packing import pack, unpack
from fedsim.core.records import as_flat
from fedsim.data import FederatedData, Ragged
from fedsim.failpoints import crash_here
from fedsim.federation import Federation
from fedsim.runtime import flower
from tests.contract import toy

ROOT = Path(__file__).parents[2]
TRUTH = np.array([0, 1, 0, 1, 0, 1, 0])
FAMILY: dict[str, dict[str, Any]] = {
    "fedap": {"warmup_rounds": 1, "cut": "k", "k": 2, "personal_epochs": 0},
    "flhc": {"warmup_rounds": 1, "cut": "k", "k": 2},
    "fedclust": {"cut": "k", "k": 2},
    "pacfl": {"cut": "k", "k": 2},
    "ifca": {"k": 2},
    "cfl": {"patience": 1, "eps1": 1e3, "eps2": 0.8},
}
"""Settings in which there are two clusters from the second round on."""
every = pytest.mark.parametrize("name", FAMILY)
Answer = Callable[[Message, Message], list[Message]]


def grouped(order: Any = range(7)) -> FederatedData:
    """The toy's data in two groups: the second one's labels are moved on, its inputs turned.

    Args:
        order: which of the clients is which number.
    """
    data = toy.federated((20,) * 7)
    x, y = data.fields["x"].clone(), data.fields["y"].clone()
    for client in np.flatnonzero(TRUTH):
        for rows in (data.train[client], data.test[client]):
            x[rows], y[rows] = x[rows].flip(1), (y[rows] + 1) % toy.CLASSES
    order = list(order)
    return replace(
        data,
        fields={**data.fields, "x": x, "y": y},
        train=Ragged.from_lists([data.train[c] for c in order]),
        test=Ragged.from_lists([data.test[c] for c in order]),
        groups=TRUTH[order],
    )


def federation(name: str, **options: Any) -> Any:
    entry = StrategyConfig(name=name, params={**FAMILY[name], **options.pop("params", {})})
    return toy.federation(
        entry, **{"data": grouped(), "rounds": 4, "train": {"epochs": 4}, "model": "mlp", **options}
    )


def hit(nodes: tuple[int, ...], rounds: list[int], how: Answer) -> Any:
    return lambda grid: toy.Unreliable(grid, nodes, how, rounds)


def gone(message: Message, reply: Message) -> list[Message]:
    return [Message(Error(flower.CLIENT_RAISED, "gone"), reply_to=message)]


def nan(message: Message, reply: Message) -> list[Message]:
    model = as_flat(reply.content["arrays"])
    content = RecordDict({**reply.content, "arrays": model.with_flat(model.flat * float("nan"))})
    return [Message(content, reply_to=message)]


def places(fed: Federation) -> list[int | None]:
    return [fed.strategy.cluster_of(node) for node in range(1, 8)]


def same(found: list[int | None], truth: Any) -> bool:
    """Whether two partitions are one, up to names."""
    pairs = set(zip(found, list(truth), strict=True))
    return len(pairs) == len(set(found)) == len(set(truth))


@pytest.fixture(scope="module")
def honest() -> dict[str, Any]:
    """Undisturbed runs."""
    found = {}
    for name in FAMILY:
        found[name] = federation(name)
        toy.run(found[name])
    return found


@every
def test_there_are_two_clusters(name: str, honest: dict[str, Any]) -> None:
    assert len(set(places(honest[name]))) == 2
    if name not in ("ifca", "pacfl"):  # their clusters depend on the draw, and on inputs alone
        assert same(places(honest[name]), TRUTH)


# -- hostile and degenerate ------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FAMILY if n != "ifca"])  # all see all of its models
def test_what_befalls_one_cluster_leaves_the_other_alone_to_the_bit(
    name: str, honest: dict[str, Any]
) -> None:
    before = honest[name]
    home = before.strategy.cluster_of(1)
    there = tuple(n for n in range(1, 8) if before.strategy.cluster_of(n) == home)
    (other,) = {c for c in places(before) if c != home}
    fed = federation(name, wrap=hit(there[:1], [3, 4], nan))
    toy.run(fed)
    assert places(fed) == places(before)
    assert toy.sha256(fed.strategy.heads[other]) == toy.sha256(before.strategy.heads[other])
    assert toy.sha256(fed.strategy.heads[home]) != toy.sha256(before.strategy.heads[home])


@every
def test_a_cluster_from_which_nobody_replies_keeps_its_model(
    name: str, honest: dict[str, Any]
) -> None:
    home = honest[name].strategy.cluster_of(2)
    there = tuple(n for n in range(1, 8) if honest[name].strategy.cluster_of(n) == home)
    fed = federation(name, wrap=hit(there, [3], gone), cohort={"quorum": 0.1})
    progress = toy.run(fed, 2)
    before = toy.sha256(fed.strategy.heads[home])
    fed.advance(progress)
    assert not any(r["abandoned"] for r in progress.rounds)
    assert toy.sha256(fed.strategy.heads[home]) == before


@pytest.mark.parametrize("name", ["fedap", "flhc", "fedclust", "cfl"])
def test_a_cluster_of_one_trains_and_is_judged(name: str) -> None:
    data = grouped()
    some = np.array([0, 2, 4, 6, 1])
    train, test = data.train.take(some), data.test.take(some)
    lone = replace(data, groups=None, train=train, test=test, client_names=tuple("abcde"))
    fed = federation(name, data=lone)
    progress = toy.run(fed)
    assert same([fed.strategy.cluster_of(n) for n in range(1, 6)], [0, 0, 0, 0, 1])
    own = fed.strategy.heads[fed.strategy.cluster_of(5)]
    assert torch.isfinite(own.flat).all()
    (row,) = [r for r in progress.clients if r["round"] == 4 and r["client"] == 4]
    assert row["eval_examples"] == toy.HELD_OUT


@pytest.mark.parametrize("name", ["fedap", "flhc", "fedclust", "pacfl", "cfl"])
def test_a_client_cannot_claim_another_cluster(name: str, honest: dict[str, Any]) -> None:
    def lying(message: Message, reply: Message) -> list[Message]:
        metrics = {**reply.content["metrics"], "cluster": honest[name].strategy.cluster_of(2)}
        content = RecordDict({**reply.content, "metrics": MetricRecord(metrics)})
        return [Message(content, reply_to=message)]

    fed = federation(name, wrap=hit((1,), [1, 2, 3, 4], lying))
    progress = toy.run(fed)
    assert places(fed) == places(honest[name])
    rows = [r for r in progress.clients if r["client"] == 0 and r["round"] == 4]
    assert rows[0]["cluster"] == honest[name].strategy.cluster_of(1)
    for c, head in fed.strategy.heads.items():
        assert toy.sha256(head) == toy.sha256(honest[name].strategy.heads[c])


@pytest.mark.parametrize("name", ["fedap", "flhc", "fedclust", "pacfl"])
def test_clusters_do_not_depend_on_the_numbering_of_clients(
    name: str, honest: dict[str, Any]
) -> None:
    order = [4, 1, 6, 3, 0, 2, 5]
    other = federation(name, data=grouped(order))
    toy.run(other, 2)
    assert same([places(honest[name])[c] for c in order], places(other))


# -- interruptions ---------------------------------------------------------------------------


@every
def test_clusters_go_through_a_file(name: str, honest: dict[str, Any]) -> None:
    broken, second = federation(name), federation(name)
    progress = toy.run(broken, 2)  # the clusters have just been made
    second.begin()
    second.strategy.load_state_dict(unpack(pack(broken.strategy.state_dict())))
    for _ in range(2):
        second.advance(progress)
    assert places(second) == places(honest[name])
    for c, head in second.strategy.heads.items():
        assert toy.sha256(head) == toy.sha256(honest[name].strategy.heads[c])


TOML = """
[experiment]
name = "crash"
seeds = [1]
rounds = 4
[data]
dataset = "digits"
clients = 8
partition = { name = "planted", groups = 2, kind = "labels" }
[model]
name = "logistic"
[[strategy]]
name = "fedap"
warmup_rounds = 1
cut = "k"
"""


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_crash_between_clustering_and_saving_restores_the_clusters_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "e.toml"
    file.write_text(TOML)
    experiment = load_experiment(file)
    whole = api.run(experiment, out=tmp_path / "whole").path

    passed: list[str] = []

    def crash(name: str) -> None:
        crash_here(name)
        passed.append(name)
        if name == "round.aggregated" and passed.count(name) == 2:  # the clusters have been made
            raise Killed

    monkeypatch.setattr("fedsim.federation.crash_here", crash)
    with pytest.raises(Killed):
        api.run(experiment, out=tmp_path / "broken")
    monkeypatch.undo()
    broken = api.resume(tmp_path / "broken").path
    for part in ("rounds.parquet", "clients.parquet", "artefacts/clustering.json"):
        assert (broken / part).read_bytes() == (whole / part).read_bytes()
    models = sorted(p.name for p in (whole / "models").iterdir())
    assert models == ["cluster-0.safetensors", "cluster-1.safetensors"]
    for model in models:
        assert (broken / "models" / model).read_bytes() == (whole / "models" / model).read_bytes()


# -- late clients ----------------------------------------------------------------------------


@pytest.mark.parametrize("late", [(1,), (2,), (1, 2)])
def test_who_missed_a_split_of_cfl_descends_the_tree(late: tuple[int, ...]) -> None:
    fed = federation("cfl", wrap=hit(late, [2], gone))
    progress = fed.begin()
    for _ in range(2):
        fed.advance(progress)
    assert set(fed.strategy.waiting) == set(late)
    split = fed.strategy.splits[0][2]
    for message in toy.messages_of(fed, progress.arrays, 3):
        node = message.metadata.dst_node_id
        start = split if node in late else fed.strategy.heads[fed.strategy.cluster_of(node)]
        assert toy.sha256(message.content["arrays"]) == toy.sha256(start)
    heads = {c: toy.sha256(h) for c, h in fed.strategy.heads.items()}
    assert len(heads) == 2
    fed.advance(progress)
    assert not fed.strategy.waiting
    assert same(places(fed), TRUTH)


def test_who_missed_two_splits_takes_a_round_for_each() -> None:
    strategy = federation("cfl").strategy
    strategy.setup(replace(federation("cfl").setting, num_clients=9))
    start = strategy.start_arrays(federation("cfl").env.model.initial())
    p = strategy.setting.info.layout.num_trainable
    axes = torch.eye(p)[:3]
    way = {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 2, 8: 2}  # 9 comes late

    def send(nodes: list[int], direction: Callable[[int], torch.Tensor], server_round: int) -> None:
        strategy._records, strategy._before = {}, dict(strategy.heads)
        for node in nodes:
            base = as_flat(strategy.model_for(node, server_round))
            flat = base.flat.clone()
            flat[:p] += direction(node)
            strategy._records[node] = base.with_flat(flat)
        strategy.regroup(server_round, nodes)

    assert start is not None
    strategy.eps1, strategy.eps2, strategy.patience = 1e3, 0.0, 0
    send([1, 2, 3, 4, 5, 6, 7, 8], lambda n: axes[way[n]] + 0.2 * axes[1] * (way[n] == 2), 1)
    send([4, 5, 6, 7, 8], lambda n: axes[way[n]], 2)
    first, second = (s[:2] for s in strategy.splits[:2])
    assert (first, second[0]) == ((0, 1), 1)
    assert strategy.waiting == {9: 0}
    send([9], lambda n: axes[2] + 0.2 * axes[1], 3)
    assert strategy.waiting == {9: 1}
    assert strategy.cluster_of(9) == 1
    send([9], lambda n: axes[2], 4)
    assert strategy.waiting == {}
    assert strategy.cluster_of(9) == strategy.cluster_of(7) != strategy.cluster_of(4)


# -- size ------------------------------------------------------------------------------------


def lines(path: Path) -> int:
    """Lines of code: without imports, docstrings, comments and blank lines."""
    source = path.read_text()
    tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    left_out = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    left_out += [n.body[0] for n in ast.walk(tree) if isinstance(n, kinds) and ast.get_docstring(n)]
    gone = {i for n in left_out for i in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
    rows = enumerate(source.splitlines(), 1)
    return sum(1 for i, row in rows if i not in gone and row.strip()[:1] not in ("", "#"))


@pytest.mark.parametrize(
    "name",
    [*FAMILY, "local", "ditto", "perfedavg", "fedbn", "fedper", "fedrep", "apfl", "pfedme"],
)
def test_no_half_has_more_than_sixty_lines_of_code(name: str) -> None:
    halves = [ROOT / room / f"{name}.py" for room in ("strategies", "clients")]
    assert {h.parent.name: lines(h) for h in halves if h.exists() and lines(h) > 60} == {}
