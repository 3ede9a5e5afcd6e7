"""The report: one HTML file that needs nothing else, its Markdown twin, and all numbers as JSON.

It reads run folders only and holds no wall-clock time, so the same folders give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.table import Table as RichTable
from rich.text import Text as RichText

from fedsim.results import style, words
from fedsim.results.blocks import Section
from fedsim.results.files import make_folder, write_text
from fedsim.results.groups import Runs
from fedsim.results.sections import entries
from fedsim.results.store import Run, find_runs
from fedsim.results.summary import finding, summarise

FORMAT = 1
"""Version of `comparison.json`."""

PICTURES = "report_files"
"""Folder of the Markdown twin's pictures, beside it."""


@dataclass(frozen=True)
class Placed:
    """A section with its name in the registry and a prefix that no other section has."""

    name: str
    prefix: str
    section: Section


@dataclass(frozen=True)
class Chapter:
    """The sections of one setting, or of the whole where `title` is empty."""

    title: str
    anchor: str
    setting: Mapping[str, Any]
    sections: Sequence[Placed]


def write_report(
    runs: Iterable[Run] | Iterable[str | Path] | str | Path,
    out_dir: str | Path,
    title: str | None = None,
) -> tuple[Path, Path]:
    """Write `report.html`, `report.md`, its pictures and `comparison.json` into a folder.

    Args:
        runs: runs, or folders at or below which they are.
        out_dir: where to; made if it is not there.
        title: heading of the report; the experiment's name where none is given.

    Returns:
        Paths of the HTML and of the Markdown file.

    Raises:
        RunError: no run is found, one is damaged, or the folder cannot be written to.
    """
    whole, out = _runs(runs), Path(out_dir)
    chapters = _chapters(whole)
    head = {
        "title": title or words.listed(_distinct(whole, "name")) or "Comparison",
        "description": " ".join(_distinct(whole, "description")),
        "facts": _facts(whole),
        "chapters": chapters,
    }
    pictures = {
        f"{placed.prefix}{picture.name}.svg": style.standalone(picture.svg)
        for chapter in chapters
        for placed in chapter.sections
        for picture in placed.section.pictures
    }
    templates = _templates()
    make_folder(out / PICTURES)
    for old in set((out / PICTURES).glob("*.svg")) - {out / PICTURES / name for name in pictures}:
        old.unlink()
    for name, text in pictures.items():
        write_text(out / PICTURES / name, text)
    write_text(out / "report.html", templates.get_template("report.html").render(head))
    write_text(out / "report.md", templates.get_template("report.md").render(head))
    write_text(out / "comparison.json", _json(head))
    return out / "report.html", out / "report.md"


