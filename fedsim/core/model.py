"""A module seen as a function of one flat parameter vector."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.core.criteria import Criterion
from fedsim.core.records import FlatRecord, Layout
from fedsim.core.structure import Structures
from fedsim.core.vector import Resident, parked

Loss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""`loss(outputs, target, weight) -> scalar` of one client's batch."""


def trainable_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters with `requires_grad`, shared ones once."""
    return frozenset(n for n, p in module.named_parameters() if p.requires_grad)


def travelling(module: nn.Module) -> dict[str, Tensor]:
    """The entries of a module's state that a client's work can change: no frozen parameters.

    A shared (tied) parameter is listed once, under its first name.
    """
    trainable = trainable_names(module)
    parameters = {n for n, _ in module.named_parameters(remove_duplicate=False)}
    return {n: t for n, t in module.state_dict().items() if n in trainable or n not in parameters}


def base_of(module: nn.Module) -> str:
    """Digest of a module's frozen weights, and of what its layers multiply updates by.

    Two parties whose digests differ do not mean the same model by the same trained entries.
    """
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    if not frozen:
        return ""
    total = hashlib.sha256()
    for name, child in module.named_modules():
        scaling = getattr(child, "scaling", None)
        if isinstance(scaling, float):
            total.update(f"{name} {scaling!r}\n".encode())
    for name, tensor in sorted(frozen.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(raw.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def is_stochastic(module: nn.Module) -> bool:
    """Whether the module draws random numbers in training (dropout)."""
    kinds = (nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)
    return any(
        isinstance(m, kinds) and (getattr(m, "p", 0) or getattr(m, "dropout", 0))
        for m in module.modules()
    )


@dataclass(frozen=True)
class ModelInfo:
    """What an algorithm may know of a model without holding it.

    Attributes:
        layout: names, shapes and dtypes of all entries.
        kinds: class name of the module that owns each entry, for example ``"BatchNorm2d"``.
        buffers: names of the entries that are not parameters.
        head: names of the entries of the last module that has parameters.
        still: names of the entries that local work never changes, only the server: those that a
            module names in an attribute `still`. Messages may leave them out.
        structures: what can be pruned, where the module says it (`fedsim.models.pruning.gated`).
        base: digest of the weights that are not trained and of layers' `scaling`; empty where
            everything is trained. Server and clients must agree on it.
    """

    layout: Layout
    kinds: Mapping[str, str]
    buffers: frozenset[str]
    head: frozenset[str]
    still: frozenset[str] = frozenset()
    structures: Structures | None = None
    base: str = ""

    @staticmethod
    def of(module: nn.Module, layout: Layout) -> ModelInfo:
        """Read the facts off a module."""
        owners: dict[str, tuple[str, str]] = {}
        still: set[str] = set()
        for prefix, child in module.named_modules():
            before = f"{prefix}." if prefix else ""
            entries = (*child._parameters, *child._buffers)
            owners.update({f"{before}{e}": (prefix, type(child).__name__) for e in entries})
            still.update(f"{before}{e}" for e in getattr(child, "still", ()))
        parameters = [n for n, _ in module.named_parameters()]
        last = owners[parameters[-1]][0] if parameters else ""
        names = frozenset(layout.names)
        return ModelInfo(
            layout,
            {n: kind for n, (_, kind) in owners.items() if n in names},
            names - frozenset(parameters),
            frozenset(n for n, (prefix, _) in owners.items() if prefix == last and n in names),
            names & still,
            getattr(module, "structures", None),
            base_of(module),
        )


class FlatModel:
    """One resident module, evaluated at flat vectors.

    The vector holds the trainable parameters first and the floating-point buffers behind them;
    buffers (BatchNorm statistics) are updated in place, in the vector, during training. Frozen
    parameters stay in the module and never travel.
    Not thread-safe: each worker thread has its own.

    Args:
        module: its present values are the initial model.
        criterion: the task's loss.

    Attributes:
        channels_last: whether images are trained on in that memory format (see `replica`).
    """

    def __init__(self, module: nn.Module, criterion: Criterion) -> None:
        self.module = module
        self.criterion = criterion
        state = travelling(module)
        self.layout = Layout.of(state, trainable_names(module))
        self.info = ModelInfo.of(module, self.layout)
        self.stochastic = is_stochastic(module)
        self.channels_last = False
        beside = {n: state[n].detach().clone() for n in self.layout.beside}
        values = FlatRecord(self.layout, self.layout.flatten(state), beside)
        self._initial, resident = parked(module, values, beside)
        if resident is not None:
            self.__dict__["resident"] = resident

    def initial(self) -> FlatRecord:
        """The values the module was built with."""
        return self._initial

    @cached_property
    def resident(self) -> Resident:
        """The vector on which `fedsim.core.resident` programs work; the module's own memory."""
        return Resident(self._initial, self.module)

    def replica(self, channels_last: bool = False) -> FlatModel:
        """The same model with a module of its own, for another thread.

        Args:
            channels_last: train on images in that memory format, which suits convolutions on CPUs
                and changes last bits.
        """
        twin = copy.copy(self)
        twin.__dict__.pop("resident", None)
        twin.module, twin.channels_last = copy.deepcopy(self.module), channels_last
        return twin

    def _bind(self, flat: Tensor, beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.layout.views(flat) | dict(beside)

    def evaluating(self) -> AbstractContextManager[None]:
        """The module is in evaluation mode inside the block."""
        return self._mode(False)

    @contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        before = self.module.training
        if before != training:
            self.module.train(training)
        try:
            yield
        finally:
            if before != training:
                self.module.train(before)

    def gradients(
        self,
        flat: Tensor,
        beside: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        loss: Loss,
        training: bool = True,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Loss (scalar) and its gradient, one tensor for each trainable entry in vector order.

        Args:
            flat: vector of shape [layout.size]; its buffer part is updated in place.
            beside: entries outside the vector, updated in place.
            batch: fields `x` and `y` (more are passed to nobody), first axis the examples.
            loss: the training loss.
            training: module mode; False freezes BatchNorm statistics.
        """
        layout = self.layout
        leaves = [layout.view(flat, n).detach().requires_grad_() for n in layout.trainable]
        values = self._bind(flat, beside)
        values.update(zip(layout.trainable, leaves, strict=True))
        x = batch["x"]
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with self._mode(training), torch.enable_grad():
            value = loss(
                functional_call(self.module, values, (x,)), batch["y"], batch.get("weight")
            )
            grads = torch.autograd.grad(value, leaves, allow_unused=True)
        return value.detach(), list(grads)

    def gradient(
        self,
        flat: Tensor,
        beside: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        loss: Loss,
        training: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """As `gradients`, the gradient as one vector of shape [num_trainable]."""
        value, grads = self.gradients(flat, beside, batch, loss, training)
        out = torch.zeros_like(flat[: self.layout.num_trainable])
        for name, grad in zip(self.layout.trainable, grads, strict=True):
            if grad is not None:
                out[self.layout.span(name)] = grad.reshape(-1)
        return value, out

    @torch.no_grad()
    def outputs(
        self, flat: Tensor, beside: dict[str, Tensor], x: Tensor, training: bool = False
    ) -> Tensor:
        """The module's outputs at `flat` for inputs `x` of shape [B, ...]."""
        with self._mode(training):
            result: Tensor = functional_call(self.module, self._bind(flat, beside), (x,))
        return result

    @torch.no_grad()
    def measure(
        self, record: FlatRecord, fields: dict[str, Tensor], index: Tensor, batch_size: int = 1024
    ) -> Tensor:
        """Loss sum, number right and number of positions of each example; shape [3, len(index)].

        Args:
            record: the model's values.
            fields: all examples.
            index: which ones, int64.
            batch_size: examples per forward pass.
        """
        parts = [
            self.criterion.measure(
                self.outputs(record.flat, record.beside, fields["x"][rows]), fields["y"][rows]
            )
            for rows in index.split(batch_size)
        ]
        return torch.cat(parts, 1) if parts else torch.zeros(3, 0)
