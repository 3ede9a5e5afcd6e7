"""Language models in a run: a model for each strategy, and answers that are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedsim
from fedsim.config import Experiment, parse
from fedsim.core.errors import ConfigError, DataError
from fedsim.core.generation import exact_match, rouge_l
from fedsim.results.tables import read_table
from fedsim.runtime.work import Environment


def experiment(strategies: list[dict[str, Any]], **sections: Any) -> Experiment:
    dataset = {"name": "instruction_tasks", "tasks": 6, "examples": 8, "heldout_tasks": 2}
    return parse(
        {
            "experiment": {"name": "t", "seeds": [0], "rounds": 2},
            "data": {"dataset": dataset, "partition": "natural"},
            "model": {"name": "char_gpt", "width": 16, "layers": 1, "heads": 2},
            "train": {"max_steps": 1},
            "evaluate": {"metric": "loss", "clients": False, **sections.pop("evaluate", {})},
            "strategy": strategies,
            **sections,
        }
    )


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(path / "rounds.parquet").to_pylist()
    return found


def test_a_strategy_may_have_a_model_of_its_own(tmp_path: Path) -> None:
    adapted = {"name": "lora", "base": "char_gpt", "rank": 2}
    study = experiment(
        [
            {"name": "fedavg"},
            {"name": "fedavg", "label": "wide", "model": {"width": 32}},
            {"name": "fedavg", "label": "lora", "model": adapted},
        ]
    )
    assert study.modelled(study.strategy[1]).params == {"width": 32, "layers": 1, "heads": 2}
    assert study.modelled(study.strategy[2]).params == {"base": "char_gpt", "rank": 2}
    found = fedsim.compare(study, out=tmp_path)
    assert not found.failed
    bytes_down = [rows(r.path)[1]["bytes_down"] for r in found.results]
    assert bytes_down[1] > 2 * bytes_down[0]
    assert "model.width" in found.markdown.read_text()
    (tmp_path / "wide-seed0" / "model.safetensors").unlink()
    env = Environment.of(study, 0, study.strategy[1])
    assert env.model.layout.num_trainable > 2 * Environment.of(study, 0).model.layout.num_trainable


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"widht": 3}, "strategy.fedavg.model.widht = 3: unknown parameter of char_gpt; did you "),
        ({"name": "char_gpd"}, 'model.name = "char_gpd": unknown model; did you mean char_gpt'),
    ],
)
def test_faults_of_a_strategys_model_are_named(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment([{"name": "fedavg", "model": model}])
    assert message in str(caught.value)


def test_a_models_parameter_can_be_tuned(tmp_path: Path) -> None:
    study = experiment(
        [{"name": "fedavg", "tune": {"model.width": [16, 32]}}],
        tune={"seeds": [9], "rounds": 1},
    )
    assert not fedsim.compare(study, out=tmp_path).failed
    assert (tmp_path / "tune" / "fedavg" / "model.width-32-seed9").is_dir()


def test_answers_are_columns_of_a_run(tmp_path: Path) -> None:
    study = experiment(
        [{"name": "fedavg"}],
        evaluate={"answers": 5, "answer_tokens": 6, "metric": "rouge_l"},
    )
    twice = [fedsim.run(study, out=tmp_path / str(n)) for n in range(2)]
    table = rows(twice[0].path)
    assert [r.get("rouge_l") is not None for r in table] == [True, False, True]
    assert all(0 <= table[i][n] <= 1 for i in (0, 2) for n in ("rouge_l", "exact_match"))
    assert (twice[0].path / "rounds.parquet").read_bytes() == (
        twice[1].path / "rounds.parquet"
    ).read_bytes()


def test_answers_need_instructions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs answers above 0"):
        experiment([{"name": "fedavg"}], evaluate={"metric": "rouge_l"})
    dataset = {"name": "pydoc", "length": 16, "min_characters": 20000}
    study = experiment(
        [{"name": "fedavg"}],
        data={"dataset": dataset, "partition": "natural"},
        evaluate={"answers": 2},
    )
    with pytest.raises(DataError, match="instruction data"):
        fedsim.run(study, out=tmp_path)


def test_a_model_that_has_learnt_the_answers_scores_one() -> None:
    """The whole chain from tokens to scores, on a model that recites."""
    study = experiment([{"name": "fedavg"}])
    env = Environment.of(study, 0)
    from fedsim.core.generation import judge
    from fedsim.data.tokens import read_answers

    decode, end = read_answers(env.data.meta)
    index = torch.from_numpy(env.data.central_test[:4])
    x, y = env.data.fields["x"][index], env.data.fields["y"][index]
    book = {tuple(row.tolist()): row for row in x}

    def reciting(tokens: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(*tokens.shape, env.data.num_outputs)
        for i, row in enumerate(tokens.tolist()):
            known = next(
                k for k in book if list(k[: len(row)]) == row or _starts(list(k), row, end)
            )
            for t in range(len(row)):
                scores[i, t, known[min(t + 1, len(known) - 1)]] = 1.0
        return scores

    assert judge(reciting, x, y, decode, end, 20) == {"rouge_l": 1.0, "exact_match": 1.0}


def _starts(text: list[int], row: list[int], end: int) -> bool:
    """Whether a row is the beginning of a text, but for padding."""
    while row and row[-1] == end:
        row = row[:-1]
    return text[: len(row)] == row


def test_rouge_l_is_that_of_the_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    texts = [
        "the cat sat on the mat",
        "A cat, sitting on a mat!",
        "It's 3.14 -- or 22/7?",
        "naïve café",
        "",
        "one one one two",
        "two one two one",
    ]
    for said in texts:
        for reference in texts:
            found = scorer.score(reference, said)["rougeL"].fmeasure
            assert rouge_l(said, reference) == pytest.approx(found), (said, reference)
    assert exact_match("a", "b") == 0
