"""Strategies that merge clients' updates into the frozen base."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.core.lora.factors import Adapter, Factors
from fedsim.core.lora.patches import Patches
from fedsim.core.lora.serving import LoRAStrategy, mean_gap
from fedsim.core.parts import narrow
from fedsim.core.records import FlatRecord, Layout
from fedsim.core.strategy import Aggregate, Setting


class Rebasing(LoRAStrategy):
    """Base of strategies whose merged update goes into the base model, wholly or in part.

    The base with all merges stays on the client (see `fedsim.core.lora.patches`), which is sent
    the merges it has missed, as factors while those are smaller than the sum. A client whose last
    reply did not arrive is sent the sum. Evaluation changes nothing on the client.

    Attributes:
        fresh: whether clients begin every round with a new adapter of their own.
    """

    client = "flora"
    fresh = True
    rebases = True
    """Whether anything is merged into the base at all."""

    def setup(self, setting: Setting) -> None:
        """Find where to merge into.

        Raises:
            ConfigError: the model has no such place.
        """
        super().setup(setting)
        self.held: dict[int, int] = {}
        self.unsure: set[int] = set()
        self.asked: list[int] = []
        if self.rebases:
            self.patches = Patches(setting.info, type(self).__name__)

    def told(self, server_round: int, rank: int) -> dict[str, Any]:
        """The rank, and whether adapter and base are the client's own."""
        return {"rank": rank, "fresh": self.fresh, "carried": self.rebases}

    def record_for(self, rank: int, arrays: ArrayRecord) -> FlatRecord:
        """The adapter, if clients go on from it, and what else is trained."""
        part = self.rest if self.fresh else self.part(rank)
        return narrow(self.whole(rank, arrays), part)

    def share(self, node: int) -> Any:
        """The rank, and what a node has of the base."""
        return self.rank_of(node), self._held(node) if self.rebases else None

    def _held(self, node: int) -> int | None:
        return None if node in self.unsure else self.held.get(node, 0)

    def records(self, node: int, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """The adapter, and what the node lacks of the base."""
        found = super().records(node, arrays)
        patch = self.patch_for(node, self.whole(self.rank, arrays)) if self.rebases else None
        return found if patch is None else {**found, "patch": patch}

    def patch_for(self, node: int, record: FlatRecord) -> ArrayRecord | None:
        """What a node lacks of the base; None: nothing."""
        return self.patches.since(self._held(node), record)

    def answer(self, sent: RecordDict) -> Layout:
        """An adapter of the client's rank, whatever was sent."""
        return self.part(int(str(sent.config_records["config"]["rank"])))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """As every LoRA strategy, and remember who was asked."""
        self.asked = sorted(grid.get_node_ids())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Also note who has which merges from now on."""
        heard: list[int] = []

        def noted() -> Iterable[Message]:
            for reply in replies:
                heard.append(reply.metadata.src_node_id)
                yield reply

        before = self.patches.version if self.rebases else 0
        found = super().aggregate_train(server_round, noted())
        if self.rebases and found[0] is not None:
            self.held.update(dict.fromkeys(heard, before))
            self.unsure = (self.unsure | set(self.asked)) - set(heard)
        return found

    def onward(
        self,
        server_round: int,
        rest: FlatRecord,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
    ) -> FlatRecord:
        """The base with the update merged into it, and the adapter to go on from."""
        if not self.rebases:
            return super().onward(server_round, rest, adapters, weights)
        adapter, update = self.divide(server_round, adapters, weights)
        self.facts["mean_gap"] = mean_gap(both(adapter, update), adapters, weights)
        held = self.with_rest(rest)
        if adapter is not None:
            held = self.with_adapter(held, adapter)
        return self.patches.merge(held, update)

    @abstractmethod
    def divide(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float]
    ) -> tuple[Adapter | None, Adapter]:
        """The adapter that clients go on from (None: fresh ones), and what goes into the base."""

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """The whole update."""
        return both(*self.divide(server_round, adapters, weights))

    def state_dict(self) -> dict[str, Any]:
        """The merges, and who has which."""
        if not self.rebases:
            return super().state_dict()
        held = {str(n): v for n, v in sorted(self.held.items())}
        mine = {"held": held, "unsure": sorted(self.unsure), "patches": self.patches.state_dict()}
        return {**super().state_dict(), **mine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        if self.rebases:
            self.held = {int(n): v for n, v in state["held"].items()}
            self.unsure = set(state["unsure"])
            self.patches.load_state_dict(state["patches"])


def both(adapter: Adapter | None, update: Adapter) -> Adapter:
    """Their sum, by concatenation."""
    if adapter is None:
        return update
    return {
        m: Factors(
            torch.cat([adapter[m].a * adapter[m].scaling, u.a * u.scaling]),
            torch.cat([adapter[m].b, u.b], 1),
        )
        for m, u in update.items()
    }
