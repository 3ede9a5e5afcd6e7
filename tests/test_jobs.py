"""Several runs at a time: the same bits as one after another, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim import api, jobs
from fedsim.config import Experiment
from fedsim.core.errors import ConfigError, RunError
from fedsim.core.events import Event, RoundFinished, RunFinished, RunStarted

ROOT = Path(__file__).parents[1]
TOY: dict[str, Any] = {
    "experiment": {"name": "toy", "rounds": 3, "seeds": [0, 1]},
    "data": {"dataset": "digits", "clients": 4, "central_test_fraction": 0.6},
    "model": "logistic",
    "train": {"max_steps": 2},
    "strategy": [{"name": "scaffold"}, {"name": "fedavg"}],
}
OWN = '''
import os, signal, time
from fedsim.core.errors import ConfigError, RunError
from strategies.fedavg import FedAvg

class Odd(FedAvg):
    """Something happens in the second round of the first seed."""

    def aggregate_train(self, server_round, replies):
        if server_round == 2 and self.setting.seed == 0:
            self.happens()
        return super().aggregate_train(server_round, replies)

class Killed(Odd):
    """Its process is killed."""
    def happens(self): os.kill(os.getpid(), signal.SIGKILL)

class Refused(Odd):
    """It fails as a user's run may."""
    def happens(self): raise RunError("no more of this")

class Impossible(Odd):
    """It cannot be run."""
    def happens(self): raise ConfigError("lr = 1 must be 2")

class Wrong(Odd):
    """It has a bug."""
    def happens(self): print("printed"); raise KeyError("a bug")

class Slow(FedAvg):
    """Takes its time."""
    def aggregate_train(self, server_round, replies):
        time.sleep(0.05)
        return super().aggregate_train(server_round, replies)
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with strategies of a user's own."""
    (tmp_path / "own_for_jobs.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def toy(*names: str, **changes: Any) -> Experiment:
    """The toy, perhaps with strategies of `OWN`."""
    own = {"strategy": [{"name": f"own_for_jobs:{n}"} for n in names]} if names else {}
    return Experiment.model_validate(TOY | own | changes)


def bits(folder: Path) -> dict[str, bytes]:
    """What a comparison leaves, but for clocks, locks and checkpoints, which hold clocks."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
        and p.name not in (".lock", "timings.parquet", "environment.json")
        and "checkpoints" not in p.parts
    }


def test_the_bits_do_not_depend_on_jobs() -> None:
    """With tuning, and with more processes than there are cores."""
    tuned = toy(tune={"seeds": [7], "grid": {"train.lr": [0.1, 0.2]}})
    seen: dict[int, list[Event]] = {1: [], 3: []}
    made = {
        count: api.compare(tuned, out=f"with-{count}", on_event=seen[count].append, jobs=count)
        for count in (1, 3)
    }
    assert bits(Path("with-1")) == bits(Path("with-3"))
    assert [r.metrics for r in made[1].results] == [r.metrics for r in made[3].results]
    for kind in (RunStarted, RoundFinished, RunFinished):
        one, three = (
            sorted((e.run, getattr(e, "round", 0)) for e in seen[n] if isinstance(e, kind))
            for n in (1, 3)
        )
        assert one == three


def test_what_fails_is_alone(capfd: pytest.CaptureFixture[str]) -> None:
    found = api.compare(toy("Killed", "Refused"), out="c", jobs=2)
    assert [(r.label, r.seed) for r in found.results] == [("Killed", 1), ("Refused", 1)]
    assert found.failed == (
        ("Killed", 0, "the process of killed-seed0 ended with signal 9; fedsim resume goes on "
         "with it"),
        ("Refused", 0, "no more of this"),
    )  # fmt: skip


def test_what_nobody_can_run_ends_it() -> None:
    with pytest.raises(ConfigError, match="lr = 1 must be 2"):
        api.compare(toy("Impossible"), out="c", jobs=2)
    with pytest.raises(RuntimeError, match="run wrong-seed0 failed: KeyError: 'a bug'") as bug:
        api.compare(toy("Wrong"), out="d", jobs=2)
    assert "own_for_jobs.py" in str(bug.value.__cause__)
    with pytest.raises(ConfigError, match=r"jobs = 2 needs runtime\.name = 'local'"):
        api.compare(toy(runtime={"name": "ray"}), out="e", jobs=2)
    with pytest.raises(ConfigError, match="jobs = 0 must be 1 or above"):
        api.compare(toy(), out="f", jobs=0)


def compared(out: str) -> subprocess.Popen[str]:
    """`fedsim compare` with two jobs of two long runs."""
    file = Path("long.json")
    file.write_text(toy("Slow", experiment={**TOY["experiment"], "rounds": 24}).model_dump_json())
    program = (
        "import json, sys; from fedsim import api; from fedsim.config import parse\n"
        "api.compare(parse(json.load(open('long.json'))), out=sys.argv[1], jobs=2)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])}
    return subprocess.Popen([sys.executable, "-c", program, out], env=env, text=True)


def until(holds: Callable[[], bool]) -> None:
    """Wait for it, half a minute at most."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers(parent: int) -> list[int]:
    """Processes that the main thread of a process has started."""
    return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def over(pid: int) -> bool:
    """Whether a process is gone, or waits to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left_behind_and_nothing_is_lost(how: signal.Signals) -> None:
    process = compared("killed")
    begun = [Path(f"killed/slow-seed{n}/checkpoints") for n in (0, 1)]
    until(lambda: all(len(list(b.glob("round-*"))) > 1 for b in begun))
    mine = workers(process.pid)
    assert len(mine) == 2
    process.send_signal(how)
    process.wait(30)
    until(lambda: all(map(over, mine)))
    states = [json.loads((b.parent / "status.json").read_text())["state"] for b in begun]
    assert states == ["interrupted"] * 2
    api.resume("killed", jobs=2)
    api.compare(toy("Slow", experiment={**TOY["experiment"], "rounds": 24}), out="whole")
    assert bits(Path("killed")) == bits(Path("whole"))


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "GRACE", 0.2)
    monkeypatch.setattr(jobs, "WORKER", [sys.executable, "-c", "import time; time.sleep(60)"])
    start = time.monotonic()
    with jobs.Jobs(2, api.execute) as found:
        found._give([api.Task(toy(), toy().strategy[0], 0, Path("x"))], 0)
        (process,) = found._busy
    assert time.monotonic() - start < 10
    assert process._process.returncode == -signal.SIGKILL


def test_an_error_keeps_its_kind() -> None:
    assert isinstance(jobs._outcome({"failed": "RunError", "text": "x"}), RunError)
