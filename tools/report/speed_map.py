"""What stands where in the report's first chart: how many times as fast, over how much of the answers changed, a mark
for each run. charts.py draws it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tools.report.outcomes import answers_text, change
from tools.report.records import Row
from tools.report.scenarios import Scenario, fair
from tools.report.summary_lines import Line, line_numbers, setting_words

# Kinds of runs in the order of the legend. Colours after Okabe and Ito.
KINDS = {
    "lossless": ("lossless", "#0072b2"),
    "identical": ("word-for-word repeats", "#3a8fb7"),
    "budget": ("within an error budget", "#00775a"),
    "threshold": ("the paper's mode", "#c34f00"),
    "semantic-cache": ("whole answers of similar texts", "#a3507f"),
    "other": ("other", "#5b6470"),
}
SMALLEST, LARGEST = 0.01, 100.0  # percent, the ends of the logarithmic part
LETTER = 4.7  # the width of a letter of a name, in points as all places here

Place = tuple["Mark", float, float, float]  # a mark, its centre and its radius
Edges = tuple[float, float]  # left and right


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
    numbers = line_numbers(lines)
    found = []
    for scenario in scenarios:
        for row in scenario.rows:
            ratio, changed = fair(row), change(row)
            if row.plain or row.mode == "kvcache" or ratio is None or changed is None:
                continue
            found.append(Mark(row, scenario, ratio.value, changed.percent, numbers.get(id(row), 0)))
    return sorted(found, key=lambda mark: mark.number > 0)


def legend(found: list[Mark]) -> list[tuple[str, str]]:
    """Names the kinds of runs in the chart, with their colours."""
    shown = {mark.kind for mark in found}
    return [entry for kind, entry in KINDS.items() if kind in shown]


def placed(found: list[Mark], centre: Callable[[Mark], tuple[float, float]], edges: Edges, wide: bool) -> list[Place]:
    """The marks at their centres, moved sideways until numbered ones do not cover one another."""
    places: list[Place] = []
    for mark in sorted(found, key=lambda one: one.number == 0):  # numbered ones choose first
        radius = (7.5 if wide else 6.4) if mark.number else (3.4 if wide else 2.6)
        x, y = centre(mark)
        far = 12 if mark.changed < SMALLEST else 2 if mark.number else 1
        shifts = [side * step * (2 * radius + 0.75) for step in range(far) for side in (1, -1)]
        free = (
            shift
            for shift in shifts
            if edges[0] + radius < x + shift < edges[1] - radius
            and all(math.hypot(x + shift - cx, y - cy) >= radius + cr for _, cx, cy, cr in places)
        )
        places.append((mark, x + next(free, 0.0), y, radius))
    return places[::-1]


def beside(places: list[Place], edges: Edges) -> Iterator[tuple[str, float, float, str]]:
    """Names, where they begin or end, and which of the two ("left", "right"): beside the numbered marks, wherever one
    covers neither marks nor other names."""
    taken = [(x - r, y - r, x + r, y + r) for _, x, y, r in places]
    named: set[int] = set()
    for mark, x, y, radius in sorted(places, key=lambda place: place[0].number):
        if not mark.number or mark.number in named:
            continue
        width = LETTER * len(mark.scenario.name)
        for start, side in ((x + radius + 3, "left"), (x - radius - 3 - width, "right")):
            box = (start, y - 5, start + width, y + 5)
            inside = box[0] > edges[0] and box[2] < edges[1]
            if inside and not any(_overlap(box, other) for other in taken):
                yield mark.scenario.name, start if side == "left" else start + width, y, side
                taken.append(box)
                named.add(mark.number)
                break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
