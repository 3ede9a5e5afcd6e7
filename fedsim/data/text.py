"""Text for next-character prediction, with natural clients."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedsim.core.errors import DataError, require
from fedsim.data.raw import RawData, next_character
from fedsim.data.tokens import tokenizer_of


def pydoc(length: int = 64, min_characters: int = 500) -> RawData:
    """The English of Python's own help topics, next character; clients are topics (no download).

    The text comes with the interpreter, so it differs between Python versions, and with it the
    data's fingerprint.

    Args:
        length: characters per example.
        min_characters: shorter topics are left out.
    """
    from pydoc_data.topics import topics

    kept = {name: text for name, text in sorted(topics.items()) if len(text) >= min_characters}
    return _by_client("pydoc", kept, length, f"data.dataset.min_characters = {min_characters}")


def pydoc_topics(tokenizer: str, classes: int = 16, length: int = 32) -> RawData:
    """Which of Python's help topics a passage is from: its tokens, and the topic as its class.

    Topics are those with most text. They are cut into passages one after another; what is left
    at the end of a topic is filled up with the token 0 (padding in the BERT family), or left out
    where it is less than half a passage.

    Args:
        tokenizer: a Hugging Face model or its folder, or ``"characters"``.
        classes: how many topics.
        length: tokens of a passage.
    """
    from pydoc_data.topics import topics

    require(2 <= classes <= len(topics), "data.dataset.classes", classes, f"2 to {len(topics)}")
    require(length >= 2, "data.dataset.length", length, "2 or more")
    chosen = sorted(sorted(topics, key=lambda name: (-len(topics[name]), name))[:classes])
    tokens = tokenizer_of(tokenizer, (topics[name] for name in chosen))
    xs, ys = [], []
    for label, name in enumerate(chosen):
        ids = tokens.encode(topics[name])
        for start in range(0, len(ids) - length // 2 + 1, length):
            passage = np.zeros(length, np.int64)
            passage[: len(ids) - start] = ids[start : start + length]
            xs.append(passage)
            ys.append(label)
    meta: dict[str, object] = {"labels": list(chosen), "tokens": tokens.size}
    return RawData(
        "pydoc_topics", {"x": np.stack(xs), "y": np.array(ys)}, "cross_entropy", classes, meta=meta
    )


def plays(
    path: str,
    min_lines: int = 100,
    length: int = 80,
    role_column: str | None = None,
    text_column: str | None = None,
) -> RawData:
    """Plays by speaking role, next character: a folder of text files or a Hugging Face dataset.

    A file holds one play: a line with the speaker's name, alone, after an empty line; then the
    speech. Stage directions in square brackets and everything before the first act are left out.

    Args:
        path: folder of ``*.txt`` files, one such file, or the id or path of a Hugging Face dataset
            with one line or speech per row.
        min_lines: roles that speak fewer lines are left out.
        length: characters per example.
        role_column: of the Hugging Face dataset; found by its usual names if None.
        text_column: likewise.
    """
    place = Path(path).expanduser()
    files = [place] if place.is_file() and place.suffix == ".txt" else sorted(place.glob("*.txt"))
    lines: dict[str, list[str]] = defaultdict(list)
    if files:
        for file in files:
            for role, line in spoken(file.read_text("utf-8-sig", errors="replace")):
                lines[f"{file.stem}/{role}"].append(line)
    else:
        from fedsim.data.hub import role_lines

        for role, line in role_lines(path, role_column, text_column):
            lines[role].append(line)
    kept = {r: "\n".join(said) for r, said in sorted(lines.items()) if len(said) >= min_lines}
    return _by_client("plays", kept, length, f"data.dataset.min_lines = {min_lines}")


_DIRECTION = re.compile(r"\[[^\]]{0,2000}\]")
_HEADING = re.compile(r"\s*(ACT|SCENE|PROLOGUE|EPILOGUE|INDUCTION)\b", re.IGNORECASE)
_SPEAKER = re.compile(r"([A-Z][A-Za-z'&,.\- ]{0,29}?)[.:]|([A-Z][A-Z'&,.\- ]{1,29})")


def spoken(play: str) -> Iterator[tuple[str, str]]:
    """(role, line) for each line spoken in a play; see `plays` for the format."""
    role, started, after_blank = "", False, True
    lines = _DIRECTION.sub("", play).splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        text = line.strip()
        if not text:
            after_blank = True
            continue
        speaker = _SPEAKER.fullmatch(text) if after_blank and following.strip() else None
        after_blank = False
        if _HEADING.match(line):
            # "SCENE: Athens" stands above the first act and opens nothing.
            role, started = "", started or not text.upper().startswith("SCENE:")
        elif speaker and len(text.split()) <= 4:
            role = " ".join((speaker[1] or speaker[2]).upper().split())
        elif role and started:
            yield role, text


def _by_client(name: str, texts: dict[str, str], length: int, limit: str) -> RawData:
    if not texts:
        raise DataError(f"{limit} leaves no client of dataset {name}; allow smaller ones")
    return next_character(name, list(texts.values()), np.arange(len(texts)), tuple(texts), length)
