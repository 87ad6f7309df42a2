"""The report's tables of all figures, one for each model."""

from __future__ import annotations

from reasons import reason
from report_cells import Cell, Column, Table, table, text
from report_numbers import DASH, Quality, error_number, interval, measured, mebibytes, percent, plain_number
from report_records import Row
from report_tables import speedup_cell
from scenarios import Scenario


def rate(found: dict[str, object] | None) -> str:
    """A rate with its 95 % interval, or an empty text."""
    found = found or {}
    if not measured(found.get("rate")):
        return ""
    bounds = interval(found.get("ci95"))
    return percent(found["rate"]) + (f" ({percent(bounds[0])} to {percent(bounds[1])})" if bounds else "")


def _summary(name: str, part: str) -> Column:
    return Column(
        ("mean ms" if part == "mean" else part) if name == "latency_ms" else f"div. {part}",
        lambda pair: text(
            (plain_number if name == "latency_ms" else error_number)((pair[1].record.get(name) or {}).get(part))
        ),
        "divergence, the relative distance of outputs from those without a cache; 0 means bit-identical"
        if name == "divergence" and part == "mean"
        else "",
    )


def _change_cell(pair: tuple[Scenario, Row]) -> Cell:
    row = pair[1]
    quality, per_byte = row.quality, row.per_byte
    both = per_byte is not None and per_byte.change is not None and not row.plain
    small = [
        f"per byte {per_byte.change_text}{f', 95 %: {per_byte.interval_text}' if per_byte.ci95 else ''}"
        if both
        else "",
        f"wrongly served {rate(row.unsafe_served)}" if rate(row.unsafe_served) else "",
        f"same gold answer {rate(row.same_answer)}" if rate(row.same_answer) else "",
    ]
    if quality and quality.change is not None and not row.plain:
        ends = f", 95 %: {quality.interval_text}" if quality.ci95 else ""
        return text(quality.change_text, quality.metric + ends, quality.verdict, *small, css=quality.verdict)
    if quality and quality.change is None and not row.plain:
        return text(quality.levels_text, f"95 %: {quality.interval_text}" if quality.ci95 else "", *small)
    return text("", "random weights" if row.random and not row.plain else "", *small)


def _observed_cell(pair: tuple[Scenario, Row]) -> Cell:
    n = (pair[1].observed_error or {}).get("n")
    return text(pair[1].observed_text, f"of {plain_number(n)}" if measured(n) else "")


def _budget_cell(pair: tuple[Scenario, Row]) -> Cell:
    row = pair[1]
    if not measured(row.budget_epsilon):
        return Cell()
    delta = f"δ {percent(row.budget_delta)}" if measured(row.budget_delta) else ""
    return text(percent(row.budget_epsilon), row.budget_metric if isinstance(row.budget_metric, str) else "", delta)


def _audits_cell(pair: tuple[Scenario, Row]) -> Cell:
    row = pair[1]
    closed = f"closed {plain_number(row.gate_closings)}, reopened {plain_number(row.gate_reopenings)}"
    return text(plain_number(row.audits), closed if measured(row.gate_closings) else "")


def _later(row: Row, name: str) -> str:
    found = (row.later_turns or {}).get(name)
    found = found.get("mean") if isinstance(found, dict) else found
    return f"later turns {plain_number(found)}" if measured(found) else ""


def _recall(row: Row) -> object:
    return row.recall if row.recall is not None else (row.record.get("task") or {}).get("recall")


def _filled(row: Row) -> str:
    some = measured(row.fill_available) and row.fill_available
    return f"{plain_number(row.filled)} of {plain_number(row.fill_available)}" if some else ""


def _quality_cell(row: Row, name: str) -> Cell:
    def level(quality: Quality | None) -> str:
        return quality.level(getattr(quality, name)) if quality and measured(getattr(quality, name)) else ""

    per_byte = level(row.per_byte)
    return text(level(row.quality), f"per byte {per_byte}" if per_byte else "")


def _note(pair: tuple[Scenario, Row]) -> str:
    """A note that is not a reason, which stands beside the speed-up."""
    return "" if reason(pair[1], pair[0]) else pair[1].note_text


