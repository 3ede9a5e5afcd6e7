"""Row 12: whatever an experiment file says, it is refused in clear words, or planned and run.

Files are put together from every component there is, with parameters of the right type and odd
values: all of them, or none, of what one might try. `tests/test_config_fuzz.py` damages files in
other ways, and stops once they are read.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from fedsim import api, planning, registry
from fedsim.config import components, load_experiment
from fedsim.core.errors import ConfigError, FedsimError, RunError
from fedsim.runner import Task

SECONDS = 60
"""No file may take longer, on a machine that does other things as well."""
ODD: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 40, -1, 0.0, 1e-9, 0.1, 0.5, 1.0, 2.5, -0.5, 1e6, True, False),
    *("", "mean", "digits", "../x", [], [1], [0.5], [2, 1], [1, 1, 1, 1, 1, 1, 1], [[0], [1]], {}),
)
KEYS: dict[str, tuple[Any, ...]] = {
    "data.clients": (1, 2, 3, 7, 40, 2000),
    "data.test_fraction": (0.0, 0.5, 0.99),
    "data.heldout_clients": (0, 1, 3, 0.5, 40),
    "data.central_test_fraction": (0.0, 0.1, 0.99),
    "data.min_examples": (1, 5, 300),
    "data.public": (0, 1, 20, 5000),
    "data.seed": (0, 2**31),
    "zoo.models": (["logistic", "mlp"], ["mlp"], [{"name": "mlp", "hidden": []}]),
    "zoo.assignment": ([0, 1], [1], [5]),
    "cohort.fraction": (1e-9, 0.5, 1.0),
    "cohort.size": (1, 2, 7, 40),
    "cohort.quorum": (0.0, 0.9, 1.0),
    "cohort.timeout": (1e-9, 1e9),
    "cohort.overselect": (0.5, 10.0),
    "cohort.patience": (1, 3),
    "cohort.min_delta": (0.0, 1e9),
    "train.epochs": (1, 3),
    "train.batch_size": (1, 3, 10**9),
    "train.lr": (1e-30, 5.0, 1e30),
    "train.momentum": (0.5, 0.999),
    "train.weight_decay": (0.5, 1e30),
    "train.lr_decay": (1e-30, 0.5),
    "evaluate.every": (1, 2, 10**7),
    "evaluate.central": (False,),
    "evaluate.clients": (False,),
    "evaluate.clients_every": (1, 2),
    "evaluate.answers": (1, 3),
    "evaluate.answer_tokens": (1, 3),
    "evaluate.metric": ("accuracy", "perplexity", "loss"),
    "evaluate.target": (-1.0, 0.5, 1e30),
    "evaluate.batch_size": (1, 10**9),
    "runtime.executor": ("serial", "threads", "batched"),
    "runtime.workers": (1, 3),
    "runtime.state_budget": (0, 1000),
    "journal.every": (1, 10**7),
    "journal.keep": (1, 10**6),
    "clock.jitter": (0.5, 3.0),
    "clock.time_zones": (1.0, 24.0),
    "clock.deadline": (1e-9, 1e9),
}
"""Keys with values that may stand in a file."""
PLACES = {
    "data.dataset": ("datasets", ("digits", "synthetic", "digits", "instruction_tasks")),
    "data.partition": ("partitioners", ()),
    "model": ("models", ("logistic", "mlp", "cnn", "lora", "offsite", "char_lstm", "char_gpt")),
    "clock.device": ("devices", ()),
    "oracle": ("oracles", ("held",)),
}
"""Components to choose from; none named: all there are. The others need a network, or files."""
BASE = {
    "experiment": {"name": "any", "rounds": 1, "seeds": [0]},
    "data": {"dataset": "digits", "clients": 7, "central_test_fraction": 0.8, "public": 20},
    "model": {"name": "mlp", "hidden": [4]},
    "train": {"max_steps": 2},
}


def some(draw: np.random.Generator, values: Any) -> Any:
    """One of them."""
    return values[int(draw.integers(len(values)))]


def options(schema: Any) -> Iterator[Any]:
    """Words that a parameter's type names."""
    if isinstance(schema, dict):
        yield from schema.get("enum", [])
        for inner in schema.values():
            yield from options(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from options(inner)


def component(draw: np.random.Generator, kind: str, name: str, most: int) -> dict[str, Any]:
    """A component with its required parameters and up to `most` others, of the right type."""
    known, _ = components.parameters(kind, registry.resolve(kind, name))
    needed = [n for n, p in known.items() if p.required]
    others = [n for n in known if n not in needed]
    draw.shuffle(others)
    made: dict[str, Any] = {"name": name}
    for key in [*needed, *others[: int(draw.integers(most + 1))]]:
        adapter = known[key].adapter
        words = [] if adapter is None else list(options(adapter.json_schema()))
        fit = [v for v in (*words, *words, *ODD) if not known[key].judge(v) and v is not None]
        if fit:
            made[key] = some(draw, fit)
    return made


def put(tables: dict[str, Any], path: str, value: Any) -> None:
    """Write a key."""
    *sections, last = path.split(".")
    for section in sections:
        tables = tables.setdefault(section, {})
    tables[last] = value


def document(seed: int) -> dict[str, Any]:
    """A file: small, of the right types, otherwise as odd as they come."""
    draw = np.random.default_rng(seed)
    tables: dict[str, Any] = {n: dict(section) for n, section in BASE.items()}
    for path, (kind, allowed) in PLACES.items():
        if draw.random() < 0.25:
            name = some(draw, allowed or sorted(registry.builtin(kind)))
            put(tables, path, component(draw, kind, name, 2))
    for path in draw.permutation(sorted(KEYS))[: int(draw.integers(5))].tolist():
        put(tables, path, some(draw, KEYS[path]))
    strategies = sorted(registry.builtin("strategies"))
    tables["strategy"] = [component(draw, "strategies", some(draw, strategies), 3)]
    if str(tables["model"]["name"]) == "mlp" and draw.random() < 0.3:  # many need adapters
        tables["model"] = {"name": "lora", "base": "mlp", "rank": 2, "prunable": True}
    return tables


class TooLong(Exception):
    """A file that takes for ever."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TooLong` after so many seconds."""

    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(tables: dict[str, Any], folder: Path) -> tuple[str, str]:
    """How far a file gets, ``"read"``, ``"planned"`` or ``"run"``; and what is wrong with that.

    Refusing it in one line is right, anything else but a finished round is not.
    """
    file = folder / "any.toml"
    file.write_text(tomli_w.dumps(tables))
    reached = "not read"
    try:
        with limited(SECONDS):
            experiment = load_experiment(file, [])
            reached = "read"
            plan = api.plan(experiment)
            if not plan.costs or plan.clients < 1:
                return "planned", f"a plan of nothing: {plan}"
            reached = "planned"
            result = api.execute(
                Task(experiment, experiment.strategy[0], experiment.experiment.seeds[0],
                     folder / "run")
            )  # fmt: skip
            reached = "run"
            if not (result.path / "rounds.parquet").exists():
                return reached, "no table of rounds"
    except FedsimError as error:
        said = str(error)
        if not said or "Error:" in said or "Traceback" in said:
            return reached, f"unclear words: {said}"
        if isinstance(error, ConfigError) and reached == "not read" and not error.faults:
            return reached, f"no fault is named: {said}"
        return f"refused: {reached}", ""
    except Exception as error:
        return reached, f"{type(error).__name__}: {error}"
    return reached, ""


def search(seeds: range, folder: Path) -> tuple[Counter[str], dict[int, str]]:
    """How far files get, and what went wrong, by seed."""
    reached: Counter[str] = Counter()
    wrong: dict[int, str] = {}
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        far, problem = verdict(document(seed), place)
        reached[far] += 1
        if problem:
            wrong[seed] = f"{far}: {problem}"
    return reached, wrong


def test_any_file_is_refused_or_runs(tmp_path: Path) -> None:
    reached, wrong = search(range(30), tmp_path)
    assert not wrong
    assert reached["run"] > 5


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_row_12(part: int, tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """10,000 files in ten parts, through reading, planning and one round."""
    reached, wrong = search(range(1000 * part, 1000 * (part + 1)), tmp_path)
    print(dict(reached), wrong)
    scorecard("12", "files refused in clear words, or planned and run", 1000, len(wrong))
    assert not wrong


def test_planted_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that fails in its own words; a plan of nothing."""

    def broken(experiment: Any) -> Any:
        raise KeyError(experiment.experiment.name)

    monkeypatch.setattr(api, "plan", broken)
    assert verdict(BASE | {"strategy": [{"name": "fedavg"}]}, tmp_path) == (
        "read",
        "KeyError: 'any'",
    )
    monkeypatch.setattr(
        api, "plan", lambda _: planning.Plan("", 0, 0, 0, 0, (0, 0, 0), 0, 0, (), 0)
    )
    assert "a plan of nothing" in verdict(BASE | {"strategy": [{"name": "fedavg"}]}, tmp_path)[1]


def test_a_plan_says_that_no_reply_would_be_let_in(tmp_path: Path) -> None:
    diverging = BASE | {"train": {"max_steps": 2, "lr": 1e30}, "strategy": [{"name": "fedavg"}]}
    (tmp_path / "any.toml").write_text(tomli_w.dumps(diverging))
    with pytest.raises(RunError, match="fedavg: what its clients send back is refused"):
        api.plan(load_experiment(tmp_path / "any.toml", []))


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"train": {"momentum": 0.9}, "strategy": [{"name": "fedzo"}]}, "momentum = 0.9 must be 0"),
        ({"strategy": [{"name": "fedld_official"}]}, "margin control needs classes"),
        ({"strategy": [{"name": "pacfl"}]}, "needs one label for each example"),
        ({"strategy": [{"name": "kafal"}]}, "needs one label for each example"),
    ],
    ids=["fedzo", "fedld", "pacfl", "kafal"],
)
def test_a_plan_says_what_clients_refuse(tables: dict[str, Any], said: str, tmp_path: Path) -> None:
    """In the words of the client half: no class of an exception, no place in our code."""
    regression = (
        BASE | {"data": {"dataset": "synthetic", "clients": 3}, "model": "logistic"} | tables
    )
    (tmp_path / "any.toml").write_text(tomli_w.dumps(regression))
    with pytest.raises(RunError, match="its clients fail") as refused:
        api.plan(load_experiment(tmp_path / "any.toml", []))
    assert said in str(refused.value)
    assert not re.search(r"Error|\.py", str(refused.value))


def test_a_signature_of_a_frozen_layer_is_refused(tmp_path: Path) -> None:
    frozen = BASE | {"model": {"name": "lora", "base": "mlp"}, "strategy": [{"name": "fedclust"}]}
    (tmp_path / "any.toml").write_text(tomli_w.dumps(frozen))
    with pytest.raises(ConfigError, match="signature = last_layer must be another one"):
        api.plan(load_experiment(tmp_path / "any.toml", []))


def test_clients_without_examples_to_judge_by(tmp_path: Path, recwarn: Any) -> None:
    """There is nothing to take a mean of, and no warning of numpy's."""
    tables = BASE | {"strategy": [{"name": "fedavg"}]}
    tables["data"] = {**BASE["data"], "test_fraction": 0.0}  # type: ignore[dict-item]
    assert verdict(tables, tmp_path) == ("run", "")
    assert not [w for w in recwarn if "empty slice" in str(w.message)]
