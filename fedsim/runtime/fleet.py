"""The devices of all clients on one virtual clock: who is online, who fails, who is how fast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.config import ClockConfig
from fedsim.core import rng
from fedsim.core.nodes import client_at
from fedsim.runtime.clock import HOURS, Device, device

Floats = NDArray[np.float64]
HOUR = 3600.0
"""Seconds."""


class Fleet:
    """Every client's device.

    All draws come from named streams of the run's seed, so a run repeats to the bit. Jitter and
    failures are drawn for the whole population at once, by round; who is asked changes nothing.

    Args:
        config: section `[clock]`.
        clients: size of the population.
        seed: seed of the run.

    Attributes:
        names: profiles in use.
        kind: for each client its profile's place in `names`, int64 [clients].
        fails: whether there are devices that may drop out of a round.
    """

    def __init__(self, config: ClockConfig, clients: int, seed: int) -> None:
        self._jitter, self._seed, self._population = config.jitter, seed, clients
        named = [(share.name, share.params) for share in config.fleet]
        named = named or [(config.device.name, config.device.params)]
        self.names = [name for name, _ in named]
        self.devices: list[Device] = [device(name, params) for name, params in named]
        self.kind = self._deal([share.share for share in config.fleet] or [1.0])
        self._flops = np.array([d.flops for d in self.devices])[self.kind]
        self._down = np.array([d.down_mbit for d in self.devices])[self.kind]
        self._up = np.array([d.up_mbit for d in self.devices])[self.kind]
        self._rate = np.array([d.failure_rate for d in self.devices])[self.kind]
        self.fails = bool(self._rate.any())
        self._zone = np.zeros(clients)
        if config.time_zones:
            stream = rng.stream(seed, 0, rng.SERVER, "time-zones")
            self._zone = stream.uniform(0.0, config.time_zones, clients)

    def _deal(self, shares: list[float]) -> NDArray[np.int64]:
        """Kind of device of every client: exact shares by largest remainder, in seeded order."""
        exact = np.array(shares) / sum(shares) * self._population
        counts = np.floor(exact).astype(np.int64)
        order = np.argsort(counts - exact, kind="stable")
        counts[order[: self._population - int(counts.sum())]] += 1
        kinds = np.repeat(np.arange(len(shares)), counts)
        if len(shares) > 1:
            kinds = rng.stream(self._seed, 0, rng.SERVER, "fleet").permutation(kinds)
        return np.asarray(kinds, dtype=np.int64)

    def seconds(
        self, server_round: int, clients: NDArray[np.int64], flops: Any, down: Any, up: Any
    ) -> Floats:
        """Simulated seconds to receive, compute and send, float64 [C].

        Args:
            server_round: the round.
            clients: partition numbers, int64 [C].
            flops: floating-point operations of each, a number or [C].
            down: bytes each received.
            up: bytes each sent.
        """
        work = flops / self._flops[clients]
        if self._jitter:
            stream = rng.stream(self._seed, server_round, rng.SERVER, "jitter")
            work = work * np.exp(self._jitter * stream.standard_normal(self._population))[clients]
        transfer = down * 8e-6 / self._down[clients] + up * 8e-6 / self._up[clients]
        return np.asarray(transfer + work, dtype=np.float64)

    def failing(self, server_round: int, nodes: list[int]) -> set[int]:
        """The nodes among these whose devices drop out of this round."""
        stream = rng.stream(self._seed, server_round, rng.SERVER, "failures")
        fails = stream.random(self._population) < self._rate
        return {node for node in nodes if fails[client_at(node)]}

    def online(self, now: float, nodes: list[int]) -> list[int]:
        """The nodes whose devices can be asked at a time.

        Args:
            now: simulated seconds since midnight before the run; zones are added to it.
            nodes: node ids.
        """
        if not any(d.online for d in self.devices):
            return nodes
        hour = (now / HOUR + self._zone) % HOURS
        there = np.ones(self._population, dtype=bool)
        for number, kind in enumerate(self.devices):
            if kind.online:
                inside = np.zeros_like(there)
                for start, end in kind.online:
                    inside |= (
                        (start <= hour) & (hour < end)
                        if start < end
                        else (hour >= start) | (hour < end)
                    )
                there &= inside | (self.kind != number)
        return [node for node in nodes if there[client_at(node)]]

    def wait(self, now: float, nodes: list[int], wanted: int) -> tuple[float, list[int]]:
        """When a round can begin, and with whom.

        The first of the next 24 hours, looked at every five minutes, in which as many are online
        as are wanted; where that never happens, the moment when most are.

        Args:
            now: simulated seconds since the run began.
            nodes: node ids.
            wanted: how many devices the round needs.

        Returns:
            Seconds waited, and the nodes that are online then.
        """
        there = self.online(now, nodes)
        if len(there) >= min(wanted, len(nodes)):
            return 0.0, there
        best, waited = there, 0.0
        for step in range(1, int(HOURS * HOUR / STEP) + 1):
            there = self.online(now + step * STEP, nodes)
            if len(there) > len(best):
                best, waited = there, step * STEP
            if len(best) >= wanted:
                break
        return waited, best


STEP = 300.0
"""Seconds between two looks for devices that are online."""
