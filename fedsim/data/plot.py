"""Who has what: one picture of a partition."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.data.raw import IGNORE

if TYPE_CHECKING:
    from fedsim.data.federated import FederatedData

BUBBLES = 60
"""Up to so many clients each gets a column of bubbles; more become a heat map."""
_CHARACTERS = 24
_BINS = 8
_INK, _TRAIN, _TEST = "#333333", "#3b6fb6", "#e0a458"


def composition(data: FederatedData) -> tuple[np.ndarray, list[str]]:
    """How often each label occurs at each client, training and held-out examples together.

    Returns:
        counts int64 [labels, clients], and the names of the labels: classes; for text the most
        frequent characters; for regression ranges of y with equally many examples.
    """
    owner = np.concatenate([data.train.owners, data.test.owners])
    y = data.fields["y"].numpy()[np.concatenate([data.train.values, data.test.values])]
    if data.criterion == "cross_entropy":
        label, known = y, data.meta.get("labels")
        names = list(map(str, known if isinstance(known, list) else range(data.num_outputs)))
    elif data.criterion == "mse":
        y = y.reshape(len(y), -1)[:, 0]
        edges = np.quantile(y, np.linspace(0, 1, _BINS + 1)[1:-1])
        label = np.searchsorted(edges, y)
        names = [f"< {edges[0]:.2g}", *(f"> {e:.2g}" for e in edges)]
    else:
        frequency = np.bincount(y[y != IGNORE], minlength=data.num_outputs)
        most = np.argsort(-frequency, kind="stable")[:_CHARACTERS]
        place = np.full(data.num_outputs, -1)
        place[most] = np.arange(len(most))
        label = np.where(y == IGNORE, -1, place[np.maximum(y, 0)])
        owner = np.repeat(owner, y.shape[1])[label.reshape(-1) >= 0]
        label = label[label >= 0]
        vocab = str(data.meta.get("vocab", ""))
        names = [_visible(vocab[c]) if c < len(vocab) else str(c) for c in most]
    flat = np.bincount(label * data.num_clients + owner, minlength=len(names) * data.num_clients)
    return flat.reshape(len(names), data.num_clients), names


def plot_partition(data: FederatedData, path: str | Path) -> Path:
    """Draw which client has how many examples, and of which labels; the suffix says the format.

    Above: examples per client, training and held out; a triangle marks clients held out. Below:
    bubbles whose area is the number of examples. For more than 60 clients a heat map of each
    client's shares, clients sorted by planted group and main label; for text always a heat map, of
    each character's frequency against the average client's.

    Returns:
        `path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts, names = composition(data)
    n, many = data.num_clients, data.num_clients > BUBBLES
    order = _sorted_clients(data, counts) if many else np.arange(n)
    size = 12.0 if many else min(12.0, 4.6 + 0.16 * n), 2.6 + 0.26 * max(len(names), 5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = {"height_ratios": [1.3, size[1] - 2.4]}
    top, main = figure.subplots(2, 1, sharex=True, gridspec_kw=ratios)
    _sizes(top, data, order)
    if many or data.criterion == "next_token":
        _heat_map(figure, main, counts[:, order], relative=data.criterion == "next_token")
    else:
        _bubbles(main, counts)
    main.set_yticks(range(len(names)), names)
    main.set_ylim(len(names) - 0.5, -0.5)
    main.set_xlim(-0.5, n - 0.5)
    main.set_ylabel({"cross_entropy": "label", "next_token": "character"}.get(data.criterion, "y"))
    planted = "planted group, then " if data.groups is not None else ""
    main.set_xlabel(f"clients, sorted by {planted}main label" if many else "client")
    if not many:
        _name_clients(main, data)
    _bare(main)
    if data.groups is not None:
        _name_groups(main, data.groups[order], many)
    figure.suptitle(_title(data, int(size[0] * 12)), x=0.02, ha="left", fontsize=10)
    figure.savefig(path, dpi=130)
    return Path(path)


def _sorted_clients(data: FederatedData, counts: np.ndarray) -> np.ndarray:
    relative = _shares(counts, relative=True)
    keys = [-relative.max(0), relative.argmax(0)]
    return np.lexsort([*keys, data.groups] if data.groups is not None else keys)


def _shares(counts: np.ndarray, relative: bool) -> np.ndarray:
    """Share of each label in each client; relative: divided by the average client's."""
    shares = counts / np.maximum(counts.sum(0), 1)
    return shares / np.maximum(shares.mean(1, keepdims=True), 1e-12) if relative else shares


def _sizes(axes: Any, data: FederatedData, order: np.ndarray) -> None:
    edges = np.arange(len(order) + 1) - 0.5
    train, test = data.train.lengths[order], data.test.lengths[order]
    axes.stairs(train, edges, fill=True, color=_TRAIN, label="training")
    axes.stairs(train + test, edges, baseline=train, fill=True, color=_TEST, label="held out")
    held = np.flatnonzero(np.isin(order, data.heldout_clients))
    below = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    if len(held):
        marks = axes.plot(held, np.full(len(held), -0.09), "^", color=_INK, markersize=4, **below)
        marks[0].set_in_layout(False)
    axes.set_ylabel("examples")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98))
    _bare(axes)


def _bubbles(axes: Any, counts: np.ndarray) -> None:
    label, client = np.nonzero(counts)
    area = counts[label, client] / counts.max()
    axes.scatter(client, label, s=4 + 180 * area, color=_TRAIN, alpha=0.8, linewidths=0)
    axes.set_axisbelow(True)
    axes.grid(color="#dddddd", linewidth=0.6)


def _heat_map(figure: Any, axes: Any, counts: np.ndarray, relative: bool) -> None:
    from matplotlib.colors import LogNorm

    shares = _shares(counts, relative)
    look = (
        {"cmap": "PuOr_r", "norm": LogNorm(1 / 3, 3)}
        if relative
        else {"cmap": "cividis", "vmin": 0, "vmax": shares.max()}
    )
    image = axes.imshow(
        np.clip(shares, 1 / 3, 3) if relative else shares,
        aspect="auto",
        interpolation="nearest",
        **look,
    )
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.ax.tick_params(labelsize=8)
    if relative:
        bar.set_ticks([1 / 3, 1 / 2, 1, 2, 3], labels=["⅓", "½", "1", "2", "3"])
        bar.ax.minorticks_off()
    kind = "times the average client's" if relative else "share of the client's examples"
    bar.set_label(kind, fontsize=8)


def _name_clients(axes: Any, data: FederatedData) -> None:
    from matplotlib.ticker import MaxNLocator

    if data.client_names == tuple(map(str, range(data.num_clients))):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return
    short = [name if len(name) <= 28 else name[:27] + "…" for name in data.client_names]
    axes.set_xticks(range(len(short)), short, rotation=90)
    axes.set_xlabel("")


def _name_groups(axes: Any, groups: np.ndarray, many: bool) -> None:
    """Number of the planted group above each client, or above each run of clients if sorted."""
    above = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    edges = np.flatnonzero(np.diff(groups)) + 0.5 if many else np.arange(len(groups) - 1) + 0.5
    ends = np.concatenate([[-0.5], edges, [len(groups) - 0.5]])
    for left, right in pairwise(ends):
        middle = (left + right) / 2
        text = f"group {groups[int(middle)]}" if many else str(groups[int(middle)])
        axes.text(middle, 1.01, text, fontsize=8, color=_INK, **above)
    for edge in edges if many else ():
        axes.axvline(edge, color="white", linewidth=1.5)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _visible(character: str) -> str:
    names = {" ": "space", "\n": "newline", "\t": "tab", "$": r"\$"}
    return names.get(character, character)


def _title(data: FederatedData, width: int) -> str:
    total = data.train.lengths + data.test.lengths
    facts = [
        f"{data.num_clients:,} client{'s' * (data.num_clients != 1)}",
        f"{total.sum():,} examples",
        f"per client {total.min():,} to {total.max():,}, median {int(np.median(total)):,}",
        f"central test {len(data.central_test):,}",
    ]
    if len(data.heldout_clients):
        facts.append(f"{len(data.heldout_clients):,} clients held out (▲)")
    if data.groups is not None:
        facts.append(f"{len(np.unique(data.groups))} planted groups")
    return fill(f"{data.name}: {', '.join(facts)}", width)
