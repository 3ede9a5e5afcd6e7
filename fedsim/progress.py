"""Shows events while runs go on: a live display, plain lines, or one JSON object per line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fedsim.core.events import Event, Notice, RoundFinished, RunFinished, RunStarted
from fedsim.core.text import tame

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Mode = Literal["live", "plain", "json", "quiet"]
OnEvent = Callable[[Event], None]
_SHOWN = ("accuracy", "perplexity", "loss", "client_accuracy", "client_loss")
_LINES = 10
"""Plain lines per run, about."""


def mode(as_json: bool, quiet: bool) -> Mode:
    """How to show events: live when standard output is a terminal."""
    if as_json:
        return "json"
    if quiet:
        return "quiet"
    return "live" if sys.stdout.isatty() else "plain"


@contextmanager
def showing(how: Mode) -> Iterator[OnEvent]:
    """Open the display; what it gives is called with every event, in the order they happen."""
    if how == "live":
        with _progress() as bars:
            yield _Live(bars)
    elif how == "plain":
        yield _Plain()
    else:
        yield _print_json if how == "json" else _ignore


@dataclass
class Tally:
    """What a run has done since it was started or resumed.

    Attributes:
        started: its first event.
        metric: the last value of the metric that is shown, as text; empty before there is one.
        clients: clients admitted.
        bytes: bytes both ways.
        seconds: measured seconds of its rounds.
        done: rounds finished since then.
    """

    started: RunStarted
    metric: str = ""
    clients: int = 0
    bytes: int = 0
    seconds: float = 0.0
    done: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, event: RoundFinished) -> None:
        """Count a round."""
        self.clients += event.clients
        self.bytes += event.bytes_up + event.bytes_down
        self.seconds += event.wall_seconds
        self.done += 1
        self.metric = metric_text(event.metrics, self.started.metric) or self.metric

    @property
    def speed(self) -> str:
        """Clients per measured second."""
        return f"{self.clients / self.seconds:.1f} clients/s" if self.seconds > 0 else ""

    def left(self, rounds: int) -> str:
        """Estimated time for so many more rounds."""
        return f"{duration(rounds * self.seconds / self.done)} left" if self.done else ""


def metric_text(metrics: dict[str, float], wanted: str = "") -> str:
    """The metric that is wanted, or else the first that a reader looks for, as ``accuracy 0.8123``;
    empty if none is there.
    """
    names = (wanted, *_SHOWN)
    name = next((n for n in names if n in metrics and not math.isnan(metrics[n])), None)
    if name is None:
        return ""
    value = metrics[name]
    return f"{name} {value:.4f}" if abs(value) < 100 else f"{name} {value:.4g}"


def size(count: float) -> str:
    """Bytes as a reader wants them: ``12.3 MB`` (1 MB = 10^6 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: ``12 ms``, ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if 0 < seconds < 0.0995:
        return f"{seconds * 1000:.2g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _ignore(event: Event) -> None:
    """Show nothing."""


def _print_json(event: Event) -> None:
    content = {"event": type(event).__name__, **asdict(event)}
    print(to_json(content), flush=True)


def to_json(content: Any) -> str:
    """One line of JSON; what JSON cannot hold (NaN, infinities) becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), allow_nan=False, default=str)


class _Plain:
    """Some lines a run, for logs and pipes."""

    def __init__(self) -> None:
        self._runs: dict[str, Tally] = {}

    def __call__(self, event: Event) -> None:
        line = self._line(event)
        if line:
            print(line, flush=True)

    def _line(self, event: Event) -> str:
        match event:
            case RunStarted():
                self._runs[event.run] = Tally(event)
                return f"{_title(event)}: {event.rounds} rounds"
            case RoundFinished():
                tally = self._runs[event.run]
                tally.add(event)
                if event.round % max(1, event.rounds // _LINES) and event.round != event.rounds:
                    return ""
                left = tally.left(event.rounds - event.round)
                return _joined(
                    f"{event.run}: round {event.round}/{event.rounds}",
                    *(tally.metric, tally.speed, size(tally.bytes), left),
                )
            case RunFinished():
                return _summary(event, self._runs.get(event.run))
            case Notice():
                return f"{event.run}: {tame(event.text)}" if event.run else tame(event.text)


class _Live:
    """A bar for every run that is going on, one for all, and a line for every run that ended."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._runs: dict[str, Tally] = {}
        self._own: dict[str, TaskID] = {}
        self._left: dict[str, int] = {}
        self._all = bars.add_task("all runs", visible=False, facts="")
        self._last = 0

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._runs[event.run] = Tally(event)
                title = _title(event, number=False)
                self._own[event.run] = self._bars.add_task(title, total=event.rounds, facts="")
                self._left[event.run] = event.rounds
                self._last = max(self._last, event.index)
                self._show_all(event)
            case RoundFinished() if event.run in self._own:
                tally = self._runs[event.run]
                tally.add(event)
                left = self._left[event.run] = event.rounds - event.round
                facts = (tally.metric, tally.speed, size(tally.bytes), tally.left(left))
                own = self._own[event.run]
                self._bars.update(own, completed=event.round, facts=_joined(*facts))
                self._show_all(tally.started, tally)
            case RunFinished():
                if event.run in self._own:
                    self._bars.remove_task(self._own.pop(event.run))
                    self._left.pop(event.run)
                self._say(_summary(event, self._runs.get(event.run)))
            case Notice():
                text = tame(event.text)
                self._say(f"{event.run}: {text}" if event.run else text)

    def _show_all(self, started: RunStarted, tally: Tally | None = None) -> None:
        """Move the bar of all runs; `tally` is of the one that tells how long a round takes."""
        total, rounds = started.total, started.rounds
        left = (total - self._last) * rounds + sum(self._left.values())
        facts = [f"run {self._last}/{total}"]
        if tally is not None:
            facts.append(tally.left(-(-left // len(self._own))))
        self._bars.update(
            self._all,
            visible=total > 1,
            total=total * rounds,
            completed=total * rounds - left,
            facts=_joined(*facts),
        )

    def _say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        transient=True,
    )


def _title(event: RunStarted, number: bool = True) -> str:
    numbered = f"[{event.index}/{event.total}] " if number and event.total > 1 else ""
    return f"{numbered}{event.label} seed {event.seed}"


def _summary(event: RunFinished, tally: Tally | None) -> str:
    if tally is None:
        return _joined(f"{event.run}: finished", metric_text(event.metrics))
    took = duration(time.monotonic() - tally.since)
    metric = metric_text(event.metrics, tally.started.metric) or tally.metric
    return _joined(f"{event.run}: finished", metric, size(tally.bytes), took)


def _joined(*parts: str) -> str:
    return "  ".join(part for part in parts if part)
