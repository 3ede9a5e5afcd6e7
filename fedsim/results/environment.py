"""What a run ran on: written once into `environment.json`."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("fedsim-flower", "flwr", "torch", "numpy", "scipy", "pyarrow")
"""Distributions whose versions can change a result."""


def environment() -> dict[str, Any]:
    """Versions, machine, git state of the working folder, and the command line; JSON-able.

    What cannot be found out is null: a package that is not installed, a folder outside git.
    """
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "git_commit": (commit := _git("rev-parse", "HEAD")),
        "git_dirty": None if commit is None else bool(_git("status", "--porcelain", "-uno")),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _git(*arguments: str) -> str | None:
    """Standard output of a git command in the working folder; None where git or a commit lacks."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
