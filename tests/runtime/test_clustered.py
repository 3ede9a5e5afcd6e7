"""Clusters, and pooled training, under Flower's simulation engine: the bits of the local run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedsim import api, load_experiment

pytest.importorskip("ray")

TOML = """
[experiment]
name = "clustered"
seeds = [2]
rounds = 3
[data]
dataset = "digits"
clients = 6
partition = { name = "planted", groups = 2, kind = "labels" }
[model]
name = "logistic"
[runtime]
executor = "serial"
[[strategy]]
name = "fedap"
warmup_rounds = 1
cut = "k"
signature = "sketch"
personal_epochs = 2
[[strategy]]
name = "fedavg"
label = "centralised"
pooled = 0.5
"""


def digest(folder: Path) -> dict[str, str]:
    """Tables, models and artefacts of a run; not its configuration, its times, its checkpoints."""
    kinds = ("*.safetensors", "models/*", "artefacts/*", "rounds.parquet", "clients.parquet")
    files = sorted(f for kind in kinds for f in folder.glob(kind))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("label", ["fedap", "centralised"])
def test_a_round_of_clustering_has_the_same_bits_as_locally(tmp_path: Path, label: str) -> None:
    file = tmp_path / "e.toml"
    file.write_text(TOML)
    for name in ("local", "ray"):
        experiment = load_experiment(file, [f"runtime.name={name}"])
        api.run(experiment, strategy=label, out=tmp_path / name)
    found = digest(tmp_path / "local")
    assert digest(tmp_path / "ray") == found
    assert ("artefacts/clustering.json" in found) == (label == "fedap")
    assert ("models/cluster-1.safetensors" in found) == (label == "fedap")
