"""Nodes that are away for a moment are waited for; rounds are not burnt while nobody is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedsim.runtime import remote
from fedsim.runtime.remote import RemoteGrid
from tests.contract import toy
from tests.contract.rows import Row
from tests.faults.post import Clock, Post
from tests.runtime.test_remote import CLIENTS, federation, post


class Eventful(Clock):
    """Virtual time in which something happens."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[float, Callable[[], object]]] = []

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        for event in [e for e in self.events if e[0] <= self.now]:
            self.events.remove(event)
            event[1]()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Eventful:
    made = Eventful()
    monkeypatch.setattr(remote, "time", made)
    return made


def joined(network: Post, **options: float) -> RemoteGrid:
    grid = RemoteGrid(network, CLIENTS, grace=20.0, **options)
    grid.wait(60)
    return grid


def away(network: Post, number: int) -> None:
    network.offline |= set(list(network.contexts)[:number])


def test_all_are_away_for_a_moment(clock: Eventful) -> None:
    """As after a cut of the line: the run has the bits of one without."""
    wanted = toy.run(federation(Row("fedavg"), joined(post(Row("fedavg"), clock))))
    network = post(Row("fedavg"), clock)
    fed = federation(Row("fedavg"), joined(network))
    progress = fed.begin()
    away(network, CLIENTS)
    clock.events.append((clock.now + 12.0, network.offline.clear))
    while progress.round < wanted.round:
        fed.advance(progress)
    assert toy.sha256(progress.arrays) == toy.sha256(wanted.arrays)
    assert not any(r["abandoned"] for r in progress.rounds)


def test_who_stays_away_is_waited_for_once(clock: Eventful) -> None:
    network = post(Row("fedavg"), clock)
    fed = federation(Row("fedavg"), joined(network))
    progress = fed.begin()
    away(network, 1)
    took = []
    for _ in range(3):
        start = clock.now
        fed.advance(progress)
        took.append(clock.now - start)
    assert 20 <= took[0] < 22
    assert max(took[1:]) < 2
    assert [r["admitted"] for r in progress.rounds[1:]] == [CLIENTS - 1] * 3


def test_nobody_comes_back(clock: Eventful) -> None:
    """Every round costs the patience, and is abandoned."""
    network = post(Row("fedavg"), clock)
    fed = federation(Row("fedavg"), joined(network, patience=100.0))
    progress = fed.begin()
    away(network, CLIENTS)
    start = clock.now
    fed.advance(progress)
    fed.advance(progress)
    assert 200 <= clock.now - start < 204
    assert [r["abandoned"] for r in progress.rounds] == [False, True, True]


def test_planted_haste_is_found(clock: Eventful, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteGrid, "gather", lambda *_: None)
    network = post(Row("fedavg"), clock)
    fed = federation(Row("fedavg"), joined(network))
    progress = fed.begin()
    away(network, CLIENTS)
    clock.events.append((clock.now + 12.0, network.offline.clear))
    fed.advance(progress)
    assert progress.rounds[-1]["abandoned"]
