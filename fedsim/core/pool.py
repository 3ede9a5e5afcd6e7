"""A client's labelled and unlabelled examples, and what it may spend on labels.

Nothing of a pool leaves the client but how large its parts are. An example is in exactly one of
four states: labelled, asked for (no answer yet), void (the answer was no label), or open. What was
asked for counts as spent whatever came back, so a budget is never exceeded, and no example is ever
chosen twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim.core.oracle import Query

Ask = Callable[[Query], Mapping[int, int]]


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def share(fraction: float, count: int) -> int:
    """So many of `count`, rounded up; rounding errors of the product do not count."""
    return min(count, math.ceil(fraction * count - 1e-9))


@dataclass
class Pool:
    """The examples of one client.

    Attributes:
        rows: all of them, numbers int64, in the client's order.
        classes: labels are 0 to classes - 1.
        labelled: the labelled ones, in order of labelling.
        labels: their labels.
        asked: those that were asked for and not answered.
        void: those whose answer was no label.
        spent: examples asked for in each labelling cycle.
    """

    rows: Tensor
    classes: int
    labelled: Tensor = field(default_factory=_none)
    labels: Tensor = field(default_factory=_none)
    asked: Tensor = field(default_factory=_none)
    void: Tensor = field(default_factory=_none)
    spent: Tensor = field(default_factory=_none)

    def state(self) -> dict[str, Tensor]:
        """What has to be kept."""
        names = ("labelled", "labels", "asked", "void", "spent")
        return {name: getattr(self, name) for name in names}

    @property
    def open(self) -> Tensor:
        """Examples that may be asked for, in the client's order."""
        taken = torch.cat([self.labelled, self.asked, self.void])
        return self.rows[~torch.isin(self.rows, taken)]

    @property
    def unlabelled(self) -> Tensor:
        """Examples without a label, asked for or not, in the client's order."""
        return self.rows[~torch.isin(self.rows, self.labelled)]

    @property
    def trained(self) -> Tensor:
        """The labelled examples in the client's order."""
        return self.rows[torch.isin(self.rows, self.labelled)]

    @property
    def counts(self) -> Tensor:
        """Labelled examples of each class, float64 [classes]."""
        return torch.bincount(self.labels, minlength=self.classes).double()

    def known(self, held: Tensor) -> Tensor:
        """Targets in which only the oracle's labels can be read; -1 everywhere else.

        Args:
            held: targets of all examples; only their shape is used.
        """
        out = torch.full_like(held, -1)
        out[self.labelled] = self.labels
        return out

    def left(self, cycle: int, budget: int) -> int:
        """How many examples the cycle may still ask for."""
        spent = int(self.spent[cycle]) if cycle < len(self.spent) else 0
        return max(0, min(budget - spent, len(self.open)))

    def acquire(
        self,
        cycle: int,
        budget: int,
        choose: Callable[[Tensor, int], Tensor],
        ask: Ask,
        client: int,
    ) -> int:
        """Ask for labels: first again for what was asked before, then for new examples.

        Args:
            cycle: number of the labelling cycle; asking in it again spends what is left of it.
            budget: most examples of this cycle.
            choose: ``choose(open, n)`` gives n places in `open`.
            ask: the oracle.
            client: partition number, for the oracle.

        Returns:
            how many examples got a label.
        """
        candidates, wanted = self.open, self.left(cycle, budget)
        if wanted:
            places = choose(candidates, wanted)
            picked = candidates[places]
            if len(places) != wanted or len(torch.unique(picked)) != wanted:
                raise ValueError(f"{len(places)} places chosen, {wanted} different ones wanted")
            if cycle >= len(self.spent):
                self.spent = torch.cat(
                    [self.spent, torch.zeros(cycle + 1 - len(self.spent)).long()]
                )
            self.spent = self.spent.clone()
            self.spent[cycle] += wanted
            self.asked = torch.cat([self.asked, picked])
        if not len(self.asked):
            return 0
        return self._enter(ask(Query(client, cycle, self.asked, self.classes)))

    def _enter(self, answers: Mapping[int, int]) -> int:
        """Sort the asked examples by what was answered."""
        good = [i for i in sorted(answers) if 0 <= answers[i] < self.classes]
        bad = [i for i in sorted(answers) if not 0 <= answers[i] < self.classes]
        rest = [i for i in range(len(self.asked)) if i not in answers]
        self.labelled = torch.cat([self.labelled, self.asked[good]])
        self.labels = torch.cat([self.labels, torch.tensor([answers[i] for i in good]).long()])
        self.void = torch.cat([self.void, self.asked[bad]])
        self.asked = self.asked[rest]
        return len(good)
