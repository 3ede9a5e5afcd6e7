"""Row 2: hostile replies are refused one by one, with their reason, and change nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedsim import gate
from fedsim.core.averaging import EXAMPLES
from fedsim.core.packing import pack
from fedsim.core.records import as_flat
from fedsim.federation import Federation, Progress
from fedsim.gate import Gate, Refusal
from fedsim.runtime.grid import LocalGrid
from tests.contract import toy
from tests.contract.rows import ROWS, Row, every
from tests.faults.hostile import KINDS, Attack, HostileGrid, Kind

CLIENTS, WORST = 15, 5
SIZES = (10, 12, 6, 8, 11, 7, 14, 10, 8, 12, 8, 7, 6, 12, 11)
"""In batches of four none has one left, for BatchNorm's sake."""


def plan(kinds: list[Kind], seed: int) -> dict[int, Attack]:
    """Rounds of attacks by 1 to 5 clients, until every kind of the list was sent once."""
    draw, left, rounds = np.random.default_rng(seed), list(kinds), {}
    for number in itertools.count(1):
        if not left:
            return rounds
        some = [left.pop() for _ in range(min(len(left), int(draw.integers(1, WORST + 1))))]
        who = draw.choice(CLIENTS, len(some), replace=False).tolist()
        order = ("first", "middle", "last")[int(draw.integers(3))]
        rounds[number] = Attack(dict(zip(who, some, strict=True)), order)
    raise AssertionError


def attacked(row: Row, attacks: dict[int, Attack], seed: int, drop: bool) -> Federation:
    def wrap(grid: LocalGrid) -> HostileGrid:
        return HostileGrid(grid, attacks, seed, drop)

    return row.federation(
        rounds=len(attacks), data=toy.federated(SIZES), wrap=wrap, cohort={"quorum": 0.2}
    )


def state(federation: Federation, progress: Progress) -> bytes:
    """The model and everything else that the strategy holds."""
    return toy.sha256(progress.arrays).encode() + pack(federation.strategy.state_dict())


def refused(progress: Progress, attacks: dict[int, Attack]) -> list[tuple[str, str]]:
    """For every hostile reply: the reason it had to be refused with, and what became of it."""
    rows = {(r["round"], r["client"]): r for r in progress.clients if "status" in r}
    found = []
    for number, attack in attacks.items():
        for client, kind in attack.kinds.items():
            row = rows.pop((number, client), None)
            if row is not None:  # the strategy asked it
                found.append((kind.reason, (row.get("reason") or row["status"]).split(":")[0]))
    assert {r["status"] for r in rows.values()} == {"ok"}
    return found


def trial(row: Row, seed: int) -> tuple[int, int]:
    """Hostile replies in one run, every kind once, and failures among them."""
    attacks = plan(list(KINDS.values()), seed)
    there, without = (attacked(row, attacks, seed, drop) for drop in (False, True))
    progress, reference = toy.run(there), toy.run(without)
    assert not any(r["abandoned"] for r in progress.rounds)
    found = refused(progress, attacks)
    if state(there, progress) != state(without, reference):
        return len(found), len(found)
    # What is wrong with packed bytes, the strategy's own check says.
    wrong = [got for wanted, got in found if got != wanted and not (row.packed and got != "ok")]
    return len(found), len(wrong)


SOME = [
    Row("fedavg"),
    Row("scaffold"),
    Row("fedadam", {"eta": 0.01}, model="bn"),
    Row("ifca", {"k": 2}),
    Row("fedkseed", {"pool": 8, "steps": 2, "lr": 0.02}, packed=True),
]


@every(SOME)
def test_every_kind_is_refused_alone(row: Row) -> None:
    assert trial(row, seed=7) == (28, 0)


