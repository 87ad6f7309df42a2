"""The report's block on the LLMCache paper: its nine cells, and its claims beside what came out here."""

from __future__ import annotations

from dataclasses import dataclass

from tools.report.formatting import measured, percent, times
from tools.report.outcomes import answers_text
from tools.report.paper_cells import MOST_LOSS, Claim, cells, claims, faithful_row
from tools.report.paper_cells import Cell as PaperCell
from tools.report.reasons import short_reason
from tools.report.records import Row
from tools.report.scenarios import KV_CACHE, NO_CACHE, Ratio, Scenario, ratios
from tools.report.tables import Cell, Column, Table, answers, ratio_cell, table, text, why


@dataclass
class PaperBlock:
    claims: list[Claim]
    table: Table
    scenarios: list[Scenario]
    random: list[str]  # models without trained weights
    missing: list[str]  # cells that were not measured
    stands_in: list[str]  # data sets of the paper, in whose place written samples were used


def paper_block(scenarios: list[Scenario]) -> PaperBlock | None:
    """Makes the block. The result is None if no cell was measured."""
    there, missing = cells(scenarios)
    if not there:
        return None
    return PaperBlock(
        claims(there),
        _table(there),
        [cell.scenario for cell in there],
        list(dict.fromkeys(cell.scenario.model for cell in there if cell.scenario.random)),
        missing,
        list(dict.fromkeys(cell.data_set for cell in there if cell.scenario.traffic.written)),
    )


def _table(there: list[PaperCell]) -> Table:
    scenarios = [cell.scenario for cell in there]
    rows = [row for one in scenarios for row in (one.lossless, one.paper) if row]
    most = max((row.speedup_vs_nocache for row in rows if measured(row.speedup_vs_nocache)), default=1.0)

    def speed(row: Row | None, *small: str) -> Cell:
        if row is None or not measured(row.speedup_vs_nocache):
            return Cell()
        ratio = Ratio(row.speedup_vs_nocache, "", NO_CACHE)
        return ratio_cell(ratio, *small, why(short_reason(row)) if ratio.loses else "", most=most)

    def lossless(cell: PaperCell) -> Cell:
        row = cell.scenario.lossless
        against = [one for one in ratios(row) if one.against == KV_CACHE] if row else []
        return speed(row, *(f"{times(one.value)} against a KV cache" for one in against))

    def paper(cell: PaperCell) -> Cell:
        row = cell.scenario.paper
        if row is None:
            return Cell()
        hits = f"hits {percent(row.hit_rate, 0)}" if measured(row.hit_rate) else ""
        centred = "centred: not the paper's scale" if row.centring in ("running", "fitted") else ""
        return speed(row, _tau(row), hits, centred)

    def faithful(cell: PaperCell) -> Cell:
        row = faithful_row(cell.scenario)
        return speed(row, _tau(row)) if row else Cell()

    judged = any(row.quality and not row.random for one in scenarios for row in one.paper_rows)
    columns = [
        Column("cell", _name),
        Column("lossless", lossless),
        Column("the paper's mode", paper),
        Column("its answers", lambda cell: answers(cell.scenario.paper)),
        *([Column(f"fastest under {MOST_LOSS} % loss", faithful)] if judged else []),
        Column("at other thresholds", _others),
    ]
    return table(columns, there, "cells")


def _tau(row: Row) -> str:
    return f"τ {row.threshold:.3g}"


def _name(cell: PaperCell) -> Cell:
    scenario = cell.scenario
    used = f"{scenario.rows[0].workload} in place of {cell.data_set}" if scenario.traffic.written else ""
    model = f"{scenario.model}{', random weights' if scenario.random else ''}"
    return text(f"{cell.family}, {cell.data_set}", used, model, css="what")


def _others(cell: PaperCell) -> Cell:
    lines = []
    for row in cell.scenario.paper_rows:
        because = short_reason(row)
        loss = f" ({because})" if because else ""
        if row is not cell.scenario.paper:
            lines.append(f"{_tau(row)}: {times(row.speedup_vs_nocache)}{loss}, {answers_text(row)}")
    return text("", *lines)
