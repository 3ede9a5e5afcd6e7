"""The processes of a federation: a SuperLink, the fleet's door, devices on this machine."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsim.core.errors import ConfigError, RunError
from fedsim.deploy.device import Device
from fedsim.deploy.guard import is_gone
from fedsim.deploy.keys import Certificates, certificates, device_key, is_public
from fedsim.deploy.processes import Group, command
from fedsim.runtime.code import ROOT

READY = 60.0
"""Seconds for servers to come up."""
AT_ONCE = 4
"""Keys that are registered at the same time, each by a program of Flower's."""
BEGUN = 120.0
"""Seconds within which the server's program must hold its run folder."""
LOOK = "0.25"
"""Seconds between the SuperLink's looks for a server's program to start; Flower's default is 1."""
LASTED = 30.0
"""A process that ends sooner after its start than so many seconds was not started well."""
PATIENCE = 5
"""So many starts in a row that were not well are enough."""

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FRAME = re.compile(r"[╭│╰].*[╮│╯]")
"""Flower's commands put their errors into boxes."""
CHATTER = re.compile(
    r"Using SuperLink: |Successfully (started run|installed) |INFO : +Start `flwr-serverapp`|\s*$"
)
"""Lines of Flower's that say nothing to whoever waits for the run; the log has them."""
TRACEBACK = "ServerApp raised an exception"
SAYS = "fedsim: "
"""How the server's program begins the line that says why it cannot go on."""


