"""The report's tables of all figures, one for each model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.report.formatting import Quality, error_number, measured, mebibytes, percent, plain_number
from tools.report.reasons import reason
from tools.report.records import Row
from tools.report.scenarios import Scenario
from tools.report.tables import Cell, Column, Table, speedup_cell, table, text


def _field(
    head: str, write: Callable[[Any], str], name: str, meaning: str = "", small: Callable[[Row], str] = lambda _: ""
) -> Column:
    """A field of the record, or with a dot a part of one, with a smaller line below it."""
    outer, _, inner = name.partition(".")

    def cell(row: Row) -> Cell:
        return text(write(row.part(outer, inner) if inner else row.record.get(outer)), small(row))

    return Column(head, cell, meaning)


def _change_cell(row: Row) -> Cell:
    quality, second = row.quality, row.second_quality
    if row.plain:
        quality = second = None
    small = [row.rate_text("unsafe_served", "wrongly served"), row.rate_text("same_answer", "same gold answer")]
    if second and second.change is not None:
        small.insert(0, f"{_second_name(row)} {second.change_text}{_ends(', 95 %: ', second)}")
    if quality is None:
        return text("", "random weights" if row.random and not row.plain else "", *small)
    if quality.change is None:
        return text(quality.levels_text, _ends("95 %: ", quality), *small)
    named = quality.metric + _ends(", 95 %: ", quality)
    return text(quality.change_text, named, quality.verdict, *small, css=quality.verdict)


def _ends(words: str, quality: Quality) -> str:
    return words + quality.interval_text if quality.ci95 else ""


def _budget_cell(row: Row) -> Cell:
    if not measured(row.budget_epsilon):
        return Cell()
    delta = f"δ {percent(row.budget_delta)}" if measured(row.budget_delta) else ""
    return text(percent(row.budget_epsilon), row.budget_metric if isinstance(row.budget_metric, str) else "", delta)


def _observed_cell(row: Row) -> Cell:
    n = row.part("observed_error", "n")
    return text(row.observed_text, f"of {plain_number(n)}" if measured(n) else "")


def _closings(row: Row) -> str:
    text = f"closed {plain_number(row.gate_closings)}, reopened {plain_number(row.gate_reopenings)}"
    return text if measured(row.gate_closings) else ""


def _later(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        found = row.part("later_turns", name)
        found = found.get("mean") if isinstance(found, dict) else found
        return f"later turns {plain_number(found)}" if measured(found) else ""

    return text


def _recall_cell(row: Row) -> Cell:
    return text(percent(row.recall if row.recall is not None else row.part("task", "recall")))


def _filled_cell(row: Row) -> Cell:
    some = measured(row.fill_available) and row.fill_available
    return text(f"{plain_number(row.filled)} of {plain_number(row.fill_available)}" if some else "")


def _quality_cell(name: str) -> Callable[[Row], Cell]:
    def level(quality: Quality | None) -> str:
        return quality.level(getattr(quality, name)) if quality and measured(getattr(quality, name)) else ""

    def cell(row: Row) -> Cell:
        second = level(row.second_quality)
        return text(level(row.quality), f"{_second_name(row)} {second}" if second else "")

    return cell


def _second_name(row: Row) -> str:
    """Of the second metric beside the first one's name: "per byte" behind "choice accuracy"."""
    assert row.second_quality is not None
    first = row.quality.metric if row.quality else ""
    return row.second_quality.metric.removeprefix(first).strip()


def _name_cell(row: Row) -> Cell:
    """With a note that is not a reason, which stands beside the speed-up."""
    return text(row.workload, row.label, "" if reason(row) else row.note_text, css="what")


COLUMNS = [
    Column("workload and run", _name_cell),
    Column("speed-up", speedup_cell, "against no cache, over the same requests"),
    Column(
        "change of answers",
        _change_cell,
        "with its 95 % interval; “no clear change” if that holds zero. Wrongly served: share of the served requests "
        "whose cached answer belongs to another question. Same gold answer: share of the served questions whose cached "
        "question has the same gold answer",
    ),
    Column("value", _quality_cell("value")),
    Column("baseline", _quality_cell("baseline")),
    Column(
        "budget",
        _budget_cell,
        "the share of sequences that may be in error (ε), by which measure, and the probability that calibration is "
        "misled (δ)",
    ),
    _field("promised", percent, "promised_error", "upper bound of the error, from calibration"),
    Column("observed", _observed_cell, "error on requests that calibration never saw, with its 95 % interval"),
    Column("reused by", lambda row: text("", *row.reused_texts), "shares of sequences"),
    _field("calibrated", plain_number, "calibration_requests", "on that many requests"),
    _field(
        "audits",
        plain_number,
        "audits",
        "served sequences that were also computed in full, and how often that stopped reuse and let it go on",
        _closings,
    ),
    Column("recall", _recall_cell),
    _field("hit rate", percent, "hit_rate", "sequences answered from an earlier request"),
    _field("mean ms", plain_number, "latency_ms.mean"),
    *(_field(part, plain_number, f"latency_ms.{part}") for part in ("p50", "p95", "p99")),
    _field(
        "computed",
        percent,
        "tokens_computed_fraction",
        "tokens that went through the layers, padding included, of the real ones",
    ),
    _field("reused", percent, "tokens_reused_fraction", "tokens of prompts known from before"),
    _field("shared", percent, "tokens_shared_fraction", "computed once for several rows of a batch"),
    _field(
        "prefill ms",
        plain_number,
        "prefill_ms.mean",
        "until the first token's output is there; later turns send the conversation again",
        _later("prefill_ms"),
    ),
    _field("vs no cache", plain_number, "prefill_speedup_vs_nocache", "the prefill"),
    _field(
        "vs kvcache",
        plain_number,
        "prefill_speedup_vs_kvcache",
        "the prefill, against keys and values that are kept inside one request, weights held alike",
        _later("speedup_vs_kvcache"),
    ),
    _field("decode ms", plain_number, "decode_ms.mean", "each further token"),
    _field("tokens/s", lambda value: plain_number(value, 1), "tokens_per_second", "said, of all time"),
    Column(
        "greedy",
        lambda row: text(row.greedy_text),
        "tokens that come out on top as without a cache, of those compared; tied ones lie within 1e-4 of the best",
    ),
    _field(
        "div. mean",
        error_number,
        "divergence.mean",
        "divergence, the relative distance of outputs from those without a cache; 0 means bit-identical",
    ),
    *(_field(f"div. {part}", error_number, f"divergence.{part}") for part in ("p95", "max")),
    _field("cache MiB", mebibytes, "cache_bytes"),
    Column("filled", _filled_cell, "requests put into the cache before, of those there are"),
    *(_field(name, plain_number, name) for name in ("requests", "tokens", "threads")),
]


def all_figures(scenarios: list[Scenario]) -> Table:
    """Everything that was measured of one model; runs without a cache first in each kind of traffic."""
    rows = [row for one in scenarios for row in sorted(one.rows, key=lambda row: not row.plain)]
    return table(COLUMNS, rows, "full", ["plain" if row.plain else "" for row in rows])
