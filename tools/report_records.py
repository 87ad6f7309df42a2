"""What the report and the summary read: benchmark records and trace results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_numbers import Quality, interval, measured, percent, plain_number, quality

SCHEMA = 1
REQUIRED = ("model", "weights", "workload", "mode", "threads", "requests", "tokens", "latency_ms")
OBJECTS = (
    "latency_ms",
    "divergence",
    "task",
    "task_per_byte",
    "unsafe_served",
    "same_answer",
    "versions",
    "prefill_ms",
    "decode_ms",
    "later_turns",
    "greedy",
    "observed_error",
    "share_reused",
)
LISTS = ("hit_rate_by_layer", "exits_by_layer")
PLAIN = "nocache"
# What makes two records of one model and workload different runs, and how it is written.
SETTINGS = (
    "weights_held",
    "output",
    "threshold",
    "fingerprint",
    "fingerprint_layer",
    "centring",
    "budget_metric",
    "budget_epsilon",
    "budget_delta",
    "cache_free",
    "cache_layers",
    "eviction",
    "ttl_seconds",
    "shadow_rate",
    "capacity_bytes",
    "threads",
    "zipf",
    "shuffle",
)


ALWAYS_SHOWN = ("weights_held", "threshold", "fingerprint", "centring", "budget_metric", "budget_epsilon", "cache_free")
CENTRING = {"off": "not centred", "running": "centred", "fitted": "centred (fitted)"}


class ReportError(RuntimeError):
    """The results cannot be shown; the text says what is wrong and what to do."""


def setting_text(name: str, value: Any) -> str:
    if name == "threshold":
        return f"τ\u00a0{value:g}" if measured(value) else f"τ\u00a0{value}"
    if name == "capacity_bytes":
        return f"{value / 2**20:g} MiB" if measured(value) else f"{value} MiB"
    if name == "weights_held":
        return "" if value == "as-loaded" else str(value)
    if name == "fingerprint":
        return str(value)
    if name in ("budget_epsilon", "budget_delta"):
        return f"{'ε' if name == 'budget_epsilon' else 'δ'}\u00a0{value:g}" if measured(value) else f"{name} {value}"
    if name == "budget_metric":
        return f"{value} error"
    if name == "cache_free":
        return "no neighbours" if value is True else ""
    if name == "centring":
        return CENTRING.get(str(value), f"centring {value}")
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return f"{name.removesuffix('_seconds').replace('_', ' ')} {value}"


@dataclass(eq=False)
class Row:
    """One record, ready to be shown."""

    record: dict[str, Any]
    label: str = ""  # what distinguishes it from the other records
    document: int = 0  # which of the files it is from
    error_metric: str = ""  # what its observed error counts: its budget's metric, or that of a budget beside it

    @property
    def plain(self) -> bool:
        return self.record["mode"] == PLAIN

    @property
    def random(self) -> bool:
        return str(self.record["weights"]).startswith("random")

    @property
    def kind(self) -> str:
        if self.plain:
            return "no cache"
        return self.record.get("fidelity") or self.record["mode"] if self.record["mode"] == "llmcache" else self.mode

    @property
    def quality(self) -> Quality | None:
        return quality(self.record.get("task"))

    @property
    def per_byte(self) -> Quality | None:
        """Of choices: the same by likelihoods a byte."""
        return quality(self.record.get("task_per_byte"))

    def key(self, *without: str) -> tuple[str, ...]:
        """Equal for records that differ in nothing but the named settings."""
        names = (
            "model",
            "weights",
            "workload",
            "mode",
            "fidelity",
            *(name for name in SETTINGS if name not in without),
        )
        return tuple(json.dumps(self.record.get(name), sort_keys=True) for name in names)

    def name(self, *parts: str) -> str:
        """Kind and the given settings, as far as the record has them."""
        texts = [setting_text(part, self.record[part]) for part in parts if self.record.get(part) is not None]
        return ", ".join([self.kind, *filter(None, texts)])

    @property
    def exact(self) -> bool:
        """Whether it promises what the model computes."""
        return self.kind in ("lossless", "identical")

    @property
    def similar(self) -> bool:
        """Whether answers of similar requests are taken for its own, without a promise."""
        return self.kind in ("threshold", "doccache")

    @property
    def generates(self) -> bool:
        return measured((self.decode_ms or {}).get("mean"))

    @property
    def decodes(self) -> bool:
        """Whether the model is a decoder that reuses prefixes."""
        return measured((self.prefill_ms or {}).get("mean")) or measured(self.prefill_speedup_vs_kvcache)

    @property
    def note_text(self) -> str:
        return self.note.strip() if isinstance(self.note, str) else ""

    @property
    def observed_text(self) -> str:
        """The error rate against nocache with its interval; empty where it was not observed."""
        found = self.observed_error or {}
        if not measured(found.get("value")):
            return ""
        bounds = interval([found.get("low"), found.get("high")])
        return percent(found["value"]) + (f" ({percent(bounds[0])} to {percent(bounds[1])})" if bounds else "")

    @property
    def reused_texts(self) -> list[str]:
        """In which ways sequences were answered under a budget, with their shares."""
        shares = self.share_reused or {}
        return [
            f"{name.replace('_', ' ')} {percent(share)}"
            for name, share in shares.items()
            if measured(share) and share > 0
        ]

    @property
    def greedy_text(self) -> str:
        """Tokens that come out on top as without a cache, of those compared; empty where none were."""
        found = self.greedy or {}
        compared, different, tied = (found.get(name) for name in ("compared", "different", "tied"))
        if not measured(compared) or not measured(different) or compared == 0:
            return ""
        text = f"{plain_number(compared - different)} of {plain_number(compared)}"
        return f"{text} ({tied} tied)" if measured(tied) and tied else text

    @property
    def greedy_differences(self) -> list[dict[str, Any]]:
        """The tokens that do not, where weights are as loaded."""
        listed = (self.greedy or {}).get("differences")
        if self.weights_held not in (None, "as-loaded") or not isinstance(listed, list):
            return []
        return [difference for difference in listed if isinstance(difference, dict)]

    def __getattr__(self, name: str) -> Any:
        if name == "record":
            raise AttributeError(name)
        return self.record.get(name)


def read_document(path: Path) -> dict[str, Any]:
    """Benchmark results, or the results of llmcache-trace (which have `trace` and `results`)."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}; run the benchmark first") from error
    except ValueError as error:
        raise ReportError(f"{path}: not valid JSON ({error}); run the benchmark again") from error
    if isinstance(document, dict) and "trace" in document:
        _check_trace(path, document)
        return document
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise ReportError(f"{path}: schema {found!r}, this report reads schema {SCHEMA}; run the benchmark again")
    records = document.get("records")
    if not isinstance(records, list):
        raise ReportError(f"{path}: 'records' is not a list; run the benchmark again")
    for number, record in enumerate(records):
        missing = [name for name in REQUIRED if not isinstance(record, dict) or record.get(name) is None]
        if missing:
            raise ReportError(f"{path}: record {number} has no {', '.join(missing)}; run the benchmark again")
        wrong = [name for name in OBJECTS if not isinstance(record.get(name), dict | None)]
        if wrong:
            raise ReportError(f"{path}: record {number}: {', '.join(wrong)} is not an object; run the benchmark again")
        wrong = [name for name in LISTS if not isinstance(record.get(name), list | None)]
        if wrong:
            raise ReportError(f"{path}: record {number}: {', '.join(wrong)} is not a list; run the benchmark again")
    return document


