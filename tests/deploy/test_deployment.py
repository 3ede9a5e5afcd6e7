"""The same experiment on real processes: SuperLink, door, devices with keys, TLS on loopback."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsim import api
from fedsim.config import Experiment
from fedsim.deploy.device import Device
from fedsim.deploy.keys import certificates, device_key
from fedsim.deploy.loopback import Deployment, free_port
from fedsim.deploy.processes import Group, command
from fedsim.deploy.session import conduct
from tests.deploy.support import (
    ROOT,
    Background,
    Edge,
    alive,
    attentive,
    belonging,
    digest,
    federation,
    reached,
    rows,
    task_of,
    toy,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHAPES: dict[str, dict[str, Any]] = {
    "one model a cluster": {"name": "fedap", "warmup_rounds": 1, "cut": "k", "k": 2},
    "seeds and scalars": {"name": "fedkseed", "pool": 4096, "steps": 200, "lr": 1e-3},
    "adapters": {"name": "fedit"},
    "one model a node": {"name": "dfedsam", "rho": 0.05},
}
LIVES: dict[str, dict[str, Any]] = {
    "nodes hold their models": {"name": "gossip_relay", "rho": 0.05, "gossip_steps": 2},
    "masks": {"name": "dispfl"},
    "pools of labels": {"name": "kafal", "rounds_per_cycle": 1, "participation": 1.0},
    "a rule alone": {"name": "active_learning", "rule": "badge", "rounds_per_cycle": 1},
    "fused knowledge": {"name": "knfu"},
    "one consensus": {"name": "fedmd", "alignment": 20},
    "votes": {"name": "selective_fd"},
    "distilled on the server": {"name": "feddf", "server_steps": 3},
    "local, held by the server": {"name": "local"},
    "local, held by clients": {"name": "local_only"},
    "pruned": {"name": "fedspine", "step": 0.3, "interval": 2},
}
"""Rounds of several phases, clients that keep something, messages of other shapes."""
CUT_OFF = 25.0
DOWN, UP = 16 + 4 * 4096, 20 + 6 * 200
"""Bytes of FedKSeed's messages for K = 4096 and 200 steps: header, accumulators; header, pairs."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, list[Edge]]]:
    with federation(tmp_path_factory.mktemp("deployment"), 3) as made:
        yield made


