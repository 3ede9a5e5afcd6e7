"""From messages to admitted replies: send, match, check one by one, count, in canonical order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsim.columns import Chunk, Row
from fedsim.core.averaging import examples_of, metrics_of
from fedsim.core.nodes import client_at
from fedsim.core.records import count_bytes
from fedsim.gate import Gate, Refusal

Judgement = tuple[int, float, float]
"""Examples, mean loss and accuracy."""
Judgements = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""Clients, examples, mean losses and accuracies."""
Expected = Callable[[RecordDict], Mapping[str, ArrayRecord]]
PAST_KEPT = 100_000
"""Messages of earlier exchanges that a late reply is recognised by."""


class Tally:
    """Counts one round: a row for each client that was asked to work, and the round's totals.

    Attributes:
        rows: by client.
        judged: columns of those who were evaluated; `client` says who.
        about: further columns; of each a value for every client there is, None for nothing.
    """

    def __init__(self, server_round: int, names: tuple[str, ...]) -> None:
        self.round, self._names = server_round, names
        self.rows: dict[int, Row] = {}
        self.sampled: set[int] = set()
        self.phase_seconds: list[float] = []
        self.strays = 0
        self.judged: dict[str, NDArray[Any]] = {}
        self.about: dict[str, Sequence[Any]] = {}
        self._waited: float | None = None

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

    def wait(self, seconds: float) -> None:
        """Count simulated seconds in which nobody worked."""
        self._waited = seconds
        self.phase_seconds.append(seconds)

    def refuse(self, client: int, refusal: Refusal) -> None:
        """Note in the client's row why its reply was refused, after what a stray left there."""
        status = {"error_reply": "error", "late": "late"}.get(refusal.code, "refused")
        row = self.row(client)
        reasons = [r for r in (row.get("reason"), str(refusal)) if r]
        row.update(status=status, reason="; ".join(reasons))

    def stray(self, client: int, refusal: Refusal, asked: bool) -> None:
        """Count a reply that answers no open message.

        Args:
            client: who sent it.
            refusal: what is wrong with it.
            asked: whether the client has a message to answer, so that its row gets a status from
                that; the stray leaves only its reason there.
        """
        known = 0 <= client < len(self._names)
        if known and not asked and "status" not in self.row(client):
            self.refuse(client, refusal)
            return
        self.strays += 1
        if known:
            self.row(client).setdefault("reason", str(refusal))

    def totals(self) -> Row:
        """The round's sums over clients, and its simulated duration."""
        rows = [self.rows[c] for c in sorted(self.rows)]
        took = [r.get("status") for r in rows if r.get("status")]
        idle = {} if self._waited is None else {"waited": self._waited}
        return {
            **idle,
            "bytes_up": sum(r.get("bytes_up", 0) for r in rows),
            "bytes_down": sum(r.get("bytes_down", 0) for r in rows),
            "seconds": float(sum(self.phase_seconds)),
            "client_seconds": float(sum(r.get("seconds", 0.0) for r in rows)),
            "sampled": len(self.sampled),
            "admitted": took.count("ok"),
            "refused": len(took) - took.count("ok") + self.strays,
        }

    def judge(self, judgements: Iterable[Judgements]) -> None:
        """Note how clients did on their held-out examples."""
        parts = list(judgements)
        names = ("client", "eval_examples", "eval_loss", "eval_accuracy")
        if parts:
            self.judged = {n: np.concatenate([p[i] for p in parts]) for i, n in enumerate(names)}

    def chunk(self) -> Chunk:
        """The clients' rows, by ascending client."""
        own = Chunk.of([self.rows[c] for c in sorted(self.rows)])
        trained = np.array(sorted(self.rows), np.int64)
        judged = self.judged.get("client", trained[:0])
        clients = np.union1d(trained, judged)
        columns: dict[str, Any] = {
            "round": np.full(len(clients), self.round),
            "client": clients,
            "name": [self._names[c] for c in clients.tolist()],
        }
        there: dict[str, NDArray[np.bool_]] = {}
        parts = [(trained, n, own.columns[n], own.there.get(n)) for n in own.columns]
        parts += [(judged, n, values, None) for n, values in self.judged.items()]
        for whose, name, values, has in parts:
            if name in columns:
                continue
            place = np.searchsorted(clients, whose)
            if isinstance(values, list):
                listed = [None] * len(clients)
                for at, value in zip(place.tolist(), values, strict=True):
                    listed[at] = value
                columns[name] = listed
                continue
            columns[name] = np.zeros(len(clients), values.dtype)
            columns[name][place] = values
            inside = np.zeros(len(clients), np.bool_)
            inside[place] = True if has is None else has
            if not inside.all():
                there[name] = inside
        for name, everybody in self.about.items():
            columns[name] = [everybody[c] for c in clients.tolist()]
        return Chunk(len(clients), columns, there)


