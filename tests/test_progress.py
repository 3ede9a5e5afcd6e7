"""What is shown while runs go on."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest

from fedsim import progress
from fedsim.core.events import Event, Notice, RoundFinished, RunFinished, RunStarted

EVENTS: tuple[Event, ...] = (
    RunStarted("x", "FedAvg", 3, 2, 1, 2),
    RoundFinished("x", 1, 2, {"accuracy": 0.5, "loss": math.nan}, 4, 1000, 2000, 2.0),
    Notice("x", "client 3 was\nrefused"),
    RoundFinished("x", 2, 2, {"accuracy": 0.75}, 4, 1000, 2000, 2.0),
    RunFinished("x", "runs/x", {"accuracy": 0.75}),
)


def shown(how: progress.Mode, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that are printed of `EVENTS`."""
    with progress.showing(how) as tell:
        for event in EVENTS:
            tell(event)
    return capsys.readouterr().out.splitlines()


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown("plain", capsys)
    assert lines[:4] == [
        "[1/2] FedAvg seed 3: 2 rounds",
        "x: round 1/2  accuracy 0.5000  2.0 clients/s  3 kB  2.0 s left",
        "x: client 3 was\\nrefused",
        "x: round 2/2  accuracy 0.7500  2.0 clients/s  6 kB  0.0 s left",
    ]
    assert re.fullmatch(r"x: finished  accuracy 0\.7500  6 kB  [\d.]+ m?s", lines[4])


def test_many_rounds_make_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.showing("plain") as tell:
        tell(RunStarted("x", "FedAvg", 0, 995))
        for number in range(1, 996):
            tell(RoundFinished("x", number, 995, {}, 1, 1, 1, 0.001))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 11
    assert "round 995/995" in lines[-1]


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("quiet", capsys) == []


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    told = [json.loads(line) for line in shown("json", capsys)]
    assert [t["event"] for t in told] == [type(event).__name__ for event in EVENTS]
    assert told[1] == {
        "event": "RoundFinished",
        "run": "x",
        "round": 1,
        "rounds": 2,
        "metrics": {"accuracy": 0.5, "loss": None},
        "clients": 4,
        "bytes_up": 1000,
        "bytes_down": 2000,
        "wall_seconds": 2.0,
    }


def test_live_display(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.showing("live") as tell:
        *before, end = EVENTS
        for event in before:
            tell(event)
        every, run = tell._bars.tasks
        assert (run.completed, run.total, run.description) == (2, 2, "FedAvg seed 3")
        assert run.fields["facts"] == "accuracy 0.7500  2.0 clients/s  6 kB  0.0 s left"
        assert every.fields["facts"] == "run 1/2  4.0 s left"
        assert (every.completed, every.total, every.visible) == (2, 4, True)
        tell(end)
        assert tell._bars.tasks == [every]
    shown = capsys.readouterr().out
    assert "x: client 3 was\\nrefused" in shown
    assert "x: finished  accuracy 0.7500" in shown


def test_live_display_of_several_runs() -> None:
    """A bar each; of the time that is left every run takes its share."""
    with progress.showing("live") as tell:
        for index, run in enumerate("ab", 1):
            tell(RunStarted(run, "FedAvg", index, 4, index, 4))
        tell(RoundFinished("b", 3, 4, {}, 4, 0, 0, 2.0))
        every, first, second = tell._bars.tasks
        assert (first.completed, second.completed, every.completed) == (0, 3, 3)
        assert every.fields["facts"] == "run 2/4  14.0 s left"  # 13 rounds, two at a time


def test_a_terminal_gets_the_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert progress.mode(False, False) == "live"
    assert progress.mode(True, False) == "json"
    assert progress.mode(False, True) == "quiet"


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (12_345_678, "12.3 MB")],
)
def test_sizes(count: int, words: str) -> None:
    assert progress.size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (0.012, "12 ms"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words


def test_lines_show_the_metric_that_the_experiment_judges_by() -> None:
    assert progress.metric_text({"accuracy": 0.5, "loss": 1.0}) == "accuracy 0.5000"
    assert progress.metric_text({"accuracy": 0.5, "loss": 1.0}, "loss") == "loss 1.0000"
    assert progress.metric_text({"accuracy": 0.5}, "client_loss") == "accuracy 0.5000"
    tally = progress.Tally(RunStarted("x", "FedAvg", 0, 2, metric="loss"))
    tally.add(RoundFinished("x", 1, 2, {"accuracy": 0.5, "loss": 1.0}, 4, 0, 0, 1.0))
    assert tally.metric == "loss 1.0000"
