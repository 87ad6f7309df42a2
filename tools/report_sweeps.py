"""Records that differ in one setting alone, as the lines of a chart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from report_numbers import measured
from report_records import Row, telling_settings
from scenarios import Scenario
from traffic_words import traffic

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
        return f"{self.model}, {traffic(self.workload).words}"

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
