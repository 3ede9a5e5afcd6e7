"""Checkpoints, so that a run killed at any moment resumes to the same bits.

A checkpoint is one file (see `fedsim.core.packing`) whose name carries the digest of its bytes: a
flipped bit anywhere in it is noticed, and the generation before it is used. Two things grow with
the run and are not written again every round: the history, an append-only file of JSON lines of
which the checkpoint knows length and digest, and the clients' states, of which only those that
changed are written; few changes are merged into bigger files, so a client's state is written again
only some times however long the run is. Of a resumed run they are read when somebody asks for them.

Files appear whole or not at all: write, fsync, rename, fsync the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.columns import Chunk, Rows
from fedsim.core.errors import RunError
from fedsim.core.packing import pack, unpack
from fedsim.failpoints import crash_here
from fedsim.states import Part, Piece, digest, digest_of, pieces, write

FORMAT = 3
COLUMNS = "$columns"
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
            the last checkpoint. As loaded: of all, each read when it is asked for.
        rounds: rows of the rounds table so far.
        client_rows: rows of the clients table so far, in columns or not.
        timings: rows of the timings table so far, measured seconds.
    """

    round: int
    server: dict[str, Tensor]
    strategy: dict[str, Any] = field(default_factory=dict)
    clients: Mapping[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    client_rows: Sequence[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _States:
    """A file of clients' states.

    Attributes:
        name: of the file; the digest is part of it.
        pieces: where each client's state is.
    """

    name: str
    pieces: dict[str, Piece]


class Saved(Mapping[str, Any]):
    """The states of all clients as of the last checkpoint, by node, read when asked for.

    Args:
        files: the files they are in, oldest first; the newest state of a client counts.
    """

    def __init__(self, files: list[_States]) -> None:
        self._files = files

    def __getitem__(self, node: str) -> Any:
        for file in reversed(self._files):
            if node in file.pieces:
                try:
                    return unpack(file.pieces[node].read())
                except (OSError, ValueError) as error:
                    raise RunError(
                        f"the state of client {node} cannot be read: {error}; mend that, then go "
                        f"on with: fedsim resume {file.pieces[node].path.parent.parent}"
                    ) from error
        raise KeyError(node)

    def __contains__(self, node: object) -> bool:
        return any(node in file.pieces for file in self._files)

    def __iter__(self) -> Iterator[str]:
        nodes = {node for file in self._files for node in file.pieces}
        return iter(sorted(nodes, key=lambda node: (len(node), node)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Journal:
    """The checkpoints folder of one run.

    Args:
        folder: where the files are; made if missing.
        keep: generations of checkpoints to keep, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._written = dict.fromkeys(TABLES, 0)
        self._length, self._digest = 0, digest()
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
    def states(self) -> Mapping[str, Any]:
        """Clients' states as of the last checkpoint, by node; it follows the later ones."""
        return Saved(self._states)

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
        self._length, self._digest = 0, digest()
        self._states.clear()
        self._needs = {}

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
                "states": [[s.name, len(s.pieces)] for s in self._states],
            }
            name = self._write_named("round", snapshot.round, pack(content))
            self._needs[name] = [s.name for s in self._states]
            self._prune()
        crash_here("journal.end")

    def _append(self, snapshot: Snapshot) -> None:
        lines = []
        for table in TABLES:
            rows, done = getattr(snapshot, table), self._written[table]
            if isinstance(rows, Rows):
                new: Any = [{COLUMNS: chunk.plain()} for chunk in rows.chunks[done:]]
            else:
                new = rows[done:]
            lines += [json.dumps([table, row]) + "\n" for row in new]
        data = "".join(lines).encode()
        with open(self._history, "r+b" if self._history.exists() else "w+b") as file:
            file.truncate(self._length)
            file.seek(self._length)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(data)
        self._digest.update(data)
        self._written = {table: _lines(getattr(snapshot, table)) for table in TABLES}

    def _add_states(self, number: int, changed: Mapping[str, Any]) -> None:
        """Write changed states, together with earlier files that are not much bigger."""
        parts: dict[str, Part] = {node: pack(state) for node, state in changed.items()}
        while self._states and len(self._states[-1].pieces) <= 2 * len(parts):
            parts = {**self._states.pop().pieces, **parts}
        temporary = self.folder / ".states.tmp"
        with open(temporary, "wb") as file:
            name = f"states-{number:08d}-{write(file, parts)}.safetensors"
            file.flush()
            os.fsync(file.fileno())
        self._rename(temporary, self.folder / name)
        self._states.append(_States(name, pieces(self.folder / name)))
        crash_here("journal.states")

    def _write_named(self, kind: str, number: int, data: bytes) -> str:
        name = f"{kind}-{number:08d}-{digest(data).hexdigest()}.safetensors"
        self._write(self.folder / name, data)
        return name

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._rename(temporary, path)

    def _rename(self, temporary: Path, path: Path) -> None:
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
        length, wanted = content["history"]
        history = self._history.read_bytes()[:length] if length else b""
        if digest(history).hexdigest() != wanted:
            raise ValueError("the history before it is damaged")
        states = [_States(name, self._pieces(name)) for name, _ in content["states"]]
        tables: dict[str, Any] = {name: [] for name in TABLES}
        for line in history.splitlines():
            table, row = json.loads(line)
            if COLUMNS in row:
                tables[table] = tables[table] or Rows()
                tables[table].append(Chunk.from_plain(row[COLUMNS]))
            else:
                tables[table].append(row)
        self._length, self._digest = length, digest(history)
        self._written = {name: _lines(rows) for name, rows in tables.items()}
        self._states = states
        return Snapshot(
            content["round"], content["server"], content["strategy"], self.states, **tables
        )

    def _pieces(self, name: str) -> dict[str, Piece]:
        path = self.folder / name
        if digest_of(path) != _named(path):
            raise ValueError("digest does not match")
        return pieces(path)


def _sound(path: Path) -> bytes:
    """The bytes of a file that carries their digest in its name."""
    data = path.read_bytes()
    if digest(data).hexdigest() != _named(path):
        raise ValueError("digest does not match")
    return data


def _lines(rows: Sequence[Any]) -> int:
    """Lines that rows take in the history: one each, or one for each chunk of columns."""
    return len(rows.chunks) if isinstance(rows, Rows) else len(rows)


def _named(path: Path) -> str:
    """The digest in a file's name."""
    return path.stem.rpartition("-")[2]


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
