"""What `combine` and `dots` share: checks, cutting the vector into parts, and running the parts."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError
from .layout import CHUNK, CODES, RADEMACHER32, Plan, scale, truncated_series

Vector = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]

ENGINES = {"numpy": "arrays", "numba": "compiled", "torch": "arrays", "triton": "cuda"}
"""Back end: the module that holds it."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF_PIECE = 1 << 14
"""Elements of half precision weights in float32 at a time (64 kB a thread)."""
SHARE = 1 << 14
"""Elements that are worth a task of their own."""
SERIAL = 1 << 20
"""Draws that are not worth a second thread (about a millisecond)."""


def backend(device: str | torch.device = "cpu") -> str:
    """The back end that serves `device`: numba (CUDA: triton) where installed, else torch."""
    wanted = "triton" if torch.device(device).type == "cuda" else "numba"
    return wanted if importlib.util.find_spec(wanted) else "torch"


class Part(NamedTuple):
    """A flat view of a tensor inside one block; `start` is the flat number of its first element."""

    x: torch.Tensor
    start: int
    block: int


class Call:
    """One checked call: tensors cut at the bounds of blocks, and who works on them."""

    def __init__(
        self,
        what: str,
        vector: Vector,
        seeds: ArrayLike,
        basis: str,
        blocks: Sequence[int] | None,
        offset: int,
        name: str | None,
    ) -> None:
        self.what, self.seeds = what, to_seeds(seeds)
        if basis not in CODES:
            raise ConfigError(f"{what}: basis is {basis!r}; choose one of {', '.join(CODES)}")
        self.code = CODES[basis]
        self.tensors = self._tensors(vector)
        self.device = self.tensors[0].device if self.tensors else torch.device("cpu")
        self.name = self._engine(name or backend(self.device))
        self.engine = importlib.import_module(f"{__package__}.{ENGINES[self.name]}")
        end = offset + sum(x.numel() for x in self.tensors)
        self.sizes = (end,) if blocks is None else tuple(int(size) for size in blocks)
        if offset < 0 or min(self.sizes, default=0) < 0 or sum(self.sizes) < end:
            raise ConfigError(
                f"{what}: blocks of {sum(self.sizes)} elements do not cover elements {offset} to "
                f"{end}; give the sizes of all blocks of the whole vector, and an offset >= 0"
            )
        self.parts = list(self._cut(offset))

    def _tensors(self, vector: Vector) -> list[torch.Tensor]:
        if isinstance(vector, torch.Tensor):
            vector = [vector]
        tensors = list(vector.values()) if isinstance(vector, Mapping) else list(vector)
        for x in tensors:
            if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
                kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
                raise ConfigError(
                    f"{self.what}: got {kind}; give torch tensors of float16, bfloat16, float32 "
                    "or float64 (convert with .to(torch.float32))"
                )
            if x.layout != torch.strided or not x.is_contiguous():
                raise ConfigError(
                    f"{self.what}: a tensor of shape {tuple(x.shape)} is not contiguous; "
                    "give one that is (.contiguous() copies)"
                )
            if x.device.type not in ("cpu", "cuda") or x.device != tensors[0].device:
                raise ConfigError(
                    f"{self.what}: got a tensor on {x.device}, the first is on "
                    f"{tensors[0].device}; put all on the CPU or all on one CUDA device"
                )
        return tensors

    def _engine(self, name: str) -> str:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        fits = {
            "numpy": self.device.type == "cpu",
            "numba": self.device.type == "cpu",
            "torch": True,
            "triton": self.device.type == "cuda" or interpreted,
        }
        if not fits.get(name):
            allowed = ", ".join(key for key, fit in fits.items() if fit)
            raise ConfigError(
                f"{self.what}: backend is {name!r}; on {self.device.type} choose one of {allowed}"
            )
        if name in ("numba", "triton") and not importlib.util.find_spec(name):
            raise ConfigError(
                f"{self.what}: backend is {name!r}, which is not installed; "
                f"pip install {name}, or choose backend='torch'"
            )
        return name

    def _cut(self, offset: int) -> Iterator[Part]:
        block, end, index = 0, self.sizes[0] if self.sizes else 0, offset
        for tensor in self.tensors:
            x = tensor.detach().view(-1)
            while x.numel():
                while index >= end:
                    block += 1
                    end += self.sizes[block]
                part, x = x[: end - index], x[end - index :]
                yield Part(part, index, block)
                index += part.numel()

    def combination(self, block: int, row: NDArray[np.float64], double: bool) -> Plan | None:
        """The directions of `block` whose coefficient is not zero, ready for the engine."""
        used = np.flatnonzero(row)
        if not len(used):
            return None
        seeds, row = self.seeds[used], row[used] * scale(self.code, self.sizes[block])
        if self.code == RADEMACHER32:
            keys, group = np.unique(seeds >> np.uint64(5), return_inverse=True)
            table = np.zeros((len(keys), 32))
            np.add.at(table, (group, (seeds & np.uint64(31)).astype(np.int64)), row)
            seeds, row = keys, table
        row = row.astype(np.float64 if double else np.float32)
        return Plan(self.code, block, seeds, row, truncated_series(self.sizes[block]))

    def directions(self, block: int, count: int) -> Plan:
        """The first `count` directions of `block`, without coefficients."""
        series = truncated_series(self.sizes[block])
        return Plan(self.code, block, self.seeds[:count], np.zeros(0), series)

    def limit(self, x: torch.Tensor) -> int:
        """Elements that the engine takes at a time: all, unless it needs copies of them."""
        if self.name in ("numpy", "torch"):
            return int(self.engine.PIECE)
        return HALF_PIECE if self.copies(x) else x.numel()

    def copies(self, x: torch.Tensor) -> bool:
        """Whether `x` must be widened to float32 for the engine."""
        return self.name != "triton" and x.dtype in (torch.float16, torch.bfloat16)

    def native(self, x: torch.Tensor) -> Any:
        """`x` as the engine takes it: the same memory as an array, or the tensor."""
        return x.numpy() if self.name in ("numpy", "numba") else x

    def run(self, tasks: Sequence[Callable[[], None]], threads: int, draws: int) -> None:
        """Run independent tasks, on threads where numba can use them and there is enough to do."""
        if self.name != "numba" or draws < SERIAL or min(threads, len(tasks)) < 2:
            for task in tasks:
                task()
            return
        with ThreadPoolExecutor(min(threads, len(tasks))) as workers:
            for done in [workers.submit(task) for task in tasks]:
                done.result()


def cut(x: torch.Tensor, index: int, step: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Cut `x`, whose first element is number `index`, in pieces of about `step`, with numbers.

    Cuts lie at multiples of CHUNK, where `dots` cuts anyway.
    """
    while x.numel() > step:
        size = step - (index + step) % CHUNK
        yield x[:size], index
        x, index = x[size:], index + size
    yield x, index


def to_seeds(seeds: ArrayLike) -> NDArray[np.uint64]:
    """Integers in [0, 2^64) as uint64 [K]."""
    if isinstance(seeds, np.ndarray) and seeds.dtype == np.uint64 and seeds.ndim == 1:
        return seeds
    try:  # one by one: numpy would read [1, 2**63] as floats
        numbers = [operator.index(seed) for seed in cast("Iterable[int]", seeds)]
        return np.array(numbers, dtype=np.uint64)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"seeds are {str(seeds)[:40]}; give a flat list of integers from 0 to 2^64 - 1"
        ) from None
