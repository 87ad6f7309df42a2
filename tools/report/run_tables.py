"""The report's tables of runs: at a glance, and the figures of each chart."""

from __future__ import annotations

from typing import Any

from tools.report.formatting import percent, plain_number, times
from tools.report.outcomes import answers_text, change
from tools.report.reasons import reason
from tools.report.records import Row
from tools.report.scenarios import NO_CACHE, Ratio, Scenario, fair, ratios
from tools.report.speed_map import Mark
from tools.report.summary_lines import MOST_LINES, Line, line_numbers, setting_words
from tools.report.tables import (
    BASELINES,
    Cell,
    Column,
    Table,
    against,
    answers,
    ratio_cell,
    speedup_cell,
    table,
    text,
    why,
)


def glance(lines: list[Line], scenarios: list[Scenario], without: list[Scenario]) -> Table | None:
    """A row for each kind of traffic, in the setting that a user would choose and in the order of the summary;
    `without` are shown elsewhere."""
    numbers = line_numbers(lines)
    found = [(one, row, ratio) for one in scenarios if (row := one.chosen) and (ratio := fair(row))]
    found = [run for run in found if run[0] not in without]
    found.sort(key=lambda run: numbers.get(id(run[1]), len(lines) + 1))
    found = found[:MOST_LINES]
    papers = {id(one): one.paper for one, row, _ in found if one.paper and one.paper is not row}
    most = max([ratio.value for _, _, ratio in found] + [row.speedup_vs_nocache for row in papers.values()], default=1)

    def traffic(run: tuple[Scenario, Row, Ratio]) -> Cell:
        one, row, _ = run
        what = f"{one.model} · {one.workload}"
        requests = f"{plain_number(row.requests)} requests"
        return text(one.words, what, setting_words(row) or "lossless", requests, css="what")

    def speed(run: tuple[Scenario, Row, Ratio]) -> Cell:
        _, row, ratio = run
        others = [f"{other.of or 'all'} {times(other.value)} {BASELINES[other.against]}" for other in ratios(row)[1:]]
        return ratio_cell(ratio, against(ratio), *others, why(reason(row)), most=most)

    def paper(run: tuple[Scenario, Row, Ratio]) -> Cell:
        row = papers.get(id(run[0]))
        if row is None:
            return Cell()
        ratio = Ratio(row.speedup_vs_nocache, "", NO_CACHE)
        because = why(reason(row)) if ratio.loses else ""
        return ratio_cell(ratio, f"τ {row.threshold:.3g}: {answers_text(row)}", because, most=most)

    columns = [
        Column("", lambda run: text(str(numbers.get(id(run[1]), "") or ""), css="key")),
        Column("traffic", traffic),
        Column("speed-up", speed),
        Column("the answers", lambda run: answers(run[1])),
        Column("the paper's mode", paper),
    ]
    return table(columns, found, "glance") if found else None


def marks_table(marks: list[Mark]) -> Table:
    """Shows the first chart in figures."""

    def speed(mark: Mark) -> Cell:
        ratio = fair(mark.row)
        assert ratio is not None
        return ratio_cell(ratio, against(ratio), why(reason(mark.row)))

    def changed(mark: Mark) -> Cell:
        found = change(mark.row)
        assert found is not None
        value = "0" if found.percent == 0 else f"{found.percent:.2g}" if found.percent < 1 else f"{found.percent:.1f}"
        return text(f"{value} %" if found.percent < 0.01 or not found.of.startswith("points") else value, found.of)

    columns = [
        Column("", lambda mark: text(str(mark.number or ""), css="key")),
        Column("traffic", lambda mark: text(mark.scenario.name, mark.row.label, css="what")),
        Column("speed-up", speed),
        Column("change", changed),
        Column("the answers", lambda mark: answers(mark.row)),
    ]
    return table(columns, sorted(marks, key=lambda mark: (not mark.number, mark.number, -mark.speed)), "marks")


def runs_table(named: list[tuple[str, Row]], *columns: Column) -> Table:
    """Lists the runs of a chart: their names, the given columns, speed-up and answers."""
    shown = [
        Column("run", lambda pair: text(pair[0], css="what")),
        *(Column(column.head, lambda pair, column=column: column.cell(pair[1])) for column in columns),
        Column("speed-up", lambda pair: speedup_cell(pair[1])),
        Column("the answers", lambda pair: answers(pair[1])),
        Column("hit rate", lambda pair: text(percent(pair[1].hit_rate))),
    ]
    return table(shown, named, "runs")


def rates_table(lines: list[tuple[str, dict[float, Any]]], what: str) -> Table:
    """Makes a row for each line of a chart, and a column for each place on its axis."""

    def at(place: float) -> Column:
        return Column(plain_number(int(place)), lambda line: text(percent(line[1].get(place))))

    places = sorted({place for _, rates in lines for place in rates})
    return table([Column(what, lambda line: text(line[0], css="what")), *map(at, places)], lines, "runs")
