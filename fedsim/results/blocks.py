"""What a section of the report is made of; every block can be rendered as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Picture:
    """A picture as SVG text, drawn for light pages with a style for dark ones.

    Attributes:
        name: lower-case words joined by dashes; names the file and must be unique in its section.
        svg: the `<svg>` element.
        alt: what it shows, in words, for who cannot see it.
        caption: stands below it.
    """

    name: str
    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side where there is room."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text; `lead` sets it off as the thing to read first."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Warn:
    """A paragraph that must not be overlooked."""

    text: str


@dataclass(frozen=True)
class Cell:
    """A table cell that is more than text.

    Attributes:
        text: its text.
        strong: whether it stands out.
        colour: number of a strategy's colour, shown as a swatch before the text.
        small: said below the text, in small.
    """

    text: str
    strong: bool = False
    colour: int | None = None
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column heads its row.

    Attributes:
        columns: column headings.
        rows: for each row a cell or text for each column.
        caption: what the table holds.
        text_columns: columns that hold words and are set flush left, besides the first.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str
    text_columns: Sequence[int] = ()

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows with every text made a cell."""
        return [[c if isinstance(c, Cell) else Cell(str(c)) for c in row] for row in self.rows]


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until asked for."""

    summary: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Raw:
    """Ready-made HTML and its Markdown twin, for what the other blocks cannot say."""

    html: str
    markdown: str


Block = Text | Warn | Table | Pictures | Details | Raw


@dataclass(frozen=True)
class Section:
    """One section of the report.

    Attributes:
        title: its heading.
        blocks: its content, in order.
        data: JSON-able numbers for `comparison.json`.
    """

    title: str
    blocks: tuple[Block, ...]
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Picture]:
        """Every picture of the section, folded ones too."""
        return list(_pictures(self.blocks))


def _pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    for block in blocks:
        if isinstance(block, Pictures):
            yield from block.pictures
        elif isinstance(block, Details):
            yield from _pictures(block.blocks)
