"""Checkpoints, so that a run killed at any moment resumes to the same bits.

A checkpoint is one safetensors file with the state's numbers and strings as JSON in its header,
and a digest; the history is an append-only file of JSON lines whose length the checkpoint records.
Files appear whole or not at all (write, fsync, rename, fsync the folder). Two generations are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsim.core.errors import RunError

FORMAT = 1
TABLES = ("rounds", "client_rows", "timings")


@dataclass
class Snapshot:
    """Everything that a run needs to go on.

    Attributes:
        round: last finished round.
        server: what the server holds (model entries by name).
        strategy: the strategy's state.
        clients: state kept by clients: node -> record name -> entry name -> tensor.
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


def flatten(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested state into `tensors`; the rest is returned as JSON values."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach().contiguous().clone()
        return {"$tensor": prefix}
    if isinstance(tree, Mapping):
        return {str(k): flatten(v, f"{prefix}/{k}", tensors) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [flatten(v, f"{prefix}/{i}", tensors) for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"state {prefix} holds a {type(tree).__name__}, which cannot be saved")


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(tree, dict):
        if set(tree) == {"$tensor"}:
            return tensors[tree["$tensor"]]
        return {k: unflatten(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list):
        return [unflatten(v, tensors) for v in tree]
    return tree


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """The checkpoints folder of one run.

    Args:
        folder: where the files are; made if missing.
        keep: generations of checkpoints to keep, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        self._written = dict.fromkeys(TABLES, 0)
        self._length = 0

    @property
    def _history(self) -> Path:
        return self.folder / "history.jsonl"

    def _generations(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.safetensors"))

    def clear(self) -> None:
        """Forget everything: the run starts anew."""
        for path in [*self._generations(), self._history]:
            path.unlink(missing_ok=True)
        self._written, self._length = dict.fromkeys(TABLES, 0), 0

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; older generations beyond `keep` go."""
        self._append(snapshot)
        tensors: dict[str, Tensor] = {}
        state = flatten(
            {
                "server": snapshot.server,
                "strategy": snapshot.strategy,
                "clients": snapshot.clients,
            },
            "",
            tensors,
        )
        header = {
            "format": FORMAT,
            "round": snapshot.round,
            "state": state,
            "history_bytes": self._length,
            "digest": _digest(tensors),
        }
        data = save(tensors, {"fedsim": json.dumps(header)})
        write_atomic(self.folder / f"round-{snapshot.round:08d}.safetensors", data)
        for old in self._generations()[: -self.keep]:
            old.unlink()

    def _append(self, snapshot: Snapshot) -> None:
        lines = []
        for table in self._written:
            rows = getattr(snapshot, table)
            new = rows[self._written[table] :]
            lines += [json.dumps([table, row]) + "\n" for row in new]
            self._written[table] = len(rows)
        data = "".join(lines).encode()
        mode = "r+b" if self._history.exists() else "w+b"
        with open(self._history, mode) as file:
            file.truncate(self._length)
            file.seek(self._length)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(data)

    def load(self) -> Snapshot | None:
        """The newest checkpoint that is whole; None if there is no checkpoint at all.

        Raises:
            RunError: there are checkpoints, and every one of them is damaged.
        """
        faults = []
        for path in reversed(self._generations()):
            try:
                return self._read(path)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                faults.append(f"{path.name}: {error}")
        if faults:
            raise RunError(f"no checkpoint in {self.folder} is whole: {'; '.join(faults)}")
        return None

    def _read(self, path: Path) -> Snapshot:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["fedsim"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, expected {FORMAT}")
        if _digest(tensors) != header["digest"]:
            raise ValueError("digest does not match")
        state = unflatten(header["state"], tensors)
        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        length = header["history_bytes"]
        if length:
            data = self._history.read_bytes()[:length]
            if len(data) != length:
                raise ValueError("the history is too short")
            for line in data.splitlines():
                table, row = json.loads(line)
                tables[table].append(row)
        self._length = length
        self._written = {name: len(rows) for name, rows in tables.items()}
        return Snapshot(
            header["round"],
            state["server"],
            state["strategy"],
            state["clients"],
            **tables,
        )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
