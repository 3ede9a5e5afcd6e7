"""A Flower grid of other processes looks like a local one, whatever Flower does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedsim.client_app import ProgramApp
from fedsim.core.errors import RunError
from fedsim.core.nodes import node_of
from fedsim.core.records import to_record, to_tensor
from fedsim.federation import Federation
from fedsim.gate import Gate
from fedsim.intake import Intake, Tally
from fedsim.runner import build_strategy
from fedsim.runtime import remote
from fedsim.runtime.envelope import Enrolment
from fedsim.runtime.grid import LocalGrid
from fedsim.runtime.remote import RemoteGrid
from fedsim.runtime.work import Environment
from tests.contract import toy
from tests.contract.rows import Row
from tests.faults.post import Clock, Fate, Post

CLIENTS = len(toy.SIZES)


class Remote(ProgramApp):
    """A client app in a process of its own: it has the toy's data, and replies in plain arrays."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(remote, "time", made)
    return made


def post(row: Row, clock: Clock, nodes: int = CLIENTS, **options: Any) -> Post:
    env = toy.environment([build_strategy(row.entry).client], model=row.model)
    return Post(Remote(env), nodes, clock, **options)


def federation(row: Row, grid: RemoteGrid, **sections: Any) -> Federation:
    return row.federation(wrap=lambda _: grid, **sections)


def joined(network: Post, **options: Any) -> RemoteGrid:
    grid = RemoteGrid(network, CLIENTS, **options)
    grid.wait(60)
    return grid


def local(row: Row, **sections: Any) -> str:
    fed = row.federation(**sections)
    return toy.sha256(toy.run(fed).arrays)


ROWS = [Row("fedavg"), Row("scaffold"), Row("fedadam", {"eta": 0.01}, model="bn")]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.id)
@pytest.mark.parametrize("nodes", [CLIENTS, 2])
def test_same_bits_as_locally(row: Row, nodes: int, clock: Clock) -> None:
    network = post(row, clock, nodes)
    progress = toy.run(federation(row, joined(network)))
    assert toy.sha256(progress.arrays) == local(row)
    assert network.most_at_once == 1, "two messages at once would overwrite a node's state"


def test_node_ids_do_not_matter(clock: Clock) -> None:
    """Flower's unseeded sampling: its ids are random, so a sample of them is, too."""
    found = set()
    for seed in range(5):
        network = post(Row("fedavg"), clock, seed=seed)
        progress = toy.run(federation(Row("fedavg"), joined(network), cohort={"size": 3}))
        found.add(toy.sha256(progress.arrays))
    assert found == {local(Row("fedavg"), cohort={"size": 3})}


def test_round_1_race(clock: Clock) -> None:
    """Nodes register while the server is already running: it waits for all of them."""
    network = post(Row("fedavg"), clock)
    late = set(list(network.contexts)[2:])
    network.offline = late
    sleep = clock.sleep

    def join(seconds: float) -> None:
        sleep(seconds)
        if network.offline and clock.now > 3:
            network.offline.pop()

    clock.sleep = join  # type: ignore[method-assign]
    grid = RemoteGrid(network, CLIENTS)
    assert len(list(grid.get_node_ids())) == 2  # what Flower's strategies would have sampled from
    grid.wait(60)
    assert list(grid.get_node_ids()) == [node_of(c) for c in range(CLIENTS)]


def test_waiting_for_nodes_has_an_end(clock: Clock) -> None:
    network = post(Row("fedavg"), clock, nodes=5, partitions=CLIENTS)
    with pytest.raises(RunError, match=r"client 5, 6 after 20 s .5 of 7 clients are there"):
        RemoteGrid(network, CLIENTS).wait(20)
    assert 20 <= clock.now < 25


def test_a_client_that_cannot_start_says_why(clock: Clock) -> None:
    network = post(Row("fedavg"), clock)
    for context in network.contexts.values():
        del context.node_config["partition-id"]
    with pytest.raises(RunError, match="lacks 'partition-id'"):
        RemoteGrid(network, CLIENTS).wait(5)


