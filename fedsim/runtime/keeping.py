"""What a client keeps between its rounds, on the disk of the machine it lives on.

Flower keeps `Context.state` in memory: it is gone when a SuperNode restarts. And a server that
resumes from a checkpoint repeats rounds, for which the client needs the state from before them.
So the state is written once a message was answered, under the round it belongs to, and the
versions that the server's checkpoints may still ask for are kept.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict

from fedsim.core.errors import RunError
from fedsim.core.packing import content_of, pack, tree_of, unpack

RUNS_KEPT = 4
"""Runs whose state a device keeps; the oldest go first."""

Moment = tuple[int, int]
"""Round, and number of the message in that round."""


@dataclass(frozen=True)
class Keeping:
    """The states of one run's clients.

    Attributes:
        folder: where the device keeps state.
        run: name of the run, lower-case letters and digits.
    """

    folder: Path
    run: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-z]{1,64}", self.run):
            raise RunError(f"run {self.run!r} is no name for a folder")

    def _place(self, client: int) -> Path:
        return self.folder / self.run / f"client-{client}"

    def _versions(self, client: int) -> list[tuple[Moment, Path]]:
        found = []
        for path in self._place(client).glob("*-*.safetensors"):
            number, phase = path.stem.split("-")
            found.append(((int(number), int(phase)), path))
        return sorted(found)

    def load(self, client: int, moment: Moment) -> RecordDict:
        """The client's state as it was before `moment`; empty if there was none.

        Raises:
            RunError: the file is damaged.
        """
        before = [path for at, path in self._versions(client) if at < moment]
        if not before:
            return RecordDict()
        try:
            return content_of(unpack(before[-1].read_bytes()))
        except (OSError, ValueError) as error:
            raise RunError(f"the client's state {before[-1]} cannot be read: {error}") from None

    def save(self, client: int, moment: Moment, state: RecordDict, floor: int) -> None:
        """Keep the state as it is after `moment`; drop versions that nobody can ask for.

        Args:
            client: partition number.
            moment: the message just answered. Later versions are of rounds that are repeated now.
            state: the whole state.
            floor: the oldest round from which the server may resume.
        """
        place = self._place(client)
        if not place.exists():
            self._make(place)
        final = place / f"{moment[0]:08d}-{moment[1]:04d}.safetensors"
        temporary = place / f".{final.name}.{os.getpid()}.tmp"
        with temporary.open("wb") as file:
            file.write(pack(tree_of(state)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
        versions = self._versions(client)
        old = [path for at, path in versions if at[0] <= floor][:-1]
        for path in old + [path for at, path in versions if at > moment]:
            path.unlink(missing_ok=True)

    def _make(self, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        others = [p for p in self.folder.iterdir() if p.is_dir() and p.name != self.run]
        others.sort(key=lambda p: p.stat().st_mtime)
        for path in others[: max(0, len(others) - RUNS_KEPT + 1)]:
            shutil.rmtree(path, ignore_errors=True)
