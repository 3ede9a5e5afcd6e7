"""Who is asked for what: policies that choose a pruning step and a rank for each client.

An action is a point of ``[0, 1] x [log2 r_min, log2 r_max]``: how much of the allowed step of
pruning to take, and the rank, rounded to a power of two.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fedsim.core.errors import ConfigError, require

TINY = 1e-6
"""Discounted observations below which a leaf counts as untried."""


class Action(NamedTuple):
    """What a client is asked for.

    Attributes:
        step: share of the largest step of pruning allowed, from 0 to 1.
        rank: of its adapter.
        place: where in the action space that is, in unit coordinates, for policies that care.
    """

    step: float
    rank: int
    place: tuple[float, float] = (1.0, 1.0)


class ConfigPolicy:
    """Base of the policies.

    Args:
        lowest: smallest rank.
        highest: largest rank.
    """

    def __init__(self, lowest: int, highest: int) -> None:
        require(1 <= lowest <= highest, "policy.lowest", lowest, f"from 1 to {highest}")
        self.lowest, self.highest = lowest, highest

    @abstractmethod
    def select(self, client: int, draw: np.random.Generator) -> Action:
        """What to ask a client for.

        Args:
            client: partition number.
            draw: a stream of this client and round.
        """

    def observe(self, client: int, action: Action, reward: float) -> None:
        """Learn from what an action was worth, in [0, 1]."""

    def rank_at(self, x: float) -> int:
        """The rank at a place from 0 to 1: a power of two, within the limits."""
        low, high = math.log2(self.lowest), math.log2(self.highest)
        return min(self.highest, max(self.lowest, 2 ** round(low + x * (high - low))))

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""


class Fixed(ConfigPolicy):
    """Everybody takes the whole step, and the largest rank."""

    def select(self, client: int, draw: np.random.Generator) -> Action:
        """The same for all."""
        return Action(1.0, self.highest)


class Random(ConfigPolicy):
    """Uniform in the action space."""

    def select(self, client: int, draw: np.random.Generator) -> Action:
        """Both coordinates uniform."""
        step, rank = draw.random(2)
        return Action(float(step), self.rank_at(float(rank)))


class Oracle(ConfigPolicy):
    """Knows how fast devices are, and prunes fast ones less.

    The slowest take the whole step; a device q times as fast as they are takes ``1 - (q - 1)`` of
    it, none from twice the speed on. For comparison: no other policy knows speeds.

    Args:
        lowest: smallest rank.
        highest: largest rank.
        speeds: of each client, in any unit.
    """

    def __init__(self, lowest: int, highest: int, speeds: Sequence[float]) -> None:
        super().__init__(lowest, highest)
        require(bool(speeds) and min(speeds) > 0, "speeds", speeds, "above 0, one for each client")
        self._speeds = speeds

    def select(self, client: int, draw: np.random.Generator) -> Action:
        """By the client's speed."""
        ratio = self._speeds[client] / min(self._speeds)
        return Action(max(0.0, 2.0 - ratio), self.highest)


class Leaf(NamedTuple):
    """A box of the action space, in unit coordinates.

    Attributes:
        low: lower corner.
        high: upper corner.
    """

    low: tuple[float, float]
    high: tuple[float, float]

    @property
    def sides(self) -> tuple[float, float]:
        """Lengths."""
        return self.high[0] - self.low[0], self.high[1] - self.low[1]

    def holds(self, x: Sequence[float]) -> bool:
        """Whether a point is inside; boxes are half open, at the upper edge of the space closed."""
        return all(
            a <= v < b or v == b == 1 for a, v, b in zip(self.low, x, self.high, strict=True)
        )


@dataclass
class Tree:
    """What is known of one client.

    Attributes:
        leaves: boxes that tile the space.
        points: of every observation so far place and reward, oldest first.
    """

    leaves: list[Leaf] = field(default_factory=lambda: [Leaf((0.0, 0.0), (1.0, 1.0))])
    points: list[tuple[float, float, float]] = field(default_factory=list)


