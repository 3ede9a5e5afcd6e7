"""IFCA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from fedsim.core.averaging import metrics_of
from fedsim.core.clusters import ClusteredStrategy
from fedsim.core.errors import require
from fedsim.core.records import FlatRecord, as_flat
from fedsim.core.rng import SERVER, torch_generator
from fedsim.core.strategy import Setting


class IFCA(ClusteredStrategy):
    """IFCA: k models; every client trains the one with the least loss on its training examples.

    Ghosh et al., *An Efficient Framework for Clustered Federated Learning*, NeurIPS 2020, model
    averaging: ``theta_j <- mean of the models of {i: s_i = j}``, ``s_i = argmin_j F_i(theta_j)``.
    A model that nobody chose stays. Model 0 is the initial model; the others have entries drawn
    anew with the same mean and deviation (the paper restarts from several draws). All k models are
    sent, of models with BatchNorm the first one's statistics. A claim of a cluster that does not
    exist is ignored with the reply. With ``k = 1`` it is FedAvg.

    Args:
        k: number of models.
        weighted: weigh clients by their number of examples; the authors' code does not.

    Raises:
        ConfigError: `k` is below 1.
    """

    client = "ifca"

    def __init__(self, k: int = 4, weighted: bool = False) -> None:
        super().__init__(weighted)
        require(k >= 1, "k", k, "1 or above")
        self.k = k
        self._claims: dict[int, int] = {}

    def setup(self, setting: Setting) -> None:
        """Learn which vectors travel."""
        super().setup(setting)
        names = frozenset(setting.info.layout.trainable)
        self._trainable = setting.info.layout.restrict(names)

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Make the k models."""
        first = as_flat(arrays, self.setting.info.layout)
        self.heads = {0: first}
        for j in range(1, self.k):
            flat = first.flat.clone()
            draw = torch_generator(self.setting.seed, 0, SERVER, f"ifca model {j}")
            for name in first.layout.trainable:
                part = flat[first.layout.span(name)]
                mean, spread = part.mean(), part.std(correction=0)
                part.normal_(generator=draw).mul_(spread).add_(mean)
            self.heads[j] = first.with_flat(flat)
        return super().start_arrays(first)

    def model_for(self, node: int, server_round: int) -> ArrayRecord:
        """The first model; the others go beside it."""
        return self.heads[0]

    def client_arrays(self) -> dict[str, ArrayRecord]:
        """The other models, once there are any."""
        size = self._trainable.size
        return {
            f"model{j}": FlatRecord(self._trainable, self.heads[j].flat[:size])
            for j in range(1, self.k if self.heads else 1)
        }

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """One model comes back."""
        return {"arrays": sent.array_records["arrays"]}

    def client_config(self) -> dict[str, Any]:
        """Tell the clients `k`."""
        return {"k": self.k}

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        """Ask for an epoch more where there is a choice."""
        told: Any = {**config, "epochs": config.get("epochs", 1) + (self.k > 1)}
        return super().configure_train(server_round, arrays, told, grid)

    def take(
        self, server_round: int, node: int, record: ArrayRecord, reply: Message
    ) -> int | bool | None:
        """The cluster that the client chose, if there is such a one."""
        claim: Any = metrics_of(reply.content).get("cluster", -1)
        if claim not in range(self.k):
            return False
        self._claims[node] = int(claim)
        return int(claim)

    def regroup(self, server_round: int, nodes: list[int]) -> None:
        """Believe the claims."""
        self.members.update({n: self._claims[n] for n in nodes if n in self._claims})
        self._claims = {}
