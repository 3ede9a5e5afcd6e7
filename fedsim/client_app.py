"""The Flower ClientApp that serves every client half by its route."""

from __future__ import annotations

from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsim.config import Experiment
from fedsim.core.errors import RunError
from fedsim.core.records import materialise
from fedsim.runtime.cohort import Cohort
from fedsim.runtime.work import Environment, action_of, finish, job_of, judged

EXPERIMENT = "fedsim.experiment"
"""Run-config key of the experiment, as JSON."""
SEED = "fedsim.seed"
"""Run-config key of the run's seed."""


@lru_cache(maxsize=2)
def _environment(experiment: str, seed: int) -> Environment:
    return Environment.of(Experiment.model_validate_json(experiment), seed)


class ProgramApp(ClientApp):
    """Answers ``train.NAME`` and ``evaluate.NAME`` for every client half of the experiment.

    The experiment comes in the run configuration, so the same app runs in this process, under
    Flower's simulation and on SuperNodes.

    Args:
        environment: use this one instead of what the run configuration says.
    """

    def __init__(self, environment: Environment | None = None) -> None:
        super().__init__()
        self._given = environment

    def environment(self, context: Context) -> Environment:
        """The environment of the context's run, loaded once per process.

        Raises:
            RunError: the run configuration holds no experiment.
        """
        if self._given is not None:
            return self._given
        config = context.run_config
        if EXPERIMENT not in config:
            raise RunError(f"the run configuration lacks {EXPERIMENT!r}: start with `fedsim run`")
        return _environment(str(config[EXPERIMENT]), int(config[SEED]))

    def __call__(self, message: Message, context: Context) -> Message:
        """Do the work of one message."""
        kind, action = action_of(message)
        env = self.environment(context)
        if action not in env.programs or kind not in ("train", "evaluate"):
            return super().__call__(message, context)
        job = job_of(message, context, env)
        cohort = Cohort(env.model, env.data)
        if kind == "evaluate":
            content = judged(*next(cohort.measure([job], env.batch_size)))
        else:
            content = finish(next(cohort.run([job])), message, context, env)
        return Message(content if self._given else materialise(content), reply_to=message)
