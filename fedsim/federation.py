"""The round loop: sample, send, admit, aggregate, journal, evaluate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedsim.config import Experiment, StrategyConfig, TrainConfig
from fedsim.core import rng
from fedsim.core.averaging import examples_of, metrics_of
from fedsim.core.errors import RunError
from fedsim.core.records import as_flat, count_bytes, from_record
from fedsim.core.strategy import Served, Setting, Strategy
from fedsim.gate import Gate, Refusal
from fedsim.runtime import clock
from fedsim.runtime.grid import View, client_at, node_of
from fedsim.runtime.work import Environment

Row = dict[str, Any]


class RoundAbandoned(Exception):
    """Too few replies were admitted; the model and the strategy's state stay as they were."""


@dataclass
class Progress:
    """Where a run stands after a round.

    Attributes:
        round: last finished round; 0 before the first.
        arrays: what the server holds.
        rounds: rows of the rounds table.
        clients: rows of the clients table.
        timings: rows of the timings table, measured seconds.
    """

    round: int
    arrays: ArrayRecord
    rounds: list[Row] = field(default_factory=list)
    clients: list[Row] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)


class Tally:
    """Counts one round: a row for each client and the round's totals."""

    def __init__(self, server_round: int, names: tuple[str, ...]) -> None:
        self.round, self._names = server_round, names
        self.rows: dict[int, Row] = {}
        self.sampled: set[int] = set()
        self.phase_seconds: list[float] = []

    def row(self, client: int) -> Row:
        """The client's row, made when first asked for."""
        return self.rows.setdefault(
            client, {"round": self.round, "client": client, "name": self._names[client]}
        )

    def add(self, client: int, **values: float | int) -> None:
        """Add to numbers of the client's row."""
        row = self.row(client)
        for name, value in values.items():
            row[name] = row.get(name, 0) + value

    def totals(self) -> Row:
        """The round's sums over clients, and its simulated duration."""
        rows = [self.rows[c] for c in sorted(self.rows)]
        took = [r.get("status") for r in rows if r.get("status")]
        return {
            "bytes_up": sum(r.get("bytes_up", 0) for r in rows),
            "bytes_down": sum(r.get("bytes_down", 0) for r in rows),
            "seconds": float(sum(self.phase_seconds)),
            "client_seconds": float(sum(r.get("seconds", 0.0) for r in rows)),
            "sampled": len(self.sampled),
            "admitted": took.count("ok"),
            "refused": len(took) - took.count("ok"),
        }


