#!/usr/bin/env python3
"""Puts what the steps of gpu_check.sh left in FOLDER into FOLDER/figures.json, and says it in a few lines.

The exit status is 1 if a step failed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.atomic_files import write_atomically

TIMED_OUT = 124


def steps_of(folder: Path) -> list[dict[str, Any]]:
    steps = []
    for line in (folder / "steps").read_text(encoding="utf-8").splitlines():
        name, status, seconds = line.split()
        became = {0: "done", TIMED_OUT: "out of time"}.get(int(status), f"failed with status {status}")
        steps.append({"step": name, "became": became, "seconds": int(seconds)})
    return steps


def json_of(path: Path) -> Any:
    """What a step wrote; None if that is no JSON, because it failed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def tests_of(folder: Path) -> dict[str, Any] | None:
    """How many tests were run, and which failed."""
    result = json_of(folder / "tests.json")
    if result is None:
        return None
    failed = [
        f"{suite['name']}.{test['name']}"
        for suite in result["testsuites"]
        for test in suite["testsuite"]
        if test.get("failures")
    ]
    return {"run": result["tests"] - result.get("disabled", 0), "failed": failed}


def figures_of(folder: Path, device: str) -> dict[str, Any]:
    steps = steps_of(folder)
    versions = folder / "versions.log"
    return {
        "device": device,
        "versions": versions.read_text(encoding="utf-8").splitlines() if versions.exists() else [],
        "steps": steps,
        "differential": tests_of(folder),
        "models": [
            found
            for step in steps
            if step["step"].startswith("bench-") and (found := json_of(folder / f"{step['step']}.log")) is not None
        ],
        "transformers": json_of(folder / "transformers.log"),
    }


def lines_of(figures: dict[str, Any]) -> list[str]:
    lines = []
    if tests := figures["differential"]:
        lines.append(f"differential tests: {tests['run']} run, {len(tests['failed'])} failed")
    for model in figures["models"]:
        for name, measure in model["measures"].items():
            what = measure.get("error") or (
                f"{measure['cache_ms']:.3f} ms, plain {measure['plain_ms']:.3f} ms, "
                f"{measure['plain_by_cache']:.2f} times as fast, difference {measure['difference']:.1e}"
            )
            lines.append(f"{model['model']} {name}: {what}")
    for name, caches in (figures["transformers"] or {}).items():
        if name.startswith("decode_at_"):
            told = (
                f"{cache} {found['ms']:.3f} ms" if "ms" in found else f"{cache} {found['error']}"
                for cache, found in caches.items()
            )
            lines.append(f"transformers {name}: {', '.join(told)}")
    return lines + [f"{step['step']}: {step['became']}" for step in figures["steps"] if step["became"] != "done"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args(arguments)
    figures = figures_of(chosen.folder, chosen.device)
    text = json.dumps(figures, indent=2) + "\n"
    write_atomically(chosen.folder / "figures.json", lambda part: part.write_text(text, encoding="utf-8"))
    print("\n".join([*lines_of(figures), f"figures: {chosen.folder / 'figures.json'}"]))
    return 0 if all(step["became"] == "done" for step in figures["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
