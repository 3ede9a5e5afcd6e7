"""Which nodes a run has met, so that a server that was killed does not ask all of them again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsim.runtime.envelope import Enrolment


class Roll:
    """What nodes have said of themselves, on disk.

    An entry holds as long as the node has stayed online: one that went away and came back may
    serve other clients, and is asked again. A damaged file is an empty one.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        if path is not None:
            try:
                found = json.loads(path.read_text())
                self._entries = found if isinstance(found, dict) else {}
            except (OSError, ValueError):
                pass

    def known(self, node: int, since: str, digest: str) -> Enrolment | None:
        """What a node has said; None if it has to be asked.

        Args:
            node: Flower's node id.
            since: when it came online last, as Flower says it.
            digest: names the code of the server; what was said by other code does not count.
        """
        entry = self._entries.get(str(node))
        if not isinstance(entry, dict) or not since or entry.get("since") != since:
            return None
        try:
            clients, train, test = (tuple(map(int, entry[n])) for n in ("clients", "train", "test"))
        except (KeyError, TypeError, ValueError):
            return None
        if entry.get("digest") != digest or not len(clients) == len(train) == len(test):
            return None
        return Enrolment(clients, train, test, digest)

    def note(self, node: int, since: str, said: Enrolment) -> None:
        """Keep what a node has said."""
        self._entries[str(node)] = {"since": since, **asdict(said)}

    def save(self) -> None:
        """Write the file, whole or not at all; it may be lost, for nodes can be asked again."""
        if self._path is None:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._entries))
        temporary.replace(self._path)
