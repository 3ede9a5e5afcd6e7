"""Hugging Face language models in the house's harness: whole, and with adapters."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fedsim.config import DataConfig, Named
from fedsim.core.criteria import criterion
from fedsim.core.errors import ConfigError
from fedsim.core.model import FlatModel
from fedsim.core.rng import isolated
from fedsim.data import FederatedData, load
from fedsim.models import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as Hugging Face saves it."""
    path: Path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    with isolated(0):
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data() -> FederatedData:
    dataset = {"name": "instruction_tasks", "tasks": 6, "examples": 6, "heldout_tasks": 2}
    return load(DataConfig.model_validate({"dataset": dataset, "partition": "natural"}), 0)


def model(folder: Path, data: FederatedData, **params: Any) -> FlatModel:
    spec = Named(name="hf_causal_lm", params={"path": str(folder), **params})
    return FlatModel(build(spec, data, 0), criterion("next_token"))


def test_a_whole_model_is_one_vector_with_tied_weights_once(
    folder: Path, data: FederatedData
) -> None:
    whole = model(folder, data)
    names = whole.layout.trainable
    assert sum("embed_tokens" in n or "lm_head" in n for n in names) == 1
    x = data.fields["x"][:2]
    record = whole.initial()
    before = whole.outputs(record.flat, record.beside, x)
    assert before.shape == (2, x.shape[1], data.num_outputs)
    resident = whole.resident
    assert torch.equal(whole.outputs(resident.flat, resident.beside, x), before)
    with torch.no_grad():
        assert torch.equal(whole.module.eval()(x), before)
    resident.flat.mul_(0.9)
    with torch.no_grad():
        assert not torch.equal(whole.module(x), before)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("lora", {"rank": 2}), ("prompt", {"tokens": 4}), ("p_tuning", {"tokens": 4}),
        ("prefix", {"tokens": 4}), ("ia3", {}),
    ],
)  # fmt: skip
def test_only_adapters_travel(
    kind: str, params: dict[str, Any], folder: Path, data: FederatedData
) -> None:
    adapted = model(folder, data, peft=kind, **params)
    whole = model(folder, data)
    assert adapted.layout.num_trainable < whole.layout.num_trainable / 4
    mark = {"lora": "lora_", "ia3": "ia3_"}.get(kind, "prompt_encoder")
    assert all(mark in n for n in adapted.layout.trainable)
    record = adapted.initial()
    rows = {n: t[:3] for n, t in data.fields.items()}
    loss, gradient = adapted.gradient(record.flat, record.beside, rows, adapted.criterion)
    assert torch.isfinite(loss)
    assert float(gradient.norm()) > 0


def test_what_cannot_be_is_refused(folder: Path, data: FederatedData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        model(tmp_path / "nothing", data)
    for wrong in ({"dtype": "int8"}, {"peft": "adalora"}, {"quantised": "2bit"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            model(folder, data, **wrong)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ConfigError, match="needs the Python package bitsandbytes"):
            model(folder, data, quantised="4bit")
    LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
                                 num_hidden_layers=1, num_attention_heads=1)
                     ).save_pretrained(tmp_path / "small")  # fmt: skip
    with pytest.raises(ConfigError, match="knows 8 tokens"):
        model(tmp_path / "small", data)


# ---------------------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=40, hidden_dropout_prob=0.5,
    )  # fmt: skip
    with isolated(0):
        BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def passages() -> FederatedData:
    dataset = {"name": "pydoc_topics", "tokenizer": "characters", "classes": 3, "length": 32}
    return load(DataConfig.model_validate({"dataset": dataset, "clients": 4}), 0)


def test_an_encoder_classifies_without_dropout_and_padding(
    encoder: Path, passages: FederatedData
) -> None:
    module = build(Named(name="hf_encoder", params={"path": str(encoder)}), passages, 0).train()
    x = passages.fields["x"][:5]
    scores = module(x)
    assert scores.shape == (5, 3)
    assert torch.equal(module(x), scores)  # in training mode
    padded = torch.cat([x, torch.zeros(5, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(module(padded), scores, rtol=1e-4, atol=1e-5)


def test_an_encoder_has_adapters_a_head_and_what_can_be_pruned(
    encoder: Path, passages: FederatedData
) -> None:
    params = {"base": "hf_encoder", "base_params": {"path": str(encoder)}, "rank": 2,
              "head": True, "prunable": True}  # fmt: skip
    made = FlatModel(build(Named(name="lora", params=params), passages, 0),
                     criterion("cross_entropy"))  # fmt: skip
    assert all("lora_" in n or n.startswith("head.") for n in made.layout.trainable)
    assert made.info.structures is not None
    assert {s.groups for s in made.info.structures.items} == {4, 24}
    record, rows = made.initial(), {n: t[:3] for n, t in passages.fields.items()}
    loss, gradient = made.gradient(record.flat, record.beside, rows, made.criterion)
    assert torch.isfinite(loss)
    assert float(gradient.norm()) > 0


def test_an_encoder_needs_tokens_with_classes_that_it_knows(
    encoder: Path, passages: FederatedData, data: FederatedData, tmp_path: Path
) -> None:
    def made(path: Path, of: FederatedData) -> object:
        return build(Named(name="hf_encoder", params={"path": str(path)}), of, 0)

    with pytest.raises(ConfigError, match="needs tokens with classes"):
        made(encoder, data)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        made(tmp_path / "nothing", passages)
    BertModel(BertConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1)).save_pretrained(tmp_path / "small")  # fmt: skip
    with pytest.raises(ConfigError, match="knows 8 tokens"):
        made(tmp_path / "small", passages)
