"""The virtual clock: devices, who drops out, who is late, and that all of it repeats to the bit."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim import registry
from fedsim.config import ClockConfig
from fedsim.core.errors import ConfigError
from fedsim.core.nodes import client_at, node_of
from fedsim.runtime import devices
from fedsim.runtime.clock import Device
from fedsim.runtime.fleet import HOUR, Fleet
from tests.contract.rows import Row
from tests.contract.toy import federation, messages_of, run, sha256

EVERYBODY = np.arange(7)
# A client of the toy does some 800 operations a round: at ten a second it takes more than a minute.
MIXED = [
    {"name": "phone", "share": 3, "flops": 10.0, "failure_rate": 0.0},
    {"name": "workstation", "share": 4},
]


def clock(**options: Any) -> ClockConfig:
    return ClockConfig.model_validate(options)


def fleet(clients: int = 7, seed: int = 3, **options: Any) -> Fleet:
    return Fleet(clock(**options), clients, seed)


def rounds_of(cohort: dict[str, Any] | None = None, rounds: int = 3, **options: Any) -> Any:
    """A run of the toy on such devices."""
    fed = federation(
        Row("fedavg").entry,
        rounds=rounds,
        clock=options,
        cohort={"quorum": 0.1, **(cohort or {})},
    )
    return fed, run(fed)


def test_seconds_are_transfer_and_work() -> None:
    """8 Mbit at 4 Mbit/s down, 1 Mbit at 2 Mbit/s up, 30 operations at 10 a second: 2 + 0.5 + 3."""
    one = fleet(device={"name": "workstation", "flops": 10.0, "down_mbit": 4.0, "up_mbit": 2.0})
    assert one.seconds(1, EVERYBODY[:1], 30.0, 1_000_000, 125_000).tolist() == [5.5]


@pytest.mark.parametrize("name", sorted(registry.names("devices")))
def test_every_profile_says_where_its_numbers_come_from(name: str) -> None:
    made = registry.resolve("devices", name)
    assert isinstance(made(), Device)
    assert "ours" in inspect.getdoc(made) or "assumption" in inspect.getdoc(made)
    assert len(inspect.getdoc(made).splitlines()) > 2


def test_the_pi_is_a_fifth_of_its_peak() -> None:
    assert devices.RaspberryPi5().flops == pytest.approx(0.2 * 4 * 2.4e9 * 16, rel=0.02)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 60))
def test_shares_are_exact_to_one_client(shares: list[int], clients: int) -> None:
    kinds = fleet(clients, fleet=[{"name": "phone", "share": s} for s in shares]).kind
    counts = np.bincount(kinds, minlength=len(shares))
    assert counts.sum() == clients
    assert np.all(np.abs(counts - np.array(shares) / sum(shares) * clients) < 1)


def test_failures_have_the_rate_they_say_and_do_not_depend_on_who_is_asked() -> None:
    many = fleet(20_000, device={"name": "phone", "failure_rate": 0.3})
    nodes = [node_of(c) for c in range(20_000)]
    failing = many.failing(5, nodes)
    assert abs(len(failing) / 20_000 - 0.3) < 0.02
    assert many.failing(5, nodes[:100]) == failing & set(nodes[:100])
    assert many.failing(6, nodes) != failing


def test_a_device_that_drops_out_leaves_the_mean_of_the_others() -> None:
    """The model is that of a run in which the failing clients were never asked."""
    fed, progress = rounds_of(rounds=1, device={"name": "phone", "failure_rate": 0.4})
    gone = fed.fleet.failing(1, fed.trainers)
    assert 0 < len(gone) < 7
    alone = federation(Row("fedavg").entry, rounds=1)
    alone.trainers = [n for n in alone.trainers if n not in gone]
    assert sha256(run(alone).arrays) == sha256(progress.arrays)
    row = progress.rounds[-1]
    assert (row["sampled"], row["admitted"], row["refused"]) == (7, 7 - len(gone), len(gone))
    told = {r["client"]: r.get("reason") for r in progress.clients if r["round"] == 1}
    assert {c for c, why in told.items() if why} == {client_at(n) for n in gone}
    assert told[client_at(min(gone))] == "error_reply: the device dropped out"


def test_too_many_failures_abandon_the_round() -> None:
    _, progress = rounds_of({"quorum": 0.9}, device={"name": "phone", "failure_rate": 0.9})
    assert all(row["abandoned"] for row in progress.rounds[1:])


def test_a_deadline_ends_the_round_and_the_slow_are_late() -> None:
    fed, progress = rounds_of(fleet=MIXED, deadline=1.0)
    row = progress.rounds[1]
    assert row["seconds"] == 1.0
    assert row["admitted"] == 4
    late = {r["client"] for r in progress.clients if r.get("status") == "late"}
    assert late == set(np.flatnonzero(fed.fleet.kind == 0).tolist())
    assert {r["device"] for r in progress.clients if r["client"] in late} == {"phone"}


def test_over_selection_takes_the_first_and_ends_with_the_last_of_them() -> None:
    """Five are asked for four: the four that are first in simulated time count."""
    fed, progress = rounds_of({"size": 4, "overselect": 0.25}, rounds=1, fleet=MIXED)
    rows = [r for r in progress.clients if r["round"] == 1 and "status" in r]
    assert len(rows) == 5
    by_time = sorted(rows, key=lambda r: (r["seconds"], r["client"]))
    assert [r["status"] for r in by_time] == ["ok"] * 4 + ["late"]
    assert progress.rounds[1]["seconds"] == by_time[3]["seconds"]
    assert progress.rounds[1]["admitted"] == 4
    assert fed.fleet.names == ["phone", "workstation"]


def test_a_deadline_that_nobody_misses_changes_nothing() -> None:
    _, free = rounds_of(fleet=MIXED)
    _, bound = rounds_of(fleet=MIXED, deadline=1e6)
    assert sha256(free.arrays) == sha256(bound.arrays)
    assert free.rounds == bound.rounds
    assert free.clients == bound.clients


def test_jitter_moves_time_and_nothing_else() -> None:
    _, steady = rounds_of(fleet=MIXED)
    _, shaky = rounds_of(fleet=MIXED, jitter=0.3)
    _, again = rounds_of(fleet=MIXED, jitter=0.3)
    assert shaky.rounds == again.rounds
    assert sha256(steady.arrays) == sha256(shaky.arrays)
    assert steady.rounds[1]["seconds"] != shaky.rounds[1]["seconds"]


@pytest.mark.parametrize(
    ("hour", "there"), [(0, True), (5.99, True), (6, False), (21.9, False), (22, True)]
)
def test_hours_over_midnight(hour: float, there: bool) -> None:
    night = fleet(1, device={"name": "phone", "online": [[22, 6]]})
    assert night.online(hour * HOUR, [1]) == ([1] if there else [])


def test_a_round_waits_for_devices_to_come_online() -> None:
    """Online from 3 o'clock; the run begins at midnight."""
    _, progress = rounds_of(device={"name": "workstation", "online": [[3, 9]]})
    first, second = progress.rounds[1], progress.rounds[2]
    assert 3 * HOUR <= first["seconds"] < 3 * HOUR + 60
    assert second["seconds"] < 60
    assert first["admitted"] == 7


