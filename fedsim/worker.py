"""Runs of a comparison in a process of their own; `fedsim.jobs` starts it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any, TextIO

from fedsim.api import execute
from fedsim.core.errors import FedsimError, RunError
from fedsim.core.events import Event
from fedsim.jobs import ERRORS, GRACE, read


def main() -> None:
    """Run the tasks on standard input; what happens goes to standard output, line by line."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no part of it
    sys.path.append(os.getcwd())  # a user's own strategy, named as "module:Class"
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    with suppress(KeyboardInterrupt):
        while True:
            _serve(lines.get(), out)


def _serve(line: str, out: TextIO) -> None:
    def on_event(event: Event) -> None:
        _say(out, {"event": type(event).__name__, **asdict(event)})

    try:
        result = execute(read(line), on_event)
        _say(out, {**asdict(result), "path": str(result.path)})
    except FedsimError as error:
        names = (kind.__name__ for kind in type(error).__mro__)
        kind = next((name for name in names if name in ERRORS), RunError.__name__)
        _say(out, {"failed": kind, "text": str(error)})
    except Exception as error:
        bug = f"{type(error).__name__}: {error}"
        _say(out, {"bug": bug, "traceback": traceback.format_exc()})


def _say(out: TextIO, content: dict[str, Any]) -> None:
    out.write(json.dumps(content) + "\n")
    out.flush()


def _listen(lines: SimpleQueue[str]) -> None:
    """Pass lines on. When the parent closes the pipe or is gone, interrupt the run, or else end."""
    rest = b""
    while data := os.read(0, 1 << 16):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            lines.put(line.decode())
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os._exit(1)


if __name__ == "__main__":
    main()
