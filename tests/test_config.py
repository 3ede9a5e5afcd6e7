"""Experiments: what is read, what is refused, and in which words."""

from __future__ import annotations

import copy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fedsim.config import (
    Experiment,
    Named,
    TrainConfig,
    document,
    load_experiment,
    parse,
    schema,
    slug,
)
from fedsim.core.errors import ConfigError, Fault

ROOT = Path(__file__).parent.parent
VALID = """
[experiment]
name = "study"
seeds = [0, 1]
rounds = 5

[data]
dataset = "digits"
partition = { name = "dirichlet", alpha = 0.3 }
clients = 20

[model]
name = "mlp"

[cohort]
size = 5

[train]
lr = 0.05

[[strategy]]
name = "fedavg"

[[strategy]]
name = "fedprox"
label = "prox, strong"
mu = 1
train = { lr = 0.01 }
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write the file `study.toml` into the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("study.toml").write_text(text, encoding="utf-8")
        return "study.toml"

    return write


def faults(tables: dict[str, Any] | str, *overrides: str) -> list[str]:
    """Messages of a document's faults, without the source."""
    tables = tomllib.loads(tables) if isinstance(tables, str) else tables
    try:
        parse(tables, "f", overrides)
    except ConfigError as error:
        return [str(f).removeprefix("f: ") for f in error.faults]
    return []


def changed(**sections: Any) -> dict[str, Any]:
    """The valid document with keys of sections replaced; None removes one."""
    tables = tomllib.loads(VALID)
    for name, section in sections.items():
        if isinstance(section, dict) and isinstance(old := tables.get(name), dict):
            section = {k: v for k, v in (old | section).items() if v is not None}
        tables[name] = section
    return {name: section for name, section in tables.items() if section is not None}


# ------------------------------------------------------------------------------- reading


def test_a_file_is_read_with_defaults(write: Callable[[str], str]) -> None:
    e = load_experiment(write(VALID))
    assert e.data.partition == Named(name="dirichlet", params={"alpha": 0.3})
    assert e.data.dataset == Named(name="digits")
    assert (e.cohort.size, e.cohort.fraction, e.train.lr, e.runtime.name) == (
        5,
        None,
        0.05,
        "local",
    )
    assert [s.label for s in e.strategy] == ["fedavg", "prox, strong"]
    assert e.strategy[1].params == {"mu": 1}
    assert e.training(e.strategy[0]) == TrainConfig(lr=0.05)
    assert e.training(e.strategy[1]) == TrainConfig(lr=0.01)
    assert e.tune is None
    assert e.sweep is None


def test_the_same_experiment_comes_back_from_json_and_from_tables() -> None:
    text = VALID + "tune = { mu = [0, 1] }\n[tune]\nseeds = [7]\ngrid.train.lr = [0.1, 0.2]\n"
    e = parse(tomllib.loads(text))
    assert e.tune is not None
    assert e.tune.grid == {"train.lr": [0.1, 0.2]}
    assert Experiment.model_validate_json(e.model_dump_json()) == e
    assert Experiment.model_validate(e.model_dump(mode="json")) == e
    assert parse(document(e)) == e


def test_an_experiment_cannot_be_changed() -> None:
    e = parse(tomllib.loads(VALID))
    with pytest.raises(ValueError, match="frozen"):
        e.train.lr = 1.0  # type: ignore[misc]


def test_python_may_give_ranges() -> None:
    e = Experiment.model_validate(changed(experiment={"seeds": range(3)}))
    assert e.experiment.seeds == [0, 1, 2]


def test_a_default_label_is_the_name_or_the_class() -> None:
    tables = changed(strategy=[{"name": "fedavg"}, {"name": "strategies.fedprox:FedProx"}])
    assert [s.label for s in parse(tables).strategy] == ["fedavg", "FedProx"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("*.toml")), ids=lambda p: p.name
)
def test_every_study_of_the_repository_is_sound(path: Path) -> None:
    jsonschema.validate(tomllib.loads(path.read_text()), schema())
    load_experiment(path)


def test_reading_a_file_imports_no_torch(write: Callable[[str], str]) -> None:
    path = write(
        VALID.replace('{ name = "dirichlet", alpha = 0.3 }', '"iid"').replace("mu = 1", "")
    )
    program = f"""import sys, fedsim.config
fedsim.config.load_experiment({path!r})
print(sorted({{"torch", "flwr", "numpy"}} & set(sys.modules)))"""
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ------------------------------------------------------------------------------- golden words


def test_wrong_key() -> None:
    assert faults(changed(cohort={"quorom": 0.5})) == [
        "cohort.quorom = 0.5: unknown key; did you mean quorum? "
        "(allowed in [cohort]: fraction, size, quorum, timeout, overselect, patience, min_delta)"
    ]


