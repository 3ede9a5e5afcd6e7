"""The table of the fault-injection rows: N, failures, and what that says of the failure rate."""

from __future__ import annotations

from collections.abc import Iterable

from scipy.stats import beta

PROPERTY = "scorecard"
"""Name under which a test's report carries its line."""

Line = tuple[str, str, int, int]
"""Row of the scorecard, what was tried, how often, and how often it failed."""


def bound(tries: int, failures: int) -> float:
    """Upper end of the one-sided 95 % interval of the failure rate (Clopper and Pearson)."""
    return 1.0 if failures >= tries else float(beta.ppf(0.95, failures + 1, tries - failures))


def table(lines: Iterable[Line]) -> list[str]:
    """The lines as a table in Markdown; those of the same trials, made in parts, are summed."""
    sums: dict[tuple[str, str], list[int]] = {}
    for row, what, tries, failures in lines:
        total = sums.setdefault((row, what), [0, 0])
        total[0] += tries
        total[1] += failures
    shown = ["| row | what | N | failures | failure rate, 95 % bound |", "|---|---|--:|--:|--:|"]
    for (row, what), (tries, failures) in sorted(sums.items(), key=_place):
        shown.append(f"| {row} | {what} | {tries} | {failures} | {bound(tries, failures):.2%} |")
    return shown


def _place(line: tuple[tuple[str, str], list[int]]) -> tuple[float, str]:
    (row, what), _ = line
    return float(row), what
