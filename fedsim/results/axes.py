"""Pieces that several pictures share: labels at line ends, rows of strategies, byte axes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import IdentityTransform
from scipy.optimize import isotonic_regression

from fedsim.results import style, words
from fedsim.results.statistics import Interval
from fedsim.results.store import Floats

LINE = 14.0
"""Height of a line of text, in units of the canvas."""

_NARROW, _WIDE = 7.2, 9.2  # widths of small and of wide bold letters; few fonts are wider
_WRAP = 18


def wrap(label: str, width: int = _WRAP) -> str:
    """A long label on several lines."""
    return "\n".join(textwrap.wrap(label, width)) or label


def room(labels: Sequence[str], least: float = 0) -> float:
    """Units that the widest of some labels takes."""
    lines = [line for label in labels for line in wrap(label).splitlines()]
    widths = [
        sum(_WIDE if letter.isupper() or letter in "mw%" else _NARROW for letter in line)
        for line in lines
    ]
    return max([least, *widths])


def stack(labels: Sequence[str]) -> float:
    """Units that some labels take, one below the other."""
    return LINE * sum(wrap(label).count("\n") + 1 for label in labels)


def canvas_for_ends(labels: Sequence[str], before: float = 0) -> tuple[Figure, Axes]:
    """A canvas with room for names beside it, `before` units wide signs before each.

    By `label_ends` lines are named where they end.
    """
    return style.canvas(max(320.0, stack(labels) + 80), right=room(labels) + 22 + before)


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, int]]) -> None:
    """Name each line where it ends; names are moved apart, the least possible, to be readable.

    Args:
        axes: with its final limits.
        ends: label, x, y in data units and colour number of every line.
    """
    figure = axes.figure
    (_, bottom), (right, top) = axes.transAxes.transform([(0, 0), (1, 1)])
    points = axes.transData.transform([(x, y) for _, x, y, _ in ends])
    points[:, 1] = points[:, 1].clip(bottom, top)
    texts = [wrap(label) for label, *_ in ends]
    heights = np.array([LINE * (text.count("\n") + 1) for text in texts])
    order = np.argsort(points[:, 1], kind="stable")
    places = np.empty(len(ends))
    width, height = figure.bbox.width, figure.bbox.height
    places[order] = _apart(points[order, 1], heights[order], height)
    for (_, _, _, index), text, (x, y), place in zip(ends, texts, points, places, strict=True):
        shade = style.colour(index)
        axes.plot(
            [x], [y], "o", color=shade, markersize=4.5, mew=0,
            transform=IdentityTransform(), clip_on=False,
        )  # fmt: skip
        if abs(place - y) > 3 or right - x > 8:
            leader = Line2D([x, right + 7], [y, place], color=shade, linewidth=0.8, alpha=0.5)
            leader.set_transform(IdentityTransform())
            figure.add_artist(leader)
        figure.text(
            (right + 10) / width, place / height, text,
            color=shade, va="center_baseline", fontweight="bold", linespacing=1.15,
        )  # fmt: skip


def _apart(y: Floats, heights: Floats, room: float) -> Floats:
    """Places from 0 to `room`, closest to ascending `y` (least squares), without overlap."""
    offsets = np.concatenate([[0.0], np.cumsum((heights[1:] + heights[:-1]) / 2)])
    low, high = heights[0] / 2, room - heights[-1] / 2 - offsets[-1]
    return np.clip(isotonic_regression(y - offsets).x, low, max(low, high)) + offsets


def rows(labels: Sequence[str], *, right: float = 24, top: float = 14) -> tuple[Figure, Axes]:
    """A canvas with one named row for each label, the first on top, and room for a bar below."""
    left = room(labels, 40) + 14
    tallest = max((stack([label]) for label in labels), default=LINE)
    row = max(min(64.0, max(36.0, 260 / len(labels))), tallest + 6)
    height = top + 46 + row * len(labels)
    figure, axes = style.canvas(height, left, right, top, 46)
    axes.set_ylim(len(labels) - 0.4, -0.55)
    axes.yaxis.set_major_locator(FixedLocator(range(len(labels))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda _, i: wrap(labels[i])))
    axes.tick_params(axis="y", length=0, pad=8, labelsize=12, labelcolor=style.INK[0])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def colour_row_names(axes: Axes, colours: Sequence[int]) -> None:
    """Give the rows' names the strategies' colours."""
    for text, index in zip(axes.get_yticklabels(), colours, strict=True):
        text.set(color=style.colour(index), fontweight="bold")


def byte_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis in bytes from `low` to `high`, with few round ticks."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: words.size(x)))


def y_limits(axes: Axes, values: Floats) -> None:
    """Limits around finite values, logarithmic where they span more than a factor of fifty."""
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > 50:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: words.number(y)))
        axes.set_ylim(low / 1.2, high * 1.2)
        return
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - pad, high + pad)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def interval_bar(axes: Axes, interval: Interval | None, y: float, shade: str) -> None:
    """A diamond at the mean and a bar along the interval, level at `y`."""
    if interval is None:
        return
    if interval.low is not None and interval.high is not None:
        axes.plot([interval.low, interval.high], [y, y], color=shade, linewidth=2.4)
    axes.plot([interval.mean], [y], "D", color=shade, markersize=6.5, mew=0)
