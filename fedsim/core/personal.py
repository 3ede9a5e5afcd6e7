"""What personalised algorithms share: models and entries that stay on the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.core.model import ModelInfo
from fedsim.core.program import LocalProgram, LocalState, norm
from fedsim.core.records import FlatRecord, as_flat, from_record
from fedsim.core.unaided import Unaided

PERSONAL = "personal"
"""Name of the model that a client keeps."""
NORMALISERS = frozenset(
    {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"}
    | {"LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"}
)


def own(s: LocalState, name: str = PERSONAL) -> Tensor:
    """The model that the client keeps; where it has none yet (all zeros), the received one."""
    kept = s.kept[name]
    return torch.where(norm(kept) > 0, kept, s.start.expand_as(kept))


def head_of(info: ModelInfo) -> frozenset[str]:
    """Entries of the last layer."""
    return info.head


def norms_of(info: ModelInfo) -> frozenset[str]:
    """Entries of BatchNorm layers, found by the layer's class, not by its name."""
    return frozenset(n for n, kind in info.kinds.items() if kind in NORMALISERS)


@dataclass(frozen=True, kw_only=True)
class Own(LocalProgram):
    """No training: the model that is judged is the client's own, mixed with the received one.

    Attributes:
        share: weight of its own; 1 leaves the received model out.
    """

    keeps = (PERSONAL,)

    epochs: int = 0
    share: float = 1.0

    def init(self, s: LocalState) -> None:
        """Take the kept model."""
        s.w = own(s) if self.share == 1.0 else self.share * own(s) + (1 - self.share) * s.start


class Shared(Unaided):
    """The part of a model that leaves the clients: mix it into a strategy, before its base.

    The server never holds the private entries, so nothing can be judged centrally.
    """

    setting: Any

    def private(self, info: ModelInfo) -> frozenset[str]:
        """Names of the entries that stay on the clients; the client half says the same."""
        return head_of(info)

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """The shared entries of the initial model."""
        return self.shared(arrays)

    def shared(self, arrays: ArrayRecord) -> FlatRecord:
        """The shared entries of a model, or of a saved one that has only these."""
        info = self.setting.info
        whole = info.layout
        layout = whole.restrict(frozenset(whole.names) - self.private(info) - info.still)
        if isinstance(arrays, FlatRecord) and arrays.layout == layout:
            return arrays
        state: Mapping[str, Tensor] = from_record(arrays)
        part = {n: state[n] for n in layout.names}
        beside = {n: part[n] for n in layout.beside}
        return as_flat(FlatRecord(layout, layout.flatten(part), beside), layout)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any
    ) -> Sequence[Any]:
        """As the base does, with the shared entries."""
        found: Sequence[Any] = super().configure_train(
            server_round, self.shared(arrays), config, grid
        )
        return found
