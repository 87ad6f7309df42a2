"""The report's first chart: how many times as fast, over how much of the answers changed, a mark for each run.

Drawn as SVG by hand, since its marks are numbered like the lines of the summary, lead to them and say what they are."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from outcomes import answers_text, change
from report_records import Row
from scenarios import Scenario, fair
from summary_lines import Line, setting_words

# Kinds of runs in the order of the legend. Colours after Okabe and Ito.
KINDS = {
    "lossless": ("lossless", "#0072b2"),
    "identical": ("word-for-word repeats", "#3a8fb7"),
    "budget": ("within an error budget", "#00775a"),
    "threshold": ("the paper's mode", "#c34f00"),
    "doccache": ("whole answers of similar texts", "#a3507f"),
    "other": ("other", "#5b6470"),
}
SMALLEST, LARGEST = 0.01, 100.0  # percent, the ends of the logarithmic part
_TICKS = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Mark:
    """A run in the chart."""

    row: Row
    scenario: Scenario
    speed: float
    changed: float  # percent
    number: int  # of the summary's line that speaks of it; 0: none does

    @property
    def kind(self) -> str:
        return self.row.kind if self.row.kind in KINDS else "other"

    @property
    def title(self) -> str:
        setting = setting_words(self.row)
        ratio = fair(self.row)
        assert ratio is not None
        return f"{self.scenario.name}{', ' + setting if setting else ''}: {ratio.text}; {answers_text(self.row)}"


def marks(scenarios: list[Scenario], lines: list[Line]) -> list[Mark]:
    """Every cached run of which both speed and answers were compared, numbered ones last, so that they lie on top."""
    numbers = {id(row): number for number, line in enumerate(lines, start=1) for row in line.rows}
    found = []
    for scenario in scenarios:
        for row in scenario.rows:
            ratio, changed = fair(row), change(row)
            if row.plain or row.mode == "kvcache" or ratio is None or changed is None:
                continue
            found.append(Mark(row, scenario, ratio.value, changed.percent, numbers.get(id(row), 0)))
    return sorted(found, key=lambda mark: mark.number > 0)


def legend(found: list[Mark]) -> list[tuple[str, str]]:
    """(what, colour) of the kinds in the chart."""
    shown = {mark.kind for mark in found}
    return [entry for kind, entry in KINDS.items() if kind in shown]


@dataclass(frozen=True)
class _Plane:
    """Where values are on the picture."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    same: int  # width of the zone of unchanged answers
    low: float  # binary logarithms of the speeds at the ends
    high: float

    def x(self, changed: float) -> float:
        start = self.left + self.same
        if changed < SMALLEST:
            return self.left + self.same / 2
        share = math.log(min(changed, LARGEST) / SMALLEST) / math.log(LARGEST / SMALLEST)
        return start + 14 + share * (self.width - self.right - start - 28)

    def y(self, speed: float) -> float:
        share = (math.log2(speed) - self.low) / (self.high - self.low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def map_chart(found: list[Mark], wide: bool) -> str:
    """Empty without marks. The wide one names its numbered marks, as far as there is room."""
    if not found:
        return ""
    plane = _plane([mark.speed for mark in found], wide)
    places = _places(found, plane, wide)
    parts = [*_frame(plane, wide), *(_drawn(mark, *place) for mark, place in places)]
    if wide:
        parts += _names(places, plane)
    label = "Speed-up and change of the answers, all runs"
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {plane.width} {plane.height}" '
        f'class="map">{"".join(parts)}</svg>'
    )


def _plane(speeds: list[float], wide: bool) -> _Plane:
    low = min(-0.5, math.log2(min(speeds)) - 0.25)
    high = max(1.5, math.log2(max(speeds)) + 0.35)
    if wide:
        return _Plane(1120, 500, 46, 12, 14, 54, 270, low, high)
    return _Plane(380, 430, 34, 4, 12, 58, 118, low, high)


