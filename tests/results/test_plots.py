"""Pictures: the right numbers in them, nothing where there is nothing, odd data survive."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.results import contrasts, plots
from fedsim.results.blocks import Details, Picture, Pictures
from fedsim.results.groups import Runs
from fedsim.results.parts import tests
from fedsim.results.store import find_runs
from fedsim.results.summary import summarise


@pytest.fixture(scope="module")
def group(comparison: Path) -> Runs:
    return Runs(find_runs(comparison)).groups[0]


def words_in(picture: Picture) -> str:
    return " ".join(ET.fromstring(picture.svg).itertext())


def test_a_curve_is_mean_and_interval_over_seeds(tmp_path: Path, written: Any) -> None:
    for seed, shift in enumerate([0.0, 0.2]):
        rows = [
            {"accuracy": 0.1 + shift, "bytes_up": 0, "bytes_down": 0},
            {"bytes_up": 5 + seed, "bytes_down": 5},
            {"accuracy": 0.5 + shift, "bytes_up": 5},
        ]
        written(tmp_path / str(seed), "a", seed, rows)  # fmt: skip
    runs = Runs(find_runs(tmp_path))
    curve = plots.curve(runs, "a", "accuracy")
    assert curve is not None
    assert curve.x.tolist() == [0, 2]
    assert curve.mean == pytest.approx([0.2, 0.6])
    # t(0.975; 1) = 12.706 times 0.1414 / sqrt(2) = 1.2706
    assert curve.high - curve.mean == pytest.approx([1.2706, 1.2706], rel=1e-4)
    # totals by round 2: 15 and 16; one point alone is no curve
    assert plots.curve(runs, "a", "accuracy", "bytes") is None
    assert plots.curve(runs, "a", "loss") is None


def test_runs_that_measured_other_rounds_meet_in_the_common_ones(
    tmp_path: Path, written: Any
) -> None:
    for seed, every in enumerate([1, 2]):
        rows = [{"accuracy": i / 10 if i % every == 0 else None} for i in range(7)]
        written(tmp_path / str(seed), "a", seed, rows)
    curve = plots.curve(Runs(find_runs(tmp_path)), "a", "accuracy")
    assert curve is not None
    assert curve.x.tolist() == [0, 2, 4, 6]


def test_a_long_run_is_thinned_and_keeps_its_ends(tmp_path: Path, written: Any) -> None:
    written(tmp_path, "a", 0, [{"accuracy": i / 5000} for i in range(5000)])
    curve = plots.curve(Runs(find_runs(tmp_path)), "a", "accuracy")
    assert curve is not None
    assert len(curve.x) <= plots.POINTS
    assert (curve.x[0], curve.x[-1], curve.mean[-1]) == (0, 4999, 4999 / 5000)
    assert np.diff(curve.x).min() > 0


@pytest.mark.parametrize("axis", ["rounds", "bytes", "seconds"])
def test_curves_name_every_strategy(group: Runs, axis: plots.Axis) -> None:
    picture = plots.curves(group, "accuracy", axis, target=0.85)
    assert picture is not None
    assert picture.name == f"accuracy-{axis}"
    for label in group.compared:
        assert label in words_in(picture)
        assert label in picture.alt
    assert ("100 MB" in words_in(picture)) == (axis == "bytes")


def test_pictures_of_the_comparison(group: Runs) -> None:
    pairs = summarise(group).pairs
    pictures = [
        plots.seeds(group, "accuracy"),
        plots.clients_ecdf(group),
        plots.clients_spread(group),
        contrasts.differences(group, pairs, "accuracy"),
        contrasts.matrix(group, pairs, "accuracy"),
    ]
    for picture in pictures:
        assert picture is not None
        assert "FedLD" in words_in(picture)
        assert len(picture.svg) < 60_000
    assert "too few seeds" in words_in(pictures[3])  # type: ignore[arg-type]
    assert "FedLD − FedAvg" in words_in(pictures[3])  # type: ignore[arg-type]


def test_many_strategies_are_all_named_and_the_best_one_is_compared(
    tmp_path: Path, written: Any
) -> None:
    names = [f"strategy number {i} of many" for i in range(12)]
    for i, name in enumerate(names):
        for seed in range(2):
            rows = [{"accuracy": 0.1}, {"accuracy": 0.5 + i / 100 + seed / 1000}]
            written(tmp_path / f"{i}-{seed}", name, seed, rows)
    runs = Runs(find_runs(tmp_path))
    curve = plots.curves(runs, "accuracy")
    assert curve is not None
    box = ET.fromstring(curve.svg).get("viewBox")
    assert box is not None
    assert float(box.split()[-1]) > 12 * 2 * 14  # two lines a name
    section = tests.tests(runs)
    assert section is not None
    [shown] = [b for b in section.blocks if isinstance(b, Pictures)]
    [picture] = shown.pictures
    assert picture.alt.count(f"{names[-1]} − ") == 11
    assert picture.alt.count(" − ") == 11
    assert any(isinstance(b, Details) and b.summary == "All 66 pairs" for b in section.blocks)


def test_small_numbers_on_a_log_axis_are_written_out(tmp_path: Path, written: Any) -> None:
    written(tmp_path, "a", 0, [{"loss": 10.0 ** -(i / 10)} for i in range(31)])
    picture = plots.curves(Runs(find_runs(tmp_path)), "loss")
    assert picture is not None
    assert "0.01" in words_in(picture)
    assert "{" not in words_in(picture)


def test_the_same_runs_give_the_same_bytes(comparison: Path) -> None:
    def draw() -> list[str]:
        group = Runs(find_runs(comparison)).groups[0]
        drawn = [plots.curves(group, "accuracy"), plots.clients_ecdf(group)]
        return [picture.svg for picture in drawn if picture]

    assert draw() == draw()


def test_a_sweep(sweep: Path) -> None:
    groups = Runs(find_runs(sweep)).groups
    picture = plots.sweep(groups, "accuracy")
    assert picture is not None
    assert "data.partition.alpha" in words_in(picture)
    assert "10.0" in words_in(picture)
    assert plots.sweep(groups, "nothing") is None


def test_nothing_to_draw(tmp_path: Path, written: Any) -> None:
    written(tmp_path, "a", 0, [{"loss": 1.0}])
    runs = Runs(find_runs(tmp_path))
    assert plots.curves(runs, "loss") is None
    assert plots.curves(runs, "accuracy", "bytes") is None
    assert plots.seeds(runs, "accuracy") is None
    assert plots.clients_ecdf(runs) is None
    assert plots.clients_spread(runs) is None
    assert contrasts.differences(runs, [], "loss") is None
    assert contrasts.matrix(runs, [], "loss") is None


@pytest.mark.parametrize(
    "values",
    [
        [1.0, math.nan, math.nan, math.nan, math.nan, math.nan],
        [1.0, math.inf, 2.0, 3.0],
        [1e-8, 1.0, 1e8],
        [0.5, 0.5, 0.5],
        [-1.0, -2.0, -3.0],
        [True, False, True],
    ],
)
def test_odd_columns_are_drawn(tmp_path: Path, written: Any, values: list[float]) -> None:
    for seed in range(2):
        written(tmp_path / str(seed), "a", seed, [{"odd": value} for value in values])
    picture = plots.curves(Runs(find_runs(tmp_path)), "odd")
    assert picture is not None
    assert "nan" not in picture.svg.lower().replace("nano", "")


def test_odd_labels_are_drawn(tmp_path: Path, written: Any) -> None:
    labels = ["$x$", "_hidden", "<b>&amp;", "日本", "a much longer label than there is room for"]
    for label in labels:
        for seed in range(2):
            written(
                tmp_path / f"{labels.index(label)}{seed}", label, seed,
                [{"accuracy": 0.1}, {"accuracy": 0.5 + seed / 10}],
                clients=[{"round": 1, "client": 0, "eval_accuracy": 0.5}],
            )  # fmt: skip
    runs = Runs(find_runs(tmp_path))
    pairs = summarise(runs).pairs
    drawn = [
        plots.curves(runs, "accuracy"), plots.seeds(runs, "accuracy"), plots.clients_ecdf(runs),
        contrasts.matrix(runs, pairs, "accuracy"), contrasts.differences(runs, pairs, "accuracy"),
    ]  # fmt: skip
    for picture in drawn:
        assert picture is not None
        text = words_in(picture)
        for label in labels[:4]:
            assert label in text