def summary_table(runs: Iterable[Run] | Iterable[str | Path] | str | Path) -> RichTable:
    """The strategies' main numbers for the terminal, with the finding below."""
    whole = _runs(runs)
    table = RichTable(title="Comparison", title_justify="left", caption_justify="left")
    several = len(whole.groups) > 1
    for column in (*(["setting"] if several else []), "strategy"):
        table.add_column(column, no_wrap=True)
    summaries = [(group, summarise(group)) for group in whole.groups]
    metric = next((words.name(s.metric) for _, s in summaries if s.lines), "metric")
    heads = (
        "seeds",
        f"final {metric}",
        f"best {metric}",
        "worst 10 % of clients",
        "bytes",
        "rounds to target",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for group, summary in summaries:
        digits = words.decimals(line.final for line in summary.lines)
        for line in summary.lines:
            reach = line.reach
            cells = [
                line.label,
                str(len(line.seeds)),
                words.plus_minus(line.final, digits),
                words.plus_minus(line.best, digits),
                words.plus_minus(line.clients["worst10"], digits),
                words.size(line.bytes_up + line.bytes_down),
                f"{words.number(reach.rounds)} ({reach.reached}/{reach.n})"
                if reach
                else words.NONE,
            ]
            row = [group.name, *cells] if several else cells
            table.add_row(*(RichText(cell) for cell in row))
        table.add_section()
    findings = [f"{g.name}: {finding(s)}" if several else finding(s) for g, s in summaries]
    table.caption = RichText("\n".join(findings))
    return table


def _runs(runs: Iterable[Run] | Iterable[str | Path] | str | Path) -> Runs:
    if isinstance(runs, str | Path):
        return Runs(find_runs(runs))
    given = list(runs)
    loaded = [run for run in given if isinstance(run, Run)]
    paths = [path for path in given if not isinstance(path, Run)]
    return Runs([*loaded, *(find_runs(paths) if paths or not loaded else [])])


def _chapters(whole: Runs) -> list[Chapter]:
    """Sections for the whole that come first, a chapter for each setting, the other sections."""
    made = entries()
    several = len(whole.groups) > 1
    chapters = []
    for number, group in enumerate(whole.groups, 1):
        prefix = f"{number}-" if several else ""
        placed = [
            Placed(entry.name, f"{prefix}{entry.name}-", section)
            for entry in made
            if entry.scope == "setting" and (section := entry.make(group)) is not None
        ]
        chapters.append(Chapter(group.name, f"setting-{number}", group.setting, placed))
    around = [
        (entry.order, Placed(entry.name, f"{entry.name}-", section))
        for entry in made
        if entry.scope == "whole" and (section := entry.make(whole)) is not None
    ]
    first = Chapter("", "first", {}, [placed for order, placed in around if order < 100])
    last = Chapter("", "last", {}, [placed for order, placed in around if order >= 100])
    return [first, *chapters, last]


def _distinct(runs: Runs, key: str) -> list[str]:
    texts = [str((run.experiment.get("experiment") or {}).get(key) or "") for run in runs]
    return [text for text in dict.fromkeys(texts) if text]


def _facts(runs: Runs) -> list[tuple[str, str]]:
    """What kind of study this is, in a few pairs of a name and a value."""

    def component(section: str, key: str) -> str | None:
        value = runs.option(section, key)
        return value.get("name") if isinstance(value, dict) else value

    models: list[Any] = [run.experiment.get("model") for run in runs]
    model = next((model for model in models if model), None)
    facts = {
        "strategies": len({run.label for run in runs}),
        "seeds": len({run.seed for run in runs}),
        "rounds": runs.option("experiment", "rounds"),
        "clients": runs.option("data", "clients"),
        "dataset": component("data", "dataset"),
        "partition": component("data", "partition"),
        "model": model.get("name") if isinstance(model, dict) else model,
    }
    return [
        (name, f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in facts.items()
        if value is not None
    ]


def _json(head: Mapping[str, Any]) -> str:
    chapters: list[Chapter] = head["chapters"]
    content = {
        "format": FORMAT,
        "title": head["title"],
        "settings": [
            {"setting": c.setting, **{p.name: p.section.data for p in c.sections if p.section.data}}
            for c in chapters[1:-1]
        ],
        **{p.name: p.section.data for c in (chapters[0], chapters[-1]) for p in c.sections},
    }
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """NaN and infinity as null, tuples as lists, keys as text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedsim.results"),
        autoescape=lambda name: name is None or ".md" not in name,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = _markdown
    environment.filters["inline"] = lambda svg, prefix: Markup(style.inline(svg, prefix))
    environment.globals.update(
        series=style.SERIES, roles=style.ROLES, font=Markup(style.FONT), pictures=PICTURES,
        dark_css=Markup(style.dark_css("svg ")), colours=len(style.SERIES),
    )  # fmt: skip
    return environment


def _markdown(text: str) -> str:
    """Text in which nothing is markup, on one line."""
    for mark in "\\|*`[<>":
        text = text.replace(mark, {"<": "&lt;", ">": "&gt;"}.get(mark, f"\\{mark}"))
    return " ".join(text.split())
