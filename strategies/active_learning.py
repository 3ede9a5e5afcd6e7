"""Federated active learning, with any rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsim.core import rng
from fedsim.core.averaging import examples_of, metrics_of
from fedsim.core.errors import require
from fedsim.core.selection import RULES
from fedsim.core.strategy import Exchange
from fedsim.core.unaided import Unaided
from strategies.fedavg import FedAvg


class ActiveLearning(Unaided, FedAvg):
    """Federated active learning: cycles of FedAvg, and between them every client has more labelled.

    A cycle is `rounds_per_cycle` rounds from the initial model. In its last round all clients take
    part; those whose reply counted then choose examples by `rule` and have them labelled by the
    experiment's `oracle`. The server learns how many examples a client has labelled, never which
    or as what; nothing follows the last cycle of a run. Clients are weighted by their labelled
    examples. Its rounds table gets ``labels``, the labelled examples of all clients that the round
    was trained on, ``cycle``, and in a cycle's last round ``acquired`` and ``waiting`` (asked for,
    not answered yet).

    Rules: ``random``; ``entropy``, ``margin``, ``least_confidence`` (largest, by the model
    `judge`); ``coreset`` (k-centre, Sener and Savarese 2018); ``badge`` (Ash et al. 2020);
    ``logo`` (Kim et al. 2023; its clusters come from the client's model after its last round,
    where the official code trains one on local labels alone); ``ksas`` (Cao et al. 2023).

    Args:
        rule: how clients choose.
        rounds_per_cycle: T.
        initial: share of a client's examples that is labelled at first, rounded up.
        budget: share that is labelled in each later cycle, rounded up.
        judge: model that rules with one model ask, ``"global"`` or ``"local"``.
        participation: R, the share of clients that take part in a round, instead of the cohort's.
        final_round_full: in the last round of a cycle all clients take part (the official code);
            False: as in every other (the paper's algorithm), and everybody acquires with the
            models it has, which may be old.
        fresh_global: clients choose with the model just aggregated; False: with the global model
            that each has last trained from, and nothing is sent.
        warm_start: cycles go on from the model before instead of from the initial one.
        persist_optimizer: momentum goes on within a cycle.
        milestone: local epoch of a client in a cycle from which on its learning rate is a tenth;
            0: never.

    Raises:
        ConfigError: a parameter is out of its range.
    """

    client = "kafal"
    kcfu = False

    def __init__(
        self,
        rule: str = "random",
        rounds_per_cycle: int = 50,
        initial: float = 0.1,
        budget: float = 0.05,
        judge: str = "global",
        participation: float | None = None,
        final_round_full: bool = True,
        fresh_global: bool = True,
        warm_start: bool = False,
        persist_optimizer: bool = True,
        milestone: int = 0,
    ) -> None:
        super().__init__()
        require(rule in RULES, "rule", repr(rule), f"one of {', '.join(RULES)}")
        require(rounds_per_cycle >= 1, "rounds_per_cycle", rounds_per_cycle, "1 or above")
        require(0 < initial <= 1, "initial", initial, "above 0 and at most 1")
        require(0 <= budget <= 1, "budget", budget, "0 to 1")
        require(judge in ("global", "local"), "judge", repr(judge), "'global' or 'local'")
        share = participation is None or 0 < participation <= 1
        require(share, "participation", participation, "above 0 and at most 1")
        require(milestone >= 0, "milestone", milestone, "0 or above")
        self.rounds_per_cycle, self.participation = rounds_per_cycle, participation
        self.final_round_full, self.fresh_global = final_round_full, fresh_global
        self.warm_start, self.first = warm_start, cast("ArrayRecord | None", None)
        self._told = {
            "rule": rule,
            "judge": judge,
            "initial": float(initial),
            "budget": float(budget),
            "kcfu": self.kcfu,
            "persist": persist_optimizer,
            "milestone": milestone,
        }
        self.labels: dict[str, int] = {}

    def client_config(self) -> dict[str, Any]:
        """How to choose and to train."""
        return self._told

    def start_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Remember where cycles start."""
        self.first = arrays
        return arrays

    def place(self, server_round: int) -> tuple[int, int]:
        """Cycle, and round in the cycle, both from 0."""
        return divmod(server_round - 1, self.rounds_per_cycle)

    def last_turn(self, server_round: int) -> bool:
        """Whether a cycle ends with this round."""
        return self.place(server_round)[1] == self.rounds_per_cycle - 1

    def sample(self, server_round: int, nodes: list[int]) -> list[int] | None:
        """Everybody at the end of a cycle; else `participation`, or the runner's choice."""
        if self.last_turn(server_round):
            return nodes
        return self._some(server_round, nodes) if self.participation else None

    def _some(self, server_round: int, nodes: list[int]) -> list[int]:
        count = math.ceil((self.participation or 1.0) * len(nodes) - 1e-9)
        stream = rng.stream(self.setting.seed, server_round, rng.SERVER, "participants")
        return sorted(nodes[i] for i in stream.choice(len(nodes), count, replace=False).tolist())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """As FedAvg; a cycle begins with the initial model."""
        cycle, turn = self.place(server_round)
        if turn == 0 and not self.warm_start:
            arrays = self.setting.initial or self.first or arrays
        told = ConfigRecord({**config, "phase": "train", "cycle": cycle, "turn": turn})
        messages = super().configure_train(server_round, arrays, told, grid)
        if self.last_turn(server_round) and not self.final_round_full:
            chosen = set(self._some(server_round, sorted(grid.get_node_ids())))
            return [m for m in messages if m.metadata.dst_node_id in chosen]
        return messages

    def expected(self, sent: RecordDict) -> Mapping[str, ArrayRecord]:
        """A model from who trains; from who has examples labelled, numbers only."""
        acquiring = sent.config_records["config"].get("phase") == "acquire"
        return {} if acquiring else sent.array_records

    def exchange(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Exchange:
        """A round of FedAvg; at the end of a cycle also the labelling."""
        messages = self.configure_train(server_round, arrays, config, grid)
        asked = {m.metadata.dst_node_id for m in messages}
        labels: dict[str, int] = {}
        replies = yield messages
        model, metrics = self.aggregate_train(server_round, self._counted(replies, labels))
        if model is None:
            return None, None
        row: dict[str, Any] = {**(metrics or {}), "cycle": self.place(server_round)[0]}
        row.pop("asked", None)
        row["labels"] = sum({**self.labels, **labels}.values())
        if self.last_turn(server_round) and server_round < self.setting.rounds:
            idle = sorted(set(grid.get_node_ids()) - asked)
            nodes = sorted({*map(int, labels), *idle})
            answers = yield self._acquisition(server_round, model, config, nodes)
            row |= self._noted(self._counted(answers, labels))
        self.labels |= labels
        return model, MetricRecord(row)

    def _acquisition(
        self, server_round: int, model: ArrayRecord, config: ConfigRecord, nodes: list[int]
    ) -> Sequence[Message]:
        told = {
            **config,
            "server-round": server_round,
            "phase": "acquire",
            "cycle": self.place(server_round)[0],
        }
        content = {"arrays": model} if self.fresh_global else {}
        return self.broadcast("train", content, told, nodes)

    @staticmethod
    def _counted(replies: Iterable[Message], labels: dict[str, int]) -> Iterator[Message]:
        """The replies; notes how many examples each client has labelled."""
        for reply in replies:
            if not reply.has_error():
                labels[str(reply.metadata.src_node_id)] = int(examples_of(reply.content))
            yield reply

    @staticmethod
    def _noted(replies: Iterable[Message]) -> dict[str, float]:
        """Sums over clients of what the labelling gave."""
        total = {"acquired": 0.0, "waiting": 0.0}
        for reply in replies:
            metrics = metrics_of(reply.content)
            for name in total:
                value = metrics.get(name, 0.0)
                total[name] += value if isinstance(value, (int, float)) else 0.0
        return total

    def state_dict(self) -> dict[str, Any]:
        """How many labels each client has."""
        return {"labels": self.labels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.labels = dict(state["labels"])
