"""From messages to work, and from its outcomes to replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedsim import registry
from fedsim.core import criteria
from fedsim.core.averaging import EXAMPLES
from fedsim.core.errors import RunError
from fedsim.core.model import FlatModel
from fedsim.core.program import LocalProgram
from fedsim.core.records import FlatRecord, Layout, as_flat, from_record
from fedsim.core.strategy import route
from fedsim.data import FederatedData, load
from fedsim.models import build
from fedsim.runtime.cohort import Outcomes, Work

if TYPE_CHECKING:
    from fedsim.config import Experiment

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
    """

    data: FederatedData
    model: FlatModel
    programs: Mapping[str, type[LocalProgram]]
    batch_size: int

    @staticmethod
    def of(experiment: Experiment, seed: int) -> Environment:
        """Load the data and build the model of an experiment.

        Args:
            experiment: the configuration.
            seed: seed of the run; it fixes the partition (unless `data.seed` does) and the
                initial model.
        """
        data = load(experiment.data, seed if experiment.data.seed is None else experiment.data.seed)
        module = build(experiment.model, data, seed)
        model = FlatModel(module, criteria.criterion(data.criterion))
        names = {client_of(s.name, s.client) for s in experiment.strategy}
        programs = {route(name): program_class(name) for name in names}
        return Environment(data, model, programs, experiment.evaluate.batch_size)


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


def _kept_key(action: str, name: str) -> str:
    return f"{action}.{name}"


PRIVATE = "private"
"""Name under which a client keeps the model entries that never leave it."""


def work_of(message: Message, context: Context, env: Environment) -> Work:
    """The work that a train or evaluate message asks one client for.

    Raises:
        RunError: the message names an unknown client half, or its model does not fit.
    """
    _, action = action_of(message)
    if action not in env.programs:
        raise RunError(
            f"no client half for route {message.metadata.message_type!r}; "
            f"known: {', '.join(sorted(env.programs))}"
        )
    config = message.content.config_records.get("config", ConfigRecord())
    program = env.programs[action].from_config(config)
    records = dict(message.content.array_records)
    model = records.pop("arrays")
    trainable = _trainable(env.model.layout)
    state = {n: as_flat(r, trainable).flat for n, r in context.state.array_records.items()}
    client = int(cast(int, context.node_config[PARTITION]))
    kept = {
        name: state[_kept_key(action, name)]
        for name in program.keeps
        if _kept_key(action, name) in state
    }
    return Work(
        program,
        np.array([client]),
        int(cast(int, config.get("server-round", 0))),
        int(cast(int, config.get("seed", 0))),
        _whole(model, program, context, action, env),
        {name: as_flat(record, trainable).flat for name, record in records.items()},
        {client: kept},
    )


def _trainable(layout: Layout) -> Layout:
    return layout.restrict(frozenset(layout.trainable))


def _whole(
    model: ArrayRecord, program: LocalProgram, context: Context, action: str, env: Environment
) -> FlatRecord:
    """The received entries, completed by the client's private ones."""
    layout = env.model.layout
    if isinstance(model, FlatRecord) and model.layout is layout:
        return model
    private = program.private(env.model.info)
    missing, extra = set(layout.names) - set(model), set(model) - set(layout.names)
    if missing != private or extra:
        raise RunError(
            f"the received model has unexpected entries {sorted(extra)} and lacks "
            f"{sorted(missing - private)}"
        )
    if not private:
        return as_flat(model, layout)
    key = _kept_key(action, PRIVATE)
    own = context.state.array_records.get(key)
    mine = from_record(own) if own is not None else env.model.initial().state()
    state: dict[str, Any] = {n: mine[n] for n in private} | from_record(model)
    return FlatRecord(layout, layout.flatten(state), {n: state[n] for n in layout.beside})


def finish(outcomes: Outcomes, message: Message, context: Context, env: Environment) -> RecordDict:
    """Keep on the client what it keeps, and return the content of its reply.

    Args:
        outcomes: of this client alone.
        message: what it was sent.
        context: its context; the state is changed.
        env: gives model and client half.
    """
    _, action = action_of(message)
    layout = env.model.layout
    trainable = _trainable(layout)
    sent = message.content.array_records["arrays"]
    program = env.programs[action]
    for name, vectors in outcomes.kept.items():
        context.state[_kept_key(action, name)] = FlatRecord(trainable, vectors[0])
    model = FlatRecord(layout, outcomes.flat[0], *outcomes.beside[:1])
    if len(sent) < len(layout.names):
        shared = frozenset(sent)
        own = layout.restrict(frozenset(layout.names) - shared)
        context.state[_kept_key(action, PRIVATE)] = as_flat(_part(model, own), own)
        model = as_flat(_part(model, layout.restrict(shared)), layout.restrict(shared))
    if program.replies == "delta":
        received = as_flat(sent, model.layout)
        model = model.with_flat(model.flat - received.flat)
    metrics: dict[str, Any] = {
        EXAMPLES: int(outcomes.num_examples[0]),
        "steps": int(outcomes.num_steps[0]),
        **{name: float(values[0]) for name, values in outcomes.metrics.items()},
    }
    sends = {n: FlatRecord(trainable, v[0]) for n, v in outcomes.sent.items()}
    return RecordDict({"arrays": model, **sends, "metrics": MetricRecord(metrics)})


def _part(model: FlatRecord, layout: Layout) -> FlatRecord:
    state = model.state()
    return FlatRecord(
        layout,
        layout.flatten({n: state[n] for n in layout.order}),
        {n: state[n] for n in layout.beside},
    )


def judged(loss: float, accuracy: float, examples: int) -> RecordDict:
    """The content of the reply to an evaluate message."""
    return RecordDict(
        {"metrics": MetricRecord({EXAMPLES: examples, "loss": loss, "accuracy": accuracy})}
    )
