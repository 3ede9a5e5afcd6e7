"""Emulators for offsite tuning: which layers there are, and where their entries belong."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fedsim.config import Named
from fedsim.core.errors import ConfigError, DataError
from fedsim.core.rng import isolated
from fedsim.models import build
from fedsim.models.language import CausalLM
from fedsim.models.offsite import (
    Emulator,
    _next_token,
    align,
    blocks_of,
    kd_loss,
    kept_layers,
    plug_in,
)
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


# ------------------------------------------------------------------------ distillation


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def test_the_distance_of_states() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    student = torch.tensor([[3.0, 2.0], [1.0, 5.0]])
    assert float(kd_loss(student, teacher)) == pytest.approx((4 + 1) / 4 / (50 / 4))
    assert float(kd_loss(teacher, teacher)) == 0
    assert float(kd_loss(student, 0 * teacher)) > 0


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    whole = deep()
    emulator = Emulator(copy.deepcopy(whole), 1, 1, 0.0)
    assert align(emulator, whole, TOKENS, steps=3, lr=0.1) == [0.0] * 3
    after, before = bits(emulator.inner), bits(whole)
    assert all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("weights", [{}, {"kd": 0.9, "lm": 0.1}])
def test_distillation_brings_the_middle_closer_and_moves_nothing_else(weights: dict) -> None:
    runs = []
    for _ in range(2):
        whole = deep()
        emulator = Emulator(copy.deepcopy(whole), 1, 1, 0.5)
        whole_before, before = bits(whole), bits(emulator)
        trained = {n for n, p in emulator.named_parameters() if p.requires_grad}
        losses = align(emulator, whole, TOKENS, steps=40, lr=3e-3, batch=2, **weights)
        assert losses[-1] < 0.7 * losses[0]
        after = bits(emulator)
        moved = {n for n in after if not torch.equal(after[n], before[n])}
        assert {".".join(n.split(".")[1:3]) for n in moved} == {"blocks.1", "blocks.2"}
        assert {n for n, p in emulator.named_parameters() if p.requires_grad} == trained
        assert all(torch.equal(p, whole_before[n]) for n, p in whole.named_parameters())
        runs.append(after)
    assert all(torch.equal(p, runs[1][n]) for n, p in runs[0].items())


def test_padding_is_no_text() -> None:
    scores = torch.zeros(1, 6, 3)
    scores[0, 3:, 1] = 9.0  # wrong, where only padding follows
    x = torch.tensor([[0, 1, 0, 2, 2, 2]])
    with_end = float(_next_token(scores, x, 2))
    assert with_end == pytest.approx(math.log(3))
    assert float(_next_token(scores, x, None)) > 2 * with_end


def test_a_model_of_transformers_is_distilled() -> None:
    with isolated(3):
        whole = CausalLM(llama(layers=5).eval(), 50)
    emulator = Emulator(copy.deepcopy(whole), 1, 1, 0.5)
    losses = align(emulator, whole, TOKENS, steps=15, lr=3e-3)
    assert losses[-1] < losses[0]


def test_it_is_a_model_by_name() -> None:
    from fedsim.config import DataConfig
    from fedsim.data import load

    def made_of(public: int, **more: object) -> Emulator:
        data = load(
            DataConfig(
                dataset=Named(name="instruction_tasks", params={"examples": 40, "length": 64,
                                                                "only": ["capital"]}),
                clients=2, public=public,
            ),
            0,
        )  # fmt: skip
        base = {"width": 8, "layers": 4, "heads": 2}
        model = build(Named(name="offsite", params={"base_params": base, **more}), data, 0)
        assert isinstance(model, Emulator)
        assert model(data.fields["x"][:2]).shape == (2, 64, data.num_outputs)
        return model

    plain, aligned, again = (made_of(8, align_steps=n) for n in (0, 2, 2))
    for name, p in aligned.named_parameters():
        other = plain.get_parameter(name)
        assert torch.equal(p, other) != name.startswith("inner.blocks.1."), name
        assert torch.equal(p, again.get_parameter(name)), name
        assert p.requires_grad == other.requires_grad
    for wrong, words in (
        ({"align_steps": 2}, "data.public above 0"), ({"align_steps": -1}, "align_steps"),
        ({"kd": 0.0}, "kd"), ({"align_lr": 0.0}, "align_lr"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            made_of(0, **wrong)
