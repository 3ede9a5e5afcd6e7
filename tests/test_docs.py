"""What the documents show runs as it stands, and what they name exists."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import typer.core

import fedsim
from fedsim.cli import EXIT_CODES, app
from fedsim.config import Experiment
from fedsim.core.program import LocalProgram, LocalState
from fedsim.core.strategy import Strategy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The README's strategy as a module of the user's, in an experiment with FedAvg."""
    code, table = blocks(ROOT / "README.md", "python")[0], blocks(ROOT / "README.md", "toml")[0]
    assert len(code.splitlines()) <= 40
    (tmp_path / "bounded.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bounded", raising=False)
    return {
        "experiment": {"name": "bounded", "seeds": [0], "rounds": 4},
        "data": {"dataset": "digits", "partition": "iid", "clients": 4},
        "model": "logistic",
        "strategy": [*tomllib.loads(table)["strategy"], {"name": "fedavg"}],
    }


def test_readme_strategy_learns_and_resumes_to_the_same_bits(bounded: dict, tmp_path: Path) -> None:
    experiment = Experiment.model_validate(bounded)
    whole = fedsim.run(experiment, strategy="Bounded", out=tmp_path / "whole")
    assert whole.metrics["accuracy"] > 0.8

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if getattr(event, "round", 0) == 2:
            raise Stop

    with pytest.raises(Stop):
        fedsim.run(experiment, strategy="Bounded", out=tmp_path / "cut", on_event=stop)
    fedsim.resume(tmp_path / "cut")
    model = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert model[0] == model[1]


def test_readme_strategy_bounds_the_clients(bounded: dict, tmp_path: Path) -> None:
    """A bound far below the usual move slows it down; a loose one is FedAvg, to rounding."""
    accuracy = {}
    for factor in (1e6, 0.01):
        bounded["strategy"][0]["factor"] = factor
        experiment = Experiment.model_validate(bounded)
        run = fedsim.run(experiment, strategy="Bounded", out=tmp_path / str(factor))
        accuracy[factor] = run.metrics["accuracy"]
    plain = fedsim.run(experiment, strategy="fedavg", out=tmp_path / "plain").metrics["accuracy"]
    assert accuracy[1e6] == pytest.approx(plain, abs=0.01)
    assert accuracy[0.01] < plain - 0.02


def test_toml_examples_are_experiments() -> None:
    examples = [tomllib.loads(b) for page in PAGES for b in blocks(page, "toml")]
    whole = [e for e in examples if "experiment" in e]
    assert whole
    for example in whole:
        Experiment.model_validate(example)


def test_reference_is_up_to_date() -> None:
    reference = runpy.run_path(str(ROOT / "scripts" / "reference.py"))
    assert reference["PAGE"].read_text() == reference["page"](), "run python scripts/reference.py"


def test_named_attributes_exist() -> None:
    """`Class.attribute` in a table of "Writing a strategy" is one; none that matters is missing."""
    page = (ROOT / "docs" / "writing-a-strategy.md").read_text()
    for owner in (Strategy, LocalProgram, LocalState):
        named = set(re.findall(rf"`{owner.__name__}\.(\w+)`", page))
        there = {n for n in {*vars(owner), *owner.__annotations__, *vars(owner())} if n[0] != "_"} \
            if owner is LocalState else {n for n in vars(owner) if n[0] != "_"}  # fmt: skip
        assert named
        assert named <= there


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_scripts_commands_and_options_exist() -> None:
    """Every script, `fedsim` command and option that a document tells to type is there."""
    commands = typer.main.get_command(app).commands
    for page in PAGES:
        for line in re.findall(r"^\$ (.+)$", page.read_text(), re.MULTILINE):
            words = shlex.split(line, comments=True)
            if words[0].startswith("scripts/"):
                assert (ROOT / words[0]).is_file(), f"{page.name}: {line}"
            elif words[0] == "fedsim":
                command = commands[words[1]]
                if isinstance(command, typer.core.TyperGroup):
                    command = command.commands[words[2]]
                there = {o for p in command.params for o in p.opts}
                assert {w for w in words if w.startswith("--")} <= there, f"{page.name}: {line}"


def test_readme_has_the_exit_codes() -> None:
    codes = re.findall(r"^(\d+)", EXIT_CODES, re.MULTILINE)
    assert codes == re.findall(r"^\| (\d+)", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
