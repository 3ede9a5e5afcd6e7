"""Keeps a device in the federation: Flower's SuperNode, started again whenever it ends.

A device is a folder: `device.json` says where it belongs, `supervisor.log` and `supernode.log` what
happened, `state/` holds what its clients keep between rounds, `key` and `key.pub` who it is, and
`flwr/` the app as the server sent it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsim.core.errors import ConfigError, RunError
from fedsim.deploy.keys import device_key
from fedsim.deploy.processes import Group

HOME = Path("~/.fedsim/devices")
"""Where devices lie if no folder is given."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a SuperNode is started again; doubled while it does not last."""
LASTED = 30.0
"""Seconds after which a SuperNode counts as started well."""
LONGEST_LOG = 8 * 2**20
"""Bytes; a longer log is put aside, as ``NAME.log.1``, when a SuperNode starts."""


@dataclass(frozen=True)
class Device:
    """Where a device belongs.

    Attributes:
        superlink: ``HOST:PORT`` of the fleet's door.
        authority: certificate that vouches for it.
        partition: number of its client.
        partitions: 0: it has that client alone; else it serves partition, partition + partitions,
            and so on.
        port: of the SuperNode's own interface, on the loopback address.
    """

    superlink: str
    authority: str
    partition: int
    partitions: int = 0
    port: int = 9094

    def save(self, folder: Path) -> None:
        """Write `device.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "device.json").write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(folder: Path) -> Device:
        """Read `device.json`. Raises `ConfigError` if the folder is no device."""
        try:
            return Device(**json.loads((folder / "device.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{folder} is no device: {why}; name one with --folder, or start it with "
                "--superlink, --authority and --partition"
            ) from None

    def arguments(self, folder: Path) -> list[str]:
        """What its SuperNode is told on the command line."""
        config = f'partition-id={self.partition} state-dir="{folder / "state"}"'
        if self.partitions:
            config += f" num-partitions={self.partitions}"
        return [
            *("--superlink", self.superlink),
            *("--root-certificates", self.authority),
            *("--auth-supernode-private-key", str(folder / "key")),
            *("--port", str(self.port)),
            *("--node-config", config),
        ]


def place(name: str | None, folder: str | None) -> Path:
    """The folder of a device."""
    return Path(folder).resolve() if folder else (HOME / (name or "device")).expanduser()


# ----------------------------------------------------------------------------- the supervisor


class Supervisor:
    """Runs a device's SuperNode until it is told to stop.

    Args:
        folder: the device.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.device = folder, Device.load(folder)
        self._stop = threading.Event()
        self.restarts = 0

    def stop(self, *_: object) -> None:
        """Ask it to end."""
        self._stop.set()

    def run(self) -> None:
        """Returns when asked to stop; everything it started has ended then."""
        pause = FIRST_PAUSE
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                code: int | str | None = self._until_it_ends()
            except OSError as error:  # a full disk, no memory: nobody is there to start us again
                code = error.strerror or str(error)
            if self._stop.is_set():
                break  # asked to end, a SuperNode tells the server so
            pause = FIRST_PAUSE if time.monotonic() - started > LASTED else pause * 2
            self._note("restarting", code=code)
            self._stop.wait(min(pause, LONGEST_PAUSE))
            self.restarts += 1
        self._note("stopped")

    def _until_it_ends(self) -> int | None:
        """Run the SuperNode once; its exit code, None if it was stopped."""
        before = self._before()
        self._tidy()
        with Group(self.folder) as group:
            node = group.start(
                "supernode",
                self._command(before),
                env={"FLWR_HOME": str(self.folder / "flwr")},
            )
            self._note("running", pid=node.pid)
            while node.poll() is None and not self._stop.wait(0.2):
                pass
            return node.poll()

    def _before(self) -> int | None:
        """The node that was here before, which the SuperLink may believe to be there still."""
        with suppress(OSError):
            return node_id_in((self.folder / "supernode.log").read_text(errors="replace"))
        return None

    def _command(self, before: int | None) -> list[str]:
        """The command line of the SuperNode; ``FEDSIM_SUPERNODE`` names another program."""
        other = os.environ.get("FEDSIM_SUPERNODE")
        if other:
            return [other, *self.device.arguments(self.folder)]
        gone = [] if before is None else [str(before)]
        return [sys.executable, "-m", "fedsim.deploy.node", str(self.folder), *gone]

    def _tidy(self) -> None:
        """Remove apps of earlier runs, and one whose unpacking was cut off; put long logs aside."""
        shutil.rmtree(self.folder / "flwr" / "apps", ignore_errors=True)
        for log in (self.folder / "supernode.log", self.folder / "supervisor.log"):
            if log.exists() and log.stat().st_size > LONGEST_LOG:
                log.replace(log.with_name(log.name + ".1"))

    def _note(self, state: str, **more: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        line = {"time": now, "state": state, "restarts": self.restarts, **more}
        with suppress(OSError), (self.folder / "supervisor.log").open("a") as log:
            log.write(json.dumps(line) + "\n")


def supervise(folder: Path) -> None:
    """Be the supervisor of a device, in this process.

    Raises:
        RunError: it has one already.
    """
    with (folder / "supervisor.pid").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"the device in {folder} is running already") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        supervisor = Supervisor(folder)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, supervisor.stop)
        supervisor.run()


