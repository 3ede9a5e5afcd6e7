"""Federated averaging."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedsim.core.averaging import mean_of, server_step
from fedsim.core.errors import require
from fedsim.core.strategy import Aggregate, Strategy


class FedAvg(Strategy):
    """FedAvg: the mean of the clients' models, weighted by their examples.

    McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*,
    AISTATS 2017, Algorithm 1: ``w <- sum_k (n_k / n) w_k``. With a server learning rate the mean
    update is a pseudo-gradient (Reddi et al., *Adaptive Federated Optimization*, ICLR 2021):
    ``w <- w + server_lr * sum_k (n_k / n) (w_k - w)``.

    Replies are summed in float64 as they come, in order of client number, so the server holds one
    model whatever the cohort. Integer buffers take the maximum over clients.

    Args:
        server_lr: step along the mean update; 1 is the original algorithm.
        weighted: weigh clients by their number of examples; False weighs all alike.

    Raises:
        ConfigError: `server_lr` is not above 0.
    """

    client = "fedavg"

    def __init__(self, server_lr: float = 1.0, weighted: bool = True) -> None:
        require(server_lr > 0, "server_lr", server_lr, "above 0")
        self.server_lr = server_lr
        self.weighted = weighted
        self.arrays: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send the model to the cohort, and remember it for the server step."""
        self.arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """The weighted mean, moved by `server_lr`."""
        mean, metrics = mean_of(replies, weighted=self.weighted)
        if mean is None or self.arrays is None:
            return None, None
        return server_step(self.arrays, mean, self.server_lr), metrics
