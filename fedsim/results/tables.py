"""The tables of a run folder: their columns, and parquet whose bytes depend on content alone.

Columns come in a fixed order: the ones below first, always present (null where not measured), then
what the strategy adds, sorted by name. No timestamps, one compression, one row-group size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.columns import Chunk
from fedsim.core.errors import RunError
from fedsim.results.files import write_atomic

Row = Mapping[str, Any]
Columns = Mapping[str, pa.DataType]

_INT, _FLOAT, _BOOL, _TEXT = pa.int64(), pa.float64(), pa.bool_(), pa.string()

ROUNDS: Columns = {
    "round": _INT,
    "loss": _FLOAT,
    "accuracy": _FLOAT,
    "perplexity": _FLOAT,
    "client_loss": _FLOAT,
    "client_accuracy": _FLOAT,
    "client_worst10": _FLOAT,
    "bytes_up": _INT,
    "bytes_down": _INT,
    "seconds": _FLOAT,
    "client_seconds": _FLOAT,
    "sampled": _INT,
    "admitted": _INT,
    "refused": _INT,
    "abandoned": _BOOL,
    "train_loss": _FLOAT,
}
"""Columns of `rounds.parquet`, one row per round; 0 is the initial model, seconds are simulated."""

CLIENTS: Columns = {
    "round": _INT,
    "client": _INT,
    "name": _TEXT,
    "status": _TEXT,
    "reason": _TEXT,
    "examples": _INT,
    "bytes_up": _INT,
    "bytes_down": _INT,
    "seconds": _FLOAT,
    "cluster": _INT,
    "loss": _FLOAT,
    "eval_examples": _INT,
    "eval_loss": _FLOAT,
    "eval_accuracy": _FLOAT,
}
"""Columns of `clients.parquet`, one row per client per round it trained or was evaluated in."""

TIMINGS: Columns = {"round": _INT, "wall_seconds": _FLOAT}
"""Columns of `timings.parquet`: measured time, kept apart because it never repeats."""


def to_table(rows: Sequence[Row], columns: Columns, what: str) -> pa.Table:
    """Rows as a table: `columns` first, then every other key in sorted order.

    An extra column is int64, float64 (also when whole numbers and fractions mix, or when every
    value is null), bool, text, or a list of one of these.

    Args:
        rows: one mapping per row; a missing key is a null.
        columns: the columns that are always there, with their types.
        what: name of the table, for the error message.

    Raises:
        RunError: a column's values do not fit one type.
    """
    extra = sorted({name for row in rows for name in row} - set(columns))
    arrays = [_column(rows, name, kind, what) for name, kind in columns.items()]
    arrays += [_column(rows, name, None, what) for name in extra]
    return pa.table(dict(zip([*columns, *extra], arrays, strict=True)))


def chunks_to_table(chunks: Sequence[Chunk], columns: Columns, what: str) -> pa.Table:
    """As `to_table`, of rows that are in columns already."""
    extra = sorted({name for chunk in chunks for name in chunk.columns} - set(columns))
    arrays = []
    for name in (*columns, *extra):
        parts = [_part(chunk, name, columns.get(name)) for chunk in chunks]
        kinds = {part.type for part in parts} - {pa.null()}
        kind = columns.get(name) or (kinds.pop() if len(kinds) == 1 else _FLOAT)
        try:
            arrays.append(pa.chunked_array([p.cast(kind) for p in parts], type=kind))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise RunError(
                f"column {name!r} of {what} holds {', '.join(sorted(map(str, kinds)))}; expected "
                "numbers, truth values or text, not a mixture"
            ) from error
    return pa.table(dict(zip((*columns, *extra), arrays, strict=True))).combine_chunks()


def _part(chunk: Chunk, name: str, kind: pa.DataType | None) -> pa.Array:
    """A chunk's column; nulls if it has none of that name."""
    if name not in chunk.columns:
        return pa.nulls(chunk.size, kind or pa.null())
    values = chunk.columns[name]
    if isinstance(values, list):
        return _column([{name: value} for value in values], name, kind, "clients", True)
    missing = ~chunk.there[name] if name in chunk.there else None
    return pa.array(values, type=kind, mask=missing)


def _column(
    rows: Sequence[Row], name: str, kind: pa.DataType | None, what: str, part: bool = False
) -> pa.Array:
    values = [row.get(name) for row in rows]
    try:
        if kind is not None:
            return pa.array(values, type=kind)
        array = pa.array([_plain(value) for value in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        raise RunError(
            f"column {name!r} of {what} holds {', '.join(kinds)}; expected "
            f"{kind if kind is not None else 'numbers, truth values or text, not a mixture'}"
        ) from error
    return array.cast(_FLOAT) if pa.types.is_null(array.type) and not part else array


def _plain(value: Any) -> Any:
    """A NumPy or torch scalar as Python's."""
    return value.item() if hasattr(value, "item") else value


def write_table(path: Path, table: pa.Table) -> None:
    """Write parquet atomically; equal tables give equal bytes, however they were put together."""
    write_atomic(
        path,
        lambda file: pq.write_table(
            table.combine_chunks(),
            file,
            compression="zstd",
            compression_level=3,
            row_group_size=1 << 20,
            version="2.6",
            write_page_checksum=True,
        ),
    )


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a parquet file, or some of its columns (those it has), with checksums verified.

    Raises:
        FileNotFoundError: there is no such file.
        RunError: the file is damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if columns is not None:
                columns = [name for name in columns if name in file.schema_arrow.names]
            return file.read(columns=columns)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise RunError(
            f"{path} is damaged ({str(error).splitlines()[0]}); resume the run, or delete its "
            "folder and run this strategy and seed again"
        ) from error