def test_wrong_directory_is_noticed(clock: Clock) -> None:
    """Ray may let clients run another checkout's code."""
    with pytest.raises(RunError, match="runs other code than the server"):
        joined(post(Row("fedavg"), clock), digest="another")


def test_source_of_error_replies(clock: Clock) -> None:
    """Flower answers for a dead node in its own name: the error belongs to whom was asked."""
    network = post(Row("fedavg"), clock)
    network.fate = lambda client, message: Fate(error=client in (2, 4))
    fed = federation(Row("fedavg"), joined(network))
    progress = fed.begin()
    fed.advance(progress)
    dead = {r["client"]: r["reason"] for r in progress.clients if r.get("status") == "error"}
    assert dead == dict.fromkeys((2, 4), "error_reply: Node Unavailable")


def test_bfloat16_travels(clock: Clock) -> None:
    """Flower cannot send bfloat16: it travels as its bits."""
    values = torch.tensor([1.0, -2.5, 3e38], dtype=torch.bfloat16)
    message = Message(RecordDict({"arrays": to_record({"w": values})}), 1, "train.fedavg")
    grid = RemoteGrid(post(Row("fedavg"), clock), CLIENTS)
    wrapped = grid._wrapped(message, 5, remote.Copies())
    [entry] = wrapped.content.array_records["arrays"].values()
    assert entry.dtype == "bfloat16"
    assert type(entry).__name__ == "Array"  # bytes, not a tensor of this process
    assert torch.equal(to_tensor(entry), values)


# ------------------------------------------------------------------------------ things get lost


def rows_of(fate: Callable[[int, Message], Fate], clock: Clock, **cohort: Any) -> Any:
    """A run of three rounds where `fate` rules, with a cut-off of 10 seconds."""
    network = post(Row("fedavg"), clock)
    grid = joined(network)
    network.fate = lambda c, m: fate(c, m) if m.metadata.message_type[0] == "t" else Fate()
    return toy.run(federation(Row("fedavg"), grid, cohort={"timeout": 10.0, **cohort}))


def reasons(progress: Any, number: int) -> dict[int, str]:
    return {
        r["client"]: r["reason"].split(":")[0]
        for r in progress.clients
        if r["round"] == number and r.get("reason")
    }


def round_of(message: Message) -> int:
    return int(message.content["config"]["server-round"])  # type: ignore[index, call-overload]


def test_a_lost_reply_costs_the_cut_off(clock: Clock) -> None:
    progress = rows_of(lambda c, m: Fate(copies=int(c != 3)), clock)
    assert [reasons(progress, n) for n in (1, 2, 3)] == [{3: "late"}] * 3
    assert 30 <= clock.now < 32
    assert [r["abandoned"] for r in progress.rounds] == [False] * 4


def test_a_late_reply_is_of_a_stale_round(clock: Clock) -> None:
    def fate(client: int, message: Message) -> Fate:
        return Fate(delay=15.0 if client == 3 and round_of(message) == 1 else 0.0)

    def second(client: int, message: Message) -> Fate:
        if round_of(message) == 2 and client == 5:
            return Fate(delay=8.0)  # keeps round 2 open until the late reply is there
        return fate(client, message)

    progress = rows_of(second, clock)
    assert reasons(progress, 1) == {3: "late"}
    assert progress.rounds[2]["refused"] == 1, "the stale reply is counted"
    assert progress.rounds[2]["admitted"] == CLIENTS, "and the new one of that client taken"


def test_two_replies_to_one_message(clock: Clock) -> None:
    progress = rows_of(lambda c, m: Fate(copies=2 if c == 3 else 1), clock)
    assert [r["admitted"] for r in progress.rounds[1:]] == [CLIENTS] * 3
    assert toy.sha256(progress.arrays) == local(Row("fedavg"))


def test_a_reply_from_another_node(clock: Clock) -> None:
    progress = rows_of(lambda c, m: Fate(foreign=c == 3), clock)
    assert [r["admitted"] for r in progress.rounds[1:]] == [CLIENTS - 1] * 3
    assert reasons(progress, 1)[3] == "late"
    assert [r["refused"] for r in progress.rounds[1:]] == [2] * 3  # the forgery, the late one


