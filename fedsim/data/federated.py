"""The federation's data: one tensor per field for all clients, and index arrays per client."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Ragged:
    """Index arrays of all clients, one behind the other (compressed rows, CSR).

    Attributes:
        values: int64 [nnz], the indices of client 0, then those of client 1, ...
        offsets: int64 [n + 1]; client i owns ``values[offsets[i]:offsets[i + 1]]``.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lists(cls, lists: Sequence[np.ndarray]) -> Ragged:
        """Join one index array per client."""
        flat = [np.asarray(part, dtype=np.int64) for part in lists]
        return cls.from_lengths(
            np.concatenate(flat) if flat else np.empty(0, np.int64),
            np.array([len(part) for part in flat], dtype=np.int64),
        )

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> Ragged:
        """Cut `values` into consecutive pieces of the given lengths."""
        return cls(
            np.asarray(values, dtype=np.int64),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        """The indices of client `i`, as a view. Raises `IndexError` past the last client."""
        if not 0 <= i < len(self):
            raise IndexError(f"client {i} of {len(self)}")
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Number of indices of each client, int64 [n]."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """The client of each entry of `values`, int64 [nnz]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def where(self, mask: np.ndarray) -> Ragged:
        """The entries of `values` where `mask` is true; as many clients as before."""
        kept = np.concatenate([[0], np.cumsum(mask)])[self.offsets]
        return Ragged(self.values[mask], kept.astype(np.int64))

    def take(self, clients: np.ndarray) -> Ragged:
        """Only these clients, in this order."""
        lengths = self.lengths[clients]
        starts = np.repeat(self.offsets[clients] - (np.cumsum(lengths) - lengths), lengths)
        return Ragged.from_lengths(self.values[starts + np.arange(lengths.sum())], lengths)


@dataclass(frozen=True, eq=False)
class FederatedData:
    """All examples of all clients, and who owns which.

    Read only: the same object is handed to every run that asks for the same data.

    Attributes:
        name: of the dataset.
        fields: one tensor per field for all examples; supervised data have ``"x"`` [N, ...] and
            ``"y"`` ([N] int64 classes, [N, T] int64 next tokens with -100 where nothing is to be
            predicted, [N] or [N, outputs] float32 for regression). More fields are allowed.
        train: per client, the examples it trains on.
        test: per client, the examples held out from it; may be empty for a client.
        central_test: int64, examples that belong to no client.
        criterion: ``"cross_entropy"``, ``"next_token"`` or ``"mse"``.
        num_outputs: classes, vocabulary size, or regression outputs.
        input_shape: shape of one example of ``x``.
        client_names: natural ids, or ``"0"``, ``"1"``, ...
        heldout_clients: int64, ascending; clients never trained on, only evaluated.
        groups: int64 [num_clients], planted ground truth for clustering, or None.
        fingerprint: hex digest of all of the above but the names.
        meta: facts of the dataset, for example ``"vocab"``, ``"labels"``, ``"optimum"``.
        public: int64, examples that everybody has, in the order in which they are spoken of;
            they belong to no client and to no test set, and their labels are not used.
    """

    name: str
    fields: dict[str, torch.Tensor]
    train: Ragged
    test: Ragged
    central_test: np.ndarray
    criterion: str
    num_outputs: int
    input_shape: tuple[int, ...]
    client_names: tuple[str, ...]
    heldout_clients: np.ndarray
    groups: np.ndarray | None
    fingerprint: str
    meta: dict[str, object]
    public: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def num_clients(self) -> int:
        """Number of clients, held-out ones included."""
        return len(self.train)

    @cached_property
    def public_digest(self) -> str:
        """Digest of the public examples' inputs in their order; empty where there are none."""
        if not len(self.public):
            return ""
        x = self.fields["x"][self.public]
        return digest((x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy())


def digest(*parts: object) -> str:
    """Hex digest (BLAKE2b, 128 bits) of arrays and printable values, the same in every process."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype.str}{part.shape}".encode())
            state.update(np.ascontiguousarray(part).data.cast("B") if part.size else b"")
        else:
            state.update(f"{type(part).__name__}:{part!r};".encode())
    return state.hexdigest()
