"""Early stopping of each client by itself: who gains nothing rests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.columns import Row
from fedsim.core.nodes import client_at


class Patience:
    """Who rests, by how clients do on their own held-out examples.

    Clients pause and resume by their own validation loss, as in LDES-FL (Sant et al. 2026, arXiv
    2603.24242), of which only the abstract was at hand; this rule is ours. A client's loss is that
    of the model meant for it. It rests when so many evaluations in a row have brought no loss lower
    than its best; it is judged on, and comes back when others have brought the loss down. Who rests
    follows from the clients table alone, so a resumed run knows it too.

    Args:
        most: evaluations without improvement after which a client rests; None: nobody rests.
        least: what a loss must fall by to count as lower.
        clients: how many there are.
    """

    def __init__(self, most: int | None, least: float, clients: int) -> None:
        self._most, self._least = most, least
        self._best: NDArray[np.float64] = np.full(clients, np.inf)
        self._vain: NDArray[np.int64] = np.zeros(clients, np.int64)

    def awake(self, nodes: list[int]) -> list[int]:
        """Those of `nodes` that do not rest."""
        if self._most is None:
            return nodes
        return [n for n in nodes if self._vain[client_at(n)] < self._most]

    def judge(self, clients: ArrayLike, losses: ArrayLike) -> None:
        """Take note of an evaluation.

        Args:
            clients: who was judged, each once.
            losses: their losses; one that is no number is no improvement.
        """
        who, loss = np.asarray(clients, np.int64), np.asarray(losses, np.float64)
        best, vain = self._best[who], self._vain[who]
        lower = loss < best - self._least
        self._best[who] = np.where(lower, loss, best)
        self._vain[who] = np.where(lower, 0, vain + 1)

    def recall(self, rounds: Iterable[Row], clients: Iterable[dict[str, Any]]) -> None:
        """Take note of all evaluations so far, from the rows of both tables."""
        if self._most is None:
            return
        void = {row["round"] for row in rounds if row["abandoned"]}
        for row in clients:
            if "eval_loss" in row and row["round"] not in void:
                self.judge([row["client"]], [row["eval_loss"]])
