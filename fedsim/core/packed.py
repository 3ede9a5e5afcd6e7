"""Both halves of algorithms whose messages are packed bytes, from which the model follows.

The server holds a few numbers and sends them as one packet; whoever knows the initial model builds
the present one from it, in place, on the one vector of its process; clients answer with a packet.
The packets of all rounds are a ledger from which everything can be made again.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core import rng
from fedsim.core.averaging import MetricMean, examples_of, metrics_of
from fedsim.core.errors import ConfigError
from fedsim.core.packets import Expected, packet, packet_of
from fedsim.core.records import FlatRecord, as_flat, from_record, to_record
from fedsim.core.resident import ResidentProgram, ResidentState, settle
from fedsim.core.strategy import Aggregate, Served, Setting, Strategy
from fedsim.core.vector import Resident

Parts = Sequence[tuple[float, bytes]]
"""One round's replies in canonical order: each client's weight and packet."""
Numbers = Mapping[str, NDArray[np.float64]]
"""What a server holds, by name."""


class Recipe(Protocol):
    """How the model follows from a server's packet; both halves of an algorithm have the same."""

    def name(self, data: bytes) -> bytes:
        """What tells the model of a packet from others."""

    def build(self, w: Tensor, data: bytes, held: bytes | None) -> None:
        """Turn the trainable initial values, or those of the model `held`, into a packet's."""


def layout_mark(sizes: Sequence[int], dtype: torch.dtype, basis: str) -> str:
    """What both ends must agree on: stream, dtype and sizes of the entries in their order."""
    text = f"philox4x32-10/1 {basis} {dtype} {','.join(map(str, sizes))}"
    return blake2b(text.encode(), digest_size=8).hexdigest()


def pack_entry(parts: Parts) -> bytes:
    """One round of (weight, packet) pairs for the ledger."""
    return b"".join(struct.pack("<dI", weight, len(data)) + data for weight, data in parts)


def read_entry(entry: bytes) -> list[tuple[float, bytes]]:
    """The inverse of `pack_entry`."""
    parts, at = [], 0
    while at < len(entry):
        weight, size = struct.unpack_from("<dI", entry, at)
        parts.append((weight, entry[at + 12 : at + 12 + size]))
        at += 12 + size
    return parts