def test_key_of_another_section() -> None:
    assert faults(changed(train={"seeds": [1]})) == [
        "train.seeds = [1]: unknown key; seeds belongs to [experiment]"
    ]


def test_wrong_type() -> None:
    assert faults(changed(experiment={"rounds": "many"})) == [
        'experiment.rounds = "many": must be a whole number'
    ]


def test_unknown_strategy_names_the_nearest() -> None:
    (message,) = faults(changed(strategy=[{"name": "fedporx"}]))
    assert message.startswith(
        'strategy.fedporx.name = "fedporx": unknown strategy; did you mean fedprox? '
        "(known: fedavg, fedprox, scaffold, "
    )


def test_unknown_parameter_names_the_nearest() -> None:
    assert faults(changed(strategy=[{"name": "fedprox", "muu": 1}])) == [
        "strategy.fedprox.muu = 1: unknown parameter of FedProx; did you mean mu? "
        "(allowed: mu, server_lr, weighted, client, label, model, pooled, train, tune)"
    ]


def test_training_key_among_the_parameters() -> None:
    (message,) = faults(changed(strategy=[{"name": "fedavg", "epochs": 2}]))
    assert "unknown parameter of FedAvg; write it under train, as train.epochs" in message


def test_two_faults_at_once(write: Callable[[str], str]) -> None:
    text = VALID.replace("rounds = 5", "rounds = 0").replace("mu = 1", 'mu = "1"')
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(text))
    assert str(caught.value) == (
        "study.toml: experiment.rounds = 0: must be >= 1\n"
        'study.toml: strategy."prox, strong".mu = "1": must be a number'
    )
    assert caught.value.faults[0] == Fault("study.toml", "experiment.rounds", "must be >= 1", "0")
    assert caught.value.exit_code == 2


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_mlxtend.py").write_text("import mlxtend.no_such_part\n")
    (tmp_path / "needs_other.py").write_text("import some_package.part\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    dataset = 'data.dataset = "needs_mlxtend:load": needs the Python package mlxtend, which is not '
    assert faults(changed(data={"dataset": "needs_mlxtend:load"})) == [
        dataset + "installed: pip install 'fedsim-flower[data]'"
    ]
    (message,) = faults(changed(data={"dataset": "needs_other:load"}))
    assert message.endswith("some_package, which is not installed: pip install some_package")


# ------------------------------------------------------------------------------- every fault


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"lr": 0}}, "train.lr = 0: must be > 0"),
        ({"train": {"lr": float("nan")}}, "train.lr = NaN: must be a finite number"),
        ({"train": {"epochs": True}}, "train.epochs = true: must be a whole number"),
        ({"train": {"epochs": 2**70}}, f"train.epochs = {2**70}: must fit in 64 bits"),
        ({"cohort": {"fraction": 0.5}}, "cohort: give fraction or size, not both"),
        ({"cohort": {"size": 21}}, "cohort.size = 21: must not be above data.clients"),
        ({"experiment": {"seeds": []}}, "experiment.seeds = []: needs at least 1"),
        ({"experiment": {"seeds": [1, -1]}}, "experiment.seeds[1] = -1: must be >= 0"),
        (
            {"experiment": {"seeds": [1, 2, 1]}},
            "experiment.seeds: seeds must be distinct, 1 is there twice",
        ),
        (
            {"experiment": {"name": "../up"}},
            'experiment.name = "../up": is not allowed: Name of the experiment and of its folder: '
            "letters, digits, `.`, `_`, `-`",
        ),
        ({"experiment": {"name": None}}, "experiment.name: is required: Name of the experiment"),
        ({"model": None}, "model: is required: Model by name"),
        ({"model": 3}, "model = 3: must be a name or a table with a name"),
        ({"model": {"name": ""}}, 'model.name = "": must not be empty'),
        ({"strategy": {"name": "fedavg"}}, "strategy = "),
        ({"strategy": []}, "strategy = []: needs at least 1"),
        ({"strategy": [1]}, "strategy[0] = 1: must be a table"),
        (
            {"strategy": [{"name": "fedavg"}, {"name": "fedavg", "label": "FedAvg"}]},
            "strategy: labels must be unique (letter case and punctuation aside), 'FedAvg' and "
            "'fedavg' are not; give one of them another label",
        ),
        (
            {"strategy": [{"name": "fedavg", "label": "--"}]},
            'strategy.--.label = "--": must be printable and hold a letter or a digit',
        ),
        (
            {"strategy": [{"name": "fedavg", "train": {"lr": "x"}}]},
            'strategy.fedavg.train.lr = "x": must be a number',
        ),
        (
            {"strategy": [{"name": "fedprox", "mu": -1}]},
            "strategy.fedprox.mu = -1: must be 0 or above",
        ),
        (
            {"strategy": [{"name": "fedavg", "client": "fedpro"}]},
            'strategy.fedavg.client = "fedpro": unknown client half; did you mean fedprox?',
        ),
        (
            {"runtime": {"executor": "thread"}},
            'runtime.executor = "thread": must be "auto", "serial", "threads" or "batched"; '
            "did you mean threads?",
        ),
        (
            {"runtime": {"device": "gpu"}},
            'runtime.device = "gpu": is not allowed: Torch device: `cpu`, `cuda`, ',
        ),
        (
            {"evaluate": {"central": False, "clients": False}},
            "evaluate: central or clients must be true, or nothing is measured",
        ),
        (
            {"data": {"heldout_clients": 1.5}},
            "data.heldout_clients = 1.5: must be a whole number of",
        ),
        ({"data": {"partition": {"alpha": 1}}}, "data.partition.name: is required: Name of the"),
        (
            {"data": {"partition": {"name": "dirichlet", "alpha": "0.1"}}},
            'data.partition.alpha = "0.1": must be a number or an array',
        ),
        (
            {"data": {"dataset": {"name": "npz"}}},
            "data.dataset.path: is required by npz",
        ),
        (
            {"data": {"dataset": {"name": "digits", "seed": 3}}},
            "data.dataset.seed = 3: unknown parameter of digits (allowed: none)",
        ),
        ({"tune": {"seeds": [1]}}, "tune.seeds = [1]: must not be among experiment.seeds"),
        (
            {"tune": {"seeds": [7], "grid": {"train.lr": [0.1, -1]}}},
            'tune.grid."train.lr"[1] = -1: train.lr: must be > 0',
        ),
        (
            {"tune": {"seeds": [7], "grid": {"data.clients": [3]}}},
            'tune.grid."data.clients": data.clients must be train.KEY, model.KEY or a parameter',
        ),
        (
            {"strategy": [{"name": "fedprox", "tune": {"mu": [1, "x"]}}]},
            'strategy.fedprox.tune.mu[1] = "x": strategy.fedprox.mu: must be a number',
        ),
        (
            {"sweep": {"key": "data.partition.alpha", "values": [1, "x"]}},
            'sweep.values[1] = "x": data.partition.alpha: must be a number or an array',
        ),
        (
            {"sweep": {"key": "train.lrr", "values": [1, 2]}},
            "sweep.values: train.lrr: unknown key; did you mean lr?",
        ),
        (
            {"sweep": {"key": "runtime.workers", "values": [1, 2]}},
            "sweep.values: runtime.workers is no key of cohort, clock, data,",
        ),
        (
            {"trian": {"lr": 1}},
            'trian = {"lr": 1}: unknown key; did you mean train? (allowed at the',
        ),
    ],
)
def test_fault(sections: dict[str, Any], message: str) -> None:
    (found,) = faults(changed(**sections))
    assert found.startswith(message)


