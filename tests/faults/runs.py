"""The experiment that is killed, starved and damaged, and what must be the same in the end."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fedsim.config import Experiment
from fedsim.core.packing import pack
from fedsim.journal import Journal

FILES = ("model.safetensors", "rounds.parquet", "clients.parquet", "status.json", "config.json")


def experiment(strategy: dict[str, Any], **sections: Any) -> Experiment:
    """Four rounds on a few real images."""
    return Experiment.model_validate(
        {
            "experiment": {"name": "kill", "rounds": 4, "seeds": [3]},
            "data": {"dataset": "digits", "clients": 9, "central_test_fraction": 0.6},
            "model": "logistic",
            "cohort": {"size": 7},
            "train": {"max_steps": 3},
            "evaluate": {"clients_every": 2},
            "strategy": [strategy],
            **sections,
        }
    )


def digest(folder: Path) -> str:
    """Of all that must be the same: metrics, models, and the state in the last checkpoint."""
    total = hashlib.sha256()
    for path in sorted([*(folder / n for n in FILES), *folder.glob("models/*")]):
        if path.exists():
            total.update(path.name.encode() + path.read_bytes())
    snapshot = Journal(folder / "checkpoints").load()
    assert snapshot is not None
    total.update(pack([snapshot.server, snapshot.strategy, snapshot.clients]))
    return total.hexdigest()
