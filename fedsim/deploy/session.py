"""One experiment on a deployment, from its start to its end, whatever ends in between."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsim import api
from fedsim.app_config import JSON, OUT, SEED, STRATEGY, WAIT
from fedsim.config import load_experiment
from fedsim.core.errors import ConfigError, RunError
from fedsim.deploy.loopback import Deployment
from fedsim.results import RunWriter
from fedsim.runner import OnEvent, RunResult, Task, saved_config
from fedsim.runtime.code import ROOT

PATIENCE = 10.0
"""Seconds for what an earlier start has left to end: its processes have 5."""
FRUITLESS = 3
"""So many starts of the server's program in a row without a round finished are enough."""


def deploy(given: argparse.Namespace) -> None:
    """Do what the command line says (see `fedsim.deploy.main`).

    Raises:
        FedsimError: what went wrong; the logs stay.
    """
    _check(given)
    folder = Path(given.folder).resolve()
    with _claimed(folder) as lock:
        if given.prepare:
            made = Deployment(folder, given.listen, given.host, (lock,))
            made.close()
            print(f"devices need {made.certificates.authority}")
            return
        experiment = load_experiment(given.experiment or _toy(), given.set)
        out = Path(given.out).resolve() if given.out else folder / "run"
        entry = api.find_strategy(experiment, given.strategy)
        seed = experiment.experiment.seeds[0] if given.seed is None else given.seed
        task = Task(experiment, entry, seed, out)
        if given.fresh and saved_config(out) is not None:
            shutil.rmtree(out)

        def begin(task: Task, on_event: OnEvent | None, resume: bool) -> RunResult:
            return _session(given, task, Deployment(folder, given.listen, given.host, (lock,)))

        done = api.execute(task, lambda event: print(getattr(event, "text", "")), begin)
        numbers = (f"{n} {v:.4g}" for n, v in done.metrics.items() if n in ("accuracy", "loss"))
        print(f"the run is in {done.path}: {', '.join(numbers)}")


def _toy() -> str:
    return str(ROOT / "experiments" / "toy.toml")


def _check(given: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is started."""
    if not (ROOT / "pyproject.toml").exists():
        raise RunError("a deployment starts from a checkout: there is no pyproject.toml here")
    if not given.nodes and not given.keys and not given.prepare:
        raise ConfigError("--nodes 0 without --keys: no device could ever come in; name the folder "
                          "with the public keys of the devices")  # fmt: skip
    if given.keys and not Path(given.keys).is_dir():
        raise ConfigError(f"--keys = {given.keys} is no folder")
    if given.keys and not given.nodes and not any(Path(given.keys).glob("*.pub")):
        raise ConfigError(f"--keys = {given.keys} holds no *.pub; `fedsim device key` prints one")
    host, port = given.listen
    if port:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise RunError(f"--listen = {host}:{port} cannot be used: {error.strerror}"
                               ) from None  # fmt: skip


@contextmanager
def _claimed(folder: Path) -> Iterator[int]:
    """Hold the deployment's folder; yields the open lock, which its processes hold on to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"--folder = {folder} cannot be used: {error.strerror}") from None
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise RunError(f"another deployment runs in {folder}; stop it, or give another "
                                   "--folder") from None  # fmt: skip
                time.sleep(0.2)
        yield lock
    finally:
        os.close(lock)


def _session(given: argparse.Namespace, task: Task, deployment: Deployment) -> RunResult:
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
        print(f"devices come in at {host}:{port} and trust {deployment.certificates.authority}")
        wait = given.wait
        conduct(deployment, task, wait)
    finally:
        deployment.close()
        _settle(task.path)
    done = api.finished(task)
    if done is None:
        raise RunError(f"{task.path} is not finished; the logs are in {deployment.group.logs}")
    return done


def conduct(deployment: Deployment, task: Task, wait: float = 120.0) -> None:
    """Run the task on the deployment's devices; goes on if a program of the server is killed.

    Raises:
        RunError: the run failed, or got nowhere after several starts.
    """
    config: dict[str, str | int | float] = {
        JSON: task.experiment.model_dump_json(),
        STRATEGY: task.entry.label,
        SEED: task.seed,
        OUT: str(task.path),
        WAIT: wait,
    }
    fruitless, before = 0, _standing(task.path)[1]
    while True:
        reason = deployment.run(config, task.path)
        state, done = _standing(task.path)
        if state == "finished":
            return
        if reason is not None or state not in ("running", "not started"):
            raise RunError(f"the run failed: {reason or state}; the logs are in "
                           f"{deployment.group.logs}")  # fmt: skip
        fruitless = 0 if done > before else fruitless + 1
        if fruitless == FRUITLESS:
            raise RunError(f"the server's program ended {FRUITLESS} times without a round finished "
                           f"in between; the logs are in {deployment.group.logs}")  # fmt: skip
        before = done
        print(f"a program of the server ended after round {done}; going on", flush=True)


def _standing(run: Path) -> tuple[str, int]:
    """State of a run folder, and its last round that is on disk."""
    rounds = [int(p.name.split("-")[1]) for p in run.glob("checkpoints/round-*-*.safetensors")]
    try:
        state = str(json.loads((run / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError):
        state = "not started"
    return state, max(rounds, default=0)


def _settle(run: Path) -> None:
    """A run whose processes were ended does not go on: say so in its folder."""
    state, done = _standing(run)
    if state == "running":
        old = json.loads((run / "status.json").read_text())
        RunWriter(run).write_status(
            {**old, "state": "interrupted", "round": done, "reason": "the deployment was ended"}
        )
