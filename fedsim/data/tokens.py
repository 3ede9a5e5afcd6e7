"""From text to tokens and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from fedsim.core.errors import DataError
from fedsim.data.raw import UNKNOWN

END = "\x03"
"""The character that ends an answer where tokens are characters."""


class Tokenizer(Protocol):
    """What turns text into tokens."""

    size: int
    end: int

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers."""
        ...


class Characters:
    """Tokens that are characters; number 0 is padding and whatever is not in the vocabulary."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.vocabulary = UNKNOWN + "".join(sorted({END, *(c for t in texts for c in t)}))
        self._number = {c: i for i, c in enumerate(self.vocabulary)}
        self.size, self.end = len(self.vocabulary), self._number[END]

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text."""
        return [self._number.get(c, 0) for c in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers."""
        return "".join(self.vocabulary[t] for t in tokens)


class Pretrained:
    """The tokenizer of a Hugging Face model: an id, a folder, or a GGUF file."""

    def __init__(self, name: str) -> None:
        try:
            import transformers
        except ImportError:
            raise DataError(
                f"data.dataset.tokenizer = {name!r} needs the Python package transformers: "
                "pip install 'fedsim-flower[llm]'"
            ) from None
        path = Path(name).expanduser()
        gguf = path.suffix == ".gguf"
        where: Path | str = path if path.exists() else name
        more = {"gguf_file": path.name} if gguf else {}
        where = path.parent if gguf else where
        try:
            self.inner: Any = transformers.AutoTokenizer.from_pretrained(str(where), **more)
        except (OSError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise DataError(f"data.dataset.tokenizer = {name!r} cannot be loaded: {line}") from None
        self.size, self.end = len(self.inner), int(self.inner.eos_token_id or 0)

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text."""
        # However long: windows are cut out of it later, which the library cannot know.
        return list(self.inner.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers."""
        return str(self.inner.decode(tokens, skip_special_tokens=True))


pretrained = lru_cache(maxsize=2)(Pretrained)
"""As `Pretrained`; reading a tokenizer takes seconds."""


def tokenizer_of(name: str, texts: Iterable[str]) -> Tokenizer:
    """``"characters"``, or the tokenizer of a Hugging Face model."""
    return Characters(texts) if name == "characters" else pretrained(name)


def read_answers(meta: Mapping[str, object]) -> tuple[Callable[[Sequence[int]], str], int]:
    """How to read the answers of a dataset: from tokens to text, and the token that ends one.

    Args:
        meta: of the dataset, as `encode` made it.

    Raises:
        DataError: the dataset has no instructions and answers.
    """
    if "end" not in meta:
        raise DataError("evaluate.answers needs instruction data, such as instruction_tasks")
    end, vocabulary = int(str(meta["end"])), meta.get("vocab")
    if isinstance(vocabulary, str):
        return lambda tokens: "".join(vocabulary[t] for t in tokens), end
    return pretrained(str(meta["tokenizer"])).decode, end
