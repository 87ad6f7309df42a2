"""What the detailed charts show: records that differ in one setting alone, and runs under an error budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tools.data.workloads import words_for
from tools.report.formatting import measured, percent
from tools.report.records import Row, telling_settings
from tools.report.scenarios import Scenario

LEAST = 3  # values of a setting that make a line


@dataclass
class Sweep:
    """Records of one model and workload, as one or more lines of a chart."""

    model: str
    workload: str
    random: bool
    lines: list[tuple[str, list[Row]]]  # name, rows by rising value

    @property
    def title(self) -> str:
        return f"{self.model}, {words_for(self.workload)}"

    @property
    def rows(self) -> list[tuple[str, Row]]:
        return [(name, row) for name, several in self.lines for row in several]


def sweeps(rows: list[Row], setting: str, least: int = LEAST) -> list[Sweep]:
    """Lines of at least that many different values of the setting; of equal records the last one counts."""
    lines: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in rows:
        if not row.plain and measured(row.record.get(setting)):
            lines.setdefault(row.key(setting), {})[row.record[setting]] = row
    found: dict[tuple[str, str, str], list[list[Row]]] = {}
    for line in lines.values():
        if len(line) >= least:
            ordered = [line[value] for value in sorted(line)]
            first = ordered[0]
            found.setdefault((first.model, first.weights, first.workload), []).append(ordered)
    result = []
    for (model, _, workload), several in found.items():
        firsts = [line[0] for line in several]
        shown = telling_settings(firsts, without=setting)
        named = [(line[0].name(*shown), line) for line in several]
        result.append(Sweep(model, workload, firsts[0].random, named))
    return result


def by_layer(scenarios: list[Scenario], field: str, tells: Callable[[list[float]], bool] = any) -> list[Sweep]:
    """Records with a number for each layer under `field`, by model and workload; each is a line of its own, the one
    that stands for the others first. Trained weights first, and only records of which the numbers tell something."""
    result = []
    for scenario in sorted(scenarios, key=lambda one: one.random):
        several = []
        for row in scenario.rows:
            rates = [rate for rate in row.record.get(field) or [] if measured(rate)]
            if tells(rates):
                several.append(row)
        if several:
            first = (scenario.chosen, scenario.paper)
            several.sort(key=lambda row: row not in first)
            lines = [(row.label, [row]) for row in several]
            result.append(Sweep(scenario.model, several[0].workload, scenario.random, lines))
    return result


def growth_text(rows: list[Row]) -> str:
    """Whether the hit rate grows with the logarithm of the capacity: a straight line on the log axis."""
    points = [(math.log2(row.capacity_bytes), row.hit_rate) for row in rows if measured(row.hit_rate)]
    points = [(x, y) for x, y in points if math.isfinite(x)]
    if len(points) < 2:
        return ""

    def slope(first: tuple[float, float], second: tuple[float, float]) -> float:
        return 100 * (second[1] - first[1]) / (second[0] - first[0])

    if len(points) == 2:
        return f"{slope(*points):+.1f} points for each doubling; two sizes cannot show the shape"
    xs, ys = zip(*points, strict=True)
    if statistics.pvariance(ys) * len(ys) < 1e-12:
        return "the hit rate is the same at every size"
    explained = statistics.correlation(xs, ys) ** 2
    return (
        f"a straight line on this axis (logarithmic growth) explains {percent(explained, 0)} of the variation; a "
        f"doubling adds {slope(*points[:2]):.1f} points at the small end, {slope(*points[-2:]):.1f} at the large end"
    )


# --- error budgets --------------------------------------------------------------------------------


def budget_sweeps(rows: list[Row]) -> list[Sweep]:
    """Finds the lines of runs that differ in their error budget."""
    return sweeps([row for row in rows if _has_budget(row)], "budget_epsilon")


def with_errors(scenarios: list[Scenario]) -> list[tuple[Scenario, Row]]:
    """Runs under a budget that promised or observed an error, by rising budget."""
    pairs = [(scenario, row) for scenario in scenarios for row in scenario.rows if _has_budget(row)]
    pairs = [pair for pair in pairs if of_budget(pair[1]) != (None, None)]
    order = {id(scenario): place for place, scenario in enumerate(scenarios)}
    return sorted(pairs, key=lambda pair: (order[id(pair[0])], pair[1].budget_epsilon))


def _has_budget(row: Row) -> bool:
    return measured(row.budget_epsilon) and row.budget_epsilon > 0


def of_budget(row: Row) -> tuple[float | None, float | None]:
    """The promised and the observed error, as parts of the budget."""
    promised = row.promised_error / row.budget_epsilon if measured(row.promised_error) else None
    return promised, None if row.observed is None else row.observed / row.budget_epsilon


def interval_bars(row: Row) -> tuple[float, float]:
    """Lengths of the interval's bars below and above the observed error, as parts of the budget."""
    if row.observed is None or row.observed_ends is None:
        return 0.0, 0.0
    low, high = row.observed_ends
    return max(0.0, row.observed - low) / row.budget_epsilon, max(0.0, high - row.observed) / row.budget_epsilon
