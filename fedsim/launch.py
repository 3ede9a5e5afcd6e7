"""Starts a run where its ``[runtime]`` says: in this process, or on one of Flower's grids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from flwr.serverapp import Grid

from fedsim.app_config import STATE, Settings
from fedsim.client_app import ProgramApp
from fedsim.config import RuntimeConfig
from fedsim.core.errors import ConfigError, RunError
from fedsim.journal import Journal, locked
from fedsim.runner import OnEvent, Run, RunResult, Task, saved_config
from fedsim.runtime import code
from fedsim.runtime.choose import ON_NODES
from fedsim.runtime.remote import RemoteGrid
from fedsim.runtime.simulation import simulate
from fedsim.runtime.threads import available_cores
from fedsim.runtime.work import Environment

ROLL = "nodes.json"
"""Name of the file in the checkpoints folder that says which nodes serve which clients."""


def check_device(runtime: RuntimeConfig) -> None:
    """Refuse a device that nothing would be computed on.

    Raises:
        ConfigError: it is not there, or the engine in this process does not use it.
    """
    device = runtime.device
    if device == "cpu":
        return
    if runtime.name == "local":
        raise ConfigError(
            f"runtime.device = {device!r} is not possible with runtime.name = 'local', whose "
            "engine computes on the CPU: set runtime.device = 'cpu'"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"runtime.device = {device!r}: PyTorch finds no CUDA device on this machine; "
            "set runtime.device = 'cpu', or install a driver and a PyTorch build for it"
        )


def start(task: Task, on_event: OnEvent | None = None, resume: bool = False) -> RunResult:
    """Run a task where its ``[runtime]`` says: in this process, or on Flower's simulation engine.

    Args:
        task: what to run.
        on_event: told of every start, round and end.
        resume: go on from the last checkpoint where there is one.

    Raises:
        FedsimError: the run cannot be made or cannot go on; what is finished stays on disk.
    """
    runtime = task.experiment.runtime
    check_device(runtime)
    if runtime.name == "local":
        if resume and on_nodes(task.path):
            raise RunError(
                f"{task.path} ran on nodes of their own, which keep their clients' state: go on "
                "with the command that started it, scripts/deploy or flwr run"
            )
        with locked(task.path):
            return Run(task, on_event).execute(resume)
    settings: dict[str, bool | float | int | str] = {
        **Settings.config(task.experiment, task.entry, task.seed),
        STATE: str((task.path / "client-state").resolve()),
    }
    workers = runtime.workers or available_cores()
    with locked(task.path):
        clients = Environment.of(task.experiment, task.seed, task.entry).data.num_clients
        return simulate(
            lambda grid, stopped: serve(
                task, grid, on_event, resume=resume, grace=0.0, stopped=stopped
            ),
            ProgramApp(run_config=settings),
            clients,
            workers,
            gpus=1 / workers if runtime.device.startswith("cuda") else 0.0,
        )


def serve(
    task: Task,
    grid: Grid,
    on_event: OnEvent | None = None,
    *,
    resume: bool = False,
    wait: float = 60.0,
    grace: float = 20.0,
    stopped: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Run a task on a Flower grid whose nodes are other processes.

    Args:
        task: what to run.
        grid: Flower's grid.
        on_event: told of every start, round and end.
        resume: go on from the last checkpoint where there is one.
        wait: seconds to wait until every client has a node, and before a round for enough of them.
        grace: seconds within which a node that went away may come back with its message.
        stopped: asked while waiting; if it is true, the run is interrupted.

    Raises:
        FedsimError: the run cannot be made or cannot go on; what is finished stays on disk.
    """
    if resume and not on_nodes(task.path):
        raise RunError(
            f"{task.path} ran in one process, with its clients' state: go on with "
            f"fedsim resume {task.path}, or give another run folder"
        )
    journal = Journal(task.path / "checkpoints", task.experiment.journal.keep)
    if not resume:
        journal.clear()
    env = Environment.of(task.experiment, task.seed, task.entry)
    remote = RemoteGrid(
        grid,
        env.data.num_clients,
        run=journal.run,
        digest=code.digest(),
        grace=grace,
        stopped=stopped,
        roll=journal.folder / ROLL,
        patience=wait,
    )
    remote.wait(wait)
    return Run(task, on_event, remote, env).execute(resume)


def on_nodes(path: Path) -> bool:
    """Whether the clients of a run folder are in other processes, with all that they keep."""
    engine = (saved_config(path) or {}).get("engine", {})
    return bool(engine.get("reason") == ON_NODES.reason)
