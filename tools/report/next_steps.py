"""Commands that a reader of the first results can go on with."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from tools.report.scenarios import Scenario

ROOT = Path(__file__).resolve().parents[2]
COUNT = 3
PROMPT = "data/sample/passage.txt"
THRESHOLDS = "tools/run.sh bench --model minilm-pooled --fidelity threshold --threshold 0.80,0.85,0.90,0.95"
QUESTIONS = ("How long does the crossing take?", "When is the honey market?")


def next_steps(scenarios: list[Scenario], build: Path) -> list[str]:
    """Three commands, to be run in the repository; those come first that show what these results lack."""
    rows = [row for scenario in scenarios for row in scenario.rows]
    trained = {scenario.model for scenario in scenarios if not scenario.random} if scenarios else {"smollm2"}
    written = any(scenario.traffic.written for scenario in scenarios)
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
    return [step for step in steps if step][:COUNT]


def _budget(scenarios: list[Scenario]) -> tuple[str, str] | None:
    """A model and a workload on which budgets can be calibrated: where it was done, or the usual one."""
    trained = [one for one in scenarios if not one.random]
    for scenario in trained:
        if scenario.budget:
            return scenario.model, scenario.rows[0].workload
    if scenarios and not any(one.model == "minilm-pooled" for one in scenarios):
        return None
    real = any(not one.traffic.written and one.rows[0].workload == "banking77" for one in scenarios)
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
