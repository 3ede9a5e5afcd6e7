"""Rows 4 and 5: whatever the network does, every reply counts once, in its own round, or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from fedsim.client_app import ProgramApp
from fedsim.collector import Collector
from fedsim.core.averaging import EXAMPLES
from fedsim.federation import Federation, Progress
from fedsim.intake import Intake
from fedsim.runtime import remote
from fedsim.runtime.grid import LocalGrid
from fedsim.runtime.remote import RemoteGrid
from fedsim.runtime.work import PARTITION
from tests.contract import toy
from tests.contract.rows import Row
from tests.faults.hostile import Attack, HostileGrid
from tests.faults.post import Clock, Fate, Post

CLIENTS, CUT_OFF, QUORUM = len(toy.SIZES), 10.0, 0.5
ROW = Row("fedavg")


class Echo(ProgramApp):
    """Clients that send back what they were sent: who counts for what does not depend on it."""

    def _answer(self, message: Message, context: Context) -> Message:
        examples = toy.SIZES[int(context.node_config[PARTITION])]
        metrics = MetricRecord({EXAMPLES: examples, "loss": 1.0})
        content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
        return Message(content, reply_to=message)


ENVIRONMENT = toy.environment(["fedavg"])


def network(clock: Clock, app: type[ProgramApp] = ProgramApp) -> Post:
    return Post(app(ENVIRONMENT), CLIENTS, clock)


def served(post: Post, **sections: Any) -> Federation:
    grid = RemoteGrid(post, CLIENTS, poll=0.5)
    grid.wait(60)
    cohort = {"timeout": CUT_OFF, "quorum": QUORUM}
    return ROW.federation(
        rounds=10**6, wrap=lambda _: grid, cohort=cohort, evaluate={"central": False}, **sections
    )


# Delays that end within the cut-off, and some that end in the next round or after it.
IN_TIME, LATE = (0.0, 0.5, 3.0, 9.0), (12.0, 15.0, 25.0)
fates = st.lists(
    st.one_of(
        st.builds(Fate, delay=st.sampled_from(IN_TIME), copies=st.sampled_from([1, 1, 1, 2, 3])),
        st.builds(Fate, delay=st.sampled_from(LATE), copies=st.sampled_from([1, 2])),
        st.builds(Fate, copies=st.just(0)),
        st.builds(Fate, error=st.just(True)),
        st.builds(Fate, foreign=st.just(True)),
    ),
    min_size=CLIENTS,
    max_size=CLIENTS,
)


@dataclass
class Model:
    """What must come out, in thirty lines: what each client is entered as, and who counts."""

    rounds: list[tuple[list[str], bool]] = field(default_factory=list)
    counted: Counter[int] = field(default_factory=Counter)

    def round(self, fate: list[Fate]) -> None:
        """Exactly those count whose first honest reply is there before the cut-off."""
        status = [self._status(f) for f in fate]
        abandoned = status.count("ok") < QUORUM * CLIENTS
        self.rounds.append((status, abandoned))
        for client, entered in enumerate(status):
            self.counted[client] += toy.SIZES[client] * (entered == "ok")

    @staticmethod
    def _status(fate: Fate) -> str:
        if not fate.copies or fate.foreign or fate.delay >= CUT_OFF:
            return "late"
        return "error" if fate.error else "ok"


class Network(RuleBasedStateMachine):
    """Rounds over a network that does as it likes, with restarts of the server between them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock()
        self.patch.setattr(remote, "time", self.clock)
        self.post, self.model = network(self.clock, Echo), Model()
        self.fed = served(self.post)
        self.progress: Progress = self.fed.begin()
        self.counted: Counter[int] = Counter()
        self.checked = 0

    def teardown(self) -> None:
        self.patch.undo()

    @rule(fate=fates)
    def round(self, fate: list[Fate]) -> None:
        """One round in which every client's reply has its own fate."""
        self.post.fate = lambda client, message: fate[client]
        self.fed.advance(self.progress)
        self.model.round(fate)

    @rule()
    def restart(self) -> None:
        """The server is killed and goes on; replies to the old one may still come."""
        self.fed = served(self.post)

    @invariant()
    def counted_once(self) -> None:
        """The last round is what the model says, and so is the sum over all rounds."""
        if len(self.model.rounds) == self.checked:
            return
        self.checked += 1
        status, abandoned = self.model.rounds[-1]
        number, last = len(self.model.rounds), self.progress.rounds[-1]
        rows = [r for r in self.progress.clients if r["round"] == number]
        assert {r["client"]: r["status"] for r in rows} == dict(enumerate(status))
        assert last["admitted"] == status.count("ok")
        assert last["abandoned"] == abandoned
        for row in rows:
            if row["status"] == "ok":
                self.counted[row["client"]] += row["examples"]
                assert row.get("reason", STRAY[0]).startswith(STRAY)
            else:
                assert {"late": "late", "error": "error_reply"}[row["status"]] in row["reason"]
        self.progress.clients.clear()
        assert self.counted == self.model.counted


STRAY = ("duplicate", "stale_round", "unknown_node")
"""What may be said of a reply beside one that counts."""


