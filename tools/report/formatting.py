"""How the report writes numbers: what was not measured becomes a dash, and changes say whether they are good."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

DASH = "–"
THIN = "\u202f"  # it does not break
MINUS = "\u2212"
_SHARES = ("accuracy", "precision", "recall", "f1", "exact", "rate", "share")
_LOWER_IS_BETTER = ("perplexity", "nll", "loss", "likelihood", "rate")


def measured(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain_number(value: Any, digits: int = 2) -> str:
    """2 or 3 significant places; a dash for what was not measured."""
    if not measured(value):
        return DASH
    grouped = f"{value:,.0f}".replace(",", THIN)
    return grouped if isinstance(value, int) or abs(value) >= 100 else f"{value:.{digits}f}"


def error_number(value: Any) -> str:
    return DASH if not measured(value) else "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def percent(value: Any, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}{THIN}%".replace("-", MINUS) if measured(value) else DASH


def times(value: float) -> str:
    """ "2.7x"; below 1 with two places, so that a loss is not rounded away."""
    rounded = round(value, 2)
    if rounded < 1:
        return f"{rounded:.2f}x"
    return f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def counted(number: int, what: str) -> str:
    """ "1 request", "2 requests"."""
    return f"{number} {what}{'s' if number > 1 else ''}"


def plain_ascii(text: str) -> str:
    """Rewrites a text for terminals: thin spaces between digits become commas, other special characters plain ones."""
    text = re.sub(rf"(?<=\d){THIN}(?=\d)", ",", text)
    for special, ordinary in ((THIN, " "), ("\u00a0", " "), (MINUS, "-"), (DASH, "-"), ("→", "->"), ("τ", "tau")):
        text = text.replace(special, ordinary)
    return text


def mebibytes(value: Any) -> str:
    return f"{value / 2**20:.1f}" if measured(value) and value else DASH


def interval(value: Any) -> tuple[float, float] | None:
    """Reads a 95 % interval [low, high]. The result is None if it is not there or not finite."""
    if isinstance(value, list) and len(value) == 2 and all(map(measured, value)):
        return float(value[0]), float(value[1])
    return None


def with_interval(rate: float, ends: tuple[float, float] | None) -> str:
    return percent(rate) + (f" ({percent(ends[0])} to {percent(ends[1])})" if ends else "")


@dataclass(frozen=True)
class Quality:
    """What a cache did to the answers: the record's task, ready to be written."""

    metric: str
    value: float | None
    baseline: float | None
    change: float | None
    ci95: tuple[float, float] | None

    @property
    def share(self) -> bool:
        return any(word in self.metric.lower() for word in _SHARES)

    @property
    def scale(self) -> float:
        return 100.0 if self.share else 1.0

    @property
    def unit(self) -> str:
        return "points" if self.share else ""

    @property
    def lower_is_better(self) -> bool:
        return any(word in self.metric for word in _LOWER_IS_BETTER)

    def level(self, value: float | None) -> str:
        return percent(value) if self.share else plain_number(value, 3 if abs(value or 0) < 10 else 2)

    def signed(self, value: float | None) -> str:
        if not measured(value):
            return DASH
        text = f"{self.scale * value:+.{1 if self.share else 3}f}"
        return ("0" + text[2:] if not any(c in text for c in "123456789") else text).replace("-", MINUS)

    @property
    def change_text(self) -> str:
        return f"{self.signed(self.change)} {self.unit}".strip() if measured(self.change) else DASH

    @property
    def levels_text(self) -> str:
        known = [self.level(value) for value in (self.baseline, self.value) if measured(value)]
        return f"{self.metric} {' → '.join(known)}".strip()

    @property
    def interval_text(self) -> str:
        """Of the change; of the value itself where there is no baseline to change from."""
        write = self.signed if measured(self.change) else self.level
        return f"{write(self.ci95[0])} to {write(self.ci95[1])}" if self.ci95 else ""

    @property
    def verdict(self) -> str:
        """Says "no clear change" if the interval holds zero, else whether it became better or worse."""
        if self.ci95 is None or self.change is None:
            return ""
        if self.ci95[0] <= 0 <= self.ci95[1]:
            return "no clear change"
        return "worse" if (self.change < 0) != self.lower_is_better else "better"


def quality(task: Any) -> Quality | None:
    """Reads a record's `task`. The result is None if nothing in it was measured."""
    if not isinstance(task, dict):
        return None
    value, baseline, change = (
        float(found) if measured(found) else None for found in map(task.get, ("value", "baseline", "change"))
    )
    if change is None and value is not None and baseline is not None:
        change = value - baseline
    if value is None and change is None:
        return None
    metric = str(task.get("metric") or "quality").replace("_", " ")
    return Quality("F1" if metric == "f1" else metric, value, baseline, change, interval(task.get("ci95")))
