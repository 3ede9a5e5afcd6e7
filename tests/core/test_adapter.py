"""Foreign strategies in the round loop: what they are shown, and what they cannot break."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower

from fedsim.config import StrategyConfig
from fedsim.core.adapter import Adapted, adapt
from fedsim.core.criteria import criterion
from fedsim.core.errors import ConfigError
from fedsim.core.model import FlatModel
from fedsim.core.packing import pack, unpack
from fedsim.core.records import from_record, to_record
from fedsim.core.strategy import Setting, Strategy
from fedsim.runtime.grid import LocalGrid
from strategies import flower as ours
from strategies.fedavg import FedAvg
from tests.contract import toy

State = dict[str, torch.Tensor]


def replies(
    strategy: Strategy, old: ArrayRecord, states: Iterable[State], metrics: Iterable[dict[str, Any]]
) -> list[Message]:
    """Replies with these models to the messages of the first round."""
    states = list(states)
    grid = LocalGrid(ClientApp(), len(states))
    messages = strategy.configure_train(1, old, ConfigRecord({"lr": 0.1}), grid)
    return [
        Message(
            RecordDict({"arrays": to_record(s), "metrics": MetricRecord({"num-examples": 1} | m)}),
            reply_to=message,
        )
        for message, s, m in zip(messages, states, metrics, strict=True)
    ]


def aggregate(strategy: Strategy, old: State, states: Iterable[State]) -> State:
    states = list(states)
    arrays, _ = strategy.aggregate_train(
        1, replies(strategy, to_record(old), states, [{}] * len(states))
    )
    assert arrays is not None
    return from_record(arrays)


def values(strategy: flower.Strategy, numbers: Iterable[float]) -> list[float]:
    """What the strategy makes of clients whose only entry is one number twice."""
    states = [{"w": torch.tensor([n, -n])} for n in numbers]
    return aggregate(Adapted(strategy, "fedavg"), {"w": torch.zeros(2)}, states)["w"].tolist()


def test_robust_strategies_by_hand() -> None:
    numbers = [1.0, 2.0, 3.0, 5.0, 100.0, -50.0, 4.0]
    # sorted: -50 1 2 3 4 5 100
    assert values(ours.FedMedian(), numbers) == [3, -3]
    assert values(ours.FedTrimmedAvg(beta=0.2), numbers) == [3, -3]  # (1+2+3+4+5)/5
    assert values(ours.FedTrimmedAvg(beta=0.3), numbers) == [3, -3]  # (2+3+4)/3
    # n - f - 2 = 4 nearest: of 3 they are 1 2 4 5, sum of squares 4+1+1+4 = 10, the least
    assert values(ours.Krum(num_malicious_nodes=1), numbers) == [3, -3]
    # next come 2 (1+1+4+9) and 4 (1+1+4+9)
    chosen = values(ours.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3), numbers)
    assert chosen == pytest.approx([3, -3])
    # chosen: 1 2 3 4 5; of these the 7 - 4 nearest to the median 3: 2 3 4
    assert values(ours.Bulyan(num_malicious_nodes=1), numbers) == pytest.approx([3, -3])


def test_bulyan_with_too_few_replies_warns_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fed = toy.federation(StrategyConfig(name="bulyan", params={"num_malicious_nodes": 2}))
    progress = toy.run(fed, 1)
    assert toy.sha256(progress.arrays) == toy.sha256(fed.env.model.initial())
    assert [r.levelname for r in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda: ours.FedAvgM(server_momentum=1.0), "server_momentum"),
        (lambda: ours.FedAvgM(server_learning_rate=0.0), "server_learning_rate"),
        (lambda: ours.FedAdam(eta=0), "eta"),
        (lambda: ours.FedAdam(beta_2=1.0), "beta_2"),
        (lambda: ours.FedYogi(tau=0), "tau"),
        (lambda: ours.FedAdagrad(eta=-1), "eta"),
        (lambda: ours.FedTrimmedAvg(beta=0.5), "beta"),
        (lambda: ours.Krum(num_malicious_nodes=-1), "num_malicious_nodes"),
        (lambda: ours.MultiKrum(num_nodes_to_select=0), "num_nodes_to_select"),
        (lambda: ours.Bulyan(num_malicious_nodes=-1), "num_malicious_nodes"),
    ],
)
def test_parameters_out_of_range_are_refused(made: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        made()


def test_ours_are_not_wrapped_and_theirs_are() -> None:
    own = FedAvg()
    assert adapt(own, "fedavg") is own
    assert isinstance(adapt(flower.FedAvg(), "fedavg"), Adapted)


def test_their_own_sampling_is_off() -> None:
    strategy = adapt(flower.FedAvg(fraction_train=0.1, min_available_nodes=50), "fedavg")
    grid, model = LocalGrid(ClientApp(), 9), to_record({"w": torch.zeros(1)})
    for seed in range(3):
        random.seed(seed)
        messages = strategy.configure_train(1, model, ConfigRecord(), grid)
        assert [m.metadata.dst_node_id for m in messages] == list(range(1, 10))
        assert {m.metadata.message_type for m in messages} == {"train.fedavg"}
    empty = LocalGrid(ClientApp(), 0)  # Flower would wait for a node
    assert not strategy.configure_train(1, model, ConfigRecord(), empty)


def test_they_see_parameters_only_and_results_keep_their_dtype() -> None:
    model = FlatModel(toy.module("bn"), criterion("cross_entropy"))
    seen: list[str] = []

    class Spy(ours.FedAdam):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            seen.extend(replies[0].content["arrays"])
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert {a.dtype for a in arrays.values()} == {"float64"}  # numpy's promotion
            return arrays, metrics

    strategy = adapt(Spy(), "fedavg")
    strategy.setup(Setting(model.info, 3, 0, 1))
    old = model.initial().state()
    states = []
    for i in range(3):
        state = {n: t + i if t.is_floating_point() else t + 10 * i for n, t in old.items()}
        states.append(state)
    found = aggregate(strategy, old, states)
    assert seen == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in old.items()}
    torch.testing.assert_close(found["1.running_var"], old["1.running_var"] + 1)  # the mean
    assert found["1.num_batches_tracked"] == 20  # the maximum


def test_a_foreign_strategy_may_do_as_it_likes_with_what_it_is_shown() -> None:
    class Vandal(flower.FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            for reply in replies:
                for array in reply.content["arrays"].to_numpy_ndarrays():
                    array *= 0
            return super().aggregate_train(server_round, replies)

    assert values(Vandal(), [1.0, 3.0]) == [2, -2]


def test_metrics_that_only_some_clients_report_do_not_end_the_run() -> None:
    strategy = adapt(flower.FedAvg(), "fedavg")
    old = {"w": torch.zeros(1)}
    found = replies(
        strategy,
        to_record(old),
        [old] * 3,
        [{"loss": 1.0, "extra": 2.0}, {"loss": 2.0}, {"loss": 3.0, "list": [1.0]}],
    )
    arrays, metrics = strategy.aggregate_train(1, found)
    assert arrays is not None
    assert metrics == {"loss": pytest.approx(2.0)}


def test_bfloat16_models_work() -> None:
    states = [{"w": torch.tensor([n, 2 * n]).bfloat16()} for n in (1.0, 3.0)]
    found = aggregate(adapt(flower.FedAvg(), "fedavg"), states[0], states)["w"]
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [2, 4]


class Hoarder(flower.FedAvg):
    """Keeps state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds, self.factor, self.tag = 0, 0.1, "x"
        self.vector = np.zeros(2, np.float32)
        self.several: dict[str, np.ndarray] | None = None
        self.listed: list[np.ndarray] | None = None
        self.model: ArrayRecord | None = None

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        self.rounds += 1
        self.factor /= 3
        self.vector = self.vector + 1
        self.several = {"a.b/c": self.vector * 2}
        self.listed = [self.vector * 3, np.arange(2)]
        self.model, metrics = super().aggregate_train(server_round, replies)
        return self.model, metrics


