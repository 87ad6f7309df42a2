"""The LLMCache paper (arXiv 2512.16843): its nine cells, three models on three data sets, and its claims, beside ours."""

from __future__ import annotations

from dataclasses import dataclass

from tools.report.formatting import measured, percent, plain_ascii, times
from tools.report.outcomes import NO_QUALITY, answers_text, loss_percent, quality_text
from tools.report.reasons import short_reason
from tools.report.records import Row
from tools.report.scenarios import KV_CACHE, NO_CACHE, PAPER_BAND, Ratio, Scenario, ratios
from tools.report.tables import Cell, Column, Table, answers, ratio_cell, table, text, why

FAMILIES = {"BERT-base": "bert-base", "DistilBERT": "distilbert", "GPT-2": "gpt2"}
DATA_SETS = {
    "WikiText": ("wikitext", "sample-articles"),
    "SQuAD": ("squad", "sample-documents"),
    "OpenBookQA": ("openbookqa", "sample-choices"),
}
MOST_LOSS = 0.5  # percent, that the paper claims to stay below


@dataclass(frozen=True)
class PaperCell:
    family: str
    data_set: str
    scenario: Scenario


@dataclass(frozen=True)
class Claim:
    what: str
    paper: str
    ours: str


def _of_family(model: str, name: str) -> bool:
    return model == name or model.startswith(f"{name}-")


def family_of(scenario: Scenario) -> str:
    """Names the paper's model if this is one of its cells. The name is empty otherwise."""
    workload = scenario.workload
    if not any(workload in names for names in DATA_SETS.values()):
        return ""
    return next((family for family, name in FAMILIES.items() if _of_family(scenario.model, name)), "")


def cells(scenarios: list[Scenario]) -> tuple[list[PaperCell], list[str]]:
    """Those of the nine that were measured, and names of the others. Trained weights and real data go before what
    stands in for them."""
    found, missing = [], []
    for family, name in FAMILIES.items():
        for data_set, workloads in DATA_SETS.items():
            best = _best(scenarios, name, workloads)
            if best:
                found.append(PaperCell(family, data_set, best))
            else:
                missing.append(f"{family} on {data_set}")
    return found, missing


def faithful_row(scenario: Scenario) -> Row | None:
    """Finds the fastest run in the paper's mode that loses less than the paper says. There may be none."""
    rows = [(row, loss_percent(row)) for row in scenario.paper_rows]
    kept = [row for row, loss in rows if loss is not None and loss < MOST_LOSS]
    return max(kept, key=lambda row: row.speedup_vs_nocache, default=None)


def _best(scenarios: list[Scenario], name: str, workloads: tuple[str, ...]) -> Scenario | None:
    fitting = [
        scenario
        for scenario in scenarios
        if scenario.workload in workloads and _of_family(scenario.model, name) and scenario.chosen
    ]
    return min(
        fitting,
        key=lambda one: (
            one.random,
            workloads.index(one.workload),
            not any(row.quality for row in one.rows),
            one.paper is None,
            len(one.model),
        ),
        default=None,
    )


def span(values: list[float]) -> str:
    """ "1.6x to 2.2x", or one of them where they read alike."""
    low, high = times(min(values)), times(max(values))
    return low if low == high else f"{low} to {high}"


def taus(rows: list[Row]) -> str:
    return ", ".join(f"{tau:.3g}" for tau in sorted({row.threshold for row in rows}))


def claims(there: list[PaperCell]) -> list[Claim]:
    """Lists what the paper claims, beside what its mode did here."""
    rows = [row for cell in there for row in cell.scenario.paper_rows]
    if not rows:
        return []
    papers = [(cell, row) for cell in there if (row := cell.scenario.paper)]
    middle = [row for _, row in papers]
    bert = [row for cell, row in papers if cell.family == "BERT-base"]
    most = max(rows, key=lambda row: row.speedup_vs_nocache)
    at = taus(bert)
    return [
        Claim(
            "speed-up on BERT-base",
            "2.4x",
            f"{span([row.speedup_vs_nocache for row in bert])} at tau {at}" if bert else "not run",
        ),
        Claim(
            "largest speed-up",
            "3.1x",
            f"{times(most.speedup_vs_nocache)} ({most.model}, tau {most.threshold:.3g}; {answers_text(most)})",
        ),
        Claim("loss of quality", f"under {MOST_LOSS} %", loss_text(middle) + f" (tau {taus(middle)})"),
        Claim("thresholds", f"tau {PAPER_BAND[0]} to {PAPER_BAND[1]}", f"run at tau {taus(rows)}"),
        Claim("hits in lower layers", "up to 92 %", _lower_hits(rows)),
    ]


def loss_text(rows: list[Row]) -> str:
    """What the answers lost: the worst of them by quality, or how far outputs are off where weights are random."""
    known = [(loss, row) for row in rows if (loss := loss_percent(row)) is not None]
    if known:
        loss, worst = max(known, key=lambda pair: pair[0])
        several = f", worst of {len(known)}" if len(known) > 1 else ""
        return f"{quality_text(worst)}{several}" if loss > 0 else "none"
    off = [distance for row in rows if measured(distance := row.part("divergence", "mean"))]
    texts = [plain_ascii(percent(value, 0)) for value in (min(off), max(off))] if off else []
    outputs = f"outputs {' to '.join(dict.fromkeys(texts))} off" if texts else ""
    random = NO_QUALITY if all(row.random for row in rows) else "quality not measured"
    return "; ".join(filter(None, (outputs, random)))


def _lower_hits(rows: list[Row]) -> str:
    found = [
        (rate, layer, row)
        for row in rows
        for layer, rate in enumerate((row.hit_rate_by_layer or [])[: len(row.hit_rate_by_layer or []) // 2])
        if measured(rate) and rate > 0
    ]
    if found:
        rate, layer, row = max(found, key=lambda one: one[0])
        return plain_ascii(f"{percent(rate, 0)} ({row.model}, layer {layer}, tau {row.threshold:.3g})")
    rates = [row.hit_rate for row in rows if measured(row.hit_rate)]
    only = "states of the last layer alone were kept" if any(row.cache_layers == "last" for row in rows) else "none"
    return plain_ascii(f"{only}; hits up to {percent(max(rates), 0)}") if rates else only


def lossless_rows(scenarios: list[Scenario]) -> list[Row]:
    """Lossless runs that were compared with no cache, as the paper compares."""
    return [row for one in scenarios if (row := one.lossless) and measured(row.speedup_vs_nocache)]


# --- the block of the report ---------------------------------------------------------------------


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
        list(dict.fromkeys(cell.data_set for cell in there if cell.scenario.written)),
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
    used = f"{scenario.workload} in place of {cell.data_set}" if scenario.written else ""
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