def test_time_zones_spread_the_hours() -> None:
    many = fleet(200, device={"name": "phone", "online": [[0, 12]]}, time_zones=24)
    count = len(many.online(0.0, list(range(1, 201))))
    assert 70 < count < 130


def test_who_is_online_is_who_can_be_asked() -> None:
    fed = federation(
        Row("fedavg").entry,
        clock={"fleet": [{"name": "phone", "online": [[12, 13]]}, {"name": "workstation"}]},
        cohort={"size": 2},
    )
    there = fed.fleet.online(0.0, fed.trainers)
    assert 0 < len(there) < 7
    for server_round in range(1, 9):
        nodes, waited = fed.cohort(server_round)
        assert set(nodes) <= set(there)
        assert waited == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"flops": 0.0}, "flops = 0.0 must be above 0"),
        ({"failure_rate": 1.0}, "failure_rate = 1.0 must be at least 0 and below 1"),
        ({"online": [[5, 25]]}, "pairs of different hours from 0 to 24"),
    ],
)
def test_wrong_numbers_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        fleet(device={"name": "phone", **wrong})


def test_messages_go_to_everybody_who_is_sampled() -> None:
    """Drop-outs are decided behind the strategy's back: it addresses the whole cohort."""
    fed, progress = rounds_of(device={"name": "phone", "failure_rate": 0.5})
    assert len(messages_of(fed, progress.arrays, 1)) == 7
