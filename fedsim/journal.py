"""Checkpoints, so that a run killed at any moment resumes to the same bits.

A checkpoint is one file (see `fedsim.core.packing`) whose name carries the digest of its bytes: a
flipped bit anywhere in it is noticed, and the generation before it is used. Two things grow with
the run and are not written again every round: the history, an append-only file of JSON lines of
which the checkpoint knows length and digest, and the clients' states, of which only those that
changed are written; few changes are merged into bigger files, so a client's state is written again
only some times however long the run is.

Files appear whole or not at all: write, fsync, rename, fsync the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.core.errors import RunError
from fedsim.core.packing import pack, unpack
from fedsim.failpoints import crash_here

FORMAT = 2
TABLES = ("rounds", "client_rows", "timings")
_NAME = re.compile(r"round-\d{8}-[0-9a-f]{32}\.safetensors")


@dataclass
class Snapshot:
    """Everything that a run needs to go on.

    Attributes:
        round: last finished round.
        server: what the server holds (model entries by name).
        strategy: the strategy's state.
        clients: state kept by clients, by node. To save: of those whose state has changed since
            the last checkpoint. As loaded: of all.
        rounds: rows of the rounds table so far.
        client_rows: rows of the clients table so far.
        timings: rows of the timings table so far, measured seconds.
    """

    round: int
    server: dict[str, Tensor]
    strategy: dict[str, Any] = field(default_factory=dict)
    clients: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    client_rows: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _States:
    """A file of clients' states.

    Attributes:
        name: of the file; the digest is part of it.
        clients: how many it holds.
    """

    name: str
    clients: int


class Journal:
    """The checkpoints folder of one run.

    Args:
        folder: where the files are; made if missing.
        keep: generations of checkpoints to keep, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._written = dict.fromkeys(TABLES, 0)
        self._length, self._digest = 0, _hash()
        self._states: list[_States] = []
        self._needs: dict[str, list[str]] = {}
        with self._clear_errors():
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def _history(self) -> Path:
        return self.folder / "history.jsonl"

    @property
    def run(self) -> str:
        """A name of this run, the same after a resume and another after `clear`."""
        file = self.folder / "run"
        if not file.exists():
            self._write(file, secrets.token_hex(16).encode())
        return file.read_text()

    @property
    def floor(self) -> int:
        """The oldest round from which `load` may have to go on."""
        return min((_round_of(path) for path in self._generations()), default=0)

    def _generations(self) -> list[Path]:
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name))

    def clear(self) -> None:
        """Forget everything: the run starts anew."""
        with self._clear_errors():
            for path in self.folder.iterdir():
                path.unlink()
        self._written = dict.fromkeys(TABLES, 0)
        self._length, self._digest = 0, _hash()
        self._states, self._needs = [], {}

    # -- writing -----------------------------------------------------------------------------

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; older generations beyond `keep` go.

        Raises:
            RunError: the folder cannot be written to. The checkpoints before stay as they are.
        """
        crash_here("journal.begin")
        with self._clear_errors():
            self._append(snapshot)
            crash_here("journal.history")
            if snapshot.clients:
                self._add_states(snapshot.round, snapshot.clients)
            content = {
                "format": FORMAT,
                "round": snapshot.round,
                "server": snapshot.server,
                "strategy": snapshot.strategy,
                "history": [self._length, self._digest.hexdigest()],
                "states": [[s.name, s.clients] for s in self._states],
            }
            name = self._write_named("round", snapshot.round, pack(content))
            self._needs[name] = [s.name for s in self._states]
            self._prune()
        crash_here("journal.end")

    def _append(self, snapshot: Snapshot) -> None:
        lines = []
        for table in TABLES:
            rows = getattr(snapshot, table)
            lines += [json.dumps([table, row]) + "\n" for row in rows[self._written[table] :]]
        data = "".join(lines).encode()
        with open(self._history, "r+b" if self._history.exists() else "w+b") as file:
            file.truncate(self._length)
            file.seek(self._length)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(data)
        self._digest.update(data)
        self._written = {table: len(getattr(snapshot, table)) for table in TABLES}

    def _add_states(self, number: int, changed: dict[str, Any]) -> None:
        """Write changed states, together with earlier files that are not much bigger."""
        while self._states and self._states[-1].clients <= 2 * len(changed):
            changed = self._read_states(self._states.pop().name) | changed
        name = self._write_named("states", number, pack(changed))
        self._states.append(_States(name, len(changed)))
        crash_here("journal.states")

    def _write_named(self, kind: str, number: int, data: bytes) -> str:
        name = f"{kind}-{number:08d}-{_hash(data).hexdigest()}.safetensors"
        self._write(self.folder / name, data)
        return name

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        crash_here("journal.temporary")
        os.replace(temporary, path)
        crash_here("journal.renamed")
        sync_folder(path.parent)

    def _prune(self) -> None:
        """Drop generations beyond `keep`, and states that none of the others needs."""
        generations = self._generations()
        for old in generations[: -self.keep]:
            old.unlink()
            self._needs.pop(old.name, None)
        needed = {name for names in self._needs.values() for name in names}
        for path in self.folder.glob("states-*.safetensors"):
            if path.name not in needed:
                path.unlink()

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"no checkpoint can be written to {self.folder}: {error.strerror or error}; mend "
                f"that, then go on with: fedsim resume {self.folder.parent}"
            ) from error

    # -- reading -----------------------------------------------------------------------------

    def load(self) -> Snapshot | None:
        """The newest checkpoint that is whole; None if there is no checkpoint at all.

        Raises:
            RunError: there are checkpoints, and every one of them is damaged.
        """
        faults: list[str] = []
        paths = list(reversed(self._generations()))
        for number, path in enumerate(paths):
            try:
                snapshot = self._restore(self._content(path))
            except (OSError, ValueError, KeyError, TypeError) as error:
                faults.append(f"{path.name}: {error}")
                continue
            self._forget(paths[:number])
            self._remember(paths[number:])
            return snapshot
        if faults:
            raise RunError(f"no checkpoint in {self.folder} is whole: {'; '.join(faults)}")
        return None

    def _forget(self, damaged: list[Path]) -> None:
        """Remove generations that cannot be used, and what a killed writer left."""
        with self._clear_errors():
            for path in [*damaged, *self.folder.glob(".*.tmp")]:
                path.unlink(missing_ok=True)

    def _remember(self, paths: list[Path]) -> None:
        """Note which files of states the kept generations need."""
        for path in paths:
            with suppress(OSError, ValueError, KeyError, TypeError):
                self._needs[path.name] = [name for name, _ in self._content(path)["states"]]

    @staticmethod
    def _content(path: Path) -> dict[str, Any]:
        content: dict[str, Any] = unpack(_sound(path))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return content

    def _restore(self, content: dict[str, Any]) -> Snapshot:
        length, digest = content["history"]
        history = self._history.read_bytes()[:length] if length else b""
        if _hash(history).hexdigest() != digest:
            raise ValueError("the history before it is damaged")
        clients: dict[str, Any] = {}
        for name, _ in content["states"]:
            clients |= self._read_states(name)
        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        for line in history.splitlines():
            table, row = json.loads(line)
            tables[table].append(row)
        self._length, self._digest = length, _hash(history)
        self._written = {name: len(rows) for name, rows in tables.items()}
        self._states = [_States(name, count) for name, count in content["states"]]
        return Snapshot(content["round"], content["server"], content["strategy"], clients, **tables)

    def _read_states(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = unpack(_sound(self.folder / name))
        return content


def _sound(path: Path) -> bytes:
    """The bytes of a file that carries their digest in its name."""
    data = path.read_bytes()
    if _hash(data).hexdigest() != path.stem.rpartition("-")[2]:
        raise ValueError("digest does not match")
    return data


def _hash(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


def _round_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def sync_folder(folder: Path) -> None:
    """Make renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock goes with the process, however it ends.

    Raises:
        RunError: another process holds it, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"{folder} cannot be written to: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RunError(f"{folder} is in use by {owner}; wait for it, or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
