"""A dataset before it is dealt to clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedsim.core.errors import DataError

IGNORE = -100
"""Target of positions that do not count; `fedsim.core.criteria.IGNORE`, without importing torch."""

UNKNOWN = "\ufffd"
"""Character 0 of every vocabulary: padding, and characters that are not in it."""

CRITERIA = ("cross_entropy", "next_token", "mse")


@dataclass(frozen=True, eq=False)
class RawData:
    """What a dataset function returns.

    Attributes:
        name: of the dataset.
        fields: arrays of N examples each; ``"x"`` and ``"y"`` at least. ``x`` uint8 means pixels
            and is scaled to [0, 1].
        criterion: ``"cross_entropy"`` (y int [N]), ``"next_token"`` (x, y int [N, T]) or ``"mse"``
            (y float [N] or [N, outputs]).
        num_outputs: classes, vocabulary size, or regression outputs.
        clients: int [N], number of each example's natural client, or None.
        client_names: names of the natural clients.
        test: numbers of the dataset's own test examples, or None if it has no such split.
        standardise: whether ``x`` is shifted and scaled, per channel or column, by the mean and
            standard deviation of the examples outside the test set.
        meta: facts worth knowing, for example ``{"vocab": ...}``.
    """

    name: str
    fields: Mapping[str, np.ndarray]
    criterion: str
    num_outputs: int
    clients: np.ndarray | None = None
    client_names: tuple[str, ...] = ()
    test: np.ndarray | None = None
    standardise: bool = False
    meta: dict[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.fields["x"])

    def check(self) -> RawData:
        """Itself, if sound. Raises `DataError` naming the wrong field."""
        lengths = {n: len(a) for n, a in self.fields.items()}
        if not {"x", "y"} <= set(lengths):
            raise DataError(f"dataset {self.name} has fields {sorted(lengths)}; x and y are needed")
        if len(set(lengths.values())) > 1 or not lengths["x"]:
            raise DataError(f"dataset {self.name}: fields need equal lengths > 0, not {lengths}")
        if self.criterion not in CRITERIA:
            raise DataError(
                f"dataset {self.name}: criterion {self.criterion!r} is none of {CRITERIA}"
            )
        if self.clients is not None and len(self.clients) != len(self):
            raise DataError(
                f"dataset {self.name}: {len(self.clients)} client ids for {len(self)} examples"
            )
        for name, array in self.fields.items():
            if array.dtype.kind not in "biuf":
                raise DataError(f"dataset {self.name}: field {name} is {array.dtype}, not numbers")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise DataError(f"dataset {self.name}: field {name} holds NaN or infinity")
        if self.criterion != "mse":
            self._check_classes()
        return self

    def _check_classes(self) -> None:
        y = self.fields["y"]
        wanted = 1 if self.criterion == "cross_entropy" else 2
        if y.dtype.kind not in "biu" or y.ndim != wanted:
            raise DataError(
                f"dataset {self.name}: {self.criterion} needs integer y with {wanted} "
                f"dimension(s), not {y.dtype} {y.shape}"
            )
        real = y[y != IGNORE]
        if len(real) and not 0 <= real.min() <= real.max() < self.num_outputs:
            raise DataError(
                f"dataset {self.name}: y runs from {real.min()} to {real.max()}; "
                f"allowed: 0 to {self.num_outputs - 1}"
            )


def supervised(
    name: str, x: np.ndarray, y: np.ndarray, ids: np.ndarray | None = None, **more: object
) -> RawData:
    """Raw data from plain arrays; the criterion follows from the type of `y`.

    Args:
        name: of the dataset.
        x: inputs [N, ...]; images may come as [N, H, W] or [N, H, W, C] with C in (1, 3, 4).
        y: int [N]: classes; float: regression; int [N, T] beside int x: next token.
        ids: natural client of each example, any sortable type.
        more: further arguments of `RawData`.
    """
    if x.dtype.kind in "fub" and x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3, 4) and x.shape[3] in (1, 3, 4):
        x = x.transpose(0, 3, 1, 2)
    integers = y.dtype.kind in "biu"
    if integers and y.ndim == 2 and x.dtype.kind in "iu":
        criterion, outputs = "next_token", int(max(x.max(), y.max())) + 1
    elif integers:
        criterion, outputs = "cross_entropy", int(y.max()) + 1
    else:
        criterion, outputs = "mse", 1 if y.ndim == 1 else int(y.shape[-1])
    if criterion != "next_token" and x.dtype != np.uint8:
        x = x.astype(np.float32)
    names, codes = (None, None) if ids is None else np.unique(ids, return_inverse=True)
    settings: dict[str, object] = {
        "clients": codes,
        "client_names": () if names is None else tuple(str(n) for n in names),
        "standardise": criterion != "next_token",
    }
    return RawData(name, {"x": x, "y": y}, criterion, outputs, **(settings | more))  # type: ignore[arg-type]


def next_character(
    name: str,
    texts: Sequence[str],
    owners: np.ndarray | None,
    client_names: tuple[str, ...],
    length: int,
    extra: Mapping[str, np.ndarray] | None = None,
) -> RawData:
    """Raw data for next-character prediction: each text cut into windows of `length` characters.

    Windows of a text follow one another without overlap of their targets; the last one is padded
    (``x`` = 0, ``y`` = -100).

    Args:
        name: of the dataset.
        texts: the texts; those of fewer than two characters give nothing.
        owners: int, natural client of each text, or None.
        client_names: names of the natural clients.
        length: characters per example.
        extra: further fields, one number per text, repeated for its windows.
    """
    if length < 1:
        raise DataError(f"data.dataset.length = {length} is not possible; allowed: 1 or more")
    codes = [np.frombuffer(t.encode("utf-32-le", "replace"), np.uint32) for t in texts]
    counts = np.array([max(0, -(-(len(c) - 1) // length)) for c in codes], dtype=np.int64)
    if not counts.sum():
        raise DataError(f"dataset {name} has no text of two characters or more")
    alphabet = np.unique(np.concatenate(codes))
    x = np.zeros((counts.sum(), length), np.int64)
    y = np.full_like(x, IGNORE)
    rows = np.cumsum(counts) - counts
    for code, row, count in zip(codes, rows, counts, strict=True):
        known = np.searchsorted(alphabet, code) + 1
        x[row : row + count].reshape(-1)[: len(code) - 1] = known[:-1] if count else []
        y[row : row + count].reshape(-1)[: len(code) - 1] = known[1:] if count else []
    more = {k: np.repeat(v, counts) for k, v in (extra or {}).items()}
    return RawData(
        name,
        {"x": x, "y": y, **more},
        "next_token",
        len(alphabet) + 1,
        clients=None if owners is None else np.repeat(owners, counts),
        client_names=client_names,
        meta={"vocab": UNKNOWN + "".join(map(chr, alphabet))},
    )
