"""Decentralised averaging: DFedAvg, DFedAvgM and D-PSGD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.core import gossip, rng
from fedsim.core.averaging import MetricMean, examples_of, metrics_of
from fedsim.core.errors import ConfigError, require
from fedsim.core.records import FlatRecord, as_flat, count_bytes
from fedsim.core.strategy import Aggregate, Served
from fedsim.core.topology import Network, Weights, second_eigenvalue
from fedsim.core.unaided import Unaided


class DFedAvg(Unaided):
    """DFedAvg: every node trains its own model, then mixes it with its neighbours' models.

    Sun, Li, Wang, *Decentralized Federated Averaging*, TPAMI 2022: local SGD steps, then gossip
    ``x_i <- sum_j W_ij z_j``, here `gossip_steps` times with simultaneous updates, so
    ``X <- W^Q Z`` with the nodes as rows. Train first, then mix. The weights are
    Metropolis-Hastings, doubly stochastic on every undirected graph. The server simulates the
    network: nodes that gave no admitted reply keep their model for this round, and the others mix
    on the graph between them.

    The rounds table gets `consensus_before` and `consensus` (mean squared distance to the averaged
    model, before and after mixing), `spectral_gap`, and `peer_bytes`, what the nodes would have
    sent to each other; `bytes_up` and `bytes_down` are the simulation's own traffic. `loss` and
    `accuracy` are means over the nodes' models, `averaged_loss` and `averaged_accuracy` those of
    the averaged model, which gossip leaves unchanged. Integer buffers (BatchNorm's counters) take
    the maximum over the nodes.

    Args:
        topology: ``"ring"``, ``"grid"``, ``"torus"``, ``"exponential"``, ``"full"``, ``"random"``
            (drawn anew every round) or ``"directed_exponential"`` (not symmetric).
        gossip_steps: Q.
        degree: neighbours that each node of the random topology draws.
        edges: an undirected graph of your own as pairs of client numbers, instead of `topology`.
        cuts: rounds in which the network falls apart, and heals: ``[[5, 10, 2]]`` leaves only edges
            within each half of the nodes in rounds 5 to 10.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "fedavg"

    def __init__(
        self,
        topology: str = "ring",
        gossip_steps: int = 1,
        degree: int = 10,
        edges: list[list[int]] | None = None,
        cuts: list[list[int]] | None = None,
    ) -> None:
        self.network = Network(topology, degree, edges, cuts)
        require(gossip_steps >= 1, "gossip_steps", gossip_steps, "1 or above")
        self.gossip_steps = gossip_steps
        self.ids: list[int] = []
        self.nodes = torch.empty(0, 0)
        self.last: dict[str, Any] = {}

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Every node starts from the same model."""
        self._begin(arrays, self.setting.population)
        return arrays

    def _begin(self, arrays: ArrayRecord, ids: list[int]) -> None:
        self.ids, self.nodes = ids, as_flat(arrays).flat.repeat(len(ids), 1)

    def model_of(self, node: int, like: ArrayRecord) -> FlatRecord:
        """The present model of a node, a record of the same layout as `like`."""
        return as_flat(like).with_flat(self.nodes[self.ids.index(node)])

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Send every node its own model."""
        nodes = sorted(grid.get_node_ids())
        self.arrays = arrays
        told = {**config, "server-round": server_round}
        return [
            self.message("train", {"arrays": self.model_of(node, arrays)}, told, node)
            for node in nodes
        ]

    def weights(self, server_round: int, active: Iterable[int]) -> Weights:
        """The round's gossip matrix, shape [m, m], when only some nodes (by row) are active."""
        stream = rng.stream(self.setting.seed, server_round, rng.SERVER, "topology")
        return self.network.weights(len(self.ids), active, server_round, stream)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Mix the nodes' models; the averaged model is what the round loop holds."""
        like = as_flat(self.arrays)
        trained, metrics, active = self.nodes.clone(), MetricMean(), []
        beside: dict[str, Tensor] = {}
        for reply in replies:
            if reply.has_error():
                continue
            row = self.ids.index(reply.metadata.src_node_id)
            record = as_flat(reply.content.array_records["arrays"], like.layout)
            trained[row] = record.flat
            beside |= {n: torch.maximum(beside.get(n, t), t) for n, t in record.beside.items()}
            metrics.add(metrics_of(reply.content), examples_of(reply.content))
            active.append(row)
        if not active:
            return None, None
        weights = self.weights(server_round, active)
        self.last = {"trained": trained, "weights": weights, "active": active}
        self.nodes = self.mixed(trained, weights)
        average = self.nodes.double().mean(0).to(self.nodes.dtype)
        links = int((weights > 0).sum()) - len(weights)
        model = like.with_flat(average, beside)
        figures = {
            "consensus_before": gossip.consensus(trained),
            "consensus": gossip.consensus(self.nodes),
            "spectral_gap": 1.0 - second_eigenvalue(weights),
            "peer_bytes": self.gossip_steps * links * self.model_bytes(model),
        }
        return model, MetricRecord({**metrics.record(), **figures})

    def mixed(self, trained: Tensor, weights: Weights) -> Tensor:
        """The nodes' models after the round's gossip."""
        return gossip.mix(trained, weights, self.gossip_steps)

    def model_bytes(self, model: ArrayRecord) -> int:
        """Bytes of a model that one node sends to another."""
        return count_bytes(RecordDict({"arrays": model}))

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """One model a node, for that node."""
        width = len(str(len(self.ids) - 1))
        return {
            f"client-{row:0{width}d}": Served(self.model_of(node, arrays), [node])
            for row, node in enumerate(self.ids)
        }

    def also_evaluated(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """The averaged model."""
        return {"averaged": arrays}

    def artefacts(self) -> dict[str, Any]:
        """The last round's graph: for each node those it heard, for the report's picture."""
        if not self.ids:
            return {}
        weights = self.weights(self.setting.rounds, range(len(self.ids)))
        edges = [[i, j] for i, j in np.argwhere(weights > 0).tolist() if i < j or not weights[j, i]]
        return {"topology": {"nodes": len(self.ids), "edges": edges, "name": self.network.shown}}

    def state_dict(self) -> dict[str, Any]:
        """The nodes' models, and which row is whose."""
        return {"ids": self.ids, "nodes": self.nodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.ids, self.nodes = list(state["ids"]), state["nodes"]


class DFedAvgM(DFedAvg):
    """DFedAvgM: `DFedAvg` with heavy-ball momentum in the local steps, reset every round.

    Sun, Li, Wang, TPAMI 2022, Algorithm 1.

    Args:
        momentum: the clients' momentum.
        options: the options of `DFedAvg`.
    """

    def __init__(self, momentum: float = 0.9, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum = {momentum} must be at least 0 and below 1")
        self.momentum = float(momentum)

    def client_config(self) -> dict[str, Any]:
        """Tell the clients the momentum."""
        return {"momentum": self.momentum}


class DPSGD(DFedAvg):
    """D-PSGD: one local SGD step, then one gossip step.

    Lian et al., *Can Decentralized Algorithms Outperform Centralized Algorithms?*, NeurIPS 2017.

    Args:
        options: the options of `DFedAvg`.
    """

    def client_config(self) -> dict[str, Any]:
        """One step a round."""
        return {"max_steps": 1}
