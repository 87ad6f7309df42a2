#!/usr/bin/env python3
"""Turns benchmark results into one HTML file that needs nothing beside it.

Each RESULTS.json is what llmcache-bench --json or llmcache-trace --json wrote. Give several to see them
together: records of one model and workload that differ in threshold or in capacity become a line of a chart.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report_budget as budget
import report_charts as charts
from atomic_files import write_atomically
from report_drawing import MOST_LINES
from report_numbers import error_number, interval, measured, mebibytes, percent, plain_number
from report_records import (
    ReportError,
    Row,
    Sweep,
    by_layer,
    group,
    headline,
    read_document,
    rows_of,
    sweeps,
)

BENCH = "build/bin/llmcache-bench --models build/models --data build/data"


@dataclass
class Chart:
    title: str
    svg: str
    random: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class Section:
    """Charts of one kind, or what to run to get them."""

    title: str
    explanation: str
    charts: list[Chart]
    missing: str
    command: str


def _titled(sweep: Sweep, svg: str, notes: list[str] | None = None) -> Chart:
    hidden = len(sweep.lines) - MOST_LINES
    more = [f"{hidden} more of these runs are in the tables only."] if hidden > 0 else []
    return Chart(f"{sweep.model}, {sweep.workload}", svg, sweep.random, (notes or []) + more)


def _growth_notes(sweep: Sweep) -> list[str]:
    texts = ((label, charts.growth_text(lines)) for label, lines in sweep.lines)
    return [f"{label}: {text}." for label, text in texts if text]


def sections(rows: list[Row], traces: list[dict[str, Any]]) -> list[Section]:
    return [
        Section(
            "Speed and answers over the similarity threshold",
            "Above: how many times as fast. Below: what happened to the answers, the shaded area around a line is the "
            "95\u2009% interval. The yellow band is the range of thresholds that the LLMCache paper chooses; it does "
            "not centre its states, and centred ones are as similar at a much lower threshold. With random weights "
            "there are no answers to judge; the divergence of the output is shown instead.",
            [
                _titled(sweep, charts.tau_chart(sweep, f"tau{number}"))
                for number, sweep in enumerate(sweeps(rows, "threshold"))
            ],
            "Not shown: no model and workload was run with several thresholds.",
            f"{BENCH} --fidelity threshold --threshold 0.80,0.85,0.90,0.95,0.99 --json tau.json",
        ),
        Section(
            "Promised and observed error",
            "Of runs under an error budget ε. The horizontal ticks are the upper bounds that calibration promised, the "
            "markers the error that came on requests which calibration never saw, with its 95\u2009% interval. A run "
            "keeps its budget if its marker lies below the dashed line.",
            [
                _titled(sweep, budget.error_chart(sweep, f"errors{number}"))
                for number, sweep in enumerate(budget.error_sweeps(rows))
            ],
            "Not shown: no record has a promised or an observed error.",
            f"{BENCH} --fidelity budget --epsilon 0.005,0.01,0.02,0.05 --json budget.json",
        ),
        Section(
            "Speed and answers over the error budget",
            "Above: how many times as fast. Below: what happened to the answers, the shaded area around a line is the "
            "95\u2009% interval.",
            [
                _titled(sweep, budget.epsilon_chart(sweep, f"epsilon{number}"))
                for number, sweep in enumerate(budget.budget_sweeps(rows))
            ],
            "Not shown: no model and workload was run with several error budgets.",
            f"{BENCH} --fidelity budget --epsilon 0.005,0.01,0.02,0.05 --json budget.json",
        ),
        Section(
            "Early exits by layer",
            "Share of the sequences that were answered from the state in front of this layer, so that it and all "
            "layers above were skipped. Layer 0 is the first: an exit there costs no layer.",
            [
                _titled(sweep, budget.exits_chart(sweep, f"exits{number}"))
                for number, sweep in enumerate(by_layer(rows, "exits_by_layer"))
            ],
            "Not shown: no record has early exits.",
            f"{BENCH} --model minilm-pooled --fidelity budget --epsilon 0.01 --json exits.json",
        ),
        Section(
            "Hit rate by layer",
            "Share of the sequences that went on from the kept output of this layer, so that all layers up to it were "
            "skipped. Layers are numbered from 0.",
            [
                _titled(sweep, charts.layer_chart(sweep, f"layers{number}"))
                for number, sweep in enumerate(by_layer(rows, "hit_rate_by_layer"))
            ],
            "Not shown: no record has a hit rate for each layer.",
            f"{BENCH} --fidelity threshold --threshold 0.85 --cache-layers all --json layers.json",
        ),
        Section(
            "Hit rate over the size of the cache",
            "The LLMCache paper claims logarithmic growth. On this axis that would be a straight line.",
            [
                _titled(sweep, charts.capacity_chart(sweep, f"capacity{number}"), _growth_notes(sweep))
                for number, sweep in enumerate(sweeps(rows, "capacity_bytes"))
            ],
            "Not shown: no model and workload was run with several capacities.",
            f"{BENCH} --fidelity threshold --threshold 0.85 --capacity-mib 4,16,64,256 --json capacity.json",
        ),
        Section(
            "Eviction policies",
            "Request traces without a model. The optimum knows the future (Belady 1966): no policy can be above it.",
            [
                Chart(
                    f"{Path(str(trace['trace'])).name}: {plain_number(trace.get('requests'))} requests, "
                    f"{plain_number(trace.get('blocks'))} blocks",
                    svg,
                    notes=charts.eviction_text(trace),
                )
                for number, trace in enumerate(traces)
                if (svg := charts.eviction_chart(trace, f"eviction{number}"))
            ],
            "Not shown: no results of llmcache-trace were given.",
            "build/bin/llmcache-trace --json trace.json",
        ),
    ]


def versions(documents: list[dict[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for document in documents:
        for record in document["records"]:
            for name, value in (record.get("versions") or {}).items():
                if value is not None:
                    found[f"{name} {value}"] = None
    return list(found)


def rate(found: dict[str, Any] | None) -> str:
    """A rate with its 95 % interval, or an empty text."""
    found = found or {}
    if not measured(found.get("rate")):
        return ""
    bounds = interval(found.get("ci95"))
    return percent(found["rate"]) + (f" ({percent(bounds[0])} to {percent(bounds[1])})" if bounds else "")


def render(documents: list[dict[str, Any]]) -> str:
    import jinja2

    results = [document for document in documents if "trace" not in document]
    traces = [document for document in documents if "trace" in document]
    rows = rows_of(results)
    models, chosen, colours = group(rows), headline(rows), charts.colours_of(rows)
    for number, model in enumerate(models):
        model.latency_chart = charts.latency_chart(model, chosen, f"latency{number}", colours)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=plain_number, error=error_number, percent=percent, mib=mebibytes, rate=rate)
    return environment.get_template("report_template.html").render(
        models=models,
        chosen=chosen,
        swept=len(chosen) < sum(not row.plain for row in rows),
        documents=results,
        traces=traces,
        versions=versions(results),
        speedup_chart=charts.speedup_chart(models, chosen, colours),
        kvcache_chart=charts.kvcache_chart(models, chosen, colours),
        sections=sections(rows, traces),
        any_random=any(model.random for model in models),
        any_fill=any(measured(row.fill_available) and row.fill_available for row in rows),
        any_kvcache=any(row.against_kvcache for row in chosen),
        any_prefill=any(row.prefill_ms for row in rows),
        any_decode=any(row.decode_ms for row in rows),
        any_greedy=any(row.greedy_text for row in rows),
        any_budget=any(measured(row.budget_epsilon) for row in rows),
        any_recall=any(measured(row.recall) or measured((row.task or {}).get("recall")) for row in rows),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    options = parser.parse_args(arguments)
    try:
        page = render([read_document(path) for path in options.results])
        write_atomically(options.output, lambda path: path.write_text(page, encoding="utf-8"))
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
