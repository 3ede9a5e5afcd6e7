"""Pictures of clusters: who was in which, the tree and its cut, labels, gains and losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram

from fedsim.results import style
from fedsim.results.blocks import Picture

NAMED = 60
"""Most clients whose numbers are written under a tree."""
LEAST = 0.04
"""Share of the clients that a cluster needs for its number to be written beside it."""
WRITTEN = 12
"""Most labels, and clusters, for which shares are written as numbers."""
Ints = NDArray[np.int64]


def over_time(label: str, rounds: Ints, clients: Ints, clusters: Ints) -> Picture:
    """A cell for each client and round in the colour of its cluster; clients sorted by cluster.

    Args:
        label: the strategy.
        rounds: of each membership, int64 [n].
        clients: whose, int64 [n].
        clusters: which cluster, int64 [n].
    """
    last = {int(c): int(k) for c, k in zip(clients, clusters, strict=True)}
    order = sorted(last, key=lambda c: (last[c], c))
    names = sorted({int(c) for c in clusters})
    columns = np.unique(rounds)
    place = {c: i for i, c in enumerate(order)}
    alt = f"Clusters of {len(order)} clients over the rounds of {label}: {len(names)} clusters."
    with style.drawing():
        figure, axes = style.canvas(right=24)
        for server_round in columns:
            now = rounds == server_round
            spots = {
                place[int(c)]: int(k) for c, k in zip(clients[now], clusters[now], strict=True)
            }
            for first, length, name in _runs(spots):
                fill = style.colour(names.index(name))
                axes.add_patch(_box(server_round - 0.45, first - 0.5, 0.9, length, fill))
        for first, length, name in _runs({place[c]: k for c, k in last.items()}):
            if length >= LEAST * len(order):
                spot = (columns[-1] + 0.55, first + length / 2 - 0.5)
                axes.annotate(str(name), spot, va="center", fontsize=10, annotation_clip=False)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set_xlim(columns[0] - 0.6, columns[-1] + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(visible=False)
        style.title(axes, "clients, sorted by their last cluster")
        axes.set_xlabel("round")
        picture = style.svg(figure, alt)
    caption = (
        f"{label}, first seed: a colour for each cluster, the last ones' numbers at the right; "
        "blank where a client took no part."
    )
    return Picture(f"clusters-{slug(label)}", picture, alt, caption)


def tree(label: str, event: Mapping[str, Any]) -> Picture | None:
    """The dendrogram of a clustering with its cut; None if the tree was not kept."""
    merges = np.asarray(event["tree"], dtype=np.float64)
    if not len(merges):
        return None
    cut, clients = float(event["threshold"]), list(event["clients"])
    alt = (
        f"Dendrogram of {len(clients)} clients of {label}, cut at {cut:.3g} into "
        f"{event['clusters']} clusters."
    )
    with style.drawing():
        figure, axes = style.canvas(right=24)
        drawn = dendrogram(merges, no_plot=True, labels=clients)
        inside = 0
        for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True):
            below = max(y) <= cut
            inside += below
            axes.plot(x, y, color=style.colour(0) if below else style.MUTED[0], linewidth=1.0)
        axes.axhline(cut, color=style.colour(1), linewidth=1.4, linestyle="--")
        axes.set_xlim(0, 10 * len(clients))
        axes.set_ylim(0, float(merges[:, 2].max()) * 1.05 or 1.0)
        few = len(clients) <= NAMED
        axes.set_xticks(10 * np.arange(len(clients)) + 5 if few else [])
        if few:
            axes.set_xticklabels([str(c) for c in drawn["ivl"]], rotation=90, fontsize=7)
        axes.grid(axis="x", visible=False)
        style.title(axes, "height of the merge")
        axes.set_xlabel("client")
        picture = style.svg(figure, alt)
    caption = f"{label}, first seed, round {event['round']}: {event['reason']} (dashed: the cut)."
    return Picture(f"dendrogram-{slug(label)}", picture, alt, caption)


def labels(label: str, clusters: Sequence[int | None], counts: Sequence[Sequence[int]]) -> Picture:
    """Share of each label in each cluster's training examples."""
    names = sorted({c for c in clusters if c is not None})
    table = np.array(
        [
            np.sum([n for c, n in zip(clusters, counts, strict=True) if c == name], axis=0)
            for name in names
        ],
        dtype=np.float64,
    )
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    alt = f"Share of {table.shape[1]} labels in each of {len(names)} clusters of {label}."
    with style.drawing():
        figure, axes = style.canvas(right=24)
        top = max(float(share.max()), 1e-9)
        few = max(share.shape) <= WRITTEN
        for row, column in np.ndindex(*share.shape):
            value = float(share[row, column])
            shade = 0.75 * value / top  # so that numbers can be read on it
            axes.add_patch(_box(column - 0.48, row - 0.46, 0.96, 0.92, style.colour(0), shade))
            if few and value:
                text = f"{100 * value:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=9.5)
        axes.set_xlim(-0.5, table.shape[1] - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xticks(range(table.shape[1]))
        axes.set_yticks(range(len(names)))
        axes.set_yticklabels([str(n) for n in names], fontsize=9 if len(names) < 20 else 6)
        axes.grid(visible=False)
        style.title(axes, "cluster; numbers are per cent of its examples" if few else "cluster")
        axes.set_xlabel("label")
        picture = style.svg(figure, alt)
    caption = f"{label}, first seed: the darker a cell, the more of a cluster's examples."
    return Picture(f"labels-{slug(label)}", picture, alt, caption)


def _runs(names: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
    """First place, number of places and name of every stretch of places with one name."""
    places = sorted(names)
    first = 0
    for i in range(1, len(places) + 1):
        ends = i == len(places) or places[i] != places[i - 1] + 1
        if ends or names[places[i]] != names[places[first]]:
            yield places[first], i - first, names[places[first]]
            first = i


def _box(x: float, y: float, width: float, height: float, colour: str, shade: float = 1.0) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, alpha=shade, linewidth=0)


def gains(label: str, base: str, colour: int, values: NDArray[np.float64]) -> Picture:
    """Every client's gain over another strategy, sorted.

    Args:
        label: the strategy.
        base: the other.
        colour: number of the strategy's colour.
        values: gain of each client in each seed.
    """
    ordered = np.sort(values)
    won, lost = int((ordered > 0).sum()), int((ordered < 0).sum())
    alt = f"Gain of {len(ordered)} clients with {label} over {base}: {won} gain, {lost} lose."
    with style.drawing():
        figure, axes = style.canvas(height=240, right=24)
        wide = 0.8 if len(ordered) <= 100 else 1.0  # many narrow gaps shimmer
        axes.bar(range(len(ordered)), ordered, width=wide, color=style.colour(colour), linewidth=0)
        axes.axhline(0, color=style.MUTED[0], linewidth=1)
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        style.title(axes, f"accuracy less that with {base}")
        axes.set_xlabel("clients, sorted by gain")
        picture = style.svg(figure, alt)
    caption = f"{label} against {base}, all seeds together: {won} clients gain, {lost} lose."
    return Picture(f"gains-{slug(label)}", picture, alt, caption)


def slug(label: str) -> str:
    """A label as part of a picture's name."""
    words = "".join(c if c.isalnum() else " " for c in label.lower()).split()
    return "-".join(words)
