"""What a run tells while it goes on, for displays and logs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunStarted:
    """A run begins or goes on.

    Attributes:
        run: name of the run, unique in a comparison.
        label: label of its strategy.
        seed: its seed.
        rounds: rounds it will have in the end.
        index: its number in the comparison, from 1.
        total: number of runs in the comparison.
        metric: the metric by which the experiment judges, empty if that is not known.
    """

    run: str
    label: str
    seed: int
    rounds: int
    index: int = 1
    total: int = 1
    metric: str = ""


@dataclass(frozen=True)
class RoundFinished:
    """A round has ended.

    Attributes:
        run: name of the run.
        round: the round, from 1.
        rounds: rounds planned.
        metrics: what was measured, by column of the rounds table.
        clients: clients admitted.
        bytes_up: bytes from the clients in this round.
        bytes_down: bytes to the clients in this round.
        wall_seconds: measured seconds of this round.
    """

    run: str
    round: int
    rounds: int
    metrics: dict[str, float]
    clients: int
    bytes_up: int
    bytes_down: int
    wall_seconds: float


@dataclass(frozen=True)
class RunFinished:
    """A run has ended well.

    Attributes:
        run: name of the run.
        path: its folder.
        metrics: the last row of its rounds table.
    """

    run: str
    path: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Notice:
    """Something a user should know.

    Attributes:
        run: name of the run it is about, empty if it is about none.
        text: one line.
    """

    run: str
    text: str


Event = RunStarted | RoundFinished | RunFinished | Notice
