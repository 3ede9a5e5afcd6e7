"""The base of every server half: a Flower `Strategy` with a few optional abilities more."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from fedsim.core.averaging import MetricMean, examples_of, metrics_of
from fedsim.core.bulk import Broadcast
from fedsim.core.model import FlatModel, ModelInfo
from fedsim.core.nodes import node_of
from fedsim.core.vector import Resident

Aggregate = tuple["ArrayRecord | None", "MetricRecord | None"]
Exchange = Generator[Sequence[Message], Iterable[Message], Aggregate]
Evaluate = Callable[[ArrayRecord, "int | None"], float]
"""Mean loss of a model: on the central test set (None), or on the data of one node."""


def route(client: str) -> str:
    """The message action of a client half: its name, or its import path made an identifier."""
    return client.replace(".", "_").replace(":", "__")


@dataclass(frozen=True)
class Served:
    """A model and whom it is for.

    Attributes:
        arrays: the model.
        clients: node ids it is meant for; None means every client.
    """

    arrays: ArrayRecord
    clients: Sequence[int] | None = None


@dataclass(frozen=True)
class Setting:
    """What a strategy is told once, before the first round.

    Attributes:
        info: names and shapes of the model.
        num_clients: size of the population.
        seed: seed of the run.
        rounds: number of rounds planned.
        evaluate: for diagnostics, where the server can evaluate models; on a node's data it uses
            the held-out examples, or the training examples where there are none.
        initial: the initial model, which every client can make for itself; read-only.
        devices: name of the device profile of each client; empty where the server does not know.
        models: the architectures, where clients differ; the first is that of `initial`.
        assignment: which architecture each client has, repeated over the clients.
        public: inputs of the public examples, in their order; None: there are none.
        public_digest: digest of the public examples.
        num_outputs: classes, vocabulary size, or regression outputs.
        resident: gives the vector that this process has for a model; None: there is none.
        nodes: node ids of the population, where they do not follow from client numbers.
    """

    info: ModelInfo
    num_clients: int
    seed: int
    rounds: int
    evaluate: Evaluate | None = None
    initial: ArrayRecord | None = None
    devices: tuple[str, ...] = ()
    models: Sequence[FlatModel] = ()
    assignment: Sequence[int] = (0,)
    public: Tensor | None = None
    public_digest: str = ""
    num_outputs: int = 0
    resident: Callable[[], Resident] | None = None
    nodes: Sequence[int] = ()

    @property
    def population(self) -> list[int]:
        """Node ids of all clients, ascending."""
        return sorted(self.nodes) or [node_of(c) for c in range(self.num_clients)]


class Strategy(FlowerStrategy):
    """Base of the server halves.

    It is a plain Flower strategy: `start(grid, arrays)` works in any Flower app. fedsim's round
    loop uses what is below as well. Subclasses implement `aggregate_train` and override what
    differs; state that outlives a round goes into `state_dict`.
    """

    client: ClassVar[str] = ""
    """Name of the client half: the route is ``train.<client>``."""

    def setup(self, setting: Setting) -> None:
        """Called once before the first round, and again after a resume."""
        self.setting = setting

    def client_config(self) -> dict[str, Any]:
        """Hyper-parameters for the client half, added to every message's configuration."""
        return {}

    def client_arrays(self) -> dict[str, ArrayRecord]:
        """Array records for every client besides the model, by name."""
        return {}

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """What array records a reply must carry: for each name, a record of the same layout."""
        return sent.array_records

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """What the server holds at first, given the initial model."""
        return arrays

    def sample(self, server_round: int, nodes: list[int]) -> list[int] | None:
        """Choose this round's cohort out of `nodes`; None leaves it to the runner."""
        return None

    def message(
        self, kind: str, content: Mapping[str, Any], config: Mapping[str, Any], node: int
    ) -> Message:
        """A message to the client half: `content` records plus the configuration.

        Args:
            kind: ``"train"`` or ``"evaluate"``.
            content: array records by name.
            config: configuration of the round.
            node: node id of the client.
        """
        record = RecordDict({**content, "config": ConfigRecord({**config, **self.client_config()})})
        return Message(record, dst_node_id=node, message_type=f"{kind}.{route(self.client)}")

    def broadcast(
        self,
        kind: str,
        content: Mapping[str, Any],
        config: Mapping[str, Any],
        nodes: Sequence[int],
    ) -> Sequence[Message]:
        """What `message` makes for each of these nodes, as one sequence.

        Args:
            kind: ``"train"`` or ``"evaluate"``.
            content: array records by name.
            config: configuration of the round.
            nodes: node ids, ascending.
        """
        if type(self).message is not Strategy.message:
            return [self.message(kind, content, config, node) for node in nodes]
        record = RecordDict({**content, "config": ConfigRecord({**config, **self.client_config()})})
        return Broadcast(record, f"{kind}.{route(self.client)}", nodes)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send the model to every node of the grid (the runner's grid shows the cohort)."""
        told = {**config, "server-round": server_round}
        content = {"arrays": arrays, **self.client_arrays()}
        return self.broadcast("train", content, told, sorted(grid.get_node_ids()))

    @abstractmethod
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """The new model and metrics, from admitted replies in canonical order.

        `replies` may be a one-way stream that raises at its end if too few replies were admitted:
        change the strategy's state only after the last one was taken.
        """

    def exchange(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Exchange:
        """One round as a conversation: yield messages, get replies, return the aggregate.

        Override it for rounds of several phases. Each `yield` is answered by the admitted replies.
        """
        replies = yield self.configure_train(server_round, arrays, config, grid)
        return self.aggregate_train(server_round, replies)

    def timed(self, node: int, seconds: float) -> None:
        """Told how long a node took, in simulated seconds, before its reply is aggregated."""

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """The models there are, and for whom. Default: one, for everybody.

        None at all: models stay with the clients, who are asked to judge them.
        """
        return {"model": Served(arrays)}

    def also_evaluated(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """Further models to judge on the central test set, by the prefix of their columns."""
        return {}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send every node of the grid the model meant for it."""
        told = {**config, "server-round": server_round}
        nodes = sorted(grid.get_node_ids())
        models, parts = self.models(arrays), []
        if not models:
            return self.broadcast("evaluate", self.client_arrays(), told, nodes)
        for served in models.values():
            mine = nodes if served.clients is None else sorted(set(nodes) & set(served.clients))
            content = {"arrays": served.arrays, **self.client_arrays()}
            parts.append(self.broadcast("evaluate", content, told, mine))
        return parts[0] if len(parts) == 1 else [m for part in parts for m in part]

    def cluster_of(self, node: int) -> int | None:
        """The cluster that a node is in; None if it is in none, or there are no clusters."""
        return None

    def artefacts(self) -> dict[str, Any]:
        """JSON values that explain the run, by name; each becomes a file of the run folder."""
        return {}

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Mean of the clients' metrics, weighted by their held-out examples."""
        mean = MetricMean()
        for reply in replies:
            if not reply.has_error():
                mean.add(metrics_of(reply.content), examples_of(reply.content))
        return mean.record() if mean.total else None

    def ledger_entry(self) -> bytes | None:
        """What the last aggregated round adds to the run's ledger; None: this strategy has none.

        From all entries `replay` makes what the server holds, without any checkpoint.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """State that outlives a round: tensors, numbers, strings, lists and dicts of these."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; later rounds continue bit-identically."""

    def summary(self) -> None:
        """Flower's hook for logging the configuration; the run folder has it already."""
