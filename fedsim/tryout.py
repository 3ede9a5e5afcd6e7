"""Tries what runs left: judges models and adapters on data, and lets language models answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsim.config import Experiment, StrategyConfig, load_experiment
from fedsim.core.criteria import criterion
from fedsim.core.errors import ConfigError, DataError, RunError
from fedsim.core.generation import greedy, judge, split
from fedsim.core.records import FlatRecord
from fedsim.data import FederatedData
from fedsim.data.instructions import Sample
from fedsim.data.tokens import pretrained, read_answers
from fedsim.models.adapters import CONFIG, read_adapter
from fedsim.models.exporting import unwrap, wrapped
from fedsim.models.host import Host
from fedsim.runner import saved_config
from fedsim.runtime.work import Environment

WORST = 0.1
"""Share of the clients that the worst ones are."""


@dataclass(frozen=True)
class Bench:
    """Data and the base model to try things on.

    Attributes:
        env: data and the freshly built model.
        experiment: where they come from.
    """

    env: Environment
    experiment: Experiment

    @staticmethod
    def of(experiment: Experiment, seed: int, entry: StrategyConfig | None = None) -> Bench:
        """Load data and model.

        Args:
            experiment: the configuration.
            seed: of data and initial weights.
            entry: strategy whose client half is meant; None: the first.
        """
        entry = entry or experiment.strategy[0]
        return Bench(Environment.of(experiment, seed, entry), experiment)

    @property
    def data(self) -> FederatedData:
        """The data."""
        return self.env.data

    @cached_property
    def host(self) -> Host:
        """The base model alone, for adapters to take turns in; made once."""
        module = unwrap(self.env.model.module)
        return Host(module, "inner." if hasattr(module, "inner") else "")

    def _record(self, state: Mapping[str, Tensor], source: str) -> FlatRecord:
        layout = self.env.model.layout
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        wrong = {n for n, s in shapes.items() if n not in state or tuple(state[n].shape) != s}
        if wrong or set(state) - set(shapes):
            names = ", ".join(sorted(wrong | (set(state) - set(shapes)))[:3])
            raise DataError(f"{source} is refused: it is another model's ({names} differ)")
        beside = {n: state[n] for n in layout.beside}
        return FlatRecord(layout, layout.flatten(state), beside)

    def load(self, state: Mapping[str, Tensor], source: str) -> nn.Module:
        """The model with a trained state, strictly."""
        record, module = self._record(state, source), self.env.model.module
        own = module.state_dict()
        with torch.no_grad():
            for name, tensor in record.state().items():
                own[name].copy_(tensor)
        return module.eval()


@dataclass(frozen=True)
class Judgement:
    """How good a model is on one set of data.

    Attributes:
        central: loss, accuracy, perplexity on the central test set.
        clients: mean over clients of the same on their held-out examples; `worst10` is the mean
            accuracy of the worst tenth.
        answers: Rouge-L and exact match of greedy answers, if asked for.
    """

    central: Mapping[str, float]
    clients: Mapping[str, float]
    answers: Mapping[str, float]

    def row(self) -> dict[str, float]:
        """All of it."""
        clients = {f"client_{n}": v for n, v in self.clients.items()}
        return {**self.central, **clients, **self.answers}


@torch.no_grad()
def judged(module: nn.Module, bench: Bench, answers: int = 0) -> Judgement:
    """Judge a model; the same numbers every time.

    Args:
        module: in evaluation mode.
        bench: the data.
        answers: greedy answers to so many examples of the central test set; text only.
    """
    data, size = bench.data, bench.env.batch_size
    measure = criterion(data.criterion).measure

    def sums(rows: np.ndarray) -> np.ndarray:
        parts = [
            measure(module(data.fields["x"][i]), data.fields["y"][i]).double()
            for i in torch.from_numpy(np.asarray(rows)).split(size)
        ]
        total: np.ndarray = torch.cat(parts, 1).sum(1).numpy()
        return total

    def named(found: np.ndarray) -> dict[str, float]:
        loss, right, count = found.tolist()
        row = {"loss": loss / max(count, 1.0)}
        if data.criterion != "mse":
            row["accuracy"] = right / max(count, 1.0)
        if data.criterion == "next_token":
            row["perplexity"] = float(np.exp(min(row["loss"], 700.0)))
        return row

    central = named(sums(data.central_test)) if len(data.central_test) else {}
    each = [named(sums(own)) for own in map(data.test.__getitem__, range(data.num_clients))
            if len(own)]  # fmt: skip
    clients = {n: float(np.mean([row[n] for row in each])) for n in each[0]} if each else {}
    if each and "accuracy" in clients:
        worst = sorted(row["accuracy"] for row in each)[: max(1, round(WORST * len(each)))]
        clients["worst10"] = float(np.mean(worst))
    said: dict[str, float] = {}
    if answers:
        index = torch.from_numpy(np.asarray(data.central_test[:answers]))
        decode, end = read_answers(data.meta)
        x, y = data.fields["x"][index], data.fields["y"][index]
        longest = max(len(split(*pair)[0]) for pair in zip(x, y, strict=True))
        room = x.shape[1] + 1 - longest  # a model need not take more than the data's length
        said = judge(module, x, y, decode, end, room)
    return Judgement(central, clients, said)


def answer(module: nn.Module, data: FederatedData, prompt: str, most: int = 64) -> str:
    """The greedy answer to a prompt: always the same.

    Args:
        module: in evaluation mode.
        data: gives tokenizer and length.
        prompt: the whole prompt, as the template makes it.
        most: tokens of the answer at most.
    """
    decode, end = read_answers(data.meta)
    if "vocab" in data.meta:
        number = {c: i for i, c in enumerate(str(data.meta["vocab"]))}
        tokens = [number.get(c, 0) for c in prompt]
        context = data.input_shape[0]
    else:
        tokens = pretrained(str(data.meta["tokenizer"])).encode(prompt)
        context = len(tokens) + most
    if not tokens or len(tokens) >= context:
        raise ConfigError(f"the prompt has {len(tokens)} tokens; 1 to {context - 1} are possible")
    return decode(greedy(module, [tokens], end, most, context)[0])


class Subject:
    """A run folder or an adapter, ready to be tried on data.

    Args:
        path: the folder.
        seed: of the data and base; None: the run's own, or the first of the experiment.

    Raises:
        RunError: the folder is neither.
    """

    def __init__(self, path: str | Path, seed: int | None = None) -> None:
        self.path, self._seed = Path(path), seed
        self.config = saved_config(self.path)
        self.is_adapter = self.config is None
        if self.is_adapter and not (self.path / CONFIG).exists():
            raise RunError(f"{path} is neither a run folder nor an adapter")

    def benches(self, files: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Bench]:
        """Data to try it on: those of the files, or the run's own.

        Raises:
            ConfigError: an adapter needs at least one file.
        """
        if not files and self.is_adapter:
            raise ConfigError(
                f"{self.path} is an adapter: --on FILE says with which base and on which data"
            )
        if not files:
            assert self.config is not None
            experiment = Experiment.model_validate(self.config["experiment"])
            entry = StrategyConfig.model_validate(self.config["strategy"])
            return {"own data": Bench.of(experiment, self._number(experiment), entry)}
        found = {}
        for file in files:
            experiment = load_experiment(file, list(overrides))
            found[file] = Bench.of(experiment, self._number(experiment))
        return found

    def _number(self, experiment: Experiment) -> int:
        if self._seed is not None:
            return self._seed
        seed = self.config["seed"] if self.config is not None else None
        return experiment.experiment.seeds[0] if seed is None else int(seed)

    @contextmanager
    def ready(self, bench: Bench) -> Iterator[nn.Module]:
        """The model, or the adapter over the base of a bench, for the time of the block.

        Raises:
            DataError: it does not belong to that base.
        """
        own = self.path / "adapter"
        if self.is_adapter or (own.is_dir() and wrapped(bench.env.model.module)):
            adapter = read_adapter(self.path if self.is_adapter else own)
            with bench.host.wearing(adapter) as module:
                yield module
        else:
            yield bench.load(self._state(), str(self.path))

    def _state(self) -> dict[str, Tensor]:
        file = self.path / "model.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            several = sorted(p.stem for p in (self.path / "models").glob("*.safetensors"))
            more = f"; it has {len(several)} models, none for everybody" if several else ""
            raise RunError(f"{file} cannot be read: {error}{more}") from None


def evaluate(
    path: str, files: Sequence[str], seed: int | None, overrides: Sequence[str], answers: int
) -> dict[str, dict[str, float]]:
    """What `fedsim evaluate` prints: metrics by data."""
    subject, found = Subject(path, seed), {}
    for name, bench in subject.benches(files, overrides).items():
        with subject.ready(bench) as module:
            found[name] = judged(module, bench, answers).row()
    return found


def prompt_of(bench: Bench, instruction: str, given: str = "") -> str:
    """A prompt in the template of the data."""
    template = str(bench.experiment.data.dataset.params.get("template", "plain"))
    return Sample("", instruction, given, "").prompt(template)


def chat(
    path: str,
    files: Sequence[str],
    seed: int | None,
    overrides: Sequence[str],
    lines: Iterable[str],
    most: int,
) -> Iterator[str]:
    """What `fedsim chat` prints: an answer to each line, as ``instruction | input``."""
    subject = Subject(path, seed)
    bench = next(iter(subject.benches(files, overrides).values()))
    with subject.ready(bench) as module:
        for line in lines:
            instruction, _, given = (part.strip() for part in line.partition("|"))
            if instruction:
                yield answer(module, bench.data, prompt_of(bench, instruction, given), most)
