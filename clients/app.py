"""The Flower ClientApp of this repository, named in `pyproject.toml`."""

from __future__ import annotations

from fedsim.client_app import ProgramApp
from fedsim.runtime.simulation import mend_engine

mend_engine()
app = ProgramApp()
