"""From messages to work, and from its outcomes to replies."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar, cast, overload

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from torch import Tensor

from fedsim.core.bulk import EXAMPLES, Block, Rows
from fedsim.core.errors import FedsimError, RunError
from fedsim.core.nodes import node_of
from fedsim.core.parts import narrowed, part_of, shapes_of
from fedsim.core.program import LocalProgram, Mail
from fedsim.core.records import FlatRecord, Layout, as_flat, from_record
from fedsim.runtime.cohort import Ints, Outcomes, Work
from fedsim.runtime.work import Environment

S = TypeVar("S")
PRIVATE = "private"
"""Name under which a client keeps the model entries that never leave it."""


class ContextOf(Protocol):
    """Gives the context of a client, by partition number."""

    def __call__(self, client: int, change: bool = False, /) -> Context:
        """The context; `change` says that its state is about to be changed."""
        ...


@dataclass(frozen=True)
class Request:
    """What one client or many are asked for, and where they keep their state.

    Attributes:
        content: what each of them is sent; with `own`, what the first of them is sent.
        message_type: kind and client half, such as ``"train.fedavg"``.
        context_of: gives the clients' contexts; asked for only where there is state.
        env: data, model and client halves.
        own: what each client is sent, by partition number, where their records differ.
    """

    content: RecordDict
    message_type: str
    context_of: ContextOf
    env: Environment
    own: Mapping[int, RecordDict] | None = None

    @property
    def kind(self) -> str:
        """``"train"`` or ``"evaluate"``."""
        return self.message_type.partition(".")[0]

    @property
    def action(self) -> str:
        """Which client half."""
        return self.message_type.partition(".")[2]

    @cached_property
    def program(self) -> LocalProgram:
        """What the clients run.

        Raises:
            ConfigError: the configuration does not fit it.
        """
        config = self.content.config_records.get("config", ConfigRecord())
        return self.env.programs[self.action].from_config(config).fitted(self.env.model.info)

    def work(self, clients: Ints) -> Work:
        """The work of these clients, by ascending partition number.

        Raises:
            FedsimError: there is no such client half, or configuration or model do not fit it.
        """
        env, config = self.env, self.content.config_records.get("config", ConfigRecord())
        if self.action not in env.programs:
            raise RunError(
                f"no client half for route {self.message_type!r}; "
                f"known: {', '.join(sorted(env.programs))}"
            )
        base, own = config.get("base", env.model.info.base), env.model.info.base
        if base != own:
            raise RunError(
                f"the server's base model is {base!r}, this client's {own!r}: other weights, or "
                "another alpha"
            )
        return Work(
            self.program,
            clients,
            int(cast(int, config.get("server-round", 0))),
            int(cast(int, config.get("seed", 0))),
            self._start(self.content, clients)
            if self.own is None
            else Each(clients.tolist(), self._start_of),
            self._received(self.content)
            if self.own is None
            else Each(clients.tolist(), lambda c: self._received(self._sent(c))),
            _Kept(self, {n: self._key(n) for n in self.program.keeps}, clients.tolist()),
        )

    def _sent(self, client: int) -> RecordDict:
        """What one client is sent."""
        return self.content if self.own is None else self.own[client]

    def _received(self, content: RecordDict) -> dict[str, Tensor]:
        """The vectors besides the model."""
        layout, opened = self.env.model.layout.trained, self.program.opens
        records = content.array_records
        return {n: as_flat(r, layout).flat for n, r in records.items() if n not in opened}

    def _key(self, name: str) -> str:
        return f"{self.action}.{name}"

    def _start(self, content: RecordDict, clients: Ints) -> FlatRecord | Sequence[FlatRecord]:
        """The model that was sent, opened by each client for itself where that makes a difference.

        Raises:
            FedsimError: it does not fit.
        """
        model, layout = content.array_records["arrays"], self.env.model.layout
        program = self.program
        if isinstance(model, FlatRecord) and model.layout is layout and not program.own_start:
            return model
        missing = set(layout.names) - set(model)
        if program.own_start or missing & program.private(self.env.model.info):
            return Each(clients.tolist(), lambda client: self._opened(content, client))
        return self._opened(content, int(clients[0]) if len(clients) else 0)

    def _start_of(self, client: int) -> FlatRecord:
        start = self._start(self._sent(client), np.array([client]))
        return start if isinstance(start, FlatRecord) else start[0]

    def _opened(self, content: RecordDict, client: int) -> FlatRecord:
        """The model that one client starts from."""
        layout, initial, info = self.env.model.layout, self.env.model.initial(), self.env.model.info
        private, mine = self.program.private(info), initial.state()
        if private:
            kept = self.context_of(client).state.array_records.get(self._key(PRIVATE))
            mine |= {} if kept is None else from_record(kept)
        config = content.config_records.get("config", ConfigRecord())
        mail = Mail(
            content.array_records,
            {n: mine[n] for n in private},
            initial,
            int(cast(int, config.get("seed", 0))),
            int(cast(int, config.get("server-round", 0))),
            client,
        )
        whole = self.program.opened(info, mail)
        return FlatRecord(layout, layout.flatten(whole), {n: whole[n] for n in layout.beside})

    def finish(self, outcomes: Outcomes, lasting: bool = True) -> Block:
        """Keep on the clients what they keep, and return their replies.

        Args:
            outcomes: of their work; its vectors are changed.
            lasting: whether its vectors stay as they are from now on.
        """
        if not len(outcomes.clients):
            return Block(outcomes.clients, {}, {}, {}, (), self.faults(outcomes.faults))
        layout, received = self.env.model.layout, self.content.array_records["arrays"]
        trained, clients = layout.trained, outcomes.clients.tolist()
        models, beside = outcomes.rows, outcomes.beside
        for name, vectors in outcomes.kept.items():
            for client, vector in zip(clients, vectors, strict=True):
                own = FlatRecord(trained, vector.clone())
                self.context_of(client, True).state[self._key(name)] = own
        shapes = self.program.answers(self.env.model.info, shapes_of(received))
        part = part_of(layout, shapes)
        private = self.program.private(self.env.model.info) - set(part.names)
        if private:
            own_part = layout.restrict(private)
            flats, besides = _part(models.dense(), beside, layout, own_part)
            for i, client in enumerate(clients):
                own = FlatRecord(own_part, flats[i].clone(), besides[i] if besides else None)
                self.context_of(client, True).state[self._key(PRIVATE)] = own
        if part is not layout:
            rows, beside = _part(models.dense(), beside, layout, part)
            models = Rows(rows)
        if self.program.replies == "delta":
            models = Rows(rows := models.dense())
            if self.own is None:
                rows.sub_(_base(received, layout, part))
            else:
                for row, client in zip(rows, clients, strict=True):
                    row.sub_(_base(self._sent(client).array_records["arrays"], layout, part))
        return Block(
            np.array([node_of(c) for c in clients], np.int64),
            {"arrays": part, **dict.fromkeys(outcomes.sent, trained)},
            {"arrays": models, **{n: Rows(v) for n, v in outcomes.sent.items()}},
            {EXAMPLES: outcomes.num_examples, "steps": outcomes.num_steps, **outcomes.metrics},
            beside,
            self.faults(outcomes.faults),
            lasting,
        )

    def faults(self, errors: Mapping[int, Exception]) -> dict[int, str]:
        """What clients' programs raised as one line each, by node."""
        return {
            node_of(client): explain(client, self.content, self.message_type, error)
            for client, error in errors.items()
        }


