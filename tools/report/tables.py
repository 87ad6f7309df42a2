"""What a table of the report is made of, and the cells that several tables have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tools.report.formatting import DASH, measured, plain_number, times
from tools.report.outcomes import answers_text
from tools.report.reasons import reason
from tools.report.records import Row
from tools.report.scenarios import KV_CACHE, NO_CACHE, Ratio, lost

BASELINES = {NO_CACHE: "against no cache", KV_CACHE: "against a KV cache"}


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
        """There is no dash above smaller lines."""
        return "" if self.text == DASH and self.small else self.text

    @property
    def empty(self) -> bool:
        return self.text == DASH and not self.small


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


def answers(row: Row | None) -> Cell:
    return text(answers_text(row) if row else "", css="prose")


def why(text: str) -> str:
    """The line below a speed-up that says why it is none."""
    return f"why: {text}" if text else ""


def against(ratio: Ratio) -> str:
    """Says what was compared, and with what."""
    return (f"{ratio.of}, " if ratio.of else "") + BASELINES[ratio.against]


def ratio_cell(ratio: Ratio, *small: str, most: float | None = None) -> Cell:
    """The cell has a bar where the largest value of the table is given."""
    shown = text(times(ratio.value), *small, css="best loses" if ratio.loses else "best")
    if most is None:
        return shown
    widest = max(most, 1.0)
    return Cell(shown.text, shown.small, shown.css, round(ratio.value / widest, 4), round(1 / widest, 4))


def speedup_cell(row: Row) -> Cell:
    """Shows the speed-up against no cache. What is below 1 has the reason beside it."""
    because = reason(row)
    shown = "" if row.plain or not measured(row.speedup_vs_nocache) else plain_number(row.speedup_vs_nocache)
    loses = bool(shown) and round(row.speedup_vs_nocache, 2) < 1
    ratio = lost(row)
    if because and ratio and not loses:
        return text(shown, f"{times(ratio.value)} {BASELINES[ratio.against]}: {because}", css="best")
    return text(shown, why(because), css="best loses" if loses else "best")
