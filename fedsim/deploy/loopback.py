"""A deployment: a SuperLink, the fleet's door, devices; one experiment on them; nothing left over.

By default everything is on this machine: `--nodes` devices, each a supervised SuperNode process of
its own. With ``--nodes 0 --listen 0.0.0.0:8443 --keys FOLDER`` the devices are elsewhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedsim.app_config import JSON, OUT, SEED, STRATEGY, WAIT, find_strategy
from fedsim.config import load_experiment
from fedsim.core.errors import FedsimError, RunError
from fedsim.deploy.device import Device
from fedsim.deploy.keys import Certificates, certificates, device_key
from fedsim.deploy.processes import QUIET, Group, command
from fedsim.deploy.proxy import address
from fedsim.runtime.code import ROOT

READY = 60.0
"""Seconds for servers to come up."""


def free_port() -> int:
    """A TCP port of the loopback address that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody answers there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


class Deployment:
    """The processes of a federation, started one by one.

    Args:
        folder: for certificates, keys, devices, logs.
        listen: host and port of the fleet's door; port 0: any.
        hosts: names and addresses under which devices reach this machine.
    """

    def __init__(
        self, folder: Path, listen: tuple[str, int] = ("127.0.0.1", 0), hosts: Sequence[str] = ()
    ) -> None:
        self.folder = folder.resolve()
        self.certificates: Certificates = certificates(self.folder / "certificates", hosts)
        self.control = free_port()
        self.door = (listen[0], listen[1] or free_port())
        self.home = self.folder / "flwr"
        self.group = Group(self.folder / "logs")

    def start(self) -> None:
        """Start SuperLink and door; ready when both answer."""
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
            env={"FLWR_HOME": str(self.home)},
        )
        host, port = self.door
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
        own = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        self.group.until(
            lambda: listening(self.control) and listening(port, own), "starting", READY
        )
        self.home.mkdir(exist_ok=True)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:'
            f'{self.control}"\nroot-certificates = "{tls.authority}"\n'
        )

    def flwr(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the ``flwr`` command on this SuperLink."""
        name = f"flwr-{arguments[0]}-{len(self.group.running)}"
        return self.group.start(name, [command("flwr"), *arguments], env=self._env)

    @property
    def _env(self) -> dict[str, str]:
        return {**QUIET, "FLWR_HOME": str(self.home)}

    def register(self, keys: Sequence[Path]) -> None:
        """Let devices with these public keys in; those it knows already stay."""
        known = self.folder / "registered"
        before = known.read_text().split("\n") if known.exists() else []
        new = [k for k in keys if k.read_text().strip() not in before]
        started = [(k, self.flwr("supernode", "register", str(k), "here")) for k in new]
        for key, process in started:
            if process.wait():
                raise RunError(f"{key} cannot be registered; the logs are in {self.group.logs}")
            before.append(key.read_text().strip())
        for name in [n for n, p in self.group.running.items() if p in [s for _, s in started]]:
            del self.group.running[name]
        known.write_text("\n".join(before))

    def device(self, number: int, total: int) -> Path:
        """Prepare device `number` of this machine; its folder."""
        folder = self.folder / f"device-{number}"
        own = "127.0.0.1" if self.door[0] in ("0.0.0.0", "::") else self.door[0]
        door, authority = f"{own}:{self.door[1]}", str(self.certificates.authority)
        Device(door, authority, number, total, free_port()).save(folder)
        device_key(folder / "key")
        return folder

    def join(self, folder: Path) -> None:
        """Start the supervisor of a device of this machine."""
        self.group.start(
            folder.name,
            [sys.executable, "-m", "fedsim.deploy.device", str(folder)],
            env={"PYTHONPATH": str(ROOT), "FLWR_HOME": str(folder / "flwr")},
        )

    def run(self, config: dict[str, str | int | float]) -> int:
        """Run the app of this checkout to its end, showing its log; the exit code."""
        file = self.folder / "run-config.toml"
        # JSON strings are TOML strings, as long as nothing in them needs escaping by surrogates.
        file.write_text(
            "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in config.items())
        )
        process = self.flwr("run", str(ROOT), "here", "--stream", "--run-config", str(file))
        (name,) = [n for n, p in self.group.running.items() if p is process]
        shown = 0
        while process.poll() is None:
            shown = self._show(name, shown)
            self._watch(name)
            time.sleep(0.5)
        self._show(name, shown)
        del self.group.running[name]
        return process.returncode

    def _watch(self, name: str) -> None:
        others = {n: p for n, p in self.group.running.items() if n != name}
        for other, process in others.items():
            if process.poll() is not None:
                raise RunError(f"{other} ended: {self.group.tail(other)}")

    def _show(self, name: str, shown: int) -> int:
        text = (self.group.logs / f"{name}.log").read_text(errors="replace")
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        return len(text)

    def close(self) -> None:
        """End everything."""
        self.group.__exit__()


def deploy(given: argparse.Namespace) -> Path:
    """Start the deployment, run the experiment, end the deployment; the run folder.

    Raises:
        FedsimError: what went wrong; the logs stay.
    """
    if not (ROOT / "pyproject.toml").exists():
        raise RunError("a deployment starts from a checkout: there is no pyproject.toml here")
    experiment = load_experiment(given.experiment, given.set)
    entry = find_strategy(experiment, given.strategy)
    seed = experiment.experiment.seeds[0] if given.seed is None else given.seed
    folder = Path(given.folder).resolve()
    out = Path(given.out).resolve() if given.out else folder / "run"
    if given.fresh:
        shutil.rmtree(out, ignore_errors=True)
    deployment = Deployment(folder, given.listen, given.host)
    try:
        deployment.start()
        devices = [deployment.device(i, given.nodes) for i in range(given.nodes)]
        keys = [d / "key.pub" for d in devices]
        if given.keys:
            keys += sorted(Path(given.keys).glob("*.pub"))
        deployment.register(keys)
        for device in devices:
            deployment.join(device)
        host, port = deployment.door
        print(f"the fleet's door is {host}:{port}; devices trust "
              f"{deployment.certificates.authority}", flush=True)  # fmt: skip
        code = deployment.run(
            {
                JSON: experiment.model_dump_json(),
                STRATEGY: entry.label,
                SEED: seed,
                OUT: str(out),
                WAIT: given.wait,
            }
        )
        state = _state(out)
        if code or state != "finished":
            raise RunError(f"the run ended as {state!r}; the logs are in {deployment.group.logs}")
    finally:
        deployment.close()
    return out


def _state(out: Path) -> str:
    try:
        return str(json.loads((out / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError):
        return "not started"


def main(arguments: Sequence[str] | None = None) -> None:
    """``scripts/deploy``: see the options."""
    parser = argparse.ArgumentParser(prog="scripts/deploy", description=__doc__)
    add = parser.add_argument
    add("experiment", nargs="?", default=str(ROOT / "experiments" / "toy.toml"))
    add("--nodes", type=int, default=3, help="devices on this machine")
    add("--strategy", help="label of the strategy; default: the first")
    add("--seed", type=int, help="default: the experiment's first")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    add("--folder", default="runs/deployment", help="certificates, keys, devices, logs")
    add("--out", help="run folder; default: FOLDER/run")
    add("--fresh", action="store_true", help="begin anew instead of going on")
    add("--listen", type=address, default=("127.0.0.1", 0), metavar="HOST:PORT",
        help="where devices come in")  # fmt: skip
    add("--host", action="append", default=[], help="a name or address of this machine")
    add("--keys", help="folder of the public keys (*.pub) of devices elsewhere")
    add("--wait", type=float, default=120.0, help="seconds to wait for the devices")
    given = parser.parse_args(arguments)

    def terminate(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        print(f"the run is in {deploy(given)}")
    except FedsimError as error:
        print(f"scripts/deploy: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; everything was stopped, the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