class TreeUCB(ConfigPolicy):
    """Upper confidence bounds on a partition of the action space that refines itself.

    **Reconstructed**: FedSpine's "smooth UCB" is known by description only; this is the tree of
    FedMP's E-UCB as remembered, with discounted means. With N and R the discounted number and mean
    reward of the observations in a leaf, the leaf with the largest
    ``R + c sqrt(2 ln(sum N) / N)`` is taken (untried ones first, of equals the larger box), and an
    action drawn uniformly in it. A leaf is split at its newest observation, across its longest
    side, once it has enough of them.

    Args:
        lowest: smallest rank.
        highest: largest rank.
        exploration: c.
        discount: of older observations, for each newer one of the client.
        split_after: observations before a leaf is split.
        smallest: leaves whose diagonal is not above it are not split.
    """

    def __init__(
        self, lowest: int, highest: int, exploration: float = 1.0, discount: float = 0.95,
        split_after: int = 3, smallest: float = 0.05,
    ) -> None:  # fmt: skip
        super().__init__(lowest, highest)
        require(exploration >= 0, "exploration", exploration, "0 or above")
        require(0 < discount <= 1, "discount", discount, "above 0, at most 1")
        require(split_after >= 1, "split_after", split_after, "1 or above")
        self._c, self._discount = exploration, discount
        self._split_after, self._smallest = split_after, smallest
        self.trees: dict[int, Tree] = {}

    def select(self, client: int, draw: np.random.Generator) -> Action:
        """A point of the most promising leaf."""
        tree = self.trees.get(client) or Tree()
        bounds = self.bounds(tree)
        best = max(range(len(bounds)), key=lambda i: (bounds[i], math.prod(tree.leaves[i].sides)))
        leaf, at = tree.leaves[best], draw.random(2).tolist()
        x, y = (a + u * side for a, u, side in zip(leaf.low, at, leaf.sides, strict=True))
        return Action(x, self.rank_at(y), (x, y))

    def bounds(self, tree: Tree) -> list[float]:
        """The upper confidence bound of every leaf."""
        counts, totals = [], []
        for leaf in tree.leaves:
            count = total = 0.0
            for age, (x, y, reward) in enumerate(reversed(tree.points)):
                if leaf.holds((x, y)):
                    count += self._discount**age
                    total += self._discount**age * reward
            counts.append(count)
            totals.append(total)
        spread = 2 * math.log(max(1.0, sum(counts)))
        return [
            math.inf if n < TINY else r / n + self._c * math.sqrt(spread / n)
            for n, r in zip(counts, totals, strict=True)
        ]

    def observe(self, client: int, action: Action, reward: float) -> None:
        """Note what an action was worth; split its leaf if that is due."""
        tree, at = self.trees.setdefault(client, Tree()), action.place
        tree.points.append((*at, reward))
        place = next(i for i, leaf in enumerate(tree.leaves) if leaf.holds(at))
        leaf = tree.leaves[place]
        enough = sum(leaf.holds(p[:2]) for p in tree.points) >= self._split_after
        if enough and math.hypot(*leaf.sides) > self._smallest:
            tree.leaves[place : place + 1] = split(leaf, at)

    def state_dict(self) -> dict[str, Any]:
        """The trees, by client."""
        return {
            str(client): {
                "leaves": [[*leaf.low, *leaf.high] for leaf in tree.leaves],
                "points": [list(point) for point in tree.points],
            }
            for client, tree in sorted(self.trees.items())
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.trees = {
            int(client): Tree(
                [Leaf((a, b), (c, d)) for a, b, c, d in kept["leaves"]],
                [(x, y, r) for x, y, r in kept["points"]],
            )
            for client, kept in state.items()
        }


def split(leaf: Leaf, at: Sequence[float]) -> list[Leaf]:
    """The two halves of a box, cut at a point across its longest side; itself at its edge."""
    axis = int(leaf.sides[1] > leaf.sides[0])
    if not leaf.low[axis] < at[axis] < leaf.high[axis]:
        return [leaf]
    one = list(leaf.high)
    two = list(leaf.low)
    one[axis] = two[axis] = at[axis]
    return [Leaf(leaf.low, (one[0], one[1])), Leaf((two[0], two[1]), leaf.high)]


def rewards(
    gains: Sequence[float], progress: Sequence[float], importance: Sequence[float],
    seconds: Sequence[float], weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> list[float]:  # fmt: skip
    """What each client's action was worth, in [0, 1] (**reconstructed**).

    ``clip((w1 gain + w2 progress + w3 importance) / sum w) / (1 + |T - mean T| / mean T)``, each
    term cut to [0, 1], importance relative to the largest; what is not finite counts as 0.

    Args:
        gains: relative improvement of the local loss.
        progress: of pruning: the step taken, relative to what was left to prune.
        importance: norm of the update.
        seconds: T, of the client's round.
        weights: of the three terms.
    """
    mean, most = sum(seconds) / len(seconds), max(importance)
    found = []
    for gain, step, norm, took in zip(gains, progress, importance, seconds, strict=True):
        terms = (gain, step, norm / most if most > 0 else 0.0)
        cut = [min(1.0, max(0.0, t)) if math.isfinite(t) else 0.0 for t in terms]
        worth = sum(w * t for w, t in zip(weights, cut, strict=True)) / sum(weights)
        found.append(worth / (1.0 + (abs(took - mean) / mean if mean > 0 else 0.0)))
    return found


POLICIES: dict[str, type[ConfigPolicy]] = {
    "ucb_tree": TreeUCB, "fixed": Fixed, "random": Random, "oracle": Oracle,
}  # fmt: skip


def check(policy: str | Mapping[str, Any]) -> None:
    """Whether a policy is written rightly, as far as that can be told without the model.

    Raises:
        ConfigError: no such policy, or not its arguments.
    """
    made(policy, 1 << 16, ())


def made(policy: str | Mapping[str, Any], highest: int, devices: Sequence[str]) -> ConfigPolicy:
    """A policy by name.

    Args:
        policy: its name, or a table with `name` and its other arguments; `lowest` is the largest
            rank where it is not given.
        highest: largest rank.
        devices: device profile of each client; empty where they are not known yet.

    Raises:
        ConfigError: no such policy, or not its arguments.
    """
    table: dict[str, Any] = {"name": policy} if isinstance(policy, str) else dict(policy)
    name = table.pop("name", None)
    require(name in POLICIES, "policy", name, " or ".join(POLICIES))
    kind = POLICIES[str(name)]
    lowest = table.pop("lowest", highest)
    require(type(lowest) is int, "policy.lowest", lowest, "a whole number")
    if kind is Oracle:
        speeds = table.get("speeds")
        sound = isinstance(speeds, Mapping) and set(devices) <= set(speeds) and bool(speeds)
        require(sound, "policy.speeds", speeds, "a table with a number for every device of [clock]")
        own = [speeds[d] for d in devices] or list(speeds.values())  # type: ignore[index,union-attr]
        table["speeds"] = own
    known = set(inspect.signature(kind).parameters) - {"lowest", "highest"}
    unknown = sorted(set(table) - known)
    allowed = ", ".join(sorted({"name", "lowest"} | known))
    require(not unknown, "policy", ", ".join(unknown), f"of: {allowed}")
    try:
        return kind(lowest, highest, **table)
    except TypeError:
        raise ConfigError(f"policy = {dict(table)} must hold numbers (keys: {allowed})") from None