def _part(
    rows: Tensor, beside: list[dict[str, Tensor]], layout: Layout, part: Layout
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """A part of models in rows."""
    return narrowed(rows, layout, part), [{n: own[n] for n in part.beside} for own in beside]


def _base(received: ArrayRecord, layout: Layout, part: Layout) -> Tensor:
    """What an update is to be added to, as a vector of the part that goes back."""
    sent = part_of(layout, shapes_of(received))
    return narrowed(as_flat(received, sent).flat, sent, part if part != sent else sent)


class _Kept(Mapping[int, Mapping[str, Tensor]]):
    """What clients kept, read when asked for."""

    def __init__(self, request: Request, keys: dict[str, str], clients: list[int]) -> None:
        self._request, self._keys, self._clients = request, keys, clients

    def __getitem__(self, client: int) -> Mapping[str, Tensor]:
        if not self._keys:
            return {}
        layout = self._request.env.model.layout.trained
        state = self._request.context_of(client).state.array_records
        return {n: as_flat(state[k], layout).flat for n, k in self._keys.items() if k in state}

    def __iter__(self) -> Iterator[int]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)


@dataclass(frozen=True)
class Each(Sequence[S]):
    """One value for each client, made when asked for."""

    clients: list[int]
    make: Callable[[int], S]

    def __len__(self) -> int:
        return len(self.clients)

    @overload
    def __getitem__(self, index: int) -> S: ...

    @overload
    def __getitem__(self, index: slice) -> Each[S]: ...

    def __getitem__(self, index: int | slice) -> S | Each[S]:
        if isinstance(index, slice):
            return Each(self.clients[index], self.make)
        return self.make(self.clients[index])


def explain(client: int, content: RecordDict, message_type: str, error: BaseException) -> str:
    """One line on a client's exception: client, round, stage, error, and where it was raised.

    What fedsim itself says speaks to a user, so it comes as it is.
    """
    config = content.config_records.get("config", ConfigRecord())
    said = " ".join(str(error).split())
    if not isinstance(error, FedsimError):
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        said = f"{type(error).__name__}: {said}{where}"
    return f"client {client}, round {config.get('server-round', '?')!s}, {message_type}: {said}"
