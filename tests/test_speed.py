"""`fedsim tune`: every executor timed, and the lines to set."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsim import speed
from fedsim.cli import app
from fedsim.config import load_experiment, override
from fedsim.speed import Timing, _best

FILE = """
[experiment]
name = "speed"
seeds = [3]
rounds = 2

[data]
dataset = {name = "synthetic", examples = 120}
clients = 6

[model]
name = "logistic"

[[strategy]]
name = "fedavg"

[[strategy]]
name = "fedzo"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "speed.toml"
    path.write_text(FILE)
    return path


def test_every_executor_is_timed_on_every_number_of_cores(file: Path) -> None:
    seen: list[Timing] = []
    found = speed.measure(load_experiment(file), rounds=1, cores=2, on_timing=seen.append)
    assert tuple(seen) == found.timings
    ran = {(t.strategy, t.executor, t.workers) for t in seen if t.seconds is not None}
    grid = {("serial", 1), ("threads", 1), ("threads", 2), ("batched", 1), ("batched", 2)}
    assert {(e, w) for s, e, w in ran if s == "fedavg"} == grid
    assert all(t.seconds > 0 and t.clients == 6 for t in seen if t.seconds is not None)
    assert sum(t.automatic for t in seen if t.strategy == "fedavg") == 2
    for timing in seen:
        assert timing.seconds is not None or timing.reason
    assert found.seconds > 0


def test_the_command_prints_lines_that_the_file_takes(file: Path) -> None:
    done = CliRunner().invoke(app, ["tune", str(file), "--rounds", "1"])
    assert done.exit_code == 0, done.output
    lines = done.output[done.output.index("[runtime]") :]
    chosen = tomllib.loads(lines)["runtime"]
    changed = override(load_experiment(file), {f"runtime.{k}": v for k, v in chosen.items()})
    assert changed.runtime.executor == chosen["executor"]
    assert not (file.parent / "runs").exists()
    as_json = CliRunner().invoke(app, ["tune", str(file), "--rounds", "1", "--json"])
    content = json.loads(as_json.output)
    assert {"timings", "executor", "workers", "seconds", "lines"} == set(content)
    assert {"strategy", "executor", "workers", "seconds"} <= set(content["timings"][0])


def test_help_tells_it_from_the_section_of_that_name() -> None:
    done = CliRunner().invoke(app, ["tune", "--help"])
    assert "section `tune`" in done.output
    assert "compare" in done.output


def test_the_fastest_is_that_of_all_strategies_together(file: Path) -> None:
    experiment = load_experiment(file)

    def timing(strategy: str, executor: str, seconds: float | None, auto: bool = False) -> Timing:
        workers = 1 if executor == "serial" else 2
        return Timing(strategy, executor, workers, seconds, 6, "", auto)

    both = [
        *(timing("fedavg", "serial", 3.0), timing("fedavg", "threads", 2.0)),
        *(timing("fedavg", "batched", 1.0, True), timing("fedzo", "serial", 1.0)),
        *(timing("fedzo", "threads", 1.5), timing("fedzo", "batched", 5.0, True)),
    ]
    found = _best(experiment, both)
    assert (found.executor, found.workers, found.seconds) == ("threads", 2, 3.5)
    # An executor that cannot run one of them cannot be set; what auto takes for each can.
    mixed = [*both[:3], timing("fedzo", "threads", None), timing("fedzo", "serial", 1.0, True)]
    found = _best(experiment, mixed)
    assert (found.executor, found.seconds) == ("auto", 2.0)
