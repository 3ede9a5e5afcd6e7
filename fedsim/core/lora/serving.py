"""What federated LoRA strategies share: who has which rank, and adapters in and out of records."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsim.core.averaging import Mean, MetricMean, examples_of, metrics_of
from fedsim.core.errors import ConfigError
from fedsim.core.lora.factors import Adapter, Factors, truncated
from fedsim.core.lora.ranks import Ranks
from fedsim.core.model import ModelInfo
from fedsim.core.nodes import node_of
from fedsim.core.parts import narrow, part_of, widened
from fedsim.core.personal import Shared
from fedsim.core.records import FlatRecord, Layout, as_flat, from_record
from fedsim.core.strategy import Aggregate, Served, Setting, Strategy

_A = re.compile(r"(?:(.+)\.)?lora_A(\.\w+\.weight)?")
"""Names of our factors, and of peft's."""


def halves(info: ModelInfo) -> dict[str, tuple[str, str]]:
    """Names of the entries A and B of each adapted module, by its path."""
    names, found = set(info.layout.names), {}
    for name in info.layout.names:
        if (match := _A.fullmatch(name)) is not None:
            other = name.removesuffix(f"lora_A{match[2] or ''}") + f"lora_B{match[2] or ''}"
            if other in names:
                found[match[1] or ""] = (name, other)
    return found


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

    A client may have a lower rank r than the model: it is sent r rows of A and r columns of B and
    sends as many. Where it trains, the model's further ranks are zero in both factors; so are
    their gradients, and local training leaves them zero.

    Column ``mean_gap`` of the results is the distance of the merged update to the exact mean of
    the clients' updates, relative to it (Frobenius norms over all modules together).

    Args:
        ranks: of the clients: a list, dealt in turn (client c has ``ranks[c % len(ranks)]``), or
            a table by device profile (`[clock]`). None: the model's.
        weighted: weigh clients by their number of examples.

    Raises:
        ConfigError: a rank is below 1.
    """

    client = "fedavg"

    def __init__(
        self, ranks: list[int] | dict[str, int] | None = None, weighted: bool = True
    ) -> None:
        self.ranks, self.weighted = Ranks(ranks), weighted
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
        layout = setting.info.layout
        self.shapes = dict(zip(layout.names, layout.shapes, strict=True))
        self.rank = max(self.shapes[a][0] for a, _ in self.modules.values())
        self.ranks.check(self.rank, setting)
        factors = {n for pair in self.modules.values() for n in pair}
        others = frozenset(layout.names) - factors - setting.info.still
        self.rest = layout.restrict(others)
        self._parts: dict[int, Layout] = {}

    def rank_of(self, node: int) -> int:
        """The rank of a node's adapter."""
        return self.ranks.of(node, self.rank)

    def told(self, server_round: int, rank: int) -> dict[str, Any]:
        """Configuration for clients of a rank in one round, besides `client_config`."""
        return {}

    def client_config(self) -> dict[str, Any]:
        """Which base the adapters belong to: a client with another one refuses."""
        return {"base": self.setting.info.base}

    def part(self, rank: int) -> Layout:
        """The layout of what a client of that rank holds: its adapter, and the rest."""
        if rank not in self._parts:
            shapes = dict(zip(self.rest.names, self.rest.shapes, strict=True))
            for a, b in self.modules.values():
                shapes[a] = (min(rank, self.shapes[a][0]), self.shapes[a][1])
                shapes[b] = (self.shapes[b][0], min(rank, self.shapes[b][1]))
            self._parts[rank] = part_of(self.setting.info.layout, shapes)
        return self._parts[rank]

    def answer(self, sent: RecordDict) -> Layout:
        """The layout of the model that the reply to this message carries."""
        return as_flat(sent.array_records["arrays"]).layout

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """The model alone, in the layout of `answer`."""
        return {"arrays": FlatRecord(self.answer(sent), torch.empty(0))}

    def adapter_of(self, record: ArrayRecord) -> dict[str, Factors]:
        """A record's adapter."""
        state = from_record(record)
        return {m: Factors(state[a], state[b]) for m, (a, b) in self.modules.items()}

    def with_adapter(self, record: FlatRecord, adapter: Adapter) -> FlatRecord:
        """A record with these factors, zero ranks behind them."""
        flat = record.flat.clone()
        for module, names in self.modules.items():
            width = record.layout.view(flat, names[0]).shape[0]
            factors = truncated(adapter[module], width)
            for name, tensor in zip(names, (factors.a, factors.b), strict=True):
                record.layout.view(flat, name).copy_(tensor)
        return record.with_flat(flat)

    def whole(self, rank: int, arrays: ArrayRecord) -> FlatRecord:
        """The whole model for clients of that rank, with zeros behind their ranks."""
        held = as_flat(arrays, self.setting.info.layout)
        if rank >= self.rank:
            return held
        if rank in self.smaller:
            return self.smaller[rank]
        adapter = {m: truncated(f, min(rank, f.rank)) for m, f in self.adapter_of(held).items()}
        return self.with_adapter(held, adapter)

    def record_for(self, rank: int, arrays: ArrayRecord) -> FlatRecord:
        """What a client of that rank is sent."""
        return narrow(self.whole(rank, arrays), self.part(rank))

    def share(self, node: int) -> Any:
        """What nodes have in common who are sent the same."""
        return self.rank_of(node)

    def records(self, node: int, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """What a node is sent, and all with the same `share`."""
        return {"arrays": self.record_for(self.rank_of(node), arrays)}

    def messages(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """To every node of the grid what belongs to its rank, one broadcast for all who share."""
        groups: dict[Any, list[int]] = {}
        for node in sorted(grid.get_node_ids()):
            groups.setdefault(self.share(node), []).append(node)
        parts = []
        for nodes in groups.values():
            rank = self.rank_of(nodes[0])
            content = {**self.records(nodes[0], arrays), **self.client_arrays()}
            told = {**config, "server-round": server_round, **self.told(server_round, rank)}
            parts.append(self.broadcast(kind, content, told, nodes))
        return parts[0] if len(parts) == 1 else [m for part in parts for m in part]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send every node the adapter of its rank."""
        self.sent = arrays
        return self.messages("train", server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """As for training."""
        return self.messages("evaluate", server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """The merged adapter, one for each rank there is; the rest of the model is averaged."""
        rest, metrics = Mean(), MetricMean()
        adapters: list[Adapter] = []
        weights: list[float] = []
        reported: dict[int, MetricRecord] = {}
        for reply in replies:
            weight = examples_of(reply.content) if self.weighted else 1.0
            state = self.state_of(reply.metadata.src_node_id, reply.content)
            beside = {n: state[n] for n in self.rest.beside}
            rest.add(FlatRecord(self.rest, self.rest.flatten(state), beside), weight)
            metrics.add(metrics_of(reply.content), weight)
            adapters.append({m: Factors(state[a], state[b]) for m, (a, b) in self.modules.items()})
            weights.append(weight)
            reported[reply.metadata.src_node_id] = metrics_of(reply.content)
        mean = rest.record()
        if mean is None or self.sent is None:
            return None, None
        self.facts = {}
        self.heard(reported)
        found = self.onward(server_round, mean, adapters, weights)
        return found, MetricRecord({**metrics.record(), **self.facts})

    def onward(
        self,
        server_round: int,
        rest: FlatRecord,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
    ) -> FlatRecord:
        """The model after a round, from the clients' adapters and the mean of everything else."""
        merged = self.merge(server_round, adapters, weights, self.rank)
        self.facts["mean_gap"] = mean_gap(merged, adapters, weights)
        found = self.with_adapter(self.with_rest(rest), merged)
        nodes = map(node_of, range(self.setting.num_clients))
        others = {self.rank_of(n) for n in nodes} - {self.rank}
        self.smaller = {
            r: self.with_adapter(found, self.shrunk(server_round, adapters, weights, r, found))
            for r in sorted(others)
        }
        return found

    def with_rest(self, rest: FlatRecord) -> FlatRecord:
        """The model that was sent, with new values of all that is no factor."""
        assert self.sent is not None, "call configure_train() first"
        held = as_flat(self.sent, self.setting.info.layout)
        flat, beside = held.flat.clone(), dict(held.beside)
        for name, tensor in rest.state().items():
            if name in beside:
                beside[name] = tensor
            else:
                view = held.layout.view(flat, name)
                view.copy_(widened(tensor, view.shape))
        return held.with_flat(flat, beside)

    def state_of(self, node: int, content: RecordDict) -> Mapping[str, torch.Tensor]:
        """The entries of the model that a node sent back; factors may have fewer ranks."""
        return from_record(content.array_records["arrays"])

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
        return {m: truncated(f, min(rank, f.rank)) for m, f in self.adapter_of(merged).items()}

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """One for each rank there is."""
        nodes: dict[int, list[int]] = {}
        for client in range(self.setting.num_clients):
            nodes.setdefault(self.rank_of(node_of(client)), []).append(node_of(client))
        if set(nodes) == {self.rank}:
            return {"model": Served(arrays)}
        return {f"rank-{r}": Served(self.whole(r, arrays), nodes[r]) for r in sorted(nodes)}

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


def mean_gap(merged: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    """How far a merged update is from the exact mean of updates, relative to it.

    ``|dW - sum p_i dW_i| / |sum p_i dW_i|`` over all modules; from inner products of the factors,
    nothing is made dense. 0 where both are zero.
    """
    total, off, size = sum(weights), 0.0, 0.0
    for module, found in merged.items():
        mine = [(a[module], w / total) for a, w in zip(adapters, weights, strict=True)]
        rows = torch.cat([f.a.double() * (f.scaling * p) for f, p in mine])
        columns = torch.cat([f.b.double() for f, _ in mine], 1)
        size += float(Factors(rows, columns).norm()) ** 2
        rows = torch.cat([found.a.double() * found.scaling, -rows])
        off += float(Factors(rows, torch.cat([found.b.double(), columns], 1)).norm()) ** 2
    return (off / size) ** 0.5 if size else float(off > 0)


def factors_of(info: ModelInfo, half: str) -> frozenset[str]:
    """Names of every factor ``"a"`` or ``"b"``."""
    return frozenset(pair["ab".index(half)] for pair in halves(info).values())


class OneFactor(Shared):
    """Of every update one factor never travels: mix it into a strategy, before its base.

    Attributes:
        stays: which one, ``"a"`` or ``"b"``; the client half says the same.
    """

    stays: str

    def setup(self, setting: Setting) -> None:
        """Look for adapters.

        Raises:
            ConfigError: the model has none.
        """
        super().setup(setting)
        require_lora(setting.info, type(self).__name__)

    def private(self, info: ModelInfo) -> frozenset[str]:
        """The factors that stay."""
        return factors_of(info, self.stays)


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