def free_port() -> int:
    """A TCP port of the loopback address that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody answers there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def staged(folder: Path) -> Path:
    """A copy of what travels to devices, and of nothing else; the folder.

    Flower resolves the path of every file beside an app, those of a virtual environment and of old
    runs too, which takes seconds; and a program that is started again must run the same code.
    """
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in about["tool"]["flwr"]["app"]["fab-include"]:
        for path in ROOT.glob(pattern):
            place = folder / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return folder


class Deployment:
    """The processes of a federation, started one by one; those that end are started again.

    Args:
        folder: for certificates, keys, devices, logs.
        listen: host and port of the fleet's door; port 0: any.
        hosts: names and addresses under which devices reach this machine.
        held: open files that its processes hold on to (see `Group`).
    """

    def __init__(
        self,
        folder: Path,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        hosts: Sequence[str] = (),
        held: Sequence[int] = (),
    ) -> None:
        self.folder = folder.resolve()
        self.certificates: Certificates = certificates(self.folder / "certificates", hosts)
        self.control = free_port()
        self.door = (listen[0], listen[1] or free_port())
        self.home = self.folder / "flwr"
        self._app = self.folder / "app"
        self._keep_logs()
        self.group = Group(self.folder / "logs", held)
        self._starts: dict[str, Callable[[], object]] = {}
        self._started: dict[str, float] = {}
        self._hasty: dict[str, int] = {}
        self._runs = 0
        self._dead: list[str] = []

    def _keep_logs(self) -> None:
        """The logs of the start before this one stay beside the new ones."""
        logs, before = self.folder / "logs", self.folder / "logs-before"
        if logs.exists():
            shutil.rmtree(before, ignore_errors=True)
            logs.rename(before)

    # -- servers -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start SuperLink and door; ready when both answer.

        The SuperLink begins with an empty database: it knows the keys that `register` is given now,
        and no run that was cut off. What a run has reached is in its own folder.
        """
        for file in self.folder.glob("superlink.db*"):
            file.unlink()
        self.home.mkdir(exist_ok=True)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:'
            f'{self.control}"\nroot-certificates = "{self.certificates.authority}"\n'
        )
        staged(self._app)
        self._keep("superlink", self._superlink)
        self._keep("door", self._door)
        self.group.until(self._answers, "starting", READY)

    def _answers(self) -> bool:
        host, port = self.near
        return listening(self.control) and listening(port, host)

    @property
    def near(self) -> tuple[str, int]:
        """The door as devices on this machine reach it."""
        host, port = self.door
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port

    def _keep(self, name: str, start: Callable[[], object]) -> None:
        self._starts[name], self._started[name] = start, time.monotonic()
        start()

    def _superlink(self) -> None:
        tls = self.certificates
        self.group.start(
            "superlink",
            [
                command("flower-superlink"),
                *("--ssl-ca-certfile", str(tls.authority), "--ssl-certfile", str(tls.certificate)),
                *("--ssl-keyfile", str(tls.key), "--enable-supernode-auth"),
                *("--host", "127.0.0.1", "--port", str(self.control)),
                *("--database", str(self.folder / "superlink.db")),
                "--disable-runtime-dependency-installation",
            ],
            cwd=self.folder,
            env={"FLWR_HOME": str(self.home), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": LOOK},
        )

    def _door(self) -> None:
        host, port = self.door
        tls = self.certificates
        self.group.start(
            "door",
            [
                *(sys.executable, "-m", "fedsim.deploy.proxy"),
                *("--listen", f"{host}:{port}", "--superlink", f"127.0.0.1:{self.control}"),
                *("--certificate", str(tls.certificate), "--key", str(tls.key)),
                *("--authority", str(tls.authority)),
            ],
            env={"PYTHONPATH": str(ROOT)},
        )

    def look_after(self) -> list[str]:
        """Start again what has ended; the names.

        Raises:
            RunError: a process ends again and again.
        """
        ended = [n for n in self._starts if self.group.running[n].poll() is not None]
        for name in ended:
            lasted = time.monotonic() - self._started[name] > LASTED
            self._hasty[name] = 0 if lasted else self._hasty.get(name, 0) + 1
            if self._hasty[name] == PATIENCE:
                raise RunError(f"{name} ends again and again: {self.group.tail(name)}")
            self.group.end(name)  # what it has started is of no use without it
            self._keep(name, self._starts[name])
        return ended

    def flwr(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the ``flwr`` command on this SuperLink; its log is named after it."""
        self._runs += 1
        name = f"flwr-{arguments[0]}-{self._runs}"
        return self.group.start(
            name, [command("flwr"), *arguments], env={"FLWR_HOME": str(self.home)}, brief=True
        )

    def _named(self, process: subprocess.Popen[bytes]) -> str:
        return next(n for n, p in self.group.running.items() if p is process)

    # -- devices -----------------------------------------------------------------------------

    def register(self, keys: Sequence[Path]) -> None:
        """Let devices with these public keys in.

        Raises:
            ConfigError: a file is no public key of a device.
        """
        for key in keys:
            if not is_public(key):
                raise ConfigError(
                    f"{key} is no public key of a device (ecdsa-sha2-nistp384 ...): copy what "
                    "`fedsim device key` prints"
                )
        waiting = deque({key.read_text().split()[1]: key for key in keys}.values())
        busy: list[tuple[Path, subprocess.Popen[bytes]]] = []
        while waiting or busy:
            while waiting and len(busy) < AT_ONCE:
                key = waiting.popleft()
                busy.append((key, self.flwr("supernode", "register", str(key), "here")))
            key, process = busy.pop(0)
            code, name = process.wait(), self._named(process)
            del self.group.running[name]
            if code:
                raise RunError(f"{key} cannot be registered: {self.group.tail(name)}")

    def device(self, number: int, total: int) -> Path:
        """Prepare device `number` of this machine; its folder."""
        folder = self.folder / f"device-{number}"
        host, port = self.near
        door = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        Device(door, str(self.certificates.authority), number, total, free_port()).save(folder)
        device_key(folder / "key")
        return folder

    def join(self, folder: Path) -> None:
        """Start the supervisor of a device of this machine."""

        def start() -> None:
            self.group.start(
                folder.name,
                [sys.executable, "-m", "fedsim.deploy.device", str(folder)],
                env={"PYTHONPATH": str(ROOT)},
            )

        self._keep(folder.name, start)

    # -- the run -----------------------------------------------------------------------------

    def run(self, config: dict[str, str | int | float], out: Path) -> str | None:
        """Run the staged app, showing its log, until its server's program has ended.

        Args:
            config: the run configuration.
            out: the run folder, by whose lock the server's program is known.

        Returns:
            why it says that it cannot go on; None if it says nothing: it is done, or was killed.
        """
        file = self.folder / "run-config.toml"
        # JSON strings are TOML strings, as long as nothing in them needs escaping by surrogates.
        file.write_text(
            "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in config.items())
        )
        shutil.rmtree(self.home / "apps", ignore_errors=True)  # what was half unpacked stays so
        before = _owner(out)
        process = self.flwr("run", str(self._app), "here", "--stream", "--run-config", str(file))
        name, shown, started = self._named(process), 0, time.monotonic()
        while process.poll() is None:
            shown = self._show(name, shown)
            owner = _owner(out)
            if owner not in (None, before):
                self._end_the_dead()
            killed = owner not in (None, before) and is_gone(owner or 0) and not _over(out)
            if owner in (None, before) and time.monotonic() > started + BEGUN:
                return f"it did not start within {BEGUN:g} s; {self.group.tail('superlink')}"
            if "superlink" in self.look_after():
                self.group.until(self._answers, "starting again", READY)
                killed = True
            if killed:
                self._dead += self._numbers(name)
                break
            time.sleep(0.3)
        self._show(name, shown)
        failed = process.poll()
        self.group.end(name)
        said = (self.group.logs / f"{name}.log").read_text(errors="replace").splitlines()
        reasons = [line.removeprefix(SAYS) for line in said if line.startswith(SAYS)]
        if failed and not reasons and _owner(out) == before:  # nothing was started at all
            framed = [line.strip("│ ") for line in said if line.startswith("│")]
            reasons = [" ".join(framed) or self.group.tail(name)]
        return reasons[-1] if reasons else None

    def _numbers(self, name: str) -> list[str]:
        """Flower's number of the run that a ``flwr run`` has started; none yet: empty."""
        text = (self.group.logs / f"{name}.log").read_text(errors="replace")
        return re.findall(r"started run (\d+)", text)[:1]

    def _end_the_dead(self) -> None:
        """Tell the SuperLink which runs are over, so that devices do not work for them in vain.

        Not before the next server's program is up: that is what everybody waits for.
        """
        for number in self._dead:
            self.flwr("stop", number, "here")
        self._dead.clear()

    def _show(self, name: str, shown: int) -> int:
        """Show whole lines of the log from a place on; the place up to where it was shown."""
        text = (self.group.logs / f"{name}.log").read_text(errors="replace")
        end = text.rfind("\n") + 1
        if TRACEBACK in text[:shown]:
            return end
        for line in COLOUR.sub("", text[shown:end]).splitlines():
            if TRACEBACK in line:
                break
            if not (CHATTER.match(line) or FRAME.match(line) or line.startswith(SAYS)):
                print(line, flush=True)
        return end

    def close(self) -> None:
        """End everything."""
        self.group.__exit__()


def _over(out: Path) -> bool:
    """Whether a run folder says that nothing runs in it."""
    try:
        return json.loads((out / "status.json").read_text())["state"] != "running"
    except (OSError, ValueError, KeyError):
        return False


def _owner(out: Path) -> int | None:
    """The process that holds, or last held, a run folder."""
    try:
        return int((out / ".lock").read_text().removeprefix("process "))
    except (OSError, ValueError):
        return None
