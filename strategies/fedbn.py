"""FedBN."""

from __future__ import annotations

from fedsim.core.model import ModelInfo
from fedsim.core.personal import Shared, norms_of
from strategies.fedavg import FedAvg


class FedBN(Shared, FedAvg):
    """FedBN: FedAvg of everything but BatchNorm, which stays on the client.

    Li et al., *FedBN: Federated Learning on Non-IID Features via Local Batch Normalization*, ICLR
    2021: weight, bias, running statistics and counter of each BatchNorm layer are local. Layers
    are told by their class; the authors' code goes by ``"bn"`` in the name, which misses some.
    Without BatchNorm it is FedAvg, to the bit.

    Args:
        server_lr: as in FedAvg.
        weighted: as in FedAvg.

    Raises:
        ConfigError: `server_lr` is not above 0.
    """

    client = "fedbn"

    def private(self, info: ModelInfo) -> frozenset[str]:
        """The entries of BatchNorm layers."""
        return norms_of(info)
