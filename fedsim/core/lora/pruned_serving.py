"""What strategies share whose clients prune their models: who has what left, and how it travels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.core.lora.factors import Adapter
from fedsim.core.lora.pruned import cut, cut_layout, restored
from fedsim.core.lora.serving import LoRAStrategy
from fedsim.core.nodes import client_at
from fedsim.core.packets import Expected, packet, packet_of
from fedsim.core.pruning import Pruning
from fedsim.core.records import FlatRecord, as_flat, from_record
from fedsim.core.structure import packed


class PrunedStrategy(LoRAStrategy):
    """Base of strategies that merge adapters of models which every client prunes for itself.

    A client is sent, and sends, its adapter without the rows and columns of what it has pruned, and
    besides which groups it has left. The server remembers them, so that clients hold no state.
    Subclasses set `plan` in `setup`, and say what a client is asked for (`ask`) and how adapters
    are merged (`merge`).

    Attributes:
        plan: what may be pruned, and by what rule.
        left: groups that each node has left, as of the last round it took part in.
        last_rank: rank of its adapter then.
        rank_asked: rank that each node is asked for in this round.
        found: groups that it has left after this round.
        said: what it reported.
        seconds: how long it took.
    """

    plan: Pruning

    def __init__(self, weighted: bool = True) -> None:
        super().__init__(None, weighted)
        self.left: dict[int, dict[str, Tensor]] = {}
        self.last_rank: dict[int, int] = {}
        self.rank_asked: dict[int, int] = {}
        self.found: dict[int, dict[str, Tensor]] = {}
        self.said: Mapping[int, MetricRecord] = {}
        self.seconds: dict[int, float] = {}

    @abstractmethod
    def ask(self, server_round: int, node: int) -> tuple[int, float]:
        """Rank of the adapter that a node gets, and share that is to be gone after its round."""

    def kept(self, node: int) -> dict[str, Tensor]:
        """Which groups a node has left."""
        return self.left.get(node) or self.plan.structures.whole()

    def message_for(
        self, kind: str, node: int, arrays: ArrayRecord, config: Mapping[str, Any], rank: int,
        target: float = 0.0,
    ) -> Message:  # fmt: skip
        """A message with the adapter in the size of what a node has left."""
        kept = self.kept(node)
        state = from_record(as_flat(arrays, self.setting.info.layout))
        content = {
            "arrays": cut(state, self.setting.info, self.modules, kept, rank),
            "kept": packet(self.plan.packed(kept)),
        }
        return self.message(kind, content, {**config, "rank": rank, "target": target}, node)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Ask every node for something, and send it what it has left of the adapter."""
        self.sent, self.found, self.seconds, messages = arrays, {}, {}, []
        told = {**config, "server-round": server_round}
        for node in sorted(grid.get_node_ids()):
            self.rank_asked[node], target = self.ask(server_round, node)
            rank = self.rank_asked[node]
            messages.append(self.message_for("train", node, arrays, told, rank, target))
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """To every node its own pruned model."""
        told = {**config, "server-round": server_round}
        return [
            self.message_for("evaluate", n, arrays, told, self.last_rank.get(n, self.rank))
            for n in sorted(grid.get_node_ids())
        ]

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """The adapter in the sizes that the target leaves, and groups of those that were left."""
        config = sent.config_records["config"]
        before = self.plan.unpacked(packet_of(sent.array_records["kept"]))
        share = max(self.plan.gone(before), cast(float, config["target"]))
        nothing = {s.name: torch.zeros(s.groups) for s in self.plan.items}
        mine = self.plan.travelling(before, self.plan.lowered(before, nothing, share))
        rank = int(cast(int, config["rank"]))
        layout = cut_layout(self.setting.info, self.modules, mine, rank)

        def check(data: bytes) -> None:
            self.plan.check(before, self.plan.unpacked(data), share)

        size = len(self.plan.packed(before))
        return {"arrays": FlatRecord(layout, torch.empty(0)), "kept": Expected(size, check)}

    def timed(self, node: int, seconds: float) -> None:
        """Note how long a node took."""
        self.seconds[node] = seconds

    def heard(self, reported: Mapping[int, MetricRecord]) -> None:
        """Note what the nodes reported."""
        self.said = reported

    def state_of(self, node: int, content: RecordDict) -> Mapping[str, Tensor]:
        """Factors of full shape; what the node has left is noted for `merge`."""
        kept = self.found[node] = self.plan.unpacked(packet_of(content.array_records["kept"]))
        mine = self.plan.travelling(self.kept(node), kept)
        state = from_record(content.array_records["arrays"])
        whole = restored(state, self.setting.info, self.modules, mine)
        if mine is kept:
            return whole
        # what is gone counts as zero, whatever was sent
        small = cut(whole, self.setting.info, self.modules, kept, self.rank_asked[node])
        return restored(small.state(), self.setting.info, self.modules, kept)

    def onward(
        self, server_round: int, rest: FlatRecord, adapters: Sequence[Adapter],
        weights: Sequence[float],
    ) -> FlatRecord:  # fmt: skip
        """As for all adapters; from now on the nodes have left what they said."""
        model = super().onward(server_round, rest, adapters, weights)
        self.left |= self.found
        self.last_rank |= {node: self.rank_asked[node] for node in self.found}
        return model

    def artefacts(self) -> dict[str, Any]:
        """Of every client that took part: what it has left, and its last rank."""
        return {
            self.client: {
                str(client_at(n)): {
                    "rank": self.last_rank[n],
                    "pruned": self.plan.gone(self.kept(n)),
                    "kept": {k: m.nonzero().flatten().tolist() for k, m in self.kept(n).items()},
                }
                for n in sorted(self.left)
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """What everybody has left, and ranks."""
        return {
            **super().state_dict(),
            "left": {str(n): packed(k, self.plan.items) for n, k in sorted(self.left.items())},
            "ranks": {str(n): r for n, r in sorted(self.last_rank.items())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back (after `setup`)."""
        super().load_state_dict(state)
        self.left = {
            int(n): self.plan.unpacked(b.numpy().tobytes()) for n, b in state["left"].items()
        }
        self.last_rank = {int(n): r for n, r in state["ranks"].items()}
