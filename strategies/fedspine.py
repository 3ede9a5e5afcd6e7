"""FedSpine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from fedsim.core import rng
from fedsim.core.errors import ConfigError, require
from fedsim.core.lora.factors import Adapter
from fedsim.core.lora.pruned import AGGREGATIONS, aggregate, moved, revived
from fedsim.core.lora.pruned_serving import PrunedStrategy
from fedsim.core.nodes import client_at
from fedsim.core.policy import Action, check, made, rewards
from fedsim.core.pruning import SCOPES, Pruning
from fedsim.core.strategy import Setting


class FedSpine(PrunedStrategy):
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
        super().__init__(weighted)
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
        self.asked: dict[int, Action] = {}

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
        names = ("interval", "smoothing", "first", "last")
        told = {n: getattr(self, n) for n in names}
        return told if self.scope == "layer" else {**told, "scope": self.scope}

    def ask(self, server_round: int, node: int) -> tuple[int, float]:
        """What the policy chooses: a rank, and how far towards `target` in this round."""
        client = client_at(node)
        draw = rng.stream(self.setting.seed, server_round, client, "policy")
        action = self.asked[node] = self.policy.select(client, draw)
        gone = self.plan.gone(self.kept(node))
        return action.rank, gone + action.step * max(0.0, min(self.step, self.target - gone))

    def merge(
        self, server_round: int, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
    ) -> Adapter:
        """By what the clients have left; and credit the policy."""
        assert self.sent is not None
        before = self.adapter_of(self.sent)
        norms = [moved(a, before) for a in adapters]
        self._credit(norms)
        shares = [self.plan.gone(kept) for kept in self.found.values()]
        weighed = [
            w * (1 - p) ** self.beta * n**self.eta
            for w, p, n in zip(weights, shares, norms, strict=True)
        ]
        self.facts["pruned_mean"] = sum(shares) / len(shares)
        self.facts["rank_mean"] = sum(self.rank_asked[n] for n in self.found) / len(shares)
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

    def state_dict(self) -> dict[str, Any]:
        """What everybody has left, ranks, and what the policy learned."""
        return {**super().state_dict(), "policy": self.policy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back (after `setup`)."""
        super().load_state_dict(state)
        self.policy.load_state_dict(state["policy"])
