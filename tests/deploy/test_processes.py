"""No process outlives the program that started it; a device comes back whenever it ends."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from fedsim.core.errors import ConfigError, RunError
from fedsim.deploy import device, fleet
from fedsim.deploy.device import Device
from fedsim.deploy.keys import device_key
from fedsim.deploy.processes import Group
from tests.deploy.support import alive, attentive, until

ROOT = Path(__file__).parents[2]

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:  # a grandchild, in a session of its own, that nobody waits for
    subprocess.Popen([sys.executable, __file__], start_new_session=True)
time.sleep(600)
"""


def stage(tmp_path: Path, ending: str) -> subprocess.Popen[bytes]:
    """A program that starts stubborn children, then ends in some way."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    main = tmp_path / "main.py"
    main.write_text(
        dedent(f"""
        import signal, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from fedsim.deploy.processes import Group
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        with Group(Path({str(tmp_path / "logs")!r})) as group:
            for name in "ab":
                group.start(name, [sys.executable, {str(tmp_path / "stubborn.py")!r}, "child"])
            print("up", flush=True)
            {ending}
        """)
    )
    process = subprocess.Popen(
        [sys.executable, str(main)], stdout=subprocess.PIPE, preexec_fn=attentive
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert until(lambda: len(alive(str(tmp_path / "stubborn.py"))) == 4)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_orphans(number: int, tmp_path: Path) -> None:
    process = stage(tmp_path, "time.sleep(600)")
    process.send_signal(number)
    process.wait(timeout=15)
    assert until(lambda: not alive(str(tmp_path)), 8.0)


def test_no_orphans_after_an_error(tmp_path: Path) -> None:
    process = stage(tmp_path, "time.sleep(0.5); raise RuntimeError")
    process.wait(timeout=15)
    assert until(lambda: not alive(str(tmp_path)), 8.0)


def test_planted_orphans_are_found(tmp_path: Path) -> None:
    """Without the guard, a killed parent leaves all of them."""
    process = stage(tmp_path, "group._guard.kill(); time.sleep(600)")
    time.sleep(0.3)
    process.kill()
    process.wait(timeout=15)
    left = alive(str(tmp_path / "stubborn.py"))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(left) == 4


def test_a_group_says_who_ended(tmp_path: Path) -> None:
    with Group(tmp_path) as group:
        group.start("brief", [sys.executable, "-c", "print('no such file'); raise SystemExit(7)"])
        with pytest.raises(RunError, match="brief ended with exit code 7: no such file"):
            group.until(lambda: False, "waiting", 20)
    with Group(tmp_path) as group, pytest.raises(RunError, match="waiting took more than"):
        group.until(lambda: False, "waiting", 0.3)


# ------------------------------------------------------------------------------------- devices

NODE = """#!{python}
import os, sys, time
from pathlib import Path
with Path({starts!r}).open("a") as file:
    file.write(f"{{os.getpid()}}\\n")
print("INFO : SuperNode ID: 1234567", flush=True)
time.sleep({seconds})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device whose SuperNode is a script; nothing answers at the fleet's door."""
    place = tmp_path / "device"
    Device("127.0.0.1:1", str(tmp_path / "ca.crt"), 3, 8, 9999).save(place)
    device_key(place / "key")
    node = tmp_path / "flower-supernode"
    node.write_text(
        NODE.format(python=sys.executable, starts=str(tmp_path / "starts"), seconds=600)
    )
    node.chmod(0o755)
    monkeypatch.setenv("FEDSIM_SUPERNODE", str(node))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield place  # type: ignore[misc]
    device.stop(place)


def starts(folder: Path) -> list[int]:
    file = folder.parent / "starts"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_start_status_stop(folder: Path) -> None:
    pid = device.start(folder)
    assert until(lambda: device.status(folder)["state"] == "running")
    assert device.status(folder)["supervisor"] == pid
    with pytest.raises(RunError, match="is running already"):
        device.start(folder)
    assert until(lambda: len(starts(folder)) == 1)
    assert device.stop(folder)
    assert device.status(folder)["state"] == "stopped"
    assert not device.stop(folder)
    assert not Path(f"/proc/{starts(folder)[0]}").exists()


def test_a_killed_node_is_started_again(folder: Path) -> None:
    device.start(folder)
    assert until(lambda: len(starts(folder)) == 1)
    os.kill(starts(folder)[0], signal.SIGKILL)
    assert until(lambda: len(starts(folder)) == 2, 10)
    assert until(lambda: device.status(folder)["restarts"] == 1)


