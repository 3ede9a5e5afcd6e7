"""Answers of language models and how good they are: greedy decoding, Rouge-L, exact match."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

IGNORE = -100
_WORD = re.compile(r"[a-z0-9]+")


@torch.no_grad()
def greedy(
    outputs: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    end: int,
    most: int,
    context: int | None = None,
) -> list[list[int]]:
    """The most likely next token, again and again, until `end`; ties go to the lower number.

    Prompts are padded behind, so a model must not look ahead (causal ones do not).

    Args:
        outputs: scores [B, T, vocabulary] of tokens [B, T].
        prompts: token numbers of each prompt, at least one.
        end: the token that ends an answer; not part of it.
        most: tokens of an answer at most.
        context: longest input that the model takes; None: any.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for _ in range(most):
        texts = {i: [*prompts[i], *answers[i]] for i in going}
        going = [i for i in going if context is None or len(texts[i]) <= context]
        if not going:
            break
        width = max(len(texts[i]) for i in going)
        rows = [texts[i] + [end] * (width - len(texts[i])) for i in going]
        last = torch.tensor([len(texts[i]) - 1 for i in going])
        scores = outputs(torch.tensor(rows))[torch.arange(len(going)), last]
        chosen = dict(zip(going, scores.float().argmax(-1).tolist(), strict=True))
        going = [i for i in going if chosen[i] != end]
        for i in going:
            answers[i].append(chosen[i])
    return answers


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
    batch_size: int = 16,
) -> dict[str, float]:
    """Mean Rouge-L and share of exact matches of greedy answers.

    Args:
        outputs: scores [B, T, vocabulary] of tokens [B, T].
        x: examples, int64 [N, T].
        y: targets, int64 [N, T], -100 on the prompt.
        decode: text of token numbers.
        end: the token that ends an answer.
        most: tokens of an answer at most.
        batch_size: prompts that are answered together.
    """
    parts = [split(one, target) for one, target in zip(x, y, strict=True)]
    found: dict[str, list[float]] = {"rouge_l": [], "exact_match": []}
    for start in range(0, len(parts), batch_size):
        some = parts[start : start + batch_size]
        answers = greedy(outputs, [prompt for prompt, _ in some], end, most)
        for said, (_, answer) in zip(map(decode, answers), some, strict=True):
            reference = decode([t for t in answer if t != end])
            found["rouge_l"].append(rouge_l(said, reference))
            found["exact_match"].append(exact_match(said, reference))
    return {name: sum(values) / max(1, len(values)) for name, values in found.items()}
