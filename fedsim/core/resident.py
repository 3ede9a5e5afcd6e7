"""Programs that work in place on the one resident model, and messages that need hold no model.

For models so large that a copy for each client is out of the question. The server may send a few
scalars from which every client rebuilds the model (`rebuild`), or the model; clients answer with
whatever records they like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from torch import Tensor

from fedsim.core.model import ModelInfo
from fedsim.core.program import Batch, LocalProgram, LocalState
from fedsim.core.records import as_flat
from fedsim.core.strategy import Setting, Strategy


class ResidentState(LocalState):
    """What a `ResidentProgram` works on: the resident model while one client has it.

    Attributes:
        records: the array records the server sent, by name.
        replies: the array records to answer with, by name.
        seed: seed of the run.
        client: partition number.
        num_parameters: p, the length of `w`.
        sizes: number of elements of each trainable entry, in the order of `w`.
        info: names and shapes of the model.
        measured: training loss of each gradient so far.
    """

    records: Mapping[str, ArrayRecord]
    seed: int
    client: int
    num_parameters: int
    sizes: tuple[int, ...]
    info: ModelInfo
    measured: list[float]

    def __init__(self) -> None:
        super().__init__()
        self.replies: dict[str, ArrayRecord] = {}

    def batches(self) -> Iterator[Batch]:
        """The minibatches of this round, `num_steps` of them."""
        raise TypeError("a ResidentState is made by an executor")

    def loss(self, batch: Batch) -> float:
        """Loss of the program on `batch` at `w`: one forward pass in evaluation mode."""
        raise TypeError("a ResidentState is made by an executor")

    def stream(self, purpose: str) -> np.random.Generator:
        """The client's own random stream of this round."""
        raise TypeError("a ResidentState is made by an executor")

    def tensor(self, name: str) -> Tensor:
        """A tensor of the resident model: a view of an entry, or a frozen (read-only) parameter."""
        raise TypeError("a ResidentState is made by an executor")

    def load(self, flat: Tensor, record: ArrayRecord) -> None:
        """Copy a model that was sent into a vector of shape [layout.size]."""
        raise TypeError("a ResidentState is made by an executor")

    def model(self) -> ArrayRecord:
        """A copy of the resident model as it is, to answer with."""
        raise TypeError("a ResidentState is made by an executor")


@dataclass(frozen=True, kw_only=True)
class ResidentProgram(LocalProgram):
    """Base of client halves that work in place on the resident model.

    `run` is given the model that the message describes and may change `s.w` in place; whoever
    comes next finds it restored. Override `name` and `rebuild` where messages hold no model.
    """

    resident = True
    vectorized = False

    @property
    def incremental(self) -> bool:
        """Whether `rebuild` may start from the model before (see `fedsim.core.vector`)."""
        return False

    def name(self, s: ResidentState) -> bytes | None:
        """What tells the model of this message from others; None: nothing does."""
        return None

    def rebuild(self, s: ResidentState, flat: Tensor, held: bytes | None) -> None:
        """Turn the initial model, or the one named `held`, into the one the message describes.

        Args:
            s: gives the records.
            flat: shape [layout.size], trainable entries first; changed in place.
            held: name of the model in `flat`; None: it is the initial one.
        """
        s.load(flat, s.records["arrays"])

    def run(self, s: ResidentState) -> None:
        """One round of one client: fill `s.replies` and `s.metrics`."""
        for batch in s.batches():
            self.step(s, batch)
        s.replies["arrays"] = s.model()


def settle(strategy: Strategy, arrays: ArrayRecord, config: ConfigRecord) -> ArrayRecord:
    """What a strategy that sends no models holds, also in a loop that never calls `setup`.

    Flower's own loop hands the initial model to the first round; then this sets the strategy up
    from it (all its entries taken for trainable, in their order) and the seed in `config`.

    Args:
        strategy: has `start_arrays`.
        arrays: what the loop says it holds.
        config: of the round.
    """
    if hasattr(strategy, "setting"):
        return arrays
    initial = as_flat(arrays)
    none: frozenset[str] = frozenset()
    info = ModelInfo(initial.layout, {}, none, none)
    seed = config.get("seed", 0)
    strategy.setup(Setting(info, 0, int(seed) if isinstance(seed, int) else 0, 0, None, initial))
    return strategy.start_arrays(initial)
