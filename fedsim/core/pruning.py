"""How far a model is pruned, and what goes next: the rule that both halves of a strategy go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.structure import Kept, Structure, Structures, lowered, packed, unpacked

SCOPES = ("layer", "global")
"""Where groups compete: within a structure, or in the whole model."""
CHANNELS = 8
"""Channels that a layer keeps where groups compete in the whole model; of heads one is enough."""


@dataclass(frozen=True, eq=False)
class Pruning:
    """The structures of a model that may be pruned, and by what rule.

    ``"layer"``: the same share of every structure goes, its least important groups. ``"global"``:
    that share of all prunable weights goes, the groups of least importance per weight wherever
    they are; every structure keeps a head, or `CHANNELS` channels (half of them where it had fewer
    than twice as many).

    Attributes:
        structures: everything that the model could lose.
        items: those that may be pruned.
        scope: one of `SCOPES`.
    """

    structures: Structures
    items: tuple[Structure, ...]
    scope: str = "layer"

    def packed(self, kept: Kept) -> bytes:
        """One bit for each group."""
        return packed(kept, self.items).numpy().tobytes()

    def unpacked(self, data: bytes) -> dict[str, Tensor]:
        """The inverse of `packed`.

        Raises:
            ValueError: it has another length, or leaves a structure nothing.
        """
        bits = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self.structures.whole() | unpacked(bits, self.items)

    def gone(self, kept: Kept) -> float:
        """Share that is pruned: of the groups, or with the scope ``"global"`` of their weights."""
        worth = [self.structures.size(s) if self.scope == "global" else 1 for s in self.items]
        lost = sum(w * int((~kept[s.name]).sum()) for s, w in zip(self.items, worth, strict=True))
        return lost / max(1, sum(w * s.groups for s, w in zip(self.items, worth, strict=True)))

    def lowered(self, kept: Kept, scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Remove the least important groups until that share is gone; see `gone`."""
        if self.scope == "layer":
            return lowered(kept, scores, share, self.items)
        return self._across(kept, scores, share)

    def due(self, kept: Kept, share: float) -> bool:
        """Whether anything has to go until that share is gone."""
        after = self.lowered(kept, {s.name: torch.zeros(s.groups) for s in self.items}, share)
        return any(not torch.equal(after[s.name], kept[s.name]) for s in self.items)

    def travelling(self, before: Kept, after: Kept) -> Kept:
        """The groups of which a client sends its adapter, so that the sizes are known beforehand.

        Args:
            before: what it had left when it was asked.
            after: what it has left now, or as many of every structure.
        """
        return after if self.scope == "layer" else before

    def check(self, before: Kept, found: Kept, share: float) -> None:
        """Raise `ValueError` unless a client pruned what it was asked to, and nothing grew back."""
        nothing = {s.name: torch.zeros(s.groups) for s in self.items}
        after = lowered(before, nothing, share, self.items)
        for s in self.items:
            mask, left = found[s.name], int(found[s.name].sum())
            wrong = (
                left != int(after[s.name].sum()) if self.scope == "layer"
                else left < min(floor(s), int(before[s.name].sum()))
            )  # fmt: skip
            if bool((mask & ~before[s.name]).any()) or wrong:
                raise ValueError(f"{s.name}: other groups are left than the server asked for")
        if self.scope == "global":
            sizes = [self.structures.size(s) for s in self.items]
            whole = sum(n * s.groups for s, n in zip(self.items, sizes, strict=True))
            if self.gone(found) > max(self.gone(before), share + max(sizes) / 2 / whole) + 1e-9:
                raise ValueError(f"more is pruned than {share:.3f} of the weights")

    def _across(self, kept: Kept, scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """One order of all groups by importance per weight; of equal ones the first goes first.

        It ends before the group that would go beyond the share by more than half its weights.
        """
        found = {n: m.clone() for n, m in kept.items()}
        places, values = [], []
        for number, s in enumerate(self.items):
            left = kept[s.name].nonzero()[:, 0]
            places += [(number, int(group)) for group in left]
            values.append(scores[s.name][left].double() / self.structures.size(s))
        spare = [int(found[s.name].sum()) - floor(s) for s in self.items]
        sizes = [self.structures.size(s) for s in self.items]
        rest = share * sum(n * s.groups for s, n in zip(self.items, sizes, strict=True))
        rest -= sum(n * int((~kept[s.name]).sum()) for s, n in zip(self.items, sizes, strict=True))
        for place in torch.cat(values).argsort(stable=True).tolist():
            number, group = places[place]
            if spare[number] <= 0:
                continue
            if sizes[number] / 2 > rest + 1e-9:
                break
            found[self.items[number].name][group] = False
            spare[number] -= 1
            rest -= sizes[number]
        return found


def floor(structure: Structure) -> int:
    """Groups that a structure keeps in a global ranking."""
    if structure.columns[1].shape[1] > 1:
        return 1
    return max(1, min(CHANNELS, structure.groups // 2))
