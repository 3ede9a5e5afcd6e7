"""What a run of fedspine leaves on its clients can be taken away as smaller models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedsim import config
from fedsim.api import run
from fedsim.core.errors import ConfigError, RunError
from fedsim.models.text import CharGPT
from fedsim.slicing import client_model, client_models, export

TABLES = {
    "experiment": {"name": "prune", "seeds": [0], "rounds": 2},
    "data": {
        "dataset": {"name": "pydoc", "length": 16, "min_characters": 9000},
        "partition": "natural",
    },
    "model": {
        "name": "lora", "base": "char_gpt", "rank": 4, "prunable": True,
        "base_params": {"width": 12, "layers": 3, "heads": 3, "context": 16},
    },
    "cohort": {"size": 3},
    "train": {"max_steps": 4, "batch_size": 4, "lr": 0.1},
    "evaluate": {"clients": False},
    "strategy": [
        {"name": "fedspine", "step": 0.4, "interval": 2, "policy": {"name": "random", "lowest": 2}}
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(config.parse(TABLES, "prune.toml"), out=folder)
    return folder


def test_each_client_has_a_model_of_its_own(finished: Path, tmp_path: Path) -> None:
    rows = export(finished, tmp_path / "out")
    assert len(rows) >= 3
    module, left = client_models(finished)
    assert {row["client"] for row in rows} == set(left)
    for row in rows:
        state = load_file(row["file"])
        assert not any("lora" in n or "gate" in n for n in state)
        facts = json.loads(Path(row["file"]).with_suffix(".json").read_text())
        assert state["blocks.1.contract.weight"].shape == (
            12,
            len(facts["kept"]["blocks.1.channels"]),
        )
        assert sum(t.numel() for t in state.values()) == row["weights"]
    assert len({row["weights"] for row in rows}) > 1
    assert isinstance(module, CharGPT)


def test_the_file_gives_what_the_client_was_judged_by(finished: Path) -> None:
    """The sliced model against the gated one with the client's ranks."""
    module, left = client_models(finished)
    client, facts = next((c, f) for c, f in left.items() if f["pruned"] > 0)
    small = client_model(module, facts)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    for item in module.structures.items:  # type: ignore[union-attr]
        gate = module.get_submodule(item.columns[0]).gate
        gate.zero_()  # type: ignore[operator]
        gate[torch.tensor(facts["kept"][item.name])] = 1.0  # type: ignore[index,operator]
    for name in before:
        if name.endswith("lora_B"):
            module.get_parameter(name).data[:, facts["rank"] :] = 0.0
    x = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(client))
    with torch.no_grad():
        assert torch.allclose(small(x), module(x), atol=1e-5)


def test_wrong_folders_and_clients_are_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="client = 999 did not take part"):
        export(finished, tmp_path / "out", [999])