def shape(strategy: dict[str, Any], rounds: int = 3) -> Experiment:
    """Some rounds with a strategy of some shape, judged at the end."""
    model: Any = {"name": "mlp", "hidden": [16]}
    if strategy["name"] in ("fedit", "fedspine"):
        model = {"name": "lora", "base": "mlp", "rank": 4}
        model["prunable"] = strategy["name"] == "fedspine"
    return Experiment.model_validate(
        {
            "experiment": {"name": "shape", "rounds": rounds, "seeds": [0]},
            "data": {
                "dataset": "digits", "clients": 3, "central_test_fraction": 0.5, "public": 40,
            },
            "model": model,
            "train": {"max_steps": 4},
            "evaluate": {"every": rounds},
            "runtime": {"executor": "serial"},
            "strategy": [strategy],
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_the_bits_it_has_here(name: str, running: Any, tmp_path: Path) -> None:
    deployment, _ = running
    task = task_of(shape(SHAPES[name]), tmp_path / "deployed", SHAPES[name]["name"])
    conduct(deployment, task)
    api.execute(replace(task, path=tmp_path / "local"))
    assert digest(task.path) == digest(tmp_path / "local")
    if name == "seeds and scalars":
        trained = [r for r in rows(task.path) if r["status"] == "ok"]
        assert len(trained) == 9
        for row in trained:  # beside the packet: its name and numpy's head, settings, metrics
            print(f"round {row['round']}: {row['bytes_down']} B down, {row['bytes_up']} B up")
            assert DOWN <= row["bytes_down"] - 134 < DOWN + 400
            assert UP <= row["bytes_up"] - 134 < UP + 400


@pytest.mark.parametrize("name", LIVES)
def test_so_has_every_kind_of_life_on_a_client(name: str, running: Any, tmp_path: Path) -> None:
    """Two rounds of each, one after another, on the same devices; every message is a process."""
    deployment, _ = running
    task = task_of(shape(LIVES[name], 2), tmp_path / "deployed", LIVES[name]["name"])
    conduct(deployment, task)
    api.execute(replace(task, path=tmp_path / "local"))
    assert digest(task.path) == digest(tmp_path / "local")
    assert {r["status"] for r in rows(task.path) if r["status"]} == {"ok"}


def test_a_device_that_hangs_costs_the_cut_off(running: Any, tmp_path: Path) -> None:
    """It is late in its round, what it says afterwards is of a stale round, and it goes on."""
    deployment, edges = running
    run = Background(
        deployment,
        task_of(toy("experiment.rounds=4", f"cohort.timeout={CUT_OFF}"), tmp_path / "run"),
    )
    assert until(lambda: reached(tmp_path / "run", 1), 200)
    before = edges[2].tasks()
    assert until(lambda: edges[2].tasks() > before, 100)
    edges[2].signal(signal.SIGSTOP)
    assert until(lambda: reached(tmp_path / "run", 2), 100)
    edges[2].signal(signal.SIGCONT)
    out = run.finish()
    said = {(r["round"], r["client"]): (r["status"], r["reason"] or "") for r in rows(out)}
    assert said[2, 2][0] == "late"
    assert any("stale_round" in reason for (_, client), (_, reason) in said.items() if client == 2)
    assert said[4, 2][0] == "ok"
    assert all(said[n, c][0] == "ok" for n in range(1, 5) for c in range(2))
    took = {r["round"]: r["wall_seconds"] for r in rows(out, "timings")}
    print("rounds took", {n: round(s, 1) for n, s in took.items()})
    assert took[2] < CUT_OFF + 5


def test_a_device_that_dies_costs_the_cut_off(running: Any, tmp_path: Path) -> None:
    """It stays away for two rounds; the others go on, and it is asked again when it is back."""
    deployment, edges = running
    run = Background(
        deployment,
        task_of(toy("experiment.rounds=5", f"cohort.timeout={CUT_OFF}"), tmp_path / "run"),
    )
    assert until(lambda: reached(tmp_path / "run", 1), 200)
    before = edges[1].tasks()
    assert until(lambda: edges[1].tasks() > before, 100)
    edges[1].cut()
    assert until(lambda: reached(tmp_path / "run", 3), 200)
    edges[1].start()
    out = run.finish()
    said = {(r["round"], r["client"]): r["status"] for r in rows(out)}
    assert said[2, 1] in ("late", "error")
    assert said[5, 1] == "ok"
    assert [r["abandoned"] for r in rows(out, "rounds")] == [False] * 6
    took = {r["round"]: r["wall_seconds"] for r in rows(out, "timings")}
    print("rounds took", {n: round(s, 1) for n, s in took.items()})
    assert took[2] < CUT_OFF + 5


def test_the_goal_ends_the_round(running: Any, tmp_path: Path) -> None:
    """Two of three are enough: a device that hangs costs nothing."""
    deployment, edges = running
    wanted = ["cohort.size=2", "cohort.overselect=0.5", "cohort.timeout=300"]
    run = Background(deployment, task_of(toy("experiment.rounds=2", *wanted), tmp_path / "run"))
    assert until(lambda: reached(tmp_path / "run", 0), 200)
    before = edges[0].tasks()
    assert until(lambda: edges[0].tasks() > before, 100)
    edges[0].signal(signal.SIGSTOP)
    assert until(lambda: reached(tmp_path / "run", 1), 60), "the round waits for everybody"
    edges[0].signal(signal.SIGCONT)
    out = run.finish()
    [first] = [r for r in rows(out, "rounds") if r["round"] == 1]
    assert (first["sampled"], first["admitted"], first["abandoned"]) == (3, 2, False)
    took = {r["round"]: r["wall_seconds"] for r in rows(out, "timings")}
    print("rounds took", {n: round(s, 1) for n, s in took.items()})


def test_planted_patience_is_found(running: Any, tmp_path: Path) -> None:
    """With neither cut-off nor goal a device that hangs holds up everybody."""
    deployment, edges = running
    run = Background(deployment, task_of(toy("experiment.rounds=1"), tmp_path / "run"))
    assert until(lambda: reached(tmp_path / "run", 0), 200)
    before = edges[0].tasks()
    assert until(lambda: edges[0].tasks() > before, 100)
    edges[0].signal(signal.SIGSTOP)
    assert not until(lambda: reached(tmp_path / "run", 1), CUT_OFF + 5)
    edges[0].signal(signal.SIGCONT)
    run.finish()


# ------------------------------------------------------------------------------------- access


def ask(deployment: Deployment, path: str, port: int = 0, authority: Path | None = None) -> int:
    trust = ssl.create_default_context(cafile=authority or deployment.certificates.authority)
    host, door = deployment.door
    link = http.client.HTTPSConnection(host, port or door, context=trust, timeout=10)
    link.request("POST", path, b"", {"content-type": "application/protobuf"})
    return link.getresponse().status


def supernode(tmp_path: Path, device: Device, key: Path | None = None) -> str:
    """What a SuperNode says that must not get in."""
    folder = tmp_path / "stranger"
    device.save(folder)
    if key is None:
        device_key(folder / "key")
    else:
        (folder / "key").write_bytes(key.read_bytes())
    with Group(tmp_path) as group:
        home = {"FLWR_HOME": str(folder / "flwr")}
        node = group.start(
            "stranger", [sys.executable, "-m", "fedsim.deploy.node", str(folder)], env=home
        )
        ended = until(lambda: node.poll() is not None, 45)
        said = (tmp_path / "stranger.log").read_text()
    assert "SuperNode ID" not in said
    return said if ended else "it keeps trying"


def test_only_the_fleets_path_is_open(running: Any, tmp_path: Path) -> None:
    deployment, _ = running
    for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/pull-task-input"):
        assert ask(deployment, path) == 403
    # Planted: whoever is let past the door, or reaches the SuperLink's own port, is not refused.
    assert ask(deployment, "/v1/control/list-runs", deployment.control) != 403
    assert ask(deployment, "/v1/fleet/pull-messages") in (400, 401)
    with pytest.raises(ssl.SSLError):
        ask(deployment, "/", authority=certificates(tmp_path / "other").authority)


def test_the_superlink_is_on_the_loopback_address_only(running: Any) -> None:
    deployment, _ = running
    port = f":{deployment.control:04X}"
    heard = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if local.endswith(port) and state == "0A":
                heard.append(local.split(":")[0])
    assert heard == ["0100007F"]


def test_strangers_are_refused(running: Any, tmp_path: Path) -> None:
    """A key that nobody has registered; a server that another authority vouches for."""
    _, edges = running
    known = Device.load(edges[1].folder)
    said = supernode(tmp_path / "a", replace(known, port=free_port()))
    assert "Failed to activate SuperNode" in said
    other = certificates(tmp_path / "other").authority
    said = supernode(
        tmp_path / "b",
        replace(known, port=free_port(), authority=str(other)),
        edges[1].folder / "key",
    )
    assert "SuperNode ID" not in said


def test_a_revoked_key_is_out_within_a_heartbeat(tmp_path: Path) -> None:
    with federation(tmp_path / "d", 1) as (deployment, [edge]):
        node = edge.log.rpartition("SuperNode ID: ")[2].split()[0]
        out = subprocess.run(
            [command("flwr"), "supernode", "unregister", node, "here"],
            env={**os.environ, "FLWR_HOME": str(deployment.home)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert out.returncode == 0, out.stdout + out.stderr
        joined = edge.joined
        assert until(lambda: "Exit Code" in edge.log or edge.joined == 0, 60)
        assert not until(lambda: edge.joined > joined, 10)


# ------------------------------------------------------------------------------------- endings


def test_fewer_devices_than_clients_take_turns(running: Any, tmp_path: Path) -> None:
    deployment, _ = running
    task = task_of(toy("data.clients=4"), tmp_path / "run")
    conduct(deployment, task)  # device 0 has the clients 0 and 3
    assert {r["client"] for r in rows(task.path) if r["status"] == "ok"} == {0, 1, 2, 3}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["starting", "running"])
def test_endings_leave_nothing(number: int, phase: str, tmp_path: Path) -> None:
    """Ctrl-C, SIGTERM or a killed parent, in every phase: nothing is left after five seconds."""
    folder = tmp_path / "d"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsim.deploy.main", "--folder", str(folder)],
        cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=attentive,
    )  # fmt: skip
    signs = {
        "starting": lambda: (folder / "logs" / "superlink.log").exists(),
        "running": lambda: reached(folder / "run", 0),
    }
    assert until(signs[phase], 200)
    process.send_signal(number)
    assert process.wait(timeout=30) in {2: (130,), 15: (143,), 9: (-9,)}[number]
    assert until(lambda: not belonging(folder), 5 if number == signal.SIGKILL else 0.5)
    assert not alive(str(folder))
    said = process.stderr.read() if process.stderr else ""
    assert "Traceback" not in said
    if number != signal.SIGKILL:
        assert "interrupted; everything it started was stopped" in said
