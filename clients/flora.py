"""Client half of the methods that merge updates into the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.lora.patches import apply, deltas
from fedsim.core.lora.serving import halves
from fedsim.core.model import ModelInfo
from fedsim.core.parts import Shapes, widened
from fedsim.core.program import LocalProgram, Mail
from fedsim.core.records import from_record
from fedsim.core.rng import torch_generator


@dataclass(frozen=True, kw_only=True)
class FLoRA(LocalProgram):
    """Local SGD on an adapter, over a base into which the server's merges go first.

    Attributes:
        rank: of this client's adapter.
        fresh: begin every round with an adapter of its own, A at random and B zero, instead of
            the one that was sent.
        carried: the base with its merges stays on the client, which is sent what it lacks;
            otherwise it is sent everything.
    """

    opens = ("arrays", "patch")

    rank: int = 1
    fresh: bool = True
    carried: bool = True

    @property
    def own_start(self) -> bool:  # type: ignore[override]
        """Whether clients begin from different adapters."""
        return self.fresh

    def private(self, info: ModelInfo) -> frozenset[str]:
        """What was merged into the base so far."""
        names = {n for pair in deltas(info).values() for n in pair}
        return frozenset(names) if self.carried else frozenset()

    def opened(self, info: ModelInfo, mail: Mail) -> Mapping[str, Tensor]:
        """The base with its merges, and the adapter that was sent or a fresh one."""
        known = mail.initial.state()
        sent = {n: known[n] for pair in halves(info).values() for n in pair} if self.fresh else {}
        sent |= from_record(mail.records["arrays"])
        whole = {n: widened(sent[n], known[n].shape) for n in known if n in sent}
        whole |= {n: known[n] for n in info.still} | dict(mail.own)
        if set(whole) != set(known) or set(sent) - set(known):
            missing, extra = sorted(set(known) - set(whole)), sorted(set(sent) - set(known))
            raise ValueError(f"the received model lacks {missing}; unexpected entries {extra}")
        if "patch" in mail.records:
            apply(whole, mail.records["patch"], info)
        if self.fresh:
            draw = torch_generator(mail.seed, mail.round, mail.client, "lora")
            for a, b in halves(info).values():
                bound, rows = known[a].shape[1] ** -0.5, min(self.rank, known[a].shape[0])
                start = torch.zeros_like(known[a])
                own = torch.rand(rows, start.shape[1], generator=draw, dtype=torch.float64)
                start[:rows] = ((2 * own - 1) * bound).to(start.dtype)
                whole[a], whole[b] = start, torch.zeros_like(known[b])
        return whole

    def answers(self, info: ModelInfo, sent: Shapes) -> Shapes:
        """The adapter of the client's rank, and what else is trained."""
        shapes = dict(zip(info.layout.names, info.layout.shapes, strict=True))
        found = {n: shapes[n] for n in sent}
        for a, b in halves(info).values():
            found[a] = (min(self.rank, shapes[a][0]), shapes[a][1])
            found[b] = (shapes[b][0], min(self.rank, shapes[b][1]))
        return found
