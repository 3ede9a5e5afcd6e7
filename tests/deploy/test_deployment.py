"""The toy on real processes: SuperLink, door, three devices with keys, over TLS on loopback."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedsim import api
from fedsim.app_config import JSON, OUT, SEED, STRATEGY, WAIT
from fedsim.config import Experiment, load_experiment
from fedsim.deploy.device import Device
from fedsim.deploy.keys import device_key
from fedsim.deploy.loopback import Deployment, free_port
from fedsim.deploy.processes import Group
from tests.deploy.test_processes import alive, until

ROOT = Path(__file__).parents[2]
TOY = ROOT / "experiments" / "toy.toml"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def toy(*overrides: str) -> Experiment:
    return load_experiment(TOY, overrides)


def digest(folder: Path) -> dict[str, str]:
    names = ("model.safetensors", "rounds.parquet", "clients.parquet")
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    made = Deployment(tmp_path_factory.mktemp("deployment"))
    try:
        made.start()
        folders = [made.device(i, 3) for i in range(3)]
        made.register([f / "key.pub" for f in folders])
        for folder in folders:
            made.join(folder)
        yield made
    finally:
        made.close()
        assert not alive(str(made.folder)), "something was left over"


def run(deployment: Deployment, experiment: Experiment, out: Path, wait: float = 120.0) -> int:
    return deployment.run(
        {
            JSON: experiment.model_dump_json(),
            STRATEGY: "scaffold",
            SEED: 0,
            OUT: str(out),
            WAIT: wait,
        }
    )


def test_same_bits_as_locally(deployment: Deployment, tmp_path: Path) -> None:
    assert run(deployment, toy(), tmp_path / "deployed") == 0
    api.run(toy(), strategy="scaffold", out=tmp_path / "local")
    assert digest(tmp_path / "deployed") == digest(tmp_path / "local")


def test_a_device_killed_in_a_round(deployment: Deployment, tmp_path: Path) -> None:
    """It is back within 10 s with its state, and the run ends in the same bits."""
    out, folder = tmp_path / "killed", deployment.folder / "device-1"
    experiment = toy("experiment.rounds=4")
    thread = threading.Thread(target=run, args=(deployment, experiment, out))
    thread.start()
    assert until(lambda: bool([*out.glob("checkpoints/round-00000001-*")]), 120)
    log = deployment.group.logs / "superlink.log"
    before = log.read_text(errors="replace").count("Activated node_id")
    for pid in alive(f"{folder}/key"):
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    assert until(lambda: log.read_text(errors="replace").count("Activated node_id") > before, 20), (
        "it is not back"
    )
    back = time.monotonic() - killed
    thread.join(300)
    api.run(experiment, strategy="scaffold", out=tmp_path / "local")
    assert digest(out) == digest(tmp_path / "local")
    assert back < 10, f"it was back after {back:.1f} s"


def test_strangers_are_refused(deployment: Deployment, tmp_path: Path) -> None:
    """Neither the control path, nor the fleet's without a registered key."""
    trust = ssl.create_default_context(cafile=deployment.certificates.authority)
    for path, refused in [
        ("/v1/control/list-runs", {403}),
        ("/v1/fleet/pull-messages", {400, 401}),
    ]:
        link = http.client.HTTPSConnection(*deployment.door, context=trust, timeout=10)
        link.request("POST", path, b"", {"content-type": "application/protobuf"})
        assert link.getresponse().status in refused
    stranger = tmp_path / "stranger"
    known = Device.load(deployment.folder / "device-1")
    replace(known, port=free_port()).save(stranger)
    device_key(stranger / "key")
    with Group(tmp_path) as group:
        node = group.start("stranger", Device.load(stranger).arguments(stranger))
        assert node.wait(timeout=60)
    log = (tmp_path / "stranger.log").read_text()
    assert "All SuperNodes must be registered" in log or "activat" in log.lower()
    assert "SuperNode ID" not in log


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsim.deploy.loopback", "--folder", str(tmp_path / "d")],
        cwd=ROOT,
        start_new_session=True,
    )
    assert until(lambda: (tmp_path / "d" / "device-2" / "supernode.log").exists(), 120)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert until(lambda: not alive(str(tmp_path)), 5)
