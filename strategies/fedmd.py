"""FedMD and selective federated distillation: one consensus for everybody."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.core import rng
from fedsim.core.averaging import MetricMean, metrics_of
from fedsim.core.errors import require
from fedsim.core.knowledge import KNOWLEDGE, ROWS, VOTES
from fedsim.core.public import Heard, Knowledge
from fedsim.core.records import to_record
from fedsim.core.strategy import Aggregate, Exchange, Setting


class FedMD(Knowledge):
    """FedMD: clients predict, fit to the mean of all predictions, then train on their own data.

    Li and Wang, *FedMD: Heterogenous Federated Learning via Model Distillation*, 2019; after its
    official code: the mean of raw logits, the own included; mean absolute error on logits; fresh
    public examples drawn each round. The code starts from models trained on the public labels
    and then on the own data; here public labels are used nowhere, so clients train on their own
    data before the first prediction.

    Args:
        alignment: public examples drawn for a round; 0: all of them.
        pretrain: train on the own data before the first prediction.
        options: of `Knowledge`; here ``space = "logit"`` and ``digest_loss = "mae_logit"``.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    first, then = "extract", "digest local"

    def __init__(self, alignment: int = 0, pretrain: bool = True, **options: Any) -> None:
        kind = "mae_logit" if options.get("space", "logit") == "logit" else "kl"
        given = {"space": "logit", "digest_epochs": 1, "digest_loss": kind}
        super().__init__(**{**given, **options})
        require(alignment >= 0, "alignment", alignment, "0 or above")
        self.alignment, self.pretrain = alignment, pretrain

    def asked_of(self, server_round: int) -> Tensor | None:
        """Places of the round's public examples."""
        public = self.setting.public
        if not self.alignment or public is None or self.alignment >= len(public):
            return None
        stream = rng.stream(self.setting.seed, server_round, rng.SERVER, "alignment")
        drawn = stream.choice(len(public), self.alignment, replace=False)
        return torch.from_numpy(drawn).sort().values

    def opening(self, server_round: int) -> str:
        """Before the first prediction of all, train."""
        return "local extract" if self.pretrain and not self.settled else self.first

    def fused(self, heard: Heard) -> tuple[dict[int, ArrayRecord], dict[str, float]]:
        """The mean for everybody."""
        said = torch.stack([s[KNOWLEDGE] for s in heard.values()])
        entries = {KNOWLEDGE: said.double().mean(0).to(said.dtype)}
        subset = self.asked_of(self.round)
        if subset is not None:
            entries[ROWS] = subset
        record = to_record(entries)
        return dict.fromkeys(heard, record), {}


class SelectiveFD(Knowledge):
    """Selective federated distillation: clients vote where they know; only clear votes count.

    Shao, Wu, Zhang, *Selective Knowledge Sharing for Privacy-Preserving Federated Distillation
    without A Good Teacher*, Nature Communications 2024. Each client estimates the ratio of its
    data's density to that of uniform noise (KuLSIF) and votes on public examples where it is above
    a quantile of its own data's; the server averages the votes and drops examples on which nobody
    voted or whose average is ambiguous; clients fit to the rest by cross-entropy. The official
    code multiplies by the matrix of the estimator's equations where its inverse is meant; here
    they are solved. Its kernel width, 30, is for MNIST; the default here is the median distance
    of public examples. The threshold of ambiguity is ours.

    Args:
        width: kernel width; 0: the median distance of public examples.
        ridge: regularisation of the estimate.
        quantile: of a client's own ratios above which it votes; the code takes the first quartile.
        confidence: largest probability that an average must reach to count; 0: no filter.
        options: of `Knowledge`; here ``digest_loss = "ce_soft"``.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    def __init__(
        self,
        width: float = 0.0,
        ridge: float = 1e-3,
        quantile: float = 0.25,
        confidence: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**{"digest_loss": "ce_soft", **options})
        require(self.space == "prob", "space", repr(self.space), "'prob': votes are probabilities")
        require(width >= 0, "width", width, "0 or above")
        require(ridge > 0, "ridge", ridge, "above 0")
        require(0 <= quantile < 1, "quantile", quantile, "at least 0 and below 1")
        require(0 <= confidence <= 1, "confidence", confidence, "0 to 1")
        self.confidence = confidence
        self.told |= {
            "votes": True,
            "width": float(width),
            "ridge": float(ridge),
            "quantile": float(quantile),
        }

    def fused(self, heard: Heard) -> tuple[dict[int, ArrayRecord], dict[str, float]]:
        """The mean of the votes, for the examples that have clear ones."""
        said = torch.stack([s[KNOWLEDGE] for s in heard.values()])
        votes = torch.stack([s[VOTES] for s in heard.values()]).double()
        total = votes.sum(0)
        mean = (votes[:, :, None] * said.double()).sum(0) / total.clamp_min(1.0)[:, None]
        clear = (total > 0) & (mean.amax(1) >= self.confidence)
        figures = {"voted": float(votes.mean()), "distilled": float(clear.double().mean())}
        if not clear.any():
            return {}, figures
        rows = clear.nonzero()[:, 0]
        record = to_record({KNOWLEDGE: mean[rows].to(said.dtype), ROWS: rows})
        return dict.fromkeys(heard, record), figures


class LocalOnly(Knowledge):
    """Local training only: clients keep their models and say nothing but how it goes.

    The baseline of all the others: `KnFu` whose fine-tuning has no epochs, without the bytes.
    """

    first = "local"

    def __init__(self) -> None:
        super().__init__()

    def setup(self, setting: Setting) -> None:
        """No public set is needed."""
        self.setting = setting

    def client_config(self) -> dict[str, Any]:
        """Which round counted last."""
        return {"settled": self.settled}

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Nothing: the server holds nothing."""
        return ArrayRecord()

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """How the training goes, the mean over clients."""
        mean = MetricMean()
        for reply in replies:
            if not reply.has_error():
                mean.add(metrics_of(reply.content), 1.0)
        return ArrayRecord(), mean.record()

    def exchange(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Exchange:
        """Let them train."""
        replies = yield self.configure_train(server_round, arrays, config, grid)
        result = self.aggregate_train(server_round, replies)
        self.settled = server_round
        return result
