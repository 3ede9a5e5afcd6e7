"""Ends every process of a group once the one that started them is gone, however it went.

``python guard.py TOKEN`` reads standard input, a pipe that only the starter writes to: when it
closes, the starter has ended, been interrupted, or been killed. Every process started by it, and
every one started by those in turn, carries the token in its environment, also in a session of its
own. The standard library only, so that it is up in no time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "FEDSIM_GROUP"
GRACE = 4.0
"""Seconds between asking and killing."""


def members(token: str) -> list[int]:
    """Ids of the processes of a group."""
    mark, found = f"{VARIABLE}={token}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or somebody else's
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return [pid for pid in found if pid != os.getpid()]


def end(token: str, grace: float = GRACE) -> None:
    """Ask all processes of a group to end; kill those that have not after some seconds."""
    deadline = time.monotonic() + grace
    _signal(members(token), signal.SIGTERM)
    while (left := members(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    while left:
        _signal(left, signal.SIGKILL)
        time.sleep(0.05)
        left = [pid for pid in members(token) if not is_gone(pid)]


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, also if nobody has taken note yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def main() -> None:
    """See above."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(4096):
        pass
    end(sys.argv[1])


if __name__ == "__main__":
    main()
