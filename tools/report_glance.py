"""The report's table at a glance: a row for each kind of traffic, in the setting that a user would choose."""

from __future__ import annotations

from outcomes import answers_text
from reasons import reason
from report_cells import Cell, Column, Table, table, text
from report_numbers import plain_number, times
from report_records import Row
from report_tables import BASELINES, ratio_cell
from scenarios import NO_CACHE, Ratio, Scenario, fair, ratios
from summary_lines import MOST_LINES, Line, setting_words


def glance(lines: list[Line], scenarios: list[Scenario], without: list[Scenario]) -> Table | None:
    """A row for each kind of traffic, in the order of the summary; `without` are shown elsewhere."""
    numbers = {id(row): number for number, line in enumerate(lines, start=1) for row in line.rows}
    shown = [one for one in scenarios if one not in without and one.chosen and fair(one.chosen)]
    shown.sort(key=lambda one: numbers.get(id(one.chosen), len(lines) + 1))
    shown = shown[:MOST_LINES]
    if not shown:
        return None
    rows = [(one, row) for one in shown if (row := one.chosen)]
    values = [ratio.value for _, row in rows if (ratio := fair(row))]
    papers = [one.paper.speedup_vs_nocache for one in shown if one.paper and one.paper is not one.chosen]
    most = max([*values, *papers])

    def speed(pair: tuple[Scenario, Row]) -> Cell:
        one, row = pair
        ratio = fair(row)
        assert ratio is not None
        what = f"{ratio.of}, " if ratio.of else ""
        others = [f"{other.of or 'all'} {times(other.value)} {BASELINES[other.against]}" for other in ratios(row)[1:]]
        why = reason(row, one)
        return ratio_cell(ratio, most, what + BASELINES[ratio.against], *others, f"why: {why}" if why else "")

    def paper(pair: tuple[Scenario, Row]) -> Cell:
        one, chosen = pair
        row = one.paper
        if row is None or row is chosen:
            return Cell()
        ratio = Ratio(row.speedup_vs_nocache, "", NO_CACHE)
        why = reason(row, one) if ratio.loses else ""
        return ratio_cell(ratio, most, f"τ {row.threshold:.3g}: {answers_text(row)}", f"why: {why}" if why else "")

    columns = [
        Column("", lambda pair: text(str(numbers.get(id(pair[1]), "") or ""), css="key")),
        Column(
            "traffic",
            lambda pair: text(
                pair[0].words,
                f"{pair[0].model} · {pair[0].rows[0].workload}",
                setting_words(pair[1]) or "lossless",
                f"{plain_number(pair[1].requests)} requests",
                css="what",
            ),
        ),
        Column("speed-up", speed),
        Column("the answers", lambda pair: text(answers_text(pair[1]), css="prose")),
        Column("the paper's mode", paper),
    ]
    return table(columns, rows, "glance")
