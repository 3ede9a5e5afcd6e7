"""FedSpine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.core import rng
from fedsim.core.errors import ConfigError, require
from fedsim.core.lora.factors import Adapter
from fedsim.core.lora.pruned import (
    AGGREGATIONS,
    aggregate,
    cut,
    cut_layout,
    moved,
    restored,
    revived,
)
from fedsim.core.lora.serving import LoRAStrategy
from fedsim.core.nodes import client_at
from fedsim.core.packets import Expected, packet, packet_of
from fedsim.core.policy import Action, check, made, rewards
from fedsim.core.pruning import SCOPES, Pruning
from fedsim.core.records import FlatRecord, as_flat, from_record
from fedsim.core.strategy import Setting
from fedsim.core.structure import packed


class FedSpine(LoRAStrategy):
    """FedSpine: federated LoRA on models that every client prunes a little further each round.

    Yao et al. 2025, *Efficient Deployment of Large Language Models on Resource-constrained Devices*
    (arXiv 2501.02438). Clients tune an adapter and remove attention heads and feed-forward channels
    in turns; a bandit chooses how much each prunes and of which rank its adapter is, from what the
    last rounds gave, without knowing the devices.

    Verified: importance from LoRA gradients and the schedule of sparsity, as LoRAPrune's code has
    them (FedSpine's own variant could not be read). **Reconstructed** from a description: the
    aggregation (`aggregation`, `missing`), the bandit and its reward (`policy`, `fedsim.core
    .policy`). Ours: clients begin each round with new importance, so that they hold no state, and
    the server remembers who has which groups left. Time is that of the virtual clock. With
    ``target = 0`` and one rank it is FlexLoRA (`dense`) or FedIT (`pad`), bit for bit where those
    run one client after another, as this does.

    Needs ``model = {name = "lora", prunable = true, ...}``.

    Args:
        target: share to be gone in the end, of the groups of each structure or as `scope` says.
        step: most that a client prunes in one round.
        interval: local steps between prunings.
        smoothing: of the importance over local steps.
        scope: ``"layer"``: every structure loses the same share of its groups; ``"global"``: groups
            compete by importance per weight in the whole model, and `target` is a share of all
            prunable weights (`fedsim.core.pruning`).
        first: share of the layers, from the input, that is not pruned.
        last: leave the last layer alone.
        policy: how much everybody prunes, and of which rank: ``"ucb_tree"``, ``"fixed"``,
            ``"random"`` or ``"oracle"``, or a table with the name and the arguments of
            `fedsim.core.policy`: ``{name = "ucb_tree", lowest = 2, exploration = 0.5}``.
        aggregation: ``"dense"``, ``"pad"`` or ``"lego"`` (`fedsim.core.lora.pruned.aggregate`).
        missing: ``"renormalise"`` or ``"keep_global"``.
        beta: weigh a client by ``(1 - pruned share)^beta`` as well.
        eta: and by the norm of its update to this power.
        reward: weights of loss, pruning progress and importance in the reward.
        weighted: weigh clients by their number of examples.

    Raises:
        ConfigError: a value is out of range.
    """

    client = "fedspine"

    def __init__(
        self,
        target: float = 0.5,
        step: float = 0.1,
        interval: int = 20,
        smoothing: float = 0.9,
        scope: str = "layer",
        first: float = 0.1,
        last: bool = True,
        policy: str | dict[str, Any] = "ucb_tree",
        aggregation: str = "dense",
        missing: str = "renormalise",
        beta: float = 0.0,
        eta: float = 0.0,
        reward: tuple[float, float, float] = (1.0, 1.0, 1.0),
        weighted: bool = True,
    ) -> None:
        super().__init__(None, weighted)
        require(0 <= target < 1, "target", target, "at least 0 and below 1")
        require(0 < step <= 1, "step", step, "above 0, at most 1")
        require(interval >= 1, "interval", interval, "1 or above")
        require(0 <= smoothing < 1, "smoothing", smoothing, "at least 0 and below 1")
        require(0 <= first < 1, "first", first, "at least 0 and below 1")
        check(policy)
        require(scope in SCOPES, "scope", scope, " or ".join(SCOPES))
        require(aggregation in AGGREGATIONS, "aggregation", aggregation, " or ".join(AGGREGATIONS))
        known = ("renormalise", "keep_global")
        require(missing in known, "missing", missing, " or ".join(known))
        require(beta >= 0, "beta", beta, "0 or above")
        require(eta >= 0, "eta", eta, "0 or above")
        sound = len(reward) == 3 and min(reward) >= 0 and sum(reward) > 0
        require(sound, "reward", list(reward), "three numbers from 0, not all 0")
        self.target, self.step, self.interval, self.smoothing = target, step, interval, smoothing
        self.scope, self.first, self.last, self.asks = scope, first, last, policy
        self.aggregation, self.missing, self.beta, self.eta = aggregation, missing, beta, eta
        self.worth = (reward[0], reward[1], reward[2])
        self.left: dict[int, dict[str, Tensor]] = {}
        self.last_rank: dict[int, int] = {}
        self.asked: dict[int, Action] = {}
        self.found: dict[int, dict[str, Tensor]] = {}
        self.said: Mapping[int, MetricRecord] = {}
        self.seconds: dict[int, float] = {}

    def setup(self, setting: Setting) -> None:
        """Find what can be pruned, and make the policy.

        Raises:
            ConfigError: the model cannot be pruned, or the oracle is not told a device's speed.
        """
        super().setup(setting)
        every = setting.info.structures
        if every is None:
            raise ConfigError('fedspine needs model = {name = "lora", prunable = true, ...}')
        self.plan = Pruning(every, every.inner(self.first, self.last), self.scope)
        require(bool(self.plan.items), "first", self.first, "such that a layer is left to prune")
        self.policy = made(self.asks, self.rank, setting.devices)

    def client_config(self) -> dict[str, Any]:
        """How to prune."""
        told = {
            "interval": self.interval, "smoothing": self.smoothing, "first": self.first,
            "last": self.last,
        }  # fmt: skip
        return told if self.scope == "layer" else {**told, "scope": self.scope}

    def kept(self, node: int) -> dict[str, Tensor]:
        """Which groups a node has left."""
        return self.left.get(node) or self.plan.structures.whole()

    def _message(
        self, kind: str, node: int, arrays: ArrayRecord, config: Mapping[str, Any], rank: int,
        target: float = 0.0,
    ) -> Message:  # fmt: skip
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
        """Ask the policy for every node, and send it what it has left of the adapter."""
        self.sent, self.asked, self.found, self.seconds, messages = arrays, {}, {}, {}, []
        for node in sorted(grid.get_node_ids()):
            draw = rng.stream(self.setting.seed, server_round, client_at(node), "policy")
            action, gone = (
                self.policy.select(client_at(node), draw),
                self.plan.gone(self.kept(node)),
            )
            target = gone + action.step * max(0.0, min(self.step, self.target - gone))
            self.asked[node] = action
            told = {**config, "server-round": server_round}
            messages.append(self._message("train", node, arrays, told, action.rank, target))
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """To every node its own pruned model."""
        told = {**config, "server-round": server_round}
        nodes = sorted(grid.get_node_ids())
        return [
            self._message("evaluate", n, arrays, told, self.last_rank.get(n, self.rank))
            for n in nodes
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

    def state_of(self, node: int, content: RecordDict) -> Mapping[str, Tensor]:
        """Factors of full shape; what the node has left is noted for `merge`."""
        self.found[node] = self.plan.unpacked(packet_of(content.array_records["kept"]))
        mine = self.plan.travelling(self.kept(node), self.found[node])
        state = from_record(content.array_records["arrays"])
        whole = restored(state, self.setting.info, self.modules, mine)
        if mine is self.found[node]:
            return whole
        rank = self.asked[node].rank  # what is gone counts as zero, whatever was sent
        small = cut(whole, self.setting.info, self.modules, self.found[node], rank)
        return restored(small.state(), self.setting.info, self.modules, self.found[node])

    def heard(self, reported: Mapping[int, MetricRecord]) -> None:
        """Keep it for the policy."""
        self.said = reported

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """By what the clients have left; and credit the policy."""
        assert self.sent is not None
        before = self.adapter_of(self.sent)
        norms = [moved(a, before) for a in adapters]
        self._credit(norms)
        self.left |= self.found
        self.last_rank |= {node: self.asked[node].rank for node in self.found}
        shares = [self.plan.gone(kept) for kept in self.found.values()]
        weighed = [
            w * (1 - p) ** self.beta * n**self.eta
            for w, p, n in zip(weights, shares, norms, strict=True)
        ]
        self.facts["pruned_mean"] = sum(shares) / len(shares)
        self.facts["rank_mean"] = sum(self.asked[n].rank for n in self.found) / len(shares)
        sides = [self.plan.structures.sides(kept) for kept in self.found.values()]
        merged = aggregate(
            adapters, weighed if sum(weighed) > 0 else weights, sides, before, rank,
            self.aggregation, self.missing,
        )  # fmt: skip
        first = self.setting.initial
        return merged if first is None else revived(merged, self.adapter_of(first))

    def _credit(self, norms: Sequence[float]) -> None:
        """Tell the policy what its actions were worth."""
        gains, progress = [], []
        for node, kept in self.found.items():
            start, end = (cast(float, self.said[node][k]) for k in ("loss_start", "loss_end"))
            gains.append((start - end) / max(abs(start), 1e-8))
            gone = self.plan.gone(self.kept(node))
            progress.append((self.plan.gone(kept) - gone) / (self.target - gone + 1e-8))
        took = [self.seconds.get(node, 0.0) for node in self.found]
        values = rewards(gains, progress, norms, took, self.worth)
        for node, value in zip(self.found, values, strict=True):
            self.policy.observe(client_at(node), self.asked[node], value)

    def artefacts(self) -> dict[str, Any]:
        """Of every client that took part: what it has left, and its last rank."""
        return {
            "fedspine": {
                str(client_at(n)): {
                    "rank": self.last_rank[n],
                    "pruned": self.plan.gone(self.kept(n)),
                    "kept": {k: m.nonzero().flatten().tolist() for k, m in self.kept(n).items()},
                }
                for n in sorted(self.left)
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """What everybody has left, ranks, and what the policy learned."""
        return {
            **super().state_dict(),
            "left": {str(n): packed(k, self.plan.items) for n, k in sorted(self.left.items())},
            "ranks": {str(n): r for n, r in sorted(self.last_rank.items())},
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back (after `setup`)."""
        super().load_state_dict(state)
        self.left = {
            int(n): self.plan.unpacked(b.numpy().tobytes()) for n, b in state["left"].items()
        }
        self.last_rank = {int(n): r for n, r in state["ranks"].items()}
        self.policy.load_state_dict(state["policy"])