# -------------------------------------------------------------------- start, stop, status


def prepare(folder: Path, device: Device | None = None) -> None:
    """Make the folder of a device ready to start.

    Args:
        folder: the device.
        device: where it belongs; None: as its folder says.

    Raises:
        ConfigError: the folder is no device.
        RunError: it is running already.
    """
    if device is None:
        Device.load(folder)
    if running(folder) is not None:
        raise RunError(f"the device in {folder} is running already; stop it first")
    if device is not None:
        device.save(folder)
    device_key(folder / "key")


def start(folder: Path, device: Device | None = None) -> int:
    """Start the supervisor of a device in the background; its process id.

    Args:
        folder: the device.
        device: where it belongs; None: as its folder says.

    Raises:
        ConfigError: the folder is no device.
        RunError: it is running already, or does not come up.
    """
    prepare(folder, device)
    with (folder / "supervisor.out").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsim.deploy.device", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 30.0
    while running(folder) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"the device does not start; see {folder / 'supervisor.out'}")
        time.sleep(0.1)
    return process.pid


def stop(folder: Path, timeout: float = 15.0) -> bool:
    """Stop the supervisor and its SuperNode; whether there was one.

    Raises:
        RunError: it does not end.
    """
    pid = running(folder)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while running(folder) is not None:
        if time.monotonic() > deadline:
            raise RunError(f"the device in {folder} (process {pid}) does not end")
        time.sleep(0.1)
    return True


def status(folder: Path) -> dict[str, Any]:
    """What is known of a device: `state`, `pid`, `restarts`, `time` of the last change, ...

    `connected` says whether the server has let the SuperNode in since it was started last,
    `problem` what it said at its end if it had to end.

    Raises:
        ConfigError: the folder is no device.
    """
    device = Device.load(folder)
    try:
        last = json.loads((folder / "supervisor.log").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        last = {"state": "never started", "restarts": 0}
    pid = running(folder)
    if pid is None and last["state"] in ("running", "restarting"):
        last["state"] = "killed"
    said = _last_words(folder / "supernode.log")
    more: dict[str, Any] = {"connected": last["state"] == "running" and _JOINED in said}
    if last["state"] == "restarting" and (found := _ENDED.search(said)):
        more["problem"] = " ".join(found[1].split())
    public = str(folder / "key.pub")
    return {**last, **more, "supervisor": pid, "superlink": device.superlink, "public_key": public}


_JOINED, _BEGUN = "SuperNode ID: ", "Starting Flower SuperNode"
_NODE_ID = re.compile(_JOINED + r"(\d+)")
_ENDED = re.compile(r"Exit Code: (.*?)(?:\n\s*\n|For more information|$)", re.DOTALL)


def node_id_in(log: str) -> int | None:
    """The node id that a SuperNode last said it has; None if it said none."""
    found = _NODE_ID.findall(log)
    return int(found[-1]) if found else None


def _last_words(log: Path) -> str:
    """What the SuperNode that was started last has said."""
    try:
        return log.read_text(errors="replace").rpartition(_BEGUN)[2]
    except OSError:
        return ""


def running(folder: Path) -> int | None:
    """Process id of the supervisor; None if there is none."""
    try:
        with (folder / "supervisor.pid").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        text = (folder / "supervisor.pid").read_text()
        return int(text) if text else None
    except OSError:
        return None


if __name__ == "__main__":
    supervise(Path(sys.argv[1]))
