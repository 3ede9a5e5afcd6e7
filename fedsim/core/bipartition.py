"""Clusters that are split in two, and the tree down which late clients find their place."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedsim.core.clusters import ClusteredStrategy
from fedsim.core.records import FlatRecord, as_flat, from_record
from fedsim.core.strategy import Setting


class BipartitionStrategy(ClusteredStrategy):
    """Everybody begins in one cluster; whether and how a cluster is halved, `halves` decides.

    The first half keeps the cluster's number, and both begin with their members' means of the same
    round. Everybody is asked in every round. A client that missed a split later trains from the
    model that was split, and goes to the half with whose members its update agrees more: the one
    with the larger mean cosine. If that half was split in turn, it goes on there in its next round.
    Until then it counts for the older half. The updates of a round are all in memory.

    Args:
        weighted: weigh clients by their number of examples.

    Attributes:
        splits: of each split so far the cluster, the number of its second half, the model before,
            and the mean directions of both halves, shape [2, p].
        waiting: of clients that missed one, the number of the split at which they are.
    """

    def __init__(self, weighted: bool = False) -> None:
        super().__init__(weighted)
        self.splits: list[tuple[int, int, FlatRecord, Tensor]] = []
        self.waiting: dict[int, int] = {}
        self._records: dict[int, ArrayRecord] = {}

    @abstractmethod
    def halves(self, server_round: int, updates: Tensor) -> Tensor | None:
        """Who is in the second half of a cluster, bool [n], from updates [n, p]; None: no split."""

    def setup(self, setting: Setting) -> None:
        """Everybody begins in one cluster."""
        super().setup(setting)
        self.members = dict.fromkeys(range(1, setting.num_clients + 1), 0)

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """The first cluster's model."""
        self.settle(self.members, {0: as_flat(arrays, self.setting.info.layout)})
        return super().start_arrays(arrays)

    def sample(self, server_round: int, nodes: list[int]) -> list[int]:
        """Everybody."""
        return nodes

    def model_for(self, node: int, server_round: int) -> ArrayRecord:
        """The cluster's model; of who missed its split, the model before."""
        if node in self.waiting:
            return self.splits[self.waiting[node]][2]
        return super().model_for(node, server_round)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """As any clustered strategy, with the models before it and all replies at hand."""
        self._records, self._before = {}, dict(self.heads)
        return super().aggregate_train(server_round, replies)

    def take(
        self, server_round: int, node: int, record: ArrayRecord, reply: Message
    ) -> int | bool | None:
        """To the node's cluster, if it has found it; the reply is remembered."""
        self._records[node] = record
        return False if node in self.waiting else self.members.get(node)

    def regroup(self, server_round: int, nodes: list[int]) -> None:
        """Split clusters where it is due; let late clients descend."""
        late = [n for n in nodes if n in self.waiting]
        for name in sorted(self.heads):
            inside = [n for n in nodes if self.members.get(n) == name and n not in late]
            if len(inside) > 1:
                self._split(server_round, name, inside)
        for node in late:
            self._descend(node)
        self._records = {}

    def _updates(self, nodes: list[int], start: FlatRecord) -> Tensor:
        layout, p = self.setting.info.layout, self.setting.info.layout.num_trainable
        rows = torch.stack([as_flat(self._records[n], layout).flat[:p] for n in nodes])
        return rows.double() - start.flat[:p].double()

    def _split(self, server_round: int, name: int, inside: list[int]) -> None:
        before = self._before.get(name, self.heads[name])
        updates = self._updates(inside, before)
        second = self.halves(server_round, updates)
        if second is None or bool(second.all()) or not bool(second.any()):
            return
        fresh, heads = self.fresh, dict(self.heads)
        parts = {
            c: [n for n, b in zip(inside, second.tolist(), strict=True) if b == (c == fresh)]
            for c in (name, fresh)
        }
        for c, part in parts.items():
            heads[c] = self.mean_of({n: self._records[n] for n in part})
        directions = torch.stack([_direction(updates[~second]), _direction(updates[second])])
        missed = [n for n in self.nodes_of(name) if n not in inside and n not in self.waiting]
        self.waiting.update(dict.fromkeys(missed, len(self.splits)))
        self.splits.append((name, fresh, before, directions))
        self.settle({**self.members, **dict.fromkeys(parts[fresh], fresh)}, heads)

    def _descend(self, node: int) -> None:
        at = self.waiting.pop(node)
        name, fresh, before, directions = self.splits[at]
        agreement = directions @ self._updates([node], before)[0]
        found = fresh if bool(agreement[1] > agreement[0]) else name
        self.members[node] = found
        deeper = [i for i in range(at + 1, len(self.splits)) if self.splits[i][0] == found]
        if deeper:
            self.waiting[node] = deeper[0]

    def state_dict(self) -> dict[str, Any]:
        """Clusters, their tree, and who is on the way down."""
        splits = [[n, f, from_record(m), d] for n, f, m, d in self.splits]
        waiting = {str(n): i for n, i in sorted(self.waiting.items())}
        return {**super().state_dict(), "splits": splits, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.splits = [(n, f, self.revive(m), d) for n, f, m, d in state["splits"]]
        self.waiting = {int(n): i for n, i in state["waiting"].items()}


def _direction(updates: Tensor) -> Tensor:
    """Mean of the updates' directions, shape [p]."""
    return torch.nn.functional.normalize(updates, dim=1).mean(0)
