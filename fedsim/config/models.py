"""What an experiment is: one pydantic model for each section of the TOML file.

Every field carries its unit and meaning in its description; `fedsim schema` prints them.
Values are taken strictly (``"3"`` is no number, ``true`` is no integer), numbers must be finite,
unknown keys are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, LiteralString, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from fedsim.config.types import (
    MAX_SEED,
    Fraction,
    Grid,
    Metric,
    Params,
    Seconds,
    Seeds,
    Share,
    count_or_fraction,
    slug,
)
from fedsim.config.types import listed as _listed


class Section(BaseModel):
    """Base of every section: immutable, strict, nothing unknown, nothing infinite."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


def _gather(data: Any, known: frozenset[str]) -> Any:
    """Move the keys of a table that are no fields into its `params`."""
    if not isinstance(data, dict):
        return data
    rest = {k: v for k, v in data.items() if k not in known}
    table = {k: v for k, v in data.items() if k in known}
    params = table.get("params", {})
    if rest and isinstance(params, dict):
        table["params"] = {**params, **rest}
    return table


class Named(Section):
    """A component by name with its parameters: ``"iid"`` or ``{name = "dirichlet", alpha = 0.1}``.

    The name is one of `fedsim list`, a plug-in's, or ``"package.module:attribute"``.
    """

    name: str = Field(min_length=1, max_length=200)
    """Name of the component."""
    params: Params = {}
    """Its parameters; in TOML every other key of the table."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        return (
            {"name": data} if isinstance(data, str) else _gather(data, frozenset(cls.model_fields))
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The two forms that TOML knows."""
        name = {"type": "string", "minLength": 1}
        table = {"type": "object", "properties": {"name": name}, "required": ["name"]}
        return {"title": cls.__name__, "description": cls.__doc__, "anyOf": [name, table]}


class ExperimentSection(Section):
    """`[experiment]`: what it is called and how long it runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the experiment and of its folder: letters, digits, `.`, `_`, `-`."""
    seeds: Seeds = [0, 1, 2]
    """One run of every strategy for each seed."""
    rounds: int = Field(default=20, ge=1, le=10**7)
    """Rounds of communication."""
    description: str = Field(default="", max_length=10_000)
    """What the experiment asks; copied into the report."""


class DataConfig(Section):
    """`[data]`: the examples and which client has which."""

    dataset: Named
    """Dataset by name."""
    partition: Named = Named(name="iid")
    """How examples are dealt to clients, by name."""
    clients: int | None = Field(default=None, ge=1, le=10**7)
    """Number of clients; none: the partition's own (natural ids)."""
    test_fraction: Share = 0.2
    """Share of each client's examples that is held out to judge it."""
    heldout_clients: Annotated[
        int | float,
        PlainValidator(count_or_fraction),
        WithJsonSchema({"type": "number", "minimum": 0}),
    ] = 0
    """Clients never trained on, only judged: a number of them, or a fraction below 1."""
    central_test_fraction: Share = 0.15
    """Share of all examples kept for the central test set where the dataset brings none."""
    min_examples: int = Field(default=2, ge=1, le=10**9)
    """Fewest examples a client may have; natural clients with fewer are left out."""
    public: int = Field(default=0, ge=0, le=10**9)
    """Examples taken from the clients for a public set; their labels are not used."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Seed of split and partition; none: the run's seed, so that every run has its own."""


class ZooConfig(Section):
    """`[zoo]`: clients with models of different architectures."""

    models: Annotated[list[Named], Field(max_length=100), BeforeValidator(_listed)] = []
    """Further architectures; number 0 is `model`, these are 1, 2, ..."""
    assignment: Annotated[list[int], Field(max_length=10**6), BeforeValidator(_listed)] = []
    """Number of the architecture of client 0, 1, ..., repeated; none: each in turn."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if any(not 0 <= n <= len(self.models) for n in self.assignment):
            raise ValueError(f"assignment must hold numbers from 0 to {len(self.models)}")
        return self


class CohortConfig(Section):
    """`[cohort]`: who takes part in a round. Give `fraction` or `size`, not both."""

    fraction: Fraction | None = None
    """Share of the clients sampled each round; all of them where neither is given."""
    size: int | None = Field(default=None, ge=1, le=10**7)
    """Number of clients sampled each round."""
    quorum: float = Field(default=0.5, ge=0, le=1)
    """Share of the cohort that must be admitted, or the round is abandoned."""
    timeout: Seconds | None = None
    """Seconds after which a reply is late; none: wait for all."""
    overselect: float = Field(default=0.0, ge=0, le=10)
    """Share of the cohort that is asked in addition, so that late ones can be spared."""
    patience: int | None = Field(default=None, ge=1, le=10**7)
    """Evaluations in a row that bring a client no lower loss, before it rests; none: never."""
    min_delta: float = Field(default=0.0, ge=0)
    """By how much a loss must fall to be lower, for `patience`."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.fraction is not None and self.size is not None:
            raise ValueError("give fraction or size, not both")
        return self


