"""The round loop: sample, send, admit, aggregate, journal, evaluate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedsim import membership
from fedsim.admission import judgements
from fedsim.collector import Collector, RoundAbandoned
from fedsim.columns import Row, Rows
from fedsim.config import Experiment, StrategyConfig, TrainConfig
from fedsim.core import rng
from fedsim.core.agent import CENTRAL
from fedsim.core.errors import ConfigError, RunError
from fedsim.core.nodes import node_of
from fedsim.core.records import as_flat, from_record
from fedsim.core.strategy import Served, Setting, Strategy, route
from fedsim.evaluation import Central
from fedsim.failpoints import crash_here
from fedsim.gate import Gate
from fedsim.intake import Intake, Tally
from fedsim.patience import Patience
from fedsim.runtime.choose import Choice, choose
from fedsim.runtime.fleet import Fleet
from fedsim.runtime.grid import View
from fedsim.runtime.work import Environment


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
    clients: Rows = field(default_factory=Rows)
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
        heldout = set(env.data.heldout_clients.tolist())
        self._train, self._test = self._sizes()
        self.fleet = Fleet(experiment.clock, env.data.num_clients, seed)
        self.trainers = [node_of(c) for c, n in enumerate(self._train) if c not in heldout and n]
        self.judges = [node_of(c) for c, n in enumerate(self._test) if n]
        cohort = experiment.cohort
        self.patience = Patience(cohort.patience, cohort.min_delta, env.data.num_clients)
        self.setting = Setting(
            env.model.info,
            env.data.num_clients,
            seed,
            experiment.experiment.rounds,
            self.central.loss_of,
            env.model.initial(),
            tuple(self.fleet.names[kind] for kind in self.fleet.kind.tolist()),
            models=env.architectures,
            assignment=env.assignment,
            public=env.data.fields["x"][env.data.public] if len(env.data.public) else None,
            public_digest=env.data.public_digest,
            num_outputs=env.data.num_outputs,
            resident=lambda: env.model.resident,
        )
        self._check_zoo()
        strategy.setup(self.setting)
        self.collector = Collector(
            experiment, self.train, strategy, self.intake, self.fleet, self._train, env
        )

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
        self._note(tally)
        self._close(progress, tally, row, 0.0)
        return progress

    def recall(self, progress: Progress) -> None:
        """Go on from a state that was saved: who rests follows from its rows."""
        self.patience.recall(progress.rounds, progress.clients)

    def advance(self, progress: Progress) -> None:
        """One round; changes `progress` in place."""
        start = time.perf_counter()
        server_round = progress.round + 1
        tally = Tally(server_round, self.env.data.client_names)
        metrics: Mapping[str, Any] = {}
        abandoned = False
        try:
            now = float(sum(row["seconds"] for row in progress.rounds))
            arrays, record = self._converse(server_round, progress.arrays, tally, now)
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
        if self.experiment.cohort.patience is not None:
            row["resting"] = len(self.trainers) - len(self.patience.awake(self.trainers))
        row.update(self.evaluate(server_round, progress.arrays, tally))
        if not abandoned:  # else the model is as it was, and says nothing new
            self._note(tally)
        row.update(self._mark(tally))
        progress.round = server_round
        self._close(progress, tally, row, time.perf_counter() - start)

    def _note(self, tally: Tally) -> None:
        """Learn from the round's evaluation on the clients, if there was one, who rests."""
        if tally.judged:
            self.patience.judge(tally.judged["client"], tally.judged["eval_loss"])

    def _mark(self, tally: Tally) -> Row:
        """Note the clients' clusters in their rows; what they give as columns of the round."""
        if type(self.strategy).cluster_of is Strategy.cluster_of:
            return {}
        found = membership.clusters(self.strategy, self.env.data)
        marks = list(found)
        for client, row in tally.rows.items():
            told = row.pop("cluster", None)
            marks[client] = told if marks[client] is None else marks[client]
        tally.about["cluster"] = marks
        return membership.columns(found, self.env.data)

    def _close(self, progress: Progress, tally: Tally, row: Row, seconds: float) -> None:
        progress.rounds.append(row)
        if len(self.fleet.names) > 1:
            tally.about["device"] = [self.fleet.names[kind] for kind in self.fleet.kind.tolist()]
        progress.clients.append(tally.chunk())
        progress.timings.append({"round": tally.round, "wall_seconds": seconds})

    def cohort(self, server_round: int, now: float = 0.0) -> tuple[list[int], float]:
        """Node ids of the round's cohort, ascending, and how long the server waits for them.

        The cohort is the strategy's choice or a seeded sample, taken from the nodes that are
        connected, do not rest, and whose devices are online. If too few are online at `now`, in
        simulated seconds since the run began, the round begins later.
        """
        config, awake = self.experiment.cohort, self.patience.awake(self.trainers)
        population = len(awake)
        if not awake:
            self._goal = 0
            return [], 0.0
        wanted = config.size or math.ceil((config.fraction or 1.0) * population)
        asked = math.ceil(wanted * (1 + config.overselect))
        gather = getattr(self.grid, "gather", None)
        if gather is not None:  # nodes in other processes come and go
            gather(awake, self.collector.quorum(min(population, wanted)))
        waited, there = self.fleet.wait(now, self._present(awake), asked)
        chosen = self.strategy.sample(server_round, there)
        if chosen is not None:
            self._goal = len(chosen)
            return sorted(chosen), waited
        self._goal = min(population, wanted)
        size = min(len(there), asked)
        if size == len(there):
            return there, waited
        stream = rng.stream(self.seed, server_round, rng.SERVER, "cohort")
        places = stream.choice(len(there), size, replace=False)
        return sorted(there[place] for place in places.tolist()), waited

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
        if half is not None and half.agent:
            return Choice("serial", "clients answer for themselves")
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
        self, server_round: int, arrays: ArrayRecord, tally: Tally, now: float
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Drive the strategy's exchange for one round."""
        nodes, waited = self.cohort(server_round, now)
        if waited:
            tally.wait(waited)
        if len(nodes) < self.collector.quorum(self._goal):  # too few are there to ask anybody
            raise RoundAbandoned
        crash_here("round.sampled")
        view = View(self.grid, nodes)
        conversation = self.strategy.exchange(server_round, arrays, self.told(server_round), view)
        replies: Iterable[Message] | None = None
        try:
            while True:
                messages = next(conversation) if replies is None else conversation.send(replies)
                replies = self.collector.admitted(messages, tally, self._goal)
        except StopIteration as done:
            return cast("tuple[ArrayRecord | None, MetricRecord | None]", done.value)

    def evaluate(self, server_round: int, arrays: ArrayRecord, tally: Tally) -> Row:
        """The evaluations that are due in this round, as columns of the rounds table."""
        config, last = self.experiment.evaluate, self.experiment.experiment.rounds
        row: Row = {}
        if config.central and (server_round % config.every == 0 or server_round == last):
            models = self.strategy.models(arrays)
            found = self.central.judge(models) if models else self.by_clients(server_round, arrays)
            row.update(found)
            for name, model in self.strategy.also_evaluated(arrays).items():
                also = self.central.judge({name: Served(model)})
                row.update({f"{name}_{column}": value for column, value in also.items()})
        if config.central and config.answers and server_round % (config.answers_every or last) == 0:
            models = self.strategy.models(arrays)
            row.update(self.central.answer(models, config.answers, config.answer_tokens))
        every = config.clients_every or last
        if (
            config.clients
            and self.judges
            and (server_round == last or (config.clients_every and server_round % every == 0))
        ):
            row.update(self.on_clients(server_round, arrays, tally))
        return row

    def by_clients(self, server_round: int, arrays: ArrayRecord) -> Row:
        """What the clients' own models give on the central test set: the mean over clients."""
        count = len(self.env.data.central_test)
        told = {**self.told(max(server_round, 1)), CENTRAL: True}
        messages = self.strategy.configure_evaluate(
            server_round, arrays, ConfigRecord(told), View(self.grid, self._present(self.trainers))
        )
        tally = Tally(server_round, self.env.data.client_names)
        judged = self.intake.judgements(messages, tally, [count] * self.env.data.num_clients)
        found = list(judged) if count else []
        if not found:
            return {}
        return self.central.named(
            *(float(np.mean(np.concatenate([f[i] for f in found]))) for i in (2, 3))
        )

    def _check_zoo(self) -> None:
        """Raise `ConfigError` if clients have models of their own, but the strategy sends one."""
        half = self.env.programs.get(route(self.strategy.client))
        if self.env.models and not getattr(half, "any_model", False):
            raise ConfigError(
                f"zoo.models gives clients {len(self.env.architectures)} architectures, but "
                f"strategy {type(self.strategy).__name__} sends them all one model; leave zoo out, "
                "or choose a strategy of knowledge, such as knfu"
            )

    def on_clients(self, server_round: int, arrays: ArrayRecord, tally: Tally) -> Row:
        """Mean over clients of what each one's own model gives on its held-out examples."""
        view = View(self.grid, self._present(self.judges))
        messages = self.strategy.configure_evaluate(
            server_round, arrays, self.told(max(server_round, 1)), view
        )
        together = self.collector.together(messages)
        tally.judge(
            self.intake.judgements(messages, tally, self._test)
            if together is None
            else judgements(together[1], self.intake.gate, self._test)
        )
        if not len(tally.judged.get("eval_loss", ())):
            return {}
        losses, accuracies = tally.judged["eval_loss"], tally.judged["eval_accuracy"]
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
