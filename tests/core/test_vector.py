"""The one vector of a process: put back exactly, kept in a file where it is large."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedsim.core import vector
from fedsim.core.criteria import criterion
from fedsim.core.errors import RunError
from fedsim.core.model import FlatModel
from fedsim.core.vector import Copy, Resident


@pytest.fixture(params=["memory", "file"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Copies in memory, or in files as those of large models are."""
    monkeypatch.setattr(vector, "LARGE", 1 if request.param == "file" else 1 << 40)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_copy_gives_back_every_bit(where: str, dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 1001).to(dtype)
    copy, other = Copy(values), torch.zeros(1001, dtype=dtype)
    copy.put(values)
    before = other._version
    copy.get(other)
    assert torch.equal(other, values)
    assert other._version > before  # autograd would notice
    assert torch.equal(copy.view(), values)
    values.zero_()
    copy.get(other)
    assert other.abs().sum() > 0
    if where == "file":
        copy.view().zero_()
        assert copy.view().abs().sum() > 0  # a view is private


def test_a_folder_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vector, "LARGE", 1)
    monkeypatch.setattr(vector.os, "pwrite", full)
    with pytest.raises(RunError, match="TMPDIR"):
        Copy(torch.ones(4)).put(torch.ones(4))


def made() -> FlatModel:
    torch_generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=torch_generator))
    return FlatModel(module, criterion("cross_entropy"))


def test_a_large_model_is_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small = made()
    monkeypatch.setattr(vector, "LARGE", 1)
    large = made()
    x = torch.linspace(0, 1, 8).view(2, 4)
    assert torch.equal(large.initial().flat, small.initial().flat)
    assert torch.equal(
        large.outputs(large.initial().flat, {}, x), small.outputs(small.initial().flat, {}, x)
    )
    own = large.resident.flat.untyped_storage().data_ptr()
    assert {p.untyped_storage().data_ptr() for p in large.module.parameters()} == {own}
    large.resident.flat.mul_(2)
    assert torch.equal(large.initial().flat, small.initial().flat)
    assert torch.equal(large.replica().module[0].weight, large.module[0].weight)  # type: ignore[index]


def adding(value: float) -> Callable[[torch.Tensor, bytes | None], None]:
    def build(flat: torch.Tensor, held: bytes | None) -> None:
        flat += value - (float(held.decode()) if held else 0.0)

    return build


@pytest.mark.parametrize("incremental", [False, True])
def test_the_vector_comes_back_whoever_had_it(where: str, incremental: bool) -> None:
    model = made()
    start = model.initial().flat.clone()
    resident = Resident(model.initial())
    for name in ("1", "1", "2", "2", "2", "1", "4"):
        resident.restore(name.encode(), adding(float(name)), incremental)
        assert torch.allclose(resident.flat, start + float(name), atol=1e-6), name
        resident.touch()
        resident.flat.fill_(float("nan"))
    resident.restore(None, adding(9.0), incremental)
    assert torch.equal(resident.flat, start + 9)
    resident.touch()
    resident.flat.zero_()
    resident.restore(b"3", adding(3.0), incremental)
    assert torch.allclose(resident.flat, start + 3, atol=1e-6)


def test_a_model_is_not_built_twice_for_many_clients(where: str) -> None:
    resident, built = Resident(made().initial()), []

    def build(flat: torch.Tensor, held: bytes | None) -> None:
        built.append(held)
        flat += 1

    for round in range(3):
        for _ in range(5):
            resident.restore(bytes([round]), build)
            resident.touch()
            resident.flat.zero_()
    assert len(built) == 4  # the first model a second time, to be kept from then on
