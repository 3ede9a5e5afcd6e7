"""Oracles: whatever crashes or comes late, no item is bought twice and no budget exceeded."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsim.config import StrategyConfig
from fedsim.core.errors import ConfigError, RunError
from fedsim.core.oracle import Items
from fedsim.core.pool import Pool, share
from fedsim.runtime.oracles import BOOK, Called, Folder, Held, Paid, name_of
from tests.contract import toy

X = torch.arange(12.0).view(6, 2)


def items(places=range(6), client=0, cycle=0):
    x = X[list(places)]
    held = torch.tensor([i % 3 for i in places])
    return Items(client, cycle, [name_of(one) for one in x], x, held, 3)


class Clerk:
    """Labels with the place modulo 3, and counts how often each item was asked for."""

    def __init__(self, answers=lambda item: True):
        self.times, self.answers = {}, answers

    def label(self, items):
        for name in items.names:
            self.times[name] = self.times.get(name, 0) + 1
        return {i: int(items.held[i]) for i, n in enumerate(items.names) if self.answers(n)}


def test_held_labels_are_those_of_the_data():
    assert Held().label(items()) == {i: i % 3 for i in range(6)}


def test_an_item_is_bought_once_whoever_asks(tmp_path):
    clerk = Clerk()
    first = Paid(clerk, tmp_path).label(items(range(4), client=0))
    again = Paid(clerk, tmp_path).label(items(range(4), client=0))
    other = Paid(clerk, tmp_path).label(items([3, 4], client=1))
    assert first == again == {i: i % 3 for i in range(4)}
    assert other == {0: 0, 1: 1}
    assert set(clerk.times.values()) == {1}
    twice = Paid(clerk, tmp_path).label(items([5, 5]))  # the same example twice in one query
    assert twice == {0: 2, 1: 2}
    assert clerk.times[name_of(X[5])] == 1


def test_the_limit_holds_whatever_is_asked(tmp_path):
    clerk = Clerk()
    assert len(Paid(clerk, tmp_path, limit=4).label(items(range(3)))) == 3
    assert len(Paid(clerk, tmp_path, limit=4).label(items(range(6)))) == 4
    assert len(Paid(clerk, tmp_path, limit=4).label(items([4, 5]))) == 0
    assert len(clerk.times) == 4


def test_what_was_not_answered_is_asked_for_again_and_counts_once(tmp_path):
    late = {name_of(X[1]), name_of(X[2])}
    clerk = Clerk(lambda name: name not in late)
    assert sorted(Paid(clerk, tmp_path, limit=3).label(items(range(3)))) == [0]
    late.clear()
    assert sorted(Paid(clerk, tmp_path, limit=3).label(items(range(3)))) == [0, 1, 2]
    assert [clerk.times[name_of(x)] for x in X[:3]] == [1, 2, 2]


def test_a_function_that_raises_is_no_answer(tmp_path):
    class Broken:
        def label(self, items):
            raise TimeoutError("nobody there")

    assert Paid(Broken(), tmp_path).label(items()) == {}
    assert Paid(Clerk(), tmp_path).label(items()) == {i: i % 3 for i in range(6)}


CRASH = """
import sys, torch
from pathlib import Path
from tests.runtime.test_oracles import Paid, items
class Clerk:
    def label(self, items):
        with open(sys.argv[2], "a") as log:
            log.write("".join(n + "\\n" for n in items.names))
        return {i: int(items.held[i]) for i in range(len(items))}
