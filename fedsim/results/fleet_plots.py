"""The fleet's timeline: when which device worked, who was late, who dropped out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedsim.config import slug
from fedsim.results import style
from fedsim.results.blocks import Picture

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """What one device did in one round.

    Attributes:
        client: partition number.
        device: its profile.
        start: simulated seconds since the run began.
        seconds: how long it took; 0 if it dropped out.
        status: `ok`, `late`, `refused` or `error`.
    """

    client: int
    device: str
    start: float
    seconds: float
    status: str


def timeline(label: str, jobs: Sequence[Job], ends: Sequence[float]) -> Picture:
    """A Gantt chart: a line for each client, a bar for each job; late ones grey.

    Args:
        label: the strategy.
        jobs: of the rounds shown.
        ends: when these rounds ended, in simulated seconds.
    """
    kinds = list(dict.fromkeys(job.device for job in jobs))
    clients = sorted({(kinds.index(job.device), job.client) for job in jobs})
    place = {client: line for line, (_, client) in enumerate(clients)}
    late = sum(job.status == "late" for job in jobs)
    gone = sum(job.status == "error" for job in jobs)
    alt = (
        f"Timeline of {len(clients)} devices over {len(ends)} rounds of {label}: {len(jobs)} jobs, "
        f"{late} late, {gone} dropped out."
    )
    thick = max(0.8, min(7.0, 200.0 / len(clients)))
    with style.drawing():
        figure, axes = style.canvas(right=110)
        for job in jobs:
            line = place[job.client]
            if job.status == "error":
                axes.plot(job.start, line, "x", color=style.INK[0], markersize=4)
                continue
            colour = style.colour(kinds.index(job.device))
            colour = style.MUTED[0] if job.status == "late" else colour
            axes.hlines(line, job.start, job.start + job.seconds, color=colour, linewidth=thick)
        for end in ends:
            axes.axvline(end, color=style.MUTED[0], linewidth=0.8, linestyle="--")
        for number, kind in enumerate(kinds):
            lines = [place[client] for k, client in clients if k == number]
            axes.annotate(
                kind,
                (1.0, float(np.mean(lines))),
                (6, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                color=style.colour(number),
                fontsize=10,
                annotation_clip=False,
            )
        first = min(job.start for job in jobs)
        axes.set_xlim(first, max(ends[-1], first + 1e-9) * 1.02)
        axes.set_ylim(len(clients) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(visible=False)
        style.title(axes, "devices, by kind")
        axes.set_xlabel("simulated seconds")
        picture = style.svg(figure, alt)
    caption = (
        f"{label}, first seed: a bar from the message to the reply, grey where the reply was late, "
        "a cross where the device dropped out; dashed: the end of a round."
    )
    return Picture(f"timeline-{slug(label)}", picture, alt, caption)
