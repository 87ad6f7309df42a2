"""What a table of the report is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from report_numbers import DASH


@dataclass(frozen=True)
class Cell:
    """A text with smaller lines below it; a bar says how long `share` of the widest is."""

    text: str = DASH
    small: tuple[str, ...] = ()
    css: str = ""
    share: float | None = None
    one: float | None = None  # where on the bar 1.0 is

    @property
    def shown(self) -> str:
        """No dash above smaller lines."""
        return "" if self.text == DASH and any(self.small) else self.text

    @property
    def empty(self) -> bool:
        return self.text == DASH and not any(self.small)


@dataclass(frozen=True)
class Column:
    head: str
    cell: Callable[[Any], Cell]
    meaning: str = ""  # for those who ask


@dataclass
class Table:
    heads: list[str]
    rows: list[list[Cell]]
    css: str = ""
    meanings: list[tuple[str, str]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # of the rows


def table(columns: list[Column], items: list[Any], css: str = "", classes: list[str] | None = None) -> Table:
    """Columns in which nothing stands are left out."""
    filled = [(column, [column.cell(item) for item in items]) for column in columns]
    kept = [(column, cells) for column, cells in filled if not all(cell.empty for cell in cells)]
    rows = [list(row) for row in zip(*(cells for _, cells in kept), strict=True)]
    meanings = [(column.head, column.meaning) for column, _ in kept if column.meaning]
    return Table([column.head for column, _ in kept], rows, css, meanings, classes or [""] * len(items))


def text(value: str, *small: str, css: str = "") -> Cell:
    return Cell(value or DASH, tuple(filter(None, small)), css)
