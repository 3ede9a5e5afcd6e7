"""Strategies that need to know model and federation, also in Flower's own loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim.core.model import ModelInfo
from fedsim.core.records import Layout, from_record
from fedsim.core.strategy import Aggregate, Setting, Strategy

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def guessed(arrays: ArrayRecord) -> ModelInfo:
    """What the names of a model's entries say: the last layer, and which layers normalise.

    Where the module is at hand, `ModelInfo.of` knows.
    """
    state = from_record(arrays)
    owner = {name: name.rpartition(".")[0] for name in state}
    normalising = {owner[n] for n in state if n.rpartition(".")[2] in BUFFERS}
    parameters = [n for n in state if n.rpartition(".")[2] not in BUFFERS]
    last = owner[parameters[-1]] if parameters else ""
    return ModelInfo(
        Layout.of(state, frozenset(parameters)),
        {n: "BatchNorm1d" if owner[n] in normalising else "Module" for n in state},
        frozenset(state) - frozenset(parameters),
        frozenset(n for n in state if owner[n] == last),
    )


class Unaided(Strategy):
    """Mix it into a strategy before its base: `start` makes up for what only fedsim's loop does."""

    def start(  # type: ignore[override]
        self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, **options: Any
    ) -> Any:
        """As Flower's `Strategy.start`, after `setup` and `start_arrays`.

        Args:
            grid: whose nodes are the population.
            initial_arrays: the initial model.
            num_rounds: rounds to run.
            options: of Flower's `start`; the seed is that of ``train_config["seed"]``, else 0.
        """
        if not hasattr(self, "setting"):
            seed = int(str((options.get("train_config") or {}).get("seed", 0)))
            nodes, info = sorted(grid.get_node_ids()), guessed(initial_arrays)
            self.setup(Setting(info, len(nodes), seed, num_rounds, nodes=nodes))
        first = self.start_arrays(initial_arrays)
        if type(self).exchange is Strategy.exchange:
            return super().start(grid, first, num_rounds, **options)
        return Spoken(self, options.get("timeout", 3600)).start(grid, first, num_rounds, **options)


class Spoken(FlowerStrategy):
    """Lets Flower's loop hold conversations of several phases (see `Strategy.exchange`).

    Args:
        strategy: whose rounds are conversations.
        timeout: seconds to wait for the replies of a phase.
    """

    def __init__(self, strategy: Strategy, timeout: float) -> None:
        self._strategy, self._timeout = strategy, timeout

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the strategy says first."""
        self._grid = grid
        self._round = self._strategy.exchange(server_round, arrays, config, grid)
        return next(self._round)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """The rest of the round."""
        while True:
            try:
                more = self._round.send([r for r in replies if not r.has_error()])
            except StopIteration as done:
                result: Aggregate = done.value
                return result
            answers = self._grid.send_and_receive(more, timeout=self._timeout)
            replies = sorted(answers, key=lambda reply: reply.metadata.src_node_id)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Pass on."""
        return self._strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Pass on."""
        return self._strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Pass on."""
        self._strategy.summary()
