"""Client half of Ferret."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import ferret
from fedsim.core.errors import ConfigError
from fedsim.core.packets import packet, packet_of
from fedsim.core.program import Gradient, LocalState
from fedsim.core.resident import ResidentProgram, ResidentState


@dataclass(frozen=True, kw_only=True)
class Ferret(ResidentProgram):
    """Local SGD in place, then the update as coordinates on shared random bases (B1 to B6).

    Weights in half precision get float32 master weights for the round: in half precision small
    steps would vanish, and so would the products of the projection.

    Attributes:
        bases: K.
        master: number that the seeds of the bases are derived from.
        basis: kind of direction.
        fresh: ``"fixed"``: the same bases for all clients and rounds; ``"round"``: new ones in
            every round; ``"client"``: for every client and round.
        multiple: of the median entry, size of a block; 0: one block.
        budget: what K is for (`ferret.counts_of`).
        scaling: ``"unbiased"`` or ``"official"`` (`ferret.factors`).
        half: send float16 with a scale for each block.
        layout: what the server takes the model for.
    """

    bases: int = 200
    master: int = 0
    basis: str = "uniform"
    fresh: str = "fixed"
    multiple: float = 0.9
    budget: str = "block"
    scaling: str = "unbiased"
    half: bool = False
    layout: str = ""

    def blocks(self, s: ResidentState) -> list[int]:
        """Sizes of the blocks."""
        return ferret.blocks_of(s.sizes, self.multiple) if self.multiple else [s.num_parameters]

    def name(self, s: ResidentState) -> bytes | None:
        """The coordinates as received, without the round's number."""
        return packet_of(s.records["arrays"])[12:]

    def rebuild(self, s: ResidentState, flat: Tensor, held: bytes | None) -> None:
        """The model from the initial one and the coordinates of all rounds."""
        from fedsim.core.kseed import layout_mark

        mark = layout_mark(s.sizes, flat.dtype, self.basis)
        if self.layout and mark != self.layout:
            raise ConfigError(
                f"layout = {mark} must be the server's, {self.layout}: other parameters, order, "
                "dtype or random stream"
            )
        blocks = self.blocks(s)
        sets = ferret.read_down(packet_of(s.records["arrays"]), len(blocks), self.bases)
        for number, coordinates in sets.items():
            seeds = ferret.seeds_of(self.master, number, self.bases)
            ferret.add(flat[: s.num_parameters], seeds, blocks, -coordinates, self.basis)

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
        blocks = self.blocks(s)
        norms = [float(part.double().norm()) for part in delta.split(blocks)]
        counts = ferret.counts_of(norms, self.bases, self.budget)
        number = ferret.number_of(self.fresh, s.round, s.client)
        seeds = ferret.seeds_of(self.master, number, self.bases)
        found = ferret.project(delta, seeds, blocks, counts, self.basis, self.scaling)
        data = ferret.pack_up(s.round, s.num_examples, found, counts, self.half)
        s.replies["arrays"] = packet(data)
        s.metrics["coordinates"] = float(counts.sum())
