"""Colours that can be told apart and read, and SVG that is small, steady and themed."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest

from fedsim.results import axes as ax
from fedsim.results import style

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
SIGHT = {
    "common": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
PAGES = ("#ffffff", "#0f1419")


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ rgb.clip(0, 1))


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_the_first_six_colours_stay_apart(sight: str, page: int) -> None:
    seen = [oklab(np.array(SIGHT[sight]) @ linear(pair[page])) for pair in style.SERIES[:6]]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 0.08


@pytest.mark.parametrize("page", [0, 1], ids=["light", "dark"])
def test_contrast(page: int) -> None:
    for pair in style.SERIES:
        assert contrast(pair[page], PAGES[page]) >= 3  # WCAG 1.4.11, graphical objects
    for role in (style.INK, style.MUTED):
        assert contrast(role[page], PAGES[page]) >= 4.5  # WCAG 1.4.3, text


def test_more_strategies_than_colours_differ_in_dashes() -> None:
    looks = [(style.colour(i), style.dash(i)) for i in range(16)]
    assert len({repr(look) for look in looks}) == 16


def draw(label: str = "α <b> & $x_1$") -> str:
    with style.drawing():
        figure, axes = style.canvas()
        axes.plot([0, 1 / 3, 1], [0, 0.12345678, 1], color=style.colour(0))
        axes.plot([0.5], [0.5], "o", color=style.colour(1))
        axes.fill_between([0, 1], [0, 0], [1, 1], facecolor=style.colour(2), alpha=0.2)
        style.title(axes, label)
        return style.svg(figure, 'shows "x" > y')


def test_svg_is_well_formed_small_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw()
    monkeypatch.setitem(mpl.rcParams, "font.size", 30)
    monkeypatch.setitem(mpl.rcParams, "svg.hashsalt", "another")
    assert draw() == first
    assert mpl.rcParams["font.size"] == 30
    root = ET.fromstring(first)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'shows "x" > y'
    assert "α <b> & $x_1$" in "".join(root.itertext())
    assert "0.12345678" not in first
    assert "DejaVu" not in first
    assert "<style" not in first
    assert len(first) < 8000


def test_only_identifiers_that_are_used_remain_and_get_the_prefix() -> None:
    inline = style.inline(draw(), "p-")
    names = {e.get("id") for e in ET.fromstring(inline).iter() if e.get("id")}
    assert names
    assert all(name.startswith("p-") for name in names)
    for name in names:
        assert f"url(#{name})" in inline or f'href="#{name}"' in inline


def test_every_colour_has_a_dark_twin_that_reaches_it() -> None:
    """What stands under `<defs>` is drawn by `<use>`: page styles reach only the latter."""
    svg, css = draw(), style.dark_css()
    for element in ET.fromstring(svg).iter():
        look = element.get("style") or ""
        assert not (element.get("id") and look)
        for part in look.split("; "):
            if part.startswith(("fill: #", "stroke: #")):
                assert f'[style*="{part}"]' in css


def test_a_file_of_its_own_carries_its_style() -> None:
    alone = style.standalone(draw())
    assert "prefers-color-scheme:dark" in alone
    assert ET.fromstring(alone).get("viewBox") == "0 0 480 320"


def test_labels_at_line_ends_do_not_overlap() -> None:
    places = ax._apart(np.array([30.0, 31.0, 32.0, 100.0]), np.full(4, 14.0), 200)
    assert np.diff(places).min() >= 14 - 1e-9
    assert places[:3].mean() == pytest.approx(31)
    assert places[3] == 100


def test_labels_at_line_ends_stay_on_the_picture() -> None:
    heights = np.array([14.0, 28.0, 14.0])
    for y in (0.0, 50.0, 100.0):
        places = ax._apart(np.full(3, y), heights, 100)
        assert (places - heights / 2).min() >= 0
        assert (places + heights / 2).max() <= 100
        assert np.diff(places).tolist() == [21, 21]


def test_long_labels_are_wrapped() -> None:
    assert ax.wrap("FedAvg with a tuned server rate") == "FedAvg with a\ntuned server rate"
    assert ax.room(["FedAvg with a tuned server rate"]) < 170