def test_single_strategy_table_says_what_to_write() -> None:
    (found,) = faults(changed(strategy={"name": "fedavg"}))
    assert found.endswith("must be an array of tables: write [[strategy]]")


def test_faults_that_others_hide_are_found_as_well() -> None:
    tables = changed(
        experiment={"seeds": ["x"]},
        cohort={"fraction": 0.1, "size": 7, "quorum": "x"},
        train={"lr": -1},
        tune={"seeds": [0]},
        strategy=[{"name": "fedavg"}, {"name": "fedavg"}, {"name": "nope", "train": {"lr": 0}}],
        sweep={"key": "train.epochs", "values": [1, 0]},
    )
    assert [f.split(" = ")[0].split(": ")[0] for f in faults(tables)] == [
        "experiment.seeds[0]",
        "cohort.quorum",
        "train.lr",
        "strategy.nope.train.lr",
        "cohort",
        "strategy",
        "strategy.nope.name",
        "sweep.values[1]",
    ]


def test_a_document_is_not_changed() -> None:
    tables = changed(train={"lr": -1})
    before = copy.deepcopy(tables)
    faults(tables, "data.partition.alpha=2", "strategy.fedavg.server_lr=1")
    assert tables == before


def test_what_is_shown_cannot_drive_a_terminal() -> None:
    (found,) = faults(changed(train={"l\x1b[31mr": "\x9b2J\u202e"}))
    assert found.isprintable()


# ------------------------------------------------------------------------------- the rest


def test_schema_tells_every_key_with_a_description() -> None:
    described = schema()
    jsonschema.Draft202012Validator.check_schema(described)
    jsonschema.validate(tomllib.loads(VALID), described)
    for name, section in described["$defs"].items():
        for key, field in section.get("properties", {}).items():
            assert field.get("description"), f"{name}.{key}"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(train={"lr": 0}), described)


@pytest.mark.parametrize(
    ("label", "name"),
    [("FedAvg", "fedavg"), ("a/../b c", "a-..-b-c"), ("α = 1", "α-1"), ("..", "")],
)
def test_slug(label: str, name: str) -> None:
    assert slug(label) == name
