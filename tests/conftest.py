"""The environment of every test, also when pytest is started by hand."""

from __future__ import annotations

import os

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

import torch
from hypothesis import settings

# Times on a shared machine say nothing, and a failure has to come again: fixed examples in CI.
settings.register_profile("fedsim", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("fedsim")

torch.set_num_threads(1)
