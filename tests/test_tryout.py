"""Train two adapters, merge them, judge and ask the result: the commands that the README shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.models.adapters import CONFIG, WEIGHTS, read_adapter
from fedsim.results.tables import read_table

BASE = """
[experiment]
name = "tiny"
seeds = [0]
rounds = 2

[data]
dataset = { name = "instruction_tasks", examples = 12, length = 64, only = ["capital"] }
partition = "iid"
clients = 2
test_fraction = 0.25

[model]
name = "lora"
base = "char_gpt"
base_params = { width = 8, layers = 1, heads = 2 }
rank = 2
delta = true

[cohort]
size = 2

[train]
lr = 0.5

[[strategy]]
name = "fedit"

[[strategy]]
name = "flora"
"""


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, the second one's updates merged into its base."""
    root = tmp_path_factory.mktemp("tryout")
    file = root / "tiny.toml"
    file.write_text(BASE)
    run("run", file, "--out", root / "a", "--quiet")
    run("run", file, "--strategy", "flora", "--set", 'data.dataset.only=["kind"]',
        "--out", root / "b", "--quiet")  # fmt: skip
    run("merge-lora", root / "a", root / "b", "--out", root / "merged")
    return root


def test_a_run_is_judged_as_it_judged_itself(made: Path) -> None:
    for name in "ab":
        row = json.loads(run("evaluate", made / name, "--json"))
        last = read_table(made / name / "rounds.parquet").to_pylist()[-1]
        assert row["data"] == "own data"
        for column in ("loss", "accuracy", "perplexity", "client_loss", "client_accuracy"):
            assert row[column] == pytest.approx(last[column], abs=1e-5), column
        assert run("evaluate", made / name, "--json") == run("evaluate", made / name, "--json")


def test_merged_adapters_are_judged_on_data_of_any_task(made: Path) -> None:
    on = ("--on", made / "tiny.toml")
    lines = run("evaluate", made / "merged", *on, "--on", made / "tiny.toml", "--set",
                'data.dataset.only=["kind", "capital"]', "--answers", "2", "--json")  # fmt: skip
    row = json.loads(lines.splitlines()[0])
    assert {"loss", "client_worst10", "rouge_l", "exact_match"} <= set(row)
    said = run("evaluate", made / "merged", *on)
    assert "loss" in said
    assert "clients" not in said


def test_chat_says_the_same_every_time(made: Path) -> None:
    on = ("--on", made / "tiny.toml")
    ask = ("--prompt", "What is the capital of the country?", "--input", "Peru", "--most", "5")
    assert run("chat", made / "merged", *on, *ask) == run("chat", made / "merged", *on, *ask)
    done = CliRunner().invoke(app, ["chat", str(made / "a")], input="What? | Peru\n\nWhy?\n")
    assert done.exit_code == 0
    assert len(done.output.splitlines()) >= 2
    long = run("chat", made / "a", "--prompt", "x" * 99, code=2)
    assert "tokens; 1 to 63 are possible" in long


def test_what_cannot_be_judged(made: Path, tmp_path: Path) -> None:
    assert "--on FILE says" in run("evaluate", made / "merged", code=2)
    assert "neither a run folder nor an adapter" in run("evaluate", tmp_path, code=4)
    other = run("evaluate", made / "merged", "--on", made / "tiny.toml", "--seed", "7", code=3)
    assert "belongs to base weights with the hash" in other
    copy = shutil.copytree(made / "merged", tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS)
    tensors["base_model.model.head.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, copy / WEIGHTS)
    said = run("evaluate", copy, "--on", made / "tiny.toml", code=3)
    assert "names a weight of the base model" in said


def test_the_adapter_of_a_run_is_a_folder_of_peft(made: Path) -> None:
    config = json.loads((made / "a" / "adapter" / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert set(read_adapter(made / "a").factors) == set(read_adapter(made / "merged").factors)
    assert read_adapter(made / "a").base_hash == read_adapter(made / "b").base_hash


def test_base_weights_of_a_run(made: Path, tmp_path: Path) -> None:
    file = made / "tiny.toml"
    run("run", file, "--set", "model.name=char_gpt", "--set", "strategy.fedit.name=fedavg", code=2)
    whole = tmp_path / "whole.toml"
    text = BASE[: BASE.index("[[strategy]]")].replace('name = "lora"\nbase = "char_gpt"', "")
    text = text.replace("base_params = { width = 8, layers = 1, heads = 2 }",
                        'name = "char_gpt"\nwidth = 8\nlayers = 1\nheads = 2')  # fmt: skip
    text = text.replace("rank = 2\ndelta = true\n", "") + '[[strategy]]\nname = "fedavg"\n'
    whole.write_text(text)
    run("run", whole, "--out", tmp_path / "base", "--quiet")
    start = json.loads(run("evaluate", tmp_path / "base", "--json"))
    set_ = ("--set", f"model.weights={tmp_path / 'base'}")
    run("run", file, *set_, "--out", tmp_path / "c", "--quiet")
    first = read_table(tmp_path / "c" / "rounds.parquet").to_pylist()[0]
    assert first["loss"] == pytest.approx(start["loss"], abs=1e-5)
    refused = run("run", file, "--set", "model.weights=/nowhere", code=2)
    assert "cannot be read" in refused
    wrong = run("run", file, *set_, "--set", "model.base_params.width=16", code=2)
    assert "those of another model" in wrong
