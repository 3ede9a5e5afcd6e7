"""From messages to work, and from its outcomes to replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from flwr.app import Message, MetricRecord, RecordDict

from fedsim import registry
from fedsim.core import criteria
from fedsim.core.averaging import EXAMPLES
from fedsim.core.model import FlatModel
from fedsim.core.oracle import Oracle
from fedsim.core.program import LocalProgram
from fedsim.core.strategy import route
from fedsim.data import FederatedData, load, pooled
from fedsim.models import build
from fedsim.runtime.oracles import Held

if TYPE_CHECKING:
    from fedsim.config import Experiment, StrategyConfig

PARTITION = "partition-id"
"""Key of the client's partition number in Flower's node configuration."""


@dataclass(frozen=True)
class Environment:
    """What a process needs to do clients' work: data, a resident model, the client halves.

    Attributes:
        data: the federated dataset.
        model: resident model; its present values are the initial model.
        programs: client halves by route.
        batch_size: examples per forward pass in evaluation.
        models: further resident models, for clients of other architectures.
        assignment: which model each client has: 0 is `model`, 1 the first of `models`; it is
            repeated over the clients.
        oracle: who labels examples that clients want labelled.
    """

    data: FederatedData
    model: FlatModel
    programs: Mapping[str, type[LocalProgram]]
    batch_size: int
    models: Sequence[FlatModel] = ()
    assignment: Sequence[int] = (0,)
    oracle: Oracle = field(default_factory=Held)

    @property
    def architectures(self) -> tuple[FlatModel, ...]:
        """All models: `model` and `models`."""
        return (self.model, *self.models)

    def model_of(self, client: int) -> FlatModel:
        """The client's model."""
        return self.architectures[self.assignment[client % len(self.assignment)]]

    @staticmethod
    def of(experiment: Experiment, seed: int, entry: StrategyConfig | None = None) -> Environment:
        """Load the data and build the model of an experiment.

        Args:
            experiment: the configuration.
            seed: seed of the run; it fixes the partition (unless `data.seed` does) and the
                initial model.
            entry: which of its strategies, where that matters: it may have a model of its own, or
                train on pooled examples.
        """
        place = seed if experiment.data.seed is None else experiment.data.seed
        data = load(experiment.data, place)
        if entry is not None and entry.pooled is not None:
            data = pooled(data, entry.pooled, place)
        criterion, zoo = criteria.criterion(data.criterion), experiment.zoo
        spec = experiment.model if entry is None else experiment.modelled(entry)
        model, *others = (
            FlatModel(build(architecture, data, seed), criterion)
            for architecture in (spec, *zoo.models)
        )
        names = {client_of(s.name, s.client) for s in experiment.strategy}
        programs = {route(name): program_class(name) for name in names}
        wanted = experiment.oracle
        return Environment(
            data,
            model,
            programs,
            experiment.evaluate.batch_size,
            tuple(others),
            tuple(zoo.assignment) or tuple(range(len(others) + 1)),
            registry.resolve("oracles", wanted.name)(**wanted.params),
        )


def client_of(strategy: str, client: str | None) -> str:
    """Name of the client half that belongs to a configured strategy."""
    return client or cast(str, getattr(registry.resolve("strategies", strategy), "client", ""))


def program_class(name: str) -> type[LocalProgram]:
    """The client half of that name. Raises `ConfigError` if there is none."""
    return cast("type[LocalProgram]", registry.resolve("clients", name))


def action_of(message: Message) -> tuple[str, str]:
    """Kind and action of a message: ``train.fedld`` gives ``("train", "fedld")``."""
    kind, _, action = message.metadata.message_type.partition(".")
    return kind, action


def judged(loss: float, accuracy: float, examples: int) -> RecordDict:
    """The content of the reply to an evaluate message."""
    return RecordDict(
        {"metrics": MetricRecord({EXAMPLES: examples, "loss": loss, "accuracy": accuracy})}
    )
