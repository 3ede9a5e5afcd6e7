"""Golden runs: three rounds of every strategy on a toy, as a hash and as a few numbers.

The hash covers everything a run leaves: what the server holds, the strategy's state, what clients
keep, and the tables. It holds where it was recorded: another processor or another build of torch
adds in another order. There the numbers are compared, to a relative 1e-6.

``python -m tests.faults.golden`` records them anew; do that when a change of bits is meant, and say
so in the commit.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.serverapp import Grid

from fedsim.core.packing import pack, tree_of
from fedsim.core.records import from_record
from fedsim.federation import Federation, Progress
from fedsim.runtime.grid import LocalGrid
from tests.contract import toy
from tests.contract.rows import Row
from tests.faults.runs import STRATEGIES

FILE = Path(__file__).with_name("golden.json")


def made(
    row: Row, wrap: Callable[[LocalGrid], Grid] = lambda grid: grid, **sections: Any
) -> tuple[Federation, LocalGrid]:
    """A toy federation in which everything is evaluated, and the grid where its clients are."""
    inside: list[LocalGrid] = []

    def note(grid: LocalGrid) -> Grid:
        inside.append(grid)
        return wrap(grid)

    fed = row.federation(wrap=note, evaluate={"clients_every": 1}, **sections)
    return fed, inside[0]


def bits(fed: Federation, progress: Progress, clients: dict[int, Any]) -> str:
    """SHA-256 of all that a run holds: models, states and history."""
    tables = [[dict(sorted(r.items())) for r in t] for t in (progress.rounds, progress.clients)]
    states = {str(node): tree_of(state) for node, state in sorted(clients.items())}
    server = dict(sorted(from_record(progress.arrays).items()))
    return hashlib.sha256(pack([server, fed.strategy.state_dict(), states, tables])).hexdigest()


def whole(row: Row, **options: Any) -> tuple[str, list[float]]:
    """Hash and numbers of a run that nothing disturbs."""
    fed, grid = made(row, **options)
    progress = toy.run(fed)
    found = bits(fed, progress, grid.changed_states())
    server = from_record(progress.arrays).values()
    norm = float(sum((t.double() ** 2).sum() for t in server)) ** 0.5
    last = progress.rounds[-1]
    shown = (last.get(n) for n in ("loss", "accuracy", "client_loss", "client_accuracy"))
    return found, [norm, *(float(n) for n in shown if n is not None)]


def where() -> dict[str, str]:
    """What the bits depend on besides the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n") if info.exists() else []
    flags = next((sorted(x.split(":")[1].split()) for x in lines if x.startswith("flags")), [])
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16],
    }


def main() -> None:
    """Record all of them."""
    torch.set_num_threads(1)
    runs = {row.strategy: whole(row) for row in STRATEGIES}
    content = {
        "where": where(),
        "runs": {name: {"sha256": h, "numbers": n} for name, (h, n) in sorted(runs.items())},
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
