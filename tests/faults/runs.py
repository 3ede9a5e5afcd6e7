"""The experiment that is killed, starved and damaged, and what must be the same in the end."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from torch import nn

from fedsim.config import Experiment
from fedsim.core.oracle import Items
from fedsim.core.packing import pack
from fedsim.data import FederatedData
from fedsim.journal import Journal
from tests.contract.rows import BARE, ROWS, Row

FILES = ("model.safetensors", "rounds.parquet", "clients.parquet", "status.json", "config.json")
MEASURED = ("timings.parquet", "environment.json")
"""Hold seconds and versions: all else in a run folder is a function of the configuration."""
STRATEGIES = list({r.strategy: r for r in [*ROWS, *BARE]}.values())
"""One row for every registered strategy."""
LORA = {"name": "lora", "rank": 2, "alpha": 4.0, "targets": [], "head": False}
MODELS: dict[str, Any] = {
    "softmax": "logistic",
    "mlp": {"name": "mlp", "hidden": [8]},
    "bn": "tests.faults.runs:batch_norm",
    "lora": LORA,
    "lora_delta": {**LORA, "delta": True},
    "prunable": {**LORA, "prunable": True},
}
"""What the contract's toy models are called in an experiment."""


def batch_norm(data: FederatedData) -> nn.Module:
    """A model with statistics that are not trained."""
    size = int(data.fields["x"][0].numel())
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 5), nn.BatchNorm1d(5), nn.ReLU(),
        nn.Linear(5, data.num_outputs),
    )  # fmt: skip


def labels(items: Items) -> dict[int, int]:
    """An oracle that knows them all."""
    return dict(enumerate(items.held.tolist()))


def experiment(strategy: dict[str, Any], **sections: Any) -> Experiment:
    """Four rounds on a few real images."""
    return Experiment.model_validate(
        {
            "experiment": {"name": "kill", "rounds": 4, "seeds": [3]},
            "data": {
                "dataset": "digits",
                "clients": 9,
                "central_test_fraction": 0.6,
                "public": 20,
            },
            "model": "logistic",
            "cohort": {"size": 7},
            "train": {"max_steps": 3},
            "evaluate": {"clients_every": 2},
            "strategy": [strategy],
            **sections,
        }
    )


def entry(row: Row) -> dict[str, Any]:
    """A row of the contract's table as a ``[[strategy]]``."""
    return {"name": row.strategy, "params": dict(row.params), "train": dict(row.train)}


def digest(folder: Path) -> str:
    """Of all that must be the same: metrics, models, and the state in the last checkpoint."""
    assert not (left := [*folder.rglob("*.tmp")]), f"left behind: {left}"
    table = pq.read_table(folder / "clients.parquet", columns=["round", "client"])
    counted = list(zip(*table.to_pydict().values(), strict=True))
    assert len(counted) == len(set(counted)), "a client is counted twice in a round"
    total = hashlib.sha256()
    for path in sorted([*(folder / n for n in FILES), *folder.glob("models/*")]):
        if path.exists():
            total.update(path.name.encode() + path.read_bytes())
    snapshot = Journal(folder / "checkpoints").load()
    assert snapshot is not None
    total.update(pack([snapshot.server, snapshot.strategy, snapshot.clients]))
    return total.hexdigest()


def comparison_digest(folder: Path) -> str:
    """Of every file of a comparison, its runs and its report, but for what was measured."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name not in (*MEASURED, ".lock") and path.parent.name != "checkpoints":
            total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()