def test_below_the_quorum_the_round_is_abandoned(clock: Clock) -> None:
    progress = rows_of(lambda c, m: Fate(copies=int(c < 3 or round_of(m) != 2)), clock)
    assert [r["abandoned"] for r in progress.rounds] == [False, False, True, False]
    one = rows_of(lambda c, m: Fate(), clock)
    assert [r["abandoned"] for r in one.rounds] == [False] * 4


def test_goal_count_ends_the_round(clock: Clock) -> None:
    """Asked more than needed; the slow ones are not waited for."""
    progress = rows_of(
        lambda c, m: Fate(delay=9.0 if c == 0 else 0.0), clock, size=5, overselect=0.4
    )
    assert clock.now < 2
    assert [r["admitted"] for r in progress.rounds[1:]] == [5] * 3
    assert [r["sampled"] for r in progress.rounds[1:]] == [7] * 3
    assert progress.rounds[1]["refused"] == 2


def test_hostile_replies_do_not_fill_the_goal(clock: Clock) -> None:
    def nan(content: RecordDict) -> RecordDict:
        return RecordDict({**content, "metrics": MetricRecord({"num-examples": float("nan")})})

    def fate(client: int, message: Message) -> Fate:
        return Fate(change=nan) if client < 2 else Fate(delay=1.0)

    progress = rows_of(fate, clock, size=5, overselect=0.4)
    assert [r["admitted"] for r in progress.rounds[1:]] == [5] * 3


def test_absent_nodes_are_not_sampled(clock: Clock) -> None:
    network = post(Row("fedavg"), clock)
    grid = joined(network)
    network.offline = set(list(network.contexts)[:2])
    fed = federation(Row("fedavg"), grid, cohort={"size": 5, "timeout": 10.0})
    progress = toy.run(fed)
    assert [r["admitted"] for r in progress.rounds[1:]] == [5] * 3
    network.offline = set(list(network.contexts)[:6])
    fed.advance(progress)
    assert progress.rounds[-1]["abandoned"]


def test_a_node_that_comes_back(clock: Clock) -> None:
    network = post(Row("fedavg"), clock)
    grid = joined(network)
    node = list(network.contexts)[3]
    network.offline = {node}
    assert node_of(3) not in list(grid.get_node_ids())
    network.offline = set()
    assert node_of(3) in list(grid.get_node_ids())


def killed(clock: Clock, *, back_after: float, offline: bool, **options: Any) -> Any:
    """A run in which client 3's node is killed with its message of round 2, and comes back."""
    network = post(Row("fedavg"), clock)
    grid = joined(network, grace=20.0)
    node, deaths = list(network.contexts)[3], []

    def fate(client: int, message: Message) -> Fate:
        if client != 3 or deaths or round_of(message) != 2:
            return Fate()
        deaths.append(clock.now)
        if offline:
            network.offline.add(node)
        return Fate(error=offline, delay=1.0, copies=int(offline))

    sleep = clock.sleep

    def turn(seconds: float) -> None:
        sleep(seconds)
        if deaths and clock.now > deaths[0] + back_after and network.since[node] == "once":
            network.offline.discard(node)
            network.since[node] = "again"

    clock.sleep = turn  # type: ignore[method-assign]
    network.fate = fate
    return toy.run(federation(Row("fedavg"), grid, **options))


@pytest.mark.parametrize("offline", [True, False])
def test_a_node_killed_in_a_round_does_its_work_when_it_is_back(
    offline: bool, clock: Clock
) -> None:
    progress = killed(clock, back_after=8.0, offline=offline)
    assert toy.sha256(progress.arrays) == local(Row("fedavg"))
    assert clock.now < 12


def test_a_node_that_stays_away_costs_the_grace(clock: Clock) -> None:
    progress = killed(clock, back_after=1e9, offline=True)
    assert reasons(progress, 2) == {3: "error_reply"}
    assert progress.rounds[3]["sampled"] == CLIENTS - 1, "and is not asked again"
    assert 20 < clock.now < 25


