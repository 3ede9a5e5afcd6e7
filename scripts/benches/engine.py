"""The engine against a plain PyTorch loop: seconds per round and memory, runners taking turns.

Every runner is a process of its own, which serves a few rounds whenever it is its turn, so that a
busy machine disturbs all alike. Quote ratios, not times.

    small       1,000 clients, cohort 100, MLP 784-64-10, 20 MNIST images each
    cnn_small   100 clients, cohort 10, small CNN (167,562 parameters), 50 images each
    cnn         100 clients, cohort 10, CNN (1,626,442 parameters), 50 images each
    overhead    100 clients, all in the cohort, one tensor of 10 MB, no training

    fedsim, fedsim-serial   whole rounds, with messages, gate, sums and the clients' rows
    plain                   sequential FedAvg by hand; the better of one and two threads
    sum                     overhead only: nothing but the sum of arrays that are there already

With --peers also pfl, BlazeFL, fluke, FedJAX and Flower's simulation, as far as scripts/bench-peers
has made their environments; this takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _peers

WORKER = Path(__file__).with_name("_workloads.py")
ROOT = WORKER.parents[2]
NAMES = ("small", "cnn_small", "cnn", "overhead")
ROUNDS = {"small": 6, "cnn_small": 2, "cnn": 1, "overhead": 1}
"""Rounds of one turn."""
COHORT = {"small": 100, "cnn_small": 10, "cnn": 10, "overhead": 100}


class Runner:
    """One runner of one workload in a process of its own."""

    def __init__(self, workload: str, name: str, command: Sequence[str] = ()) -> None:
        self.name = name
        self.wall: list[float] = []
        self.cpu: list[float] = []
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [*command] or [sys.executable, str(WORKER), workload, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_peers.surroundings() if command else {**os.environ, "PYTHONPATH": path},
            cwd=_peers.RUNNERS if command else None,  # fluke imports from the folder above it
        )

    def read(self) -> dict[str, Any]:
        """The next line of the process. Raises `RuntimeError` if it died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"runner {self.name} ended; its errors are above")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self, rounds: int) -> None:
        """So many rounds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rounds}\n")
        self._process.stdin.flush()
        found = self.read()
        self.wall += found["wall"]
        self.cpu += found["cpu"]

    def close(self) -> float:
        """End the process; peak of its memory in MB."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = float(self.read()["peak_rss_mb"])
        self._process.wait()
        return peak

    def kill(self) -> None:
        """End the process whatever it does."""
        self._process.kill()
        self._process.wait()


def measure(workload: str, turns: int, peers: bool = False) -> list[dict[str, Any]]:
    """Rows of one workload."""
    names = ["fedsim", "fedsim-serial", "plain-t1", "plain-t2"]
    names += ["sum-t1", "sum-t2"] if workload == "overhead" else []
    runners = [Runner(workload, name) for name in names]
    try:
        for runner in runners:
            runner.read()
        if peers:
            runners += _started(workload)
        for turn in range(turns):
            shift = turn % len(runners)
            for runner in runners[shift:] + runners[:shift]:
                runner.turn(ROUNDS[workload])
        peaks = {runner.name: runner.close() for runner in runners}
    finally:
        for runner in runners:
            runner.kill()
    rows = {r.name: row(workload, r, peaks[r.name]) for r in runners}
    for kind in ("plain", "sum"):
        both = [rows.pop(f"{kind}-t{n}") for n in (1, 2) if f"{kind}-t{n}" in rows]
        if both:
            best = min(both, key=lambda r: r["seconds_per_round"])
            rows[kind] = {**best, "runner": kind, "threads": int(best["runner"][-1])}
    return list(rows.values())


def _started(workload: str) -> list[Runner]:
    """The peers, started one after another; one that cannot run is named and left out."""
    found = []
    for name, command in _peers.commands(workload).items():
        runner = Runner(workload, name, command)
        try:
            runner.read()
        except RuntimeError as error:
            print(f"{workload}: {name} is left out: {error}", file=sys.stderr)
            runner.kill()
            continue
        found.append(runner)
    return found


def row(workload: str, runner: Runner, peak: float) -> dict[str, Any]:
    """What one runner took: medians, and the range."""
    seconds = statistics.median(runner.wall)
    return {
        "workload": workload,
        "runner": runner.name,
        "seconds_per_round": seconds,
        "seconds_min": min(runner.wall),
        "seconds_max": max(runner.wall),
        "cpu_seconds_per_round": statistics.median(runner.cpu),
        "clients_per_second": COHORT[workload] / seconds,
        "peak_rss_mb": peak,
        "rounds": len(runner.wall),
    }


def environment() -> dict[str, Any]:
    """Machine and versions."""
    import numpy as np
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": list(os.getloadavg()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| workload | runner | s/round: median (min–max) | clients/s | plain ÷ it | CPU s/round "
        "| peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = {r["workload"]: r["seconds_per_round"] for r in rows if r["runner"] == "plain"}
    for r in rows:
        ratio = plain[r["workload"]] / r["seconds_per_round"]
        lines.append(
            f"| {r['workload']} | {r['runner']} | {r['seconds_per_round']:.4g} "
            f"({r['seconds_min']:.4g}–{r['seconds_max']:.4g}) | {r['clients_per_second']:.0f} "
            f"| {ratio:.2f} | {r['cpu_seconds_per_round']:.4g} | {r['peak_rss_mb']:.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure, print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--workload", action="append", choices=NAMES, help="only this one")
    parser.add_argument("--turns", type=int, default=8, help="turns of each runner (default: 8)")
    parser.add_argument("--peers", action="store_true", help="other simulators too")
    options = parser.parse_args(argv)
    content: dict[str, Any] = {"rows": [], "environment": environment()}
    if options.peers:
        content["environment"]["peers"] = _peers.versions()
    for workload in options.workload or NAMES:
        content["rows"] += measure(workload, options.turns, options.peers)
        if options.json:  # after each, so that an interrupted bench leaves what it has
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content["rows"]))
    return 0