def test_their_state_survives_a_file(tmp_path: Any) -> None:
    first, second = Adapted(Hoarder(), "fedavg"), Adapted(Hoarder(), "fedavg")
    old = {"w": torch.zeros(2)}
    aggregate(first, old, [old, {"w": torch.ones(2)}])
    second.load_state_dict(unpack(pack({"strategy": first.state_dict()}))["strategy"])
    one, two = vars(first.inner), vars(second.inner)
    assert (two["rounds"], two["factor"], two["tag"]) == (1, one["factor"], "x")
    assert two["vector"].tolist() == [1, 1]
    assert two["vector"].dtype == np.float32
    assert two["several"]["a.b/c"].tolist() == [2, 2]
    assert [a.tolist() for a in two["listed"]] == [[3, 3], [0, 1]]
    assert two["model"]["w"].numpy().tolist() == [0.5, 0.5]


def test_a_strategy_that_keeps_its_own_state_is_asked_for_it() -> None:
    class Own(flower.FedAvg):
        state: dict[str, Any] = {"it": 1}  # noqa: RUF012

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    strategy = Adapted(Own(), "fedavg")
    strategy.load_state_dict({"it": 2})
    assert strategy.state_dict() == {"it": 2}


def test_flowers_log_is_kept_to_warnings(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogger("flwr").level
    toy.run(toy.federation(StrategyConfig(name="fedadam")), 1)
    assert not caplog.records
    assert logging.getLogger("flwr").level == before
