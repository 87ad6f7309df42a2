#!/usr/bin/env python3
"""Turns benchmark results into one HTML file that needs nothing beside it.

Each RESULTS.json is what llmcache-bench --json or llmcache-trace --json wrote. Give several to see them
together: records of one model and workload that differ in threshold or in capacity become a line of a chart.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.atomic_files import write_atomically
from tools.report.all_figures import all_figures
from tools.report.charts import map_chart
from tools.report.formatting import error_number, plain_number
from tools.report.paper import paper_block
from tools.report.records import ReportError, read_documents, rows_of
from tools.report.run_tables import glance, marks_table
from tools.report.scenarios import Scenario, by_model, scenarios_of
from tools.report.sections import sections
from tools.report.speed_map import legend, marks
from tools.report.summary_lines import summary_lines

FOLDER = Path(__file__).resolve().parent


def versions(documents: list[dict[str, Any]]) -> list[str]:
    each = (record.get("versions") or {} for document in documents for record in document["records"])
    return list(dict.fromkeys(f"{name} {value}" for one in each for name, value in one.items() if value is not None))


def _model(scenarios: list[Scenario]) -> dict[str, Any]:
    return {
        "name": scenarios[0].model,
        "weights": scenarios[0].rows[0].weights,
        "random": scenarios[0].random,
        "table": all_figures(scenarios),
        "differing": [row for one in scenarios for row in one.rows if row.greedy_differences],
    }


def render(results: list[dict[str, Any]], traces: list[dict[str, Any]]) -> str:
    import jinja2
    import markupsafe

    def emphasised(text: str) -> markupsafe.Markup:
        """The first ratio of a line stands out."""
        escaped = str(markupsafe.escape(text))
        return markupsafe.Markup(re.sub(r"\b(\d[\d.]*x(?: to \d[\d.]*x)?)", r"<b>\1</b>", escaped, count=1))

    scenarios = scenarios_of(rows_of(results))
    lines = summary_lines(scenarios, traces)
    drawn = marks(scenarios, lines)
    paper = paper_block(scenarios)
    detailed, lacking = sections(scenarios, traces)
    models = [_model(several) for several in by_model(scenarios)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=plain_number, error=error_number, emphasised=emphasised)
    return environment.get_template("page.html").render(
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        lines=lines,
        maps=[("wide", map_chart(drawn, wide=True)), ("narrow", map_chart(drawn, wide=False))] if drawn else [],
        legend=legend(drawn),
        map_table=marks_table(drawn) if drawn else None,
        any_hollow=any(mark.row.random for mark in drawn),
        paper=paper,
        glance=glance(lines, scenarios, paper.scenarios if paper else []),
        sections=detailed,
        models=models,
        meanings=list(dict.fromkeys(meaning for model in models for meaning in model["table"].meanings)),
        lacking=lacking,
        any_random=any(one.random for one in scenarios),
        documents=[document for document in results if document.get("machine") or document.get("command")],
        versions=versions(results),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    options = parser.parse_args(arguments)
    try:
        page = render(*read_documents(options.results))
        write_atomically(options.output, lambda path: path.write_text(page, encoding="utf-8"))
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
