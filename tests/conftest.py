"""The environment of every test, also when pytest is started by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# As in scripts/lib.sh, and before anything of Flower, Ray or Hugging Face is imported.
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MPLBACKEND": "Agg",
}

import pytest
import torch
from hypothesis import settings

from tests.faults import scorecard as card

# Times on a shared machine say nothing, and a failure has to come again: fixed examples in CI.
settings.register_profile("fedsim", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("fedsim")

torch.set_num_threads(1)


@pytest.fixture
def scorecard(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Adds a line to the table of fault-injection rows: row, what, tries, failures."""
    return lambda *line: record_property(card.PROPERTY, line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print that table."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    lines = [tuple(v) for r in reports for k, v in r.user_properties if k == card.PROPERTY]
    if lines:
        terminalreporter.section("fault injection")
        for line in card.table(lines):
            terminalreporter.write_line(line)
