"""Instructions and answers for language models: loaders, prompts, and tokens with their targets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedsim.core.errors import DataError
from fedsim.core.rng import SERVER, stream
from fedsim.core.text import did_you_mean
from fedsim.data.raw import IGNORE, RawData
from fedsim.data.tasks import TASKS
from fedsim.data.tokens import END as END
from fedsim.data.tokens import Characters, tokenizer_of

TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:",
    ),
    "plain": ("{instruction}\n{input}\n= ", "{instruction}\n= "),
}
"""Prompts with and without an input."""


class Sample(NamedTuple):
    """One instruction with its answer.

    Attributes:
        client: its natural client: the task, or the category.
        instruction: what to do.
        input: what to do it with; may be empty.
        answer: the reference answer.
        test: whether it is held out.
    """

    client: str
    instruction: str
    input: str
    answer: str
    test: bool = False

    def prompt(self, template: str = "alpaca") -> str:
        """The prompt; a missing input is an empty input."""
        if template not in TEMPLATES:
            raise DataError(
                f"data.dataset.template = {template!r} must be one of: {', '.join(TEMPLATES)}"
            )
        full, short = TEMPLATES[template]
        return (full if self.input else short).format(
            instruction=self.instruction, input=self.input
        )


def encode(
    name: str,
    samples: Sequence[Sample],
    tokenizer: str,
    length: int,
    template: str,
    others: Sequence[Sample] = (),
) -> RawData:
    """Samples as next-token examples whose prompt does not count.

    Args:
        name: of the dataset.
        samples: in order.
        tokenizer: see `tokenizer_of`.
        length: tokens of an example; longer ones are cut. Samples of which no token of the answer
            is left are dropped, and counted in ``meta["dropped"]``.
        template: of the prompts.
        others: samples that are left out, but whose characters are in the vocabulary.

    Raises:
        DataError: nothing is left.
    """
    prompts = [s.prompt(template) for s in samples]
    known = [t for s in (*samples, *others) for t in (s.prompt(template), s.answer)]
    tokens = tokenizer_of(tokenizer, known)
    kept: list[int] = []
    xs, ys = [], []
    for i, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        start, answer = tokens.encode(prompt), tokens.encode(sample.answer)
        ids = [*start, *answer, tokens.end][: length + 1]
        if not answer or len(ids) <= len(start) or not start:
            continue
        x, y = np.full(length, tokens.end, np.int64), np.full(length, IGNORE, np.int64)
        x[: len(ids) - 1] = ids[:-1]
        y[len(start) - 1 : len(ids) - 1] = ids[len(start) :]
        kept.append(i)
        xs.append(x)
        ys.append(y)
    if not kept:
        raise DataError(f"dataset {name}: no sample has an answer within {length} tokens")
    test = np.flatnonzero([samples[i].test for i in kept])
    groups, group = np.unique([samples[i].client for i in kept], return_inverse=True)
    names = np.setdiff1d(groups, np.array([s.client for s in samples if s.test]))
    owners = np.searchsorted(names, groups[group]) % max(1, len(names))  # of a test example: any
    meta: dict[str, object] = {
        "end": tokens.end,
        "dropped": len(samples) - len(kept),
        "tokenizer": tokenizer,
    }
    if isinstance(tokens, Characters):
        meta["vocab"] = tokens.vocabulary
    return RawData(
        name,
        {"x": np.stack(xs), "y": np.stack(ys), "group": group.astype(np.int64)},
        "next_token",
        tokens.size,
        clients=owners.astype(np.int64),
        client_names=tuple(map(str, names)),
        test=test if len(test) else None,
        meta=meta,
    )


def instruction_tasks(
    seed: int,
    tasks: int = 51,
    examples: int = 60,
    heldout_tasks: int = 10,
    tokenizer: str = "characters",
    length: int = 96,
    template: str = "plain",
    only: Sequence[str] = (),
    without: Sequence[str] = (),
) -> RawData:
    """Instruction tasks made by rule, in the shape of Natural Instructions (no download).

    One task is one client. The last tasks in a seeded order are the central test set, so that the
    test asks for tasks nobody was trained on. With `only` or `without` no task is held out, and
    the vocabulary is that of all 51, so that models of different tasks fit together.

    Args:
        seed: of the order of tasks and of the instances.
        tasks: how many of the 51.
        examples: instances of each.
        heldout_tasks: how many are held out for the test.
        tokenizer: ``"characters"``, or a Hugging Face model (id, folder or GGUF file).
        length: tokens of an example.
        template: ``"alpaca"`` or ``"plain"``.
        only: names of the tasks to take.
        without: names of tasks to leave out.
    """
    if only or without:
        return _chosen(seed, examples, tokenizer, length, template, only, without)
    if not 2 <= tasks <= len(TASKS) or not 0 <= heldout_tasks < tasks or examples < 1:
        raise DataError(
            f"data.dataset: tasks = {tasks}, heldout_tasks = {heldout_tasks}, "
            f"examples = {examples} must be 2 to {len(TASKS)} tasks, fewer held out than there "
            "are, and an example"
        )
    order = stream(seed, 0, SERVER, "tasks").permutation(len(TASKS))[:tasks]
    samples = []
    for place, number in enumerate(order.tolist()):
        test = place >= tasks - heldout_tasks
        samples += _instances(seed, list(TASKS)[number], examples, test)
    return encode("instruction_tasks", samples, tokenizer, length, template)


def _instances(seed: int, name: str, examples: int, test: bool = False) -> list[Sample]:
    draw, task = stream(seed, 0, list(TASKS).index(name), "instances"), TASKS[name]
    drawn = [task.draw(draw) for _ in range(examples)]
    return [Sample(name, task.definition, given, answer, test) for given, answer in drawn]


def _chosen(
    seed: int, examples: int, tokenizer: str, length: int, template: str,
    only: Sequence[str], without: Sequence[str],
) -> RawData:  # fmt: skip
    """The tasks that were named, or those that were not."""
    unknown = sorted({*only, *without} - set(TASKS))
    names = [n for n in TASKS if n not in without and (not only or n in only)]
    if unknown or not names:
        raise DataError(
            f"data.dataset: only = {list(only)}, without = {list(without)} must name tasks"
            + (f"; {unknown[0]} is none{did_you_mean(unknown[0], TASKS)}" if unknown else "")
        )
    samples = {n: _instances(seed, n, examples) for n in TASKS}
    mine = [s for n in names for s in samples[n]]
    others = [s for n in TASKS if n not in names for s in samples[n]]
    return encode("instruction_tasks", mine, tokenizer, length, template, others)


def natural_instructions(
    path: str,
    tokenizer: str = "characters",
    length: int = 1024,
    template: str = "alpaca",
    most_characters: int = 1024,
    least: int = 20,
    share: float = 0.2,
    test_share: float = 0.02,
) -> RawData:
    """Natural Instructions v2 from its folder: ``tasks/*.json``, ``splits/default/*.txt``.

    As FedKSeed takes it: a train task is a client; instances with inputs of `most_characters` or
    more are left out, tasks with fewer than `least` left too; the first `share` of a train task's
    instances is used, and of a test task's ``max(least, test_share)``; first output only. The test
    tasks are the central test set. (The paper samples; the first ones are taken here.)

    Args:
        path: the folder of the repository.
        tokenizer: ``"characters"``, or a Hugging Face model (id, folder or GGUF file).
        length: tokens of an example.
        template: ``"alpaca"`` or ``"plain"``.
        most_characters: limit of an input.
        least: instances of a task, at least.
        share: of a train task's instances.
        test_share: of a test task's instances.
    """
    root = Path(path).expanduser()
    samples: list[Sample] = []
    for split, test in (("train", False), ("test", True)):
        file = root / "splits" / "default" / f"{split}_tasks.txt"
        for task in _read(file).split():
            content = _json(root / "tasks" / f"{task}.json")
            definition = content["Definition"]
            definition = definition if isinstance(definition, str) else definition[0]
            good = [i for i in content["Instances"] if len(i["input"]) < most_characters]
            if len(good) < least:
                continue
            count = max(least, int(test_share * len(good))) if test else int(share * len(good))
            for instance in good[: max(count, 1)]:
                output = instance["output"]
                answer = output if isinstance(output, str) else output[0]
                samples.append(Sample(task, definition, instance["input"], answer, test))
    return encode("natural_instructions", samples, tokenizer, length, template)


def dolly(
    path: str,
    tokenizer: str = "characters",
    length: int = 1024,
    template: str = "alpaca",
    heldout: str = "summarization",
) -> RawData:
    """Databricks Dolly 15k, JSON lines; one category is the central test set.

    Field ``group`` is the category, to be dealt by (``partition = {name = "dirichlet", ...}``).

    Args:
        path: the ``.jsonl`` file.
        tokenizer: ``"characters"``, or a Hugging Face model (id, folder or GGUF file).
        length: tokens of an example.
        template: ``"alpaca"`` or ``"plain"``.
        heldout: the category that is held out.
    """
    samples = [
        Sample(r["category"], r["instruction"], r.get("context") or "", r["response"],
               r["category"] == heldout)
        for r in _rows(Path(path).expanduser(), ("category", "instruction", "response"))
    ]  # fmt: skip
    return encode("dolly", samples, tokenizer, length, template)


def alpaca(
    path: str, tokenizer: str = "characters", length: int = 512, template: str = "alpaca"
) -> RawData:
    """Data in the shape of Stanford Alpaca: instruction, input, output; JSON or JSON lines.

    Args:
        path: the ``.json`` or ``.jsonl`` file.
        tokenizer: ``"characters"``, or a Hugging Face model (id, folder or GGUF file).
        length: tokens of an example.
        template: ``"alpaca"`` or ``"plain"``.
    """
    rows = _rows(Path(path).expanduser(), ("instruction", "output"))
    samples = [Sample("", r["instruction"], r.get("input") or "", r["output"]) for r in rows]
    raw = encode("alpaca", samples, tokenizer, length, template)
    fields = {n: a for n, a in raw.fields.items() if n != "group"}
    return RawData(raw.name, fields, raw.criterion, raw.num_outputs, meta=raw.meta)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _json(path: Path) -> Any:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or not {"Definition", "Instances"} <= set(content):
        raise DataError(f"{path} is no task of Natural Instructions: no Definition, Instances")
    return content


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines."""
    text = _read(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{path} is neither JSON nor JSON lines: {error}") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(n), str) for n in needed):
            raise DataError(f"{path}: entry {number} lacks one of {', '.join(needed)}")
        yield row
