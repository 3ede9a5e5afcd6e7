"""Run folders: the only thing that passes from the round loop to the report.

A run is a folder of `config.json`, `environment.json`, `status.json` and parquet tables, whose
columns are in `fedsim.results.tables`. Every file is replaced atomically, so a killed run leaves a
folder that can be read, resumed and reported as unfinished.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedsim.columns import Rows
from fedsim.core.errors import RunError
from fedsim.results.environment import environment
from fedsim.results.files import make_folder, read_json, remove_leftovers, write_json
from fedsim.results.tables import (
    CLIENTS,
    ROUNDS,
    TIMINGS,
    Row,
    chunks_to_table,
    read_table,
    to_table,
    write_table,
)

__all__ = ["FORMAT", "Run", "RunWriter", "environment", "find_runs"]

FORMAT = 1
"""Version of the run folder's layout, the `format` of `config.json`."""

STATES = ("running", "finished", "interrupted", "failed")

_TABLES = {"rounds": ROUNDS, "clients": CLIENTS, "timings": TIMINGS}
_NOT_OF_THE_COMPARISON = {"tune", "checkpoints", "models"}

_NUMBERS = (pa.int64(), pa.float64(), pa.bool_())

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class RunWriter:
    """Writes one run folder. Equal content gives equal bytes; `path` is made if it is not there.

    Raises:
        RunError: the folder cannot be made or written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        make_folder(self.path)
        remove_leftovers(self.path, self.path / "models", self.path / "artefacts")
        self._done: dict[str, tuple[Row, int, pa.Table]] = {}

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.json`: `format`, `experiment`, `strategy`, `seed`, `executor`, ..."""
        write_json(self.path / "config.json", {"format": FORMAT, **config})

    def write_environment(self, content: Mapping[str, Any]) -> None:
        """Write `environment.json`; `environment()` makes the content."""
        write_json(self.path / "environment.json", content)

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Write `status.json`: `state` (one of `STATES`), `round`, `rounds`, `reason`."""
        if status["state"] not in STATES:
            raise ValueError(f"state {status['state']!r}; expected one of {', '.join(STATES)}")
        write_json(self.path / "status.json", status)

    def write_tables(
        self, rounds: Sequence[Row], clients: Sequence[Row], timings: Sequence[Row]
    ) -> None:
        """Write the three parquet files, each from all rows so far.

        Rows once handed over are final: a list that has grown is converted from where it grew,
        which keeps a write after every round cheap.
        """
        for name, rows in {"rounds": rounds, "clients": clients, "timings": timings}.items():
            write_table(self.path / f"{name}.parquet", self._convert(name, rows))

    def _convert(self, name: str, rows: Sequence[Row]) -> pa.Table:
        if isinstance(rows, Rows):
            return chunks_to_table(rows.chunks, _TABLES[name], name)
        last, count, done = self._done.get(name, ({}, 0, None))
        table = None
        if done is not None and count <= len(rows) and rows[count - 1] is last:
            new = to_table(rows[count:], _TABLES[name], name)
            if new.num_rows == 0:
                table = done
            elif new.schema == done.schema:
                table = pa.concat_tables([done, new]).combine_chunks()
        if table is None:  # another list, or a strategy's column changed its type
            table = to_table(rows, _TABLES[name], name)
        if rows:
            self._done[name] = (rows[-1], len(rows), table)
        return table


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder, read. `clients` and `timings` are read when first asked for."""

    path: Path
    config: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    rounds: pa.Table = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run folder, finished or not.

        Raises:
            RunError: the folder is no run, was written by a newer fedsim, or is damaged.
        """
        path = Path(path)
        config = _read_config(path)
        try:
            rounds = read_table(path / "rounds.parquet")
        except FileNotFoundError:
            rounds = to_table([], ROUNDS, "rounds")
        missing = {"round"} - set(rounds.column_names)
        if missing:
            raise RunError(f"{path / 'rounds.parquet'} has no column 'round'; run it again")
        last = int(rounds["round"][-1].as_py()) if rounds.num_rows else 0
        unknown = {
            "state": "interrupted",
            "round": last,
            "rounds": None,
            "reason": "no status.json",
        }
        status = _read_or(path / "status.json", unknown)
        if status.get("state") == "finished" and not rounds.num_rows:
            raise RunError(
                f"{path} is marked finished but has no rounds.parquet; run this strategy and seed "
                "again"
            )
        return cls(path, config, status, _read_or(path / "environment.json", {}), rounds)

    @property
    def label(self) -> str:
        """The strategy's label, unique within an experiment."""
        return str(self.config["strategy"]["label"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def experiment(self) -> dict[str, Any]:
        """The whole resolved experiment, as written."""
        experiment = self.config.get("experiment")
        return experiment if isinstance(experiment, dict) else {}

    @property
    def finished(self) -> bool:
        """Whether the last round was reached; an unfinished run enters no statistic."""
        return bool(self.status.get("state") == "finished")

    @cached_property
    def clients(self) -> pa.Table:
        """`clients.parquet`, whole."""
        return self.client_columns()

    @cached_property
    def timings(self) -> pa.Table:
        """`timings.parquet`: measured seconds, which differ between identical runs."""
        return self._table("timings")

    def client_columns(self, *names: str) -> pa.Table:
        """Some columns of `clients.parquet` (those it has), or all."""
        return self._table("clients", names or None)

    def series(self, name: str) -> tuple[Ints, Floats]:
        """Rounds in which column `name` was measured, and its values there (NaN if it diverged).

        Both are empty for a column that is not there or holds something else than numbers.
        """
        if (
            name not in self.rounds.column_names
            or self.rounds.schema.field(name).type not in _NUMBERS
        ):
            return np.empty(0, np.int64), np.empty(0)
        column = self.rounds[name]
        there = column.is_valid().to_numpy()
        rounds = self.rounds["round"].to_numpy()[there]
        return rounds, column.drop_null().to_numpy().astype(np.float64)

    def cumulative(self, *names: str) -> Floats:
        """Running total over the rounds of the sum of some columns; a null counts as nothing."""
        total = np.zeros(self.rounds.num_rows)
        for name in (name for name in names if name in self.rounds.column_names):
            total += self.rounds[name].cast(pa.float64()).fill_null(0.0).to_numpy()
        return np.cumsum(total)

    def _table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            return read_table(self.path / f"{name}.parquet", columns)
        except FileNotFoundError:
            empty = to_table([], _TABLES[name], name)
            return (
                empty
                if columns is None
                else empty.select([c for c in columns if c in _TABLES[name]])
            )


def find_runs(paths: str | Path | Iterable[str | Path]) -> list[Run]:
    """Read the run folders at or below `paths`, each once, in the order of their paths.

    Below a folder that is given, hidden folders and `tune` (the runs that chose the parameters) are
    passed over; give `tune` itself to report on it.

    Raises:
        RunError: a path does not exist or holds no run, or a run is damaged.
    """
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not given:
        raise RunError("no folder was given; give folders written by fedsim run or compare")
    found: dict[Path, Run] = {}
    for path in given:
        if not path.is_dir():
            raise RunError(f"{path} is not a folder; give folders written by fedsim run or compare")
        folders = list(_run_folders(path))
        if not folders:
            raise RunError(
                f"{path} holds no run (a folder with config.json); give a folder written by "
                "fedsim run or compare"
            )
        for folder in folders:
            if folder.resolve() not in found:
                found[folder.resolve()] = Run.load(folder)
    return list(found.values())


def _run_folders(path: Path) -> Iterator[Path]:
    if (path / "config.json").is_file():
        yield path
        return
    for child in sorted(path.iterdir()):
        if (
            child.is_dir()
            and not child.name.startswith(".")
            and (child.name not in _NOT_OF_THE_COMPARISON)
        ):
            yield from _run_folders(child)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path / "config.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(
            f"{path} is not a run folder (no config.json); give a folder written by fedsim run or "
            "compare"
        ) from error
    strategy = config.get("strategy")
    if config.get("format") != FORMAT:
        raise RunError(
            f"{path / 'config.json'} has format {config.get('format')!r}; this fedsim reads "
            f"{FORMAT}: install the fedsim that wrote it"
        )
    if not isinstance(strategy, dict) or "label" not in strategy or "seed" not in config:
        raise RunError(f"{path / 'config.json'} names no strategy or no seed; run it again")
    return config


def _read_or(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return default
