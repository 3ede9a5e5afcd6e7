"""Strategies that need to know model and federation, also in Flower's own loop."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedsim.core.model import ModelInfo
from fedsim.core.records import Layout, from_record
from fedsim.core.strategy import Setting, Strategy

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
            nodes = len(list(grid.get_node_ids()))
            self.setup(Setting(guessed(initial_arrays), nodes, seed, num_rounds))
        return super().start(grid, self.start_arrays(initial_arrays), num_rounds, **options)