def _check_trace(path: Path, document: dict[str, Any]) -> None:
    results = document.get("results")
    if not isinstance(results, list):
        raise ReportError(f"{path}: 'results' is not a list; run llmcache-trace again")
    for number, result in enumerate(results):
        whole = isinstance(result, dict) and isinstance(result.get("policy"), str) and measured(result.get("capacity"))
        if not whole or result["capacity"] <= 0:
            raise ReportError(
                f"{path}: result {number} has no policy or no positive capacity; run llmcache-trace again"
            )


def rows_of(documents: list[dict[str, Any]]) -> list[Row]:
    """All records, each named by its kind, threshold, fingerprint and what else differs within model and workload."""
    rows = [
        Row(record, document=number)
        for number, document in enumerate(documents)
        for record in document.get("records", [])
    ]
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        together.setdefault((row.model, row.weights, row.workload, row.kind), []).append(row)
    for alike in together.values():
        for row in alike:
            row.label = row.name(*telling_settings(alike))
    return rows


def telling_settings(rows: list[Row], without: str = "") -> list[str]:
    """The settings that name each of the rows: the main ones, and those in which the rows differ."""
    return [
        name
        for name in SETTINGS
        if name != without
        and (name in ALWAYS_SHOWN or len({json.dumps(row.record.get(name), sort_keys=True) for row in rows}) > 1)
    ]
