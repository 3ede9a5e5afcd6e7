"""Flower's simulation engine with its faults kept away, each of them named here.

Two others are named in `test_remote.py`, which needs no Ray: the unseeded sampling, and the source
of error replies.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsim import api
from fedsim.config import load_experiment
from fedsim.core.nodes import node_of
from fedsim.core.records import from_record, to_record
from fedsim.runtime import simulation
from fedsim.runtime.remote import RemoteGrid

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
NODES, ROUNDS = 6, 3
NICENESS = "RAY_worker_niceness"

CLIENT = """
    import os
    from pathlib import Path
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from fedsim.runtime.envelope import Enrolment

    class Faulty(ClientApp):
        def __reduce__(self):
            return Faulty, ()

        def __call__(self, message, context):
            client = context.node_config["partition-id"]
            if message.metadata.message_type.startswith("query"):
                return Message(Enrolment((client,), (1,), (1,), "").content(), reply_to=message)
            mark = Path(str(message.content["config"]["mark"]))
            if client == 2 and not mark.exists():
                mark.touch()
                os._exit(137)  # as when memory runs out
            code = ConfigRecord({"file": __file__, "niceness": os.nice(0)})
            content = {"arrays": message.content["arrays"], "code": code}
            return Message(RecordDict(content), reply_to=message)
"""


@dataclass
class Seen:
    """What the server saw: errors of each round, where the clients' code came from, a tensor, how
    nodes were registered, and the clients' niceness.
    """

    errors: list[int]
    files: set[str]
    echo: torch.Tensor
    registered: int
    niceness: set[int] = field(default_factory=set)


VALUES = torch.tensor([1.5, -2.0, 3e38], dtype=torch.bfloat16)


def talk(folder: Path) -> Callable[[Grid, Callable[[], bool]], Seen]:
    """A server that sends every client a message, three times over."""

    def server(grid: Grid, stopped: Callable[[], bool]) -> Seen:
        there = len(list(grid.get_node_ids()))
        remote = RemoteGrid(grid, NODES, stopped=stopped)
        remote.wait(60)
        seen = Seen([], set(), torch.empty(0), there)
        for number in range(1, ROUNDS + 1):
            config = ConfigRecord({"server-round": number, "mark": str(folder / "died")})
            content = RecordDict({"arrays": to_record({"w": VALUES}), "config": config})
            messages = [Message(content, node_of(c), "train.echo") for c in range(NODES)]
            replies = list(remote.send_and_receive(messages, timeout=90))
            seen.errors.append(sum(r.has_error() for r in replies) + NODES - len(replies))
            for reply in replies:
                if reply.has_content():
                    code = reply.content.config_records["code"]
                    seen.files.add(str(code["file"]))
                    seen.niceness.add(int(str(code["niceness"])))
                    seen.echo = from_record(reply.content.array_records["arrays"])["w"]
        return seen

    return server


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Client code in one folder; the working folder holds another checkout's."""
    code = dedent(CLIENT)
    for name in ("mine", "another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "faulty_client.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "mine")
    monkeypatch.delitem(sys.modules, "faulty_client", raising=False)
    monkeypatch.chdir(tmp_path / "another")
    return tmp_path


