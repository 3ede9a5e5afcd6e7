"""Client half of FedSAM and DFedSAM."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.program import Batch, LocalProgram, LocalState, norm


@dataclass(frozen=True, kw_only=True)
class FedSAM(LocalProgram):
    """Local sharpness-aware steps (Foret et al., ICLR 2021).

    ``delta = rho g / ||g||`` with one norm over all trainable entries; then the step from y along
    the gradient at ``y + delta``, of the same minibatch. The second pass leaves BatchNorm
    statistics alone. Weight decay and momentum belong to the step at y.

    Attributes:
        rho: radius of the perturbation; 0 is plain SGD, bit for bit.
    """

    rho: float = 0.0

    def step(self, s: LocalState, batch: Batch) -> None:
        """One perturbed step; `s.w` itself is never perturbed, so nothing has to be restored."""
        first = s.gradient(batch, training=not self.frozen_bn)
        if not self.rho:
            self.descend(s, first)
            return
        g = first.dense()
        delta = g * (self.rho / (norm(g) + 1e-12))
        self.descend(s, s.gradient(batch, at=s.w + delta, training=not self.frozen_bn))
