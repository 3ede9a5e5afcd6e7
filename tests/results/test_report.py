"""The report: complete, self-contained, accessible, the same bytes from the same folders."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsim.core.errors import RunError
from fedsim.results.report import summary_table, write_report
from fedsim.results.store import Run, find_runs

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks nesting while reading; keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert write_report(comparison, out) == (out / "report.html", out / "report.md")
    return out


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "report.html").read_text())


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_nothing_is_fetched_and_nothing_runs(report: Path, page: Page) -> None:
    text = (report / "report.html").read_text()
    assert not page.all("script")
    assert not page.all("link")
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert len(text) < 500_000


def test_it_is_accessible(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(names) == len(set(names))
    for anchor in page.all("a"):
        assert anchor["href"] is not None
        assert anchor["href"][1:] in names
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    for head in page.all("th"):
        assert head["scope"] in ("col", "row")
    assert len(page.all("caption")) == len(page.all("table"))
    for picture in page.all("svg"):
        assert picture["role"] == "img"
        assert len(picture["aria-label"] or "") > 30
    assert len(page.all("figcaption")) == len(page.all("svg")) >= 12


def test_it_says_everything(page: Page) -> None:
    text = " ".join(" ".join(page.text).split())
    for words in (
        "FedLD ends with the highest accuracy",
        "not enough seeds to tell",
        "reached accuracy 0.85",
        "fc.weight holds NaN",
        "out of <memory> | disk",
        "stopped by Ctrl-C",
        "Not counted, because not finished: 1 run of FedProx (interrupted)",
        "15 of 30",
        "0123456789abcdef0123456789abcdef01234567",
        "data.partition.alpha",
        "kept directions",
        "accuracy of the worst 10 % of clients",
        "dirichlet",
        "2.13.0",
    ):
        assert words in text


def test_the_markdown_twin(report: Path) -> None:
    text = (report / "report.md").read_text()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 9
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert len(pictures) == len(set(pictures)) >= 12
    for name in pictures:
        assert ET.parse(report / name).getroot().tag.endswith("svg")
    assert sorted(p.name for p in (report / "report_files").iterdir()) == sorted(
        Path(name).name for name in pictures
    )
    assert "out of &lt;memory&gt; \\| disk" in text
    assert "\n\n\n" not in text


def test_all_numbers_are_in_the_json(report: Path) -> None:
    content = json.loads((report / "comparison.json").read_text())
    assert content["format"] == 1
    [setting] = content["settings"]
    lines = {line["label"]: line for line in setting["outcome"]["strategies"]}
    assert list(lines) == ["FedAvg", "FedProx", "SCAFFOLD", "FedLD"]
    assert lines["FedProx"]["final"]["n"] == 4
    assert lines["FedLD"]["reach"]["reached"] == 5
    assert len(setting["tests"]["accuracy"]) == 6
    assert setting["tests"]["accuracy"][0]["verdict"] == "not enough seeds to tell"
    assert {reason["reason"] for reason in setting["refused"]["reasons"]} >= {"not_finite", "late"}
    assert content["runs"]["finished"] == 19
    assert content["runs"]["unfinished"][0]["label"] == "FedProx"
    assert content["provenance"]["data_fingerprints"][0]["seed"] == 0


def test_the_same_folders_give_the_same_bytes(
    report: Path, comparison: Path, tmp_path: Path
) -> None:
    """In another process, with other hashes, from another place, twice into one folder."""
    moved = shutil.copytree(comparison, tmp_path / "elsewhere")
    for timings in moved.rglob("timings.parquet"):
        timings.unlink()
    out = tmp_path / "out"
    (out / "report_files").mkdir(parents=True)
    (out / "report_files" / "stale.svg").write_text("")
    code = "import sys; from fedsim.results.report import write_report; write_report(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", code, str(moved), str(out)]
    subprocess.run(command, check=True, env=environment)
    assert digest(out) == digest(report)


def test_order_and_form_of_what_is_given_do_not_matter(small: Path, tmp_path: Path) -> None:
    folders = sorted(small.iterdir(), reverse=True)
    write_report(small, tmp_path / "a")
    write_report([*map(Run.load, folders[:2]), *folders[2:]], tmp_path / "b")  # type: ignore[list-item]
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_it_may_lie_among_the_runs(small: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(small, tmp_path / "runs")
    html, _ = write_report(moved, moved)
    first = html.read_bytes()
    write_report(moved, moved)
    assert html.read_bytes() == first


def test_a_sweep_has_a_chapter_for_each_value(sweep: Path, tmp_path: Path) -> None:
    html, markdown = write_report(sweep, tmp_path, title="A <sweep>")
    text = html.read_text()
    assert "<h1>A &lt;sweep&gt;</h1>" in text
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    values = [f"data.partition.alpha = {alpha}" for alpha in (0.1, 1.0, 10.0)]
    assert titles == [
        "Across data.partition.alpha", *values, "Runs", "Configuration", "Provenance",
    ]  # fmt: skip
    page = Page(text)
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(names) == len(set(names))
    assert "## data.partition.alpha = 1.0" in markdown.read_text()
    assert (tmp_path / "report_files/3-outcome-accuracy-rounds.svg").is_file()
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert [s["setting"]["data.partition.alpha"] for s in content["settings"]] == [0.1, 1.0, 10.0]


@pytest.mark.parametrize("kind", ["perplexity", "mse"])
def test_strategies_without_accuracy(inventor: Any, tmp_path: Path, kind: str) -> None:
    folder = inventor(tmp_path / "runs", labels=("FedAvg", "FedLD"), seeds=2, rounds=4, kind=kind)
    html, markdown = write_report(folder, tmp_path)
    text = html.read_text()
    metric = "loss" if kind == "mse" else kind
    pictures = re.findall(r"\((report_files/.+?)\.svg\)", markdown.read_text())
    assert pictures[0] == f"report_files/outcome-{metric}-bytes"
    assert pictures.index(f"report_files/curves-{metric}-rounds") > 0
    assert f"FedLD ends with the lowest {metric}" in text
    assert '<h2 id="clients-title">' not in text
    assert "No target was set, so it is the mean final value of FedAvg." in text


def test_the_loss_is_drawn_against_bytes_where_they_differ(inventor: Any, tmp_path: Path) -> None:
    """Also of studies that are judged by accuracy."""
    for labels in (("FedAvg", "SCAFFOLD"), ("FedAvg", "FedProx")):
        place = tmp_path / labels[1]
        folder = inventor(place / "runs", labels=labels, seeds=2, rounds=4, clients=10)
        write_report(folder, place)
        there = (place / "report_files" / "curves-loss-bytes.svg").is_file()
        assert there == ("SCAFFOLD" in labels)


def test_strategies_may_lack_what_others_have(tmp_path: Path, written: Any) -> None:
    evaluate = {"evaluate": {"metric": "accuracy"}}
    client = {"round": 1, "client": 0, "eval_accuracy": 0.4}
    for seed in range(2):
        rows = [{"accuracy": 0.1}, {"accuracy": 0.5 + seed / 10, "cluster_ari": 0.9}]
        written(tmp_path / f"a{seed}", "with", seed, rows, config=evaluate)
        rows = [{"client_accuracy": 0.2}, {"client_accuracy": 0.4}]
        written(tmp_path / f"b{seed}", "without", seed, rows, clients=[client], config=evaluate)
    _, markdown = write_report(tmp_path, tmp_path)
    text = markdown.read_text()
    assert "| with | 2 | 0.550 ± 0.635 |" in text
    assert "| without | 2 | – |" in text


def test_one_run(comparison: Path, tmp_path: Path) -> None:
    html, _ = write_report(comparison / "fedavg-seed0", tmp_path)
    text = html.read_text()
    assert "FedAvg ends at accuracy 0.863 (1 seed)." in text
    assert "One seed gives no confidence interval." in text
    assert "Are the differences real?" not in text
    assert "19 not here" in text


def test_no_finished_run(comparison: Path, tmp_path: Path) -> None:
    html, _ = write_report(comparison / "fedprox-seed4", tmp_path)
    assert "No run has finished yet." in html.read_text()
    assert summary_table(comparison / "fedprox-seed4").row_count == 0


def test_runs_of_one_seed_with_different_data_are_called_out(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "runs")
    path = folder / "fedprox-seed1" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "data_fingerprint": "0" * 64}))
    html, _ = write_report(folder, tmp_path / "out")
    assert "Runs of the same seed had different data (seed 1)" in html.read_text()


def test_a_run_that_diverged(tmp_path: Path, written: Any) -> None:
    for seed in range(3):
        bad = float("nan") if seed == 1 else 1.0
        written(tmp_path / f"a{seed}", "a", seed, [{"loss": 2.0}, {"loss": bad}])
        written(tmp_path / f"b{seed}", "b", seed, [{"loss": 2.0}, {"loss": 1.5 + seed}])
    html, _ = write_report(tmp_path, tmp_path)
    text = html.read_text()
    assert "diverged" in text
    assert "a run diverged" in text
    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)


def test_markup_in_names_stays_text(tmp_path: Path, written: Any) -> None:
    config = {"experiment": {"name": "<script>x</script>", "seeds": [0]}}
    reason = "code: <img src=x onerror=alert(1)> | `x` *y*"
    clients = [{"round": 1, "client": 0, "status": "refused", "reason": reason}]
    rows = [{"accuracy": 0.1, "<b>col</b>": 1.0}, {"accuracy": 0.2, "<b>col</b>": 2.0}]
    written(tmp_path, "<u>l</u>", 0, rows, clients=clients, config=config)
    html, _ = write_report(tmp_path, tmp_path)
    page = Page(html.read_text())
    assert {"script", "img", "b", "u"}.isdisjoint(tag for tag, _ in page.tags)


def test_where_there_is_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        write_report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="no folder was given"):
        write_report([], tmp_path)


def test_a_damaged_table_stops_the_report_by_name(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "runs")
    (folder / "fedprox-seed1" / "clients.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"fedprox-seed1/clients\.parquet is damaged"):
        write_report(folder, tmp_path / "out")


def test_the_table_for_the_terminal(comparison: Path, sweep: Path) -> None:
    console = Console(width=160, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(summary_table(find_runs(comparison)))
    console.print(summary_table(sweep))
    text = console.export_text()
    assert re.search(r"FedLD +│ +5 │ +0\.917 ± 0\.018 │", text)
    assert "FedLD ends with the highest accuracy" in text
    assert "data.partition.alpha = 10.0" in text
    assert "10 (5/5)" in text


@pytest.mark.slow
def test_a_thousand_rounds_in_seconds(inventor: Any, tmp_path: Path) -> None:
    folder = inventor(tmp_path / "runs", rounds=1000)
    start = time.process_time()
    html, _ = write_report(folder, tmp_path / "out")
    assert time.process_time() - start < 5
    assert html.stat().st_size < 3_000_000
