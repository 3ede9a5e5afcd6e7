"""KnFu."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.core.errors import require
from fedsim.core.knowledge import (
    ESTIMATES,
    KNOWLEDGE,
    check_options,
    distances,
    effectiveness,
    fuse,
)
from fedsim.core.public import Heard, Knowledge
from fedsim.core.records import to_record


class KnFu(Knowledge):
    """KnFu: every client gets a fusion of the knowledge of those whose data are like its own.

    Seyedmohammadi, Atapour, Abouei, Mohammadi, *KnFu: Effective Knowledge Fusion*, 2024 (arXiv
    2403.11892). Reconstructed: known are the four steps (local training, extraction on the public
    set, fusion of semantic neighbours' knowledge for each client, fine-tuning), that an estimated
    probability distribution (EPD) of each client is compared, and ``beta = 10``. The rest is the
    simplest that fits, and an option each; the defaults are

    ``p_n = mean_i F_n[i]``, ``delta_nm = KL(p_n || p_m)``, ``w_nm = softmax_m(-beta delta_nm)``,
    ``Ft_n = sum_m w_nm F_m``, then fine-tuning on ``tau^2 KL(Ft_n || softmax(z / tau))``.

    The server learns from every client an estimate of its label distribution: that is the price.
    Public examples must be balanced over the classes, or the estimates are of their mixture
    (``data.public`` is). With ``beta = 0`` everybody gets the mean, as in FedMD.

    The rounds table gets `self_weight` and `neighbours`, the mean weight of the own knowledge and
    the mean of ``1 / sum_m w_nm^2``; the artefact ``knowledge`` holds the last weights.

    Args:
        beta: sharpness.
        epd: estimate of the label distribution: ``"mean_softmax"``, ``"argmax_hist"``, or
            ``"label_hist"`` (clients give away the true one: an oracle for comparison).
        distance: ``"kl"``, ``"sym_kl"``, ``"js"``, ``"l2"`` or ``"cosine"``; beta means something
            else for each.
        weighting: ``"softmax"``, ``"inverse"``, ``"topk"`` or ``"threshold"``.
        self_weight: ``"include"`` or ``"exclude"`` the own knowledge.
        neighbours: of ``"topk"``.
        radius: of ``"threshold"``.
        finetune_ce: weight of private examples in fine-tuning; 0: public ones only.
        fuse_where: ``"server"``, or ``"client"``: each gets everybody's knowledge and its weights.
        options: of `Knowledge`.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    def __init__(
        self,
        beta: float = 10.0,
        epd: str = "mean_softmax",
        distance: str = "kl",
        weighting: str = "softmax",
        self_weight: str = "include",
        neighbours: int = 3,
        radius: float = 0.1,
        finetune_ce: float = 0.0,
        fuse_where: str = "server",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        require(beta >= 0, "beta", beta, "0 or above")
        check_options(epd, distance, weighting)
        both = ("include", "exclude")
        require(self_weight in both, "self_weight", repr(self_weight), "'include' or 'exclude'")
        require(neighbours >= 1, "neighbours", neighbours, "1 or above")
        require(radius >= 0, "radius", radius, "0 or above")
        require(finetune_ce >= 0, "finetune_ce", finetune_ce, "0 or above")
        places = ("server", "client")
        require(fuse_where in places, "fuse_where", repr(fuse_where), "'server' or 'client'")
        self.epd, self.distance, self.fuse_where = epd, distance, fuse_where
        self.rule: dict[str, Any] = {
            "beta": float(beta),
            "weighting": weighting,
            "include_self": self_weight == "include",
            "neighbours": neighbours,
            "radius": float(radius),
        }
        self.told |= {"ce": float(finetune_ce), "hist": epd == "label_hist"}
        self.last: dict[str, Any] = {}

    def estimates(self, heard: Heard) -> Tensor:
        """Estimated label distributions, float64 [N, C]."""
        if self.epd == "label_hist":
            counts = torch.stack([said["labels"] for said in heard.values()]).double()
            return counts / counts.sum(1, keepdim=True)
        said = torch.stack([s[KNOWLEDGE] for s in heard.values()])
        return ESTIMATES[self.epd](said.double().softmax(-1) if self.space == "logit" else said)

    def fused(self, heard: Heard) -> tuple[dict[int, ArrayRecord], dict[str, float]]:
        """``Ft = w F`` for those heard from."""
        nodes, knowledge = list(heard), torch.stack([s[KNOWLEDGE] for s in heard.values()])
        estimated = self.estimates(heard)
        weights = effectiveness(distances(estimated, self.distance), **self.rule)
        self.last = {"nodes": nodes, "weights": weights, "estimates": estimated}
        figures = {
            "self_weight": float(weights.diagonal().mean()),
            "neighbours": float((1 / weights.square().sum(1)).mean()),
        }
        if self.fuse_where == "client":
            everything = {KNOWLEDGE: knowledge}
            return {
                n: to_record({**everything, "weights": w.to(knowledge.dtype)})
                for n, w in zip(nodes, weights, strict=True)
            }, figures
        fused = fuse(weights, knowledge)
        return {n: to_record({KNOWLEDGE: f}) for n, f in zip(nodes, fused, strict=True)}, figures

    def artefacts(self) -> dict[str, Any]:
        """Who learns how much from whom, in the last round that counted, by client number."""
        if not self.last:
            return {}
        return {
            "knowledge": {
                "clients": [node - 1 for node in self.last["nodes"]],
                "weights": self.last["weights"].tolist(),
                "estimates": self.last["estimates"].tolist(),
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """Also the last weights."""
        return {**super().state_dict(), "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.last = dict(state["last"])
