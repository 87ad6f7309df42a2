"""The report's charts in detail, section by section, and what else could be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.report import charts
from tools.report.formatting import mebibytes, percent, plain_number
from tools.report.records import Row
from tools.report.run_tables import rates_table, runs_table
from tools.report.scenarios import Scenario
from tools.report.sweeps import Sweep, budget_sweeps, by_layer, growth_text, sweeps, with_errors
from tools.report.tables import Column, Table, text
from tools.report.traces import best_policies, lines_of

BENCH = "tools/run.sh bench"
MOST_CHARTS = 6  # of a section, before the others are folded


@dataclass
class Chart:
    title: str
    svg: str
    table: Table
    random: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class Section:
    title: str
    explanation: str
    charts: list[Chart]

    @property
    def first(self) -> list[Chart]:
        return self.charts[:MOST_CHARTS]

    @property
    def further(self) -> list[Chart]:
        return self.charts[MOST_CHARTS:]


@dataclass(frozen=True)
class Kind:
    """A kind of section: without charts it is not there, and the command to get them is in the list at the end."""

    title: str
    explanation: str
    lacking: str
    command: str
    charts: Callable[[list[Scenario], list[dict[str, Any]]], list[Chart]]


def sections(scenarios: list[Scenario], traces: list[dict[str, Any]]) -> tuple[list[Section], list[tuple[str, str]]]:
    """Those with charts, and for each other kind what it would show and by which command."""
    found, lacking = [], []
    for kind in KINDS:
        drawn = kind.charts(scenarios, traces)
        if drawn:
            found.append(Section(kind.title, kind.explanation, drawn))
        else:
            lacking.append((kind.lacking, kind.command))
    return found, lacking + _further(scenarios)


def _further(scenarios: list[Scenario]) -> list[tuple[str, str]]:
    rows = [row for one in scenarios for row in one.rows]
    lacking = []
    if not any(not one.random for one in scenarios):
        lacking.append(("what happens to answers, with trained weights", f"{BENCH} --model minilm-pooled,smollm2"))
    if not any(row.generates for row in rows):
        lacking.append(("text generation", f"{BENCH} --model smollm2 --workload generate,chat"))
    if not any(str(row.weights_held).startswith("packed-") for row in rows):
        lacking.append(("weights in other formats", f"{BENCH} --weights as-loaded,packed-fp16,packed-bf16,packed-int8"))
    if not scenarios or any(one.written for one in scenarios):
        lacking.append(("real data in place of written samples", f"{BENCH} --download"))
    lacking.append(("ONNX Runtime and transformers beside this library", "tools/run.sh peers"))
    return lacking


def _rows(scenarios: list[Scenario]) -> list[Row]:
    return [row for one in scenarios for row in one.rows]


def _more(shown: int, most: int) -> list[str]:
    return [f"In the table only: {shown - most} more."] if shown > most else []


def _of_sweeps(
    name: str,
    find: Callable[[list[Scenario]], list[Sweep]],
    draw: Callable[[Sweep, str], str],
    shown: Callable[[Sweep], Table],
    notes: Callable[[Sweep], list[str]] = lambda _: [],
) -> Callable[[list[Scenario], list[dict[str, Any]]], list[Chart]]:
    """A chart for each sweep; `name` is the beginning of the charts' names, which ids in the page begin with."""

    def drawn(scenarios: list[Scenario], _: list[dict[str, Any]]) -> list[Chart]:
        return [
            Chart(
                sweep.title,
                draw(sweep, f"{name}{number}"),
                shown(sweep),
                sweep.random,
                notes(sweep) + _more(len(sweep.lines), charts.MOST_LINES),
            )
            for number, sweep in enumerate(find(scenarios))
        ]

    return drawn


def _by_layer(name: str, field: str, shares: str, title: str, tells: Callable[[list[float]], bool]) -> Any:
    def rates(sweep: Sweep) -> charts.Rates:
        return [(label, dict(enumerate(row.record[field]))) for label, row in sweep.rows]

    def draw(sweep: Sweep, chart: str) -> str:
        shown = rates(sweep)[: charts.MOST_LINES]
        return charts.rates_chart(chart, f"{title}, {sweep.title}", shown, "layer", shares=shares)

    return _of_sweeps(
        name,
        lambda scenarios: by_layer(scenarios, field, tells),
        draw,
        lambda sweep: rates_table(rates(sweep), "run"),
    )


def _capacity_chart(sweep: Sweep, name: str) -> str:
    lines = charts.evenly(sweep.lines, charts.MOST_LINES)
    rates = [(label, {row.capacity_bytes / 2**20: row.hit_rate for row in rows}) for label, rows in lines]
    title, axis = f"Hit rate over capacity, {sweep.title}", "cache capacity (MiB, log scale)"
    return charts.rates_chart(
        name, title, rates, axis, size_text=lambda size: f"{size:g}" if size < 1 else plain_number(round(size))
    )


TAU = Column("τ", lambda row: text(f"{row.threshold:g}"))
EPSILON = Column("ε", lambda row: text(percent(row.budget_epsilon)))
CAPACITY = Column("MiB", lambda row: text(mebibytes(row.capacity_bytes)))
PROMISED = Column("promised", lambda row: text(percent(row.promised_error)))
OBSERVED = Column("observed", lambda row: text(row.observed_text))


