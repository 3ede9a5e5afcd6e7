"""From a strategy's messages to admitted replies: who answers, what counts, how long it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedsim.admission import Admitted, Verdicts, enter, sift
from fedsim.columns import Row
from fedsim.config import Experiment, TrainConfig
from fedsim.core.averaging import examples_of, metrics_of
from fedsim.core.bulk import COMPUTE, Broadcast, Replies
from fedsim.core.nodes import client_at
from fedsim.core.program import LocalProgram
from fedsim.core.records import count_bytes
from fedsim.core.strategy import Strategy, route
from fedsim.failpoints import crash_here
from fedsim.gate import Refusal
from fedsim.intake import Intake, Tally, Verdict
from fedsim.runtime.clock import forward_flops
from fedsim.runtime.fleet import Fleet, Floats
from fedsim.runtime.work import Environment


class RoundAbandoned(Exception):
    """Too few replies were admitted; the model and the strategy's state stay as they were."""


class Collector:
    """Sends messages, judges and times what comes back, and keeps the quorum.

    Args:
        experiment: the configuration.
        train: `[train]` of this strategy.
        strategy: says what a reply must carry.
        intake: sends, and matches replies with messages.
        fleet: the clients' devices.
        sizes: training examples of every client.
        env: data and model on the server's side.
    """

    def __init__(
        self,
        experiment: Experiment,
        train: TrainConfig,
        strategy: Strategy,
        intake: Intake,
        fleet: Fleet,
        sizes: Sequence[int],
        env: Environment,
    ) -> None:
        self._cohort, self._train, self._strategy = experiment.cohort, train, strategy
        self._deadline = experiment.clock.deadline
        self._intake, self._fleet, self._sizes = intake, fleet, sizes
        self._most = np.array(sizes)
        self._programs = env.programs
        self._flops = forward_flops(env.model, env.data.fields["x"][:1])
        # Which replies are in time is known when all are timed. On real nodes the first to come in
        # are the first, unless a simulated deadline is asked for.
        self._timed = self._deadline is not None or (
            self._cohort.overselect > 0 and intake.in_order
        )

    @cached_property
    def _program(self) -> LocalProgram:
        """The client half as it is configured; plain SGD where there is none of ours."""
        half = self._programs.get(route(self._strategy.client), LocalProgram)
        train = self._train.model_dump(exclude_none=True)
        return half.from_config({**train, **self._strategy.client_config()})

    def quorum(self, asked: int) -> int:
        """How many of so many replies must be admitted."""
        return max(1, math.ceil(self._cohort.quorum * asked))

    def admitted(self, messages: Iterable[Message], tally: Tally, goal: int) -> Iterable[Message]:
        """Send messages; the admitted replies in order of client number, computed when taken.

        At the end of the replies `RoundAbandoned` is raised if fewer than the quorum were admitted.

        Args:
            messages: what to send.
            tally: the round's.
            goal: how many replies the round was to have; 0: one for each message.
        """
        if not isinstance(messages, Broadcast):
            messages = sorted(messages, key=lambda m: m.metadata.dst_node_id)
        asked = len(messages)
        goal = min(goal or asked, asked)
        messages = self._reached(messages, tally)
        one_by_one = self._timed or type(self._strategy).timed is not Strategy.timed
        together = None if one_by_one else self.together(messages)
        if together is not None:
            return self._columns(*together, tally, goal)
        return self._one_by_one(messages, tally, goal, asked)

    def together(self, messages: Iterable[Message]) -> tuple[Broadcast, Replies] | None:
        """A broadcast with its replies in columns, where the grid has such."""
        answer = getattr(self._intake.grid, "together", None)
        if answer is None or not isinstance(messages, Broadcast):
            return None
        replies = answer(messages)
        return None if replies is None else (messages, replies)

    def _reached(self, messages: Sequence[Message], tally: Tally) -> Sequence[Message]:
        """The messages without those to devices that drop out of this round, which are noted."""
        if not self._fleet.fails:
            return messages
        broadcast = messages if isinstance(messages, Broadcast) else None
        nodes = list(broadcast.nodes) if broadcast else [m.metadata.dst_node_id for m in messages]
        failing = self._fleet.failing(tally.round, nodes)
        for node, message in zip(nodes, messages, strict=True):
            if node in failing:
                tally.sampled.add(client_at(node))
                tally.add(client_at(node), bytes_down=count_bytes(message.content))
                tally.refuse(client_at(node), Refusal("error_reply", "the device dropped out"))
        if broadcast:
            alive = [node for node in nodes if node not in failing]
            return Broadcast(broadcast.content, broadcast.message_type, alive)
        return [m for m in messages if m.metadata.dst_node_id not in failing]

    def _columns(self, broadcast: Broadcast, replies: Replies, tally: Tally, goal: int) -> Replies:
        """As `_one_by_one`, in columns."""
        expected = self._strategy.expected(broadcast.content)
        down, most = count_bytes(broadcast.content), self._most
        phase, good = [0.0], [0]

        def took(clients: NDArray[np.int64], flops: Any, down: int, up: int) -> Floats:
            return self._fleet.seconds(tally.round, clients, flops, down, up)

        def note(verdicts: Verdicts) -> None:
            phase.append(enter(tally, verdicts, down, took, self._operations))
            good.append(len(verdicts.block))
            crash_here("reply.judged")

        def close() -> None:
            tally.phase_seconds.append(max(phase))
            if sum(good) < self.quorum(goal):
                raise RoundAbandoned

        gate = self._intake.gate
        return Admitted(replies, lambda block: sift(gate, block, expected, most), note, close)

    def _one_by_one(
        self, messages: Sequence[Message], tally: Tally, goal: int, asked: int
    ) -> Iterator[Message]:
        sent = list(messages)
        enough = goal if self._cohort.overselect else None
        verdicts = self._intake.verdicts(
            sent, self._strategy.expected, lambda c: self._sizes[c], tally, enough
        )
        timed = ((verdict, self._note(verdict, tally)) for verdict in verdicts)
        good, phase = 0, 0.0
        for verdict, seconds in self._in_time(timed, tally, goal, asked):
            phase = max(phase, seconds)
            crash_here("reply.judged")
            if verdict.reply is not None:
                good += 1
                yield verdict.reply
        tally.phase_seconds.append(phase)
        if good < self.quorum(goal):
            raise RoundAbandoned

    def _note(self, verdict: Verdict, tally: Tally) -> float:
        """Note a verdict in the client's row; return its simulated seconds."""
        client = client_at(verdict.message.metadata.dst_node_id)
        tally.sampled.add(client)
        row = tally.row(client)
        if verdict.refusal is not None:
            tally.refuse(client, verdict.refusal)
        work = self._work(row, verdict.reply)
        down, up = count_bytes(verdict.message.content), verdict.bytes_up
        took = self._fleet.seconds(tally.round, np.array([client]), work, down, up)
        seconds = float(took[0])
        tally.add(client, bytes_down=down, bytes_up=up, seconds=seconds)
        self._strategy.timed(verdict.message.metadata.dst_node_id, seconds)
        return seconds

    def _in_time(
        self, timed: Iterator[tuple[Verdict, float]], tally: Tally, goal: int, asked: int
    ) -> Iterator[tuple[Verdict, float]]:
        """The verdicts, each with the simulated seconds at which the server was done with it.

        With over-selection the round ends with the goal-th admitted reply, and at the deadline at
        the latest, unless everybody has answered by then. What comes later is refused as late.
        """
        if not self._timed:
            yield from timed
            return
        limit = math.inf if self._deadline is None else self._deadline
        all_ = list(timed)
        arrivals = sorted((s, n) for n, (v, s) in enumerate(all_) if v.reply and s <= limit)
        counted = arrivals[:goal] if self._cohort.overselect else arrivals
        taken = {number for _, number in counted}
        if self._cohort.overselect and len(counted) == goal:
            end, why = counted[-1][0], "came after enough others"
        else:
            answered = [s for _, s in all_ if s <= limit]
            everybody = len(answered) == asked or limit == math.inf
            end = max(answered, default=0.0) if everybody else limit
            why = f"took over {limit:g} s"
        for number, (verdict, _) in enumerate(all_):
            if verdict.reply is not None and number not in taken:
                refusal = Refusal("late", f"{why}, in simulated time")
                tally.refuse(client_at(verdict.message.metadata.dst_node_id), refusal)
                verdict = Verdict(verdict.message, None, refusal, verdict.bytes_up)
            yield verdict, end

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
        share = metrics.get(COMPUTE, 1.0)
        share = max(0.0, float(share)) if isinstance(share, (int, float)) else 1.0
        return share * float(self._operations(np.array(done), np.array(examples)))

    def _operations(self, steps: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Floating-point operations of clients with so many local steps and examples."""
        program = self._program
        seen = np.minimum(steps * program.batch_size, program.epochs * examples)
        return np.asarray(seen * self._flops * program.passes)
