"""The report's block on the LLMCache paper: its nine cells, and its claims beside what came out here."""

from __future__ import annotations

from dataclasses import dataclass

from outcomes import answers_text
from paper_cells import MOST_LOSS, Claim, cells, claims, faithful_row
from paper_cells import Cell as PaperCell
from reasons import short_reason
from report_cells import Cell, Column, Table, table, text
from report_numbers import measured, percent, times
from report_records import Row
from report_tables import ratio_cell
from scenarios import KV_CACHE, NO_CACHE, Ratio, Scenario, ratios


@dataclass
class PaperBlock:
    claims: list[Claim]
    table: Table
    scenarios: list[Scenario]
    random: list[str]  # models without trained weights
    missing: list[str]  # cells that were not measured
    stands_in: list[str]  # data sets of the paper, in whose place written samples were used


def paper_block(scenarios: list[Scenario]) -> PaperBlock | None:
    """None if no cell was measured."""
    nine = cells(scenarios)
    there = [(cell, cell.scenario) for cell in nine if cell.scenario]
    if not there:
        return None
    return PaperBlock(
        claims(nine),
        _table([cell for cell, _ in there]),
        [one for _, one in there],
        list(dict.fromkeys(one.model for _, one in there if one.random)),
        [f"{cell.family} on {cell.data_set}" for cell in nine if cell.scenario is None],
        list(dict.fromkeys(cell.data_set for cell, one in there if one.traffic.written)),
    )


def _times(row: Row | None) -> float | None:
    return row.speedup_vs_nocache if row and measured(row.speedup_vs_nocache) else None


def _table(there: list[PaperCell]) -> Table:
    scenarios = [cell.scenario for cell in there if cell.scenario]
    found = [_times(row) for one in scenarios for row in (one.lossless, one.paper)]
    most = max([value for value in found if value is not None], default=1.0)

    def cell_of(row: Row | None, scenario: Scenario | None, *small: str) -> Cell:
        value = _times(row)
        if row is None or value is None:
            return Cell()
        ratio = Ratio(value, "", NO_CACHE)
        why = short_reason(row, scenario) if ratio.loses else ""
        return ratio_cell(ratio, most, *small, f"why: {why}" if why else "")

    def lossless(cell: PaperCell) -> Cell:
        row = cell.scenario.lossless if cell.scenario else None
        against = [one for one in ratios(row) if one.against == KV_CACHE] if row else []
        return cell_of(row, cell.scenario, *(f"{times(one.value)} against a KV cache" for one in against))

    def paper(cell: PaperCell) -> Cell:
        row = cell.paper
        if row is None:
            return Cell()
        hits = f"hits {percent(row.hit_rate, 0)}" if measured(row.hit_rate) else ""
        centred = "centred: not the paper's scale" if row.centring in ("running", "fitted") else ""
        return cell_of(row, cell.scenario, f"τ {row.threshold:.3g}", hits, centred)

    def others(cell: PaperCell) -> Cell:
        rows = [row for row in cell.scenario.paper_rows if row is not cell.paper] if cell.scenario else []
        return text("", *(_at(row, cell.scenario) for row in rows))

    def faithful(cell: PaperCell) -> Cell:
        row = faithful_row(cell.scenario) if cell.scenario else None
        return cell_of(row, cell.scenario, f"τ {row.threshold:.3g}" if row else "")

    judged = any(row.quality and not row.random for one in scenarios for row in one.paper_rows)
    columns = [
        Column("cell", _name),
        Column("lossless", lossless),
        Column("the paper's mode", paper),
        Column("its answers", lambda cell: text(answers_text(cell.paper) if cell.paper else "", css="prose")),
        Column("at other thresholds", others),
    ]
    if judged:
        columns.insert(4, Column(f"fastest under {MOST_LOSS} % loss", faithful))
    return table(columns, there, "cells")


def _name(cell: PaperCell) -> Cell:
    scenario = cell.scenario
    assert scenario is not None
    workload = scenario.rows[0].workload
    used = f"{workload} in place of {cell.data_set}" if scenario.traffic.written else ""
    model = f"{scenario.model}{', random weights' if scenario.random else ''}"
    return text(f"{cell.family}, {cell.data_set}", used, model, css="what")


def _at(row: Row, scenario: Scenario | None) -> str:
    why = short_reason(row, scenario)
    loss = f" ({why})" if why else ""
    return f"τ {row.threshold:.3g}: {times(row.speedup_vs_nocache)}{loss}, {answers_text(row)}"
