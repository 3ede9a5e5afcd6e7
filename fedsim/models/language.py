"""Hugging Face language models, whole or with adapters, as modules from tokens to scores."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.errors import ConfigError, require
from fedsim.core.text import tame
from fedsim.data.federated import FederatedData

PEFT = ("lora", "prompt", "p_tuning", "prefix", "ia3")
QUANTISED = ("4bit", "8bit")


class CausalLM(nn.Module):
    """A causal language model that takes tokens and gives scores.

    Args:
        inner: a Hugging Face model.
        vocabulary: scores to give; the model may have more, for alignment.
    """

    def __init__(self, inner: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.inner, self.vocabulary = inner, vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next token; [B, T] -> [B, T, vocabulary]."""
        out: Any = self.inner(input_ids=tokens, use_cache=False)
        scores: Tensor = out.logits[:, -tokens.shape[1] :, : self.vocabulary]
        return scores


def hf_causal_lm(
    data: FederatedData,
    path: str,
    gguf_file: str | None = None,
    dtype: str = "float32",
    peft: str | None = None,
    rank: int = 8,
    alpha: int = 16,
    tokens: int = 20,
    targets: list[str] | None = None,
    quantised: str | None = None,
) -> CausalLM:
    """A pretrained causal LM: a Hugging Face id or folder, or a GGUF file, optionally with peft.

    With `peft` the base is frozen and only the adapters are trained and travel: ``"lora"`` with
    FedAvg is FedIT, ``"prompt"`` FedPrompt, ``"p_tuning"`` FedPTuning; ``"prefix"`` tunes keys and
    values in front of every layer, ``"ia3"`` factors of activations.

    Args:
        data: gives the vocabulary; its tokenizer must be the model's.
        path: id of the hub, folder, or path of a ``.gguf`` file.
        gguf_file: name of the GGUF file in that repository or folder.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        peft: None for the whole model.
        rank: of LoRA.
        alpha: of LoRA.
        tokens: virtual tokens of prompt, p-tuning and prefix.
        targets: modules that LoRA or IA3 adapt; None: peft's default for the model.
        quantised: hold the frozen base in ``"4bit"`` (NF4, as QLoRA) or ``"8bit"``; needs the
            Python package bitsandbytes and `peft`, or a base of the model `lora`.

    Raises:
        ConfigError: the model cannot be loaded, or does not fit the data.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    require(dtype in dtypes, "model.dtype", dtype, " or ".join(dtypes))
    require(peft is None or peft in PEFT, "model.peft", peft, f"one of {', '.join(PEFT)}")
    require(
        quantised is None or quantised in QUANTISED, "model.quantised", quantised,
        " or ".join(QUANTISED),
    )  # fmt: skip
    transformers = _transformers("hf_causal_lm")
    place = Path(path).expanduser()
    if place.suffix == ".gguf":
        place, gguf_file = place.parent, place.name
    more: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    if quantised is not None:
        more["quantization_config"] = _quantisation(transformers, quantised, gguf_file)
    try:
        inner: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(place) if place.exists() else path,
            dtype=dtypes[dtype],
            attn_implementation="eager",
            **more,
        )
    except Exception as error:  # the library raises whatever its readers and network layers raise
        raise ConfigError(f"model.path = {path!r} cannot be loaded: {tame(str(error))}") from None
    width = int(inner.config.vocab_size)
    if width < data.num_outputs:
        raise ConfigError(
            f"model.path = {path!r} knows {width} tokens; dataset {data.name} has "
            f"{data.num_outputs}: give data.dataset.tokenizer the same model"
        )
    if peft is not None:
        inner = _adapted(inner, peft, rank, alpha, tokens, targets)
    return CausalLM(inner, data.num_outputs)


class Encoder(nn.Module):
    """An encoder of the BERT family that classifies: mean of the last states, one linear layer.

    Args:
        inner: a Hugging Face encoder.
        classes: outputs.
    """

    def __init__(self, inner: Any, classes: int) -> None:
        super().__init__()
        self.inner, self.padding = inner, int(inner.config.pad_token_id or 0)
        self.head = nn.Linear(int(inner.config.hidden_size), classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the classes; [B, T] -> [B, classes]. Padding counts nowhere."""
        there = (tokens != self.padding).long()
        states: Tensor = self.inner(input_ids=tokens, attention_mask=there).last_hidden_state
        weight = there.to(states.dtype)[:, :, None]
        scores: Tensor = self.head((states * weight).sum(1) / weight.sum(1).clamp_min(1.0))
        return scores


def hf_encoder(data: FederatedData, path: str) -> Encoder:
    """A pretrained Hugging Face encoder (BERT, MiniLM, RoBERTa) with a new layer for classes.

    Without dropout, whose draws would be nobody's. Alone it is trained whole; as the base of
    `lora`, with ``head = true``, adapters and the new layer are.

    Args:
        data: tokens [N, T] and classes; its tokenizer must be the model's.
        path: id of the hub, or folder.

    Raises:
        ConfigError: the model cannot be loaded, or does not fit the data.
    """
    transformers = _transformers("hf_encoder")
    if data.criterion != "cross_entropy" or data.fields["x"].dtype != torch.int64:
        raise ConfigError(
            f"model = 'hf_encoder' needs tokens with classes; dataset {data.name} has none: "
            "choose pydoc_topics"
        )
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    place = Path(path).expanduser()
    try:
        inner: Any = transformers.AutoModel.from_pretrained(
            str(place) if place.exists() else path,
            attn_implementation="eager",
            dtype=torch.float32,
            **none,
        )
    except Exception as error:  # the library raises whatever its readers and network layers raise
        raise ConfigError(f"model.path = {path!r} cannot be loaded: {tame(str(error))}") from None
    known, used = int(inner.config.vocab_size), int(data.fields["x"].max()) + 1
    if known < used:
        raise ConfigError(
            f"model.path = {path!r} knows {known} tokens; dataset {data.name} has {used}: give "
            "data.dataset.tokenizer the same model"
        )
    inner.pooler = None  # states are averaged instead
    return Encoder(inner, data.num_outputs)


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"model = {name!r} needs the Python package transformers: "
            "pip install 'fedsim-flower[llm]'"
        ) from None
    return transformers


def _adapted(
    inner: Any, kind: str, rank: int, alpha: int, tokens: int, targets: list[str] | None
) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "model.peft needs the Python package peft: pip install 'fedsim-flower[llm]'"
        ) from None
    task = peft.TaskType.CAUSAL_LM
    config: Any
    if kind == "lora":
        config = peft.LoraConfig(
            task_type=task, r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets
        )
    elif kind == "prompt":
        config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=tokens)
    elif kind == "prefix":
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=tokens)
    elif kind == "ia3":
        config = peft.IA3Config(task_type=task, target_modules=targets)
    else:
        config = peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=tokens)
    adapted: nn.Module = peft.get_peft_model(inner, config)
    return adapted


def _quantisation(transformers: Any, kind: str, gguf_file: str | None) -> Any:
    """How bitsandbytes holds the base.

    Raises:
        ConfigError: it is not installed, or the weights come quantised already.
    """
    if gguf_file is not None:
        raise ConfigError("model.quantised cannot be given with a GGUF file; leave one of them out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantised = {kind!r} needs the Python package bitsandbytes: pip install "
            "bitsandbytes, or leave the key out"
        )
    if kind == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
