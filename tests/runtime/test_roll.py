"""A server that was killed knows its nodes again; whoever was away meanwhile is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.runtime import code, remote
from fedsim.runtime.envelope import Enrolment
from fedsim.runtime.remote import RemoteGrid
from fedsim.runtime.roll import Roll
from tests.contract.rows import Row
from tests.faults.post import Clock, Post
from tests.runtime.test_remote import CLIENTS, post

SAID = Enrolment((0, 3), (10, 20), (1, 2), "code")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(remote, "time", made)
    return made


def asked(network: Post, path: Path) -> int:
    """How many nodes a server asks when it starts."""
    network.executed.clear()
    grid = RemoteGrid(network, CLIENTS, grace=20.0, roll=path, digest=code.digest())
    grid.wait(60)
    assert len(grid.declared) == CLIENTS
    return len(network.executed)


def test_known_nodes_are_not_asked_again(tmp_path: Path, clock: Clock) -> None:
    network = post(Row("fedavg"), clock)
    assert asked(network, tmp_path / "nodes.json") == CLIENTS
    assert asked(network, tmp_path / "nodes.json") == 0
    node = next(iter(network.contexts))
    network.since[node] = "later"  # it went away and came back
    assert asked(network, tmp_path / "nodes.json") == 1


def test_what_was_said_is_believed_of_the_same_code_only(tmp_path: Path) -> None:
    roll = Roll(tmp_path / "nodes.json")
    roll.note(7, "today", SAID)
    roll.save()
    again = Roll(tmp_path / "nodes.json")
    assert again.known(7, "today", "code") == SAID
    assert again.known(7, "today", "other code") is None
    assert again.known(7, "tomorrow", "code") is None
    assert again.known(7, "", "code") is None
    assert again.known(8, "today", "code") is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"7": 1}', '{"7": {"since": "today"}}',
     '{"7": {"since": "today", "digest": "code", "clients": [1], "train": [], "test": []}}'],
)  # fmt: skip
def test_a_damaged_file_is_an_empty_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "nodes.json").write_text(text)
    assert Roll(tmp_path / "nodes.json").known(7, "today", "code") is None
