"""`scripts/deploy` says what is wrong in one line, before it starts anything."""

from __future__ import annotations

import fcntl
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsim import api, launch
from fedsim.core.errors import ConfigError, RunError
from fedsim.deploy import session
from fedsim.deploy.cli import _device
from fedsim.deploy.keys import device_key
from fedsim.deploy.loopback import Deployment
from fedsim.deploy.main import main
from tests.deploy.support import ROOT, attentive, task_of, toy, until


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {n: signal.getsignal(n) for n in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def says(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--nodes", "x"], 2, "'x' is not a number from 0 to 256"),
        (["--nodes", "-1"], 2, "'-1' is not a number"),
        (["--nodes", "0"], 2, "--nodes 0 without --keys"),
        (["--listen", "8443"], 2, "'8443' is not HOST:PORT"),
        (["--frobnicate"], 2, "unrecognized arguments: --frobnicate"),
        (["--keys", "/nowhere"], 2, "--keys = /nowhere is no folder"),
        (["nowhere.toml"], 2, "nowhere.toml: (file): there is no such file"),
        (["--strategy", "fedavh"], 2, "strategy 'fedavh' is not in the file"),
        (["--set", "train.lr=-1"], 2, "train.lr = -1: must be > 0"),
        (["--listen", "203.0.113.1:80"], 4, "--listen = 203.0.113.1:80 cannot be used"),
    ],
)
def test_mistakes(arguments: list[str], code: int, text: str, tmp_path: Path, capsys: Any) -> None:
    given = [*arguments, "--folder", str(tmp_path / "d")]
    found, said = says(capsys, *given)
    assert found == code
    assert text in said
    assert "Traceback" not in said
    assert not (tmp_path / "d" / "logs").exists()


def test_a_port_in_use(tmp_path: Path, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        door = f"127.0.0.1:{other.getsockname()[1]}"
        code, said = says(capsys, "--listen", door, "--folder", str(tmp_path / "d"))
    assert code == 4
    assert said == f"scripts/deploy: --listen = {door} cannot be used: Address already in use\n"


def test_a_folder_in_use(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PATIENCE", 0.1)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = says(capsys, "--folder", str(tmp_path))
    assert code == 4
    assert "another deployment runs in" in said


def test_a_folder_that_holds_another_run(tmp_path: Path, capsys: Any) -> None:
    api.execute(task_of(toy("experiment.rounds=1"), tmp_path / "run"))
    code, said = says(capsys, "--folder", str(tmp_path))
    assert code == 4
    assert "holds another run" in said
    assert not (tmp_path / "logs").exists()


def test_what_is_finished_is_not_run_again(tmp_path: Path, capsys: Any) -> None:
    api.execute(task_of(toy(), tmp_path / "run", "fedavg"))
    with pytest.raises(SystemExit) as ended:
        main(["--folder", str(tmp_path)])
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("is finished already; nothing to do\nthe run is in")
    assert not (tmp_path / "logs").exists()


def test_runs_stay_where_their_clients_are(tmp_path: Path, monkeypatch: Any) -> None:
    """Half a run in one process and half on devices would lose what clients keep."""
    task = task_of(toy(), tmp_path)
    monkeypatch.setattr(launch, "on_nodes", lambda path: True)
    with pytest.raises(RunError, match="ran on nodes of their own"):
        launch.start(task, resume=True)
    monkeypatch.setattr(launch, "on_nodes", lambda path: False)
    with pytest.raises(RunError, match="ran in one process"):
        launch.serve(task, SimpleNamespace(), resume=True)  # type: ignore[arg-type]


class Endless:
    """A deployment whose server's program is killed at once, every time."""

    def __init__(self, folder: Path, reason: str | None = None) -> None:
        self.group, self.reason, self.starts = SimpleNamespace(logs=folder), reason, 0

    def run(self, config: Any, out: Path) -> str | None:
        self.starts += 1
        return self.reason


def test_a_server_that_gets_nowhere_is_given_up(tmp_path: Path) -> None:
    task, made = task_of(toy(), tmp_path / "run"), Endless(tmp_path)
    with pytest.raises(RunError, match="ended 3 times without a round finished"):
        session.conduct(made, task)  # type: ignore[arg-type]
    assert made.starts == 3
    made = Endless(tmp_path, "no node serves client 2")
    with pytest.raises(RunError, match="the run failed: no node serves client 2"):
        session.conduct(made, task)  # type: ignore[arg-type]
    assert made.starts == 1


def test_flowers_chatter_is_not_shown(tmp_path: Path, capsys: Any) -> None:
    made = Deployment(tmp_path)
    made.close()
    made.group.logs.mkdir(exist_ok=True)
    (made.group.logs / "x.log").write_text(
        "Using SuperLink: here\nSuccessfully started run 1\n\x1b[92mINFO \x1b[0m:      Start "
        "`flwr-serverapp` process\nround 1/3  3 clients\nfedsim: no node serves client 2\n"
        "\x1b[91mERROR\x1b[0m: ServerApp raised an exception\nTraceback (most recent call last):\n"
        "  File x\nround 2/"
    )
    shown = made._show("x", 0)
    made._show("x", shown)
    assert capsys.readouterr().out == "round 1/3  3 clients\n"


def test_keys_are_checked(tmp_path: Path) -> None:
    made = Deployment(tmp_path / "d")
    made.close()
    device_key(tmp_path / "key")
    with pytest.raises(ConfigError, match="is no public key of a device"):
        made.register([tmp_path / "key"])  # the private half


@pytest.mark.parametrize(
    ("superlink", "authority", "partition", "text"),
    [
        ("fl.example.org", "ca.crt", 0, "is not HOST:PORT"),
        ("https://fl.example.org:8443", "ca.crt", 0, "is not HOST:PORT"),
        ("fl.example.org:8443", "nowhere.crt", 0, "is not there; copy it from the server"),
        ("fl.example.org:8443", None, None, "together, or none of them"),
    ],
)
def test_where_a_device_belongs(
    superlink: str, authority: str | None, partition: int | None, text: str, tmp_path: Path
) -> None:
    (tmp_path / "ca.crt").touch()
    place = None if authority is None else tmp_path / authority
    with pytest.raises(ConfigError, match=text):
        _device(superlink, place, partition, (0, 9094))
    assert _device("[::1]:8443", tmp_path / "ca.crt", 1, (0, 9094)) is not None
    assert _device(None, None, None, (0, 9094)) is None


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def test_ctrl_c_while_libraries_are_imported(tmp_path: Path) -> None:
    for pause in (0.0, 1.0):
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsim.deploy.main", "--folder", str(tmp_path)],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=attentive,
        )  # fmt: skip
        assert until(lambda p=process: catches(p.pid, signal.SIGHUP))
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "interrupted" in said
        assert "Traceback" not in said
