"""The local grid: any Flower ClientApp, under any Flower strategy, in this process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as strategies

from fedsim.runtime import flower
from fedsim.runtime.grid import LocalGrid, View
from fedsim.runtime.remote import RemoteGrid

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Adds the client's number to the model, and counts its rounds."""
    client = int(context.node_config["partition-id"])
    if "rounds" not in context.state:
        context.state["rounds"] = MetricRecord({"n": 0})
    context.state["rounds"]["n"] += 1
    (w,) = message.content["arrays"].to_numpy_ndarrays(keep_input=False)
    message.content["config"]["server-round"] = -1
    w += client
    metrics = {"num-examples": client + 1, "rounds": context.state["rounds"]["n"]}
    content = {"arrays": ArrayRecord([w]), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    (w,) = message.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 1, "w": float(w[0])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.query("who")
def who(message: Message, context: Context) -> Message:
    told = {"node": context.node_id, "of": int(context.node_config["num-partitions"])}
    return Message(RecordDict({"who": MetricRecord(told)}), reply_to=message)


@app.train("broken")
def broken(message: Message, context: Context) -> Message:
    raise ArithmeticError("lost\nfor ever")


def asking(kind: str, *nodes: int, server_round: int = 1) -> list[Message]:
    content = {
        "arrays": ArrayRecord([np.zeros(1)]),
        "config": ConfigRecord({"server-round": server_round}),
    }
    return [Message(RecordDict(content), dst_node_id=n, message_type=kind) for n in nodes]


def test_flowers_own_strategy_runs_unchanged() -> None:
    """Two rounds of three clients that add 0, 1, 2 and weigh 1, 2, 3: 8/6 a round."""
    grid = LocalGrid(app, 3)
    strategy = strategies.FedAvg(min_available_nodes=3)
    result = strategy.start(grid, ArrayRecord([np.zeros(1)]), num_rounds=2)
    (w,) = result.arrays.to_numpy_ndarrays()
    assert w.tolist() == pytest.approx([16 / 6])
    assert result.train_metrics_clientapp[2] == {"rounds": pytest.approx(2.0)}
    assert result.evaluate_metrics_clientapp[2] == {"w": pytest.approx(16 / 6)}


@pytest.mark.parametrize(
    "strategy",
    [strategies.FedAdam, strategies.FedAvgM, strategies.FedMedian, strategies.Krum],
)
def test_other_strategies_of_flower_run_too(strategy: Any) -> None:
    result = strategy().start(LocalGrid(app, 4), ArrayRecord([np.zeros(1)]), num_rounds=2)
    assert np.isfinite(result.arrays.to_numpy_ndarrays()[0]).all()


def test_what_a_client_does_to_its_message_stays_with_it() -> None:
    """Flower puts one content into all messages, and `train` empties what it is sent."""
    shared = RecordDict(
        {"arrays": ArrayRecord([np.zeros(1)]), "config": ConfigRecord({"server-round": 1})}
    )
    sent = [Message(shared, dst_node_id=n, message_type="train") for n in (1, 2, 3)]
    replies = list(LocalGrid(app, 3).send_and_receive(sent))
    values = [r.content["arrays"].to_numpy_ndarrays()[0][0] for r in replies]
    assert values == [0, 1, 2]
    assert len(shared["arrays"]) == 1
    assert shared["config"] == {"server-round": 1}


def test_node_ids_are_partition_numbers_plus_one() -> None:
    grid = LocalGrid(app, 4)
    assert list(grid.get_node_ids()) == [1, 2, 3, 4]
    replies = grid.send_and_receive(asking("query.who", 3, 1))
    assert [r.content["who"] for r in replies] == [{"node": 3, "of": 4}, {"node": 1, "of": 4}]


def test_replies_are_computed_when_they_are_taken() -> None:
    grid = LocalGrid(app, 3)
    replies = iter(grid.send_and_receive(asking("train", 1, 2, 3)))
    next(replies)
    assert set(grid.changed_states()) == {1}
    assert len(list(replies)) == 2


def test_messages_can_be_pushed_and_pulled() -> None:
    grid = LocalGrid(app, 3)
    first, second = grid.push_messages(asking("query.who", 1, 2))
    (reply,) = grid.pull_messages([second, "unknown"])
    assert reply.metadata.reply_to_message_id == second
    assert reply.metadata.src_node_id == 2
    assert len(list(grid.pull_messages([first, second]))) == 1


def test_an_exception_becomes_an_error_reply_that_says_where() -> None:
    grid = LocalGrid(app, 3)
    bad, good = grid.send_and_receive(
        [*asking("train.broken", 3, server_round=7), *asking("train", 1)]
    )
    assert good.has_content()
    assert bad.error.code == flower.CLIENT_RAISED
    reason = bad.error.reason or ""
    assert reason.startswith("client 2, round 7, train.broken: ArithmeticError: lost")
    assert "test_grid.py:" in reason
    assert "\n" not in reason


def test_in_debug_mode_it_stops_there() -> None:
    grid = LocalGrid(app, 3, debug=True)
    with pytest.raises(ArithmeticError, match="lost"):
        list(grid.send_and_receive(asking("train.broken", 1)))


@pytest.mark.parametrize("node", [-1, 4, 10**9])
def test_a_node_that_is_not_there_is_unavailable(node: int) -> None:
    (reply,) = LocalGrid(app, 3).send_and_receive(asking("train", node))
    assert reply.error.code == flower.NODE_UNAVAILABLE


def test_an_unknown_route_is_an_error_reply() -> None:
    (reply,) = LocalGrid(app, 3).send_and_receive(asking("train.nothing", 1))
    assert reply.error.code == flower.CLIENT_RAISED
    assert "train.nothing" in (reply.error.reason or "")


def test_states_are_kept_saved_and_restored() -> None:
    grid = LocalGrid(app, 3)
    for _ in range(2):
        list(grid.send_and_receive(asking("train", 1, 3)))
    list(grid.send_and_receive(asking("evaluate", 2)))  # has no state
    states = grid.changed_states()
    assert {n: s["rounds"]["n"] for n, s in states.items()} == {1: 2, 3: 2}
    assert grid.changed_states() == {}

    other = LocalGrid(app, 3)
    list(other.send_and_receive(asking("train", 2)))
    other.load_states(states)
    assert other.changed_states() == {}
    counts = [r.content["metrics"]["rounds"] for r in other.send_and_receive(asking("train", 1, 2))]
    assert counts == [3, 1]


def test_many_threads_may_use_it() -> None:
    """Every message is answered once, every node keeps count, and no two replies share an id."""
    grid, lock, total = LocalGrid(app, 8), threading.Lock(), 0
    ids: list[str] = []

    def work(thread: int) -> None:
        nonlocal total
        for _ in range(20):
            replies = list(grid.send_and_receive(asking("train", thread + 1)))
            with lock:
                total += len(replies)
                ids.extend(r.metadata.message_id for r in replies)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert total == len(set(ids)) == 160
    assert {s["rounds"]["n"] for s in grid.changed_states().values()} == {20}


def test_a_message_is_answered_once_however_many_pull() -> None:
    grid = LocalGrid(app, 1)
    ids = list(grid.push_messages(asking("train", *[1] * 50)))
    with ThreadPoolExecutor(4) as pool:
        answers = [r for part in pool.map(grid.pull_messages, [ids] * 4) for r in part]
    assert len(answers) == 50


def test_a_view_shows_some_of_the_nodes() -> None:
    grid = LocalGrid(app, 5)
    view = View(grid, [2, 4])
    assert view.get_node_ids() == [2, 4]
    assert view.run.run_id == grid.run.run_id == 1
    result = strategies.FedAvg().start(view, ArrayRecord([np.zeros(1)]), num_rounds=1)
    assert result.arrays.to_numpy_ndarrays()[0].tolist() == pytest.approx([(1 * 2 + 3 * 4) / 6])
    assert set(grid.changed_states()) == {2, 4}


def test_messages_made_in_flowers_old_way_are_answered() -> None:
    grid = LocalGrid(app, 3)
    for here in (grid, View(grid, [2]), RemoteGrid(grid, 3)):
        made = here.create_message(RecordDict(), "query.who", 2, "a group", 9.0)
        assert (made.metadata.group_id, made.metadata.ttl) == ("a group", 9.0)
        (reply,) = grid.send_and_receive([made])
        assert reply.content["who"]["node"] == 2


def test_arrays_are_handed_over_not_copied() -> None:
    seen: list[Array] = []
    spy = ClientApp()

    @spy.train()
    def train(message: Message, context: Context) -> Message:
        seen.extend(message.content["arrays"].values())
        return Message(RecordDict(), reply_to=message)

    (message,) = asking("train", 1)
    before = list(message.content["arrays"].values())
    list(LocalGrid(spy, 1).send_and_receive([message]))
    assert [a is b for a, b in zip(before, seen, strict=True)] == [True]
