"""What federated LoRA strategies share: who has which rank, and adapters in and out of records."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedsim.core.averaging import Mean, MetricMean, examples_of, metrics_of
from fedsim.core.errors import ConfigError, require
from fedsim.core.lora.factors import Adapter, Factors, truncated
from fedsim.core.model import ModelInfo
from fedsim.core.nodes import client_at, node_of
from fedsim.core.records import FlatRecord, as_flat, from_record
from fedsim.core.strategy import Aggregate, Served, Setting, Strategy

A, B = ".lora_A", ".lora_B"


def halves(info: ModelInfo) -> dict[str, tuple[str, str]]:
    """Names of the entries A and B of each adapted module, by its path."""
    names = {f".{n}": n for n in info.layout.names}
    paths = [n.removesuffix(A) for n in names if n.endswith(A)]
    return {p.removeprefix("."): (names[p + A], names[p + B]) for p in paths if p + B in names}


def require_lora(info: ModelInfo, who: str) -> dict[str, tuple[str, str]]:
    """As `halves`.

    Raises:
        ConfigError: the model has no low-rank updates.
    """
    found = halves(info)
    if not found:
        raise ConfigError(f'{who} needs low-rank updates: model = {{name = "lora", ...}}')
    return found


class LoRAStrategy(Strategy):
    """Base of the strategies that merge clients' adapters; subclasses say how, in `merge`.

    The model is one with low-rank updates on a frozen base (`model = "lora"`); only these travel,
    and what else is trainable (a head) is averaged by examples. All updates have one scaling,
    which therefore needs no folding.

    A client may have a lower rank than the model: then it is sent an adapter whose further ranks
    are zero in both factors. Their gradients are zero too, so local training leaves them zero. On
    the wire they are still there: bytes are those of the model's rank.

    Args:
        ranks: of the clients, in turn: client c has ``ranks[c % len(ranks)]``. None: the model's.
        weighted: weigh clients by their number of examples.

    Raises:
        ConfigError: a rank is below 1.
    """

    client = "fedavg"

    def __init__(self, ranks: list[int] | None = None, weighted: bool = True) -> None:
        require(ranks is None or (bool(ranks) and min(ranks) >= 1), "ranks", ranks, "1 or above")
        self.ranks, self.weighted = ranks, weighted
        self.smaller: dict[int, FlatRecord] = {}
        self.facts: dict[str, float] = {}
        self.sent: ArrayRecord | None = None

    def setup(self, setting: Setting) -> None:
        """Find the adapters.

        Raises:
            ConfigError: the model has none, or a client's rank is above the model's.
        """
        super().setup(setting)
        self.modules = require_lora(setting.info, type(self).__name__)
        shapes = dict(zip(setting.info.layout.names, setting.info.layout.shapes, strict=True))
        self.rank = max(shapes[a][0] for a, _ in self.modules.values())
        most = max(self.ranks or [1])
        require(most <= self.rank, "ranks", most, f"at most the model's rank {self.rank}")

    def rank_of(self, node: int) -> int:
        """The rank of a node's adapter."""
        return self.ranks[client_at(node) % len(self.ranks)] if self.ranks else self.rank

    def told(self, server_round: int, rank: int) -> dict[str, Any]:
        """Configuration for clients of a rank in one round, besides `client_config`."""
        return {}

    def adapter_of(self, record: ArrayRecord, rank: int) -> dict[str, Factors]:
        """The first ranks of a record's adapter."""
        state = from_record(record)
        return {
            m: truncated(Factors(state[a], state[b]), min(rank, state[a].shape[0]))
            for m, (a, b) in self.modules.items()
        }

    def with_adapter(self, record: FlatRecord, adapter: Adapter) -> FlatRecord:
        """A record with these factors, zero ranks behind them."""
        flat = record.flat.clone()
        for module, names in self.modules.items():
            width = record.layout.view(flat, names[0]).shape[0]
            factors = truncated(adapter[module], width)
            for name, tensor in zip(names, (factors.a, factors.b), strict=True):
                record.layout.view(flat, name).copy_(tensor)
        return record.with_flat(flat)

    def record_for(self, rank: int, arrays: ArrayRecord) -> ArrayRecord:
        """What a client of that rank is sent."""
        if rank >= self.rank:
            return arrays
        if rank in self.smaller:
            return self.smaller[rank]
        return self.with_adapter(as_flat(arrays), self.adapter_of(arrays, rank))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send every node the adapter of its rank."""
        self.sent = arrays
        groups: dict[int, list[int]] = {}
        for node in sorted(grid.get_node_ids()):
            groups.setdefault(self.rank_of(node), []).append(node)
        parts = [
            self.broadcast(
                "train",
                {"arrays": self.record_for(rank, arrays), **self.client_arrays()},
                {**config, "server-round": server_round, **self.told(server_round, rank)},
                nodes,
            )
            for rank, nodes in groups.items()
        ]
        return parts[0] if len(parts) == 1 else [m for part in parts for m in part]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """The merged adapter, one for each rank there is; the rest of the model is averaged."""
        mean, metrics = Mean(), MetricMean()
        adapters: list[Adapter] = []
        weights: list[float] = []
        reported: dict[int, MetricRecord] = {}
        for reply in replies:
            node, record = reply.metadata.src_node_id, reply.content.array_records["arrays"]
            weight = examples_of(reply.content) if self.weighted else 1.0
            mean.add(record, weight)
            metrics.add(metrics_of(reply.content), weight)
            adapters.append(self.adapter_of(record, self.rank_of(node)))
            weights.append(weight)
            reported[node] = metrics_of(reply.content)
        held = mean.record()
        if held is None:
            return None, None
        self.heard(reported)
        found = self.with_adapter(held, self.merge(server_round, adapters, weights, self.rank))
        nodes = map(node_of, range(self.setting.num_clients))
        others = {self.rank_of(n) for n in nodes} - {self.rank}
        self.smaller = {
            r: self.with_adapter(found, self.shrunk(server_round, adapters, weights, r, found))
            for r in sorted(others)
        }
        return found, MetricRecord({**metrics.record(), **self.facts})

    def heard(self, reported: Mapping[int, MetricRecord]) -> None:
        """What the clients reported, by node, before their adapters are merged."""

    @abstractmethod
    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """The adapter of a rank, from the clients' (in canonical order)."""

    def shrunk(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float],
        rank: int, merged: FlatRecord,
    ) -> Adapter:  # fmt: skip
        """The adapter for clients of a lower rank; default: the first ranks of the merged one."""
        return self.adapter_of(merged, rank)

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """One for each rank there is."""
        nodes: dict[int, list[int]] = {}
        for client in range(self.setting.num_clients):
            nodes.setdefault(self.rank_of(node_of(client)), []).append(node_of(client))
        if set(nodes) == {self.rank}:
            return {"model": Served(arrays)}
        return {f"rank-{r}": Served(self.record_for(r, arrays), nodes[r]) for r in sorted(nodes)}

    def state_dict(self) -> dict[str, Any]:
        """The adapters of lower ranks."""
        return {"smaller": {str(r): record.flat for r, record in self.smaller.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back (after `setup`)."""
        layout = self.setting.info.layout
        initial = self.setting.initial
        beside = as_flat(initial, layout).beside if initial is not None else {}
        self.smaller = {int(r): FlatRecord(layout, flat, beside) for r, flat in
                        state["smaller"].items()}  # fmt: skip


def where(info: ModelInfo, half: str) -> tuple[tuple[int, int], ...]:
    """First and last place in the vector of every factor ``"a"`` or ``"b"``."""
    names = [pair["ab".index(half)] for pair in halves(info).values()]
    spans = [info.layout.span(n) for n in names]
    return tuple((s.start, s.stop) for s in spans)


def mask(like: torch.Tensor, spans: Iterable[Iterable[int]]) -> torch.Tensor:
    """A vector that is True in these places."""
    inside = torch.zeros_like(like, dtype=torch.bool)
    for first, last in spans:
        inside[..., first:last] = True
    return inside
