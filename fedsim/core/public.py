"""Strategies in which knowledge on a public set travels, and clients keep their models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.core.averaging import MetricMean, mean_of, metrics_of
from fedsim.core.distill import check_loss
from fedsim.core.errors import ConfigError, require
from fedsim.core.knowledge import DIGEST, KNOWLEDGE, ROWS, SUBSET, VOTES
from fedsim.core.packets import Checked
from fedsim.core.records import FlatRecord, from_record, to_record
from fedsim.core.strategy import Aggregate, Exchange, Served, Setting, Strategy
from fedsim.core.unaided import Unaided

Heard = dict[int, dict[str, Tensor]]
"""What each node said, in order of node."""


class Knowledge(Unaided, Strategy):
    """Base of strategies whose clients keep their models, of whatever architecture.

    A round is two exchanges: clients train and say what their models make of the public examples,
    ``F_n`` [M, C]; the server fuses that and sends each of those it heard from what to fit to. It
    holds no model: what the round loop has as arrays is the mean of what clients said. Models are
    judged by the clients, each on the central test set (``accuracy``, the mean over clients) and
    on its own held-out examples (``client_accuracy``). A round that is abandoned leaves no trace
    on the clients either.

    Replies that name another public set (by digest), have another shape, or are no distributions
    are refused. Needs ``data.public``.

    Args:
        space: knowledge is ``"prob"`` (probabilities) or ``"logit"``.
        temperature: softens probabilities.
        half: knowledge travels in half precision.
        digest_epochs: passes over the public examples when fitting.
        digest_batch: examples per minibatch there; 0: as in local training.
        digest_lr: learning rate there; 0: as in local training.
        digest_loss: ``"kl"``, ``"ce_soft"`` or, in logit space, ``"mae_logit"``, ``"mse_logit"``.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "knfu"
    first, then = "local extract", "digest"
    """What clients do before and after the server has fused."""

    def __init__(
        self,
        space: str = "prob",
        temperature: float = 1.0,
        half: bool = False,
        digest_epochs: int = 2,
        digest_batch: int = 0,
        digest_lr: float = 0.0,
        digest_loss: str = "kl",
    ) -> None:
        require(space in ("prob", "logit"), "space", repr(space), "'prob' or 'logit'")
        require(temperature > 0, "temperature", temperature, "above 0")
        for name, value in {"digest_epochs": digest_epochs, "digest_batch": digest_batch}.items():
            require(value >= 0, name, value, "0 or above")
        require(digest_lr >= 0, "digest_lr", digest_lr, "0 or above")
        check_loss("digest_loss", digest_loss, space)
        self.space, self.half, self.settled = space, half, 0
        self.told: dict[str, Any] = {
            "space": space,
            "temperature": float(temperature),
            "half": half,
            "digest_epochs": digest_epochs,
            "digest_batch": digest_batch,
            "digest_lr": float(digest_lr),
            "digest_loss": digest_loss,
        }

    # ------------------------------------------------------------------ what is said

    def setup(self, setting: Setting) -> None:
        """See to it that there is a public set.

        Raises:
            ConfigError: there is none.
        """
        super().setup(setting)
        if setting.num_outputs and setting.public is None:  # Flower's own loop knows neither
            name = type(self).__name__
            raise ConfigError(f"data.public = 0 must be 1 or above: {name} needs a public set")

    def client_config(self) -> dict[str, Any]:
        """How to learn, on which public set, and which round counted last."""
        digest = self.setting.public_digest if hasattr(self, "setting") else ""
        return {**self.told, "public": digest, "settled": self.settled}

    def asked_of(self, server_round: int) -> Tensor | None:
        """Places of the public examples that the round is about; None: all."""
        return None

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Nobody has said anything yet: even probabilities, or logits of zero."""
        setting = self.setting
        if setting.public is None:
            return arrays
        subset = self.asked_of(1)
        count = len(setting.public) if subset is None else len(subset)
        return self._like(count, 1.0 / setting.num_outputs if self.space == "prob" else 0.0)

    def _like(self, count: int, value: float = 0.0) -> FlatRecord:
        """A record of the layout of what clients say."""
        setting = self.setting
        dtype = torch.float16 if self.half else setting.info.layout.dtype
        entries = {KNOWLEDGE: torch.full((count, setting.num_outputs), value, dtype=dtype)}
        if self.told.get("votes"):
            entries[VOTES] = torch.zeros(count, dtype=dtype)
        if self.told.get("hist"):
            entries["labels"] = torch.zeros(setting.num_outputs, dtype=dtype)
        digest = bytes.fromhex(setting.public_digest)
        return to_record({**entries, DIGEST: torch.tensor(list(digest), dtype=torch.uint8)})

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """Knowledge of the public set that was meant, or numbers only."""
        if "extract" not in str(sent.config_records["config"].get("steps")):
            return {}
        assert self.setting.public is not None
        subset = sent.array_records.get(SUBSET)
        rows = self.setting.public if subset is None else from_record(subset)[ROWS]
        return {"arrays": Checked(self._like(len(rows)), self._check)}

    def _check(self, record: FlatRecord) -> None:
        """Raise `ValueError` if it is about another public set, or holds no distributions."""
        state = record.state()
        if bytes(state[DIGEST].tolist()).hex() != self.setting.public_digest:
            raise ValueError("knowledge of another public set")
        if self.space == "prob":
            said = state[KNOWLEDGE].double()
            if (said < 0).any() or ((said.sum(1) - 1).abs() > 1e-3).any():
                raise ValueError("knowledge whose rows are no distributions")
        if VOTES in state and not torch.isin(state[VOTES], torch.tensor([0.0, 1.0])).all():
            raise ValueError("votes that are neither 0 nor 1")

    # ------------------------------------------------------------------ a round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Ask for knowledge."""
        subset, content = self.asked_of(server_round), {}
        if subset is not None:
            content[SUBSET] = to_record({ROWS: subset})
        told = {**config, "server-round": server_round, "steps": self.opening(server_round)}
        return self.broadcast("train", content, told, sorted(grid.get_node_ids()))

    def opening(self, server_round: int) -> str:
        """What clients do before the server fuses."""
        return self.first

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """The mean of what clients said; what each of them said is kept for the fusion."""
        self.round = server_round
        heard: Heard = {}
        mean, metrics = mean_of(self._listened(replies, heard), weighted=False)
        self.heard = heard
        return mean, metrics

    @staticmethod
    def _listened(replies: Iterable[Message], heard: Heard) -> Iterator[Message]:
        for reply in replies:
            if not reply.has_error():
                said = from_record(reply.content.array_records["arrays"])
                heard[reply.metadata.src_node_id] = said
            yield reply

    def fused(self, heard: Heard) -> tuple[dict[int, ArrayRecord], dict[str, float]]:
        """What each node is to fit to, and figures for the rounds table."""
        raise TypeError(f"{type(self).__name__} does not fuse")

    def exchange(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Exchange:
        """Hear, fuse, tell."""
        replies = yield self.configure_train(server_round, arrays, config, grid)
        mean, metrics = self.aggregate_train(server_round, replies)
        if mean is None:
            return None, None
        before = self.state_dict()
        records, figures = self.fused(self.heard)
        told = {**config, "server-round": server_round, "steps": self.then}
        messages = [
            self.message("train", {KNOWLEDGE: record}, told, node)
            for node, record in sorted(records.items())
        ]
        try:
            digested = MetricMean()
            for answer in (yield messages) if messages else ():
                digested.add(metrics_of(answer.content), 1.0)
        except Exception:
            self.load_state_dict(before)
            raise
        self.settled = server_round
        return mean, MetricRecord({**digested.record(), **(metrics or {}), **figures})

    def models(self, arrays: ArrayRecord) -> dict[str, Served]:
        """None: they stay with the clients."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The last round that counted."""
        return {"settled": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.settled = int(state["settled"])
