"""Rows 1 and 9 on real processes: the server's program and devices, killed again and again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import api
from fedsim.deploy.device import Supervisor
from fedsim.deploy.loopback import Deployment
from tests.deploy.support import (
    Background,
    Edge,
    alive,
    belonging,
    digest,
    federation,
    reached,
    rows,
    task_of,
    toy,
    until,
)

BACK = 10.0
"""Seconds within which a device must be back once it has power again."""
DISPATCH = 15.0
"""Seconds from the death of the server's program to the next message for a device."""


def cut_off(edge: Edge, server_round: int, delay: float, found: list[Any]) -> None:
    """Cut a device's power while it works for a round; switch it on later."""
    try:
        before = edge.tasks()
        assert until(lambda: edge.tasks() > before, 300), "it got no message"
        joined = edge.joined
        edge.cut()
        time.sleep(delay)
        assert not edge.pids(), "something survived the power cut"
        start = time.monotonic()
        edge.start()
        edge.back(joined)
        found.append(time.monotonic() - start)
    except AssertionError as fault:
        found.append(fault)


def cycles(
    deployment: Deployment, edges: list[Edge], delays: list[float], out: Path
) -> tuple[Background, list[Any]]:
    """One power cut of every device in each round but the first and the last.

    Returns:
        the run; for each cut the seconds until the device was back, or what went wrong.
    """
    rounds, found = len(delays) // len(edges), list[Any]()
    experiment = toy(f"experiment.rounds={2 * rounds + 2}", f"data.clients={len(edges)}")
    run = Background(deployment, task_of(experiment, out))
    for server_round in range(rounds):
        assert until(lambda n=server_round + 1: reached(out, n), 300), run.faults
        chosen = delays[server_round * len(edges) :]
        threads = [
            threading.Thread(target=cut_off, args=(e, server_round, d, found))
            for e, d in zip(edges, chosen, strict=False)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    run.finish()
    return run, found


def settled(out: Path, edges: list[Edge]) -> bool:
    """Whether every message was answered once or given up, and every device kept its state."""
    seen = [(r["round"], r["client"]) for r in rows(out) if r["status"] is not None]
    states = {r["status"] for r in rows(out)} <= {"ok", "error", "late", None}
    kept = all([*e.folder.glob("state/*/client-*/*.safetensors")] for e in edges)
    return len(seen) == len(set(seen)) and states and kept


STRAY = ("duplicate", "stale_round")
"""What is said of a second reply to a message that was sent again; it counts for nothing."""


def told(folder: Path) -> tuple[dict[str, str], list[Any], list[Any]]:
    """What a run leaves, without the second replies that its tables tell of."""
    models = {n: h for n, h in digest(folder).items() if n.endswith(".safetensors")}
    clients = rows(folder)
    for row in clients:
        if row["status"] == "ok" and (row["reason"] or "").startswith(STRAY):
            row["reason"] = None
    return models, clients, [{**r, "refused": None} for r in rows(folder, "rounds")]


def same_as_local(run: Background, folder: Path) -> bool:
    """Whether a run has the bits of one in this process."""
    api.execute(replace(run.task, path=folder / "local"))
    return told(folder / "local") == told(run.task.path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_power_cuts(tmp_path: Path) -> None:
    """Three devices lose power while they work, for 0, 2 and 10 s; nothing is lost or repeated."""
    with federation(tmp_path / "d", 3) as (deployment, edges):
        run, found = cycles(deployment, edges, [0, 2, 10], tmp_path / "run")
    print("back after", found)
    assert len(found) == 3
    assert settled(tmp_path / "run", edges)
    assert same_as_local(run, tmp_path)
    assert max(found) < BACK


class Silent(Supervisor):
    """Planted: the server is not told that the SuperNode before is gone."""

    def _before(self) -> None:
        pass


@contextmanager
def supervised(folder: Path) -> Iterator[None]:
    """A supervisor with that fault."""
    made = Silent(folder)
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield
    finally:
        made.stop()
        thread.join()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planted_faults_of_devices_are_found(tmp_path: Path) -> None:
    """A device that forgets; a supervisor that does not sign off: Flower keeps it out."""
    with federation(tmp_path / "d", 3) as (deployment, [silent, forgetful, _]):
        run = Background(deployment, task_of(toy("experiment.rounds=3"), tmp_path / "run"))
        assert until(lambda: reached(tmp_path / "run", 1), 300)
        joined = forgetful.joined
        forgetful.cut()
        shutil.rmtree(forgetful.folder / "state")
        forgetful.start()
        forgetful.back(joined)
        run.finish()
        assert not same_as_local(run, tmp_path)
        joined = silent.joined
        silent.cut()
        with supervised(silent.folder):
            assert not until(lambda: silent.joined > joined, BACK)
            assert until(lambda: silent.joined > joined, 120)  # its heartbeat had to run out


def dispatched(edges: list[Edge]) -> set[str]:
    """Flower's numbers of the runs that devices have had messages of."""
    return {n for e in edges for n in re.findall(r"\[RUN (\d+)", e.log)}


def server_kills(folder: Path, kills: int, seed: int) -> tuple[list[float], bool]:
    """Kill the server's program at random moments of one run.

    Returns:
        for each kill the seconds to the next message for a device; whether the bits are right.
    """
    draw, seconds = np.random.default_rng(seed), []
    with federation(folder / "d", 3) as (deployment, edges):
        experiment = toy(f"experiment.rounds={kills + 1}")
        run = Background(deployment, task_of(experiment, folder / "run"))
        for number in range(kills):
            assert until(lambda n=number: reached(folder / "run", n), 300), run.faults
            time.sleep(draw.uniform(0.0, 8.0))
            before = dispatched(edges)
            mine = [p for p in alive("flwr-serverapp") if p in belonging(deployment.home)]
            if not mine:
                break  # the run is over
            start = time.monotonic()
            for pid in mine:
                os.kill(pid, signal.SIGKILL)
            assert until(lambda b=before: bool(dispatched(edges) - b), 300), run.faults
            seconds.append(time.monotonic() - start)
        run.finish()
    return seconds, same_as_local(run, folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_server_killed_twice(tmp_path: Path) -> None:
    seconds, same = server_kills(tmp_path, 2, 7)
    print("next message after", seconds)
    assert same
    assert len(seconds) == 2
    assert max(seconds) < DISPATCH


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_row_1_deployed(part: int, tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """20 kills of the server's program, in four parts."""
    seconds, same = server_kills(tmp_path, 5, part)
    slow = sum(s >= DISPATCH for s in seconds)
    scorecard(
        "1", "server's program killed in deployment", len(seconds), 0 if same else len(seconds)
    )
    scorecard("1", f"next message within {DISPATCH:g} s", len(seconds), slow)
    print("next message after", [round(s, 1) for s in seconds])
    assert same
    assert not slow


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(7))
def test_row_9(part: int, tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """21 power cuts of 0, 2 and 10 s each, in seven parts."""
    with federation(tmp_path / "d", 3) as (deployment, edges):
        delays = [float((0, 2, 10)[(i + i // 3 + part) % 3]) for i in range(9)]
        run, found = cycles(deployment, edges, delays, tmp_path / "run")
    bad = sum(not isinstance(f, float) or f > BACK for f in found)
    scorecard("9", "power cuts of 0, 2, 10 s", len(found), bad)
    print("back after", [round(f, 1) if isinstance(f, float) else f for f in found])
    assert settled(tmp_path / "run", edges)
    assert same_as_local(run, tmp_path)
    assert not bad


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_row_9_long(tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """20 power cuts of 70 s: Flower gives the task up meanwhile, or it is sent again."""
    with federation(tmp_path / "d", 5) as (deployment, edges):
        delays = [70.0 + 4 * (i % 5) for i in range(20)]  # they are not switched on all at once
        _, found = cycles(deployment, edges, delays, tmp_path / "run")
    bad = sum(not isinstance(f, float) or f > BACK for f in found)
    scorecard("9", "power cuts of 70 s", len(found), bad)
    print("back after", [round(f, 1) if isinstance(f, float) else f for f in found])
    assert settled(tmp_path / "run", edges)
    assert not bad
