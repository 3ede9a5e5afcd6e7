"""The report's pictures: each takes runs (or their tests) and gives a `Picture`, or None.

Everything is drawn with matplotlib's objects on its SVG canvas; no pyplot, no global state. A curve
has at most about 240 points a strategy, so that a thousand rounds stay a small file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter
from scipy import special

from fedsim.results import axes as ax
from fedsim.results import style, words
from fedsim.results.blocks import Picture
from fedsim.results.clients import client_column, facts, spread
from fedsim.results.groups import Runs, higher_is_better
from fedsim.results.statistics import ALPHA, mean_interval
from fedsim.results.store import Floats

Axis = Literal["rounds", "bytes", "seconds"]
POINTS = 240
LEGEND = 8
"""Strategies of which a legend finds room inside a picture."""

_AXES = {
    "rounds": "round",
    "bytes": "bytes up and down, all clients",
    "seconds": "simulated seconds",
}
_METRICS = ("accuracy", "loss", "perplexity", "worst10", "rouge_l", "exact_match")
_DIRECTED = (*_METRICS, "cluster_ari", "cluster_nmi")
_TOTALS = {"bytes": ("bytes_up", "bytes_down"), "seconds": ("seconds",)}


@dataclass(frozen=True)
class Curve:
    """Mean of a column over seeds against something, with its 95 % interval (NaN for one seed)."""

    label: str
    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def curve(runs: Runs, label: str, column: str, axis: Axis = "rounds") -> Curve | None:
    """A strategy's curve over the rounds in which all its runs measured the column, at least two.

    Against bytes or seconds x is the mean over seeds of the total up to that round, from the first
    round on.
    """
    measured = [(run, *run.series(column)) for run in runs.of(label)]
    measured = [item for item in measured if len(item[1])]
    if not measured:
        return None
    common = measured[0][1]
    for _, rounds, _ in measured[1:]:
        common = np.intersect1d(common, rounds)
    y = np.array([values[np.searchsorted(rounds, common)] for _, rounds, values in measured])
    x = common.astype(np.float64)
    if axis in _TOTALS:
        rows = [np.searchsorted(run.rounds["round"].to_numpy(), common) for run, *_ in measured]
        totals = [run.cumulative(*_TOTALS[axis]) for run, *_ in measured]
        x = np.mean([total[row] for total, row in zip(totals, rows, strict=True)], axis=0)
    y[~np.isfinite(y)] = np.nan
    there = x > 0 if axis == "bytes" else np.ones(len(x), bool)
    x, y = x[there], y[:, there]
    if len(x) < 2 or x[-1] <= x[0] or np.isnan(y.mean(0)).all():
        return None
    keep = _thin(len(x))
    mean, half = y.mean(0), np.full(len(x), np.nan)
    if len(y) > 1:
        t = float(special.stdtrit(len(y) - 1, 1 - ALPHA / 2))
        half = t * y.std(0, ddof=1) / np.sqrt(len(y))
    return Curve(label, x[keep], mean[keep], (mean - half)[keep], (mean + half)[keep])


def _thin(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Indices of points to draw: all, or evenly spread ones and dense ones at the start."""
    if count <= POINTS:
        return np.arange(count)
    even = np.linspace(0, count - 1, POINTS * 3 // 4)
    early = np.geomspace(1, count - 1, POINTS // 4)
    return np.unique(np.round(np.concatenate([even, early])).astype(np.int64))


def curves(
    runs: Runs, column: str, axis: Axis = "rounds", target: float | None = None
) -> Picture | None:
    """A column against rounds, bytes (log scale) or simulated seconds, with intervals as bands."""
    drawn = [c for label in runs.compared if (c := curve(runs, label, column, axis))]
    if not drawn:
        return None
    name = words.name(column)
    ends = [float(c.mean[np.isfinite(c.mean)][-1]) for c in drawn]
    told = ", ".join(f"{c.label} {words.number(y)}" for c, y in zip(drawn, ends, strict=True))
    alt = f"Line chart of {name} against {_AXES[axis]}. Means at the end: {told}."
    with style.drawing():
        figure, axes = ax.canvas_for_ends([c.label for c in drawn])
        for c in drawn:
            index = runs.colour(c.label)
            shade = style.colour(index)
            axes.fill_between(c.x, c.low, c.high, facecolor=shade, alpha=0.15, linewidth=0)
            axes.plot(c.x, c.mean, color=shade, linestyle=style.dash(index), zorder=3)
        ax.y_limits(axes, _shown(drawn, column, target))
        low, high = min(c.x[0] for c in drawn), max(c.x[-1] for c in drawn)
        if axis == "bytes":
            ax.byte_axis(axes, float(low), float(high))
        else:
            axes.set_xlim(low, high)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis == "rounds"))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: words.number(x)))
        axes.set_xlabel(_AXES[axis])
        _head(axes, column)
        if target is not None:
            _target(axes, target)
        last = [
            (c.label, float(c.x[-1]), y, runs.colour(c.label))
            for c, y in zip(drawn, ends, strict=True)
        ]
        ax.label_ends(axes, last)
        picture = style.svg(figure, alt)
    band = ", mean over seeds; bands: 95 % confidence interval" if len(runs.seeds) > 1 else ""
    line = "; dashed: the target" if target is not None else ""
    caption = f"{_capital(name)} against {_AXES[axis]}{band}{line}."
    return Picture(f"{words.slug(column)}-{axis}", picture, alt, caption)


