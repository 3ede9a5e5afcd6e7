"""Who is asked for labels: what an oracle is given, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Query:
    """Unlabelled examples of one client, to be labelled.

    Attributes:
        client: partition number of who asks.
        cycle: number of the labelling cycle, from 0.
        rows: numbers of the examples, int64 [n].
        classes: labels are 0 to classes - 1.
    """

    client: int
    cycle: int
    rows: Tensor
    classes: int


@dataclass(frozen=True)
class Items:
    """What an oracle sees of a query.

    Attributes:
        client: partition number of who asks.
        cycle: number of the labelling cycle, from 0.
        names: digest of each example's inputs; the same example has the same name everywhere.
        x: inputs, shape [n, ...].
        held: labels that come with the data, int64 [n]: simulations label with them.
        classes: labels are 0 to classes - 1.
    """

    client: int
    cycle: int
    names: Sequence[str]
    x: Tensor
    held: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.names)

    def take(self, places: Sequence[int]) -> Items:
        """Some of the items."""
        index = list(places)
        names = [self.names[i] for i in index]
        return Items(self.client, self.cycle, names, self.x[index], self.held[index], self.classes)


class Oracle(Protocol):
    """Labels examples."""

    def label(self, items: Items) -> Mapping[int, int]:
        """The label of each item by its place; items that were not answered (in time) are missing.

        Whoever asks checks that labels are within the classes.
        """
        ...
