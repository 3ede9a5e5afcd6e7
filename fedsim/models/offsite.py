"""Offsite tuning: clients get the outer layers of a model and a thinned middle, not the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.errors import ConfigError, DataError, require
from fedsim.core.rng import SERVER, isolated, key, stream
from fedsim.data.arguments import call
from fedsim.data.federated import FederatedData


def blocks_of(module: nn.Module) -> tuple[str, nn.Module]:
    """Name and container of a model's layers: the longest list of modules of one class.

    Raises:
        ConfigError: there is none.
    """
    found = [
        (len(child), name, child)
        for name, child in module.named_modules()
        if isinstance(child, (nn.ModuleList, nn.Sequential))
        and len(child) > 1
        and len({type(layer) for layer in child}) == 1
    ]
    if not found:
        raise ConfigError("model = offsite needs a base with a list of equal layers")
    _, name, container = max(found, key=lambda f: f[0])
    return name, container


def kept_layers(layers: int, lower: int, upper: int, drop: float) -> list[int]:
    """Numbers of the layers that an emulator has.

    The first `lower` and the last `upper` are all there; of the n between them
    ``n' = round(n (1 - drop))`` (at least 1), at places ``int(i (n - 1) / (n' - 1))``, so that the
    first and the last of them are among them.

    Args:
        layers: of the model.
        lower: trained layers at the input.
        upper: trained layers at the output.
        drop: share of the middle that is left out.

    Raises:
        ConfigError: a number is not possible.
    """
    require(lower >= 1, "model.lower", lower, "1 or above")
    require(upper >= 1, "model.upper", upper, "1 or above")
    require(0 <= drop < 1, "model.drop", drop, "from 0, below 1")
    n = layers - lower - upper
    require(n >= 1, "model.lower + model.upper", lower + upper, f"at most {layers - 1}")
    few = max(1, round(n * (1 - drop)))
    middle = [int(i * (n - 1) / (few - 1)) for i in range(few)] if few > 1 else [0]
    outer = range(layers - upper, layers)
    return [*range(lower), *(lower + m for m in middle), *outer]


class Emulator(nn.Module):
    """A thinned model whose outer layers are trained.

    Xiao et al., *Offsite-Tuning: Transfer Learning without Full Model*, 2023 (arXiv 2302.04870),
    with uniform layer dropping; `align` distils the middle. Entries keep the names that they have
    in the emulator; `to_full` says, by name, which of the whole model they are.

    Args:
        inner: the whole model; it is thinned in place.
        lower: see `kept_layers`.
        upper: see `kept_layers`.
        drop: see `kept_layers`.

    Attributes:
        layers: numbers of the layers that are left.
        lower: trained layers at the input.
        upper: trained layers at the output.
    """

    def __init__(self, inner: nn.Module, lower: int, upper: int, drop: float) -> None:
        super().__init__()
        self.lower, self.upper = lower, upper
        self._where, container = blocks_of(inner)
        every = list(container.children())
        self.layers = kept_layers(len(every), lower, upper, drop)
        left = [every[number] for number in self.layers]
        listed = isinstance(container, nn.ModuleList)
        thinned: nn.Module = nn.ModuleList(left) if listed else nn.Sequential(*left)
        parent, _, last = self._where.rpartition(".")
        setattr(inner.get_submodule(parent), last, thinned)
        inner.requires_grad_(False)
        for place in (*range(lower), *range(len(self.layers) - upper, len(self.layers))):
            left[place].requires_grad_(True)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """As the whole model."""
        out: Tensor = self.inner(x)
        return out

    def middle(self) -> list[nn.Module]:
        """The thinned layers between the trained ones."""
        every = list(self.inner.get_submodule(self._where).children())
        return every[self.lower : len(every) - self.upper]

    def last_of(self, full: nn.Module) -> nn.Module:
        """The layer of the whole model whose output that of the thinned middle stands for."""
        return list(full.get_submodule(self._where).children())[-1 - self.upper]

    def full_name(self, name: str) -> str:
        """The name that an entry has in the whole model."""
        inner, start = name.removeprefix("inner."), f"{self._where}."
        if not inner.startswith(start):
            return inner
        place, _, rest = inner.removeprefix(start).partition(".")
        return f"{start}{self.layers[int(place)]}.{rest}"

    def to_full(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained entries under their names in the whole model.

        Args:
            state: all trained entries of the emulator, by name.

        Raises:
            DataError: entries are missing or unknown.
        """
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        if set(state) != trained:
            wrong: Sequence[str] = sorted(set(state) ^ trained)
            raise DataError(f"these are not the emulator's trained entries: {', '.join(wrong[:3])}")
        return {self.full_name(n): t for n, t in state.items()}


