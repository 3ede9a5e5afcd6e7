"""Row 10: any order of arrival, any number of workers, restarts, other processes: one hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedsim import registry
from fedsim.client_app import ProgramApp
from fedsim.core import rng
from fedsim.core.packing import content_of, pack, tree_of, unpack
from fedsim.core.records import as_flat, from_record, to_record
from fedsim.federation import Federation
from fedsim.intake import Intake
from fedsim.runtime import remote
from fedsim.runtime.engine import Engine
from fedsim.runtime.grid import LocalGrid
from fedsim.runtime.remote import RemoteGrid
from tests.contract import toy
from tests.contract.rows import Row, every
from tests.faults import golden
from tests.faults.post import Clock, Post
from tests.faults.runs import STRATEGIES

SOME = [Row("scaffold"), Row("dfedavg"), Row("ditto")]


def shuffled(row: Row, seed: int) -> str:
    """Clients work and answer in some order."""
    return golden.whole(row, wrap=lambda grid: toy.Shuffled(grid, seed))[0]


def workers(row: Row, number: int) -> str:
    """With the engine that the row gets, on so many threads."""
    fed, grid = golden.made(row)
    grid._app.engine = Engine(fed.env.model, fed.env.data, fed.choice(), number)  # type: ignore[attr-defined]
    return golden.bits(fed, toy.run(fed), grid.changed_states())


def restarted(row: Row) -> str:
    """Everything goes through bytes after every round, into a server that knows nothing."""
    fed, grid = golden.made(row)
    progress, states = fed.begin(), grid.changed_states()
    for _ in range(fed.setting.rounds):
        trees = {str(node): tree_of(state) for node, state in states.items()}
        saved = pack([from_record(progress.arrays), fed.strategy.state_dict(), trees])
        server, strategy, clients = unpack(saved)
        fed, grid = golden.made(row)
        layout, arrays = fed.env.model.initial().layout, to_record(server)
        progress.arrays = as_flat(arrays, layout) if set(server) == set(layout.names) else arrays
        fed.strategy.load_state_dict(strategy)
        states = {int(node): content_of(state) for node, state in clients.items()}
        grid.load_states(states)
        fed.advance(progress)
        states |= grid.changed_states()
    return golden.bits(fed, progress, states)


def deployed(row: Row, patch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The models and tables on nodes behind a Flower grid, and those of a local run."""
    clock = Clock()
    patch.setattr(remote, "time", clock)
    local = row.federation()
    app = ProgramApp(toy.environment([local.strategy.client], model=row.model))
    grid = RemoteGrid(Post(app, len(toy.SIZES), clock), len(toy.SIZES))
    grid.wait(60)
    there: Federation = row.federation(wrap=lambda _: grid)
    return tuple(golden.bits(fed, toy.run(fed), {}) for fed in (there, local))  # type: ignore[return-value]


@every(SOME)
def test_one_hash(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = golden.whole(row)
    assert {shuffled(row, seed) for seed in range(5)} == {wanted}
    assert restarted(row) == wanted
    assert workers(row, 1) == workers(row, 2)
    there, here = deployed(row, monkeypatch)
    assert there == here


@pytest.mark.faults
@pytest.mark.timeout(600)
@every(STRATEGIES)
def test_row_10(row: Row, scorecard: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """100 orders of arrival, 1 to 4 workers, a restart after every round, nodes elsewhere."""
    wanted, _ = golden.whole(row)
    orders = [shuffled(row, seed) for seed in range(100)]
    one, *more = (workers(row, n) for n in (1, 2, 3, 4))
    there, here = deployed(row, monkeypatch)
    others = [restarted(row) == wanted, *(h == one for h in more), there == here]
    failures = sum(h != wanted for h in orders)
    scorecard("10", f"orders of arrival, {row.strategy}", len(orders), failures)
    scorecard("10", f"restarts, workers, nodes, {row.strategy}", 5, others.count(False))
    assert failures == 0
    assert all(others)


# ---------------------------------------------------------------------------------- golden runs

RECORDED = json.loads(golden.FILE.read_text())
HERE = golden.where()
HINT = "if the change of bits is meant, record them anew: python -m tests.faults.golden"


@every(STRATEGIES)
def test_golden_run(row: Row) -> None:
    """The same bits as recorded; on another processor or torch the same numbers."""
    recorded = RECORDED["runs"][row.strategy]
    found, numbers = golden.whole(row)
    assert np.allclose(numbers, recorded["numbers"], rtol=1e-6, atol=1e-9), HINT
    if RECORDED["where"] == HERE:
        assert found == recorded["sha256"], HINT


def test_every_strategy_has_a_golden_run() -> None:
    assert set(RECORDED["runs"]) == set(registry.builtin("strategies")), HINT


# ---------------------------------------------------------------------------------- planted faults


def _as_they_come(patch: pytest.MonkeyPatch) -> None:
    """Replies are summed in the order in which they arrive."""
    verdicts = Intake.verdicts

    def arriving(self: Intake, sent: Any, *args: Any, **kwargs: Any) -> Any:
        came: list[int] = []
        answer = self.grid.send_and_receive

        def noting(messages: Any, *, timeout: float | None = None) -> Any:
            replies = list(answer(messages, timeout=timeout))
            came.extend(reply.metadata.src_node_id for reply in replies)
            return replies

        patch.setattr(self.grid, "send_and_receive", noting)
        found = list(verdicts(self, sent, *args, **kwargs))
        patch.setattr(self.grid, "send_and_receive", answer)
        return iter(sorted(found, key=lambda v: came.index(v.message.metadata.dst_node_id)))

    patch.setattr(Intake, "verdicts", arriving)


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Row], set[str]]]] = {
    "sums in order of arrival": (
        _as_they_come,
        lambda row: {shuffled(row, seed) for seed in range(5)},
    ),
    "unseeded batches": (
        lambda patch: patch.setattr(rng, "stream", lambda *_: np.random.default_rng()),
        lambda row: {golden.whole(row)[0] for _ in range(2)},
    ),
    "a state that is not saved": (
        lambda patch: patch.setattr(LocalGrid, "load_states", lambda self, states: None),
        lambda row: {golden.whole(row)[0], restarted(row)},
    ),
    "a golden run of other bits": (
        lambda patch: patch.setattr(toy, "SEED", 12),
        lambda row: {golden.whole(row)[0], RECORDED["runs"][row.strategy]["sha256"]},
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, hashes = PLANTED[fault]
    plant(monkeypatch)
    assert len(hashes(Row("scaffold"))) > 1
