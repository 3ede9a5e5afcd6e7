"""The Flower ClientApp of this repository, named in `pyproject.toml`."""

from __future__ import annotations

from fedsim.client_app import ProgramApp

app = ProgramApp()
