"""Flower's own simulation engine (Ray), started in this process, with its faults kept away.

What is mended, each fault with a test in `tests/runtime/test_simulation.py`:

- Ray puts the folder it was started in before everything else on the clients' import path, so that
  they may run another checkout's code: it is started from an empty folder.
- An actor that died (out of memory) stays in Flower's pool and swallows messages for ever: actors
  are restarted, and the message that was lost is tried once more.
- The server starts before the nodes are registered: `RemoteGrid.wait`.
- Sampling, node ids, bfloat16 and the source of error replies: `RemoteGrid`, `fedsim.core.records`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim.core.errors import RunError
from fedsim.runtime.code import ROOT

Result = TypeVar("Result")

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}
"""Nothing calls home; Ray leaves the environment as it is, and clients are no background work: on a
busy machine Ray's own choice, 15, starves them until the run gives up waiting for them."""

STARTED_IN = "FEDSIM_STARTED_IN"
"""Environment variable: the folder this process was in before `mend_engine` left it."""
REVIVED = {"max_restarts": -1, "max_task_retries": 1}
"""Options of Ray's actors: one that died is started again, its message sent once more."""


def simulate(
    server: Callable[[Grid, Callable[[], bool]], Result],
    client_app: ClientApp,
    num_nodes: int,
    workers: int,
    gpus: float = 0.0,
) -> Result:
    """Run `server` on a grid of simulated nodes and return what it returns.

    Args:
        server: is given Flower's grid, and a function that says whether to stop.
        client_app: what the nodes run; sent to other processes.
        num_nodes: number of nodes; their partition ids are 0, 1, ...
        workers: processes that work for the nodes.
        gpus: share of a GPU that each process takes.

    Raises:
        RunError: the engine is not installed, or it failed.
        Exception: whatever `server` raises.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("ray") is None:
        raise RunError(
            "runtime.name = ray needs Flower's simulation engine: "
            "pip install 'fedsim-flower[simulation]'"
        )
    from flwr.simulation import run_simulation

    stop, ended = threading.Event(), threading.Event()
    result: list[Result] = []
    failure: list[BaseException] = []

    def main(grid: Grid, context: Context) -> None:
        try:
            result.append(server(grid, stop.is_set))
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    app = ServerApp()
    app.main()(main)
    resources: Any = {"num_cpus": 1, "num_gpus": gpus}
    mend_pool()
    try:
        with _quiet(), _ray(workers, gpus):
            run_simulation(
                app, client_app, num_nodes, backend_config={"client_resources": resources}
            )
    except Exception as error:
        if not failure:
            raise RunError(f"Flower's simulation engine failed: {error}") from error
    finally:
        stop.set()
        ended.wait(30.0)
    if failure:
        raise failure[0]
    return result[0]


@contextlib.contextmanager
def _ray(workers: int, gpus: float) -> Iterator[None]:
    """Start Ray so that clients import what this process imports, whatever the folder."""
    import ray

    options: dict[str, Any] = {
        "num_cpus": workers,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {"PYTHONPATH": import_path()}},
    }
    if gpus:
        options["num_gpus"] = 1
    terminate = signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory(prefix="fedsim-ray-") as empty:
        with contextlib.chdir(empty):
            ray.init(**options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            ray.shutdown()


def mend_pool() -> None:
    """Let Flower's actor pool revive its actors, and end them without a fuss."""
    import ray
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool

    if BasicActorPool not in _mended:
        _mended[BasicActorPool] = BasicActorPool.__init__
        mended: Any = BasicActorPool
        mended.__init__ = _revived
        mended.terminate_all_actors = lambda pool: [ray.kill(a) for a in pool.pool]


_mended: dict[type, Callable[..., None]] = {}


def _revived(pool: Any, *args: Any, **kwargs: Any) -> None:
    kwargs["client_resources"] = {**kwargs["client_resources"], **REVIVED}
    _mended[type(pool)](pool, *args, **kwargs)


def mend_engine() -> None:
    """Called by the ClientApp in every process; acts in the one that ``flwr run`` simulates in.

    It has been started in whatever folder, and loads the ClientApp before it starts Ray.
    """
    if Path(sys.argv[0]).name == "flwr-simulation":
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        os.environ[STARTED_IN] = str(Path.cwd())
        os.chdir(ROOT)
        mend_pool()


def working_folder() -> Path:
    """The folder that relative paths of the user start from."""
    now = Path.cwd()  # read first: `mend_engine` may be at work in another thread
    return Path(os.environ.get(STARTED_IN, now))


def import_path() -> str:
    """The import path of this process for another one: this code first, nothing relative."""
    places = [str(ROOT), *(str(Path(p or ".").resolve()) for p in sys.path)]
    return os.pathsep.join(dict.fromkeys(places))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Flower logs every error reply with its traceback; they come back as replies anyway."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
