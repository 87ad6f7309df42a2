#!/usr/bin/env python3
"""Says in at most a dozen lines what a benchmark run found, then where the report is and what to do next.

RESULTS.json is what llmcache-bench --json wrote; results of llmcache-trace --json can be given too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.report.next_steps import next_steps
from tools.report.records import ReportError, read_documents, rows_of
from tools.report.scenarios import Scenario, scenarios_of
from tools.report.summary_lines import summary_lines

WIDEST = 120


def text_of(
    scenarios: list[Scenario], traces: list[dict[str, Any]], report: Path | None, width: int | None = None
) -> str:
    """The whole text; lines are broken where a width is given."""
    found = [str(line) for line in summary_lines(scenarios, traces)] or ["nothing was measured"]
    if width:
        found = [
            textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
            for line in found
        ]
    parts = ["\n".join(found)]
    if report is not None:
        parts.append(f"report: {report}")
        parts.append("to go on:\n" + "\n".join(f"  {command}" for command in next_steps(scenarios, report.parent)))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="the report that was written from them")
    options = parser.parse_args(arguments)
    try:
        results, traces = read_documents(options.results)
    except ReportError as error:
        print(f"summary: {error}", file=sys.stderr)
        return 1
    width = min(shutil.get_terminal_size().columns, WIDEST) if sys.stdout.isatty() else None
    print(text_of(scenarios_of(rows_of(results)), traces, options.report, width), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
