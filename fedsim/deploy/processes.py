"""Child processes that never outlive the program that started them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from fedsim.core.errors import RunError
from fedsim.deploy import guard

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Nothing calls home, nothing is installed at run time."""


def command(name: str) -> str:
    """A program of the environment that this Python belongs to."""
    return str(Path(sys.executable).parent / name)


class Group:
    """Processes that end together: with the block, on Ctrl-C, or when this process is killed.

    Args:
        logs: folder for their output, one file each.
        held: files that stay open until the last of the processes has ended; a lock on one of them
            is free only then.
    """

    def __init__(self, logs: Path, held: Sequence[int] = ()) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._token = secrets.token_hex(8)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._brief: set[str] = set()
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, self._token],
            stdin=subprocess.PIPE,
            pass_fds=held,
            start_new_session=True,
        )

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        brief: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a process; its output goes to ``NAME.log``; `brief` if it may end by itself."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        surroundings = {**os.environ, **QUIET, "PATH": path, guard.VARIABLE: self._token}
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(arguments),
                cwd=cwd,
                env={**surroundings, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        self.running[name] = process
        self._brief |= {name} if brief else set()
        return process

    def end(self, name: str) -> None:
        """Kill a process at once, and all that it started."""
        process = self.running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session outlives it
        process.wait()

    def until(self, ready: Callable[[], bool], what: str, timeout: float) -> None:
        """Wait for something.

        Raises:
            RunError: a process has ended in the meantime, or it took too long.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise RunError(f"{what} took more than {timeout:g} s; the logs are in {self.logs}")
            time.sleep(0.2)

    def check(self) -> None:
        """Raise `RunError` if a process has ended."""
        for name, process in self.running.items():
            if process.poll() is not None and name not in self._brief:
                raise RunError(
                    f"{name} ended with exit code {process.returncode}: {self.tail(name)}"
                )

    def tail(self, name: str) -> str:
        """The last line of a process's output."""
        lines = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "no output")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self._guard.wait()
        for process in self.running.values():
            process.wait()