class TrainConfig(Section):
    """`[train]`: local training, for every strategy alike."""

    epochs: int = Field(default=1, ge=1, le=10**6)
    """Passes over the client's training examples in a round."""
    max_steps: int | None = Field(default=None, ge=1, le=10**9)
    """Stop after that many minibatches; none: no limit."""
    batch_size: int = Field(default=10, ge=1, le=10**9)
    """Examples per minibatch."""
    lr: float = Field(default=0.1, gt=0)
    """Learning rate of the clients."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Heavy-ball momentum of the clients, reset every round."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Coefficient of the L2 term in the gradient."""
    lr_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor by which the learning rate shrinks each round."""


class EvaluateConfig(Section):
    """`[evaluate]`: what is measured and when."""

    every: int = Field(default=1, ge=1, le=10**7)
    """Rounds between central evaluations; the last round is always evaluated."""
    central: bool = True
    """Evaluate on the central test set."""
    clients: bool = True
    """Evaluate on each client's held-out examples, with the model meant for that client."""
    clients_every: int | None = Field(default=None, ge=1, le=10**7)
    """Rounds between evaluations on the clients; none: after the last round only."""
    answers: int = Field(default=0, ge=0, le=10**9)
    """Central test instructions that are answered, greedily, for `rouge_l` and `exact_match`."""
    answers_every: int | None = Field(default=None, ge=1, le=10**7)
    """Rounds between such evaluations; none: before the first round and after the last."""
    answer_tokens: int = Field(default=128, ge=1, le=10**6)
    """Longest answer, in tokens."""
    metric: Metric = "accuracy"
    """The metric that is compared and tuned for."""
    target: float | None = None
    """Value of the metric whose cost in rounds, bytes and seconds is reported."""
    batch_size: int = Field(default=1024, ge=1, le=10**9)
    """Examples per forward pass of an evaluation."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.central or self.clients):
            raise ValueError("central or clients must be true, or nothing is measured")
        if self.metric in ("rouge_l", "exact_match") and not (self.answers and self.central):
            raise ValueError(f"metric {self.metric} needs answers above 0, and central")
        return self


class RuntimeConfig(Section):
    """`[runtime]`: where clients execute."""

    name: Literal["local", "ray"] = "local"
    """`local`: in this process; `ray`: Flower's Ray simulation."""
    workers: int = Field(default=0, ge=0, le=4096)
    """Threads or processes that work at the same time; 0: one for each core. Changes no result."""
    executor: Literal["auto", "serial", "threads", "batched"] = "auto"
    """One client after another, on threads, or whole cohorts stacked; written into the run."""
    device: str = Field(default="cpu", pattern=r"^(cpu|mps|cuda(:\d{1,3})?)$")
    """Torch device: `cpu`, `cuda`, `cuda:N` or `mps`; all but `cpu` with `ray` alone."""
    state_budget: int = Field(default=2**30, ge=0, le=2**50)
    """Bytes of memory for what clients keep between rounds; the rest is read from checkpoints."""


class JournalConfig(Section):
    """`[journal]`: checkpoints."""

    every: int = Field(default=1, ge=1, le=10**7)
    """Rounds between checkpoints; what a kill can cost."""
    keep: int = Field(default=2, ge=1, le=10**6)
    """Checkpoints kept; an older good one is used when the newest is damaged."""


class FleetShare(Named):
    """One kind of device of a fleet: ``{name = "jetson_tx2", share = 30, up_mbit = 20.0}``."""

    share: float = Field(default=1.0, gt=0, le=1e9)
    """How many of the clients have it, in proportion to the other shares."""


class ClockConfig(Section):
    """`[clock]`: simulated time."""

    device: Named = Named(name="workstation")
    """Profile of the clients' devices, by name."""
    fleet: Annotated[list[FleetShare], Field(max_length=100), BeforeValidator(_listed)] = []
    """Several profiles instead of one: tables with `name`, `share` and numbers to replace."""
    jitter: float = Field(default=0.0, ge=0, le=3)
    """How much a device's speed varies by round: standard deviation of its logarithm."""
    time_zones: float = Field(default=0.0, ge=0, le=24)
    """Hours over which the clients' local times are spread, for devices with `online` hours."""
    deadline: Seconds | None = None
    """Simulated seconds after which a reply is late; none: the round waits for the slowest."""


