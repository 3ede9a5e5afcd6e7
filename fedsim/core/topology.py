"""Who talks to whom in decentralised learning, and with what weights.

A topology is an undirected graph on the nodes 0 … m-1 as a boolean matrix without self-loops
(``directed_exponential`` aside). `metropolis` turns any undirected graph into a gossip matrix that
is symmetric and doubly stochastic, so gossip keeps the nodes' mean and brings them together at the
rate of `second_eigenvalue`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.core.errors import ConfigError, require

Graph = NDArray[np.bool_]
Weights = NDArray[np.float64]


def from_edges(m: int, edges: Iterable[tuple[int, int]]) -> Graph:
    """The undirected graph of these edges; double edges and self-loops do not count."""
    graph = np.zeros((m, m), dtype=np.bool_)
    for i, j in edges:
        if not (0 <= i < m and 0 <= j < m):
            raise ConfigError(f"edges = [{i}, {j}]: node numbers must be 0 to {m - 1}")
        graph[i, j] = graph[j, i] = i != j
    return graph


def ring(m: int) -> Graph:
    """Every node with its two neighbours on a circle."""
    return from_edges(m, ((i, (i + 1) % m) for i in range(m)))


def _sides(m: int) -> tuple[int, int]:
    rows = max(r for r in range(1, math.isqrt(m) + 1) if m % r == 0)
    return rows, m // rows


def grid(m: int) -> Graph:
    """A rectangle of r x c nodes, r the largest divisor of m up to its root, 4 neighbours."""
    rows, columns = _sides(m)
    right = [
        (r * columns + c, r * columns + c + 1) for r in range(rows) for c in range(columns - 1)
    ]
    down = [
        (r * columns + c, (r + 1) * columns + c) for r in range(rows - 1) for c in range(columns)
    ]
    return from_edges(m, right + down)


def torus(m: int) -> Graph:
    """The rectangle of `grid`, closed at its edges."""
    rows, columns = _sides(m)
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    right = [(r * columns + c, r * columns + (c + 1) % columns) for r, c in cells]
    down = [(r * columns + c, ((r + 1) % rows) * columns + c) for r, c in cells]
    return from_edges(m, right + down)


def exponential(m: int) -> Graph:
    """Every node with those 1, 2, 4, 8, … places away, both ways."""
    hops = [2**a for a in range(max(1, math.ceil(math.log2(max(m, 2)))))]
    return from_edges(m, ((i, (i + hop) % m) for i in range(m) for hop in hops))


def full(m: int) -> Graph:
    """Everybody with everybody."""
    return ~np.eye(m, dtype=np.bool_)


def random(m: int, degree: int, stream: np.random.Generator) -> Graph:
    """Every node draws `degree` others; the union of both directions, so the graph is undirected.

    Args:
        m: number of nodes.
        degree: neighbours drawn by each node, at most m - 1.
        stream: random numbers of the round.
    """
    graph = np.zeros((m, m), dtype=np.bool_)
    for i in range(m):
        others = np.delete(np.arange(m), i)
        graph[i, stream.choice(others, min(degree, m - 1), replace=False)] = True
    return graph | graph.T


FIXED: dict[str, Callable[[int], Graph]] = {
    "ring": ring,
    "grid": grid,
    "torus": torus,
    "exponential": exponential,
    "full": full,
}
"""The topologies that are the same in every round."""


def metropolis(graph: Graph) -> Weights:
    """Metropolis-Hastings weights: ``1 / (1 + max(deg_i, deg_j))`` on edges, the rest on itself.

    Symmetric, doubly stochastic, with positive diagonal, on every undirected graph; a node without
    neighbours keeps what it has.
    """
    degree = graph.sum(1)
    weights = np.where(graph, 1.0 / (1.0 + np.maximum.outer(degree, degree)), 0.0)
    weights[np.diag_indices_from(weights)] = 1.0 - weights.sum(1)
    return weights


def directed_exponential(m: int) -> Weights:
    """Every node hears those 1, 2, 4, … places before it, all with the same weight.

    Doubly stochastic but not symmetric. Second eigenvalue for even m: (tau - 1) / (tau + 1) with
    tau = ceil(log2 m).
    """
    hops = [2**a for a in range(max(1, math.ceil(math.log2(m))))] if m > 1 else []
    weights = np.eye(m)
    for hop in hops:
        weights[(np.arange(m) + hop) % m, np.arange(m)] += 1.0
    return weights / (len(hops) + 1)


def among(graph: Graph, active: Iterable[int]) -> Graph:
    """The graph between active nodes; the others have no neighbour and keep their model."""
    here = np.zeros(len(graph), dtype=np.bool_)
    here[list(active)] = True
    return graph & here[:, None] & here[None, :]


def second_eigenvalue(weights: Weights) -> float:
    """Largest absolute eigenvalue but the first: ``||W - J||_2``, J the averaging matrix.

    1 minus it is the spectral gap; 1 means the graph falls apart.
    """
    m = len(weights)
    return float(np.linalg.norm(weights - 1.0 / m, 2)) if m > 1 else 0.0


NAMES = (*FIXED, "random", "directed_exponential")
"""Names of the topologies."""


@dataclass(frozen=True)
class Network:
    """Who is linked with whom in a round.

    Attributes:
        name: one of `NAMES`.
        degree: neighbours that each node of the random topology draws.
        edges: an undirected graph of one's own instead.
        cuts: rounds in which the network is in parts, as (first, last, number of parts).

    Raises:
        ConfigError: one of them is out of its range.
    """

    name: str = "ring"
    degree: int = 10
    edges: list[list[int]] | None = None
    cuts: list[list[int]] | None = None

    def __post_init__(self) -> None:
        known = f"one of {', '.join(NAMES)}"
        require(self.name in NAMES, "topology", repr(self.name), known)
        require(self.degree >= 1, "degree", self.degree, "1 or above")
        if self.edges is not None and not all(len(e) == 2 for e in self.edges):
            raise ConfigError("edges must be pairs of client numbers, such as [[0, 1], [1, 2]]")
        for cut in self.cuts or []:
            sound = len(cut) == 3 and 1 <= cut[0] <= cut[1] and cut[2] >= 2
            require(sound, "cuts", self.cuts, "[first round, last round, parts], parts 2 or more")

    @property
    def shown(self) -> str:
        """What to call it."""
        return self.name if self.edges is None else "edges"

    def parts(self, server_round: int) -> int:
        """Into how many parts the network falls in this round; 0: it is whole."""
        found = (n for first, last, n in self.cuts or [] if first <= server_round <= last)
        return next(found, 0)

    def weights(
        self, m: int, active: Iterable[int], server_round: int, stream: np.random.Generator
    ) -> Weights:
        """The round's gossip matrix, shape [m, m], when only some nodes are active.

        Args:
            m: number of nodes.
            active: those that take part.
            server_round: the round.
            stream: random numbers of the round.
        """
        active, parts = list(active), self.parts(server_round)
        if self.edges is not None:
            graph = from_edges(m, [(i, j) for i, j in self.edges])
        elif self.name == "random":
            graph = random(m, self.degree, stream)
        elif self.name == "directed_exponential":
            if len(active) == m and not parts:
                return directed_exponential(m)
            graph = exponential(m)  # in which weights can be doubly stochastic again
        else:
            graph = FIXED[self.name](m)
        if parts:
            part = np.arange(m) * parts // m
            graph = graph & (part[:, None] == part[None, :])
        return metropolis(among(graph, active))
