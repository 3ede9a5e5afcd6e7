"""Sections are found by name, ordered, and can be added without touching the report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fedsim.core.errors import ConfigError
from fedsim.results import sections
from fedsim.results.blocks import Details, Picture, Pictures, Raw, Section, Text
from fedsim.results.groups import Runs
from fedsim.results.report import write_report
from fedsim.results.sections import section

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><g id="a"/></svg>'


@section(order=150)
def clusters(runs: Runs) -> Section | None:
    picture = Picture("tree", SVG, "A tree.", "The tree of clusters.")
    blocks = (
        Text("Who is with whom."),
        Raw("<hr>", "---"),
        Details("More", (Pictures((picture,)),)),
    )
    return Section("Clusters", blocks, {"labels": list(runs.labels)})


@pytest.fixture
def registered() -> Iterator[None]:
    sections.register("clusters", clusters)
    yield
    sections.unregister("clusters")


def test_every_built_in_section_resolves_in_order() -> None:
    found = sections.entries()
    assert [entry.name for entry in found] == list(sections.BUILTIN)
    assert [entry.order for entry in found] == sorted(entry.order for entry in found)
    assert all(entry.make.__doc__ for entry in found)


def test_a_section_of_ones_own(registered: None, small: Path, tmp_path: Path) -> None:
    html, markdown = write_report(small, tmp_path)
    text = html.read_text()
    places = [text.index(f">{title}</h2>") for title in ("Result", "Clusters", "Course")]
    assert places == sorted(places)
    assert '<g id="clusters-tree-a"/>' in text
    assert "![A tree.](report_files/clusters-tree.svg)" in markdown.read_text()
    assert "\n---\n" in markdown.read_text()
    assert (tmp_path / "report_files/clusters-tree.svg").is_file()
    assert '"clusters"' in (tmp_path / "comparison.json").read_text()


def test_a_built_in_section_can_be_replaced_and_silenced() -> None:
    sections.register("outcome", lambda runs: None)
    try:
        [entry] = [entry for entry in sections.entries() if entry.name == "outcome"]
        assert (entry.order, entry.scope) == (550, "setting")
    finally:
        sections.unregister("outcome")


def test_a_section_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("plugged")
    module.clusters = clusters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plugged", module)
    monkeypatch.setattr(sections, "_entry_points", lambda: {"clusters": "plugged:clusters"})
    assert [e.name for e in sections.entries()][1:4] == ["outcome", "clusters", "curves"]


@pytest.mark.parametrize(
    "target", ["nowhere:x", "fedsim.results.words:x", "fedsim.results.words:NONE"]
)
def test_a_wrong_name_is_told(target: str) -> None:
    sections.register("wrong", target)
    try:
        with pytest.raises(ConfigError, match=f"report section 'wrong' is '{target}'"):
            sections.entries()
    finally:
        sections.unregister("wrong")
