"""Places where a test may kill this process. They cost nothing while no test asks for it.

``FL_CRASH_AT=n`` kills the process (SIGKILL, nothing is flushed) at the n-th place it comes by;
``FL_CRASH_LOG=file`` notes the places, so that one whole run tells how many there are.
"""

from __future__ import annotations

import os
import signal

_AT = int(os.environ.get("FL_CRASH_AT", "0"))
_LOG = os.environ.get("FL_CRASH_LOG", "")
_passed = 0


def _count(name: str) -> None:
    global _passed
    _passed += 1
    if _LOG:
        with open(_LOG, "a", encoding="utf-8") as log:
            log.write(f"{name}\n")
    if _passed == _AT:
        os.kill(os.getpid(), signal.SIGKILL)


def _nothing(name: str) -> None:
    pass


crash_here = _count if _AT or _LOG else _nothing
"""Call it as ``crash_here("name of the place")``."""
