"""Instruction data: real formats on small files, prompts, targets, tasks made by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.config import DataConfig
from fedsim.core.errors import DataError
from fedsim.core.rng import stream
from fedsim.data import instructions, load
from fedsim.data.instructions import END, Characters, Sample
from fedsim.data.raw import IGNORE, RawData
from fedsim.data.tasks import TASKS


def answers(raw: RawData) -> list[str]:
    vocabulary = str(raw.meta["vocab"])
    return ["".join(vocabulary[t] for t in y[y != IGNORE]) for y in raw.fields["y"]]


def test_only_the_answer_counts() -> None:
    sample = Sample("a", "Say it.", "now", "yes")
    raw = instructions.encode("t", [sample], "characters", 100, "plain")
    assert answers(raw) == ["yes" + END]
    (x,) = raw.fields["x"]
    vocabulary = str(raw.meta["vocab"])
    text = "".join(vocabulary[t] for t in x)
    assert text.startswith("Say it.\nnow\n= yes" + END)
    first = int(np.flatnonzero(raw.fields["y"][0] != IGNORE)[0])
    assert text[: first + 1] == sample.prompt("plain")


def test_what_does_not_fit_is_cut_or_dropped_and_counted() -> None:
    samples = [
        Sample("a", "x" * 5, "", "long answer"),
        Sample("a", "x" * 50, "", "never seen"),
        Sample("a", "x", "", ""),
    ]
    raw = instructions.encode("t", samples, "characters", 12, "plain")
    assert raw.meta["dropped"] == 2
    assert answers(raw) == ["long "]
    with pytest.raises(DataError, match="no sample has an answer"):
        instructions.encode("t", samples[1:], "characters", 12, "plain")


def test_prompts() -> None:
    full, short = Sample("", "Do.", "it", "").prompt(), Sample("", "Do.", "", "").prompt()
    assert "### Instruction:\nDo.\n\n### Input:\nit\n\n### Response:" in full
    assert "Input" not in short
    assert short.endswith("### Instruction:\nDo.\n\n### Response:")
    with pytest.raises(DataError, match="template"):
        Sample("", "", "", "").prompt("other")


def test_characters() -> None:
    tokens = Characters(["abc", "cd"])
    assert tokens.decode(tokens.encode("bad")) == "bad"
    assert tokens.encode("z") == [0]
    assert tokens.vocabulary[tokens.end] == END


def natural(folder: Path) -> Path:
    """A folder in the format of Natural Instructions v2."""
    (folder / "tasks").mkdir()
    (folder / "splits" / "default").mkdir(parents=True)
    counts = {"task001_a": 30, "task002_b": 25, "task003_small": 5, "task004_test": 24}
    for name, count in counts.items():
        instances = [
            {"id": f"{name}-{i}", "input": f"in {i}", "output": [f"out {i}", "other"]}
            for i in range(count)
        ]
        instances.append({"id": "long", "input": "x" * 1024, "output": ["never"]})
        task = {
            "Contributors": ["nobody"],
            "Definition": [f"Define {name}."],
            "Positive Examples": [{"input": "", "output": "", "explanation": ""}],
            "Instances": instances,
        }
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(task))
    splits = folder / "splits" / "default"
    (splits / "train_tasks.txt").write_text("task001_a\ntask002_b\ntask003_small\n")
    (splits / "test_tasks.txt").write_text("task004_test\n")
    return folder


def test_natural_instructions(tmp_path: Path) -> None:
    raw = instructions.natural_instructions(str(natural(tmp_path)), length=300)
    assert raw.client_names == ("task001_a", "task002_b")
    assert raw.test is not None
    train = np.setdiff1d(np.arange(len(raw)), raw.test)
    assert raw.clients is not None
    assert np.bincount(raw.clients[train]).tolist() == [6, 5]
    assert len(raw.test) == 20
    assert set(answers(raw)) == {f"out {i}{END}" for i in range(20)}


def test_dolly(tmp_path: Path) -> None:
    categories = ("open_qa", "closed_qa", "summarization")
    rows = [
        {"instruction": f"Ask {i}", "context": "c" * (i % 2), "response": f"r{i}",
         "category": categories[i % 3]}
        for i in range(60)
    ]  # fmt: skip
    file = tmp_path / "databricks-dolly-15k.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    raw = instructions.dolly(str(file), length=300)
    assert raw.test is not None
    assert [answers(raw)[i] for i in raw.test[:2]] == ["r2" + END, "r5" + END]
    assert len(raw.test) == 20
    config: dict[str, Any] = {
        "dataset": {"name": "dolly", "path": str(file), "length": 300},
        "partition": {"name": "dirichlet", "alpha": 5.0, "partition_by": "group"},
        "clients": 3,
    }
    data = load(DataConfig.model_validate(config), 0)
    assert data.num_clients == 3
    assert len(data.central_test) == 20
    held = data.fields["group"][data.central_test].unique()
    assert len(held) == 1


@pytest.mark.parametrize("lines", [True, False])
def test_alpaca(lines: bool, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi.", "output": "Ho"},
    ]
    file = tmp_path / "data.json"
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    raw = instructions.alpaca(str(file), length=300)
    assert answers(raw) == ["3" + END, "Ho" + END]
    assert raw.clients is None


@pytest.mark.parametrize("content", ["{", "[1]", '{"instruction": "x"}', '[{"output": 3}]'])
def test_damaged_files_are_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"data\.json"):
        instructions.alpaca(str(file))
    with pytest.raises(DataError, match=r"nowhere\.json"):
        instructions.alpaca(str(tmp_path / "nowhere.json"))


def test_tasks_are_tasks() -> None:
    assert len(TASKS) >= 40
    assert len({t.definition for t in TASKS.values()}) == len(TASKS)
    for name, task in TASKS.items():
        draw = stream(0, 0, 0, name)
        drawn = [task.draw(draw) for _ in range(50)]
        assert all(given and answer for given, answer in drawn), name
        by_input: dict[str, str] = {}
        for given, answer in drawn:
            assert by_input.setdefault(given, answer) == answer or name == "odd_one_out"
    examples = {"reverse": ("apple", "elppa"), "roman": ("14", "XIV"), "capital": ("Peru", "Lima")}
    for name, (given, answer) in examples.items():
        draw = stream(1, 0, 0, name)
        found = dict(TASKS[name].draw(draw) for _ in range(400))
        assert found[given] == answer


def test_held_out_tasks_are_the_central_test() -> None:
    config = {
        "dataset": {"name": "instruction_tasks", "tasks": 8, "examples": 10, "heldout_tasks": 3},
        "partition": "natural",
    }
    data = load(DataConfig.model_validate(config), 3)
    assert data.num_clients == 5
    assert len(data.central_test) == 30
    group = data.fields["group"]
    trained = set(group[data.train.values].tolist())
    tested = set(group[data.central_test].tolist())
    assert len(trained) == 5
    assert len(tested) == 3
    assert not trained & tested
    again = instructions.instruction_tasks(3, tasks=8, examples=10, heldout_tasks=3)
    assert np.array_equal(again.fields["x"], data.fields["x"].numpy())
    with pytest.raises(DataError, match="tasks"):
        instructions.instruction_tasks(0, tasks=99)
