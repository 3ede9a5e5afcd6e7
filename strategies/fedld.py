"""FedLD."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.core.averaging import Mean, MetricMean, metrics_of
from fedsim.core.diagnostics import Geometry, decompose
from fedsim.core.errors import ConfigError, require
from fedsim.core.principal import (
    Renorm,
    coefficients,
    combine,
    gram,
    precision,
    principal_aggregate,
)
from fedsim.core.records import FlatRecord, as_flat
from fedsim.core.strategy import Aggregate
from strategies.fedavg import FedAvg

Form = Literal["prob", "logit"]
Buffers = Literal["mean", "principal", "skip"]
BatchNorm = Literal["train", "frozen"]
First = Literal["mean", "principal"]
Aggregation = Literal["principal", "mean"]
Warmup = Literal["ramp", "official"]

__all__ = ["FedLD", "FedLDOfficial", "decompose", "principal_aggregate"]


class FedLD(FedAvg):
    """FedLD: principal-gradient aggregation, and margin control in the clients' loss.

    Zeng et al., *Tackling Data Heterogeneity in Federated Learning via Loss Decomposition*, MICCAI
    2024 (arXiv 2408.12300). The paper splits the global loss into local, distribution-shift and
    aggregation loss; margin control lowers the second, this aggregation the third. What is
    computed is that of the authors' code and Figure 1; the paper's equations could not be had, so
    the decomposition (`decompose`) is reconstructed.

    Every entry of the model is aggregated by itself with `principal_aggregate`, unweighted:
    numbers of examples do not matter. Until an entry has moved for the first time, it takes the
    plain mean. Where the defaults differ from the authors' code, an option brings it back, and
    `FedLDOfficial` sets them all.

    The aggregate is shorter than the mean update the more the clients differ, so the control of
    an experiment is FedAvg with a tuned `server_lr`.

    Args:
        rho: share of the principal directions that is kept.
        margin_lambda: weight of the clients' margin term; 0 switches it off.
        margin_form: ``"prob"`` (the authors' code) or ``"logit"`` (their Figure 1).
        server_lr: step along the aggregate.
        r_max: keep at most that many directions.
        renorm: length of the aggregate, see `principal_aggregate`.
        buffers: BatchNorm statistics are averaged (``"mean"``), treated as any entry
            (``"principal"``, the authors' code; variances may turn negative), or left as they are
            on the server (``"skip"``). Integer counters take the maximum over clients.
        bn_mode: BatchNorm trains with the batch's statistics (``"train"``) or with frozen ones
            (``"frozen"``, what the authors' code does: it never leaves evaluation mode).
        first_round: ``"mean"`` as described above, or ``"principal"`` from the start.
        warmup_rounds: rounds over which the clients' learning rate rises; 0: none.
        warmup: ``"ramp"``: factor ``round / warmup_rounds`` in round 1, 2, ...; ``"official"``:
            ``epochs (round - 1) / warmup_rounds``, so that in the first round nobody moves.
        diagnostics: add columns to the rounds table: `fedld_norm_ratio` (length of the aggregate
            over that of the mean), `fedld_cosine` (between the two), `fedld_top_energy` (share of
            the first directions in all), and `fedld_*_loss`, the terms of `decompose`.
        aggregation: ``"mean"`` takes the plain mean throughout, so that margin control can be
            studied by itself.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "fedld"

    def __init__(
        self,
        rho: float = 0.8,
        margin_lambda: float = 0.1,
        margin_form: Form = "prob",
        server_lr: float = 1.0,
        r_max: int | None = None,
        renorm: Renorm = "none",
        buffers: Buffers = "mean",
        bn_mode: BatchNorm = "train",
        first_round: First = "mean",
        warmup_rounds: int = 0,
        warmup: Warmup = "ramp",
        diagnostics: bool = False,
        aggregation: Aggregation = "principal",
    ) -> None:
        super().__init__(server_lr, weighted=False)
        require(0 < rho <= 1, "rho", rho, "above 0 and at most 1")
        require(margin_lambda >= 0, "margin_lambda", margin_lambda, "0 or above")
        require(r_max is None or r_max >= 1, "r_max", r_max, "1 or above")
        require(warmup_rounds >= 0, "warmup_rounds", warmup_rounds, "0 or above")
        for name, value, literal in (
            ("margin_form", margin_form, Form),
            ("renorm", renorm, Renorm),
            ("buffers", buffers, Buffers),
            ("bn_mode", bn_mode, BatchNorm),
            ("first_round", first_round, First),
            ("warmup", warmup, Warmup),
            ("aggregation", aggregation, Aggregation),
        ):
            allowed = get_args(literal)
            require(value in allowed, name, value, f"one of {', '.join(allowed)}")
        self.rho, self.r_max, self.renorm = rho, r_max, renorm
        self.margin_lambda, self.margin_form = float(margin_lambda), margin_form
        self.buffers, self.bn_mode, self.first_round = buffers, bn_mode, first_round
        self.warmup_rounds, self.warmup = warmup_rounds, warmup
        self.diagnostics, self.aggregation = diagnostics, aggregation
        self.seen: set[str] = set()

    def client_config(self) -> dict[str, Any]:
        """Tell the clients about margin and BatchNorm."""
        return {
            "margin_lambda": self.margin_lambda,
            "margin_form": self.margin_form,
            "frozen_bn": self.bn_mode == "frozen",
        }

    def warmup_factor(self, server_round: int, epochs: int) -> float:
        """Factor of the clients' learning rate in a round (from 1)."""
        done = epochs * (server_round - 1) if self.warmup == "official" else server_round
        return min(1.0, done / self.warmup_rounds) if self.warmup_rounds else 1.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """As FedAvg, with the warm-up of the learning rate."""
        told: dict[str, Any] = dict(config)
        if self.warmup_rounds:
            if "lr" not in told:
                raise ConfigError("warmup_rounds needs lr in the training configuration")
            told["lr"] *= self.warmup_factor(server_round, told.get("epochs", 1))
        return super().configure_train(server_round, arrays, ConfigRecord(told), grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """One principal aggregate for each entry; means of the buffers."""
        if self.arrays is None:
            return None, None
        old, updates = as_flat(self.arrays), dict[int, FlatRecord]()
        mean, metrics = Mean(), MetricMean()
        for reply in replies:
            if reply.has_error():
                continue
            update = as_flat(reply.content.array_records["arrays"], old.layout)
            updates[reply.metadata.src_node_id] = update
            mean.add(update, 1.0)
            metrics.add(metrics_of(reply.content), 1.0)
        average = mean.record()
        if average is None:
            return None, None
        setting = getattr(self, "setting", None)  # none where Flower runs us by itself
        buffers = setting.info.buffers if setting else frozenset[str]()
        move, geometry = average.flat, Geometry() if self.diagnostics else None
        for name in old.layout.order:
            span = old.layout.span(name)
            if name in buffers and self.buffers != "principal":
                move[span] *= self.buffers == "mean"
            else:
                rows = [update.flat[span] for update in updates.values()]
                move[span] = self.server_lr * self._entry(name, move[span], rows, geometry)
        stay = buffers if self.buffers == "skip" else ()
        beside = average.beside | {n: t for n, t in old.beside.items() if n in stay}
        new, record = old.with_flat(old.flat + move, beside), metrics.record()
        if geometry:
            figures = geometry.figures()
            if setting and setting.evaluate:
                models = {n: old.with_flat(old.flat + u.flat, u.beside) for n, u in updates.items()}
                terms = decompose(new, models, setting.evaluate)
                figures |= {f"{term}_loss": value for term, value in terms.items()}
            record.update({f"fedld_{name}": value for name, value in figures.items()})
        return new, record

    def _entry(
        self, name: str, mean: Tensor, rows: list[Tensor], geometry: Geometry | None
    ) -> Tensor:
        """The aggregate of one entry of the model."""
        principal = self.aggregation == "principal" and (
            name in self.seen or self.first_round == "principal"
        )
        if not principal and bool(mean.any()):
            self.seen.add(name)
        if not (principal or geometry):
            return mean
        K = gram(rows)
        c = torch.full_like(K[0], 1 / len(K))
        if principal:
            try:
                c = coefficients(K, self.rho, self.r_max, self.renorm, precision(mean.dtype))
            except RuntimeError as error:  # LAPACK did not converge
                logging.getLogger("flwr").warning("%s is aggregated by its mean: %s", name, error)
        if geometry:
            geometry.add(K, c)
        return combine(rows, c) if principal else mean

    def state_dict(self) -> dict[str, Any]:
        """The entries that have moved."""
        return {"seen": sorted(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.seen = set(state["seen"])


class FedLDOfficial(FedLD):
    """FedLD as the authors' code runs it.

    BatchNorm is frozen, and its statistics are aggregated as any entry. The learning rate of the
    clients is 0 in the first round (a schedule that takes effect although it is off): nobody
    moves, and the first *two* rounds are plain means. The clients of the code also have
    ``lr = 0.01, momentum = 0.5, weight_decay = 5e-4, epochs = 5, batch_size = 50``; set these in
    ``[train]``.

    Not brought back: NaN where a projection is zero, and the standstill with one client.

    Args:
        margin_lambda: 0.03 in the code's options, 0.1 in its README.
        options: any other option of `FedLD`.
    """

    def __init__(self, margin_lambda: float = 0.03, **options: Any) -> None:
        official = {"buffers": "principal", "bn_mode": "frozen"}
        warmup = {"warmup_rounds": 5, "warmup": "official"}
        super().__init__(margin_lambda=margin_lambda, **{**official, **warmup, **options})
