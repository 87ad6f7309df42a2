#!/usr/bin/env python3
"""Says in at most a dozen lines what a benchmark run found, then where the report is and what to do next.

RESULTS.json is what llmcache-bench --json wrote; results of llmcache-trace --json can be given too.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.report.records import ReportError, read_documents, rows_of
from tools.report.scenarios import Scenario, scenarios_of
from tools.report.summary_lines import summary_lines

WIDEST = 120
STEPS = 3  # commands to go on with
PROMPT = "data/sample/passage.txt"
THRESHOLDS = "tools/run.sh bench --model minilm-pooled --fidelity threshold --threshold 0.80,0.85,0.90,0.95"
QUESTIONS = ("How long does the crossing take?", "When is the honey market?")


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


def next_steps(scenarios: list[Scenario], build: Path) -> list[str]:
    """Three commands, to be run in the repository; those come first that show what these results lack."""
    rows = [row for scenario in scenarios for row in scenario.rows]
    trained = {scenario.model for scenario in scenarios if not scenario.random} if scenarios else {"smollm2"}
    written = any(scenario.written for scenario in scenarios)
    budget = _budget(scenarios)
    steps = [
        f"tools/run.sh bench --model {budget[0]} --workload {budget[1]} --fidelity budget" if budget else "",
        "tools/run.sh data" if written or not scenarios else "",
        _generate(build, next((model for model in ("smollm2", "gpt2") if model in trained), "")),
        "" if any(len(one.paper_rows) > 2 for one in scenarios) else THRESHOLDS,
        "" if any(row.weights_held == "packed-fp16" for row in rows) else "tools/run.sh bench --weights packed-fp16",
        "tools/run.sh peers",
        "tools/run.sh bench --help",
    ]
    return [step for step in steps if step][:STEPS]


def _budget(scenarios: list[Scenario]) -> tuple[str, str] | None:
    """A model and a workload on which budgets can be calibrated: where it was done, or the usual one."""
    trained = [one for one in scenarios if not one.random]
    for scenario in trained:
        if scenario.budget:
            return scenario.model, scenario.workload
    if scenarios and not any(one.model == "minilm-pooled" for one in scenarios):
        return None
    real = any(not one.written and one.workload == "banking77" for one in scenarios)
    return "minilm-pooled", "banking77" if real else "sample-faq"


def _generate(build: Path, model: str) -> str:
    """Asking a model about a passage; the program is built first where it is not there yet."""
    if not model:
        return ""
    folder = Path(os.path.relpath(build.resolve(), ROOT)) if build.resolve().is_relative_to(ROOT) else build
    program = build / "bin" / "llmcache-generate"
    command = [str(folder / "bin" / program.name), "--model", str(folder / "models" / f"{model}.pt"), "--threads", "1"]
    command += [*(["--chat"] if model == "smollm2" else []), "--prompt-file", PROMPT]
    command += [part for question in QUESTIONS for part in ("--question", question)]
    first = (
        "" if program.exists() else f"cmake --build {shlex.quote(str(folder / 'cmake'))} --target {program.name} && "
    )
    return first + shlex.join(command)


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
