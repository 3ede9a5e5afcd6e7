"""Client half of Ferret."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim.core import ferret
from fedsim.core.packed import PackedProgram
from fedsim.core.packets import packet
from fedsim.core.program import Gradient, LocalState
from fedsim.core.resident import ResidentState


@dataclass(frozen=True, kw_only=True)
class Ferret(PackedProgram):
    """Local SGD in place, then the update as coordinates on shared random bases (B1 to B6).

    Weights in half precision get float32 master weights for the round: in half precision small
    steps would vanish, and so would the products of the projection.

    Attributes:
        bases: K.
        fresh: ``"fixed"``: the same bases for all clients and rounds; ``"round"``: new ones in
            every round; ``"client"``: for every client and round.
        multiple: of the median entry, size of a block; 0: one block.
        budget: what K is for (`ferret.counts_of`).
        scaling: ``"unbiased"`` or ``"official"`` (`ferret.factors`).
        half: send float16 with a scale for each block.
    """

    bases: int = 200
    basis: str = "uniform"
    fresh: str = "fixed"
    multiple: float = 0.9
    budget: str = "block"
    scaling: str = "unbiased"
    half: bool = False

    def recipe(self, s: ResidentState) -> ferret.Recipe:
        """The model from the initial one and the coordinates of all rounds."""
        blocks = ferret.blocks_of(s.sizes, self.multiple)
        return ferret.Recipe(self.master, self.bases, blocks, self.basis)

    def run(self, s: ResidentState) -> None:
        """Train, project ``start - end``, and send the coordinates."""
        start = s.w.clone()
        exact = s.w.dtype in (torch.float32, torch.float64)
        master: LocalState = s
        if not exact:
            master = LocalState()
            master.w = s.w.float()
        for batch in s.batches():
            gradient = s.gradient(batch, training=not self.frozen_bn)
            if exact:
                self.descend(s, gradient)
            else:
                self.descend(master, Gradient(gradient.dense().float()))
                s.w = master.w
        delta = start.to(master.w.dtype).sub_(master.w)
        blocks = ferret.blocks_of(s.sizes, self.multiple)
        norms = [float(part.double().norm()) for part in delta.split(blocks)]
        counts = ferret.counts_of(norms, self.bases, self.budget)
        number = ferret.number_of(self.fresh, s.round, s.client)
        seeds = ferret.seeds_of(self.master, number, self.bases)
        found = ferret.project(delta, seeds, blocks, counts, self.basis, self.scaling)
        data = ferret.pack_up(s.round, s.num_examples, found, counts, self.half)
        s.replies["arrays"] = packet(data)
        s.metrics["coordinates"] = float(counts.sum())
