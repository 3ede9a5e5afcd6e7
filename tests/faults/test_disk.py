"""Row 8: damaged checkpoints are noticed, full disks cost nothing, one process owns a run."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim import journal as journals
from fedsim.core.errors import RunError
from fedsim.core.packing import pack
from fedsim.journal import Journal, Snapshot, locked
from fedsim.runner import Run, Task
from tests.faults.runs import digest, experiment

ROOT = Path(__file__).parents[2]


def snapshot(number: int, clients: list[int]) -> Snapshot:
    """What a run of so many rounds might hold."""
    draw = np.random.default_rng(number)
    rows = [{"round": n, "loss": 1 / (n + 1), "client": None} for n in range(number + 1)]
    return Snapshot(
        number,
        {"w": torch.from_numpy(draw.normal(size=(4, 3))), "steps": torch.tensor(number)},
        {"momentum": torch.full((5,), float(number)), "labels": {"3": [1, 2]}, "note": "é"},
        {str(c): {"control": {"arrays": {"c": torch.full((3,), 10.0 * number + c)}}}
         for c in clients},
        rows, rows[:-1], rows,
    )  # fmt: skip


def bits(found: Snapshot | None) -> bytes:
    assert found is not None
    state = [found.round, found.server, found.strategy, found.clients]
    return pack([*state, found.rounds, found.client_rows, found.timings])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three rounds, in each of which other clients change; the last two are kept."""
    journal = Journal(tmp_path / "run" / "checkpoints")
    for number, clients in enumerate([[0, 1, 2, 3, 4, 5, 6], [1, 2], [1, 5], [6]]):
        journal.save(snapshot(number, clients))
    return tmp_path / "run" / "checkpoints"


def whole(number: int, clients: dict[int, int]) -> Snapshot:
    """A snapshot as it must be loaded: every client's state as of its last change."""
    states = {str(c): snapshot(at, [c]).clients[str(c)] for c, at in sorted(clients.items())}
    return replace(snapshot(number, []), clients=states)


NEWEST = whole(3, {0: 0, 1: 2, 2: 1, 3: 0, 4: 0, 5: 2, 6: 3})
BEFORE = whole(2, {0: 0, 1: 2, 2: 1, 3: 0, 4: 0, 5: 2, 6: 0})


def same(found: Snapshot | None, wanted: Snapshot) -> bool:
    assert found is not None
    return bits(replace(found, clients=dict(sorted(found.clients.items())))) == bits(wanted)


def test_what_is_saved_comes_back(folder: Path) -> None:
    assert same(Journal(folder).load(), NEWEST)
    assert Journal(folder).floor == 2
    names = [p.name.split("-")[0] for p in folder.iterdir()]
    assert names.count("round") == 2
    assert names.count("states") <= 4


def test_going_on_after_loading(folder: Path) -> None:
    journal = Journal(folder)
    journal.load()
    journal.save(snapshot(4, [0]))
    assert same(Journal(folder).load(), whole(4, {0: 4, 1: 2, 2: 1, 3: 0, 4: 0, 5: 2, 6: 3}))