print(Paid(Clerk(), Path(sys.argv[1]), limit=6).label(items()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2])
def test_killed_between_asking_and_answering(tmp_path, at):
    """Killed after it was noted what is asked for, and after the answers were noted."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", CRASH, str(tmp_path / "book"), str(tmp_path / "log")]
    env = {"PYTHONPATH": str(root), "FL_CRASH_AT": str(at), "PATH": "/usr/bin:/bin"}
    killed = subprocess.run(command, cwd=root, env=env, capture_output=True)
    assert killed.returncode == -9
    env.pop("FL_CRASH_AT")
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str({i: i % 3 for i in range(6)})
    asked = (tmp_path / "log").read_text().split()
    assert len(asked) == 6  # once each: the first process died before asking, or all were answered
    book = [json.loads(line) for line in (tmp_path / "book" / BOOK).read_text().splitlines()]
    assert len([entry for entry in book if "label" not in entry]) == 6


def test_half_a_line_in_the_book_is_left_out_and_damage_is_told(tmp_path):
    Paid(Clerk(), tmp_path).label(items(range(2)))
    book = tmp_path / BOOK
    book.write_bytes(book.read_bytes() + b'{"item": "abc')
    assert Paid(Clerk(), tmp_path).label(items(range(2))) == {0: 0, 1: 1}
    book.write_bytes(b"nonsense\n" + book.read_bytes())
    with pytest.raises(RunError, match="is damaged"):
        Paid(Clerk(), tmp_path).label(items(range(2)))


def test_a_person_fills_in_a_folder(tmp_path):
    oracle = Folder(str(tmp_path))
    query = items(range(4), client=2, cycle=1)
    assert oracle.label(query) == {}
    table = tmp_path / "todo-client002-cycle01.csv"
    rows = list(csv.reader(table.open()))
    assert rows == [["item", "label"], *([n, ""] for n in query.names)]
    assert all((tmp_path / "items" / f"{n}.npy").exists() for n in query.names)
    rows[1][1], rows[2][1], rows[3][1] = "2", "no idea", " 7 "
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert oracle.label(query) == {0: 2, 2: 7}  # that 7 is no class is for the client to say
    assert len(list(csv.reader(table.open()))) == 5  # nothing is listed twice


def test_pictures_are_written_for_images(tmp_path):
    x = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    Folder(str(tmp_path)).label(Items(0, 0, ["a"], x[None], torch.zeros(1).long(), 3))
    assert (tmp_path / "items" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_oracles_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"oracle.function = 'nowhere:f' cannot be imported"):
        Called("nowhere:f", str(tmp_path))
    with pytest.raises(ConfigError, match=r"oracle.limit = -1"):
        Folder(str(tmp_path), limit=-1)
    with pytest.raises(ConfigError, match=r"oracle.timeout"):
        Folder(str(tmp_path), timeout=-1.0)


# ------------------------------------------------------------------ what clients make of answers


def first(rows, count):
    return torch.arange(count)


def test_labels_outside_the_classes_are_void_and_spent():
    pool = Pool(torch.arange(10), 3)
    gained = pool.acquire(0, 4, first, lambda q: {0: 1, 1: 3, 2: -1, 3: 0}, 0)
    assert gained == 2
    assert (pool.labelled.tolist(), pool.labels.tolist()) == ([0, 3], [1, 0])
    assert pool.void.tolist() == [1, 2]
    assert pool.left(0, 4) == 0
    assert not set(pool.open.tolist()) & {0, 1, 2, 3}
    assert set(pool.unlabelled.tolist()) == set(range(10)) - {0, 3}


def test_a_query_that_timed_out_stays_asked_and_is_not_chosen_again():
    pool = Pool(torch.arange(10), 3)
    queries = []

    def silent(query):
        queries.append(query.rows.tolist())
        return {}

    assert pool.acquire(0, 3, first, silent, 0) == 0
    assert pool.acquire(0, 3, first, silent, 0) == 0  # retried: the same items, nothing new
    assert queries == [[0, 1, 2], [0, 1, 2]]
    assert pool.spent.tolist() == [3]
    assert pool.acquire(1, 2, first, lambda q: dict.fromkeys(range(len(q.rows)), 1), 0) == 5
    assert pool.spent.tolist() == [3, 2]
    assert pool.labelled.tolist() == [0, 1, 2, 3, 4]
    assert pool.acquire(1, 2, first, silent, 0) == 0
    assert len(queries) == 2


def test_a_pool_smaller_than_the_budget_is_taken_whole_and_no_budget_takes_nothing():
    pool = Pool(torch.arange(3), 3)
    everything = lambda q: dict.fromkeys(range(len(q.rows)), 0)  # noqa: E731
    assert pool.acquire(0, 0, first, everything, 0) == 0
    assert pool.acquire(1, 9, first, everything, 0) == 3
    assert pool.spent.tolist() == [0, 3]


def test_a_choice_of_the_same_example_twice_is_no_choice():
    with pytest.raises(ValueError, match="different"):
        Pool(torch.arange(9), 3).acquire(0, 2, lambda r, n: torch.tensor([4, 4]), dict, 0)


def test_a_federation_waits_for_its_labellers(tmp_path):
    """Half of the answers come late: rounds go on with who has labels, and budgets hold."""
    times = {}

    class Slow:
        def label(self, items):
            times[items.client] = times.get(items.client, 0) + 1
            if items.client % 2 and times[items.client] % 2:
                return {}
            return {i: int(items.held[i]) for i in range(len(items))}

    entry = StrategyConfig(
        name="kafal",
        params={"initial": 0.3, "budget": 0.2, "rounds_per_cycle": 1, "participation": 1.0},
    )
    fed = toy.federation(entry, rounds=4, cohort={"quorum": 0.2})
    object.__setattr__(fed.env, "oracle", Paid(Slow(), tmp_path))
    progress = toy.run(fed, 4)
    reasons = [r.get("reason", "") for r in progress.clients]
    assert any("no labelled example yet" in r for r in reasons)
    assert not any(r["abandoned"] for r in progress.rounds)
    assert sum(r.get("waiting", 0) for r in progress.rounds) > 0
    book = [json.loads(line) for line in (tmp_path / BOOK).read_text().splitlines()]
    bought = [entry["item"] for entry in book if "label" not in entry]
    assert len(bought) == len(set(bought))
    for client, size in enumerate(toy.SIZES):
        budget = share(0.3, size) + 3 * share(0.2, size)
        assert sum(entry.get("client") == client for entry in book) <= budget