def seeds(runs: Runs, column: str) -> Picture | None:
    """The final value of every seed, a row for each strategy; lines join the runs of one seed."""
    finals = runs.values(column)
    labels = [label for label in runs.compared if label in finals]
    means = {label: mean_interval(finals[label].values()) for label in labels}
    if not any(np.isfinite(v) for row in finals.values() for v in row.values()):
        return None
    name = words.name(column)
    told = ", ".join(f"{label} {words.plus_minus(means[label], 3)}" for label in labels)
    alt = f"Dot plot of the final {name} of every seed. Mean and 95 % CI: {told}."
    with style.drawing():
        figure, axes = ax.rows(labels)
        for seed in runs.seeds:
            there = [(finals[b][seed], i) for i, b in enumerate(labels) if seed in finals[b]]
            if len(there) > 1:
                axes.plot(
                    *zip(*there, strict=True), color=style.MUTED[0], linewidth=0.8, alpha=0.45
                )
        for i, label in enumerate(labels):
            shade = style.colour(runs.colour(label))
            x = list(finals[label].values())
            axes.plot(x, [i] * len(x), "o", color=shade, markersize=6, mew=0, alpha=0.7)
            ax.interval_bar(axes, means[label], i + 0.3, shade)
        ax.colour_row_names(axes, [runs.colour(label) for label in labels])
        axes.set_xlabel(f"final {name}{_arrow(column)}")
        picture = style.svg(figure, alt)
    caption = (
        f"Final {name} of every seed: a line joins the runs of one seed. Diamond and bar: mean and "
        "95 % confidence interval."
    )
    return Picture(f"{words.slug(column)}-seeds", picture, alt, caption)


