"""Client halves of active learning: a pool with ever more labels, and training on what has one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.agent import Agent, AgentState
from fedsim.core.errors import ConfigError, RunError
from fedsim.core.pool import Pool, share
from fedsim.core.program import LocalProgram
from fedsim.core.records import FlatRecord
from fedsim.core.selection import Candidates, Look


@dataclass(frozen=True, kw_only=True)
class Labelling(Agent):
    """Base of clients with a pool of examples of which they may have some labelled.

    It keeps the pool, its model after its last training, the global model it had last, and within
    a cycle what its program keeps. To the server it says how many examples are labelled, and no
    more. Subclasses say how it trains, in `program`.

    Attributes:
        phase: ``"train"`` or ``"acquire"``.
        cycle: number of the labelling cycle, from 0; a new one forgets models and momentum.
        initial: share of the examples labelled at first, drawn by lot.
        budget: share of the examples labelled in each later cycle.
        rule: of `fedsim.core.selection.RULES`.
        judge: model that rules with one model ask, ``"global"`` or ``"local"``.
        persist: what the program keeps goes on from round to round of a cycle.
    """

    phase: str = "train"
    cycle: int = 0
    initial: float = 0.1
    budget: float = 0.05
    rule: str = "ksas"
    judge: str = "global"
    persist: bool = True

    @abstractmethod
    def program(self, s: AgentState, pool: Pool, start: FlatRecord, done: int) -> LocalProgram:
        """This round's local training, after `done` epochs of the cycle."""

    def answer(self, s: AgentState) -> None:
        """Train on the labelled examples, or have more of them labelled.

        Raises:
            ConfigError: examples have no single labels that one could ask for.
            RunError: none is labelled yet.
        """
        if s.criterion.name != "cross_entropy":
            raise ConfigError(
                f"active learning needs one label for each example; the loss is {s.criterion.name}"
            )
        pool = self._pool(s)
        if not len(pool.labelled):
            s.keep("pool", pool.state())
            raise RunError(f"client {s.client} has no labelled example yet: no answer came")
        if self.phase == "acquire":
            self._acquire(s, pool)
        else:
            self._train(s, pool)
        s.keep("pool", pool.state())
        s.num_examples = len(pool.labelled)
        s.metrics["asked"] = float(pool.spent.sum())
        s.metrics["waiting"] = float(len(pool.asked))

    def _pool(self, s: AgentState) -> Pool:
        """The pool as it was left; at first, with the initial examples labelled."""
        pool = Pool(s.rows, s.num_outputs, **(s.kept("pool") or {}))
        if not len(pool.labelled):  # the first time, or nobody has answered yet
            lots = s.stream("first labels")

            def by_lot(rows: Tensor, count: int) -> Tensor:
                return torch.from_numpy(lots.permutation(len(rows))[:count].copy())

            pool.acquire(0, share(self.initial, len(pool.rows)), by_lot, s.ask, s.client)
            s.keep("first", {"rows": pool.unlabelled})
        return pool

    def _train(self, s: AgentState, pool: Pool) -> None:
        start, memory = s.sent_model(), s.kept("memory") or {}
        going_on = "cycle" in memory and int(memory["cycle"]) == self.cycle
        done = int(memory["epochs"]) if going_on else 0
        program = self.program(s, pool, start, done)
        kept = {n: memory[n] for n in program.keeps} if going_on and self.persist else {}
        fields = {**s.fields, "y": pool.known(s.fields["y"])}
        trained = s.train(program, start, pool.trained, kept, fields)
        now = {"cycle": torch.tensor(self.cycle), "epochs": torch.tensor(done + self.epochs)}
        s.keep("memory", now | {n: trained.kept[n] for n in program.keeps})
        s.keep("local", trained.record)
        s.keep("global", start)
        s.replies["arrays"] = trained.record
        s.metrics.update({**trained.metrics, "steps": trained.steps})

    def _acquire(self, s: AgentState, pool: Pool) -> None:
        shared = s.sent_model() if "arrays" in s.records else s.kept_model("global")
        shared = shared or s.initial
        local = s.kept_model("local") or shared
        scores = torch.zeros(1)

        def look(model: FlatRecord) -> Look:
            return lambda rows: s.features(model, s.inputs(rows))

        def choose(rows: Tensor, count: int) -> Tensor:
            nonlocal scores
            candidates = Candidates(
                rows, pool.labelled, pool.counts, look(local), look(shared), self.judge,
                s.stream("acquire"),
            )  # fmt: skip
            places, found = candidates.choose(self.rule, count)
            scores = found if len(found) else scores
            return places

        budget = share(self.budget, len(pool.rows))
        s.metrics["acquired"] = pool.acquire(self.cycle + 1, budget, choose, s.ask, s.client)
        s.metrics["score_mean"] = float(scores.double().mean())
        s.metrics["score_max"] = float(scores.max())
