"""DisPFL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.core import rng, topology
from fedsim.core.errors import require
from fedsim.core.packets import Checked
from fedsim.core.records import FlatRecord, as_flat
from fedsim.core.strategy import Aggregate
from strategies.dfedavg import DFedAvg

MASK = "mask"


class DisPFL(DFedAvg):
    """DisPFL: decentralised learning of sparse models, each node with a mask of its own.

    Dai, Shen, He, Tian, Tao, *DisPFL: Towards Communication-Efficient Personalized Federated
    Learning via Decentralized Sparse Training*, ICML 2022; after its official code, with nodes that
    train first and mix then:

    ``w_i <- M_i * sum_j w_j / sum_j M_j`` over the node and its neighbours, 0 where nobody's mask
    is 1; see the client half for training and the masks' steps. The code mixes before training and
    draws layers' densities from ERK unless told otherwise; here every layer with two axes or more
    has the same density, the others are dense, and all nodes begin with the same mask. Entries are
    taken in by their gradient, as in the paper; the code's script takes random ones.

    `averaged_loss` and `averaged_accuracy` are of the plain mean of the nodes' models; `overlap`
    is the mean share of a mask that another one has too.

    Args:
        density: share of the entries that a mask leaves.
        anneal: share of them that is exchanged in the first round; it falls to 0 as a cosine.
        options: topology and degree of `DFedAvg`; there is one gossip step.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "dispfl"

    def __init__(self, density: float = 0.5, anneal: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        require(0 < density <= 1, "density", density, "above 0 and at most 1")
        require(0 <= anneal <= 1, "anneal", anneal, "0 to 1")
        require(self.gossip_steps == 1, "gossip_steps", self.gossip_steps, "1")
        self.density, self.anneal = float(density), float(anneal)
        self.masks = torch.empty(0, 0)

    def client_config(self) -> dict[str, Any]:
        """How masks move."""
        return {"anneal": self.anneal, "total": self.setting.rounds}

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Every node starts from the same model and mask."""
        return super().start_arrays(as_flat(arrays, self.setting.info.layout))

    def _begin(self, arrays: ArrayRecord, ids: list[int]) -> None:
        super()._begin(arrays, ids)
        record = as_flat(arrays)
        layout = record.layout
        mask = torch.ones(layout.num_trainable, dtype=layout.dtype)
        draw = rng.stream(self.setting.seed, 0, rng.SERVER, "mask")
        for name in layout.trainable:
            span = layout.span(name)
            if len(layout.shapes[layout.names.index(name)]) < 2:
                continue
            count = span.stop - span.start
            chosen = draw.permutation(count)[max(1, round(self.density * count)) :]
            mask[span.start + torch.from_numpy(chosen)] = 0.0
        self.masks = mask.repeat(len(ids), 1)
        self.nodes[:, : layout.num_trainable] *= self.masks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Send every node its own model and mask."""
        messages = super().configure_train(server_round, arrays, config, grid)
        trained = as_flat(arrays).layout.trained
        for message in messages:
            row = self.ids.index(message.metadata.dst_node_id)
            message.content[MASK] = FlatRecord(trained, self.masks[row])
        return messages

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """A model, and a mask of zeros and ones."""
        mask = Checked(as_flat(sent.array_records[MASK]), binary)
        return {**sent.array_records, MASK: mask}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """As `DFedAvg`, with what the nodes say of their masks."""
        self._fresh = self.masks.clone()
        arrays, metrics = super().aggregate_train(server_round, self._masked(replies))
        if arrays is None or metrics is None:
            return None, None
        self.masks = self._fresh
        both = self.masks @ self.masks.T / self.masks.sum(1)
        others = ~torch.eye(len(both), dtype=torch.bool)
        metrics["overlap"] = float(both[others].mean()) if len(both) > 1 else 1.0
        return arrays, metrics

    def _masked(self, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            if not reply.has_error():
                row = self.ids.index(reply.metadata.src_node_id)
                self._fresh[row] = as_flat(reply.content.array_records[MASK]).flat
            yield reply

    def mixed(self, trained: Tensor, weights: topology.Weights) -> Tensor:
        """Averages over those whose masks have the entry; buffers over all neighbours."""
        near = torch.from_numpy((weights > 0).astype("float64"))
        p, masks = self._fresh.shape[1], self._fresh.double()
        total, count = near @ (trained[:, :p].double() * masks), near @ masks
        mixed = torch.where(count > 0, total / count.clamp_min(1.0), 0.0) * masks
        buffers = (near / near.sum(1, keepdim=True)) @ trained[:, p:].double()
        return torch.cat([mixed, buffers], 1).to(trained.dtype)

    def model_bytes(self, model: ArrayRecord) -> int:
        """The entries that a mask leaves, and the mask as bits."""
        dense, p = super().model_bytes(model), self._fresh.shape[1]
        spared = (p - int(self._fresh[0].sum())) * model_width(model)
        return dense - spared + -(-p // 8)

    def state_dict(self) -> dict[str, Any]:
        """Also the masks."""
        return {**super().state_dict(), "masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.masks = state["masks"]


def binary(mask: FlatRecord) -> None:
    """Raise `ValueError` unless a mask holds nothing but 0 and 1."""
    if not ((mask.flat == 0) | (mask.flat == 1)).all():
        raise ValueError("a mask with entries that are neither 0 nor 1")


def model_width(model: ArrayRecord) -> int:
    """Bytes of one entry."""
    return as_flat(model).flat.element_size()
