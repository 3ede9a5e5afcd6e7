"""Pictures of who learns from whom, and of what labels are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray
from scipy import special

from fedsim.results import axes as ax
from fedsim.results import style, words
from fedsim.results.blocks import Picture
from fedsim.results.cluster_plots import slug
from fedsim.results.groups import Runs
from fedsim.results.statistics import ALPHA

NUMBERED = 24
"""Most nodes that are drawn with their numbers."""
SPREAD = 0.06
"""How far apart strategies are drawn at the same budget, as a share of the axis."""
Floats = NDArray[np.float64]


def topology(name: str, facts: Mapping[str, Any]) -> Picture:
    """The nodes on a circle, and an edge for each pair that mixes; a grid as a rectangle."""
    count, edges = int(facts["nodes"]), [tuple(e) for e in facts["edges"]]
    places = _places(count, str(facts["name"]))
    alt = f"The {name} topology: {count} nodes, {len(edges)} edges."
    with style.drawing():
        figure, axes = style.canvas(height=300, left=90, right=90, top=34, bottom=20)
        lines = [(places[i], places[j]) for i, j in edges]
        faint = 1.4 if len(edges) < 80 else 0.5
        axes.add_collection(LineCollection(lines, colors=style.MUTED[0], linewidths=faint))
        size = 230 if count <= NUMBERED else 30
        across, up = places.T
        axes.scatter(across, up, s=size, color=style.colour(0), zorder=3, linewidths=0)
        for node in range(count if count <= NUMBERED else 0):
            axes.text(
                float(across[node]),
                float(up[node]),
                str(node),
                ha="center",
                va="center",
                color="white",
                fontsize=9,
                zorder=4,
            )
        axes.set_aspect("equal")
        axes.margins(0.08)
        axes.set_axis_off()
        style.title(axes, f"{name}: {words.plural(len(edges), 'edge')}", 0)
        picture = style.svg(figure, alt)
    caption = f"Who mixes with whom: {name}, in the last round."
    return Picture(f"topology-{slug(name)}", picture, alt, caption)


def _places(count: int, name: str) -> Floats:
    if name in ("grid", "torus"):
        rows = max(r for r in range(1, int(count**0.5) + 1) if count % r == 0)
        return np.array([(c, -r) for r in range(rows) for c in range(count // rows)], np.float64)
    turn = 2 * np.pi * np.arange(count) / count
    return np.stack([np.sin(turn), np.cos(turn)], 1)


def consensus(runs: Runs, labels: Sequence[str]) -> Picture | None:
    """Mean squared distance to the averaged model over rounds, after gossip; log scale."""
    drawn = []
    for label in labels:
        series = [run.series("consensus") for run in runs.of(label)]
        values = np.array([v for _, v in series if len(v) == len(series[0][1])])
        mean = values.mean(0)
        if len(mean) > 1 and (mean > 1e-12).any():  # on the complete graph it is rounding
            drawn.append((label, series[0][0], np.maximum(mean, 1e-12)))
    if not drawn:
        return None
    told = ", ".join(f"{label} {words.number(v[-1])}" for label, _, v in drawn)
    alt = f"Line chart of the consensus distance against rounds, log scale. At the end: {told}."
    with style.drawing():
        figure, axes = ax.canvas_for_ends([d[0] for d in drawn])
        for label, rounds, mean in drawn:
            index = runs.colour(label)
            shade, dash = style.colour(index), style.dash(index)
            axes.plot(rounds, mean, color=shade, linestyle=dash, zorder=3)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(drawn[0][1][0], drawn[0][1][-1])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("round")
        style.title(axes, "squared distance to the averaged model, after gossip")
        ends = [(d[0], float(d[1][-1]), float(d[2][-1]), runs.colour(d[0])) for d in drawn]
        ax.label_ends(axes, ends)
        picture = style.svg(figure, alt)
    caption = (
        "Consensus over rounds: mean squared distance of the nodes' models to their mean, mean "
        "over seeds. Strategies whose nodes agree exactly are not drawn."
    )
    return Picture("consensus", picture, alt, caption)


def budgets(runs: Runs, found: Mapping[str, tuple[Floats, Floats]], metric: str) -> Picture | None:
    """The metric at the ends of labelling cycles against the labels paid for.

    Args:
        runs: for colours.
        found: by label, the labels of all clients, mean over seeds [k], and the metric, [seeds, k].
        metric: name of the column.
    """
    drawn = {label: pair for label, pair in found.items() if pair[1].shape[1] > 1}
    if not drawn:
        return None
    name = words.name(metric)
    told = ", ".join(f"{label} {words.number(y[:, -1].mean())}" for label, (_, y) in drawn.items())
    alt = f"Line chart of {name} against labels. With the largest budget: {told}."
    with style.drawing():
        figure, axes = ax.canvas_for_ends(list(drawn))
        least = min(float(x[0]) for x, _ in drawn.values())
        most = max(float(x[-1]) for x, _ in drawn.values())
        aside = SPREAD * (most - least) * np.linspace(-0.5, 0.5, len(drawn))
        drawn = {n: (x + s, y) for s, (n, (x, y)) in zip(aside, drawn.items(), strict=True)}
        for label, (x, y) in drawn.items():
            index = runs.colour(label)
            shade, mean = style.colour(index), y.mean(0)
            if len(y) > 1:
                t = float(special.stdtrit(len(y) - 1, 1 - ALPHA / 2))
                half = t * y.std(0, ddof=1) / np.sqrt(len(y))
                axes.errorbar(x, mean, half, fmt="none", ecolor=shade, elinewidth=1.2, alpha=0.6)
            dash = style.dash(index)
            axes.plot(x, mean, color=shade, linestyle=dash, marker="o", markersize=4, zorder=3)
        edge = SPREAD * (most - least)
        axes.set_xlim(least - edge, most + edge)
        ax.y_limits(axes, np.concatenate([y.ravel() for _, y in drawn.values()]))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if metric.endswith("accuracy"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("labels paid for, all clients")
        style.title(axes, f"{name} at the end of a cycle")
        ends = [
            (label, float(x[-1]), float(y[:, -1].mean()), runs.colour(label))
            for label, (x, y) in drawn.items()
        ]
        ax.label_ends(axes, ends)
        picture = style.svg(figure, alt)
    caption = (
        f"{name.capitalize()} against the label budget, mean over seeds; bars: 95 % intervals, "
        "cut off where they leave what the seeds span. Strategies are moved a little aside, so "
        "that bars can be told apart."
    )
    return Picture("label-budgets", picture, alt, caption)


def teachers(label: str, clients: Sequence[int], weights: Floats) -> Picture:
    """Who learns how much from whom: a row for each receiver, a column for each sender."""
    count = len(clients)
    own = float(np.mean(np.diag(weights)))
    alt = f"Heat map of {count} by {count} weights of {label}; mean weight of the own {own:.2f}."
    with style.drawing():
        figure, axes = style.canvas(height=400, left=60, right=90, top=34, bottom=50)
        # Ink that is lighter or darker reads on light and dark pages alike.
        for row, column in np.ndindex(count, count):
            share = float(weights[row, column])
            if share >= 0.005:
                axes.add_patch(_cell(column, row, share))
            if count <= 12 and share >= 0.005:
                axes.text(
                    column,
                    row,
                    f"{share:.2f}".removeprefix("0"),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if share > 0.5 else style.INK[0],
                )
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_aspect("equal")
        ticks = range(count) if count <= 40 else range(0, count, 10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(list(ticks), [str(clients[i]) for i in ticks])
        axes.tick_params(labelsize=9 if count <= 20 else 6)
        axes.grid(visible=False)
        style.title(axes, "learning client")
        axes.set_xlabel("from whom")
        picture = style.svg(figure, alt)
    caption = (
        f"{label}, first seed, last round: the weight of each client's knowledge (column) in what "
        "a client (row) is given to learn. Weights under 0.005 are left blank."
    )
    return Picture(f"teachers-{slug(label)}", picture, alt, caption)


def _cell(x: float, y: float, share: float) -> Any:
    from matplotlib.patches import Rectangle

    alpha = 0.12 + 0.88 * share
    shape = Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, linewidth=0, facecolor=style.colour(0))
    shape.set_alpha(alpha)
    return shape
