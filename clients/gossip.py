"""Client half of gossip in which every node holds its own model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.fedsam import FedSAM
from fedsim.core import gossip
from fedsim.core.agent import MODEL, Agent, AgentState
from fedsim.core.records import FlatRecord, from_record


@dataclass(frozen=True, kw_only=True)
class Gossip(Agent):
    """A node that trains its own model, and mixes it with those of its neighbours.

    Attributes:
        phase: ``"train"``, or ``"mix"`` with the neighbours' models that were sent.
        give: answer with the model after mixing, for the next gossip step.
        rho: radius of the perturbation in local steps.
    """

    phase: str = "train"
    give: bool = False
    rho: float = 0.0

    def judged(self, s: AgentState) -> FlatRecord:
        """The node's own model."""
        return s.kept_model(MODEL) or s.initial

    def answer(self, s: AgentState) -> None:
        """Train or mix, and keep the model."""
        model = self.judged(s)
        if self.phase == "train":
            trained = s.train(self.local(FedSAM), model)
            model = trained.record
            s.metrics.update({**trained.metrics, "steps": trained.steps})
        else:
            model = self._mixed(s, model)
        s.keep(MODEL, model)
        if self.phase == "train" or self.give:
            s.replies["arrays"] = model

    @staticmethod
    def _mixed(s: AgentState, model: FlatRecord) -> FlatRecord:
        """One gossip step: the own model takes its place among the neighbours'."""
        sent = from_record(s.records["neighbours"])
        place = int(sent["place"])
        others = list(sent["models"])
        stacked = torch.stack([*others[:place], model.flat, *others[place:]])
        return model.with_flat(gossip.combine(stacked, sent["weights"]))