def test_a_node_killed_in_a_round_costs_the_cut_off_at_most(clock: Clock) -> None:
    progress = killed(clock, back_after=1e9, offline=True, cohort={"timeout": 5.0})
    assert reasons(progress, 2) == {3: "late"}
    assert clock.now < 6


# ------------------------------------------------------------------------------------ enrolment


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"enrolment": MetricRecord({"clients": [0], "train": [1], "test": [1, 2]}),
                    "code": ConfigRecord({"digest": ""})}),
        RecordDict({"enrolment": MetricRecord({"clients": [-1], "train": [1], "test": [1]}),
                    "code": ConfigRecord({"digest": ""})}),
        RecordDict({"enrolment": MetricRecord({"clients": 1.0, "train": 2, "test": 3}),
                    "code": ConfigRecord({"digest": ""})}),
        RecordDict({"enrolment": MetricRecord({"clients": [1.0], "train": [float("inf")],
                                               "test": [3.0]}),
                    "code": ConfigRecord({"digest": ""})}),
        RecordDict({"enrolment": ArrayRecord()}),
    ],
)  # fmt: skip
def test_a_hostile_enrolment_is_no_enrolment(content: RecordDict) -> None:
    with pytest.raises(ValueError, match="no enrolment"):
        Enrolment.of(content)


def test_a_client_may_not_report_more_than_it_declared(clock: Clock) -> None:
    def more(content: RecordDict) -> RecordDict:
        metrics = {**content.metric_records["metrics"], "num-examples": toy.SIZES[3] + 1}
        return RecordDict({**content, "metrics": MetricRecord(metrics)})

    progress = rows_of(lambda c, m: Fate(change=more) if c == 3 else Fate(), clock)
    assert reasons(progress, 1) == {3: "examples_invalid"}


# ---------------------------------------------------------------------- planted: must be noticed


def test_planted_trust_in_the_source_is_found(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteGrid, "_foreign", staticmethod(lambda sent, reply: False))
    progress = rows_of(lambda c, m: Fate(foreign=c == 3), clock)
    assert [r["admitted"] for r in progress.rounds[1:]] == [CLIENTS] * 3  # the forgery was taken


def test_planted_blindness_for_strays_is_found(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Intake, "_fault", lambda *_: None)
    progress = rows_of(lambda c, m: Fate(foreign=c == 3), clock)
    assert reasons(progress, 1).get(3) != "late"


def test_local_grid_answers_one_by_one() -> None:
    """The stream of the local grid is judged reply by reply, in order."""
    fed = Row("fedavg").federation()
    assert isinstance(fed.grid, LocalGrid)
    progress = fed.begin()
    messages = toy.messages_of(fed, progress.arrays, 1)
    verdicts = Intake(fed.grid, Gate(), None).verdicts(
        messages, fed.strategy.expected, lambda c: 10**6, Tally(1, fed.env.data.client_names)
    )
    assert [v.message.metadata.dst_node_id for v in verdicts] == list(range(1, CLIENTS + 1))


def test_state_on_disk_is_the_state_before_the_round(tmp_path: Path, clock: Clock) -> None:
    """A server that repeats a round finds the clients as they were before it."""
    row, config = Row("scaffold"), {"state-dir": str(tmp_path)}
    network = post(row, clock, node_config=config)
    fed = federation(row, joined(network, run="one"))
    progress = fed.begin()
    fed.advance(progress)
    saved = toy.sha256(progress.arrays), fed.strategy.state_dict()
    before = progress.arrays
    fed.advance(progress)
    wanted = toy.sha256(progress.arrays)
    # The server is killed and goes on after round 1; the nodes were restarted, too.
    again = federation(row, joined(post(row, clock, node_config=config), run="one"))
    second = again.begin()
    second.round, second.arrays = 1, before
    assert toy.sha256(second.arrays) == saved[0]
    again.strategy.load_state_dict(saved[1])
    again.advance(second)
    assert toy.sha256(second.arrays) == wanted
    # Another run finds nothing.
    assert toy.sha256(toy.run(federation(row, joined(network, run="two"))).arrays) == local(row)
