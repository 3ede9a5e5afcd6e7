"""What a server merges into the frozen base, round by round, and how clients keep up with it.

A base with such updates is ``W + s (D + B A)``: D is an entry of the model (`delta`, in units of
``B @ A``) that no message holds by itself. Every merge has a number. A client keeps D and the
number of the last merge in it; it is sent the merges it lacks as factors, or D itself where that
is smaller. Server and client add the same numbers in the same order, so their D have the same
bits; a merge that comes twice counts once.
"""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.core.errors import ConfigError, RunError
from fedsim.core.lora.factors import Adapter, Factors
from fedsim.core.lora.serving import halves
from fedsim.core.model import ModelInfo
from fedsim.core.records import FlatRecord, from_record, to_record

DELTA, MERGED = "delta", "merged"


def deltas(info: ModelInfo) -> dict[str, tuple[str, str]]:
    """Names of the entries D and last merge of each adapted module, by its path."""
    still = info.still
    found = {m: tuple(f"{m}.{n}".removeprefix(".") for n in (DELTA, MERGED)) for m in halves(info)}
    return {m: (d, n) for m, (d, n) in found.items() if d in still and n in still}


def require_deltas(info: ModelInfo, who: str) -> dict[str, tuple[str, str]]:
    """As `deltas`.

    Raises:
        ConfigError: an adapted module has nothing to merge into.
    """
    found = deltas(info)
    if len(found) < len(halves(info)) or not found:
        raise ConfigError(
            f'{who} merges into the base: model = {{name = "lora", delta = true, ...}}'
        )
    return found


class Patches:
    """The merges so far, as long as somebody may want them.

    Args:
        info: the model.
        who: for messages.

    Attributes:
        version: number of the last merge; 0: none.
        log: the last merges, by module.

    Raises:
        ConfigError: the model has nothing to merge into.
    """

    def __init__(self, info: ModelInfo, who: str) -> None:
        self.factors, self.deltas = halves(info), require_deltas(info, who)
        shapes = dict(zip(info.layout.names, info.layout.shapes, strict=True))
        self._sizes = {m: shapes[d] for m, (d, _) in self.deltas.items()}
        self.version = 0
        self.log: list[dict[str, Factors]] = []

    def merge(self, record: FlatRecord, update: Adapter) -> FlatRecord:
        """A model with an update merged into its base, one module at a time; it is remembered."""
        self.version += 1
        flat, kept = record.flat.clone(), dict[str, Factors]()
        for module, (delta, merged) in self.deltas.items():
            f = update[module]
            kept[module] = Factors(f.a * f.scaling, f.b) if f.scaling != 1 else f
            into = record.layout.view(flat, delta)
            into.copy_(patched(into, kept[module]))
            record.layout.view(flat, merged).fill_(self.version)
        self.log.append(kept)
        while len(self.log) > 1 and all(self._dense(m, 0) for m in self.deltas):
            self.log.pop(0)
        return record.with_flat(flat)

    def _dense(self, module: str, first: int) -> bool:
        """Whether D is no larger than the factors of the merges from the log's place `first`."""
        out, width = self._sizes[module]
        return out * width <= sum(p[module].rank for p in self.log[first:]) * (out + width)

    def since(self, held: int | None, record: FlatRecord) -> ArrayRecord | None:
        """What a client lacks; None: nothing.

        Args:
            held: last merge that the client has; None: not known.
            record: the server's model.
        """
        if held == self.version:
            return None
        kept = self.version - len(self.log)
        entries: dict[str, Tensor] = {}
        for module, (delta, _) in self.deltas.items():
            a, b = self.factors[module]
            if held is None or held < kept or self._dense(module, held - kept):
                entries[f"{delta}@{self.version}"] = record.layout.view(record.flat, delta)
                continue
            for i, patch in enumerate(self.log[held - kept :], held + 1):
                entries[f"{a}@{i}"] = patch[module].a
                entries[f"{b}@{i}"] = patch[module].b
        return to_record(entries)

    def replace(self, record: FlatRecord, update: Adapter) -> FlatRecord:
        """A model whose D is one update and nothing else; it is not remembered."""
        flat = record.flat.clone()
        for module, (delta, merged) in self.deltas.items():
            into = record.layout.view(flat, delta)
            into.copy_(patched(torch.zeros_like(into), update[module]))
            record.layout.view(flat, merged).fill_(1)
        return record.with_flat(flat)

    def alone(self, update: Adapter, record: FlatRecord) -> ArrayRecord:
        """One update for clients that keep nothing, as factors or densely, whichever is smaller.

        Args:
            update: in factors.
            record: what `replace` made of it.
        """
        entries: dict[str, Tensor] = {}
        for module, (delta, _) in self.deltas.items():
            (a, b), f, (out, width) = self.factors[module], update[module], self._sizes[module]
            if out * width <= f.rank * (out + width):
                entries[f"{delta}@1"] = record.layout.view(record.flat, delta)
            else:
                entries[f"{a}@1"], entries[f"{b}@1"] = f.a, f.b
        return to_record(entries)

    def state_dict(self) -> dict[str, Any]:
        """Merges and their number."""
        log = [{m: {"a": f.a, "b": f.b} for m, f in patch.items()} for patch in self.log]
        return {"version": self.version, "log": log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.version = state["version"]
        self.log = [
            {m: Factors(f["a"], f["b"]) for m, f in patch.items()} for patch in state["log"]
        ]


def patched(delta: Tensor, update: Factors) -> Tensor:
    """D after a merge. One expression for server and clients: the same bits."""
    return delta + update.delta().to(delta.dtype)


def apply(state: dict[str, Tensor], record: ArrayRecord, info: ModelInfo) -> None:
    """Merge what was sent into a model, in place.

    Args:
        state: the model's entries by name; those of D are replaced.
        record: what `Patches.since` made.
        info: the model.

    Raises:
        RunError: merges between what the client has and what it was sent are missing, or entries
            do not fit.
    """
    sent, factors = from_record(record), halves(info)
    used = 0
    for module, (delta, merged) in deltas(info).items():
        a, b = factors[module]
        have = int(state[merged])
        numbers = sorted(int(n.rpartition("@")[2]) for n in sent if n.startswith(f"{a}@"))
        whole = [n for n in sent if n.startswith(f"{delta}@")]
        if whole:
            value, last = sent[whole[0]], int(whole[0].rpartition("@")[2])
            used += 1
        else:
            value, last = state[delta], have
            for number in numbers:
                used += 2
                if number <= have:
                    continue
                if number != last + 1:
                    raise RunError(
                        f"{module}: merges {last + 1} to {number - 1} are missing: this client "
                        "has lost what it kept"
                    )
                update = Factors(sent[f"{a}@{number}"], sent[f"{b}@{number}"])
                value, last = patched(value, update), number
        if value.shape != state[delta].shape:
            raise RunError(f"{module}: an update of shape {tuple(value.shape)} does not fit")
        state[delta] = value
        state[merged] = torch.full_like(state[merged], last)
    if used != len(sent):
        raise RunError(f"the update of the base has {len(sent) - used} entries of no module")