def search(examples: int, steps: int, part: int = 0) -> None:
    run_state_machine_as_test(
        seed(part)(Network),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_reply_counts_once() -> None:
    search(30, 12)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_row_5(part: int, scorecard: Callable[..., None]) -> None:
    """2,000 sequences of 50 steps in all; hypothesis stops at the first failure."""
    search(200, 50, part)
    scorecard("5", "sequences of 50 steps", 200, 0)


def _late_counts(patch: pytest.MonkeyPatch) -> None:
    """Plant: a reply is taken for the open message of its client, whatever it answers."""
    verdicts = Intake.verdicts

    def believing(self: Intake, sent: list[Message], *args: Any, **kwargs: Any) -> Any:
        send = self.grid.send_and_receive
        by_node = {m.metadata.dst_node_id: m for m in sent}

        def readdressed(messages: Any, *, timeout: float | None = None) -> Any:
            return map(to_mine, send(messages, timeout=timeout))

        def to_mine(reply: Message) -> Message:
            mine = by_node.get(reply.metadata.src_node_id)
            if mine is not None and reply.has_content():
                reply = Message(reply.content, reply_to=mine)
            return reply

        patch.setattr(self.grid, "send_and_receive", readdressed)
        try:
            yield from verdicts(self, sent, *args, **kwargs)
        finally:
            patch.setattr(self.grid, "send_and_receive", send)

    patch.setattr(Intake, "verdicts", believing)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "late replies count": _late_counts,
    "replies of others count": lambda patch: patch.setattr(
        RemoteGrid, "_foreign", staticmethod(lambda sent, reply: False)
    ),
    "there is no quorum": lambda patch: patch.setattr(Collector, "quorum", lambda *_: 1),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[fault](monkeypatch)
    with pytest.raises(AssertionError):
        search(60, 12)


# ------------------------------------------------------------------------- clients die every round


def survivors(seed: int, rounds: int, share: float) -> dict[int, set[int]]:
    draw = np.random.default_rng(seed)
    return {n: {c for c in range(CLIENTS) if draw.random() < share} for n in range(1, rounds + 1)}


def dying(seed: int, clock: Clock, rounds: int = 5, share: float = 0.3, how: str = "") -> int:
    """Failures of a run in which a share of the clients dies, or hangs, in every round."""
    dead = survivors(seed, rounds, share)
    post = network(clock)
    hang = Fate(delay=200.0) if how == "hang" else Fate(error=True, delay=2.0)

    def fate(client: int, message: Message) -> Fate:
        number = int(message.content["config"]["server-round"])  # type: ignore[index, call-overload]
        return hang if client in dead[number] else Fate()

    post.fate, fed = fate, served(post)
    progress = fed.begin()
    for _ in range(rounds):
        fed.advance(progress)

    attacks = {n: Attack(dict.fromkeys(c)) for n, c in dead.items()}  # type: ignore[arg-type]

    def wrap(grid: LocalGrid) -> HostileGrid:
        return Absent(grid, attacks, 0, drop=True)

    oracle = ROW.federation(
        rounds=10**6, wrap=wrap, cohort={"quorum": QUORUM}, evaluate={"central": False}
    )
    wanted = toy.run(oracle, rounds)
    late = clock.now > rounds * (CUT_OFF + 1)
    below = [len(c) > (1 - QUORUM) * CLIENTS for c in dead.values()]
    told = [r["abandoned"] for r in progress.rounds[1:]]
    same = toy.sha256(progress.arrays) == toy.sha256(wanted.arrays)
    return int(late or below != told or not same)


class Absent(HostileGrid):
    """The oracle: those clients' replies are not there, and nothing is spoilt."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        """Replies of the survivors."""
        sent = list(messages)
        dead = self._attacks[int(sent[0].content["config"]["server-round"])].kinds  # type: ignore[index, call-overload]
        replies = toy.Wrapped.send_and_receive(self, sent)
        return [r for r in replies if r.metadata.src_node_id - 1 not in dead]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(remote, "time", made)
    return made


@pytest.mark.parametrize("how", ["die", "hang"])
def test_the_mean_of_the_survivors(how: str, clock: Clock) -> None:
    assert dying(0, clock, how=how) == 0


def test_below_the_quorum_nothing_changes(clock: Clock) -> None:
    assert dying(0, clock, share=0.8) == 0


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_row_4(clock: Clock, scorecard: Callable[..., None]) -> None:
    """20 seeds of 30 % dying, 60 % dying, 30 % hanging in every round."""
    total = 0
    for what, share, how in [
        ("30 % die in every round", 0.3, "die"),
        ("60 % die in every round", 0.6, "die"),
        ("30 % hang in every round", 0.3, "hang"),
    ]:
        failures = 0
        for number in range(20):
            clock.now = 0.0
            failures += dying(number, clock, rounds=10, share=share, how=how)
        scorecard("4", what, 20, failures)
        total += failures
    assert total == 0


def test_planted_wait_for_the_dead_is_found(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without a cut-off waits for a client that hangs."""
    wait = RemoteGrid.send_and_receive
    monkeypatch.setattr(
        RemoteGrid, "send_and_receive", lambda self, messages, timeout=None: wait(self, messages)
    )
    assert dying(0, clock, how="hang") > 0
