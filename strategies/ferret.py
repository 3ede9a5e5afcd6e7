"""Ferret."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.core import ferret, kseed, rng
from fedsim.core.averaging import MetricMean, examples_of, metrics_of
from fedsim.core.errors import require
from fedsim.core.nodes import client_at
from fedsim.core.packets import Expected, packet, packet_of
from fedsim.core.records import FlatRecord, as_flat, from_record, to_record
from fedsim.core.resident import settle
from fedsim.core.strategy import Aggregate, Served, Setting, Strategy

PREFIX = "coordinates-"
LARGEST = 1e12
"""Largest absolute coordinate that is taken."""


class Ferret(Strategy):
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
        self.master = 0
        self.blocks: list[int] = []
        self.sets: dict[int, np.ndarray] = {}
        self.velocity = np.zeros((0, bases))
        self._model: FlatRecord | None = None
        self._built = b""
        self._entry: bytes | None = None

    def setup(self, setting: Setting) -> None:
        """Cut the model into blocks; derive the seeds from the run's."""
        super().setup(setting)
        layout = setting.info.layout
        spans = [layout.span(n) for n in layout.trainable]
        self._sizes = [s.stop - s.start for s in spans]
        self.blocks = (
            ferret.blocks_of(self._sizes, self.multiple) if self.multiple else [sum(self._sizes)]
        )
        self.master = rng.key(setting.seed, 0, rng.SERVER, "directions") & (2**63 - 1)
        self._empty()

    def _empty(self) -> None:
        shape = (len(self.blocks), self.bases)
        self.sets, self.velocity = {0: np.zeros(shape)}, np.zeros(shape)

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """No coordinates yet; the initial model is everybody's own."""
        return self._held()

    def _held(self) -> FlatRecord:
        items = sorted(self.sets.items())
        return to_record({f"{PREFIX}{n}": torch.from_numpy(c.copy()) for n, c in items})

    def _sets(self, arrays: ArrayRecord) -> dict[int, np.ndarray]:
        state = from_record(arrays)
        return {int(n.removeprefix(PREFIX)): t.numpy() for n, t in state.items()}

    def client_config(self) -> dict[str, Any]:
        """What a client needs to find the same bases."""
        names = ("bases", "master", "basis", "fresh", "multiple", "budget", "scaling", "half")
        dtype = self.setting.info.layout.dtype
        mark = kseed.layout_mark(self._sizes, dtype, self.basis)
        return {n: getattr(self, n) for n in names} | {"layout": mark}

    def _send(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        told = {**config, "server-round": server_round}
        data = ferret.pack_down(server_round, self._sets(arrays))
        return self.broadcast(kind, {"arrays": packet(data)}, told, sorted(grid.get_node_ids()))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send the coordinates."""
        arrays = settle(self, arrays, config)
        self.sets = {n: c.copy() for n, c in self._sets(arrays).items()}
        return self._send("train", server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send the coordinates to those who evaluate."""
        return self._send("evaluate", server_round, arrays, config, grid)

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """A packet of coordinates, of this round, for these blocks."""
        current = int(sent.config_records["config"]["server-round"])  # type: ignore[arg-type]
        blocks = len(self.blocks)
        check = partial(
            ferret.read_up, blocks=blocks, bases=self.bases, round=current, largest=LARGEST
        )
        return {"arrays": Expected(20 + 2 * blocks + 4 * blocks * self.bases, check)}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Average the coordinates of each set, and step."""
        parts: list[tuple[float, bytes]] = []
        metrics = MetricMean()
        for reply in replies:
            if reply.has_error():
                continue
            weight = examples_of(reply.content) if self.weighted else 1.0
            client = client_at(reply.metadata.src_node_id)
            number = ferret.number_of(self.fresh, server_round, client)
            data = packet_of(reply.content.array_records["arrays"])
            parts.append((weight, struct.pack("<I", number) + data))
            metrics.add(metrics_of(reply.content), weight)
        if not parts:
            return None, None
        self.absorb(parts)
        self._entry = kseed.pack_entry(parts)
        return self._held(), metrics.record()

    def absorb(self, parts: Sequence[tuple[float, bytes]]) -> None:
        """Take in one round's (weight, number of the set and packet) pairs, in canonical order."""
        total = sum(weight for weight, _ in parts)
        sums: dict[int, np.ndarray] = {}
        for weight, data in parts:
            (number,) = struct.unpack_from("<I", data)
            _, found = ferret.read_up(data[4:], len(self.blocks), self.bases, None, LARGEST)
            sums[number] = sums.get(number, 0.0) + weight / total * found
        for number, mean in sums.items():
            if self.momentum:
                mean = self.velocity = self.momentum * self.velocity + mean
            self.sets[number] = self.sets.get(number, 0.0) + self.server_lr * mean

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """The model, made in place in one vector of the server's own; use it before the next."""
        data = ferret.pack_down(0, self._sets(arrays))
        assert self.setting.initial is not None, "the round loop gives the initial model"
        initial = as_flat(self.setting.initial, self.setting.info.layout)
        if self._model is None:
            self._model = initial.with_flat(initial.flat.clone())
        if data != self._built:
            self._model.flat.copy_(initial.flat)
            w = self._model.flat[: initial.layout.num_trainable]
            sets = ferret.read_down(data, len(self.blocks), self.bases)  # as clients have them
            for number, coordinates in sets.items():
                seeds = ferret.seeds_of(self.master, number, self.bases)
                ferret.add(w, seeds, self.blocks, -coordinates, self.basis)
            self._built = data
        return {"model": Served(self._model)}

    def ledger_entry(self) -> bytes | None:
        """The last round's weights and packets."""
        return self._entry

    def replay(self, entries: Iterable[bytes]) -> ArrayRecord:
        """What the server holds after these rounds, from the ledger alone (after `setup`)."""
        self._empty()
        for entry in entries:
            self.absorb(kseed.read_entry(entry))
        return self._held()

    def state_dict(self) -> dict[str, Any]:
        """The server's momentum."""
        return {"velocity": torch.from_numpy(self.velocity.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.velocity = state["velocity"].numpy().copy()
