"""The report's tables of runs, and the cells that several tables have."""

from __future__ import annotations

from outcomes import answers_text, change
from reasons import reason
from report_cells import Cell, Column, Table, table, text
from report_map import Mark
from report_numbers import DASH, measured, percent, plain_number, times
from report_records import Row
from scenarios import KV_CACHE, NO_CACHE, Ratio, Scenario, fair, lost

BASELINES = {NO_CACHE: "against no cache", KV_CACHE: "against a KV cache"}


def bar(value: float, most: float) -> dict[str, float]:
    """Share of a bar's width, and where 1 is on it."""
    widest = max(most, 1.0)
    return {"share": round(value / widest, 4), "one": round(1 / widest, 4)}


def ratio_cell(ratio: Ratio | None, most: float, *small: str) -> Cell:
    if ratio is None:
        return Cell()
    css = "best loses" if ratio.loses else "best"
    return Cell(times(ratio.value), tuple(filter(None, small)), css, **bar(ratio.value, most))


def marks_table(marks: list[Mark]) -> Table:
    """The first chart in figures."""

    def speed(mark: Mark) -> Cell:
        ratio = fair(mark.row)
        assert ratio is not None
        why = reason(mark.row, mark.scenario)
        what = f"{ratio.of}, " if ratio.of else ""
        css = "best loses" if ratio.loses else "best"
        return text(times(ratio.value), what + BASELINES[ratio.against], f"why: {why}" if why else "", css=css)

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
        Column("the answers", lambda mark: text(answers_text(mark.row), css="prose")),
    ]
    ordered = sorted(marks, key=lambda mark: (not mark.number, mark.number, -mark.speed))
    return table(columns, ordered, "marks")


def runs_table(named: list[tuple[str, Row]], *columns: Column) -> Table:
    """The runs of a chart by rows: name, the given columns, speed-up and answers."""
    shown = [
        Column("run", lambda pair: text(pair[0], css="what")),
        *(Column(column.head, lambda pair, column=column: column.cell(pair[1])) for column in columns),
        Column("speed-up", lambda pair: speedup_cell(pair[1])),
        Column("the answers", lambda pair: text(answers_text(pair[1]), css="prose")),
        Column("hit rate", lambda pair: text(percent(pair[1].hit_rate))),
    ]
    return table(shown, named, "runs")


def speedup_cell(row: Row, scenario: Scenario | None = None) -> Cell:
    """Against no cache; what is below 1 has the reason beside it."""
    why = reason(row, scenario)
    shown = "" if row.plain or not measured(row.speedup_vs_nocache) else plain_number(row.speedup_vs_nocache)
    loses = bool(shown) and round(row.speedup_vs_nocache, 2) < 1
    ratio = lost(row)
    if why and ratio and not loses:
        return text(shown, f"{times(ratio.value)} {BASELINES[ratio.against]}: {why}", css="best")
    return text(shown, f"why: {why}" if why else "", css="best loses" if loses else "best")


def layers_table(named: list[tuple[str, Row]], field: str) -> Table:
    """A column for each layer."""
    deepest = max(len(row.record[field]) for _, row in named)

    def at(layer: int) -> Column:
        def cell(pair: tuple[str, Row]) -> Cell:
            rates = pair[1].record[field]
            return text(percent(rates[layer]) if layer < len(rates) else DASH)

        return Column(str(layer), cell)

    return table([Column("run", lambda pair: text(pair[0], css="what")), *map(at, range(deepest))], named, "runs")
