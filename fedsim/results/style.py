"""How pictures look: colours for light and dark pages, one canvas, small SVG with steady bytes.

Strategies keep their colour through the whole report. The first six colours stay apart under
deuteranopia, protanopia and tritanopia (tests/results/test_style.py); labels stand at the lines and
dashes repeat the distinction, so that nothing hangs on colour alone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SERIES = (
    ("#0e60ca", "#5ea6ff"),
    ("#b86e00", "#f0ae2e"),
    ("#99336f", "#ea62a8"),
    ("#1f4d12", "#7be0a4"),
    ("#4a938b", "#d3efff"),
    ("#3f0f7a", "#8452e6"),
    ("#d4687f", "#ff8f7a"),
    ("#6b6b6b", "#98a2ad"),
)
"""Colours of strategies on light and on dark pages; with more than eight they repeat, dashed."""

INK = ("#1f2328", "#e6edf3")
MUTED = ("#59636e", "#9aa4b0")
FAINT = ("#d0d7de", "#353d47")
ROLES = {"ink": INK, "muted": MUTED, "faint": FAINT}

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedsim",
    "font.size": 12.0,
    "axes.edgecolor": MUTED[0],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED[0],
    "axes.labelsize": 12.0,
    "axes.labelpad": 5.0,
    "text.parse_math": False,
    "grid.color": FAINT[0],
    "grid.linewidth": 0.6,
    "xtick.color": MUTED[0],
    "ytick.color": MUTED[0],
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "text.color": INK[0],
    "lines.linewidth": 2.0,
    "path.simplify_threshold": 0.2,
}


def colour(index: int) -> str:
    """A strategy's colour on light pages; the page's style maps it to the one on dark pages."""
    return SERIES[index % len(SERIES)][0]


def dash(index: int) -> object:
    """A strategy's line style: solid for the first four, so that a colour is never alone."""
    return DASHES[(index // 4) % len(DASHES)]


def weight(strong: bool) -> str:
    """Weight of text that may stand out."""
    return "bold" if strong else "normal"


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in our style, whatever the user's matplotlibrc says; then restore it."""
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts may well have it
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def canvas(
    height: float = 320, left: float = 56, right: float = 96, top: float = 34, bottom: float = 46
) -> tuple[Figure, Axes]:
    """A figure 480 units wide with one pair of axes; margins in units (pixels at full width)."""
    width = 480.0
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(box)
    axes.tick_params(length=3)
    return figure, axes


def title(axes: Axes, text: str, at: float = 0.0) -> None:
    """The y axis's name, set level above it; `at` is where it starts, in figure units."""
    figure = axes.figure
    height = figure.get_size_inches()[1] * 72  # type: ignore[union-attr]
    figure.text(at / 480, 1 - 15 / height, text, color=MUTED[0], va="baseline", fontsize=12)


def svg(figure: Figure, alt: str) -> str:
    """The figure as a small `<svg>` element whose bytes depend on nothing but what is drawn.

    Fonts are the reader's. Identifiers that nothing refers to are dropped, coordinates rounded to
    a hundredth of a unit.
    """
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().decode()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.S)
    body = re.sub(r'<path d="[^"]*" style="fill: none"/>', "", body)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", body))
    body = re.sub(r"<[^>]+>", lambda tag: _tidy(tag[0], used), body)
    body = re.sub(r">\s+<", "><", body)
    while (shorter := re.sub(r"<g></g>|<defs></defs>", "", body)) != body:
        body = shorter
    width, height = (round(72 * float(inches)) for inches in figure.get_size_inches())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(alt)}">{body.strip()}'
    )


def _tidy(tag: str, used: set[str]) -> str:
    tag = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", tag)
    if ' id="' in tag:  # a shape drawn by <use>, which has the style; the dark one must reach it
        tag = re.sub(r' style="[^"]*"', "", tag)
    tag = re.sub(r"font-family: [^;\"]*?sans-serif;? ?", "", tag)
    tag = tag.replace("font-weight: 700", "font-weight: 600")
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag)
    return " ".join(tag.split())


def dark_css(scope: str = "") -> str:
    """CSS rules that give every colour its dark twin; `scope` is a selector with a space after."""
    return "".join(
        f'{scope}[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in (*SERIES, *ROLES.values())
        for what in ("fill", "stroke")
    )


def standalone(picture: str) -> str:
    """An `<svg>` element as a file of its own, which follows the reader's light or dark setting."""
    style = (
        f"text{{font-family:{FONT}}}*{{stroke-linejoin:round}}"
        f"@media screen and (prefers-color-scheme:dark){{{dark_css()}}}"
    )
    head, tail = picture.split(">", 1)
    return f"{head}><style>{style}</style>{tail}\n"


def inline(picture: str, prefix: str) -> str:
    """An `<svg>` element for a page that holds others: its identifiers begin with `prefix`."""
    for before in (' id="', "url(#", 'href="#'):
        picture = picture.replace(before, f"{before}{prefix}")
    return picture