@dataclass(frozen=True)
class Verdict:
    """What became of one message.

    Attributes:
        message: the message.
        reply: the admitted reply, its content checked; None if it was refused.
        refusal: why it was refused.
        bytes_up: payload of the reply, refused or not.
    """

    message: Message
    reply: Message | None
    refusal: Refusal | None
    bytes_up: int


class Intake:
    """The only way from a grid to a strategy.

    A reply belongs to the message that its metadata name and to no other; the first one counts.
    Everything that answers no open message is a stray: `stale_round`, `duplicate`, `unknown_node`.

    Args:
        grid: where clients are. If it has an attribute `in_order` that is true, replies are taken
            to come one for each message in the order given, and are judged one at a time.
        gate: judges a reply by itself.
        timeout: seconds after which a reply is late; None waits for all.
    """

    def __init__(self, grid: Grid, gate: Gate, timeout: float | None) -> None:
        self.grid, self.gate, self._timeout = grid, gate, timeout
        self.in_order = bool(getattr(grid, "in_order", False))
        self._past: dict[str, None] = {}

    def verdicts(
        self,
        sent: list[Message],
        expected: Expected,
        most: Callable[[int], int],
        tally: Tally,
        enough: int | None = None,
    ) -> Iterator[Verdict]:
        """Send, and judge what comes back: one verdict for each message, in the order of `sent`.

        Args:
            sent: the messages, sorted by node.
            expected: the array records that the reply to a content must carry.
            most: the largest number of examples that a client may report.
            tally: told of strays.
            enough: stop waiting after so many admitted replies; the others are late.
        """
        replies = self.grid.send_and_receive(sent, timeout=self._timeout)
        if self.in_order:
            for message, reply in zip(sent, replies, strict=True):
                yield self._judged(message, reply, expected, most)
            return
        open_ = {m.metadata.message_id: m for m in sent}
        nodes = {m.metadata.dst_node_id for m in sent}
        done: dict[str, Verdict] = {}
        good = 0
        for reply in replies:
            number = reply.metadata.reply_to_message_id
            asked = open_.get(number)
            fault = self._fault(asked, reply, number in done)
            if asked is None or fault is not None:
                node = reply.metadata.src_node_id
                tally.stray(client_at(node), fault or _UNASKED, node in nodes)
                continue
            done[number] = self._judged(asked, reply, expected, most)
            good += done[number].reply is not None
            if enough is not None and good >= enough:
                break
        close = getattr(replies, "close", None)
        if close is not None:
            close()
        self._past.update(dict.fromkeys(open_))
        while len(self._past) > PAST_KEPT:
            del self._past[next(iter(self._past))]
        late = Refusal("late", "no reply before the cut-off")
        for number, message in open_.items():
            yield done.get(number) or Verdict(message, None, late, 0)

    def judgements(
        self, messages: Iterable[Message], tally: Tally, examples: Sequence[int]
    ) -> Iterator[Judgements]:
        """Send evaluate messages; the judgement of every usable reply.

        Args:
            messages: the messages.
            tally: told of strays.
            examples: held-out examples of every client.
        """
        sent = sorted(messages, key=lambda m: m.metadata.dst_node_id)
        for verdict in self.verdicts(sent, lambda _: {}, lambda c: examples[c], tally):
            usable = judgement(verdict.reply)
            if usable is not None:
                client = client_at(verdict.message.metadata.dst_node_id)
                count, loss, accuracy = usable
                who, of = (np.array([n], np.int64) for n in (client, count))
                yield who, of, np.array([loss]), np.array([accuracy])

    def _fault(self, message: Message | None, reply: Message, done: bool) -> Refusal | None:
        """Why a reply is a stray, or None if it answers its message."""
        number = reply.metadata.reply_to_message_id
        if number in self._past:
            return Refusal("stale_round", "answers a message of an earlier round")
        if message is None:
            return _UNASKED
        if not reply.has_error() and reply.metadata.src_node_id != message.metadata.dst_node_id:
            return Refusal("unknown_node", "comes from a node that was not asked")
        return Refusal("duplicate", "a second reply to one message") if done else None

    def _judged(
        self, message: Message, reply: Message, expected: Expected, most: Callable[[int], int]
    ) -> Verdict:
        up = count_bytes(reply.content) if reply.has_content() else 0
        try:
            client = client_at(message.metadata.dst_node_id)
            content = self.gate.admit(reply, expected(message.content), most(client))
        except Refusal as refusal:
            return Verdict(message, None, refusal, up)
        reply.content = content
        return Verdict(message, reply, None, up)


def judgement(reply: Message | None) -> Judgement | None:
    """Examples, loss and accuracy of an admitted reply; None if it does not say them."""
    if reply is None:
        return None
    metrics = metrics_of(reply.content)
    loss, accuracy = metrics.get("loss"), metrics.get("accuracy")
    if not isinstance(loss, (int, float)) or not isinstance(accuracy, (int, float)):
        return None
    return int(examples_of(reply.content)), float(loss), float(accuracy)


_UNASKED = Refusal("unknown_node", "answers no message of this run")
