"""What a remote grid and a client app tell each other besides the strategy's message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedsim.runtime.keeping import Moment

ENVELOPE = "fedsim"
"""Name of the configuration record that carries the envelope."""
ENROL = "enrol"
"""Action of the query that asks a node for its clients."""


@dataclass(frozen=True)
class Envelope:
    """Added to every message that leaves the process.

    Attributes:
        client: partition number of the client it is for.
        run: name of the run; the same after a resume.
        phase: number of the message in its round.
        floor: the oldest round from which the server may resume.
    """

    client: int
    run: str
    phase: int
    floor: int

    def record(self) -> ConfigRecord:
        """As part of a message's content."""
        return ConfigRecord(vars(self))

    @staticmethod
    def of(message: Message) -> Envelope | None:
        """The envelope of a message; None if it did not come through a remote grid."""
        found = message.content.config_records.get(ENVELOPE)
        if found is None:
            return None
        numbers = {k: int(cast(int, found[k])) for k in ("client", "phase", "floor")}
        return Envelope(run=str(found["run"]), **numbers)

    def moment(self, message: Message) -> Moment:
        """Round and number of the message."""
        config = message.content.config_records.get("config", ConfigRecord())
        return int(cast(int, config.get("server-round", 0))), self.phase


@dataclass(frozen=True)
class Enrolment:
    """A node's answer to the first question: which clients it serves.

    A node that is told ``partition-id=p num-partitions=P`` serves the clients p, p + P, ...: fewer
    nodes than clients take turns. Without ``num-partitions`` it serves client p alone.

    Attributes:
        clients: partition numbers.
        train: number of training examples of each, the most it may report later.
        test: number of held-out examples of each.
        digest: names the code that the node runs.
    """

    clients: tuple[int, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    digest: str

    def content(self) -> RecordDict:
        """As a reply's content."""
        numbers = MetricRecord(
            {"clients": [*self.clients], "train": [*self.train], "test": [*self.test]}
        )
        return RecordDict({"enrolment": numbers, "code": ConfigRecord({"digest": self.digest})})

    @staticmethod
    def of(content: RecordDict) -> Enrolment:
        """Read a reply. Raises `ValueError` if it is no enrolment."""
        try:
            numbers, code = content.metric_records["enrolment"], content.config_records["code"]
            lists = [
                tuple(int(v) for v in cast("list[int]", numbers[k]))
                for k in ("clients", "train", "test")
            ]
            digest = str(code["digest"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"no enrolment: {type(error).__name__}: {error}") from None
        if len({len(v) for v in lists}) != 1 or min(min(v, default=0) for v in lists) < 0:
            raise ValueError("no enrolment: lists of different length, or negative numbers")
        clients, train, test = lists
        return Enrolment(clients, train, test, digest)
