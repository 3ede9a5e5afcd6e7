"""What an experiment is, and how it is read from TOML. Importing this does not import torch."""

from __future__ import annotations

from fedsim.config.load import document, load_experiment, override, parse, schema
from fedsim.config.models import (
    ClockConfig,
    CohortConfig,
    DataConfig,
    EvaluateConfig,
    Experiment,
    ExperimentSection,
    JournalConfig,
    Named,
    RuntimeConfig,
    StrategyConfig,
    SweepConfig,
    TrainConfig,
    TuneConfig,
)
from fedsim.config.types import slug

__all__ = [
    "ClockConfig",
    "CohortConfig",
    "DataConfig",
    "EvaluateConfig",
    "Experiment",
    "ExperimentSection",
    "JournalConfig",
    "Named",
    "RuntimeConfig",
    "StrategyConfig",
    "SweepConfig",
    "TrainConfig",
    "TuneConfig",
    "document",
    "load_experiment",
    "override",
    "parse",
    "schema",
    "slug",
]
