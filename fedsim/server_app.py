"""The Flower ServerApp of this repository, named in `pyproject.toml`."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.core.errors import FedsimError
from fedsim.core.events import Event, Notice, RoundFinished, RunFinished

SHOWN = ("accuracy", "loss", "perplexity", "client_accuracy")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run configuration names, on Flower's grid."""
    from fedsim.api import serve
    from fedsim.app_config import Settings

    try:
        serve(Settings.of(context.run_config), grid, tell)
    except FedsimError as error:
        print(f"fedsim: {error}".replace("\n", "; "), flush=True)  # Flower adds where it happened
        raise


def tell(event: Event) -> None:
    """One line for each event, which ``flwr log`` shows."""
    if isinstance(event, RoundFinished):
        metrics = "  ".join(f"{n} {v:.4g}" for n, v in event.metrics.items() if n in SHOWN)
        say = f"round {event.round}/{event.rounds}  {event.clients} clients  {metrics}"
    elif isinstance(event, RunFinished):
        say = f"finished: {event.path}"
    elif isinstance(event, Notice):
        say = event.text
    else:
        say = f"{event.label} seed {event.seed}: {event.rounds} rounds"
    print(say, flush=True)
