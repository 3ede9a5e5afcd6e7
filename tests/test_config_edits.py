"""From text to tables: TOML files that cannot be read, and overrides."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedsim.config import Named, load_experiment, override, parse
from fedsim.config.edits import parse_override
from fedsim.config.values import dotted, split_key
from fedsim.core.errors import ConfigError

VALID = """
[experiment]
name = "study"
seeds = [0, 1]
[data]
dataset = "digits"
partition = { name = "dirichlet", alpha = 0.3 }
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
"""

# ------------------------------------------------------------------------------- files


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, problem in (("nope.toml", "there is no such file"), (str(tmp_path), "is a folder")):
        with pytest.raises(ConfigError) as caught:
            load_experiment(path)
        assert str(caught.value) == f"{path}: (file): {problem}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = 1\nb = = 2", "line 2, column 5: not valid TOML: Invalid value"),
        ("[a]\n[a]", "line 2, column 3: not valid TOML: Cannot declare ('a',) twice"),
        ("a = 1\na = 2\n", "line 2, column 6: not valid TOML: Cannot overwrite a value"),
        ("a = [1, 2", "end of file: not valid TOML: Unclosed array"),
        ("a = " + "9" * 5000, "(file): not valid TOML: Exceeds the limit"),
        ("a = " + "[" * 5000, "line 1: not valid TOML: nested too deep"),
        ("a = 1\nb = '\udcff'", "line 2, column 6: not valid TOML: the file is no UTF-8 text"),
        ("#" * 2_000_000, "(file): must not be larger than 1000000 bytes"),
    ],
)
def test_syntax_errors_have_line_and_column(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "f.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert str(caught.value).startswith(f"{path}: {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\udcff", "bad\x1b[31m\nname"])
def test_tricky_paths(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------- overrides


def test_overrides() -> None:
    e = parse(
        tomllib.loads(VALID),
        overrides=[
            "train.lr=0.5",
            "cohort.fraction=0.5",
            "data.partition.alpha=1",
            "data.dataset = synthetic",
            "data.dataset.noise = 0.1",
            "experiment.seeds=[4, 5]",
            "experiment.seeds.1=6",
            'strategy."prox, strong".mu=2.5',
            "strategy.0.train.epochs=3",
            "strategy.fedavg.label=plain",
            "evaluate.metric=loss",
        ],
    )
    assert e.train.lr == 0.5
    assert (e.cohort.fraction, e.cohort.size) == (0.5, None)
    assert e.data.partition.params == {"alpha": 1}
    assert e.data.dataset == Named(name="synthetic", params={"noise": 0.1})
    assert e.experiment.seeds == [4, 6]
    assert e.strategy[1].params == {"mu": 2.5}
    assert e.strategy[0].train == {"epochs": 3}
    assert e.strategy[0].label == "plain"
    assert e.evaluate.metric == "loss"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr", "f (--set train.lr): train.lr: must be KEY=VALUE, such as train.lr=0.05"),
        ("=3", "f (--set =3): : must be KEY=VALUE"),
        ("a..b=3", "f (--set a..b=3): a..b: is no dotted key such as train.lr"),
        ("train.lr=[1", "f (--set train.lr=[1): train.lr: the value must be TOML, such as"),
        ("train.lr=", "f (--set train.lr=): train.lr: the value must be TOML"),
        ("train.lr=abc", 'f (--set train.lr=abc): train.lr = "abc": must be a number'),
        ("train.lrr=1", "f (--set train.lrr=1): train.lrr = 1: unknown key; did you mean lr?"),
        (
            "train.lr.x=1",
            "f (--set train.lr.x=1): train.lr = 0.05: is no table, nothing can be set",
        ),
        (
            "strategy.fedavgg.mu=1",
            "f (--set strategy.fedavgg.mu=1): strategy.fedavgg: there is no such entry; did you "
            "mean fedavg? (allowed: fedavg, prox, strong)",
        ),
        ("experiment.seeds.9=1", "f (--set experiment.seeds.9=1): experiment.seeds.9: there is no"),
        ("train.lr=1\nb=2", "f (--set train.lr=1\\nb=2): train.lr: the value must be TOML"),
    ],
)
def test_bad_override(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tomllib.loads(VALID), "f", [text])
    (fault,) = caught.value.faults
    assert str(fault).startswith(message)


def test_faults_of_file_and_overrides_come_together() -> None:
    tables = tomllib.loads(VALID.replace("lr = 0.05", "lr = -1"))
    with pytest.raises(ConfigError) as caught:
        parse(tables, "f", ["cohort.size=0", "nope"])
    assert [(f.source, f.key) for f in caught.value.faults] == [
        ("f (--set nope)", "nope"),
        ("f (--set cohort.size=0)", "cohort.size"),
        ("f", "train.lr"),
    ]


def test_override_in_python_keeps_the_original() -> None:
    e = parse(tomllib.loads(VALID))
    other = override(e, {"strategy.fedavg.server_lr": 0.5, "data.partition": "iid"})
    assert other.strategy[0].params == {"server_lr": 0.5}
    assert other.data.partition == Named(name="iid")
    assert e.strategy[0].params == {}
    with pytest.raises(ConfigError, match=r"override: train\.lr = -1: must be > 0"):
        override(e, {"train.lr": -1})
    with pytest.raises(ConfigError, match="there is no such entry"):
        override(e, {"strategy.nope.mu": -1})


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("a.b=1", ("a", "b"), 1),
        ("a=true", ("a",), True),
        ("a='x = y'", ("a",), "x = y"),
        ("a=x=y", ("a",), "x=y"),
        ('a."b.c".d = [1, 2]', ("a", "b.c", "d"), [1, 2]),
        ("a.'b \"c'={x = 1}", ("a", 'b "c'), {"x": 1}),
        ("a=two words", ("a",), "two words"),
    ],
)
def test_syntax_of_overrides(text: str, path: tuple[str, ...], value: object) -> None:
    assert parse_override(text) == (path, value)


@pytest.mark.parametrize("path", [("a",), ("a", "b.c"), ("x", 'say "hi"', "z"), ("ü", "\t")])
def test_dotted_keys_can_be_read_back(path: tuple[str, ...]) -> None:
    assert split_key(dotted(path)) == path
