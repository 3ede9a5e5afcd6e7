"""Other simulators that the engine bench measures, each in an environment of its own.

`scripts/bench-peers` makes the environments; the runners are in the folder `peers`.
"""

from __future__ import annotations

import os
from pathlib import Path

RUNNERS = Path(__file__).with_name("peers")
FEW = {"small": "1"}
"""Threads that suit a workload's products best; two for larger ones."""


def home() -> Path:
    """Where the environments are, as `scripts/bench-peers` finds it."""
    cache = os.environ.get("FEDSIM_CACHE")
    if not cache:
        cache = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/fedsim"
    return Path(os.environ.get("FEDSIM_PEERS") or f"{cache}/peers").expanduser()


def commands(workload: str) -> dict[str, list[str]]:
    """The command of every runner of this workload whose environment is there.

    Args:
        workload: which.
    """
    threads = FEW.get(workload, "2")
    wanted = {
        "pfl": ("pfl", threads, "1"),
        "pfl-2proc": ("pfl", "1", "2"),
        "blazefl": ("blazefl", threads, "1"),
        "blazefl-2threads": ("blazefl", "1", "2"),
        "fluke": ("fluke", threads),
        "fedjax": ("fedjax",),
        "flower": ("flower", "2"),
    }
    if workload == "overhead":  # arrays are scaled, not trained: what these have no place for
        for name in ("fedjax", "blazefl-2threads"):
            del wanted[name]
    found = {}
    for name, (peer, *arguments) in wanted.items():
        python = home() / peer / "bin" / "python"
        if (home() / peer / ".installed").exists():
            script = str(RUNNERS / f"{peer}_runner.py")
            found[name] = [str(python), script, workload, *arguments]
    return found


def surroundings() -> dict[str, str]:
    """Environment variables of the runners: where they import from, and that nobody calls home."""
    folders = (str(RUNNERS.parent), str(RUNNERS))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(folders),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def versions() -> dict[str, str]:
    """What is installed for each peer, and for which there is nothing."""
    found = {}
    for peer in ("pfl", "blazefl", "fluke", "fedjax", "flower"):
        stamp = home() / peer / ".installed"
        found[peer] = stamp.read_text().strip() if stamp.exists() else "not installed"
    return found
