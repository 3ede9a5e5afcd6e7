"""One experiment in the four ways in which a user may run it, typed as he would: the same bits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.support import ROOT, alive, belonging, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent
FILES = ("model.safetensors", "rounds.parquet", "clients.parquet")
TOY = "experiments/toy.toml"


def sha256(run: Path) -> str:
    """Of the model, the metrics of the rounds, and what became of every client in every round."""
    return hashlib.sha256(b"".join((run / name).read_bytes() for name in FILES)).hexdigest()


def ways(folder: Path) -> dict[str, list[str]]:
    """The four commands; ``scripts/deploy`` makes an environment and then does the last one."""
    run = [sys.executable, "-m", "fedsim", "run", TOY, "--strategy", "scaffold", "--out"]
    out = {way: str(folder / way) for way in ("local", "ray", "flwr-run", "deploy")}
    return {
        "local": [*run, out["local"]],
        "ray": [*run, out["ray"], "--set", "runtime.name=ray"],
        "flwr-run": [str(BIN / "flwr"), "run", ".", "--stream", "--run-config",
                     f'strategy="scaffold" out="{out["flwr-run"]}"'],
        "deploy": [sys.executable, "-m", "fedsim.deploy.main", "--nodes", "3", "--strategy",
                   "scaffold", "--folder", str(folder / "d"), "--out", out["deploy"]],
    }  # fmt: skip


def test_four_ways_one_hash(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    home = tmp_path / "home"
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    env = {**os.environ, "FLWR_HOME": str(home), "PATH": path}
    try:
        for command in ways(tmp_path).values():
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    finally:
        for pid in belonging(home):  # `flwr run` leaves a SuperLink behind
            os.kill(pid, 15)
    found = {way: sha256(tmp_path / way) for way in ways(tmp_path)}
    print(found)
    assert set(found.values()) == {found["local"]}
    assert until(lambda: not alive(str(tmp_path)), 15)


def test_planted_difference_is_found(tmp_path: Path) -> None:
    """Another learning rate on one of them."""
    runs = {}
    for way, rate in (("local", "0.1"), ("other", "0.1000001")):
        subprocess.run(
            [*ways(tmp_path)["local"][:-1], tmp_path / way, "--set", f"train.lr={rate}"],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        runs[way] = sha256(tmp_path / way)
    assert runs["local"] != runs["other"]