def kd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean(((h_T - h_S) / rms(h_T))^2)``, the root mean square being over the whole tensor."""
    scale = teacher.square().mean().sqrt().clamp_min(torch.finfo(teacher.dtype).tiny)
    return ((teacher - student) / scale).square().mean()


@contextmanager
def _heard(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer puts out, while the block lasts: the last output alone."""
    found: list[Tensor] = []

    def note(_: nn.Module, __: Any, out: Any) -> None:
        found[:] = [out[0] if isinstance(out, tuple) else out]

    handle = layer.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def align(
    emulator: Emulator,
    full: nn.Module,
    x: Tensor,
    *,
    steps: int = 500,
    batch: int = 8,
    lr: float = 1e-4,
    kd: float = 1.0,
    lm: float = 0.0,
    end: int | None = None,
    seed: int = 0,
) -> list[float]:
    """Distil the whole model's middle into the emulator's, in place; the other layers stay.

    The loss is ``lm * CE + kd * mean(((h_T - h_S) / rms(h_T))^2)`` with h the output of the middle,
    as in FederatedScope-LLM, whose experiments have lm = 0, kd = 1, 500 batches and rate 1e-4. CE
    is that of the next token of x. Adam is our choice: the code means SGD at that rate.

    Args:
        emulator: of `full`.
        full: the whole model; it is not changed.
        x: tokens [N, T] of the owner of the model.
        steps: minibatches.
        batch: examples of each, drawn anew.
        lr: of Adam.
        kd: weight of the distance of states.
        lm: weight of the language modelling loss.
        end: token that fills up the end of an example, whose repetitions do not count.
        seed: of the minibatches.

    Returns:
        The loss of every step.
    """
    trained = [p for layer in emulator.middle() for p in layer.parameters()]
    modes = {p: p.requires_grad for p in emulator.parameters()}
    emulator.requires_grad_(False).eval()
    full.eval()
    for p in trained:
        p.requires_grad_(True)
    optimizer, draw = torch.optim.Adam(trained, lr), stream(seed, 0, SERVER, "align")
    losses = []
    with _heard(emulator.middle()[-1]) as student, _heard(emulator.last_of(full)) as teacher:
        for _ in range(steps):
            rows = x[torch.from_numpy(draw.choice(len(x), min(batch, len(x)), replace=False))]
            with torch.no_grad():
                full(rows)
            outputs = emulator(rows)
            loss = kd * kd_loss(student[0], teacher[0])
            if lm:
                loss = loss + lm * _next_token(outputs, rows, end)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    for p, mode in modes.items():
        p.requires_grad_(mode).grad = None
    return losses


def _next_token(outputs: Tensor, x: Tensor, end: int | None) -> Tensor:
    ahead = x[:, 1:]
    counts = torch.ones_like(ahead, dtype=torch.bool)
    if end is not None:
        counts = (ahead != end) | (x[:, :-1] != end)
    return F.cross_entropy(outputs[:, :-1][counts], ahead[counts])


@torch.no_grad()
def plug_in(full: nn.Module, emulator: Emulator, state: Mapping[str, Tensor]) -> nn.Module:
    """Put what clients trained on an emulator into the whole model, in place, by name.

    Args:
        full: the whole model.
        emulator: on which was trained.
        state: its trained entries.

    Raises:
        DataError: entries are missing, unknown, or of other shapes.
    """
    named, own = emulator.to_full(state), dict(full.named_parameters())
    wrong = [n for n, t in named.items() if n not in own or own[n].shape != t.shape]
    if wrong:
        raise DataError(f"the whole model has no such entry: {', '.join(sorted(wrong)[:3])}")
    for name, tensor in named.items():
        own[name].copy_(tensor)
    return full


def offsite(
    data: FederatedData,
    seed: int,
    base: str = "char_gpt",
    lower: int = 1,
    upper: int = 1,
    drop: float = 0.5,
    align_steps: int = 0,
    align_batch: int = 8,
    align_lr: float = 1e-4,
    kd: float = 1.0,
    lm: float = 0.0,
    base_params: dict[str, Any] | None = None,
) -> Emulator:
    """The emulator of another model for offsite tuning: outer layers trained, middle thinned.

    With ``drop = 0`` it is the model itself. Embedding and head are frozen. The owner of the model
    may distil its middle into the emulator's first, on the public examples (`data.public`); here
    every process that makes the model does that for itself, with the same seed.

    Args:
        data: passed on to the base.
        seed: passed on to the base; its weights are those of the base in any other run.
        base: name of the model, such as char_gpt or hf_causal_lm.
        lower: trained layers at the input.
        upper: trained layers at the output.
        drop: share of the layers between them that is left out.
        align_steps: minibatches of distillation; 0: none.
        align_batch: public examples of each.
        align_lr: learning rate of the distillation.
        kd: weight of the distance of states in it.
        lm: weight of the language modelling loss in it.
        base_params: parameters of the base.

    Raises:
        ConfigError: a value is not allowed, or there is nothing to distil on.
    """
    require(align_steps >= 0, "model.align_steps", align_steps, "0 or above")
    require(align_batch >= 1, "model.align_batch", align_batch, "1 or above")
    require(align_lr > 0, "model.align_lr", align_lr, "above 0")
    require(min(kd, lm) >= 0 and kd + lm > 0, "model.kd, model.lm", (kd, lm), "0 or above, not all")
    if align_steps and not len(data.public):
        raise ConfigError(
            f"model.align_steps = {align_steps} needs public examples: data.public above 0"
        )
    with isolated(key(seed, 0, SERVER, "model")):
        inner = call(
            "models", base, "model.base_params", base_params or {}, data=data, seed=seed,
            input_shape=data.input_shape, num_outputs=data.num_outputs,
        )  # fmt: skip
    full = copy.deepcopy(inner) if align_steps else None
    emulator = Emulator(inner, lower, upper, drop)
    if full is not None:
        end = data.meta.get("end")
        align(
            emulator, full, data.fields["x"][torch.from_numpy(data.public)], steps=align_steps,
            batch=align_batch, lr=align_lr, kd=kd, lm=lm, seed=seed,
            end=end if isinstance(end, int) else None,
        )  # fmt: skip
    return emulator
