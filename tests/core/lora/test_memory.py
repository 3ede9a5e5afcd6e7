"""The server holds one module of all adapters at a time, and no dense update."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest
import torch

from fedsim.core.lora import Factors, ensemble, fedit, flexlora, flora, hetlora, lego

MODULES, ADAPTERS, RANK, WIDTH = 12, 3, 2, 40


class OnDisk(Mapping[str, Factors]):
    """An adapter that is read module by module, and notes how many modules are held."""

    alive: ClassVar[weakref.WeakSet[torch.Tensor]] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __getitem__(self, name: str) -> Factors:
        draw = torch.Generator().manual_seed(100 * self._seed + int(name))
        a, b = torch.randn(RANK, WIDTH, generator=draw), torch.randn(WIDTH, RANK, generator=draw)
        OnDisk.alive.add(a)
        OnDisk.most = max(OnDisk.most, len(OnDisk.alive))
        return Factors(a, b)

    def __iter__(self) -> Iterator[str]:
        return iter(map(str, range(MODULES)))

    def __len__(self) -> int:
        return MODULES


@pytest.mark.parametrize("rule", [fedit, flora, flexlora, hetlora, ensemble, lego])
def test_one_module_at_a_time(rule) -> None:
    OnDisk.alive, OnDisk.most = weakref.WeakSet(), 0
    found = rule([OnDisk(seed) for seed in range(ADAPTERS)])
    assert len(found) == MODULES
    # The one before is let go of only when the next one has been read.
    assert OnDisk.most <= 3 * ADAPTERS < MODULES * ADAPTERS


@pytest.mark.parametrize("rule", [fedit, flora, flexlora, hetlora, ensemble, lego])
def test_nothing_is_made_dense(rule) -> None:
    """Not even one module's update: a layer is so wide that it would be seen."""
    wide = 3000
    adapters = [{"m": Factors(torch.ones(1, wide), torch.ones(wide, 1))} for _ in range(2)]
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,))
                        if isinstance(t, torch.Tensor))  # fmt: skip
            return out

    with Watch():
        rule(adapters)
    assert max(seen) < wide * wide / 100
