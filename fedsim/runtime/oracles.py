"""Oracles: labels that the data hold, a function's, or a person's who fills in a folder.

Labels cost money. `Paid` writes down every item before it is asked for, and every answer before it
counts, each durably: whatever crashes in between, and however often a query is repeated, an item
is bought once, and never more of them than the limit.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.core.errors import ConfigError, RunError, require
from fedsim.core.oracle import Items, Oracle
from fedsim.failpoints import crash_here

BOOK = "purchases.jsonl"
POLL = 0.2
"""Seconds between looks at a folder that somebody fills in."""


class Held:
    """The labels that come with the data: for simulations. They cost nothing and are never late."""

    def label(self, items: Items) -> dict[int, int]:
        """The held labels."""
        return dict(enumerate(items.held.tolist()))


class Called:
    """Asks a function, and keeps book of it.

    Args:
        function: ``"package.module:name"`` of ``function(items) -> {place: label}``, see
            `fedsim.core.oracle.Items`. What it raises counts as no answer; an item that was not
            answered is asked for again later, under the same name.
        book: folder of the book of purchases.
        limit: most items that may ever be bought with this book; none: no limit but the queries'.

    Raises:
        ConfigError: there is no such function, or `limit` is negative.
    """

    def __init__(self, function: str, book: str, limit: int | None = None) -> None:
        module, _, name = function.partition(":")
        try:
            ask = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f'oracle.function = {function!r} cannot be imported ({error}); give "module:name"'
            ) from None
        self._paid = Paid(_Function(ask), Path(book), limit)

    def label(self, items: Items) -> dict[int, int]:
        """See `Oracle`."""
        return self._paid.label(items)


class _Function:
    def __init__(self, ask: Callable[[Items], Mapping[int, int]]) -> None:
        self.label = ask


class Folder:
    """A folder that a person fills in.

    For every query there is a table ``todo-clientNNN-cycleNN.csv`` with columns ``item`` and
    ``label``, the labels empty, and beside it every example as ``items/NAME.npy``; images also as
    ``items/NAME.png``. Write the labels and save. Until `timeout` the client waits; what is not
    filled in by then stays asked for, counts against the budget, and is taken up the next time.

    Args:
        path: the folder.
        timeout: seconds that a client waits; 0: it looks once.
        limit: most items that may ever be asked for; none: no limit but the queries'.

    Raises:
        ConfigError: `timeout` or `limit` is negative.
    """

    def __init__(self, path: str, timeout: float = 0.0, limit: int | None = None) -> None:
        require(timeout >= 0, "oracle.timeout", timeout, "0 or above")
        self._paid = Paid(_Tables(Path(path), timeout), Path(path), limit)

    def label(self, items: Items) -> dict[int, int]:
        """See `Oracle`."""
        return self._paid.label(items)


class _Tables:
    def __init__(self, path: Path, timeout: float) -> None:
        self.path, self.timeout = path, timeout

    def label(self, items: Items) -> dict[int, int]:
        self._write(items)
        end = time.monotonic() + self.timeout
        while True:
            found = self._filled()
            answers = {i: found[n] for i, n in enumerate(items.names) if n in found}
            if len(answers) == len(items) or time.monotonic() >= end:
                return answers
            time.sleep(POLL)

    def _write(self, items: Items) -> None:
        pictures = self.path / "items"
        pictures.mkdir(parents=True, exist_ok=True)
        listed = {name for name, _ in self._rows()}
        table = self.path / f"todo-client{items.client:03d}-cycle{items.cycle:02d}.csv"
        fresh = not table.exists()
        with table.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["item", "label"])
            for name, x in zip(items.names, items.x, strict=True):
                if name in listed:
                    continue
                np.save(pictures / f"{name}.npy", x.numpy(), allow_pickle=False)
                _picture(x, pictures / f"{name}.png")
                writer.writerow([name, ""])

    def _rows(self) -> Iterator[tuple[str, str]]:
        for table in sorted(self.path.glob("todo-*.csv")):
            with table.open(newline="") as file:
                for row in csv.reader(file):
                    if len(row) >= 1 and row[0] != "item":
                        yield row[0], row[1].strip() if len(row) > 1 else ""

    def _filled(self) -> dict[str, int]:
        found = {}
        for name, label in self._rows():
            try:
                found[name] = int(label)
            except ValueError:  # not filled in yet, or no number: not answered
                continue
        return found


def _picture(x: Tensor, path: Path) -> None:
    """Write an image [C, H, W] or [H, W] with 1 or 3 channels as PNG; anything else not at all."""
    image = x.movedim(0, -1).squeeze(-1) if x.dim() == 3 and x.shape[0] in (1, 3) else x
    if not x.is_floating_point() or image.dim() not in (2, 3):
        return
    from matplotlib.image import imsave

    low, high = float(image.min()), float(image.max())
    scaled = ((image - low) / max(high - low, 1e-9)).double().numpy()
    imsave(path, scaled, cmap=None if image.dim() == 3 else "gray", vmin=0.0, vmax=1.0)


class Paid:
    """Puts a book of purchases in front of an oracle.

    Args:
        oracle: who labels.
        folder: where the book is.
        limit: most items that may ever be asked for; None: no limit.

    Raises:
        ConfigError: `limit` is negative.
    """

    def __init__(self, oracle: Oracle, folder: Path, limit: int | None = None) -> None:
        require(limit is None or limit >= 0, "oracle.limit", limit, "0 or above")
        self.oracle, self.folder, self.limit = oracle, folder, limit

    def label(self, items: Items) -> dict[int, int]:
        """Answers from the book; the rest is asked for, as far as the limit goes."""
        with self._book() as (known, write):
            labels = {n: label for n, label in known.items() if label is not None}
            answers = {i: labels[n] for i, n in enumerate(items.names) if n in labels}
            wanted: dict[str, int] = {}  # by name, so that the same example twice is one item
            room = len(items) if self.limit is None else self.limit - len(known)
            for place, name in enumerate(items.names):
                if place in answers or name in wanted:
                    continue
                if name not in known:
                    if room <= 0:
                        continue
                    room -= 1
                wanted[name] = place
            fresh = [n for n in wanted if n not in known]
            write([{"item": n, "client": items.client, "cycle": items.cycle} for n in fresh])
            crash_here("oracle.asked")
            bought = self._ask(items.take(list(wanted.values())))
            named = {n: bought[i] for i, n in enumerate(wanted) if i in bought}
            write([{"item": n, "label": label} for n, label in named.items()])
            crash_here("oracle.answered")
            return answers | {i: named[n] for i, n in enumerate(items.names) if n in named}

    def _ask(self, items: Items) -> Mapping[int, int]:
        if not len(items):
            return {}
        try:
            found = self.oracle.label(items)
            return {int(i): int(v) for i, v in found.items() if 0 <= int(i) < len(items)}
        except Exception:  # somebody else's function raises whatever it raises: no answer
            return {}

    @contextmanager
    def _book(
        self,
    ) -> Iterator[tuple[dict[str, int | None], Callable[[list[dict[str, Any]]], None]]]:
        """What was asked for (label None: not answered), and how to add to it; nobody else may."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / BOOK).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = self._read(file)

            def write(lines: list[dict[str, Any]]) -> None:
                if lines:
                    file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
                    file.flush()
                    os.fsync(file.fileno())

            yield known, write

    def _read(self, file: Any) -> dict[str, int | None]:
        file.seek(0)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # a line that a crash cut short was never acted upon
            file.truncate(whole)
        known: dict[str, int | None] = {}
        try:
            for line in data[:whole].splitlines():
                entry = json.loads(line)
                known[entry["item"]] = entry.get("label", known.get(entry["item"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.folder / BOOK} is damaged: {error}; mend or remove it") from None
        return known


def name_of(x: Tensor) -> str:
    """Name of an example: digest of its inputs."""
    state = hashlib.blake2b(f"{x.dtype}{tuple(x.shape)}".encode(), digest_size=10)
    state.update(x.contiguous().numpy().tobytes())
    return state.hexdigest()
