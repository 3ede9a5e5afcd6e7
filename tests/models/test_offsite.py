"""Emulators for offsite tuning: which layers there are, and where their entries belong."""

from __future__ import annotations

import copy

import pytest
import torch

from fedsim.config import Named
from fedsim.core.errors import ConfigError, DataError
from fedsim.models import build
from fedsim.models.offsite import Emulator, blocks_of, kept_layers, plug_in
from tests.models.test_host import TOKENS, llama, made


def deep() -> torch.nn.Module:
    from fedsim.models.text import CharGPT

    torch_model = made("char_gpt")
    with torch.no_grad():
        whole = CharGPT(50, 12, 16, 6, 2)
        for i, p in enumerate(whole.parameters()):
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    assert type(torch_model) is type(whole)
    return whole


def test_layers_that_are_kept() -> None:
    assert kept_layers(6, 1, 1, 0.0) == [0, 1, 2, 3, 4, 5]
    assert kept_layers(6, 1, 1, 0.5) == [0, 1, 4, 5]  # first and last of the middle
    assert kept_layers(32, 2, 2, 0.2)[:3] == [0, 1, 2]
    assert kept_layers(32, 2, 2, 0.2)[-3:] == [29, 30, 31]
    assert kept_layers(4, 1, 1, 0.9) == [0, 1, 3]
    for wrong in ((4, 0, 1, 0.5), (4, 1, 0, 0.5), (4, 1, 1, 1.0), (4, 2, 2, 0.5)):
        with pytest.raises(ConfigError, match="model"):
            kept_layers(*wrong)


def test_nothing_dropped_is_the_model() -> None:
    whole = deep()
    emulator = Emulator(copy.deepcopy(whole), 1, 1, 0.0)
    assert torch.equal(emulator(TOKENS), whole(TOKENS))
    assert {emulator.full_name(n) for n, _ in emulator.named_parameters()} == {
        n for n, _ in whole.named_parameters()
    }


def test_trained_layers_go_back_by_name() -> None:
    whole = deep()
    emulator = Emulator(copy.deepcopy(whole), 1, 2, 0.7)
    assert emulator.layers == [0, 1, 4, 5]
    state = {n: p.detach() + 1 for n, p in emulator.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in state} == {"0", "2", "3"}
    before = {n: p.clone() for n, p in whole.named_parameters()}
    plug_in(whole, emulator, state)
    for name, p in whole.named_parameters():
        moved = name.startswith(("blocks.0.", "blocks.4.", "blocks.5."))
        assert torch.equal(p, before[name] + 1 if moved else before[name]), name
    with pytest.raises(DataError, match="not the emulator's trained entries"):
        plug_in(whole, emulator, dict(list(state.items())[1:]))
    with pytest.raises(DataError, match="has no such entry"):
        plug_in(made("char_gpt"), emulator, state)


def test_a_model_of_transformers() -> None:
    name, layers = blocks_of(llama())
    assert name.endswith("layers")
    assert len(layers) == 2
    with pytest.raises(ConfigError, match="list of equal layers"):
        blocks_of(torch.nn.Linear(2, 2))


def test_it_is_a_model_by_name() -> None:
    from fedsim.config import DataConfig
    from fedsim.data import load

    data = load(
        DataConfig(
            dataset=Named(name="instruction_tasks", params={"examples": 20, "only": ["capital"],
                                                            "length": 64}),
            clients=2,
        ),
        0,
    )  # fmt: skip
    params = {"base_params": {"width": 8, "layers": 4, "heads": 2}, "drop": 0.5}
    model = build(Named(name="offsite", params=params), data, 0)
    assert isinstance(model, Emulator)
    assert model(data.fields["x"][:2]).shape == (2, 64, data.num_outputs)
