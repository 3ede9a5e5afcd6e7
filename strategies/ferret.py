"""Ferret."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Message

from fedsim.core import ferret
from fedsim.core.errors import require
from fedsim.core.nodes import client_at
from fedsim.core.packed import Numbers, PackedStrategy, Parts
from fedsim.core.strategy import Setting

LARGEST = 1e12
"""Largest absolute coordinate that is taken."""


class Ferret(PackedStrategy):
    """Ferret: first-order local training, updates sent as coordinates on seeded random bases.

    Shu et al., *Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models*, arXiv
    2409.06277v3, Algorithm 1 and Eq. 8. Clients train as in FedAvg (`[train]` applies), project
    their update block by block on K_l bases, and send the coordinates; the server averages them
    and everybody rebuilds ``w = w0 - server_lr * V (sum of the averages)``. The estimate is
    unbiased and very noisy when K is far below the number of parameters: that is the method.

    Verified: the formulas. The official code multiplies by d_l / K_l, a third of what its paper
    says (``scaling = "official"``), so divide published server learning rates by 3 here. Its clip
    of every term, its silent skipping of non-finite ones and its random subsets of bases (here:
    prefixes) are left out. Entries come from Uniform(-a, a), which a normal cut to [-a, a] is up
    to 1 / (2 d_l); ``basis = "truncated"`` takes that.

    Args:
        bases: K, see `budget`.
        server_lr: step along the averaged estimate.
        momentum: of the server, on coordinates; needs fixed bases.
        fresh: ``"fixed"``: the same bases for all clients and rounds, as in the official code; the
            server's packet keeps its size. ``"round"`` and ``"client"`` (the paper): new bases for
            every round, or client and round; then it carries the coordinates of all rounds.
        basis: ``"uniform"`` or ``"truncated"``.
        multiple: block size as a multiple of the median entry's; 0: one block.
        budget: ``"block"`` or ``"total"``, what K is for (`ferret.counts_of`).
        scaling: ``"unbiased"`` or ``"official"``.
        half: clients send float16 with a scale for each block.
        weighted: weigh clients by their examples; False: all alike, as in the paper.

    Raises:
        ConfigError: a parameter is out of range.
    """

    client = "ferret"
    keeps = ("velocity",)

    def __init__(
        self,
        bases: int = 200,
        server_lr: float = 1.0,
        momentum: float = 0.0,
        fresh: str = "fixed",
        basis: str = "uniform",
        multiple: float = 0.9,
        budget: str = "block",
        scaling: str = "unbiased",
        half: bool = False,
        weighted: bool = False,
    ) -> None:
        require(1 <= bases < 1 << 16, "bases", bases, "from 1 to 65535")
        require(server_lr > 0, "server_lr", server_lr, "above 0")
        require(0 <= momentum < 1, "momentum", momentum, "from 0 to below 1")
        require(fresh in ("fixed", "round", "client"), "fresh", fresh, "fixed, round or client")
        require(not momentum or fresh == "fixed", "momentum", momentum, "0 unless fresh is fixed")
        require(basis in ("uniform", "truncated"), "basis", basis, "uniform or truncated")
        require(multiple >= 0, "multiple", multiple, "0 or more")
        require(budget in ("block", "total"), "budget", budget, "block or total")
        require(scaling in ("unbiased", "official"), "scaling", scaling, "unbiased or official")
        self.bases, self.server_lr, self.momentum, self.fresh = bases, server_lr, momentum, fresh
        self.basis, self.multiple, self.budget, self.scaling = basis, multiple, budget, scaling
        self.half, self.weighted = half, weighted
        self.blocks: list[int] = []
        self.reset()

    def reset(self) -> None:
        """All coordinates are 0."""
        shape = (len(self.blocks), self.bases)
        self.sets, self.velocity = {0: np.zeros(shape)}, np.zeros(shape)

    def setup(self, setting: Setting) -> None:
        """Cut the model into blocks."""
        super().setup(setting)
        self.blocks = ferret.blocks_of(self.sizes, self.multiple)
        self.recipe = ferret.Recipe(self.master, self.bases, self.blocks, self.basis)
        self.reset()

    def client_config(self) -> dict[str, Any]:
        """What a client needs to find the same bases."""
        names = ("bases", "fresh", "multiple", "budget", "scaling", "half")
        return super().client_config() | {n: getattr(self, n) for n in names}

    def numbers(self) -> Numbers:
        """The summed coordinates of each set of bases, float64 [L, K]."""
        return ferret.named(self.sets)

    def hold(self, numbers: Numbers) -> None:
        """Hold these coordinates."""
        self.sets = ferret.unnamed(numbers)

    def pack(self, server_round: int, numbers: Numbers) -> bytes:
        """The coordinates as float32."""
        return ferret.pack_down(server_round, ferret.unnamed(numbers))

    def limit(self) -> int:
        """All coordinates of all blocks."""
        return ferret.most_up(len(self.blocks), self.bases)

    def check(self, data: bytes, round: int | None = None) -> tuple[int, Any]:
        """Coordinates of this round, for these blocks."""
        return ferret.read_up(data, len(self.blocks), self.bases, round, LARGEST)

    def entry(self, server_round: int, reply: Message) -> bytes:
        """The number of the set of bases, and the packet."""
        client = client_at(reply.metadata.src_node_id)
        number = ferret.number_of(self.fresh, server_round, client)
        return ferret.with_number(number, super().entry(server_round, reply))

    def absorb(self, parts: Parts) -> None:
        """Average the coordinates of each set of bases, and step."""
        sums: dict[int, np.ndarray] = {}
        for share, entry in parts:
            number, data = ferret.number_and(entry)
            _, found = self.check(data)
            sums[number] = sums.get(number, 0.0) + share * found
        for number, mean in sums.items():
            if self.momentum:
                mean = self.velocity = self.momentum * self.velocity + mean
            self.sets[number] = self.sets.get(number, 0.0) + self.server_lr * mean