def clients_ecdf(runs: Runs) -> Picture | None:
    """Share of clients that are served at most so well, in the final evaluation of all seeds."""
    column = client_column(runs)
    if column is None:
        return None
    pooled = {label: _pooled(runs, label, column) for label in runs.compared}
    pooled = {label: values for label, values in pooled.items() if len(values)}
    medians = ", ".join(f"{k} {words.number(float(np.median(v)))}" for k, v in pooled.items())
    alt = f"Cumulative distribution of {column} over clients. Medians: {medians}."
    many = len(pooled) > LEGEND
    with style.drawing():
        figure, axes = ax.canvas_for_ends(list(pooled), 28) if many else style.canvas(right=24)
        worst = (0, 0.1) if column == "accuracy" else (0.9, 1)
        axes.axhspan(*worst, color=style.FAINT[0], alpha=0.5, linewidth=0)
        for label, values in pooled.items():
            index = runs.colour(label)
            share = np.arange(len(values) + 1) / len(values)
            keep = np.unique(np.linspace(0, len(values), POINTS).round().astype(int))
            steps = np.concatenate([values[:1], values])
            axes.plot(
                steps[keep], share[keep], drawstyle="steps-post",
                label=_shown_label(label, 18 if many else 30),
                color=style.colour(index), linestyle=style.dash(index), linewidth=1.8,
            )  # fmt: skip
        axes.set_ylim(0, 1)
        low, high = (min(v[0] for v in pooled.values()), max(v[-1] for v in pooled.values()))
        axes.set_xlim(low, high if high > low else low + 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        style.title(axes, "share of clients at or below")
        axes.set_xlabel(f"{column} on the client's own held-out examples{_arrow(column)}")
        place: Literal["upper left", "lower right"]
        place = "upper left" if column == "accuracy" else "lower right"
        beside: dict[str, Any] = {
            "loc": "center left", "bbox_to_anchor": (1, 0.5), "labelspacing": 0.1
        }  # fmt: skip
        where = beside if many else {"loc": place}
        legend = axes.legend(**where, frameon=False, handlelength=1.6, borderaxespad=0.2)
        for text, label in zip(legend.get_texts(), pooled, strict=True):
            text.set(color=style.colour(runs.colour(label)), fontweight="bold")
        picture = style.svg(figure, alt)
    side = "lower and further to the right is" if column == "accuracy" else "further to the left is"
    caption = (
        f"How {column} is spread over clients (all seeds together): {side} better; the shaded "
        "strip holds the worst tenth of the clients."
    )
    return Picture("clients-distribution", picture, alt, caption)


def clients_spread(runs: Runs) -> Picture | None:
    """Worst tenth, middle half, median and best tenth of the clients, a row for each strategy."""
    column = client_column(runs)
    if column is None:
        return None
    pooled = {label: _pooled(runs, label, column) for label in runs.compared}
    pooled = {label: values for label, values in pooled.items() if len(values)}
    found = {label: spread(v, column == "accuracy") for label, v in pooled.items()}
    told = ", ".join(f"{k} {s['worst10']:.3g} to {s['best10']:.3g}" for k, s in found.items())
    alt = f"Range of {column} over clients, worst tenth to best tenth: {told}."
    with style.drawing():
        figure, axes = ax.rows(list(pooled))
        for i, (label, values) in enumerate(pooled.items()):
            shade, s = style.colour(runs.colour(label)), found[label]
            quarter, half = np.quantile(values, [0.25, 0.75])
            axes.plot([s["worst10"], s["best10"]], [i, i], color=shade, linewidth=1.6)
            axes.plot([quarter, half], [i, i], color=shade, linewidth=11, alpha=0.35,
                      solid_capstyle="butt")  # fmt: skip
            axes.plot([s["worst10"]], [i], "v", color=shade, markersize=8, mew=0)
            axes.plot([s["best10"]], [i], "^", color=shade, markersize=8, mew=0)
            axes.plot([s["median"]], [i], "|", color=shade, markersize=16, mew=3)
        ax.colour_row_names(axes, [runs.colour(label) for label in pooled])
        axes.set_xlabel(f"{column} on the client's own held-out examples{_arrow(column)}")
        picture = style.svg(figure, alt)
    caption = (
        "▼ mean of the worst 10 % of clients, ▲ of the best 10 %; bar: the middle half; "
        "stroke: the median."
    )
    return Picture("clients-spread", picture, alt, caption)


def sweep(groups: Sequence[Runs], column: str) -> Picture | None:
    """The final value of every strategy at each value of a sweep, with its interval."""
    labels = [label for label in groups[0].labels if any(label in g.compared for g in groups)]
    name = words.name(column)
    found = {
        label: [mean_interval(g.values(column).get(label, {}).values()) for g in groups]
        for label in labels
    }
    drawn = {
        label: [(i, m) for i, m in enumerate(row) if m is not None and np.isfinite(m.mean)]
        for label, row in found.items()
    }
    drawn = {label: row for label, row in drawn.items() if row}
    if not drawn:
        return None
    told = "; ".join(
        f"{label} {', '.join(words.number(m.mean) for _, m in row)}" for label, row in drawn.items()
    )
    key = ", ".join(groups[0].setting)
    alt = f"Final {name} against {key}: {told}."
    with style.drawing():
        figure, axes = ax.canvas_for_ends(list(drawn))
        ends, step = [], 0.5 / max(4, len(drawn))
        for n, (label, row) in enumerate(drawn.items()):
            index = groups[0].colour(label)
            x = [i + (n - (len(drawn) - 1) / 2) * step for i, _ in row]
            y = [m.mean for _, m in row]
            axes.plot(x, y, color=style.colour(index), linewidth=1.4, linestyle=style.dash(index))
            axes.plot(x, y, "o", color=style.colour(index), markersize=6, mew=0)
            for place, (_, m) in zip(x, row, strict=True):
                if m.low is not None and m.high is not None:
                    axes.plot(
                        [place] * 2, [m.low, m.high], color=style.colour(index), linewidth=2.2
                    )
            ends.append((label, x[-1], y[-1], index))
        axes.set_xlim(-0.4, len(groups) - 0.6)
        bounds = [v for row in drawn.values() for _, m in row for v in (m.low, m.mean, m.high)]
        ax.y_limits(axes, np.array([v for v in bounds if v is not None]))
        axes.xaxis.set_major_locator(FixedLocator(range(len(groups))))
        values = [ax.wrap(", ".join(map(str, g.setting.values())), 14) for g in groups]
        axes.xaxis.set_major_formatter(FuncFormatter(lambda _, i: values[i]))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(key)
        _head(axes, column)
        ax.label_ends(axes, ends)
        picture = style.svg(figure, alt)
    caption = f"Final {name} at each value of {key}: mean over seeds and 95 % confidence interval."
    return Picture(f"{words.slug(column)}-sweep", picture, alt, caption)


def _shown(drawn: Sequence[Curve], column: str, target: float | None) -> Floats:
    """What the y axis must hold. Of a metric, the first fifth of the rounds may be cut off: it is
    a climb from chance, and at its scale nothing else can be told apart.
    """
    if any(word in column for word in _METRICS):
        late = [c.mean[len(c.mean) // 5 :] for c in drawn]
        return np.concatenate([*late, [] if target is None else [target]])
    return np.concatenate([v for c in drawn for v in (c.low, c.mean, c.high)])


def _pooled(runs: Runs, label: str, column: str) -> Floats:
    values = [facts(runs, run).values(column) for run in runs.of(label)]
    pooled = np.sort(np.concatenate(values))
    return pooled[np.isfinite(pooled)]


def _shown_label(label: str, width: int) -> str:
    """A label that a legend shows, even if it starts with an underscore."""
    return ("\u200b" if label.startswith("_") else "") + ax.wrap(label, width)


def _arrow(column: str) -> str:
    return " →" if higher_is_better(column) else " ←"


def _head(axes: Axes, column: str) -> None:
    """The y axis's name with the way that is better, where there is one."""
    arrow = " ↑" if higher_is_better(column) else " ↓"
    style.title(
        axes, words.name(column) + (arrow if any(word in column for word in _DIRECTED) else "")
    )


def _target(axes: Axes, target: float) -> None:
    axes.axhline(target, color=style.MUTED[0], linewidth=1, linestyle=(0, (4, 3)), zorder=2)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
