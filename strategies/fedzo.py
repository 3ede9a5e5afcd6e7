"""FedZO."""

from __future__ import annotations

from typing import Any

from fedsim.core.errors import require
from fedsim.core.zeroth import BASES
from strategies.fedavg import FedAvg


class FedZO(FedAvg):
    """FedZO: FedAvg whose clients take zeroth-order steps; models travel whole.

    Fang et al., *Communication-Efficient Stochastic Zeroth-Order Optimization for Federated
    Learning*, 2022, in the form in which FedKSeed and Ferret compare with it: 200 local steps of
    one perturbation. Reconstructed from their description: Gaussian (not spherical) directions and
    central differences.

    Args:
        eps: half the distance of the two points.
        perturbations: directions of one step.
        basis: ``"gaussian"``, ``"rademacher"`` or ``"rademacher32"``.
        options: those of `FedAvg`.

    Raises:
        ConfigError: a parameter is out of range.
    """

    client = "fedzo"

    def __init__(
        self,
        eps: float = 5e-4,
        perturbations: int = 1,
        basis: str = "gaussian",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        require(eps > 0, "eps", eps, "above 0")
        require(perturbations >= 1, "perturbations", perturbations, "1 or more")
        require(basis in BASES, "basis", basis, " or ".join(BASES))
        self.eps, self.perturbations, self.basis = eps, perturbations, basis

    def client_config(self) -> dict[str, Any]:
        """What a step needs."""
        return {"eps": self.eps, "perturbations": self.perturbations, "basis": self.basis}
