"""Clients whose program raises: their replies say so, the others count, whatever runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedsim import api
from fedsim.config import Experiment
from fedsim.core.events import Event, Notice

OWN = '''
from dataclasses import dataclass
import torch
from clients.fedld import FedLD
from clients.fedper import FedPer
from clients.scaffold import Scaffold

class Odd:
    """Refuses to train on an odd number of examples; all refuse from round 2 on."""
    def step(self, s, batch):
        if s.round > 1 or bool((torch.as_tensor(s.num_examples) % 2 == 1).any()):
            raise ValueError("odd")
        return super().step(s, batch)

@dataclass(frozen=True, kw_only=True)
class Delta(Odd, FedLD):
    """Sends an update."""

@dataclass(frozen=True, kw_only=True)
class Private(Odd, FedPer):
    """Keeps its head."""

@dataclass(frozen=True, kw_only=True)
class Kept(Odd, Scaffold):
    """Keeps a variate and sends another vector."""
'''
STRATEGY = {"Delta": "fedld", "Private": "fedper", "Kept": "scaffold"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with clients of a user's own."""
    (tmp_path / "own_failing.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(kind: str, executor: str, told: list[Event]) -> list[dict[str, Any]]:
    """The clients' rows of two rounds."""
    experiment = Experiment.model_validate(
        {
            "experiment": {"name": "odd", "rounds": 2, "seeds": [0]},
            "data": {"dataset": "digits", "clients": 6},
            "model": {"name": "mlp", "hidden": [4]},
            "train": {"max_steps": 2},
            "cohort": {"quorum": 0.1},
            "runtime": {"executor": executor},
            "strategy": [{"name": STRATEGY[kind], "client": f"own_failing:{kind}"}],
        }
    )
    result = api.run(experiment, out=executor, on_event=told.append)
    rows: list[dict[str, Any]] = pq.read_table(result.path / "clients.parquet").to_pylist()
    return [r for r in rows if r["round"] > 0 and r["status"]]


@pytest.mark.parametrize("kind", STRATEGY)
def test_who_raises_is_left_out(kind: str) -> None:
    told: list[Event] = []
    found = {e: run(kind, e, told) for e in ("serial", "threads", "batched")}
    serial = found["serial"]
    assert {r["status"] for r in serial if r["round"] == 1} == {"ok", "error"}
    assert {r["status"] for r in serial if r["round"] == 2} == {"error"}
    assert all("ValueError: odd" in r["reason"] for r in serial if r["status"] == "error")
    for rows in found.values():
        assert [(r["client"], r["status"]) for r in rows] == [
            (r["client"], r["status"]) for r in serial
        ]
    assert not any("no round counted" in e.text for e in told if isinstance(e, Notice))


def test_a_run_in_which_no_round_counted_says_so() -> None:
    """FedLD on a task without classes: nobody can train."""
    told: list[Event] = []
    experiment = Experiment.model_validate(
        {
            "experiment": {"name": "none", "rounds": 2, "seeds": [0]},
            "data": {"dataset": "synthetic", "clients": 3},
            "model": "logistic",
            "strategy": [{"name": "fedld_official"}],
        }
    )
    api.run(experiment, out="none", on_event=told.append)
    assert [e.text for e in told if isinstance(e, Notice)][-1] == (
        "no round counted: error_reply: client 0, round 1, train.fedld: margin control needs "
        "classes; the task's loss is mse (6 of 6 replies); the model is the one it started from"
    )
