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

from fedsim import membership
from fedsim.admission import Admitted, Verdicts, enter, judgements, sift
from fedsim.config import Experiment, StrategyConfig, TrainConfig
from fedsim.core import rng
from fedsim.core.averaging import examples_of, metrics_of
from fedsim.core.bulk import Broadcast, Replies
from fedsim.core.errors import RunError
from fedsim.core.nodes import client_at, node_of
from fedsim.core.records import as_flat, count_bytes, from_record
from fedsim.core.strategy import Served, Setting, Strategy, route
from fedsim.evaluation import Central
from fedsim.failpoints import crash_here
from fedsim.gate import Gate
from fedsim.intake import Intake, Row, Tally
from fedsim.runtime import clock
from fedsim.runtime.choose import Choice, choose
from fedsim.runtime.grid import View
from fedsim.runtime.work import Environment


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
        ledger: rounds and entries that are not in the ledger's file yet.
    """

    round: int
    arrays: ArrayRecord
    rounds: list[Row] = field(default_factory=list)
    clients: list[Row] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)
    ledger: list[tuple[int, bytes]] = field(default_factory=list)


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
        self.intake = Intake(grid, Gate(), experiment.cohort.timeout)
        self.central = Central(env)
        self._goal = 0
        device = experiment.clock.device
        self.device: clock.Device = clock.device(device.name, device.params)
        self._flops = clock.forward_flops(env.model, env.data.fields["x"][:1])
        heldout = set(env.data.heldout_clients.tolist())
        self._train, self._test = self._sizes()
        self._most = np.array(self._train)
        self.trainers = [node_of(c) for c, n in enumerate(self._train) if c not in heldout and n]
        self.judges = [node_of(c) for c, n in enumerate(self._test) if n]
        self.setting = Setting(
            env.model.info,
            env.data.num_clients,
            seed,
            experiment.experiment.rounds,
            self.central.loss_of,
            env.model.initial(),
        )
        strategy.setup(self.setting)

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Training and held-out examples of every client: what its node declared, if it did."""
        train, test = (r.lengths.tolist() for r in (self.env.data.train, self.env.data.test))
        for client, sizes in getattr(self.grid, "declared", {}).items():
            train[client], test[client] = sizes
        return train, test

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
            crash_here("round.aggregated")
            progress.arrays = progress.arrays if arrays is None else arrays
            metrics = record or {}
            entry = self.strategy.ledger_entry()
            if entry is not None:
                progress.ledger.append((server_round, entry))
        except RoundAbandoned:
            abandoned = True
        row: Row = {"round": server_round, **tally.totals(), "abandoned": abandoned}
        row.update({"train_loss" if n == "loss" else n: v for n, v in metrics.items()})
        for name in ("steps", "cluster"):
            row.pop(name, None)
        row.update(self.evaluate(server_round, progress.arrays, tally))
        row.update(self._mark(tally))
        progress.round = server_round
        self._close(progress, tally, row, time.perf_counter() - start)

    def _mark(self, tally: Tally) -> Row:
        """Note the clients' clusters in their rows; what they give as columns of the round."""
        if type(self.strategy).cluster_of is Strategy.cluster_of:
            return {}
        found = membership.clusters(self.strategy, self.env.data)
        for client, row in tally.rows.items():
            if (name := found[client]) is not None:
                row["cluster"] = name
        return membership.columns(found, self.env.data)

    @staticmethod
    def _close(progress: Progress, tally: Tally, row: Row, seconds: float) -> None:
        progress.rounds.append(row)
        progress.clients += [tally.rows[c] for c in sorted(tally.rows)]
        progress.timings.append({"round": tally.round, "wall_seconds": seconds})

    def cohort(self, server_round: int) -> list[int]:
        """Node ids of the round's cohort, ascending: the strategy's choice or a seeded sample.

        It is taken from the nodes that are connected; locally that is everybody.
        """
        there = self._present(self.trainers)
        chosen = self.strategy.sample(server_round, there)
        if chosen is not None:
            self._goal = len(chosen)
            return sorted(chosen)
        config, population = self.experiment.cohort, len(self.trainers)
        wanted = config.size or math.ceil((config.fraction or 1.0) * population)
        self._goal = min(population, wanted)
        size = min(len(there), math.ceil(wanted * (1 + config.overselect)))
        if size == len(there):
            return there
        stream = rng.stream(self.seed, server_round, rng.SERVER, "cohort")
        places = stream.choice(len(there), size, replace=False)
        return sorted(there[place] for place in places.tolist())

    def _present(self, nodes: list[int]) -> list[int]:
        """Those of `nodes` that are connected now."""
        if getattr(self.grid, "in_order", False):
            return nodes
        there = set(self.grid.get_node_ids())
        return [n for n in nodes if n in there]

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

    def choice(self) -> Choice:
        """The executor for this strategy's client half, from its configuration in round 1.

        Raises:
            ConfigError: `runtime.executor` asks for one that cannot run it.
        """
        strategy, env = self.strategy, self.env
        half = env.programs.get(route(strategy.client))
        if half is None or half.resident:
            return Choice("serial", "it works in place on the one resident model")
        program = half.from_config({**self.told(1), **strategy.client_config()})
        vectors = {
            name: as_flat(record).flat
            for name, record in strategy.client_arrays().items()
            if as_flat(record).layout == env.model.layout.trained
        }
        config, population = self.experiment.cohort, len(self.trainers)
        size = config.size or math.ceil((config.fraction or 1.0) * population)
        wanted = self.experiment.runtime.executor
        return choose(env.model, env.data, program, size, wanted, vectors)

    def _converse(
        self, server_round: int, arrays: ArrayRecord, tally: Tally
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Drive the strategy's exchange for one round."""
        nodes = self.cohort(server_round)
        if len(nodes) < self._quorum(self._goal):  # too few are connected to ask anybody
            raise RoundAbandoned
        crash_here("round.sampled")
        view = View(self.grid, nodes)
        conversation = self.strategy.exchange(server_round, arrays, self.told(server_round), view)
        replies: Iterable[Message] | None = None
        try:
            while True:
                messages = next(conversation) if replies is None else conversation.send(replies)
                replies = self.admitted(messages, tally)
        except StopIteration as done:
            return cast("tuple[ArrayRecord | None, MetricRecord | None]", done.value)

    def admitted(self, messages: Iterable[Message], tally: Tally) -> Iterable[Message]:
        """Send messages; the admitted replies in order of client number, computed when taken.

        At the end of the replies `RoundAbandoned` is raised if fewer than the quorum were admitted.
        """
        together = self._together(messages)
        return (
            self._one_by_one(messages, tally)
            if together is None
            else self._columns(*together, tally)
        )

    def _together(self, messages: Iterable[Message]) -> tuple[Broadcast, Replies] | None:
        """A broadcast with its replies in columns, where the grid has such."""
        answer = getattr(self.grid, "together", None)
        if answer is None or not isinstance(messages, Broadcast):
            return None
        replies = answer(messages)
        return None if replies is None else (messages, replies)

    def _columns(self, broadcast: Broadcast, replies: Replies, tally: Tally) -> Replies:
        """As `_one_by_one`, in columns."""
        expected = self.strategy.expected(broadcast.content)
        down, most = count_bytes(broadcast.content), self._most
        phase, good = [0.0], [0]
        goal = min(self._goal or len(broadcast), len(broadcast))

        def note(verdicts: Verdicts) -> None:
            phase.append(enter(tally, verdicts, down, self.device, self._operations))
            good.append(len(verdicts.block))
            crash_here("reply.judged")

        def close() -> None:
            tally.phase_seconds.append(max(phase))
            if sum(good) < self._quorum(goal):
                raise RoundAbandoned

        gate = self.intake.gate
        return Admitted(replies, lambda block: sift(gate, block, expected, most), note, close)

    def _one_by_one(self, messages: Iterable[Message], tally: Tally) -> Iterator[Message]:
        sent = sorted(messages, key=lambda m: m.metadata.dst_node_id)
        good, phase = 0, 0.0
        goal = min(self._goal or len(sent), len(sent))
        enough = goal if self.experiment.cohort.overselect else None
        verdicts = self.intake.verdicts(
            sent, self.strategy.expected, lambda c: self._train[c], tally, enough
        )
        for verdict in verdicts:
            client = client_at(verdict.message.metadata.dst_node_id)
            tally.sampled.add(client)
            row = tally.row(client)
            if verdict.refusal is not None:
                tally.refuse(client, verdict.refusal)
            down, up = count_bytes(verdict.message.content), verdict.bytes_up
            seconds = self.device.seconds(self._work(row, verdict.reply), down, up)
            phase = max(phase, seconds)
            tally.add(client, bytes_down=down, bytes_up=up, seconds=seconds)
            crash_here("reply.judged")
            if verdict.reply is not None:
                good += 1
                yield verdict.reply
        tally.phase_seconds.append(phase)
        if good < self._quorum(goal):
            raise RoundAbandoned

    def _quorum(self, asked: int) -> int:
        """How many of so many replies must be admitted."""
        return max(1, math.ceil(self.experiment.cohort.quorum * asked))

    def _work(self, row: Row, reply: Message | None) -> float:
        """Note a train reply in the client's row; return its floating-point operations."""
        if reply is None:
            return 0.0
        metrics = metrics_of(reply.content)
        examples = int(examples_of(reply.content))
        row.update(status="ok", examples=examples)
        loss, steps = (metrics.get(n) for n in ("loss", "steps"))
        if isinstance(loss, (int, float)):
            row["loss"] = float(loss)
        done = max(0, int(steps)) if isinstance(steps, (int, float)) else 0
        return float(self._operations(np.array(done), np.array(examples)))

    def _operations(self, steps: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Floating-point operations of clients with so many local steps and examples."""
        passes = np.minimum(steps * self.train.batch_size, self.train.epochs * examples)
        return np.asarray(passes * self._flops * (1 + clock.BACKWARD))

    def evaluate(self, server_round: int, arrays: ArrayRecord, tally: Tally) -> Row:
        """The evaluations that are due in this round, as columns of the rounds table."""
        config, last = self.experiment.evaluate, self.experiment.experiment.rounds
        row: Row = {}
        if config.central and (server_round % config.every == 0 or server_round == last):
            row.update(self.central.judge(self.strategy.models(arrays)))
            for name, model in self.strategy.also_evaluated(arrays).items():
                also = self.central.judge({name: Served(model)})
                row.update({f"{name}_{column}": value for column, value in also.items()})
        every = config.clients_every or last
        if (
            config.clients
            and self.judges
            and (server_round == last or (config.clients_every and server_round % every == 0))
        ):
            row.update(self.on_clients(server_round, arrays, tally))
        return row

    def on_clients(self, server_round: int, arrays: ArrayRecord, tally: Tally) -> Row:
        """Mean over clients of what each one's own model gives on its held-out examples."""
        view = View(self.grid, self._present(self.judges))
        messages = self.strategy.configure_evaluate(
            server_round, arrays, self.told(max(server_round, 1)), view
        )
        losses, accuracies = [], []
        together = self._together(messages)
        found_by = (
            self.intake.judgements(messages, tally, self._test)
            if together is None
            else judgements(together[1], self.intake.gate, self._test)
        )
        for client, found in found_by:
            row = tally.row(client)
            row["eval_examples"], row["eval_loss"], row["eval_accuracy"] = found
            losses.append(found[1])
            accuracies.append(found[2])
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

    def artefacts(self) -> dict[str, Any]:
        """JSON values that explain the run, by name."""
        return membership.artefacts(self.strategy, self.env.data)

    def check_finite(self, progress: Progress) -> None:
        """Raise `RunError` if the server's model holds NaN or infinity (a diverged strategy)."""
        for name, tensor in from_record(progress.arrays).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"the model diverged in round {progress.round}: {name} holds NaN or infinity; "
                    "lower train.lr or the strategy's server_lr"
                )
