"""What a checkpoint after every round costs: milliseconds, and its share of the round.

Runs a strategy without clients' states and one with them on the digits: 50,035 parameters, 40
clients, 10 of them in each round, one epoch, and every round's checkpoint synced to the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsim.config import Experiment
from fedsim.runner import Run, Task

STRATEGIES = ("fedavg", "scaffold")


Seconds = list[tuple[float, float]]
"""Of each call: by the clock, and of the processor."""


def timed(call: Callable[..., Any], seconds: Seconds) -> Callable[..., Any]:
    """The call, whose seconds are noted."""

    def noting(*args: Any, **kwargs: Any) -> Any:
        start, worked = time.perf_counter(), time.process_time()
        try:
            return call(*args, **kwargs)
        finally:
            seconds.append((time.perf_counter() - start, time.process_time() - worked))

    return noting


def measure(strategy: str, rounds: int, folder: Path) -> tuple[Seconds, Seconds, int]:
    """Seconds of every checkpoint and of every round without it; bytes written to the disk."""
    experiment = Experiment.model_validate(
        {
            "experiment": {"name": "journal", "rounds": rounds, "seeds": [0]},
            "data": {"dataset": "digits", "clients": 40},
            "model": {"name": "mlp", "hidden": [667]},
            "cohort": {"size": 10},
            "runtime": {"workers": 1},
            "strategy": [{"name": strategy}],
        }
    )
    run = Run(Task(experiment, experiment.strategy[0], 0, folder))
    assert run.env.model.layout.num_trainable == 50_035
    saves: Seconds = []
    advances: Seconds = []
    journal: Any = run.journal
    journal.save = timed(journal.save, saves)
    federation: Any = run.federation
    federation.advance = timed(federation.advance, advances)
    before = written()
    run.execute()
    return saves[1:], advances, written() - before


def written() -> int:
    """Bytes that this process has had written to a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def main(argv: Sequence[str]) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="scripts/bench journal", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary")
    given = parser.parse_args(argv)
    print("Milliseconds, medians: by the clock, and of the processor.\n")
    print("| strategy | checkpoint | | rest of a round | | share | | MB a round |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for strategy in STRATEGIES:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            saves, advances, size = measure(strategy, given.rounds, Path(folder) / "run")
        pairs = []
        for kind in (0, 1):
            save, rest = (statistics.median(x[kind] for x in t) * 1e3 for t in (saves, advances))
            pairs.append((f"{save:.1f}", f"{rest:.1f}", f"{save / (save + rest):.0%}"))
        columns = [value for column in zip(*pairs, strict=True) for value in column]
        print("|", " | ".join([strategy, *columns, f"{size / given.rounds / 1e6:.2f}"]), "|")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
