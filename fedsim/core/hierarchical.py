"""One clustering of all clients' updates, agglomerative, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Message

from fedsim.core import clustering
from fedsim.core.clustering import Clustering, Cut, Linkage, Metric, Rule
from fedsim.core.clusters import ClusteredStrategy
from fedsim.core.errors import one_of, require
from fedsim.core.records import FlatRecord, as_flat
from fedsim.core.rng import SERVER, stream
from fedsim.core.strategy import Aggregate, Setting

Signature = Literal["params", "last_layer", "state_dict", "sketch"]
Init = Literal["members", "global"]
Joiner = Literal["nearest", "threshold"]
HYSTERESIS = 1.1
"""By this factor a partition into as many clusters must lower the scatter to replace the old."""


class HierarchicalStrategy(ClusteredStrategy):
    """FedAvg for some rounds, then one clustering of all clients by their updates.

    In the clustering round all clients train `signature_epochs` epochs from the archived model w.
    Their updates are clustered (`fedsim.core.clustering`), and each cluster goes on by itself. A
    client that was absent trains from w when its turn comes, and joins the cluster with which its
    update would merge first (Ward's height, with any linkage).

    Args:
        warmup_rounds: rounds of FedAvg before the clustering.
        signature_epochs: local epochs of the clustering round; 0: as many as in any round.
        signature: what is clustered: updates of all ``"params"``, of the ``"last_layer"``, of
            everything in the ``"state_dict"`` (statistics and counters too), or a seeded
            ``"sketch"`` of all parameters.
        sketch_size: numbers in a sketch. Squared distances of sketches are off by about
            ``sqrt(2 / sketch_size)``: the less the groups differ, the more numbers it takes.
        unit: bring signatures to length 1, so that only their directions are compared, not how far
            a client moves; that depends on its examples and its noise.
        linkage: see `Rule`, as are `metric`, `cut`, `t`, `k`, `gap` and `min_size`.
        init: clusters start from their ``"members"``' mean, or from the ``"global"`` w; then no
            client's model is held in memory, only signatures.
        clients_per_cluster: members that train in a round, drawn at random; 0: whoever is in the
            runner's cohort.
        recluster_every: cluster again every so many rounds, from w; clusters keep their numbers
            where members stay together (Hungarian method). 0: never.
        late_joiner: joiners go to the ``"nearest"`` cluster, or beyond the ``"threshold"`` of the
            cut make one of their own.
        merge_below: merge two clusters whose models are closer than this fraction of their way
            from w; 0: never.
        weighted: weigh clients by their number of examples.

    Attributes:
        clustered: round of the last clustering; 0: none yet.
        centres: size and mean signature of each cluster, for joiners.
        limit: height of the cut.
        history: every clustering and merge, as JSON values.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    def __init__(
        self,
        warmup_rounds: int = 10,
        signature_epochs: int = 3,
        signature: Signature = "params",
        sketch_size: int = 512,
        unit: bool = False,
        linkage: Linkage = "ward",
        metric: Metric = "euclidean",
        cut: Cut = "gap",
        t: float = 1.5,
        k: int = 2,
        gap: float = 1.3,
        min_size: int = 1,
        init: Init = "members",
        clients_per_cluster: int = 0,
        recluster_every: int = 0,
        late_joiner: Joiner = "nearest",
        merge_below: float = 0.0,
        weighted: bool = True,
    ) -> None:
        super().__init__(weighted)
        for name, value, literal in (
            ("signature", signature, Signature),
            ("linkage", linkage, Linkage),
            ("metric", metric, Metric),
            ("cut", cut, Cut),
            ("init", init, Init),
            ("late_joiner", late_joiner, Joiner),
        ):
            one_of(name, value, literal)
        for name, number, least in (
            ("warmup_rounds", warmup_rounds, 0),
            ("signature_epochs", signature_epochs, 0),
            ("sketch_size", sketch_size, 1),
            ("clients_per_cluster", clients_per_cluster, 0),
            ("recluster_every", recluster_every, 0),
            ("merge_below", merge_below, 0),
        ):
            require(number >= least, name, number, f"{least} or above")
        self.rule = Rule(linkage, metric, cut, float(t), k, float(gap), min_size)
        self.warmup_rounds, self.signature_epochs = warmup_rounds, signature_epochs
        self.signature, self.sketch_size, self.unit = signature, sketch_size, unit
        self.init = init
        self.clients_per_cluster, self.recluster_every = clients_per_cluster, recluster_every
        self.late_joiner, self.merge_below = late_joiner, merge_below
        self.clustered = 0
        self.centres: dict[int, list[Any]] = {}
        self.limit = float("inf")
        self.history: list[dict[str, Any]] = []
        self._points: dict[int, Any] = {}
        self._models: dict[int, ArrayRecord] = {}
        self._due = False

    def setup(self, setting: Setting) -> None:
        """See to it that there is something to cluster by.

        Raises:
            ConfigError: the last layer is to be clustered by, and is frozen.
        """
        super().setup(setting)
        trained = not setting.info.head.isdisjoint(setting.info.layout.trainable)
        allowed = "another one: the last layer is not trained"
        require(trained or self.signature != "last_layer", "signature", self.signature, allowed)

    # -- who is asked, and for what ------------------------------------------------------------

    def due(self, server_round: int) -> bool:
        """Whether this is a clustering round: the first after the warm-up, if it succeeds."""
        if not self.members:
            return server_round > self.warmup_rounds
        return bool(self.recluster_every and server_round >= self.clustered + self.recluster_every)

    def sample(self, server_round: int, nodes: list[int]) -> list[int] | None:
        """Everybody when clustering; else some of each cluster, and all who have none."""
        if self.due(server_round):
            return nodes
        if not (self.members and self.clients_per_cluster):
            return None
        chosen = [n for n in nodes if n not in self.members]
        for name in sorted(self.heads):
            inside = [n for n in nodes if self.members.get(n) == name]
            draw = stream(self.setting.seed, server_round, SERVER, f"cluster {name}")
            size = min(self.clients_per_cluster, len(inside))
            chosen += sorted(draw.choice(inside, size, replace=False).tolist()) if size else []
        return chosen

    def model_for(self, node: int, server_round: int) -> ArrayRecord:
        """The archived model when clustering, else the cluster's."""
        return self._archived() if self.due(server_round) else super().model_for(node, server_round)

    def told(self, node: int, server_round: int) -> dict[str, Any]:
        """Other epochs where a signature is asked for."""
        return {"epochs": self.signature_epochs} if self.asks(node, server_round) else {}

    def asks(self, node: int, server_round: int) -> bool:
        """Whether a node trains for its signature in this round."""
        joins = bool(self.members) and node not in self.members
        return bool(self.signature_epochs) and (joins or self.due(server_round))

    # -- what comes of the replies -------------------------------------------------------------

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Average by cluster; in a clustering round also cluster."""
        self._points, self._models, self._due = {}, {}, self.due(server_round)
        return super().aggregate_train(server_round, replies)

    def take(
        self, server_round: int, node: int, record: ArrayRecord, reply: Message
    ) -> int | bool | None:
        """Signatures are kept aside; whoever gave one does not enter a mean."""
        joins = bool(self.members) and node not in self.members
        if not (self._due or joins):
            return self.members.get(node)
        point = self.signature_of(record, reply)
        length = np.linalg.norm(point) if self.unit else 1.0
        self._points[node] = point / (length or 1.0)
        if self.init == "members" or joins:
            self._models[node] = record
        return False

    def signature_of(self, record: ArrayRecord, reply: Message) -> Any:
        """The vector by which a client is clustered, from its model; float64 [d]."""
        info = self.setting.info
        layout = info.layout
        mine, start = as_flat(record, layout), as_flat(self._archived(), layout)
        delta = (mine.flat - start.flat).double()
        if self.signature == "last_layer":
            parts = [layout.view(delta, n).reshape(-1) for n in layout.order if n in info.head]
            return torch.cat(parts).numpy()
        if self.signature == "state_dict":
            rest = [(mine.beside[n] - start.beside[n]).double().reshape(-1) for n in layout.beside]
            return torch.cat([delta, *rest]).numpy()
        delta = delta[: layout.num_trainable]
        if self.signature == "sketch":
            return clustering.sketch(delta.float(), self.sketch_size, self.setting.seed)
        return delta.numpy()

    def _archived(self) -> ArrayRecord:
        assert self.archive is not None
        return self.archive

    def regroup(self, server_round: int, nodes: list[int]) -> None:
        """Cluster, let joiners in, merge."""
        if self._due:
            self._cluster(server_round)
        elif self._points:
            self._join()
        if self.merge_below and not self._due:
            self._merge(server_round)
        self._points, self._models = {}, {}

    def _cluster(self, server_round: int) -> None:
        ids = sorted(self._points)
        points = np.stack([self._points[n] for n in ids])
        pairs = self.pairs_of(points)
        if len(ids) > 1:
            found = clustering.from_distances(np.array(ids), pairs, self.rule, points)
        else:
            found = clustering.cluster(ids, points, self.rule)
        members = self._renamed(found, points)
        self.settle({**self.members, **members}, self._heads(members))
        self.clustered, self.limit = server_round, found.threshold
        self.centres = {}
        for name in sorted(self.heads):
            inside = [i for i, n in enumerate(ids) if self.members[n] == name]
            if inside:
                self.centres[name] = [len(inside), self.centre_of(points[inside])]
        told = clustering.explain(found, pairs)
        clients = [n - 1 for n in ids]
        names = [self.members[n] for n in ids]
        self.history.append({"round": server_round, "clients": clients, "cluster": names, **told})

    def pairs_of(self, points: Any) -> Any:
        """Condensed distances of the signatures, float64 [N (N - 1) / 2]."""
        return clustering.distances(points, self.rule.metric)

    def _renamed(self, found: Clustering, points: Any) -> dict[int, int]:
        """The new clusters under their old names; the old clusters if the new are hardly better."""
        new = found.members()
        if not self.members:
            return new
        known = [i for i, n in enumerate(found.ids.tolist()) if n in self.members]
        old = np.array([self.members[found.ids[i]] for i in known])
        as_many = len(set(old.tolist())) == found.count
        if as_many and len(known) == len(points):
            before = clustering.scatter(points, clustering.canonical(old))
            if before <= HYSTERESIS * clustering.scatter(points, found.labels):
                return dict(zip(found.ids.tolist(), old.tolist(), strict=True))
        return clustering.match(self.members, new, self.fresh)

    def _heads(self, members: dict[int, int]) -> dict[int, FlatRecord]:
        """Models of the clusters: kept, or of new clusters the members' mean."""
        heads = dict(self.heads)
        for name in sorted(set(members.values()) - set(heads)):
            inside = [n for n, c in members.items() if c == name]
            known = {n: self.heads[self.members[n]] for n in inside if n in self.members}
            if self.init == "members" or known:
                heads[name] = self.mean_of(known or {n: self._models[n] for n in inside})
            else:
                heads[name] = as_flat(self._archived(), self.setting.info.layout)
        return heads

    def centre_of(self, points: Any) -> torch.Tensor:
        """What is kept of a cluster's signatures, for joiners: their mean."""
        return torch.from_numpy(points.mean(0))

    def costs(self, point: Any, names: list[int]) -> Any:
        """How far a joiner's signature is from each of the clusters, float64 [K]."""
        centres = np.stack([self.centres[c][1].numpy() for c in names])
        return clustering.merge_cost(point, centres, [self.centres[c][0] for c in names])

    def _join(self) -> None:
        """Late joiners: to the nearest cluster, or beyond the threshold to one of their own."""
        names, fresh = sorted(self.centres), self.fresh
        limit = self.limit if self.late_joiner == "threshold" else float("inf")
        members, heads = dict(self.members), dict(self.heads)
        for node in sorted(self._points):
            cost = self.costs(self._points[node], names)
            if cost.min() <= limit:
                members[node] = names[int(cost.argmin())]
                continue
            members[node], fresh = fresh, fresh + 1
            heads[members[node]] = as_flat(self._models[node], self.setting.info.layout)
            self.centres[members[node]] = [1, self.centre_of(self._points[node][None])]
        self.settle(members, heads)

    def _merge(self, server_round: int) -> None:
        """Merge the closest two clusters if their models have converged to each other."""
        names, p = sorted(self.heads), self.setting.info.layout.num_trainable
        start = as_flat(self._archived(), self.setting.info.layout).flat[:p]
        ways = {c: self.heads[c].flat[:p] - start for c in names}
        pairs = [
            (float((ways[a] - ways[b]).norm() / max(ways[a].norm(), ways[b].norm())), a, b)
            for i, a in enumerate(names)
            for b in names[i + 1 :]
            if max(ways[a].norm(), ways[b].norm()) > 0
        ]
        if not pairs or min(pairs)[0] >= self.merge_below:
            return
        ratio, kept, gone = min(pairs)
        inside = {n: self.heads[self.members[n]] for n in self.nodes_of(kept) + self.nodes_of(gone)}
        heads = {**self.heads, kept: self.mean_of(inside)}
        (n, a), (m, b) = (self.centres.get(c, [1, torch.zeros(1)]) for c in (kept, gone))
        self.centres[kept] = [n + m, (n * a + m * b) / (n + m)]
        self.centres.pop(gone, None)
        members = {n: kept if c == gone else c for n, c in self.members.items()}
        self.settle(members, heads)
        self.history.append({"round": server_round, "merged": [kept, gone], "ratio": ratio})

    # -- what outlives a round -----------------------------------------------------------------

    def artefacts(self) -> dict[str, Any]:
        """Every clustering with its tree and why it was cut there, and every merge."""
        rule = {n: getattr(self.rule, n) for n in self.rule.__dataclass_fields__}
        kind = {"signature": self.signature, "unit": self.unit}
        content = {"rule": rule, **kind, "events": self.history}
        return {"clustering": content} if self.history else {}

    def state_dict(self) -> dict[str, Any]:
        """Clusters, their centres, and the story of how they came about."""
        own = {
            "clustered": self.clustered,
            "limit": self.limit,
            "history": self.history,
            "centres": {str(c): v for c, v in self.centres.items()},
        }
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.clustered, self.limit = state["clustered"], state["limit"]
        self.history = state["history"]
        self.centres = {int(c): v for c, v in state["centres"].items()}
