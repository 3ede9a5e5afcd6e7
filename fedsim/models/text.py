"""Models of characters: inputs int64 [B, T], outputs [B, T, vocabulary]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.core.errors import ConfigError
from fedsim.data.federated import FederatedData


class CharLSTM(nn.Module):
    """Embedding, LSTM layers, one linear layer at each position (LEAF's Shakespeare model).

    Args:
        vocabulary: number of characters.
        embedding: width of the embedding.
        hidden: width of the LSTM.
        layers: of the LSTM.
    """

    def __init__(self, vocabulary: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next character; [B, T] -> [B, T, vocabulary]."""
        states, _ = self.lstm(self.embed(tokens))
        scores: Tensor = self.head(states)
        return scores


class Block(nn.Module):
    """One pre-norm transformer block: causal self-attention, then a GELU network of 4x width."""

    causal: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        future = torch.full((context, context), float("-inf")).triu(1)
        self.register_buffer("causal", future, persistent=False)
        self.norm1 = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        parts = self.attend(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.movedim(-3, 0).transpose(-3, -2)
        # Written out: torch's fused attention has no vmap and no second derivative on CPUs.
        scores = (query * key.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        mixed = (scores + self.causal[: x.shape[-2], : x.shape[-2]]).softmax(-1) @ value
        x = x + self.mix(mixed.transpose(-3, -2).flatten(-2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class CharGPT(nn.Module):
    """A small causal transformer with learned positions, without dropout.

    Args:
        vocabulary: number of characters.
        context: longest input.
        width: of the residual stream.
        layers: number of blocks.
        heads: of each block; a divisor of `width`.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads, context) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        # Small, so that the first scores are about uniform: the loss starts at log(vocabulary).
        for weight in (self.embed.weight, self.position, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next character; [B, T] -> [B, T, vocabulary]."""
        x = self.embed(tokens) + self.position[: tokens.shape[-1]]
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


def char_lstm(
    data: FederatedData, embedding: int = 8, hidden: int = 256, layers: int = 2
) -> CharLSTM:
    """Embedding 8, two LSTM layers of 256, linear: LEAF's model for Shakespeare, at every position.

    Args:
        data: text; gives the vocabulary.
        embedding: width of the embedding.
        hidden: width of the LSTM.
        layers: number of LSTM layers.
    """
    _check("char_lstm", data, embedding=embedding, hidden=hidden, layers=layers)
    return CharLSTM(data.num_outputs, embedding, hidden, layers)


def char_gpt(
    data: FederatedData,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    context: int | None = None,
) -> CharGPT:
    """A small GPT: causal self-attention over characters, no dropout.

    Args:
        data: text; gives vocabulary and length.
        width: of the residual stream.
        layers: number of blocks.
        heads: attention heads; a divisor of `width`.
        context: longest input; None: the data's length.
    """
    context = data.input_shape[0] if context is None else context
    _check("char_gpt", data, width=width, layers=layers, heads=heads, context=context)
    if width % heads:
        raise ConfigError(
            f"model.heads = {heads} is not possible; allowed: divisors of model.width = {width}"
        )
    if context < data.input_shape[0]:
        raise ConfigError(
            f"model.context = {context} is not possible; allowed: {data.input_shape[0]} (the "
            "data's length) or more"
        )
    return CharGPT(data.num_outputs, context, width, layers, heads)


def _check(model: str, data: FederatedData, **sizes: int) -> None:
    if data.criterion != "next_token":
        raise ConfigError(
            f"model = {model!r} needs text; dataset {data.name} has x of shape {data.input_shape}; "
            "choose logistic, mlp or cnn"
        )
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"model.{name} = {value} is not possible; allowed: 1 or more")