class Memory:
    """How far the process's memory rises above what it is when this is made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before = self._now("VmRSS")

    @staticmethod
    def _now(name: str) -> int:
        [line] = [x for x in Path("/proc/self/status").read_text().split("\n") if name in x]
        return int(line.split()[1])

    def grown(self) -> float:
        """Megabytes."""
        return (self._now("VmHWM") - self._before) / 1024


MOST = 64.0
"""Megabytes by which hostile replies may raise the server's memory."""
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@pytest.mark.faults
@pytest.mark.timeout(1200)
@LINUX
@every(list({r.strategy: r for r in reversed(ROWS)}.values()))
def test_row_2(row: Row, scorecard: Callable[..., None]) -> None:
    """36 variants of 28 kinds for every strategy."""
    honest(row)
    memory = Memory()
    tries = failures = 0
    for seed in itertools.count():  # 36 times, or more for a strategy that does not ask everybody
        if tries >= 36 * len(KINDS):
            break
        more, wrong = trial(row, seed)
        tries, failures = tries + more, failures + wrong
    scorecard("2", f"hostile replies, {row.strategy}", tries, failures)
    assert failures == 0
    assert memory.grown() < MOST


def honest(row: Row) -> None:
    """A run without an attack: what it needs is there afterwards."""
    attacks = plan(list(KINDS.values()), 0)
    toy.run(attacked(row, attacks, 0, drop=True))


@LINUX
def test_memory_stays_small() -> None:
    honest(Row("fedavg"))
    memory = Memory()
    assert [trial(Row("fedavg"), seed)[1] for seed in range(3)] == [0, 0, 0]
    assert memory.grown() < MOST


@LINUX
def test_planted_trust_in_sizes_costs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that makes room for what a header claims."""
    honest(Row("fedavg"))
    check = gate._check_npy

    def generous(name: str, data: bytes, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if b"500000000" in data[:128]:
            np.full(50_000_000, 1, np.float32)
        check(name, data, shape, dtype)

    monkeypatch.setattr(gate, "_check_npy", generous)
    memory = Memory()
    trial(Row("fedavg"), 0)
    assert memory.grown() > MOST


# ------------------------------------------------------------------ planted: the test must fail


def _believing(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(Gate, name, lambda *_: None)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "values are not looked at": _believing("_check_values"),
    "metrics are not looked at": _believing("_check_metrics"),
    "bytes are believed": lambda patch: patch.setattr(gate, "_check_npy", lambda *_: None),
    "arrays are believed": lambda patch: patch.setattr(gate, "_check_array", lambda *_: None),
    "everything is admitted": lambda patch: patch.setattr(
        Gate, "admit", lambda self, reply, expected, most=None: reply.content
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[fault](monkeypatch)
    try:
        _, failures = trial(Row("fedavg"), seed=7)
    except Exception:
        return  # a traceback in the server is a failure, too
    assert failures


# ------------------------------------------------------------------------------ the gate alone


def reply(**metrics: Any) -> Message:
    fed = Row("fedavg").federation()
    progress = fed.begin()
    message = toy.messages_of(fed, progress.arrays, 1)[0]
    content = toy.contents_of(fed, [message])[0]
    content = RecordDict({**content, "metrics": MetricRecord({EXAMPLES: 5, **metrics})})
    return Message(content, reply_to=message)


def code(message: Message, most: int | None = None, **options: Any) -> str:
    expected = {"arrays": message.content["arrays"]}
    try:
        Gate(**options).admit(message, expected, most)
    except Refusal as refusal:
        return refusal.code
    return "admitted"


def test_no_more_examples_than_the_client_has() -> None:
    assert code(reply(), most=5) == "admitted"
    assert code(reply(), most=4) == "examples_invalid"
    assert code(reply(), max_examples=4) == "examples_invalid"
    assert code(reply(**{EXAMPLES: 4.5})) == "examples_invalid"


def test_metrics_may_not_be_a_megabyte() -> None:
    assert code(reply(x=[1.0] * 200_000)) == "too_large"
    assert code(reply(x=[1.0] * 1_000)) == "admitted"


def test_very_many_names_make_a_short_reason() -> None:
    message = reply()
    entry = next(iter(message.content["arrays"].values()))
    many = {f"\x1b[31m{i}": entry for i in range(20_000)}
    with pytest.raises(Refusal) as caught:
        Gate().checked(ArrayRecord(many), as_flat(message.content["arrays"]).layout)
    assert caught.value.code == "wrong_names"
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_every_reason_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    missing = [r for r in get_args(gate.Reason) if f"`{r}`" not in text]
    assert not missing


def test_each_kind_has_a_reason_of_the_list() -> None:
    assert len(KINDS) == 28
    assert set(Counter(k.reason for k in KINDS.values())) <= set(get_args(gate.Reason))
