"""Rows of a table in columns, a chunk at a time: a hundred thousand clients are no dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
Values = NDArray[Any] | list[Any]


@dataclass(frozen=True)
class Chunk:
    """Some rows; a column is an array of numbers or truth values, or a list, where None is nothing.

    Attributes:
        size: number of rows.
        columns: values by name, `size` of each.
        there: for columns of numbers that not every row has: which have one.
    """

    size: int
    columns: Mapping[str, Values]
    there: Mapping[str, NDArray[np.bool_]]

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]]) -> Chunk:
        """Rows with their keys as columns."""
        columns: dict[str, Values] = {}
        there = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            kinds = set(map(type, values))
            some = kinds - {NoneType}
            if len(some) != 1 or not some <= {int, float, bool}:
                columns[name] = values
            elif some == kinds:
                columns[name] = np.array(values)
            else:
                (kind,) = some
                columns[name] = np.array([kind() if v is None else v for v in values])
                there[name] = np.array([value is not None for value in values])
        return Chunk(len(rows), columns, there)

    def plain(self) -> dict[str, list[Any]]:
        """The columns as lists, with None where there is nothing."""
        found = {}
        for name, values in self.columns.items():
            listed = values if isinstance(values, list) else values.tolist()
            if name in self.there:
                has = self.there[name].tolist()
                listed = [v if h else None for v, h in zip(listed, has, strict=True)]
            found[name] = listed
        return found

    @staticmethod
    def from_plain(columns: Mapping[str, list[Any]]) -> Chunk:
        """The inverse of `plain`."""
        size = len(next(iter(columns.values()), []))
        found: dict[str, Values] = {}
        there: dict[str, NDArray[np.bool_]] = {}
        for name, values in columns.items():
            one = Chunk.of([{name: value} for value in values]) if size else Chunk(0, {}, {})
            found[name] = one.columns.get(name, values)
            there.update(one.there)
        return Chunk(size, found, there)

    def rows(self, first: int = 0, last: int | None = None) -> Iterator[Row]:
        """The rows, without the keys that have nothing."""
        plain = {name: values[first:last] for name, values in self.plain().items()}
        for row in zip(*plain.values(), strict=True) if plain else ():
            yield {n: v for n, v in zip(plain, row, strict=True) if v is not None}


class Rows(Sequence[Row]):
    """All rows of a table; whoever looks at one gets it as a dictionary."""

    def __init__(self, chunks: Iterable[Chunk] = ()) -> None:
        self.chunks = [chunk for chunk in chunks if chunk.size]

    def append(self, chunk: Chunk) -> None:
        """Add a chunk."""
        if chunk.size:
            self.chunks.append(chunk)

    def __iadd__(self, rows: Sequence[Row]) -> Rows:
        self.append(Chunk.of(rows))
        return self

    def clear(self) -> None:
        """Forget all rows."""
        self.chunks.clear()

    def __len__(self) -> int:
        return sum(chunk.size for chunk in self.chunks)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return list(self)[index]
        index += len(self) if index < 0 else 0
        for chunk in self.chunks:
            if index < chunk.size:
                return next(chunk.rows(index, index + 1))
            index -= chunk.size
        raise IndexError("row index out of range")

    def __iter__(self) -> Iterator[Row]:
        for chunk in self.chunks:
            yield from chunk.rows()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
