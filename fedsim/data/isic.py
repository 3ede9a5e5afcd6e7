"""Skin lesions in a local folder: ISIC challenges and HAM10000, as they are downloaded."""

from __future__ import annotations

import csv as tables
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedsim.core.errors import DataError
from fedsim.core.text import did_you_mean
from fedsim.data import cache
from fedsim.data.arguments import require
from fedsim.data.federated import digest
from fedsim.data.raw import RawData, supervised

IMAGE, LESION, DIAGNOSIS = ("image_id", "image", "isic_id"), "lesion_id", ("dx", "diagnosis")
ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
LABELS = frozenset({"mel", "nv", "bcc", "akiec", "ak", "bkl", "df", "vasc", "scc", "unk"})
"""Columns of the ISIC challenges' ground truth, one per class."""

Row = Mapping[str, str]


def isic(
    path: str,
    csv: str | None = None,
    size: int = 64,
    client: str | None = None,
    one_per_lesion: bool = False,
    partial: bool = False,
) -> RawData:
    """Images of skin lesions in a local folder with a CSV: HAM10000, ISIC 2018, ISIC 2019.

    The images may lie in subfolders (``HAM10000_images_part_1``, ...). The CSV is either HAM10000's
    metadata, with columns ``image_id`` and ``dx``, or a challenge's ground truth, with a column
    ``image`` and one of zeros and ones for each class. Classes are numbered in alphabetical order,
    so that both give HAM10000's seven (akiec, bcc, bkl, df, mel, nv, vasc) the same numbers. Of
    each image the middle square is scaled to `size` x `size` pixels. Nothing is downloaded.

    Args:
        path: the folder.
        csv: the CSV, relative to the folder; None: the only one that looks like either kind.
        size: pixels of a side; the authors of arXiv 2207.03448 used 224.
        client: column of natural client ids, such as ``"dataset"``.
        one_per_lesion: keep only the first image of each ``lesion_id``. HAM10000 has several of
            some lesions, and then the same lesion may be trained on and tested with.
        partial: leave out rows whose image is not there, instead of refusing them.
    """
    where = f"data.dataset.path = {path!r}"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"{where}: there is no such folder")
    if size < 1:
        raise DataError(f"data.dataset.size = {size} is not possible; allowed: 1 or more")
    table, rows = _table(folder, csv, where)
    named = next(c for c in IMAGE if c in rows[0])
    if one_per_lesion:
        _column(rows, LESION, "one_per_lesion", table)
        rows = list({r[LESION]: r for r in reversed(rows)}.values())[::-1]
    if client is not None:
        _column(rows, client, "client", table)
    files = {f.stem: f for f in sorted(folder.rglob("*")) if f.suffix in ENDINGS}
    there = [r for r in rows if r[named] in files]
    if len(there) < len(rows) and not (partial and there):
        absent = next(r[named] for r in rows if r[named] not in files)
        raise DataError(
            f"{where}: {len(rows) - len(there)} of the {len(rows)} images in {table.name} are not "
            f"there, the first is {absent}; data.dataset.partial = true leaves them out"
        )
    names, y = _labels(there, table)
    x = _pixels([files[r[named]] for r in there], size, where)
    ids = None if client is None else np.array([r[client] for r in there])
    return supervised("isic", x, y, ids, meta={"labels": list(names)})


def _table(folder: Path, csv: str | None, where: str) -> tuple[Path, list[Row]]:
    """The CSV that says what is on the images, and its rows."""
    if csv is not None:
        rows = _rows(folder / csv)
        if not _fits(rows):
            raise DataError(
                f"data.dataset.csv = {csv!r} is missing, empty or of another kind; it needs a "
                f"column {' or '.join(IMAGE)}, and dx or one column per class"
            )
        return folder / csv, rows
    found = [(f, rows) for f in sorted(folder.rglob("*.csv")) if _fits(rows := _rows(f))]
    if len(found) != 1:
        names = ", ".join(str(f.relative_to(folder)) for f, _ in found) or "none"
        raise DataError(
            f"{where}: one CSV with the images' classes is needed, found: {names}; "
            "name it as data.dataset.csv"
        )
    return found[0]


def _rows(file: Path) -> list[Row]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            return [{k: v or "" for k, v in r.items() if k} for r in tables.DictReader(text)]
    except (OSError, UnicodeDecodeError, tables.Error):
        return []


def _fits(rows: Sequence[Row]) -> bool:
    head = set(rows[0]) if rows else set()
    classes = {c for c in head if c and c.lower() in LABELS}
    return bool(head & set(IMAGE)) and bool(head & set(DIAGNOSIS) or len(classes) > 1)


def _column(rows: Sequence[Row], column: str, parameter: str, table: Path) -> None:
    if column not in rows[0]:
        raise DataError(
            f"data.dataset.{parameter}: {table.name} has no column {column!r}"
            f"{did_you_mean(column, rows[0])}; it has: {', '.join(rows[0])}"
        )


def _labels(rows: Sequence[Row], table: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the classes, and the class of every row."""
    column = next((c for c in DIAGNOSIS if c in rows[0]), None)
    if column is not None:
        names, y = np.unique([r[column].strip().lower() for r in rows], return_inverse=True)
        if not names[0]:
            raise DataError(f"{table.name}: {rows[int(y.argmin())]} is of no class")
        return tuple(str(n) for n in names), y.astype(np.int64)
    columns = sorted((c for c in rows[0] if c.lower() in LABELS), key=str.lower)
    try:
        table_of = np.array([[float(r[c]) for c in columns] for r in rows])
    except ValueError as error:
        raise DataError(f"{table.name}: the classes need to be numbers ({error})") from error
    used: np.ndarray = table_of.max(axis=0) > 0  # ISIC 2019 has a column "UNK" that is empty
    wrong = np.flatnonzero((table_of == 1).sum(1) != 1)
    if len(wrong):
        raise DataError(
            f"{table.name}: row {wrong[0] + 2} is of {int((table_of[wrong[0]] == 1).sum())} "
            "classes; every image needs exactly one"
        )
    kept = [c.lower() for c, there in zip(columns, used, strict=True) if there]
    return tuple(kept), table_of[:, used].argmax(1)


def _pixels(files: Sequence[Path], size: int, where: str) -> np.ndarray:
    """The images, uint8 [N, 3, size, size]; decoded once, then cached."""
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    images = require("PIL.Image", where, "all")
    errors = (OSError, images.DecompressionBombError, ValueError, SyntaxError)

    def read() -> dict[str, np.ndarray]:
        x = np.empty((len(files), 3, size, size), np.uint8)
        for place, file in enumerate(files):
            try:
                with images.open(file) as image:
                    side = min(image.size)
                    left, top = ((length - side) // 2 for length in image.size)
                    square = image.convert("RGB").crop((left, top, left + side, top + side))
                    scaled = square.resize((size, size), images.Resampling.BILINEAR)
            except errors as error:
                raise DataError(f"{where}: {file.name} cannot be read ({error})") from error
            x[place] = np.asarray(scaled).transpose(2, 0, 1)
        return {"x": x}

    return cache.arrays(digest("isic", size, facts), read)["x"]
