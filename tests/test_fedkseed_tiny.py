"""The experiments on seeds and scalars: the tiny one runs as it is, and says what it should."""

from __future__ import annotations

from pathlib import Path

import fedsim
from fedsim.results.tables import read_table

ROOT = Path(__file__).resolve().parents[1]


def test_the_tiny_experiment_runs_and_ends_in_a_report(tmp_path: Path) -> None:
    experiment = fedsim.load_experiment(
        ROOT / "experiments" / "fedkseed_tiny.toml", ["experiment.seeds=[0]"]
    )
    assert [s.label for s in experiment.strategy] == [
        "fedkseed",
        "fedkseed_pro",
        "ferret",
        "fedavg",
    ]
    comparison = fedsim.compare(experiment, out=tmp_path)
    rows = {
        s.label: read_table(tmp_path / f"{s.label}-seed0" / "rounds.parquet").to_pylist()
        for s in experiment.strategy
    }
    size = {label: sum(r["bytes_up"] + r["bytes_down"] for r in t) for label, t in rows.items()}
    for label, table in rows.items():
        losses = [r["loss"] for r in table if r.get("loss") is not None]
        assert losses[-1] < losses[0] - 0.5, label
        assert all(r["refused"] == 0 for r in table), label
    assert max(size["fedkseed"], size["fedkseed_pro"], size["ferret"]) < size["fedavg"] / 5
    assert not comparison.failed
    assert comparison.html.exists()


def test_the_language_models_experiment_is_sound() -> None:
    experiment = fedsim.load_experiment(ROOT / "experiments" / "llm_quickstart.toml")
    models = {s.label: experiment.modelled(s) for s in experiment.strategy}
    assert list(models) == ["fedkseed", "ferret", "lora"]
    assert models["fedkseed"] == models["ferret"] == experiment.model
    assert models["lora"].params == {**experiment.model.params, "peft": "lora", "rank": 8}
    assert experiment.evaluate.metric == "loss"
