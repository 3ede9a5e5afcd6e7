"""Run folders, statistics and the report. Importing this imports neither matplotlib nor scipy."""

from __future__ import annotations

from fedsim.results.store import Run, RunWriter, environment, find_runs

__all__ = ["Run", "RunWriter", "environment", "find_runs"]