def _growth(sweep: Sweep) -> list[str]:
    texts = ((label, growth_text(rows)) for label, rows in sweep.lines)
    several = len(sweep.lines) > 1
    return [f"{label + ': ' if several else ''}{growth}." for label, growth in texts if growth]


def _error_charts(scenarios: list[Scenario], _: list[dict[str, Any]]) -> list[Chart]:
    pairs = with_errors(scenarios)
    if not pairs:
        return []
    shown = runs_table([(f"{one.name} ({row.label})", row) for one, row in pairs], EPSILON, PROMISED, OBSERVED)
    notes = _more(len(pairs), charts.MOST_ERRORS)
    return [Chart("all runs within a budget", charts.error_chart(pairs, "errors"), shown, notes=notes)]


def _eviction_charts(_: list[Scenario], traces: list[dict[str, Any]]) -> list[Chart]:
    return [_eviction_chart(trace, f"eviction{number}") for number, trace in enumerate(traces) if lines_of(trace)]


def _eviction_chart(trace: dict[str, Any], name: str) -> Chart:
    rates = list(lines_of(trace).items())
    requests, blocks = (plain_number(trace.get(what)) for what in ("requests", "blocks"))
    svg = charts.rates_chart(
        name,
        "Hit rate of eviction policies over capacity",
        rates,
        "capacity (blocks, log scale)",
        size_text=lambda size: plain_number(round(size)),
        bound=trace.get("unbounded_hit_rate"),
        height=3.0,
    )
    title = f"{Path(str(trace['trace'])).name}: {requests} requests, {blocks} blocks"
    return Chart(title, svg, rates_table(rates, "policy"), notes=best_policies(trace))


KINDS = (
    Kind(
        "Speed and answers over the similarity threshold",
        "Above: how many times as fast. Below: what happened to the answers, the shaded area around a line is the "
        "95\u2009% interval. The yellow band is the range of thresholds that the LLMCache paper chooses; it does not "
        "centre its states, and centred ones are as similar at a much lower threshold. With random weights there are "
        "no answers to judge; the divergence of the output is shown instead.",
        "speed and answers over the similarity threshold",
        f"{BENCH} --model minilm-pooled --fidelity threshold --threshold 0.80,0.85,0.90,0.95 --fingerprint raw "
        "--centre off",
        _of_sweeps(
            "tau",
            lambda scenarios: sweeps(_rows(scenarios), "threshold"),
            charts.tau_chart,
            lambda sweep: runs_table(sweep.rows, TAU),
        ),
    ),
    Kind(
        "Promised and observed error",
        "Of runs under an error budget ε. The marks are the error that came on requests which calibration never saw, "
        "with its 95\u2009% interval, the ticks the upper bound that calibration promised. A run keeps its budget if "
        "its mark lies left of the dashed line.",
        "reuse within an error budget, promised and observed",
        f"{BENCH} --model minilm-pooled --fidelity budget --epsilon 0.01,0.02",
        _error_charts,
    ),
    Kind(
        "Speed and answers over the error budget",
        "Above: how many times as fast. Below: what happened to the answers, the shaded area around a line is the "
        "95\u2009% interval.",
        "speed and answers over the error budget",
        f"{BENCH} --model minilm-pooled --fidelity budget --epsilon 0.005,0.01,0.02,0.05",
        _of_sweeps(
            "epsilon",
            lambda scenarios: budget_sweeps(_rows(scenarios)),
            charts.epsilon_chart,
            lambda sweep: runs_table(sweep.rows, EPSILON),
        ),
    ),
    Kind(
        "Early exits by layer",
        "Share of the sequences that were answered from the state in front of this layer, so that it and all layers "
        "above were skipped. Layer 0 is the first: an exit there costs no layer.",
        "early exits by layer",
        f"{BENCH} --model minilm-pooled --fidelity budget --epsilon 0.02 --early-exit neighbour",
        _by_layer("exits", "exits_by_layer", "answered there (%)", "Early exits by layer", any),
    ),
    Kind(
        "Hit rate by layer",
        "Share of the sequences that went on from the kept output of this layer, so that all layers up to it were "
        "skipped. Layers are numbered from 0.",
        "hit rate by layer",
        f"{BENCH} --model minilm --fidelity threshold --threshold 0.85 --fingerprint raw --centre off "
        "--cache-layers all",
        _by_layer(
            "layers",
            "hit_rate_by_layer",
            "hit rate (%)",
            "Hit rate by layer",
            lambda rates: sum(rate > 0 for rate in rates) > 1,
        ),
    ),
    Kind(
        "Hit rate over the size of the cache",
        "The LLMCache paper claims logarithmic growth. On this axis that would be a straight line.",
        "hit rate over the size of the cache",
        f"{BENCH} --model minilm --fidelity threshold --threshold 0.85 --capacity-mib 4,16,64,256",
        _of_sweeps(
            "capacity",
            lambda scenarios: sweeps(_rows(scenarios), "capacity_bytes"),
            _capacity_chart,
            lambda sweep: runs_table(sweep.rows, CAPACITY),
            _growth,
        ),
    ),
    Kind(
        "Eviction policies",
        "A trace of requests without a model. The optimum knows the future (Belady 1966): no policy can be above it.",
        "eviction policies on a trace of requests",
        "build/bin/llmcache-trace --json build/trace.json --trace FILE.jsonl",
        _eviction_charts,
    ),
)
