"""Gossip in which nodes hold their models and the server only passes them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.core import gossip
from fedsim.core.records import as_flat, to_record
from fedsim.core.strategy import Exchange, Served
from strategies.dfedsam import DFedSAM


class GossipRelay(DFedSAM):
    """DFedSAM (`rho = 0`: DFedAvg) with the nodes' models where they belong, on the nodes.

    The same algorithm and, on one kind of machine, the same bits as `DFedSAM`, by other messages:
    a node trains the model it holds and sends it up; for every gossip step the server sends each
    node its neighbours' models with their weights, the node mixes, and sends up what it has if
    another step follows. So `bytes_up` and `bytes_down` are real traffic: Q models up a node and
    round, and Q times its neighbours' down. Flower has no channel between clients; the server is
    the wire. What it sees in passing it uses for the figures of the rounds table only; nodes judge
    their own models. Integer buffers stay with their node.

    A node that does not answer in a round keeps what it has, and the others mix on the graph
    between them; one that is lost between gossip steps misses the rest of them.

    Args:
        rho: radius of the perturbation; 0 is plain SGD.
        options: of `DFedSAM`.
    """

    client = "gossip"

    def __init__(self, rho: float = 0.0, gossip_steps: int = 1, **options: Any) -> None:
        super().__init__(rho, gossip_steps, **options)
        self.settled = 0

    def client_config(self) -> dict[str, Any]:
        """`rho`, and the last round that counted: nodes forget what they did in others."""
        return {**super().client_config(), "settled": self.settled}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask every node to train what it has."""
        messages = super().configure_train(server_round, arrays, config, grid)
        told = {**config, "server-round": server_round, "phase": "train"}
        return [self.message("train", {}, told, m.metadata.dst_node_id) for m in messages]

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """A model, unless nobody needs it."""
        config = sent.config_records["config"]
        if config.get("phase") == "mix" and not config.get("give"):
            return {}
        return {"arrays": as_flat(self.arrays)}

    def exchange(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Exchange:
        """Train, then pass models on, once for each gossip step."""
        before = self.nodes
        try:
            replies = yield self.configure_train(server_round, arrays, config, grid)
            result = self.aggregate_train(server_round, replies)
            if result[0] is not None:
                yield from self._passing(server_round, config)
                self.settled = server_round
        except Exception:
            self.nodes = before
            raise
        return result

    def _passing(self, server_round: int, config: ConfigRecord) -> Exchange:
        """The gossip steps."""
        models: Tensor = self.last["trained"]
        weights, like = self.last["weights"], as_flat(self.arrays)
        here = [row for row in self.last["active"] if (weights[row] > 0).sum() > 1]
        for step in range(self.gossip_steps):
            more = step + 1 < self.gossip_steps
            told = {**config, "server-round": server_round, "phase": "mix", "give": more}
            messages = [self._mail(row, models, weights, told) for row in here]
            if not messages:
                break
            models, heard = models.clone(), []
            for reply in (yield messages):
                row = self.ids.index(reply.metadata.src_node_id)
                heard.append(row)
                if more:
                    record = as_flat(reply.content.array_records["arrays"], like.layout)
                    models[row] = record.flat
            here = heard
        return None, None

    def _mail(self, row: int, models: Tensor, weights: Any, told: Mapping[str, Any]) -> Message:
        """To one node, the models of its neighbours."""
        who = gossip.neighbours(weights, row)
        place = int((who < row).sum())
        entries = {
            "models": models[torch.from_numpy(who[who != row])],
            "weights": torch.from_numpy(weights[row, who]),
            "place": torch.tensor(place),
        }
        return self.message("train", {"neighbours": to_record(entries)}, told, self.ids[row])

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """None here: the nodes have them."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Also the last round that counted."""
        return {**super().state_dict(), "settled": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        super().load_state_dict(state)
        self.settled = int(state["settled"])
