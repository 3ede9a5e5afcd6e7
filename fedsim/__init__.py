"""fedsim: write a federated algorithm once, simulate it, compare it, deploy it.

```python
from fedsim import compare, load_experiment

comparison = compare(load_experiment("experiments/quickstart.toml"), out="runs/quickstart")
print(comparison.html)
```
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Flower reads these when it is imported; what the user has set stays.
for _switch, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_switch, _value)

logging.getLogger("flwr").setLevel(logging.WARNING)

if TYPE_CHECKING:
    from fedsim.api import Comparison, compare, plan, report, resume, run
    from fedsim.config import Experiment, load_experiment
    from fedsim.core.errors import ConfigError, DataError, FedsimError, RunError
    from fedsim.core.program import Batch, LocalProgram, LocalState
    from fedsim.core.strategy import Strategy
    from fedsim.runner import RunResult

_WHERE = {
    "Batch": "fedsim.core.program",
    "Comparison": "fedsim.api",
    "ConfigError": "fedsim.core.errors",
    "DataError": "fedsim.core.errors",
    "Experiment": "fedsim.config",
    "FedsimError": "fedsim.core.errors",
    "LocalProgram": "fedsim.core.program",
    "LocalState": "fedsim.core.program",
    "RunError": "fedsim.core.errors",
    "RunResult": "fedsim.runner",
    "Strategy": "fedsim.core.strategy",
    "compare": "fedsim.api",
    "load_experiment": "fedsim.config",
    "plan": "fedsim.api",
    "report": "fedsim.api",
    "resume": "fedsim.api",
    "run": "fedsim.api",
}

__all__ = [
    "Batch",
    "Comparison",
    "ConfigError",
    "DataError",
    "Experiment",
    "FedsimError",
    "LocalProgram",
    "LocalState",
    "RunError",
    "RunResult",
    "Strategy",
    "__version__",
    "compare",
    "load_experiment",
    "plan",
    "report",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `fedsim --help` needs no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
