"""The numbers of a comparison and the sentence that says what they mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.results.clients import client_column, facts, spread
from fedsim.results.groups import Runs
from fedsim.results.statistics import mean_interval
from fedsim.results.store import find_runs
from fedsim.results.summary import Summary, finding, summarise

EVALUATE = {"metric": "accuracy", "target": 0.5}


def study(
    folder: Path, written: Any, finals: dict[str, list[float]], column: str = "accuracy"
) -> Summary:
    evaluate = {"metric": column, "target": None}
    for label, values in finals.items():
        for seed, value in enumerate(values):
            rows = [{column: 0.0}, {column: value}]
            written(folder / f"{label}{seed}", label, seed, rows, config={"evaluate": evaluate})
    return summarise(Runs(find_runs(folder)))


def test_a_line_by_hand(tmp_path: Path, written: Any) -> None:
    curves = {0: [0.1, 0.5, 0.4], 1: [0.1, 0.4, 0.6]}
    for seed, curve in curves.items():
        rows = [
            {"accuracy": v, "bytes_up": 10 * i, "bytes_down": 20 * i, "seconds": 1.0 * (i > 0),
             "client_seconds": 3.0 * (i > 0)}
            for i, v in enumerate(curve)
        ]  # fmt: skip
        written(tmp_path / str(seed), "a", seed, rows, config={"evaluate": EVALUATE})
    [line] = summarise(Runs(find_runs(tmp_path))).lines
    assert line.final == mean_interval([0.4, 0.6])
    assert line.best == mean_interval([0.5, 0.6])
    # trapezoids over two rounds: (0.3 + 0.45) / 2 and (0.25 + 0.5) / 2
    assert line.mean_over_rounds == mean_interval([0.375, 0.375])
    # per run 10 + 20 up, 20 + 40 down, two rounds of 1 s and of 3 client-seconds
    assert (line.bytes_up, line.bytes_down) == (30, 60)
    assert (line.seconds, line.client_seconds) == (2, 6)
    # seed 0 is at 0.5 in round 1 (30 bytes), seed 1 in round 2 (90 bytes)
    assert line.reach is not None
    assert (line.reach.reached, line.reach.n) == (2, 2)
    assert (line.reach.rounds, line.reach.bytes, line.reach.client_seconds) == (1.5, 60, 4.5)
    assert line.values == {0: 0.4, 1: 0.6}


def test_a_run_that_never_reaches_the_target_counts(tmp_path: Path, written: Any) -> None:
    for seed, top in enumerate([0.6, 0.4, 0.4]):
        rows = [{"accuracy": 0.1}, {"accuracy": top}]
        written(tmp_path / str(seed), "a", seed, rows, config={"evaluate": EVALUATE})
    [line] = summarise(Runs(find_runs(tmp_path))).lines
    assert line.reach is not None
    assert (line.reach.reached, line.reach.n, line.reach.rounds) == (1, 3, None)


def test_without_a_target_the_first_strategy_sets_it(tmp_path: Path, written: Any) -> None:
    summary = study(tmp_path, written, {"a": [0.51274, 0.51276], "b": [0.6, 0.4]})
    assert (summary.target, summary.target_is_set) == (0.512, False)
    assert [line.reach and line.reach.reached for line in summary.lines] == [2, 1]
    assert study(tmp_path / "one", written, {"a": [0.5]}).target is None
    low = study(tmp_path / "low", written, {"a": [1.2341], "b": [2.0]}, "loss")
    assert low.target == 1.24


def test_comparison(comparison: Path) -> None:
    [group] = Runs(find_runs(comparison)).groups
    summary = summarise(group)
    assert summary is summarise(group)
    assert [line.label for line in summary.lines] == ["FedAvg", "FedProx", "SCAFFOLD", "FedLD"]
    assert [len(line.seeds) for line in summary.lines] == [5, 4, 5, 5]
    assert list(summary.tests) == ["accuracy", "client_accuracy", "client_worst10"]
    assert len(summary.pairs) == 6
    run = group.of("FedLD")[0]
    worst = summary.lines[3].clients["worst10"]
    assert worst is not None
    means = [facts(group, r).accuracy for r in group.of("FedLD")]
    assert worst.mean == pytest.approx(np.mean([np.sort(v)[:5].mean() for v in means]))
    assert spread(facts(group, run).accuracy, True)["worst10"] == pytest.approx(
        run.series("client_worst10")[1][-1]
    )


def test_finding_of_too_few_seeds(comparison: Path) -> None:
    text = finding(summarise(Runs(find_runs(comparison)).groups[0]))
    assert text.startswith("FedLD ends with the highest accuracy, 0.9")
    assert "above SCAFFOLD (95 % CI of that difference" in text
    assert "not enough seeds to tell" in text
    # with FedProx only 4 seeds are common: Holm of 2/16 among five 2/32 is 6 · 2/32 at least
    assert "it takes 8 seeds" in text
    assert "is better" not in text


def test_finding_of_enough_seeds(tmp_path: Path, written: Any) -> None:
    base = np.linspace(0.5, 0.6, 8)
    wave = 0.01 * np.sin(np.arange(8))
    found = {"a": base, "b": base + wave, "c": base + 0.1 + wave / 2}
    text = finding(study(tmp_path, written, {k: v.tolist() for k, v in found.items()}))
    assert "It is better than a and b (paired permutation test, Holm-corrected p ≤ 0.0" in text
    assert "not enough" not in text


def test_finding_of_no_difference(tmp_path: Path, written: Any) -> None:
    text = finding(study(tmp_path, written, {"a": [1, 2, 3, 4, 5, 6], "b": [2, 1, 4, 3, 6, 5.1]}))
    assert text.endswith("Against a no difference was found.")


def test_finding_where_low_is_good(tmp_path: Path, written: Any) -> None:
    text = finding(study(tmp_path, written, {"a": [2.0, 2.2], "b": [1.0, 1.1]}, "perplexity"))
    assert text.startswith("b ends with the lowest perplexity, 1.05")
    # differences 1.0 and 1.1: mean 1.05, t(0.975; 1) = 12.706 times 0.0707 / sqrt(2) = 0.635
    assert "1.050 below a (95 % CI of that difference 0.415 to 1.685)" in text


def test_finding_of_one_strategy_and_of_none(tmp_path: Path, written: Any) -> None:
    assert (
        finding(study(tmp_path / "x", written, {"a": [0.5]}))
        == "a ends at accuracy 0.500 (1 seed)."
    )
    written(tmp_path / "y", "a", 0, [{"accuracy": 0.1}], state="failed")
    empty = summarise(Runs(find_runs(tmp_path / "y")))
    assert finding(empty) == "No run has finished with a value to compare."


def test_a_diverged_strategy_is_named_and_not_averaged(tmp_path: Path, written: Any) -> None:
    summary = study(tmp_path, written, {"a": [1.0, math.nan], "b": [2.0, 3.0]}, "loss")
    text = finding(summary)
    assert text.startswith("b ends with the lowest loss, 2.5")
    assert "a diverged." in text
    assert summary.pairs[0].verdict == "a run diverged"


def test_a_margin_follows_the_common_seeds(tmp_path: Path, written: Any) -> None:
    """Means over all seeds put a first; over the one common seed it is below b."""
    config = {"evaluate": EVALUATE}
    for label, seed, value in (("a", 0, 0.5), ("a", 1, 0.9), ("b", 0, 0.6)):
        written(tmp_path / f"{label}{seed}", label, seed, [{"accuracy": value}], config=config)
    text = finding(summarise(Runs(find_runs(tmp_path))))
    assert text.startswith("a ends with the highest accuracy, 0.700")
    assert "0.100 below b" in text


def test_clients_judged_by_loss_where_there_is_no_accuracy(tmp_path: Path, written: Any) -> None:
    clients = [{"round": 1, "client": i, "eval_loss": float(i)} for i in range(20)]
    old = [{"round": 0, "client": 0, "eval_loss": 99.0}]
    written(tmp_path, "a", 0, [{"loss": 1.0}], clients=old + clients)
    runs = Runs(find_runs(tmp_path))
    assert client_column(runs) == "loss"
    # of losses 0 ... 19 the worst two are 19 and 18, the best 0 and 1
    assert spread(facts(runs, runs[0]).loss, False) == {
        "worst10": 18.5, "median": 9.5, "best10": 0.5, "mean": 9.5,
    }  # fmt: skip
    [line] = summarise(runs).lines
    assert line.clients["worst10"] == mean_interval([18.5])


def test_refusals_are_counted_by_code(tmp_path: Path, written: Any) -> None:
    reasons = ["not_finite: a", "not_finite: b", None, "late: no reply", None]
    statuses = ["refused", "refused", "ok", "late", None]
    clients = [
        {"round": 1, "client": i, "status": s, "reason": r}
        for i, (s, r) in enumerate(zip(statuses, reasons, strict=True))
    ]
    clients.append({"round": 1, "client": 9, "status": "error", "reason": None})
    written(tmp_path, "a", 0, [{"loss": 1.0}], clients=clients)
    runs = Runs(find_runs(tmp_path))
    found = facts(runs, runs[0])
    assert found.asked == 5
    assert [(r.status, r.code, r.detail, r.count) for r in found.refusals] == [
        ("refused", "not_finite", "a", 2),
        ("error", "no reason given", "", 1),
        ("late", "late", "no reply", 1),
    ]
