"""Structured pruning of models: gates give what slicing gives, and sizes are as predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedsim.core.errors import ConfigError
from fedsim.core.rng import isolated
from fedsim.core.structure import Kept, Structures
from fedsim.models.lora import LoRALinear, adapt
from fedsim.models.pruning import gated, sliced, structures
from fedsim.models.text import CharGPT


def llama() -> nn.Module:
    """Four query heads on two key-value heads (grouped-query attention)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Logits(transformers.LlamaForCausalLM(config))


def roberta() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=24, num_labels=3,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Logits(transformers.RobertaForSequenceClassification(config))


class Logits(nn.Module):
    """A Hugging Face model as a function from tokens to scores."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.inner(tokens).logits
        return scores


def gpt() -> nn.Module:
    return CharGPT(20, 8, 12, 3, 4)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


MODELS = {"mlp": mlp, "gpt": gpt, "llama": llama, "roberta": roberta}


def model(name: str) -> nn.Module:
    """With gates, and adapters that do something."""
    with isolated(3):
        module = gated(adapt(MODELS[name](), 2, 2.0)).eval()
        for layer in module.modules():
            if isinstance(layer, LoRALinear):
                nn.init.normal_(layer.lora_B, std=0.3)
    return module


def inputs(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "mlp":
        return torch.randn(4, 6, generator=generator)
    return torch.randint(2, 20, (4, 8), generator=generator)


def some(found: Structures, seed: int = 0) -> dict[str, torch.Tensor]:
    """About half of everything is left."""
    generator = torch.Generator().manual_seed(seed)
    kept = {s.name: torch.rand(s.groups, generator=generator) < 0.5 for s in found.items}
    for mask in kept.values():
        mask[0] = True
    return kept


def close(module: nn.Module, kept: Kept) -> None:
    found: Structures = module.structures  # type: ignore[assignment]
    for s in found.items:
        module.get_submodule(s.columns[0]).gate.copy_(kept[s.name])  # type: ignore[operator,union-attr]


def weights(module: nn.Module) -> int:
    linear = [m for n, m in module.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
    return sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize("name", MODELS)
def test_the_gated_model_is_the_sliced_model(name: str) -> None:
    module, x = model(name), inputs(name)
    kept = some(module.structures)  # type: ignore[arg-type]
    close(module, kept)
    assert torch.allclose(module(x), sliced(module, kept)(x), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_open_gates_change_nothing(name: str) -> None:
    module, x = model(name), inputs(name)
    with isolated(3):
        plain = adapt(MODELS[name](), 2, 2.0).eval()
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if not n.endswith(".gate")})
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("name", MODELS)
def test_slicing_removes_as_many_weights_as_predicted(name: str) -> None:
    module = model(name)
    found: Structures = module.structures  # type: ignore[assignment]
    kept = some(found, 5)
    assert found.elements == weights(module)
    assert weights(sliced(module, kept)) == pytest.approx(found.left(kept) * found.elements)


@pytest.mark.parametrize("name", MODELS)
def test_a_closed_group_trains_nothing(name: str) -> None:
    """Gradients of the factors are zero exactly where rows and columns are gone."""
    module, x = model(name), inputs(name)
    found: Structures = module.structures  # type: ignore[assignment]
    kept = some(found)
    close(module, kept)
    module(x).square().sum().backward()
    rows, columns = found.sides(kept)
    for path in found.weights:
        layer = module.get_submodule(path)
        assert isinstance(layer, LoRALinear)
        gone = torch.ones(layer.lora_B.shape[0], dtype=torch.bool)
        gone[rows.get(path, torch.arange(len(gone)))] = False
        assert not layer.lora_B.grad[gone].any()  # type: ignore[index]
        gone = torch.ones(layer.lora_A.shape[1], dtype=torch.bool)
        gone[columns.get(path, torch.arange(len(gone)))] = False
        assert not layer.lora_A.grad[:, gone].any()  # type: ignore[index]


def test_grouped_queries_go_with_their_key_value_head() -> None:
    found = structures(llama())
    heads = next(s for s in found.items if s.name.endswith("heads"))
    assert heads.groups == 2
    shapes = {path.rpartition(".")[2]: tuple(i.shape) for path, i in heads.rows.items()}
    assert shapes == {"q_proj": (1, 2, 8), "k_proj": (1, 2, 4), "v_proj": (1, 2, 4)}


def test_a_fused_layer_has_three_parts() -> None:
    found = structures(gpt())
    heads = found.items[0]
    assert heads.rows["blocks.0.attend"].shape == (3, 4, 3)
    assert heads.rows["blocks.0.attend"][1, 0].tolist() == [12, 13, 14]


def test_the_first_tenth_and_the_last_layer_are_left_alone() -> None:
    found = structures(CharGPT(20, 8, 12, 12, 4))
    assert sorted({s.layer for s in found.inner()}) == list(range(1, 11))
    assert {s.layer for s in found.inner(0.0, False)} == set(range(12))
    assert {s.layer for s in structures(CharGPT(20, 8, 12, 1, 4)).inner()} == {0}


def test_a_model_without_groups_says_so() -> None:
    with pytest.raises(ConfigError, match="nothing can be pruned"):
        structures(nn.Linear(3, 2))
