"""Pictures of the paired tests: differences with their intervals, and everyone against everyone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter

from fedsim.results import axes as ax
from fedsim.results import style, words
from fedsim.results.blocks import Picture
from fedsim.results.groups import Runs
from fedsim.results.statistics import Pair, by_size


def differences(runs: Runs, pairs: Sequence[Pair], column: str) -> Picture | None:
    """Paired differences with their intervals, the better strategy of each pair named first."""
    drawn = [
        (pair, pair.difference)
        for pair in by_size(pairs)
        if pair.difference is not None and np.isfinite(pair.difference.mean)
    ]
    if not drawn:
        return None
    told = "; ".join(f"{p.a} − {p.b}: {words.signed(d.mean, 3)}" for p, d in drawn)
    name = words.name(column)
    alt = f"Paired differences of the final {name} with 95 % CI. {told}."
    names = [f"{p.a} −\n{p.b}" if len(p.a + p.b) > 14 else f"{p.a} − {p.b}" for p, _ in drawn]
    with style.drawing():
        figure, axes = ax.rows(names, right=92)
        axes.axvline(0, color=style.INK[0], linewidth=1)
        for i, (pair, d) in enumerate(drawn):
            shade = style.colour(runs.colour(pair.a)) if pair.significant else style.MUTED[0]
            ax.interval_bar(axes, d, i, shade)
            told = f"p = {words.p_value(pair.p_holm)}".replace("= <", "<")
            axes.annotate(
                told if pair.enough else "too few seeds", (1, i), (10, 0), va="center_baseline",
                xycoords=("axes fraction", "data"), textcoords="offset points",
                color=shade, fontsize=11, fontweight=style.weight(pair.significant),
            )  # fmt: skip
        axes.margins(x=0.08)
        axes.set_xlabel(f"difference of the final {name}")
        picture = style.svg(figure, alt)
    caption = (
        "Paired differences over common seeds, better minus worse, with their 95 % confidence "
        "intervals (not corrected for the number of pairs); in colour where the Holm-corrected p "
        "value is at most 0.05."
    )
    return Picture(f"{words.slug(column)}-differences", picture, alt, caption)


def matrix(runs: Runs, pairs: Sequence[Pair], column: str) -> Picture | None:
    """Every strategy against every other: row minus column, marked where the test tells."""
    labels = [label for label in runs.compared if any(label in (p.a, p.b) for p in pairs)]
    if len(labels) < 3:
        return None
    k, place = len(labels), {label: i for i, label in enumerate(labels)}
    name = words.name(column)
    better = [f"{p.better} over {p.b if p.better == p.a else p.a}" for p in pairs if p.better]
    alt = f"Matrix of differences of the final {name}. Significant: {', '.join(better) or 'none'}."
    digits = words.decimals(p.difference for p in pairs)
    with style.drawing():
        left, cell = ax.room(labels) + 12, min(66.0, max(44.0, 264 / k))
        top = ax.LINE * max(ax.wrap(b, 10).count("\n") + 1 for b in labels) + 10
        figure, axes = style.canvas(top + cell * k + 8, left, 8, top, 8)
        axes.set(xlim=(0, k), ylim=(k, 0))
        for pair in pairs:
            d = pair.difference
            if d is None or not np.isfinite(d.mean):
                continue
            for row, col, sign in ((pair.a, pair.b, 1), (pair.b, pair.a, -1)):
                wins = (sign * d.mean > 0) == pair.higher_is_better
                shade = style.SERIES[0 if wins else 1][0]
                x, y = place[col], place[row]
                axes.fill_between(
                    [x + 0.02, x + 0.98], y + 0.03, y + 0.97, facecolor=shade, linewidth=0,
                    alpha=0.34 if pair.significant else 0.08,
                )  # fmt: skip
                p = f"p = {words.p_value(pair.p_holm)}".replace("= <", "<")
                centred: Any = {"ha": "center", "va": "center_baseline"}
                weight = style.weight(pair.significant)
                axes.text(
                    x + 0.5,
                    y + 0.42,
                    words.signed(sign * d.mean, digits),
                    fontweight=weight,
                    **centred,
                )
                told = p if pair.enough else "too few seeds"
                axes.text(x + 0.5, y + 0.76, told, fontsize=10, color=style.MUTED[0], **centred)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        middle = FixedLocator([i + 0.5 for i in range(k)])
        axes.xaxis.set_major_locator(middle)
        axes.yaxis.set_major_locator(middle)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda _, i: ax.wrap(labels[i], 10)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda _, i: ax.wrap(labels[i])))
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=12, labelcolor=style.INK[0])
        ax.colour_row_names(axes, [runs.colour(label) for label in labels])
        picture = style.svg(figure, alt)
    caption = (
        f"Final {name} of the row's strategy minus the column's; blue: the row is better, orange: "
        "worse; full colour where the Holm-corrected p value is at most 0.05."
    )
    return Picture(f"{words.slug(column)}-matrix", picture, alt, caption)
