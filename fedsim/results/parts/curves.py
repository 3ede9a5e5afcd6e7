"""The metric's course against what it costs, and what strategies measured themselves."""

from __future__ import annotations

from fedsim.results import plots, words
from fedsim.results.blocks import Block, Details, Pictures, Section, Text
from fedsim.results.groups import Runs
from fedsim.results.parts.outcome import first_axis, shown
from fedsim.results.sections import section
from fedsim.results.summary import summarise

MOST = 8
"""Pictures of a strategy's own columns that are shown unfolded."""


@section(order=200)
def curves(runs: Runs) -> Section | None:
    """The metric against rounds, bytes and simulated seconds; loss and client metrics too."""
    summary = summarise(runs)
    if not summary.lines:
        return None
    axes: list[plots.Axis] = ["bytes", "seconds", "rounds"]
    axes.remove(first_axis(summary))
    pictures = [plots.curves(runs, summary.metric, axis, summary.target) for axis in axes]
    loss = "client_loss" if summary.metric.startswith("client") else "loss"
    if loss != summary.metric and len({(n.bytes_up, n.bytes_down) for n in summary.lines}) > 1:
        pictures.append(plots.curves(runs, loss, "bytes"))
    others = ("loss", "client_accuracy", "client_loss", "client_worst10", "train_loss")
    pictures += [plots.curves(runs, column) for column in others if column != summary.metric]
    blocks = shown(pictures)
    return Section("Course", tuple(blocks)) if blocks else None


@section(order=500)
def extras(runs: Runs) -> Section | None:
    """A picture for each column that a strategy added to the rounds table."""
    pictures = [plots.curves(runs, column) for column in runs.extra_columns]
    there = tuple(picture for picture in pictures if picture is not None)
    if not there:
        return None
    blocks: list[Block] = [
        Text("Columns that strategies add to the rounds table; not all strategies have them."),
        Pictures(there[:MOST]),
    ]
    if there[MOST:]:
        more = words.plural(len(there) - MOST, "more picture")
        blocks.append(Details(more, (Pictures(there[MOST:]),)))
    return Section("What strategies measured", tuple(blocks))
