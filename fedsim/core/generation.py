"""Answers of language models and how good they are: greedy decoding, Rouge-L, exact match."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
_WORD = re.compile(r"[a-z0-9]+")


@torch.no_grad()
def greedy(
    outputs: Callable[[Tensor], Tensor], prompt: Sequence[int], end: int, most: int, context: int
) -> list[int]:
    """The most likely next token, again and again, until `end`; ties go to the lower number.

    Args:
        outputs: scores [1, T, vocabulary] of tokens [1, T].
        prompt: token numbers.
        end: the token that ends an answer; not part of it.
        most: tokens of the answer at most.
        context: longest input that the model takes.
    """
    tokens, answer = list(prompt), list[int]()
    for _ in range(most):
        if len(tokens) >= context:
            break
        scores = outputs(torch.tensor([tokens]))[0, -1]
        token = int(scores.float().argmax())
        if token == end:
            break
        answer.append(token)
        tokens.append(token)
    return answer


def rouge_l(prediction: str, reference: str) -> float:
    """Rouge-L F1: the longest common subsequence of words (lower case letters and digits).

    The tokens and the formula of the package ``rouge-score`` without stemming.
    """
    a, b = (_WORD.findall(text.lower()) for text in (prediction, reference))
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        above = 0
        for j, other in enumerate(b, 1):
            kept = row[j]
            row[j] = above + 1 if word == other else max(row[j], row[j - 1])
            above = kept
    common = row[-1]
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def exact_match(prediction: str, reference: str) -> float:
    """1 if the texts are the same but for case and space around, else 0."""
    return float(prediction.strip().lower() == reference.strip().lower())


def split(x: Tensor, y: Tensor) -> tuple[list[int], list[int]]:
    """Prompt and answer (its end token included) of one example, x and y of shape [T]."""
    counted = (y != IGNORE).nonzero().reshape(-1)
    first, last = int(counted[0]), int(counted[-1])
    return x[: first + 1].tolist(), y[first : last + 1].tolist()


def judge(
    outputs: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    decode: Callable[[Sequence[int]], str],
    end: int,
    most: int = 128,
) -> dict[str, float]:
    """Mean Rouge-L and share of exact matches of greedy answers.

    Args:
        outputs: scores [1, T, vocabulary] of tokens [1, T].
        x: examples, int64 [N, T].
        y: targets, int64 [N, T], -100 on the prompt.
        decode: text of token numbers.
        end: the token that ends an answer.
        most: tokens of an answer at most.
    """
    found: dict[str, Any] = {"rouge_l": [], "exact_match": []}
    for one, target in zip(x, y, strict=True):
        prompt, answer = split(one, target)
        reference = decode([t for t in answer if t != end])
        said = decode(greedy(outputs, prompt, end, most, len(prompt) + most))
        found["rouge_l"].append(rouge_l(said, reference))
        found["exact_match"].append(exact_match(said, reference))
    return {name: sum(values) / max(1, len(values)) for name, values in found.items()}