class Federation:
    """Runs one strategy on one grid, round by round.

    Args:
        experiment: the configuration.
        entry: which of its strategies.
        strategy: that strategy, made fit by `fedsim.core.adapter.adapt`.
        seed: seed of the run.
        grid: where clients are; node ids are partition numbers plus one.
        env: data and model on the server's side.
    """

    def __init__(
        self,
        experiment: Experiment,
        entry: StrategyConfig,
        strategy: Strategy,
        seed: int,
        grid: Grid,
        env: Environment,
    ) -> None:
        self.experiment, self.strategy, self.seed = experiment, strategy, seed
        self.grid, self.env = grid, env
        self.train = TrainConfig.model_validate({**experiment.train.model_dump(), **entry.train})
        self.gate = Gate()
        device = experiment.clock.device
        self.device: clock.Device = clock.device(device.name, device.params)
        self._flops = clock.forward_flops(env.model, env.data.fields["x"][:1])
        heldout = set(env.data.heldout_clients.tolist())
        self.trainers = [
            node_of(c)
            for c, n in enumerate(env.data.train.lengths.tolist())
            if c not in heldout and n > 0
        ]
        self.judges = [node_of(c) for c, n in enumerate(env.data.test.lengths.tolist()) if n > 0]
        self.setting = Setting(
            env.model.info,
            env.data.num_clients,
            seed,
            experiment.experiment.rounds,
            self.loss_of,
        )
        strategy.setup(self.setting)

    def begin(self) -> Progress:
        """The state before the first round, evaluated as round 0."""
        progress = Progress(0, self.strategy.start_arrays(self.env.model.initial()))
        tally = Tally(0, self.env.data.client_names)
        row: Row = {"round": 0, **tally.totals(), "abandoned": False}
        row.update(self.evaluate(0, progress.arrays, tally))
        self._close(progress, tally, row, 0.0)
        return progress

    def advance(self, progress: Progress) -> None:
        """One round; changes `progress` in place."""
        start = time.perf_counter()
        server_round = progress.round + 1
        tally = Tally(server_round, self.env.data.client_names)
        metrics: Mapping[str, Any] = {}
        abandoned = False
        try:
            arrays, record = self._converse(server_round, progress.arrays, tally)
            progress.arrays = progress.arrays if arrays is None else arrays
            metrics = record or {}
        except RoundAbandoned:
            abandoned = True
        row: Row = {"round": server_round, **tally.totals(), "abandoned": abandoned}
        row.update({"train_loss" if n == "loss" else n: v for n, v in metrics.items()})
        row.pop("steps", None)
        row.update(self.evaluate(server_round, progress.arrays, tally))
        progress.round = server_round
        self._close(progress, tally, row, time.perf_counter() - start)

    @staticmethod
    def _close(progress: Progress, tally: Tally, row: Row, seconds: float) -> None:
        progress.rounds.append(row)
        progress.clients += [tally.rows[c] for c in sorted(tally.rows)]
        progress.timings.append({"round": tally.round, "wall_seconds": seconds})

    def cohort(self, server_round: int) -> list[int]:
        """Node ids of the round's cohort, ascending: the strategy's choice or a seeded sample."""
        chosen = self.strategy.sample(server_round, self.trainers)
        if chosen is not None:
            return sorted(chosen)
        config, population = self.experiment.cohort, len(self.trainers)
        size = config.size or math.ceil((config.fraction or 1.0) * population)
        size = min(population, math.ceil(size * (1 + config.overselect)))
        if size == population:
            return list(self.trainers)
        stream = rng.stream(self.seed, server_round, rng.SERVER, "cohort")
        return sorted(stream.choice(self.trainers, size, replace=False).tolist())

    def told(self, server_round: int) -> ConfigRecord:
        """The configuration every client is sent in a round."""
        train = self.train
        return ConfigRecord(
            {
                "seed": self.seed,
                "server-round": server_round,
                "epochs": train.epochs,
                "max_steps": train.max_steps or 0,
                "batch_size": train.batch_size,
                "lr": train.lr * train.lr_decay ** (server_round - 1),
                "momentum": train.momentum,
                "weight_decay": train.weight_decay,
            }
        )

    def _converse(
        self, server_round: int, arrays: ArrayRecord, tally: Tally
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Drive the strategy's exchange for one round."""
        view = View(self.grid, self.cohort(server_round))
        conversation = self.strategy.exchange(server_round, arrays, self.told(server_round), view)
        replies: Iterable[Message] | None = None
        try:
            while True:
                messages = next(conversation) if replies is None else conversation.send(replies)
                replies = self.admitted(messages, tally)
        except StopIteration as done:
            return cast("tuple[ArrayRecord | None, MetricRecord | None]", done.value)

    def admitted(self, messages: Iterable[Message], tally: Tally) -> Iterator[Message]:
        """Send messages and yield the admitted replies in order of client number.

        Raises:
            RoundAbandoned: at the end, if fewer than the quorum were admitted.
        """
        sent = sorted(messages, key=lambda m: m.metadata.dst_node_id)
        good, phase = 0, 0.0
        for message, reply in self._pairs(sent):
            client = client_at(message.metadata.dst_node_id)
            tally.sampled.add(client)
            row = tally.row(client)
            down = count_bytes(message.content)
            up = count_bytes(reply.content) if reply is not None and reply.has_content() else 0
            try:
                if reply is None:
                    raise Refusal("late", "no reply before the cut-off")
                reply.content = self.gate.admit(reply, self.strategy.expected(message.content))
            except Refusal as refusal:
                row["status"] = {"error_reply": "error", "late": "late"}.get(
                    refusal.code, "refused"
                )
                row["reason"] = f"{refusal.code}: {refusal.detail}"
                reply = None
            seconds = self.device.seconds(self._work(row, reply), down, up)
            phase = max(phase, seconds)
            tally.add(client, bytes_down=down, bytes_up=up, seconds=seconds)
            if reply is not None:
                good += 1
                yield reply
        tally.phase_seconds.append(phase)
        if good < math.ceil(self.experiment.cohort.quorum * len(sent)) or not good:
            raise RoundAbandoned

    def _pairs(self, sent: list[Message]) -> Iterator[tuple[Message, Message | None]]:
        """Each message with its reply, in the order of `sent`; None where none came."""
        replies = self.grid.send_and_receive(sent, timeout=self.experiment.cohort.timeout)
        waiting = iter(sent)
        if isinstance(replies, Iterator):
            for reply in replies:
                for message in waiting:
                    if message.metadata.message_id == reply.metadata.reply_to_message_id:
                        yield message, reply
                        break
                    yield message, None
        else:
            by_id = {r.metadata.reply_to_message_id: r for r in replies}
            for message in waiting:
                yield message, by_id.get(message.metadata.message_id)
        for message in waiting:
            yield message, None

    def _work(self, row: Row, reply: Message | None) -> float:
        """Note a train reply in the client's row; return its floating-point operations."""
        if reply is None:
            return 0.0
        metrics = metrics_of(reply.content)
        examples = int(examples_of(reply.content))
        row.update(status="ok", examples=examples)
        if "loss" in metrics:
            row["loss"] = float(cast(float, metrics["loss"]))
        if "cluster" in metrics:
            row["cluster"] = int(cast(int, metrics["cluster"]))
        steps = int(cast(int, metrics.get("steps", 0)))
        passes = min(steps * self.train.batch_size, self.train.epochs * examples)
        return passes * self._flops * (1 + clock.BACKWARD)

    def evaluate(self, server_round: int, arrays: ArrayRecord, tally: Tally) -> Row:
        """The evaluations that are due in this round, as columns of the rounds table."""
        config, last = self.experiment.evaluate, self.experiment.experiment.rounds
        row: Row = {}
        if config.central and (server_round % config.every == 0 or server_round == last):
            row.update(self.central(self.strategy.models(arrays)))
        every = config.clients_every or last
        if (
            config.clients
            and self.judges
            and (server_round == last or (config.clients_every and server_round % every == 0))
        ):
            row.update(self.on_clients(server_round, arrays, tally))
        return row

    def central(self, models: Mapping[str, Served]) -> Row:
        """Mean over models of their metrics on the central test set, weighted by their clients."""
        index = torch.from_numpy(np.asarray(self.env.data.central_test))
        if not len(index) or not models:
            return {}
        sums, total = torch.zeros(3, dtype=torch.float64), 0.0
        for served in models.values():
            weight = float(1 if served.clients is None else len(served.clients))
            sums += self._measure(served.arrays, index) * weight
            total += weight
        loss, right, count = (sums / total).tolist()
        return self._named(loss / count, right / count)

    def _measure(self, arrays: ArrayRecord, index: torch.Tensor) -> torch.Tensor:
        """Sums over these examples of loss, right predictions and positions; float64 [3]."""
        record, env = as_flat(arrays, self.env.model.layout), self.env
        return env.model.measure(record, env.data.fields, index, env.batch_size).double().sum(1)

    def loss_of(self, arrays: ArrayRecord, node: int | None = None) -> float:
        """Mean loss on the central test set, or on the node's data (see `Setting.evaluate`)."""
        data, rows = self.env.data, np.asarray(self.env.data.central_test)
        if node is not None:
            own = data.test[client_at(node)]
            rows = own if len(own) else data.train[client_at(node)]
        loss, _, count = self._measure(arrays, torch.from_numpy(rows)).tolist()
        return loss / max(count, 1.0)

    def _named(self, loss: float, accuracy: float) -> Row:
        kind = self.env.data.criterion
        row: Row = {"loss": loss}
        if kind != "mse":
            row["accuracy"] = accuracy
        if kind == "next_token":
            row["perplexity"] = math.exp(min(loss, 700.0))
        return row

    def on_clients(self, server_round: int, arrays: ArrayRecord, tally: Tally) -> Row:
        """Mean over clients of what each one's own model gives on its held-out examples."""
        view = View(self.grid, self.judges)
        messages = self.strategy.configure_evaluate(
            server_round, arrays, self.told(max(server_round, 1)), view
        )
        sent = sorted(messages, key=lambda m: m.metadata.dst_node_id)
        losses, accuracies = [], []
        for message, reply in self._pairs(sent):
            if reply is None or reply.has_error():
                continue
            metrics = cast("Mapping[str, float]", metrics_of(reply.content))
            if not all(math.isfinite(v) for v in metrics.values()):
                continue
            row = tally.row(client_at(message.metadata.dst_node_id))
            row["eval_examples"] = int(examples_of(reply.content))
            row["eval_loss"] = float(metrics["loss"])
            row["eval_accuracy"] = float(metrics["accuracy"])
            losses.append(row["eval_loss"])
            accuracies.append(row["eval_accuracy"])
        if not losses:
            return {}
        result: Row = {"client_loss": float(np.mean(losses))}
        if self.env.data.criterion != "mse":
            worst = np.sort(accuracies)[: max(1, math.ceil(0.1 * len(accuracies)))]
            result["client_accuracy"] = float(np.mean(accuracies))
            result["client_worst10"] = float(worst.mean())
        return result

    def final_models(self, progress: Progress) -> dict[str, dict[str, torch.Tensor]]:
        """The models at the end of the run, by name."""
        models = self.strategy.models(progress.arrays)
        return {name: from_record(served.arrays) for name, served in models.items()}

    def check_finite(self, progress: Progress) -> None:
        """Raise `RunError` if the server's model holds NaN or infinity (a diverged strategy)."""
        for name, tensor in from_record(progress.arrays).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"the model diverged in round {progress.round}: {name} holds NaN or infinity; "
                    "lower train.lr or the strategy's server_lr"
                )
