"""Results of llmcache-trace: eviction policies on a trace of requests, without a model."""

from __future__ import annotations

from typing import Any

from tools.report.formatting import THIN, measured, percent, plain_number

OPTIMUM = "belady"


def lines_of(document: dict[str, Any]) -> dict[str, dict[float, float]]:
    """Policy -> capacity -> hit rate, by rising capacity, the optimum last."""
    lines: dict[str, dict[float, float]] = {}
    for result in document["results"]:
        if measured(result.get("hit_rate")):
            lines.setdefault(result["policy"], {})[result["capacity"]] = result["hit_rate"]
    return {
        policy: dict(sorted(lines[policy].items())) for policy in sorted(lines, key=lambda policy: policy == OPTIMUM)
    }


def best_policies(document: dict[str, Any]) -> list[str]:
    """For each capacity, the best policy that does not know the future, beside LRU."""
    lines = lines_of(document)
    texts = []
    for capacity in sorted({capacity for points in lines.values() for capacity in points}):
        rates = {policy: points[capacity] for policy, points in lines.items() if capacity in points}
        real = {policy: rate for policy, rate in rates.items() if policy != OPTIMUM}
        if len(real) < 2:
            continue
        best = max(real, key=lambda policy: real[policy])
        text = f"{plain_number(int(capacity))} blocks: {best} {percent(real[best])}"
        if "lru" in real and best != "lru":
            text += f", {100 * (real[best] - real['lru']):+.1f}{THIN}points against lru"
        if OPTIMUM in rates:
            text += f", optimum {percent(rates[OPTIMUM])}"
        texts.append(text)
    return texts
