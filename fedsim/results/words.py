"""Numbers as a reader wants them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from fedsim.results.statistics import Interval

NONE = "–"
"""What stands where there is no number."""

_NAMES = {
    "client_accuracy": "mean client accuracy",
    "client_loss": "mean client loss",
    "client_worst10": "accuracy of the worst 10 % of clients",
    "train_loss": "training loss",
    "rouge_l": "Rouge-L",
    "exact_match": "exact matches",
    "cluster_ari": "adjusted Rand index of the clusters",
    "cluster_nmi": "normalised mutual information of the clusters",
}


def name(column: str) -> str:
    """A column's name in words."""
    return _NAMES.get(column, column.replace("_", " "))


def slug(column: str) -> str:
    """A column's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", column.lower()).strip("-")


def decimals(intervals: Iterable[Interval | None]) -> int:
    """Digits after the point so that the narrowest interval of a column shows one of its own."""
    there = [i for i in intervals if i is not None and math.isfinite(i.mean)]
    largest = max((abs(i.mean) for i in there), default=0.0)
    least = 3 if largest < 10 else 2 if largest < 100 else 1
    halves = [i.half for i in there if i.half]
    return max(least, min(5, math.ceil(-math.log10(min(halves))))) if halves else least


def plus_minus(interval: Interval | None, digits: int) -> str:
    """``0.913 ± 0.007``; a diverged mean says so."""
    if interval is None:
        return NONE
    if math.isnan(interval.mean):
        return "diverged"
    half = "" if interval.half is None else f" ± {interval.half:.{digits}f}"
    return f"{interval.mean:.{digits}f}{half}"


def span(interval: Interval, digits: int) -> str:
    """``0.901 to 0.926``, the bounds of an interval; a dash where it has none."""
    if interval.low is None or interval.high is None:
        return NONE
    return f"{minus(interval.low, digits)} to {minus(interval.high, digits)}"


def minus(value: float, digits: int) -> str:
    """A number with a true minus sign, never "−0.000"."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def signed(value: float, digits: int) -> str:
    """A difference with its sign."""
    text = minus(value, digits)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def number(value: float | None) -> str:
    """Four significant digits at most, thousands apart."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == int(value) or abs(value) >= 1000:
        return minus(value, 0) if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.4g}"


def size(value: float | None) -> str:
    """Bytes in decimal units: ``1.78 GB``."""
    return NONE if value is None else _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def duration(seconds: float | None) -> str:
    """Seconds as milliseconds, seconds, minutes, hours or days."""
    if seconds is None:
        return NONE
    if 0 < seconds < 0.9995:
        return f"{_three(1000 * seconds)} ms"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{_three(seconds / length)} {unit}"
    return f"{_three(seconds)} s"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while value >= base * 0.9995 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{_three(value)} {units[power]}"


def _three(value: float) -> str:
    """Three significant digits, without trailing zeros after the point or an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def p_value(p: float | None) -> str:
    """A p value to two significant digits, or ``< 0.001``."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.995 else "1"


def listed(items: Sequence[object]) -> str:
    """``a, b and c``."""
    texts = [str(item) for item in items]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def plural(count: int, noun: str) -> str:
    """``1 seed``, ``5 seeds``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
