"""Which executor runs a cohort: decided by what is to be done, never by a clock.

The same model, program, cohort and number of cores give the same choice, and it goes into the run's
`config.json`: it changes last bits. Cores count for models of images only, whatever share of them
`runtime.workers` takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedsim.core.criteria import IGNORE
from fedsim.core.errors import ConfigError
from fedsim.core.model import FlatModel
from fedsim.core.program import LocalProgram
from fedsim.data import FederatedData
from fedsim.runtime.batched import Batched
from fedsim.runtime.chain import Chain
from fedsim.runtime.cohort import Outcomes, Vectors, Work
from fedsim.runtime.layers import Functional, Stackable
from fedsim.runtime.plan import visits
from fedsim.runtime.serial import Serial
from fedsim.runtime.threads import Workers, available_cores

BLOCK_BYTES = 5 << 20
"""Parameters of a block in bytes: more than that does not stay in the cache."""
FACTORED_BYTES = 64 << 20
"""The same where parameters are kept in factors: a program that writes them whole needs it all."""
LEAST, MOST = 8, 128
"""Clients of a block: fewer waste dispatch and sums in float64, more gain nothing."""
IMAGES = 5
"""Clients of a block whose models begin with layers of images, which are run one by one."""
RESIDENT = 50_000_000
"""Parameters of a model that is not copied for every thread."""
FUNCTIONAL = 300_000
"""Parameters above which `torch.func` loses to threads: it writes every gradient down."""


@dataclass(frozen=True)
class Choice:
    """An executor and what it depends on; it is written into the run's configuration.

    Attributes:
        executor: ``"batched"``, ``"threads"`` or ``"serial"``.
        reason: why, one line.
        block_size: clients of a block, if batched.
        channels_last: whether images are trained on in channels-last format, if on threads.
    """

    executor: str = "serial"
    reason: str = "asked for"
    block_size: int = 1
    channels_last: bool = False

    def config(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        more = f", blocks of {self.block_size}" if self.executor == "batched" else ""
        more += ", channels-last" if self.channels_last else ""
        return f"{self.executor}{more}: {self.reason}"


ON_NODES = Choice("serial", "every client on its own node")
"""Where clients are in other processes."""


def stackable(model: FlatModel, data: FederatedData) -> Stackable | None:
    """The model as it can be differentiated at stacked parameters; None if it cannot."""
    full = bool((data.fields["y"] != IGNORE).all())
    return Chain.of(model, full) or (Functional(model) if _functional(model) is None else None)


def choose(
    model: FlatModel,
    data: FederatedData,
    program: LocalProgram,
    cohort: int,
    wanted: str = "auto",
    received: Vectors | None = None,
) -> Choice:
    """The executor for a run.

    Args:
        model: the model.
        data: the federated data.
        program: what clients run, with its hyper-parameters.
        cohort: clients of a round.
        wanted: ``"auto"``, or the executor that was asked for.
        received: vectors that the server sends besides the model, as far as they are known.

    Raises:
        ConfigError: the executor that was asked for cannot run this.
    """
    against = _against_stacking(model, data, program, received or {})
    chain = Chain.of(model)
    size = block_size(model, chain, int(np.median(visits(program, data.train.lengths))), cohort)
    image = any(isinstance(m, nn.Conv2d) for m in model.module.modules())
    apart = "dropout draws from one random stream" if model.stochastic else ""
    if wanted == "serial":
        return Choice()
    if wanted == "batched":
        if against:
            raise ConfigError(f"runtime.executor = 'batched' is not possible: {against}")
        return Choice("batched", block_size=size)
    if wanted == "threads":
        if apart:
            raise ConfigError(f"runtime.executor = 'threads' is not possible: {apart}")
        return Choice("threads", channels_last=image)
    if not against and chain is not None:
        kind = "convolutions" if chain.looped else "linear layers"
        return Choice("batched", f"{kind}, differentiated by hand", size)
    if not against and model.layout.size <= FUNCTIONAL and not image:
        return Choice("batched", "a small functional model, stacked programs", size)
    reason = against or ("convolutions" if image else "a large model")
    if apart or model.layout.size > RESIDENT:
        return Choice("serial", apart or "one resident model, it is large")
    return Choice("threads", reason, channels_last=image)


def block_size(model: FlatModel, chain: Chain | None, visits: int, cohort: int) -> int:
    """Clients of a block: as many as have parameters that fit the cache together.

    Clients that are kept in factors take little memory, so it may be most of the cohort. Where
    images take most of the time, blocks are small, and as many as there are cores.

    Args:
        model: the model.
        chain: the model as a chain of layers, if it is one.
        visits: examples that a client goes through in a round.
        cohort: clients of a round.
    """
    each = model.layout.size * torch.empty((), dtype=model.layout.dtype).element_size()
    if chain is not None and chain.images:
        return max(1, min(IMAGES, FACTORED_BYTES // max(each, 1), cohort // available_cores()))
    thin = chain is not None and chain.thin(visits)
    room = FACTORED_BYTES if thin else BLOCK_BYTES
    fitting = min(MOST, max(LEAST, room // max(each, 1)))
    return max(1, min(fitting, cohort))


def _functional(model: FlatModel) -> str | None:
    """Why `torch.func` cannot run the module; None if it can."""
    if model.stochastic:
        return "the model draws random numbers in training"
    if set(model.layout.names) - set(model.layout.trainable) - model.info.still:
        return "the model has buffers"
    if any(isinstance(m, nn.RNNBase) for m in model.module.modules()):
        return "recurrent layers cannot be stacked"
    return None


def _against_stacking(
    model: FlatModel, data: FederatedData, program: LocalProgram, received: Vectors
) -> str | None:
    """Why the program cannot run on stacked vectors; None if it can.

    What it declares is put to the test on two clients and three steps: a program whose text does
    not hold for stacked vectors raises, or gives something else.
    """
    if not program.vectorized:
        return "the program is not vectorized"
    engine = stackable(model, data)
    if engine is None:
        return _functional(model)
    work = _trial(model, data, program, received)
    try:
        alone = list(Serial(model, data, debug=True).map(work, _as_is))
    except Exception:  # it wants more than is known before the first round: take its word
        return None
    try:
        (block,) = Batched(model, data, Workers(1), engine, len(work)).map(work, _as_is)
    except Exception as error:  # what a program raises that takes vectors for one client's
        return f"stacked vectors fail: {type(error).__name__}: {error}"
    places = {int(c): i for i, c in enumerate(block.clients)}
    for one in alone:
        place, start = places[int(one.clients[0])], work.record_of(0).flat
        pairs = [(one.flat[0], block.flat[place], start)]
        pairs += [(v[0], block.sent[n][place], torch.zeros_like(v[0])) for n, v in one.sent.items()]
        for a, b, before in pairs:
            most = 1e-3 * (a - before).norm() + 1e-5 * before.norm() + 1e-7
            if not bool((a - b).norm() <= most):
                return "the program gives something else on stacked vectors"
    return None


def _trial(model: FlatModel, data: FederatedData, program: LocalProgram, received: Vectors) -> Work:
    """Three steps of the two clients with the fewest and the most examples."""
    lengths = data.train.lengths
    clients = np.flatnonzero(lengths)
    ends = clients[[int(lengths[clients].argmin()), int(lengths[clients].argmax())]]
    steps = min(program.max_steps or 3, 3)
    return Work(replace(program, max_steps=steps), np.unique(ends), 1, 0, model.initial(), received)


def _as_is(outcomes: Outcomes) -> Outcomes:
    return outcomes
