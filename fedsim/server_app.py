"""The Flower ServerApp of this repository, named in `pyproject.toml`."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run configuration names, on Flower's grid."""
    from fedsim.api import serve
    from fedsim.app_config import Settings

    serve(Settings.of(context.run_config), grid)
