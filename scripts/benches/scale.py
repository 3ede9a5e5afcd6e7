"""Large populations: start-up, seconds per round and memory for 100 to 100,000 clients.

Whole runs, each in a process of its own: MLP 784-64-10, 20 MNIST images for each client (drawn from
the same 5,000, so that what grows is the population and not the data), checkpoint in every round.
Start-up is from the start of the process, imports included, to the first round. Processor time
is hardly changed by what else the machine does; quote it where something else was running.

With --strategy scaffold every client that took part keeps a control variate of 0.2 MB; beyond
--budget bytes they lie in the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

POPULATIONS = (100, 1_000, 10_000, 100_000)
COHORTS = (10, 100, 1_000)
EXAMPLES, ROUNDS, WARM_UP = 20, 12, 3


def shared(indices: Any, clients: int, seed: int) -> Any:
    """A partition: every client has 20 of the examples, which others may have too."""
    from fedsim.core.rng import SERVER, stream
    from fedsim.data import Ragged

    drawn = stream(seed, 0, SERVER, "shared").integers(0, len(indices), (clients, EXAMPLES))
    import numpy as np

    return Ragged.from_lengths(indices[drawn].reshape(-1), np.full(clients, EXAMPLES))


def one(population: int, cohort: int, strategy: str, budget: int, rounds: int) -> dict[str, Any]:
    """A run in this process. Times are taken when a round has been written down."""
    from fedsim import api
    from fedsim.config import Experiment
    from fedsim.runner import Task

    experiment = Experiment.model_validate(
        {
            "experiment": {"name": "scale", "rounds": rounds, "seeds": [0]},
            "data": {
                "dataset": "mnist5k",
                "clients": population,
                "partition": "scale:shared",
                "test_fraction": 0.0,
            },
            "model": {"name": "mlp", "hidden": [64]},
            "cohort": {"size": cohort},
            "train": {"batch_size": 10, "lr": 0.1},
            "evaluate": {"every": rounds, "clients": False},
            "runtime": {"workers": 2, "state_budget": budget},
            "strategy": [{"name": strategy}],
        }
    )
    marks: list[tuple[float, float]] = []
    first = time.time()

    def mark(event: Any) -> None:
        nonlocal first
        if type(event).__name__ == "RoundFinished":
            marks.append((time.perf_counter(), time.process_time()))
        elif type(event).__name__ == "RunStarted":
            first = time.time()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        api.execute(Task(experiment, experiment.strategy[0], 0, path), mark)
        saved = sum(p.stat().st_size for p in (path / "checkpoints").iterdir())
    begun = float(os.environ["SCALE_BEGUN"])
    taken, spent = ([b[i] - a[i] for a, b in pairwise(marks)][WARM_UP:-1] for i in (0, 1))
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return {
        "clients": population,
        "cohort": cohort,
        "strategy": strategy,
        "startup_seconds": first - begun,
        "seconds_per_round": statistics.median(taken),
        "cpu_seconds_per_round": statistics.median(spent),
        "seconds_min": min(taken),
        "seconds_max": max(taken),
        "peak_rss_mb": peak / 1024,
        "checkpoints_mb": saved / 2**20,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| strategy | clients | cohort | start-up s | s/round: median (min–max) | ms per client "
        "| CPU ms per client | peak MB | checkpoints MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['strategy']} | {r['clients']:,} | {r['cohort']:,} | {r['startup_seconds']:.1f} "
        f"| {r['seconds_per_round']:.4g} ({r['seconds_min']:.4g}–{r['seconds_max']:.4g}) "
        f"| {1000 * r['seconds_per_round'] / r['cohort']:.3f} "
        f"| {1000 * r['cpu_seconds_per_round'] / r['cohort']:.3f} | {r['peak_rss_mb']:.0f} "
        f"| {r['checkpoints_mb']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure, print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--strategy", default="fedavg", help="default: fedavg")
    parser.add_argument("--budget", type=int, default=2**30, help="bytes of states in memory")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--clients", type=int, action="append", help="only so many; repeatable")
    parser.add_argument("--cohort", type=int, action="append", help="only so many; repeatable")
    options = parser.parse_args(argv)
    rows = []
    for population in options.clients or POPULATIONS:
        for cohort in options.cohort or COHORTS:
            if cohort > population:
                continue
            asked = [population, cohort, options.strategy, options.budget, options.rounds]
            rows.append(_measure(asked))
            if options.json:
                options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


def _measure(asked: list[Any]) -> dict[str, Any]:
    """One row, from a process of its own."""
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    done = subprocess.run(
        [sys.executable, str(here), *map(str, asked)],
        env={**os.environ, "PYTHONPATH": path, "SCALE_BEGUN": repr(time.time())},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    numbers = [int(value) if value.isdigit() else value for value in sys.argv[1:]]
    print(json.dumps(one(*numbers)))  # type: ignore[arg-type]