def damaged(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(bit: int) -> Callable[[bytearray], Any]:
    def change(data: bytearray) -> None:
        data[bit // 8] ^= 1 << bit % 8

    return change


def places(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every bit of the newest checkpoint: its file, its states, the end of its history."""
    journal = Journal(folder)
    newest, older = sorted(folder.glob("round-*"))[-1], sorted(folder.glob("round-*"))[-2]
    needs = [{n for n, _ in journal._content(p)["states"]} for p in (newest, older)]
    for path in [newest, *(folder / n for n in sorted(needs[0] - needs[1]))]:
        for bit in range(8 * path.stat().st_size):
            yield path, bit
    start, end = (journal._content(p)["history"][0] for p in (older, newest))
    for bit in range(8 * start, 8 * end):
        yield folder / "history.jsonl", bit


def undetected(folder: Path, tmp_path: Path, tries: int, seed: int, cut: bool = False) -> int:
    """How many of so many damages were not noticed, or cost more than one generation."""
    possible = list(places(folder))
    chosen = np.random.default_rng(seed).choice(len(possible), tries, replace=len(possible) < tries)
    failures = 0
    for number in chosen.tolist():
        path, bit = possible[number]
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        spoil = (lambda data, at=bit // 8: data.__delitem__(slice(at, None))) if cut else flip(bit)
        damaged(copy / path.name, spoil)
        try:
            failures += not same(Journal(copy).load(), BEFORE)
        except Exception:
            failures += 1
        shutil.rmtree(copy)
    return failures


def test_a_flipped_bit_is_noticed(folder: Path, tmp_path: Path) -> None:
    assert undetected(folder, tmp_path, 100, 1) == 0


def test_a_truncated_file_is_noticed(folder: Path, tmp_path: Path) -> None:
    assert undetected(folder, tmp_path, 30, 2, cut=True) == 0


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_row_8_damage(folder: Path, tmp_path: Path, scorecard: Callable[..., None]) -> None:
    flips, cuts = undetected(folder, tmp_path, 1000, 3), undetected(folder, tmp_path, 200, 4, True)
    scorecard("8", "bits flipped in a checkpoint", 1000, flips)
    scorecard("8", "checkpoints truncated", 200, cuts)
    assert flips == cuts == 0


def test_planted_trust_in_files_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "_sound", Path.read_bytes)
    assert undetected(folder, tmp_path, 100, 1) > 0


def test_missing_and_foreign_files(folder: Path) -> None:
    sorted(folder.glob("round-*"))[-1].unlink()
    (folder / "round-99999999.safetensors").write_bytes(b"what is this")
    (folder / ".round-00000007-x.safetensors.tmp").write_bytes(b"half")
    assert same(Journal(folder).load(), BEFORE)
    assert not [*folder.glob(".*.tmp")]
    for path in folder.glob("states-*"):
        path.unlink()
    with pytest.raises(RunError, match="is whole"):
        Journal(folder).load()


def test_states_are_not_written_again_every_round(tmp_path: Path) -> None:
    """A thousand clients with state, ten of which change in a round."""
    journal = Journal(tmp_path / "checkpoints")
    journal.save(snapshot(0, list(range(1000))))
    first = sum(p.stat().st_size for p in journal.folder.glob("states-*"))
    seen, rewritten = {*journal.folder.glob("states-*")}, 0
    for number in range(1, 51):
        journal.save(snapshot(number, [(number * 37 + i) % 1000 for i in range(10)]))
        new = {*journal.folder.glob("states-*")} - seen
        rewritten += sum(path.stat().st_size for path in new)
        seen |= new
    assert rewritten > 0
    assert rewritten < 5 * first, "50 rounds of everything would be 50 times as much"
    found = Journal(journal.folder).load()
    assert found is not None
    assert len(found.clients) == 1000


# ---------------------------------------------------------------------------- the disk gives up

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)


class Disk:
    """Makes the n-th call of write, fsync or rename fail."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, number: int) -> None:
        self.calls, self._at, self._number = 0, at, number
        for holder, name in ((os, "fsync"), (os, "replace"), (Path, "replace")):
            patch.setattr(holder, name, self._failing(getattr(holder, name)))
        patch.setattr("builtins.open", self._opening(open))
        patch.setattr(Path, "open", self._opening(Path.open))

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self._at:
                raise OSError(self._number, os.strerror(self._number))
            return call(*args, **kwargs)

        return maybe

    def _opening(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(*args: Any, **kwargs: Any) -> Any:
            file = call(*args, **kwargs)
            if isinstance(file, io.BufferedWriter | io.BufferedRandom):
                return _Written(file, self._failing(file.write))
            return file

        return opened


class _Written:
    """A file whose writing may fail."""

    def __init__(self, file: Any, write: Callable[..., Any]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def run(folder: Path) -> str:
    made = experiment({"name": "scaffold"})
    task = Task(made, made.strategy[0], 3, folder)
    with locked(folder):
        Run(task).execute(resume=(folder / "config.json").exists())
    return digest(folder)


def faults(tmp_path: Path, wanted: str, chosen: list[tuple[int, int]]) -> int:
    """How many injected faults were not survived with a clear message and the same bits."""
    failures = 0
    for at, number in chosen:
        folder = tmp_path / f"{at}-{number}"
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at, number)
            try:
                run(folder)
            except RunError as error:
                failures += os.strerror(number) not in str(error)
            except Exception:
                failures += 1
        try:
            failures += run(folder) != wanted
        except Exception:
            failures += 1
        shutil.rmtree(folder)
    return failures


def calls(tmp_path: Path) -> tuple[str, int]:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, 0, 0)
        return run(tmp_path / "whole"), disk.calls


def test_a_disk_that_gives_up(tmp_path: Path) -> None:
    wanted, count = calls(tmp_path)
    draw = np.random.default_rng(5)
    chosen = [(int(at), int(draw.choice(ERRORS))) for at in draw.integers(1, count + 1, 8)]
    assert faults(tmp_path, wanted, chosen) == 0


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own in memory, of that size."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        yield place
    finally:
        # Lazily: a process that another test has just forked may still have it open.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def full(tmp_path: Path, wanted: str, kilobytes: int) -> int:
    """1 if a run did not survive a disk of that size, which grows when it is full."""
    with small_disk(tmp_path / f"disk-{kilobytes}", kilobytes) as disk:
        try:
            run(disk / "run")
        except RunError as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                return 1
            grow = ["mount", "-o", "remount,size=8m", str(disk)]
            subprocess.run(grow, check=True)
        return int(run(disk / "run") != wanted)


def test_a_disk_that_is_full_and_grows(tmp_path: Path) -> None:
    wanted, _ = calls(tmp_path)
    assert [full(tmp_path, wanted, size) for size in (8, 24, 44)] == [0, 0, 0]


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_row_8_full(tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """From a disk on which nothing fits to one on which everything does."""
    wanted, _ = calls(tmp_path)
    sizes = range(4, 104, 4)
    failures = sum(full(tmp_path, wanted, size) for size in sizes)
    scorecard("8", "disks that were full and grew", len(sizes), failures)
    assert failures == 0


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_row_8_disk(tmp_path: Path, scorecard: Callable[..., None]) -> None:
    """Every write, fsync and rename of a run fails once with every error."""
    wanted, count = calls(tmp_path)
    chosen = [(at, number) for at in range(1, count + 1) for number in ERRORS]
    failures = faults(tmp_path, wanted, chosen)
    scorecard("8", "writes, fsyncs, renames that failed", len(chosen), failures)
    assert failures == 0


def test_planted_torn_checkpoint_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that goes on after a failed write."""
    wanted, count = calls(tmp_path)

    def careless(self: Journal, path: Path, data: bytes) -> None:
        try:
            with open(path, "wb") as file:
                file.write(data)
        except OSError:
            path.write_bytes(data[:100])

    def torn(file: Any, parts: Any) -> str:
        try:
            return write(file, parts)
        except OSError:
            file.truncate(100)
            return "0" * 32

    write = journals.write
    monkeypatch.setattr(Journal, "_write", careless)
    monkeypatch.setattr(journals, "_sound", Path.read_bytes)
    monkeypatch.setattr(journals, "write", torn)
    monkeypatch.setattr(journals, "digest_of", lambda path: path.stem.rpartition("-")[2])
    every = [(at, errno.ENOSPC) for at in range(2, count + 1, 9)]
    assert faults(tmp_path, wanted, every) > 0


# -------------------------------------------------------------------------------------- the lock

HOLD = """
import sys, time
from pathlib import Path
from fedsim.journal import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"is in use by process {holder.pid}"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path):  # the lock goes with the process that held it
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written to"), locked(tmp_path / "file"):
        pass