class PackedStrategy(Strategy):
    """Base of server halves whose model follows from a packet.

    Subclasses say what is held (`reset`, `numbers`, `hold`), how it is sent (`pack`), what a reply
    may be (`limit`, `check`) and what it does (`absorb`); in `setup` they set `recipe`.

    Attributes:
        keeps: names of the arrays, float64, that are state.
        basis: kind of direction.
        weighted: weigh clients by their examples; False: all alike.
        incremental: let `recipe` start from the model before.
        master: number that all seeds are derived from, of the run's seed.
        sizes: number of elements of each trainable entry.
        recipe: how the model is made.
    """

    keeps: ClassVar[tuple[str, ...]] = ()
    basis: str
    weighted: bool
    incremental = False
    master = 0
    sizes: tuple[int, ...] = ()
    recipe: Recipe
    _resident: Resident | None = None
    _entry: bytes | None = None

    @abstractmethod
    def reset(self) -> None:
        """Hold what there is before the first round."""

    @abstractmethod
    def numbers(self) -> Numbers:
        """What the server holds."""

    @abstractmethod
    def hold(self, numbers: Numbers) -> None:
        """Hold this from now on."""

    @abstractmethod
    def pack(self, server_round: int, numbers: Numbers) -> bytes:
        """The packet for clients."""

    @abstractmethod
    def limit(self) -> int:
        """Most bytes of a reply."""

    @abstractmethod
    def check(self, data: bytes, round: int | None = None) -> Any:
        """Read a reply. Raises `ValueError` if it must not be used."""

    @abstractmethod
    def absorb(self, parts: Parts) -> None:
        """Take in one round's replies: each client's share of all weights, and its `entry`."""

    def entry(self, server_round: int, reply: Message) -> bytes:
        """What a reply adds to the ledger."""
        return packet_of(reply.content.array_records["arrays"])

    def setup(self, setting: Setting) -> None:
        """Derive the seeds from the run's; look at the model."""
        super().setup(setting)
        self.master = rng.key(setting.seed, 0, rng.SERVER, "directions") & (2**63 - 1)
        spans = [setting.info.layout.span(n) for n in setting.info.layout.trainable]
        self.sizes = tuple(s.stop - s.start for s in spans)
        self._resident = None

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Nothing learnt yet; the initial model is everybody's own."""
        return self._record()

    def client_config(self) -> dict[str, Any]:
        """What a client needs to find the same directions."""
        mark = layout_mark(self.sizes, self.setting.info.layout.dtype, self.basis)
        return {"master": self.master, "basis": self.basis, "layout": mark}

    def _record(self) -> FlatRecord:
        held = self.numbers().items()
        return to_record({n: torch.from_numpy(a.copy()) for n, a in held})

    def _send(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        told = {**config, "server-round": server_round}
        content = {"arrays": packet(self.pack(server_round, _numbers(arrays)))}
        return self.broadcast(kind, content, told, sorted(grid.get_node_ids()))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send the packet."""
        arrays = settle(self, arrays, config)
        self.hold(_numbers(arrays))
        return self._send("train", server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send the packet to those who evaluate."""
        return self._send("evaluate", server_round, arrays, config, grid)

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """A packet of this round that `check` reads."""
        current = int(sent.config_records["config"]["server-round"])  # type: ignore[arg-type]
        return {"arrays": Expected(self.limit(), partial(self.check, round=current))}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Absorb the round, and note it for the ledger."""
        parts: list[tuple[float, bytes]] = []
        metrics = MetricMean()
        for reply in replies:
            if reply.has_error():
                continue
            weight = examples_of(reply.content) if self.weighted else 1.0
            parts.append((weight, self.entry(server_round, reply)))
            metrics.add(metrics_of(reply.content), weight)
        if not parts:
            return None, None
        self.absorb(_shares(parts))
        self._entry = pack_entry(parts)
        return self._record(), metrics.record()

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """The model, made in place in the one vector of this process; use it before the next."""
        setting, data = self.setting, self.pack(0, _numbers(arrays))
        layout = setting.info.layout
        if self._resident is None:
            initial = setting.initial
            assert initial is not None, "the round loop gives the initial model"
            own = setting.resident or (lambda: Resident(as_flat(initial, layout)))
            self._resident = own()
        resident = self._resident
        resident.restore(
            self.recipe.name(data),
            lambda flat, held: self.recipe.build(flat[: layout.num_trainable], data, held),
            self.incremental,
        )
        return {"model": Served(FlatRecord(layout, resident.flat, resident.beside))}

    def ledger_entry(self) -> bytes | None:
        """The last round's weights and packets."""
        return self._entry

    def replay(self, entries: Iterable[bytes]) -> ArrayRecord:
        """What the server holds after these rounds, from the ledger alone (after `setup`)."""
        self.reset()
        for entry in entries:
            self.absorb(_shares(read_entry(entry)))
        return self._record()

    def state_dict(self) -> dict[str, Any]:
        """The arrays that are state."""
        return {n: torch.from_numpy(getattr(self, n).copy()) for n in self.keeps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        for name in self.keeps:
            setattr(self, name, state[name].numpy().copy())


def _numbers(arrays: ArrayRecord) -> Numbers:
    return {n: t.numpy().copy() for n, t in from_record(arrays).items()}


def _shares(parts: Parts) -> Parts:
    total = sum(weight for weight, _ in parts)
    return [(weight / total, data) for weight, data in parts]


@dataclass(frozen=True, kw_only=True)
class PackedProgram(ResidentProgram):
    """Base of client halves that build their model from a packet.

    Subclasses give `recipe`, the server half's, and `run`.

    Attributes:
        master: number that all seeds are derived from.
        basis: kind of direction.
        layout: what the server takes the model for.

    Raises:
        ConfigError: the model here is another than the server's.
    """

    master: int = 0
    basis: str = "gaussian"
    layout: str = ""

    @abstractmethod
    def recipe(self, s: ResidentState) -> Recipe:
        """How the model is made."""

    def name(self, s: ResidentState) -> bytes | None:
        """The name of the model that was sent, if it was meant for this model."""
        mark = layout_mark(s.sizes, s.w.dtype, self.basis)
        if self.layout and mark != self.layout:
            raise ConfigError(
                f"layout = {mark} must be the server's, {self.layout}: other parameters, order, "
                "dtype or random stream"
            )
        return self.recipe(s).name(packet_of(s.records["arrays"]))

    def rebuild(self, s: ResidentState, flat: Tensor, held: bytes | None) -> None:
        """The model that the packet describes."""
        packed = packet_of(s.records["arrays"])
        self.recipe(s).build(flat[: s.num_parameters], packed, held)