def test_a_killed_supervisor_leaves_nothing(folder: Path) -> None:
    pid = device.start(folder)
    assert until(lambda: len(starts(folder)) == 1)
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: not Path(f"/proc/{starts(folder)[0]}").exists(), 10)
    assert until(lambda: device.status(folder)["state"] == "killed")
    device.start(folder)  # the next one is not in its way
    assert until(lambda: len(starts(folder)) == 2)


def test_a_full_disk_is_waited_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No log can be opened for a while: the supervisor stays, and tries again."""
    start, failures = Group.start, iter([OSError(28, "No space left on device")] * 2)

    def failing(self: Group, *args: Any, **kwargs: Any) -> Any:
        error = next(failures, None)
        if error is not None:
            raise error
        return start(self, *args, **kwargs)

    monkeypatch.setattr(Group, "start", failing)
    monkeypatch.setattr(device, "FIRST_PAUSE", 0.01)
    made = device.Supervisor(folder)
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        assert until(lambda: len(starts(folder)) == 1)
    finally:
        made.stop()
        thread.join()
    log = (folder / "supervisor.log").read_text().splitlines()
    said = [(line["state"], line.get("code")) for line in map(json.loads, log)]
    assert said[:2] == [("restarting", "No space left on device")] * 2
    assert [state for state, _ in said[2:]] == ["running", "stopped"]


def test_what_was_half_unpacked_is_unpacked_again(folder: Path) -> None:
    """Flower takes a folder of an app for a whole one, however its unpacking ended."""
    half = folder / "flwr" / "apps" / "fedsim.fedsim-flower.0.1.0.01234567"
    half.mkdir(parents=True)
    (folder / "supernode.log").write_bytes(b"x" * (device.LONGEST_LOG + 1))
    device.start(folder)
    assert until(lambda: len(starts(folder)) == 1)
    assert not half.exists()
    assert (folder / "supernode.log.1").stat().st_size == device.LONGEST_LOG + 1


REFUSED = """INFO :      Starting Flower SuperNode
INFO :      SuperNode ID: 7
INFO :      Starting Flower SuperNode
ERROR :     Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: 2004] Failed to activate SuperNode.

For more information, visit: <https://flower.ai/docs>
"""


def test_status_says_what_is_wrong(folder: Path) -> None:
    lines = [{"state": "running", "restarts": 0}, {"state": "restarting", "restarts": 3}]
    (folder / "supervisor.log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "supernode.log").write_text(REFUSED)
    assert device.status(folder)["state"] == "killed"
    with (folder / "supervisor.pid").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("42")
        lock.flush()
        found = device.status(folder)
    assert (found["state"], found["supervisor"], found["connected"]) == ("restarting", 42, False)
    assert found["problem"] == (
        "305 Failed to initialize the connection to the SuperLink. "
        "[code: 2004] Failed to activate SuperNode."
    )


def test_what_a_node_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIM_SUPERNODE")
    made = device.Supervisor(folder)
    assert made._command(7)[1:] == ["-m", "fedsim.deploy.node", str(folder), "7"]
    assert made._command(None)[1:] == ["-m", "fedsim.deploy.node", str(folder)]
    given = Device.load(folder).arguments(folder)
    config = given[given.index("--node-config") + 1]
    assert config == f'partition-id=3 state-dir="{folder / "state"}" num-partitions=8'
    assert "--insecure" not in given


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no device"):
        device.status(tmp_path)
    (tmp_path / "device.json").write_text(json.dumps({"superlink": "x", "surprise": 1}))
    with pytest.raises(ConfigError, match="is no device"):
        device.start(tmp_path)


def test_private_parts_of_flower_are_where_they_were() -> None:
    """`fedsim.deploy.fleet` stands on these; a new Flower that moves one fails here."""
    assert device.node_id_in("INFO :      SuperNode ID: 42\nSuperNode ID: 43") == 43
    assert device.node_id_in("nothing") is None
    from flwr.supernode import start_client_internal

    source = Path(start_client_internal.__file__).read_text()
    assert '"SuperNode ID: %s"' in source
    assert fleet.DeactivateNodeRequest(node_id=1).node_id == 1
    assert callable(fleet.FleetHttpClient.from_server_address)
    assert callable(fleet.flower_supernode)