class StrategyConfig(Section):
    """`[[strategy]]`: one of the algorithms that are compared."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})

    name: str = Field(min_length=1, max_length=200)
    """Name of the server half."""
    label: str = Field(default="", max_length=60, validate_default=True)
    """What this entry is called in the report; the name where none is given. Unique."""
    client: str | None = Field(default=None, min_length=1, max_length=200)
    """Name of the client half; none: the strategy's own."""
    params: Params = {}
    """Parameters of the server half; in TOML every other key of the table."""
    train: Params = {}
    """Keys of `[train]` that are different for this strategy."""
    pooled: Fraction | None = None
    """Centralised: one client holds this share of all training examples and trains alone."""
    model: Params = {}
    """Keys of `[model]` that are different for this strategy; with another `name`, all of it."""
    tune: Grid = {}
    """Values to try for keys of this strategy (`mu`, `train.lr`), besides those of `[tune]`."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = _gather(data, frozenset(cls.model_fields))
            name = data.get("name")
            if isinstance(name, str) and not data.get("label"):
                data["label"] = name.rpartition(":")[2][:60]
        return data

    @field_validator("label")
    @classmethod
    def _presentable(cls, label: str) -> str:
        if label and not (slug(label) and label.isprintable()):
            raise ValueError("must be printable and hold a letter or a digit")
        return label

    @field_validator("train")
    @classmethod
    def _partial(cls, train: dict[str, Any]) -> dict[str, Any]:
        TrainConfig.model_validate(train)
        return train


class TuneConfig(Section):
    """`[tune]`: before the comparison every strategy is tuned over the same grid."""

    seeds: Seeds
    """Seeds used for tuning only; none of the experiment's."""
    rounds: int | None = Field(default=None, ge=1, le=10**7)
    """Rounds of a tuning run; none: the experiment's."""
    grid: Grid = {}
    """Values to try by dotted key, such as `"train.lr" = [0.03, 0.1]`."""


class SweepConfig(Section):
    """`[sweep]`: the whole comparison is repeated for each value."""

    key: str = Field(min_length=1, max_length=200)
    """Dotted key that changes, such as `data.partition.alpha`."""
    values: list[Any] = Field(min_length=1, max_length=100)
    """Its values."""


def _labels(strategies: list[StrategyConfig]) -> list[StrategyConfig]:
    seen: dict[str, str] = {}
    for label in (s.label for s in strategies):
        if (key := slug(label)) in seen:
            raise ValueError(
                f"labels must be unique (letter case and punctuation aside), {label!r} and "
                f"{seen[key]!r} are not; give one of them another label"
            )
        seen[key] = label
    return strategies


class Experiment(Section):
    """A whole experiment: strategies compared on the same data, model, cohort and seeds."""

    experiment: ExperimentSection
    data: DataConfig
    model: Named
    """Model by name."""
    zoo: ZooConfig = ZooConfig()
    oracle: Named = Named(name="held")
    """Who labels what clients want labelled: `held` (the data's labels), `folder`, `called`."""
    cohort: CohortConfig = CohortConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    journal: JournalConfig = JournalConfig()
    clock: ClockConfig = ClockConfig()
    strategy: Annotated[
        list[StrategyConfig],
        Field(min_length=1, max_length=100),
        BeforeValidator(_listed),
        AfterValidator(_labels),
    ]
    """The algorithms that are compared, each a table `[[strategy]]`."""
    tune: TuneConfig | None = None
    sweep: SweepConfig | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        faults = [
            InitErrorDetails(type=PydanticCustomError("clash", problem), loc=path, input=value)
            for path, problem, value in self._clashes()
        ]
        if faults:
            raise ValidationError.from_exception_data("Experiment", faults)
        return self

    def _clashes(self) -> Iterator[tuple[tuple[str, str], LiteralString, object]]:
        size, clients = self.cohort.size, self.data.clients
        if size and clients and size > clients:
            yield ("cohort", "size"), "must not be above data.clients", size
        if self.cohort.patience and not (self.evaluate.clients and self.evaluate.clients_every):
            problem = "needs evaluate.clients_every (with clients = true): its loss tells who rests"
            yield ("cohort", "patience"), problem, self.cohort.patience
        if self.tune and set(self.tune.seeds) & set(self.experiment.seeds):
            problem = "must not be among experiment.seeds: a choice is not judged on its own seeds"
            yield ("tune", "seeds"), problem, self.tune.seeds

    def modelled(self, strategy: StrategyConfig) -> Named:
        """`[model]` as it holds for one strategy, with the strategy's own keys applied."""
        own = strategy.model
        if own.get("name", self.model.name) != self.model.name:
            return Named.model_validate(own)
        return Named.model_validate({"name": self.model.name, **self.model.params, **own})

    def training(self, strategy: StrategyConfig) -> TrainConfig:
        """`[train]` as it holds for one strategy, with the strategy's own keys applied."""
        return TrainConfig.model_validate({**self.train.model_dump(), **strategy.train})
