"""SCAFFOLD."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedsim.core.averaging import means_of, server_step
from fedsim.core.records import FlatRecord, Layout, as_flat
from fedsim.core.strategy import Aggregate, Setting
from strategies.fedavg import FedAvg


class Scaffold(FedAvg):
    """SCAFFOLD: control variates correct the drift of local steps.

    Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, ICML
    2020, Algorithm 1 with option II. With cohort S out of N clients:
    ``x <- x + server_lr * mean_S(y_i - x)`` and ``c <- c + (|S| / N) * mean_S(c_i^+ - c_i)``.
    Clients send the change of their control variate. As in the paper the means are uniform;
    `weighted` weighs the models, not the control variates, by number of examples.

    Args:
        server_lr: the paper's global step size.
        weighted: weigh the clients' models by their number of examples.

    Raises:
        ConfigError: `server_lr` is not above 0.
    """

    client = "scaffold"

    def __init__(self, server_lr: float = 1.0, weighted: bool = False) -> None:
        super().__init__(server_lr, weighted)
        self.control: FlatRecord | None = None

    def setup(self, setting: Setting) -> None:
        """Start from a zero control variate, over the trainable entries."""
        super().setup(setting)
        self._begin(setting.info.layout, setting.num_clients)

    def _begin(self, layout: Layout, num_clients: int) -> None:
        self.num_clients = num_clients
        if self.control is None:
            zero = torch.zeros(layout.num_trainable, dtype=layout.dtype)
            self.control = FlatRecord(layout.trained, zero)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """As FedAvg, with the control variate."""
        if self.control is None:  # Flower's own loop does not call setup
            self._begin(as_flat(arrays).layout, len(list(grid.get_node_ids())))
        return super().configure_train(server_round, arrays, config, grid)

    def client_arrays(self) -> dict[str, ArrayRecord]:
        """The server's control variate."""
        assert self.control is not None
        return {"control": self.control}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Average the models and move the control variate."""
        means, metrics = means_of(
            replies, {"arrays": self.weighted, "control": False}, self.weighted
        )
        mean, change = means["arrays"].record(), means["control"].record()
        if mean is None or change is None or self.arrays is None or self.control is None:
            return None, None
        share = means["control"].total / self.num_clients
        control = as_flat(self.control, change.layout)  # without entries that nobody trains
        self.control = control.with_flat(control.flat + share * change.flat)
        return server_step(self.arrays, mean, self.server_lr), metrics

    def state_dict(self) -> dict[str, Any]:
        """The server's control variate."""
        return {"control": None if self.control is None else self.control.flat}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the control variate back (after `setup`)."""
        if self.control is not None and state["control"] is not None:
            self.control = self.control.with_flat(state["control"])
