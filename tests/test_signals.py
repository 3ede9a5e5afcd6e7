"""Ctrl-C and SIGTERM in the middle of a run: it ends, and nothing that was finished is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import ROOT, fedsim
from tests.test_cli import folder as folder  # a fixture, for every test here too


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_a_library_swallows_ends_the_run_after_the_round(
    folder: Path, name: str, code: int
) -> None:
    """As an import in mid-run may; see `scripts/deploy`, which does nothing before its imports."""
    module = f"deaf_to_{name.lower()}"
    (folder / f"{module}.py").write_text(
        "import os, signal\n"
        "from strategies.fedavg import FedAvg\n"
        "class Deaf(FedAvg):\n"
        "    '''Loses a signal.'''\n"
        "    def configure_train(self, *given):\n"
        "        try:\n"
        f"            os.kill(os.getpid(), signal.{name})\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
        "        return super().configure_train(*given)\n"
    )
    change = ("--set", f"strategy.0.name={module}:Deaf", "--strategy", "Deaf", "--quiet")
    result = fedsim("run", "study.toml", "--out", "r", *change)
    assert result.exit_code == code, result.output
    status = json.loads(Path("r/status.json").read_text())
    assert (status["state"], status["round"]) == ("interrupted", 1)


def test_ctrl_c_in_mid_run_loses_nothing() -> None:
    """A real process, a real signal; what was finished is found again by `resume`."""
    command = [sys.executable, "-m", "fedsim"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    long = [*command, "run", "study.toml", "--out", "r", "--set", "experiment.rounds=300", "--json"]
    process = subprocess.Popen(
        long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout
    for line in process.stdout:
        if json.loads(line).get("round") == 2:
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "fedsim: interrupted; finished rounds are on disk; go on with: fedsim resume r\n"
    status = json.loads(Path("r/status.json").read_text())
    assert status["state"] == "interrupted"
    assert 2 <= status["round"] < 300
