"""Every strategy under every executor: the same bits, or the same numbers up to rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.core.records import as_flat
from fedsim.federation import Federation, Progress
from fedsim.runtime.choose import Choice
from fedsim.runtime.engine import Engine
from tests.contract import toy
from tests.contract.rows import BARE, ROWS, Row

EVERY = pytest.mark.parametrize("row", [*ROWS, *BARE], ids=lambda row: row.id)


def federation(
    row: Row, executor: str, workers: int = 1, dtype: torch.dtype = torch.float32, rounds: int = 3
) -> tuple[Federation, Choice]:
    """A toy federation whose grid has an engine, and what was chosen for it."""
    made = row.federation(
        data=toy.federated(dtype=dtype),
        rounds=rounds,
        runtime={"executor": "auto" if executor == "auto" else executor},
        evaluate={"clients_every": 1},
    )
    choice = made.choice()
    made.grid._app.engine = Engine(made.env.model, made.env.data, choice, workers)  # type: ignore[attr-defined]
    return made, choice


def same(one: Progress, other: Progress) -> bool:
    """Whether models and tables hold the same bits; the columns of a row have no order."""
    tables = [
        [repr(sorted(row.items())) for row in (*progress.rounds, *progress.clients)]
        for progress in (one, other)
    ]
    return tables[0] == tables[1] and toy.sha256(one.arrays) == toy.sha256(other.arrays)


def far(one: Progress, other: Progress) -> float:
    """Largest difference between entries of the models, or where none travel, of their losses."""
    a, b = as_flat(one.arrays), as_flat(other.arrays)
    if not len(a.flat):
        return abs(float(one.rounds[-1]["client_loss"] - other.rounds[-1]["client_loss"]))
    return float((a.flat - b.flat).abs().max())


@EVERY
def test_serial_engine_is_message_by_message(row: Row) -> None:
    made, _ = federation(row, "serial")
    alone = row.federation(evaluate={"clients_every": 1})
    assert same(toy.run(made), toy.run(alone))


@EVERY
def test_executors_agree(row: Row) -> None:
    made, choice = federation(row, "auto", dtype=torch.float64, rounds=20)
    serial, _ = federation(row, "serial", dtype=torch.float64, rounds=20)
    fast, slow = toy.run(made), toy.run(serial)
    assert far(fast, slow) < 1e-9
    if choice.executor != "batched":
        assert toy.sha256(fast.arrays) == toy.sha256(slow.arrays)
    for a, b in zip(fast.clients, slow.clients, strict=True):
        assert {k: a[k] for k in a if isinstance(a[k], (int, str))} == {
            k: b[k] for k in b if isinstance(b[k], (int, str))
        }
        close(a, b, 1e-8)


@EVERY
def test_executors_agree_in_float32_over_a_round(row: Row) -> None:
    made, _ = federation(row, "auto")
    serial, _ = federation(row, "serial")
    assert far(toy.run(made, 1), toy.run(serial, 1)) < 1e-5


@EVERY
def test_workers_and_repetition_change_no_bit(row: Row) -> None:
    one, two, again = (toy.run(federation(row, "auto", w)[0]) for w in (1, 2, 2))
    assert same(one, two)
    assert same(two, again)


def test_every_vectorised_program_is_stacked_on_layers_that_can_be() -> None:
    stacked = {row.strategy for row in ROWS if federation(row, "auto")[1].executor == "batched"}
    assert {"fedavg", "fedprox", "scaffold", "fedld", "fedsam", "dfedsam", "fedadam"} <= stacked


def close(a: dict[str, Any], b: dict[str, Any], most: float) -> None:
    """Every float of two rows, within rounding."""
    for name in (n for n in a if isinstance(a[n], float)):
        assert np.isclose(a[name], b[name], rtol=most, atol=most, equal_nan=True), name
