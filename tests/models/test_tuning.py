"""Every way of tuning a language model that the experiments name, on a tiny one, in one harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import fedsim
from fedsim.config import Experiment, parse
from fedsim.core.rng import isolated
from fedsim.results.tables import read_table

WAYS: dict[str, dict[str, Any]] = {
    "fedkseed": {"name": "fedkseed", "pool": 64, "steps": 3, "lr": 1e-3, "eps": 1e-3},
    "fedkseed_pro": {"name": "fedkseed_pro", "pool": 64, "steps": 3, "lr": 1e-3, "eps": 1e-3},
    "ferret": {"name": "ferret", "bases": 8},
    "FedAvg": {"name": "fedavg"},
    "FedZO": {"name": "fedzo", "train": {"lr": 1e-3}},
    "FedIT": {"name": "fedavg", "model": {"peft": "lora", "rank": 2}},
    "FedPrompt": {"name": "fedavg", "model": {"peft": "prompt", "tokens": 4}},
    "FedPTuning": {"name": "fedavg", "model": {"peft": "p_tuning", "tokens": 4}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    with isolated(0):
        LlamaForCausalLM(config).save_pretrained(folder)
    dataset = {"name": "instruction_tasks", "tasks": 5, "examples": 6, "heldout_tasks": 2}
    return parse(
        {
            "experiment": {"name": "ways", "seeds": [0], "rounds": 2},
            "data": {"dataset": dataset, "partition": "natural"},
            "model": {"name": "hf_causal_lm", "path": str(folder)},
            "train": {"max_steps": 2, "batch_size": 2, "lr": 0.05},
            "evaluate": {"metric": "loss", "clients": False, "answers": 2, "answer_tokens": 3},
            "strategy": [{**entry, "label": label} for label, entry in WAYS.items()],
        }
    )


@pytest.mark.parametrize("label", WAYS)
def test_a_way_of_tuning_runs_and_changes_the_model(
    label: str, study: Experiment, tmp_path: Path
) -> None:
    fedsim.run(study, strategy=label, out=tmp_path)
    rows = read_table(tmp_path / "rounds.parquet").to_pylist()
    assert [r["refused"] for r in rows] == [0, 0, 0]
    assert rows[0]["loss"] != rows[2]["loss"]  # round 0 is zero-shot
    assert {"rouge_l", "exact_match", "perplexity"} <= set(rows[0])
    sent = rows[2]["bytes_up"] + rows[2]["bytes_down"]
    assert sent < 40_000 if label.startswith(("fedkseed", "ferret")) else sent > 0


def test_many_clients_leave_the_initial_model_alone(study: Experiment) -> None:
    """One copy for all, by hash: whoever worked on it, the initial model comes back."""
    import hashlib

    from tests.contract import toy

    def digest(flat: Any) -> str:
        return hashlib.sha256(flat.numpy().tobytes()).hexdigest()

    from fedsim.client_app import ProgramApp
    from fedsim.federation import Federation
    from fedsim.runner import build_strategy
    from fedsim.runtime.grid import LocalGrid
    from fedsim.runtime.work import Environment

    entry = study.strategy[0]
    env = Environment.of(study, 0, entry)
    before = digest(env.model.initial().flat)
    grid = LocalGrid(ProgramApp(env), env.data.num_clients)
    fed = Federation(study, entry, build_strategy(entry), 0, grid, env)
    toy.run(fed, 2)
    resident = env.model.resident
    owned = {p.untyped_storage().data_ptr() for p in env.model.module.parameters()}
    assert owned == {resident.flat.untyped_storage().data_ptr()}
    resident.restore(b"initial", lambda flat, held: None)
    assert digest(resident.flat) == digest(env.model.initial().flat) == before