def _frame(plane: _Plane, wide: bool) -> list[str]:
    left, right, bottom = plane.left, plane.width - plane.right, plane.height - plane.bottom
    parts = [f'<rect class="same" x="{left}" y="{plane.top}" width="{plane.same}" height="{bottom - plane.top}"/>']
    for speed in _speeds(plane):
        y = plane.y(speed)
        kind = "one" if speed == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{speed:g}x", "end"))
    for tick in _TICKS:
        x = plane.x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{plane.top}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 16, f"{tick:g}", "middle"))
    parts.append(_text(left + plane.same / 2, bottom + 16, "the same answers", "middle"))
    axis = "change of the answers (%, log scale) →" if wide else "change of the answers (%) →"
    parts.append(_text(right, bottom + 36, axis, "end", "axis"))
    parts.append(_text(left + 6, plane.top + 14, "↑ times as fast", "start", "axis"))
    return parts


def _speeds(plane: _Plane) -> list[float]:
    """The lines of the grid: powers of two, and some between them where there is room."""
    powers = [2.0**power for power in range(math.ceil(plane.low), math.floor(plane.high) + 1)]
    between = [1.5 * power for power in powers] if plane.high - plane.low < 3.5 else []
    return sorted(speed for speed in (*powers, *between) if math.log2(speed) <= plane.high)


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{html.escape(text)}</text>'


def _places(found: list[Mark], plane: _Plane, wide: bool) -> list[tuple[Mark, tuple[float, float, float]]]:
    """Centre and radius of each mark: moved sideways until numbered ones do not cover one another."""
    placed: list[tuple[Mark, tuple[float, float, float]]] = []
    for mark in sorted(found, key=lambda one: one.number == 0):  # numbered ones choose first
        radius = (10.0 if wide else 8.5) if mark.number else (4.5 if wide else 3.5)
        x, y = plane.x(mark.changed), plane.y(mark.speed)
        taken = [place for _, place in placed]
        far = 12 if mark.changed < SMALLEST else 2 if mark.number else 1
        shifts = [side * step * (2 * radius + 1) for step in range(far) for side in (1, -1)]
        free = (
            shift
            for shift in shifts
            if plane.left + radius < x + shift < plane.width - plane.right - radius
            and all(math.hypot(x + shift - cx, y - cy) >= radius + cr for cx, cy, cr in taken)
        )
        placed.append((mark, (x + next(free, 0.0), y, radius)))
    return placed[::-1]


def _drawn(mark: Mark, x: float, y: float, radius: float) -> str:
    colour = KINDS[mark.kind][1]
    css = " ".join(filter(None, ("random" if mark.row.random else "", "numbered" if mark.number else "small")))
    circle = f'<circle class="{css}" style="--kind:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'
    title = f"<title>{html.escape(mark.title)}</title>"
    if not mark.number:
        return f"<g>{title}{circle}</g>"
    number = _text(x, y + radius * 0.4, str(mark.number), "middle", f"number {css}").replace(
        "<text", f'<text style="--kind:{colour}"'
    )
    return f'<a href="#line-{mark.number}">{title}{circle}{number}</a>'


def _names(places: list[tuple[Mark, tuple[float, float, float]]], plane: _Plane) -> list[str]:
    """Names beside the numbered marks, wherever one covers neither marks nor other names."""
    taken = [(x - r, y - r, x + r, y + r) for _, (x, y, r) in places]
    named: set[int] = set()
    parts = []
    for mark, (x, y, radius) in sorted(places, key=lambda place: place[0].number):
        if not mark.number or mark.number in named:
            continue
        text = mark.scenario.name
        width = 6.3 * len(text)
        for box_x, anchor in ((x + radius + 4, "start"), (x - radius - 4 - width, "end")):
            box = (box_x, y - 7, box_x + width, y + 7)
            inside = box[0] > plane.left and box[2] < plane.width - plane.right
            if inside and not any(_overlap(box, other) for other in taken):
                parts.append(_text(box_x if anchor == "start" else box_x + width, y + 4, text, anchor, "name"))
                taken.append(box)
                named.add(mark.number)
                break
    return parts


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
