"""Client half of FedZO."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isfinite

import numpy as np

from fedsim.core import directions, zeroth
from fedsim.core.errors import require
from fedsim.core.resident import ResidentProgram, ResidentState


@dataclass(frozen=True, kw_only=True)
class FedZO(ResidentProgram):
    """Zeroth-order local steps in place from the received model; the model goes back.

    Every step averages `perturbations` two-point estimates ``g z`` along fresh random directions of
    the client's own (FedKSeed's step without the shared pool). Steps that are not finite are
    discarded.

    Attributes:
        eps: half the distance of the two points.
        perturbations: directions of one step.
        basis: kind of direction.

    Raises:
        ConfigError: weight decay or momentum is asked for, or a parameter is out of range.
    """

    eps: float = 5e-4
    perturbations: int = 1
    basis: str = "gaussian"

    def __post_init__(self) -> None:
        zeroth.require_plain(vars(self))
        require(self.eps > 0, "eps", self.eps, "above 0")
        require(self.perturbations >= 1, "perturbations", self.perturbations, "1 or more")

    @property
    def passes(self) -> float:
        """Two forward passes for each direction, none backward."""
        return 2.0 * self.perturbations

    def run(self, s: ResidentState) -> None:
        """The steps of `[train]`; answers with the model."""
        stream, losses = s.stream("seeds"), list[float]()
        for batch in s.batches():
            seeds = stream.integers(2**63, size=self.perturbations, dtype=np.uint64)
            slopes = []
            for seed in seeds.tolist():
                loss = partial(s.loss, batch)
                above, below, g = zeroth.two_point(s.w, seed, self.eps, loss, self.basis)
                zeroth.land(s.w, seed, self.eps, 0.0, self.basis)
                slopes.append(g)
                if isfinite(g):
                    losses.append((above + below) / 2)
            if all(map(isfinite, slopes)):
                share = -self.lr / self.perturbations
                directions.combine(s.w, seeds, share * np.array(slopes), basis=self.basis)
        if losses:
            s.metrics["loss"] = float(np.mean(losses))
        s.replies["arrays"] = s.model()
