"""Client half of FedKSeed and FedKSeed-Pro."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite

import numpy as np

from fedsim.core import kseed, zeroth
from fedsim.core.errors import require
from fedsim.core.packed import PackedProgram
from fedsim.core.packets import packet, packet_of
from fedsim.core.resident import ResidentState


@dataclass(frozen=True, kw_only=True)
class FedKSeed(PackedProgram):
    """Zeroth-order steps in place along directions of a shared pool of seeds (A1 to A5).

    Every step draws a seed, evaluates one minibatch at ``w + eps z`` and ``w - eps z`` in
    evaluation mode, and goes ``w <- w - lr g z``; restoring and step are one walk, so a step takes
    three walks over the parameters and two forward passes. Only (place of the seed, g) goes back.
    A step whose loss is not finite, or differs by more than `loss_clip` (0: off), is discarded.
    Which seed is drawn comes from the client's own stream, never from the directions'.

    Attributes:
        eps: half the distance of the two points.
        pool: number of seeds, K.
        rebuild_mode: ``"exact"`` or ``"incremental"``.
        loss_clip: discard steps of which the two losses differ by more; 0: none.
        exact_restore: restore from a copy of `w` instead of adding back (memory: one vector more).

    Raises:
        ConfigError: weight decay or momentum is asked for: the seeds and scalars could not tell
            the server what they did; or a parameter is out of range.
    """

    eps: float = 5e-4
    pool: int = 4096
    rebuild_mode: str = "exact"
    loss_clip: float = 0.0
    exact_restore: bool = False

    def __post_init__(self) -> None:
        zeroth.require_plain(vars(self))
        require(self.eps > 0, "eps", self.eps, "above 0")

    @property
    def passes(self) -> float:
        """Two forward passes, none backward."""
        return 2.0

    @property
    def incremental(self) -> bool:
        """Whether only what changed in the accumulators is added."""
        return self.rebuild_mode == "incremental"

    def recipe(self, s: ResidentState) -> kseed.Recipe:
        """The model from the initial one and the accumulators."""
        return kseed.Recipe(self.master, self.pool, self.lr, self.basis)

    def run(self, s: ResidentState) -> None:
        """Take the steps; answer with the pairs of those that were not discarded."""
        seeds = self.recipe(s).seeds
        chances = kseed.chances_of(packet_of(s.records["arrays"]), self.pool)
        places = s.stream("seeds").choice(self.pool, s.num_steps, p=chances)
        pairs: list[kseed.Pair] = []
        losses: list[float] = []
        for place, batch in zip(places.tolist(), s.batches(), strict=True):
            g, value = self.take(s, int(seeds[place]), partial(s.loss, batch))
            if g is not None:
                pairs.append((place, g))
            if isfinite(value):
                losses.append(value)
        per_epoch = -(-s.num_examples // self.batch_size)
        s.replies["arrays"] = packet(kseed.pack_up(s.round, per_epoch, pairs, self.pool))
        if losses:
            s.metrics["loss"] = float(np.mean(losses))
        s.metrics["discarded"] = float(s.num_steps - len(pairs))

    def take(
        self, s: ResidentState, seed: int, loss: Callable[[], float]
    ) -> tuple[float | None, float]:
        """One step: changes `s.w`, and gives the scalar gradient as sent, and the loss.

        A discarded step gives None and leaves `s.w` as it was.
        """
        start = s.w.clone() if self.exact_restore else None
        above, below, g = zeroth.two_point(s.w, seed, self.eps, loss, self.basis)
        used = isfinite(g) and not 0 < self.loss_clip < abs(above - below)
        g = float(np.float32(g)) if used else 0.0
        zeroth.land(s.w, seed, self.eps, -self.lr * g, self.basis, start)
        return (g if used else None), (above + below) / 2
