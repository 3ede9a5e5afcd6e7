"""FedAP and clustered strategies on a toy with two planted groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MetricRecord, RecordDict

from fedsim.config import StrategyConfig
from fedsim.core.packing import pack, unpack
from fedsim.core.records import as_flat, to_record
from fedsim.data import FederatedData
from fedsim.federation import Federation
from fedsim.runtime import flower
from strategies.fedap import FedAP
from tests.contract import toy

TRUTH = np.array([0, 1, 0, 1, 0, 1, 0])
OPTIONS: dict[str, Any] = {"warmup_rounds": 1, "cut": "k", "k": 2, "personal_epochs": 0}


def grouped() -> FederatedData:
    """The toy's data; the second group's labels are moved on by one."""
    data = toy.federated((20,) * 7)
    y = data.fields["y"].clone()
    for client in np.flatnonzero(TRUTH):
        for rows in (data.train[client], data.test[client]):
            y[rows] = (y[rows] + 1) % toy.CLASSES
    return replace(data, fields={**data.fields, "y": y}, groups=TRUTH)


def federation(
    options: dict[str, Any] | None = None, name: str = "fedap", **more: Any
) -> Federation:
    entry = StrategyConfig(name=name, params={**OPTIONS, **(options or {})})
    return toy.federation(entry, **{"data": grouped(), "rounds": 4, "train": {"epochs": 5}, **more})


def bad(
    nodes: tuple[int, ...], rounds: list[int], how: Callable[[Message, Message], list[Message]]
) -> Any:
    return lambda grid: toy.Unreliable(grid, nodes, how, rounds)


def failing(message: Message, reply: Message) -> list[Message]:
    return [Message(Error(flower.CLIENT_RAISED, "gone"), reply_to=message)]


def huge(message: Message, reply: Message) -> list[Message]:
    model = as_flat(reply.content["arrays"])
    content = RecordDict({**reply.content, "arrays": model.with_flat(model.flat + 1e6)})
    return [Message(content, reply_to=message)]


def poisoned(message: Message, reply: Message) -> list[Message]:
    model = as_flat(reply.content["arrays"])
    content = RecordDict({**reply.content, "arrays": model.with_flat(model.flat * float("nan"))})
    return [Message(content, reply_to=message)]


@pytest.mark.parametrize("signature", ["params", "last_layer", "state_dict", "sketch"])
@pytest.mark.parametrize("name", ["fedap", "flhc", "fedclust"])
def test_groups_are_found_and_told(name: str, signature: str) -> None:
    options: dict[str, Any] = {"warmup_rounds": 1, "cut": "k", "signature": signature}
    entry = StrategyConfig(name=name, params=options)
    fed = toy.federation(entry, data=grouped(), rounds=4, train={"epochs": 5})
    progress = toy.run(fed)
    assert progress.rounds[-1]["cluster_ari"] == 1.0
    assert progress.rounds[-1]["cluster_nmi"] == pytest.approx(1.0)
    assert [r.get("clusters") for r in progress.rounds] == [None, None, 2, 2, 2]
    assert {r["client"]: r["cluster"] for r in progress.clients if r["round"] == 4} == dict(
        enumerate(TRUTH.tolist())
    )
    told = fed.artefacts()
    assert told["clients"]["group"] == TRUTH.tolist()
    assert told["clustering"]["events"][0]["clusters"] == 2


def test_clusters_begin_at_their_members_mean() -> None:
    fed = federation({"clients_per_cluster": 1}, rounds=2)
    progress = toy.run(fed, 1)
    messages = toy.messages_of(fed, progress.arrays, 2)
    assert all(m.content["config"]["epochs"] == 3 for m in messages)
    replies = list(fed.grid.send_and_receive(messages))
    models = [as_flat(r.content["arrays"]).flat.double() for r in replies]
    fed.advance(progress)
    strategy: Any = fed.strategy
    for cluster in (0, 1):
        mean = torch.stack([m for m, g in zip(models, TRUTH, strict=True) if g == cluster]).mean(0)
        torch.testing.assert_close(
            strategy.heads[cluster].flat.double(), mean, rtol=1e-5, atol=1e-6
        )


def test_a_step_of_one_is_fedavg_and_of_zero_stands_still() -> None:
    runs = [
        toy.run(federation(o)).arrays
        for o in ({"meta_step": 1, "meta_step_end": 1}, {"inner": "fedavg"})
    ]
    assert toy.sha256(runs[0]) == toy.sha256(runs[1])
    still = federation({"meta_step": 0, "meta_step_end": 0})
    assert toy.sha256(toy.run(still, 4).arrays) == toy.sha256(toy.run(federation(), 2).arrays)


def test_the_meta_step_goes_from_first_to_last() -> None:
    fed = federation(rounds=102)
    strategy: Any = fed.strategy
    assert strategy.step_size(3) == 1.0
    assert strategy.step_size(103) == pytest.approx(0.46)
    official = FedAP(schedule="official")
    assert official.step_size(41) == pytest.approx(1 - 40 / 1280 * 0.54)


def test_what_happens_in_one_cluster_leaves_the_other_alone() -> None:
    plain: Any = federation()
    toy.run(plain)
    for how in (huge, poisoned, failing):
        hit: Any = federation(wrap=bad((1,), [3, 4], how))
        toy.run(hit)
        assert toy.sha256(hit.strategy.heads[1]) == toy.sha256(plain.strategy.heads[1])
        assert toy.sha256(hit.strategy.heads[0]) != toy.sha256(plain.strategy.heads[0])


def test_a_cluster_from_which_nobody_replies_keeps_its_model() -> None:
    plain: Any = federation()
    toy.run(plain, 3)
    hit: Any = federation(wrap=bad((2, 4, 6), [4], failing))
    progress = toy.run(hit, 4)
    assert not progress.rounds[-1]["abandoned"]
    assert toy.sha256(hit.strategy.heads[1]) == toy.sha256(plain.strategy.heads[1])


@pytest.mark.parametrize("init", ["members", "global"])
def test_who_is_absent_at_the_clustering_joins_later(init: str) -> None:
    fed = federation({"init": init}, wrap=bad((1, 2), [2], failing))
    progress = toy.run(fed, 2)
    assert fed.strategy.cluster_of(1) is None
    assert set(fed.strategy.models(progress.arrays)) == {"cluster-0", "cluster-1", "global"}
    fed.advance(progress)
    assert progress.rounds[-1]["cluster_ari"] == 1.0
    assert fed.strategy.cluster_of(1) is not None


def test_an_outlier_makes_a_cluster_of_its_own() -> None:
    fed = federation({"late_joiner": "threshold"}, wrap=bad((1,), [2], failing))
    progress = toy.run(fed, 2)
    strategy: Any = fed.strategy
    strategy.limit = 1e-9
    fed.advance(progress)
    assert strategy.cluster_of(1) == 2
    assert progress.rounds[-1]["clusters"] == 3


def test_an_abandoned_clustering_is_made_up_for() -> None:
    fed = federation(wrap=bad((1, 2, 3, 4, 5), [2], failing))
    progress = toy.run(fed, 3)
    assert [r.get("clusters") for r in progress.rounds] == [None, None, None, 2]


def test_reclustering_keeps_the_names() -> None:
    fed: Any = federation({"recluster_every": 1}, rounds=5)
    progress = toy.run(fed)
    assert len(fed.strategy.history) == 4
    assert {r["cluster_ari"] for r in progress.rounds[2:]} == {1.0}
    clusters = {(r["client"], r["cluster"]) for r in progress.clients if "cluster" in r}
    assert len(clusters) == 7


def test_converged_clusters_are_merged() -> None:
    fed: Any = federation({"merge_below": 100.0})
    progress = toy.run(fed)
    assert progress.rounds[-1]["clusters"] == 1
    assert fed.strategy.history[-1]["merged"] == [0, 1]


def test_members_train_in_a_cluster_smaller_than_asked_for() -> None:
    progress = toy.run(federation({"clients_per_cluster": 4}))
    assert [r["sampled"] for r in progress.rounds[1:]] == [7, 7, 7, 7]
    assert [r["sampled"] for r in toy.run(federation({"clients_per_cluster": 2})).rounds[3:]] == [
        4,
        4,
    ]


def test_personalisation_leaves_the_clusters_alone() -> None:
    runs = [toy.run(federation({"personal_epochs": n})) for n in (0, 5)]
    assert toy.sha256(runs[0].arrays) == toy.sha256(runs[1].arrays)
    assert runs[0].rounds[-1]["client_loss"] != runs[1].rounds[-1]["client_loss"]


def test_state_goes_through_a_checkpoint_after_the_clustering() -> None:
    whole, broken, second = federation(), federation(), federation()
    expected = toy.run(whole)
    progress = toy.run(broken, 2)
    second.begin()
    second.strategy.load_state_dict(unpack(pack(broken.strategy.state_dict())))
    for _ in range(2):
        second.advance(progress)
    assert toy.sha256(progress.arrays) == toy.sha256(expected.arrays)
    assert second.artefacts() == whole.artefacts()


def test_signatures_leave_statistics_out_unless_asked() -> None:
    sizes = {}
    for signature in ("params", "last_layer", "state_dict"):
        fed: Any = federation({"signature": signature}, model="bn")
        toy.run(fed, 2)
        sizes[signature] = len(fed.strategy.centres[0][1])
    layout = toy.module("bn").state_dict()
    assert sizes["params"] == sum(p.numel() for p in toy.module("bn").parameters())
    assert sizes["last_layer"] == 5 * toy.CLASSES + toy.CLASSES
    assert sizes["state_dict"] == sum(t.numel() for t in layout.values())


def test_frozen_statistics_stay_the_servers() -> None:
    fed: Any = federation({"bn": "server_frozen", "init": "global"}, model="bn")
    start = fed.begin().arrays
    toy.run(fed)
    before, after = as_flat(fed.strategy.archive), fed.strategy.heads[0]
    p = after.layout.num_trainable
    assert torch.equal(before.flat[p:], after.flat[p:])
    assert not torch.equal(before.flat[:p], after.flat[:p])
    assert start is not None


def test_a_client_cannot_claim_a_cluster_that_does_not_exist() -> None:
    def lying(message: Message, reply: Message) -> list[Message]:
        metrics = dict(reply.content["metrics"])
        metrics["cluster"] = 99
        content = RecordDict({**reply.content, "metrics": MetricRecord(metrics)})
        return [Message(content, reply_to=message)]

    entry = StrategyConfig(name="ifca", params={"k": 2})
    fed = toy.federation(entry, data=grouped(), wrap=bad((1,), [1, 2, 3], lying))
    toy.run(fed)
    assert fed.strategy.cluster_of(1) is None
    assert fed.strategy.cluster_of(2) in (0, 1)


def test_fomaml_sends_the_last_step_alone() -> None:
    fed = federation({"inner": "fomaml"}, train={"epochs": 1, "batch_size": 100})
    other = federation({"inner": "reptile"}, train={"epochs": 1, "batch_size": 100})
    assert toy.close(toy.run(fed).arrays, toy.run(other).arrays, 1e-5)
    several = [toy.run(federation({"inner": i})).arrays for i in ("fomaml", "reptile")]
    assert toy.sha256(several[0]) != toy.sha256(several[1])


def test_cfl_splits_the_groups_and_its_members_stay_split() -> None:
    entry = StrategyConfig(name="cfl", params={"patience": 2, "eps1": 1e3, "eps2": 0.05})
    fed = toy.federation(entry, data=grouped(), rounds=3, train={"epochs": 5})
    progress = toy.run(fed)
    assert [r["clusters"] for r in progress.rounds[1:]] == [1, 1, 2]
    assert progress.rounds[-1]["cluster_ari"] == 1.0


def test_records_of_a_saved_model_are_revived() -> None:
    fed: Any = federation(model="bn")
    toy.run(fed, 2)
    state = fed.strategy.state_dict()["heads"]["0"]
    assert toy.sha256(fed.strategy.revive(state)) == toy.sha256(to_record(state))
