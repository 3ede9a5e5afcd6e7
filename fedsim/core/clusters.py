"""What clustered algorithms share: who is in which cluster, and one model for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedsim.core.averaging import Mean, MetricMean, examples_of, metrics_of
from fedsim.core.records import FlatRecord, as_flat, from_record
from fedsim.core.strategy import Aggregate, Served
from fedsim.core.unaided import Unaided


class ClusteredStrategy(Unaided):
    """One model for each cluster of clients, each the mean of its own members' replies.

    Until there are clusters it is FedAvg. A reply only ever enters the model of its sender's
    cluster, so whatever happens in one cluster leaves the others alone to the bit; a cluster from
    which nobody replies keeps its model. What the round loop carries as "the model" is the mean of
    the clusters' models, weighted by their members' examples: with equal models it is that model.

    Subclasses decide who belongs where, by filling `members` and `heads` in `regroup`, and may
    change `blend`.

    Args:
        weighted: weigh clients by their number of examples; False weighs all alike.

    Attributes:
        members: cluster of each node that has one.
        heads: model of each cluster.
        sizes: number of examples of each node, as it last reported.
        archive: the model for nodes without a cluster.
        fresh: the first number that no cluster has ever had.
    """

    client = "fedavg"

    def __init__(self, weighted: bool = True) -> None:
        self.weighted = weighted
        self.members: dict[int, int] = {}
        self.heads: dict[int, FlatRecord] = {}
        self.sizes: dict[int, float] = {}
        self.archive: ArrayRecord | None = None
        self.fresh = 0

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """The initial model, for everybody."""
        self.archive = as_flat(arrays, self.setting.info.layout)
        return self.archive

    def cluster_of(self, node: int) -> int | None:
        """The node's cluster, or None."""
        return self.members.get(node)

    def model_for(self, node: int, server_round: int) -> ArrayRecord:
        """What a node trains from: its cluster's model, or the one for nodes without."""
        assert self.archive is not None, "call start_arrays() before the first round"
        return self.heads[self.members[node]] if node in self.members else self.archive

    def told(self, node: int, server_round: int) -> dict[str, Any]:
        """Configuration for one client in one round, besides `client_config`."""
        return {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send every node the model of its cluster."""
        common = {**config, "server-round": server_round}
        asked: dict[Any, list[int]] = {}
        models: dict[int, ArrayRecord] = {}
        for node in sorted(grid.get_node_ids()):
            model = self.model_for(node, server_round)
            models[id(model)] = model
            more = tuple(sorted(self.told(node, server_round).items()))
            asked.setdefault((id(model), more), []).append(node)
        parts = [
            self.broadcast(
                "train",
                {"arrays": models[model], **self.client_arrays()},
                {**common, **dict(more)},
                nodes,
            )
            for (model, more), nodes in asked.items()
        ]
        return parts[0] if len(parts) == 1 else [m for part in parts for m in part]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """The mean of every cluster, and what `regroup` makes of the replies."""
        means: dict[int | None, Mean] = {}
        metrics, seen = MetricMean(), dict[int, float]()
        for reply in replies:
            if reply.has_error():
                continue
            node, record = reply.metadata.src_node_id, reply.content.array_records["arrays"]
            examples = examples_of(reply.content)
            weight = examples if self.weighted else 1.0
            seen[node] = examples
            metrics.add(metrics_of(reply.content), weight)
            home = self.take(server_round, node, record, reply)
            if home is not False:
                means.setdefault(home, Mean()).add(record, weight)
        if not seen:
            return None, None
        self.sizes.update(seen)  # only now: a stream of replies may end in an exception
        for name, mean in means.items():
            found = mean.record()
            assert found is not None
            if name is None:
                self.archive = found
            else:
                self.heads[name] = self.blend(server_round, self.heads[name], found)
        self.regroup(server_round, sorted(seen))
        return self.consensus(), metrics.record()

    def take(
        self, server_round: int, node: int, record: ArrayRecord, reply: Message
    ) -> int | bool | None:
        """Where a reply belongs: a cluster, None for the model of nodes without, False: nowhere.

        It may look at the reply, but the state must not change before `regroup`.
        """
        return self.members.get(node)

    def blend(self, server_round: int, old: FlatRecord, mean: FlatRecord) -> FlatRecord:
        """A cluster's new model from its old one and its members' mean."""
        return mean

    def regroup(self, server_round: int, nodes: list[int]) -> None:
        """After the means were taken: change clusters, knowing who replied."""

    def mean_of(self, records: Mapping[int, ArrayRecord]) -> FlatRecord:
        """Mean of nodes' models, weighted as configured; nodes in ascending order."""
        mean = Mean()
        for node in sorted(records):
            mean.add(records[node], self.weight(node))
        found = mean.record()
        assert found is not None
        return found

    def weight(self, node: int) -> float:
        """Weight of a node in means."""
        return self.sizes.get(node, 1.0) if self.weighted else 1.0

    def consensus(self) -> ArrayRecord:
        """Mean of the clusters' models, weighted by their members."""
        if not self.members:
            assert self.archive is not None
            return self.archive
        mean = Mean()
        for name in sorted(set(self.members.values())):
            mean.add(self.heads[name], sum(self.weight(n) for n in self.nodes_of(name)))
        found = mean.record()
        assert found is not None
        return found

    def nodes_of(self, name: int) -> list[int]:
        """The members of a cluster, ascending."""
        return sorted(n for n, c in self.members.items() if c == name)

    def settle(self, members: Mapping[int, int], heads: Mapping[int, FlatRecord]) -> None:
        """Take over new clusters; models of clusters without members go."""
        self.members = dict(members)
        present = set(self.members.values())
        self.heads = {c: as_flat(heads[c]) for c in sorted(present)}
        self.fresh = max([self.fresh, *(c + 1 for c in present)])

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """One model a cluster, and one for nodes without."""
        if not self.members:
            return {"model": Served(arrays)}
        found = {
            f"cluster-{c}": Served(self.heads[c], self.nodes_of(c))
            for c in sorted(set(self.members.values()))
        }
        rest = self._without()
        if rest and self.archive is not None:
            found["global"] = Served(self.archive, rest)
        return found

    def _without(self) -> Sequence[int]:
        return [n for n in range(1, self.setting.num_clients + 1) if n not in self.members]

    def state_dict(self) -> dict[str, Any]:
        """Members and models."""
        return {
            "members": {str(n): c for n, c in sorted(self.members.items())},
            "heads": {str(c): from_record(r) for c, r in self.heads.items()},
            "sizes": {str(n): s for n, s in sorted(self.sizes.items())},
            "archive": None if self.archive is None else from_record(self.archive),
            "fresh": self.fresh,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back (after `setup`)."""
        self.members = {int(n): c for n, c in state["members"].items()}
        self.sizes = {int(n): s for n, s in state["sizes"].items()}
        self.heads = {int(c): self.revive(t) for c, t in state["heads"].items()}
        if state["archive"] is not None:
            self.archive = self.revive(state["archive"])
        self.fresh = state["fresh"]

    def revive(self, state: Mapping[str, Any]) -> FlatRecord:
        """A saved model as a record of the run's layout."""
        layout = self.setting.info.layout
        flat = layout.flatten(state)
        return FlatRecord(layout, flat, {n: state[n] for n in layout.beside})
