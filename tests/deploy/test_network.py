"""Nothing calls home: everything runs where there is no network, and nothing tries to reach one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.support import ROOT, digest

OUTSIDE = re.compile(r'connect\(.*sa_family=AF_INET6?.*?"(?!127\.|::1")([0-9a-fA-F.:]+)"')


def enclosed(*command: str, trace: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run in a network namespace that has a loopback device and nothing else."""
    traced = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect", "-o", str(trace)]
    inside = 'ip link set lo up && exec "$@"'
    return subprocess.run(
        [*(traced if trace else []), "unshare", "-n", "sh", "-c", inside, "sh", *command],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def possible() -> bool:
    """Whether this machine lets us make such a namespace, and watch."""
    tools = all(shutil.which(t) for t in ("strace", "unshare", "ip"))
    return tools and enclosed("true").returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not possible(), reason="needs strace, ip and leave to make a namespace"),
]


def test_a_deployment_reaches_out_to_nobody(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    done = enclosed(
        *(sys.executable, "-m", "fedsim.deploy.main", "--folder", str(tmp_path / "d")), trace=trace
    )
    assert done.returncode == 0, done.stderr
    text = trace.read_text()
    assert "127.0.0.1" in text
    assert OUTSIDE.findall(text) == []


def test_ray_and_a_local_run_need_no_network(tmp_path: Path) -> None:
    for name in ("ray", "local"):
        done = enclosed(
            *(sys.executable, "-m", "fedsim", "run", "experiments/toy.toml"),
            *("--set", f"runtime.name={name}", "--out", str(tmp_path / name)),
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert digest(tmp_path / "ray") == digest(tmp_path / "local")


def test_planted_call_home_is_found(tmp_path: Path) -> None:
    call = (
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    )
    enclosed(sys.executable, "-c", call, trace=tmp_path / "trace")
    assert OUTSIDE.findall((tmp_path / "trace").read_text()) == ["192.0.2.1"]
