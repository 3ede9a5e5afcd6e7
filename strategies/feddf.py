"""FedDF."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.core import rng
from fedsim.core.averaging import Mean, MetricMean, examples_of, metrics_of
from fedsim.core.distill import kl
from fedsim.core.errors import ConfigError, require
from fedsim.core.model import FlatModel
from fedsim.core.nodes import client_at, node_of
from fedsim.core.records import FlatRecord, as_flat
from fedsim.core.strategy import Aggregate, Served, Setting, Strategy


class FedDF(Strategy):
    """FedDF: FedAvg for each architecture, then distillation of all clients' ensemble into each.

    Lin, Kong, Stich, Jaggi, *Ensemble Distillation for Robust Model Fusion in Federated Learning*,
    NeurIPS 2020, after its official code: students start from the average of their architecture's
    clients (weighted by examples) and fit to ``softmax(mean of the clients' logits / tau)`` on
    unlabelled public data, by KL averaged over the batch, with Adam. The code checks on validation
    data when to stop, up to 10,000 batches; here it is a fixed number.

    With ``server_steps = 0`` and one architecture it is FedAvg. Needs ``data.public``, and that the
    server can run the models.

    Args:
        server_steps: batches of distillation in a round, for each architecture.
        server_lr: Adam's learning rate.
        server_batch: public examples per batch.
        temperature: tau, of teachers and students; as in the code, without a factor tau^2.

    Raises:
        ConfigError: a parameter is out of its range, or there is no public set.
    """

    client = "knfu"

    def __init__(
        self,
        server_steps: int = 100,
        server_lr: float = 1e-3,
        server_batch: int = 128,
        temperature: float = 1.0,
    ) -> None:
        require(server_steps >= 0, "server_steps", server_steps, "0 or above")
        require(server_lr > 0, "server_lr", server_lr, "above 0")
        require(server_batch >= 1, "server_batch", server_batch, "1 or above")
        require(temperature > 0, "temperature", temperature, "above 0")
        self.server_steps, self.server_lr = server_steps, server_lr
        self.server_batch, self.temperature = server_batch, temperature
        self.heads: list[FlatRecord] = []

    def setup(self, setting: Setting) -> None:
        """One model for each architecture."""
        super().setup(setting)
        if self.server_steps and setting.public is None:
            raise ConfigError("data.public = 0 must be 1 or above: FedDF needs a public set")
        if not self.heads:
            self.heads = [model.initial() for model in setting.models]

    def client_config(self) -> dict[str, Any]:
        """Train the model that was sent, and give it back."""
        return {"steps": "local give"}

    def kind_of(self, node: int) -> int:
        """The architecture of a node."""
        assignment = self.setting.assignment
        return int(assignment[client_at(node) % len(assignment)])

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Send every client the model of its architecture."""
        if not self.heads:
            raise ConfigError("FedDF runs models on the server: call setup() with them first")
        told = {**config, "server-round": server_round}
        return [
            self.message("train", {"arrays": self.heads[self.kind_of(node)]}, told, node)
            for node in sorted(grid.get_node_ids())
        ]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Average each architecture, then distil."""
        models = self.setting.models
        means, metrics = [Mean() for _ in models], MetricMean()
        public, logits, heard = self.setting.public, None, 0
        for reply in replies:
            if reply.has_error():
                continue
            kind = self.kind_of(reply.metadata.src_node_id)
            record = as_flat(reply.content.array_records["arrays"], models[kind].layout)
            means[kind].add(record, examples_of(reply.content))
            metrics.add(metrics_of(reply.content), examples_of(reply.content))
            heard += 1
            if public is not None and self.server_steps:
                said = _outputs(models[kind], record, public)
                logits = said if logits is None else logits + said
        if not heard:
            return None, None
        heads = [mean.record() or head for mean, head in zip(means, self.heads, strict=True)]
        figures: dict[str, float] = {}
        if logits is not None and public is not None:
            target = (logits / heard / self.temperature).softmax(-1)
            losses = []
            for kind, head in enumerate(heads):
                heads[kind], loss = self._distil(kind, head, public, target, server_round)
                losses.append(loss)
            figures["distillation"] = sum(losses) / len(losses)
        self.heads = heads
        return heads[0], MetricRecord({**metrics.record(), **figures})

    def _distil(
        self, kind: int, head: FlatRecord, x: Tensor, target: Tensor, server_round: int
    ) -> tuple[FlatRecord, float]:
        """The student after its steps, and its mean loss."""
        model, p = self.setting.models[kind], self.setting.models[kind].layout.num_trainable
        flat, beside = head.flat.clone(), {n: t.clone() for n, t in head.beside.items()}
        stream = rng.stream(self.setting.seed, server_round, rng.SERVER, f"distillation {kind}")
        weights = flat[:p].clone().requires_grad_()
        adam, total = torch.optim.Adam([weights], self.server_lr), 0.0

        def loss(outputs: Tensor, wanted: Tensor, _: Tensor | None) -> Tensor:
            return kl(outputs, wanted, self.temperature) / self.temperature**2

        for _ in range(self.server_steps):
            size = min(self.server_batch, len(x))
            rows = torch.from_numpy(stream.choice(len(x), size, replace=False))
            batch = {"x": x[rows], "y": target[rows].to(flat.dtype)}
            flat[:p] = weights.detach()
            value, weights.grad = model.gradient(flat, beside, batch, loss)
            adam.step()
            total += float(value)
        flat[:p] = weights.detach()
        return FlatRecord(model.layout, flat, beside), total / max(self.server_steps, 1)

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """One an architecture, for the clients who have it."""
        if len(self.heads) < 2:
            return {"model": Served(arrays)}
        nodes = [node_of(c) for c in range(self.setting.num_clients)]
        return {
            f"architecture-{kind}": Served(head, [n for n in nodes if self.kind_of(n) == kind])
            for kind, head in enumerate(self.heads)
        }

    def state_dict(self) -> dict[str, Any]:
        """The models."""
        return {"heads": [{"flat": h.flat, "beside": dict(h.beside)} for h in self.heads]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.heads = [
            FlatRecord(model.layout, head["flat"], head["beside"])
            for model, head in zip(self.setting.models, state["heads"], strict=True)
        ]


def _outputs(model: FlatModel, record: FlatRecord, x: Tensor) -> Tensor:
    """Logits in float64, shape [M, C]."""
    parts = [model.outputs(record.flat, dict(record.beside), part) for part in x.split(1024)]
    return torch.cat(parts).double()