def simulate(folder: Path) -> Seen:
    import faulty_client  # type: ignore[import-not-found]

    return simulation.simulate(talk(folder), faulty_client.Faulty(), NODES, workers=2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_dead_actor_wrong_directory_race_and_bfloat16(scene: Path) -> None:
    seen = simulate(scene)
    assert seen.errors == [0] * ROUNDS, "dead actor: the message is sent again, the rest is spared"
    assert seen.files == {str(scene / "mine" / "faulty_client.py")}, "wrong directory"
    assert torch.equal(seen.echo, VALUES), "bfloat16"
    assert seen.niceness == {os.nice(0)}, "clients are no background work"
    assert Path.cwd() == scene / "another"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_planted_faults_are_found(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine as it comes: what the test above keeps out is there."""
    monkeypatch.setattr(simulation, "mend_pool", lambda: None)
    monkeypatch.setattr(simulation.contextlib, "chdir", lambda _: contextlib.nullcontext())
    monkeypatch.delitem(simulation.QUIET, NICENESS)
    monkeypatch.delenv(NICENESS, raising=False)  # an earlier test of this process has set it
    pool = simulation._mended
    if pool:  # mended by an earlier test of this process
        from flwr.simulation.ray_transport.ray_actor import BasicActorPool

        monkeypatch.setattr(BasicActorPool, "__init__", pool[BasicActorPool])
    seen = simulate(scene)
    assert seen.errors[-1] > 0, "a dead actor poisons the rounds after it"
    assert seen.files == {str(scene / "another" / "faulty_client.py")}
    assert min(seen.niceness) > os.nice(0), "Ray gives its workers a low priority"


# ------------------------------------------------------------------------------ whole experiments


def digest(folder: Path) -> dict[str, str]:
    names = ("model.safetensors", "rounds.parquet", "clients.parquet")
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_same_bits_as_locally_and_after_a_resume(tmp_path: Path) -> None:
    toy = ROOT / "experiments" / "toy.toml"
    local, ray = (load_experiment(toy, [f"runtime.name={n}"]) for n in ("local", "ray"))
    api.run(local, strategy="scaffold", out=tmp_path / "local")

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if getattr(event, "round", 0) == 2:
            raise Stop

    with pytest.raises(Stop):
        api.run(ray, strategy="scaffold", out=tmp_path / "ray", on_event=stop)
    api.resume(tmp_path / "ray")
    assert digest(tmp_path / "ray") == digest(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_flwr_run_from_another_checkouts_folder(tmp_path: Path) -> None:
    """`flwr run .` with two nodes for three clients, its engine started in a wrong folder."""
    wrong = tmp_path / "another"
    for room in ("fedsim", "strategies", "clients"):
        (wrong / room).mkdir(parents=True)
        (wrong / room / "__init__.py").write_text("raise ImportError('another checkout')")
    env = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    out = tmp_path / "run"
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "flwr"), "run", str(ROOT), "--stream",
            "--run-config", f'strategy="scaffold" out="{out}"',
        ],
        cwd=wrong, env=env, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    try:
        assert (out / "model.safetensors").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    finally:
        stop_superlink(tmp_path / "home")
    api.run(load_experiment(ROOT / "experiments" / "toy.toml", []), strategy="scaffold",
            out=tmp_path / "local")  # fmt: skip
    assert digest(out) == digest(tmp_path / "local")


def stop_superlink(home: Path) -> None:
    """`flwr run` leaves a SuperLink behind."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(home) in (place / "cmdline").read_text():
                os.kill(int(place.name), 15)


# ------------------------------------------------------------------------------- without an engine


def test_engine_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.core.errors import RunError

    find = simulation.importlib.util.find_spec
    monkeypatch.setattr(
        simulation.importlib.util, "find_spec", lambda n: None if n == "ray" else find(n)
    )
    with pytest.raises(RunError, match=r"pip install 'fedsim-flower\[simulation\]'"):
        simulation.simulate(lambda grid, stopped: None, None, 1, 1)  # type: ignore[arg-type]


@pytest.fixture
def undemanding(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Ray and Flower's engine never start; the niceness that Ray is told each time it would."""
    import flwr.simulation
    import ray

    told: list[str | None] = []
    monkeypatch.setenv(NICENESS, "")  # so that it is as it was after the test
    monkeypatch.delenv(NICENESS)
    monkeypatch.setattr(ray, "init", lambda **_: told.append(os.environ.get(NICENESS)))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(simulation, "mend_pool", lambda: None)

    def engine(server: ServerApp, *_: object, **__: object) -> None:
        grid: Any = None
        server(grid, Context(1, 0, {}, RecordDict(), {}))

    monkeypatch.setattr(flwr.simulation, "run_simulation", engine)
    return told


def begin() -> None:
    simulation.simulate(lambda grid, stopped: None, None, 1, 1)  # type: ignore[arg-type]


def test_workers_have_the_priority_of_the_run(undemanding: list[str | None]) -> None:
    """Ray's own choice, 15, starves clients on a busy machine until the run gives them up."""
    begin()
    assert undemanding == ["0"]


def test_a_users_priority_of_workers_stays(
    undemanding: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NICENESS, "5")
    begin()
    assert undemanding == ["5"]


def test_planted_priority_is_found(
    undemanding: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the mend Ray is told nothing, and takes 15."""
    monkeypatch.delitem(simulation.QUIET, NICENESS)
    begin()
    assert undemanding == [None]


def test_flwr_run_leaves_the_folder_it_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(simulation, "mend_pool", lambda: None)
    monkeypatch.setenv(simulation.STARTED_IN, "")
    monkeypatch.delenv(simulation.STARTED_IN)
    simulation.mend_engine()
    assert Path.cwd() == tmp_path == simulation.working_folder()
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/flwr-simulation"])
    monkeypatch.setenv(NICENESS, "")
    monkeypatch.delenv(NICENESS)
    simulation.mend_engine()
    assert Path.cwd() == simulation.ROOT
    assert os.environ[NICENESS] == "0"
    assert simulation.working_folder() == tmp_path


def test_import_path_begins_with_this_code() -> None:
    places = simulation.import_path().split(os.pathsep)
    assert places[0] == str(simulation.ROOT)
    assert all(Path(p).is_absolute() for p in places)