COLUMNS = [
    Column("workload and run", lambda pair: text(pair[1].workload, pair[1].label, _note(pair), css="what")),
    Column("speed-up", lambda pair: speedup_cell(pair[1], pair[0]), "against no cache, over the same requests"),
    Column(
        "change of answers",
        _change_cell,
        "with its 95 % interval; “no clear change” if that holds zero. Wrongly served: share of the served requests "
        "whose cached answer belongs to another question. Same gold answer: share of the served questions whose cached "
        "question has the same gold answer",
    ),
    Column("value", lambda pair: _quality_cell(pair[1], "value")),
    Column("baseline", lambda pair: _quality_cell(pair[1], "baseline")),
    Column(
        "budget",
        _budget_cell,
        "the share of sequences that may be in error (ε), by which measure, and the probability that calibration is "
        "misled (δ)",
    ),
    Column(
        "promised", lambda pair: text(percent(pair[1].promised_error)), "upper bound of the error, from calibration"
    ),
    Column("observed", _observed_cell, "error on requests that calibration never saw, with its 95 % interval"),
    Column("reused by", lambda pair: text(DASH, *pair[1].reused_texts), "shares of sequences"),
    Column("calibrated", lambda pair: text(plain_number(pair[1].calibration_requests)), "on that many requests"),
    Column(
        "audits",
        _audits_cell,
        "served sequences that were also computed in full, and how often that stopped reuse and let it go on",
    ),
    Column("recall", lambda pair: text(percent(_recall(pair[1])))),
    Column("hit rate", lambda pair: text(percent(pair[1].hit_rate)), "sequences answered from an earlier request"),
    *(_summary("latency_ms", part) for part in ("mean", "p50", "p95", "p99")),
    Column(
        "computed",
        lambda pair: text(percent(pair[1].tokens_computed_fraction)),
        "tokens that went through the layers, padding included, of the real ones",
    ),
    Column("reused", lambda pair: text(percent(pair[1].tokens_reused_fraction)), "tokens of prompts known from before"),
    Column(
        "shared",
        lambda pair: text(percent(pair[1].tokens_shared_fraction)),
        "computed once for several rows of a batch",
    ),
    Column(
        "prefill ms",
        lambda pair: text(plain_number((pair[1].prefill_ms or {}).get("mean")), _later(pair[1], "prefill_ms")),
        "until the first token's output is there; later turns send the conversation again",
    ),
    Column("vs no cache", lambda pair: text(plain_number(pair[1].prefill_speedup_vs_nocache)), "the prefill"),
    Column(
        "vs kvcache",
        lambda pair: text(plain_number(pair[1].prefill_speedup_vs_kvcache), _later(pair[1], "speedup_vs_kvcache")),
        "the prefill, against keys and values that are kept inside one request, weights held alike",
    ),
    Column("decode ms", lambda pair: text(plain_number((pair[1].decode_ms or {}).get("mean"))), "each further token"),
    Column("tokens/s", lambda pair: text(plain_number(pair[1].tokens_per_second, 1)), "said, of all time"),
    Column(
        "greedy",
        lambda pair: text(pair[1].greedy_text),
        "tokens that come out on top as without a cache, of those compared; tied ones lie within 1e-4 of the best",
    ),
    *(_summary("divergence", part) for part in ("mean", "p95", "max")),
    Column("cache MiB", lambda pair: text(mebibytes(pair[1].cache_bytes))),
    Column("filled", lambda pair: text(_filled(pair[1])), "requests put into the cache before, of those there are"),
    Column("requests", lambda pair: text(plain_number(pair[1].requests))),
    Column("tokens", lambda pair: text(plain_number(pair[1].tokens))),
    Column("threads", lambda pair: text(plain_number(pair[1].threads))),
]


def all_figures(scenarios: list[Scenario]) -> Table:
    """Everything that was measured of one model; runs without a cache first in each kind of traffic."""
    pairs = [(one, row) for one in scenarios for row in sorted(one.rows, key=lambda row: not row.plain)]
    return table(COLUMNS, pairs, "full", ["plain" if row.plain else "" for _, row in pairs])
