"""What the report reads: benchmark records and trace results, and how records belong together."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report_numbers import Quality, interval, measured, mebibytes, percent, plain_number, quality

SCHEMA = 1
REQUIRED = ("model", "weights", "workload", "mode", "threads", "requests", "tokens", "latency_ms")
OBJECTS = (
    "latency_ms",
    "divergence",
    "task",
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
PAPER_BAND = (0.82, 0.88)  # similarity thresholds that the LLMCache paper calls best
USUAL_EPSILON = 0.01  # the error budget that stands for the others where one must
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
        return f"{mebibytes(value)} MiB"
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
    def against_kvcache(self) -> tuple[float, str] | None:
        """How many times as fast the prefill is as kvcache's, and of what: later turns, where there are some."""
        later = self.later_turns or {}
        if measured(later.get("speedup_vs_kvcache")):
            return later["speedup_vs_kvcache"], "later turns"
        found = self.prefill_speedup_vs_kvcache
        return (found, "prefill") if measured(found) else None

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


@dataclass
class Model:
    name: str
    weights: str
    rows: list[Row] = field(default_factory=list)
    latency_chart: str = ""

    @property
    def random(self) -> bool:
        return self.weights.startswith("random")


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
    rows = [Row(record) for document in documents for record in document.get("records", [])]
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        together.setdefault((row.model, row.weights, row.workload, row.kind), []).append(row)
    for alike in together.values():
        for row in alike:
            row.label = row.name(*_shown(alike))
    return rows


def _shown(rows: list[Row], without: str = "") -> list[str]:
    """The settings that name each of the rows: the main ones, and those in which the rows differ."""
    return [
        name
        for name in SETTINGS
        if name != without
        and (name in ALWAYS_SHOWN or len({json.dumps(row.record.get(name), sort_keys=True) for row in rows}) > 1)
    ]


def group(rows: list[Row]) -> list[Model]:
    models: dict[tuple[str, str], Model] = {}
    for row in rows:
        key = (row.model, row.weights)
        models.setdefault(key, Model(*key)).rows.append(row)
    for model in models.values():
        workloads = list(dict.fromkeys(row.workload for row in model.rows))
        model.rows.sort(key=lambda row: (workloads.index(row.workload), not row.plain))
    return list(models.values())


def headline(rows: list[Row]) -> list[Row]:
    """One cached run of each series: the threshold nearest the middle of the paper's band, the error budget nearest the
    usual one, the largest capacity."""
    middle = sum(PAPER_BAND) / 2
    best: dict[tuple[str, ...], Row] = {}

    def rank(row: Row) -> tuple[float, float, float]:
        distance = abs(row.threshold - middle) if measured(row.threshold) else 0.0
        ratio = budget_of(row) / USUAL_EPSILON if budget_of(row) else 1.0
        return -round(distance, 9), -round(abs(math.log(ratio)), 9), capacity_of(row)

    for row in rows:
        if row.plain:
            continue
        key = row.key("threshold", "capacity_bytes", "budget_epsilon")
        if key not in best or rank(row) > rank(best[key]):
            best[key] = row
    return list(best.values())


def budget_of(row: Row) -> float:
    """The error budget epsilon; 0 without one."""
    return row.budget_epsilon if measured(row.budget_epsilon) and row.budget_epsilon > 0 else 0.0


def capacity_of(row: Row) -> float:
    return row.capacity_bytes if measured(row.capacity_bytes) else 0.0


@dataclass
class Sweep:
    """Records of one model and workload that differ in one setting, as one or more lines of a chart."""

    model: str
    workload: str
    random: bool
    lines: list[tuple[str, list[Row]]]  # name, rows by rising value


def sweeps(rows: list[Row], setting: str, least: int = 2) -> list[Sweep]:
    """Lines of at least that many different values of the setting; of equal records the last one counts."""
    lines: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in rows:
        if not row.plain and measured(row.record.get(setting)):
            lines.setdefault(row.key(setting), {})[row.record[setting]] = row
    found: dict[tuple[str, str, str], list[list[Row]]] = {}
    for line in lines.values():
        if len(line) >= least:
            ordered = [line[value] for value in sorted(line)]
            first = ordered[0]
            found.setdefault((first.model, first.weights, first.workload), []).append(ordered)
    result = []
    for (model, _, workload), several in found.items():
        firsts = [line[0] for line in several]
        shown = _shown(firsts, without=setting)
        named = [(line[0].name(*shown), line) for line in several]
        result.append(Sweep(model, workload, firsts[0].random, named))
    return result


def by_layer(rows: list[Row], field: str) -> list[Sweep]:
    """Records with a number for each layer under `field`, by model and workload; each is a line of its own, headlines
    first."""
    first = headline(rows)
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if any(map(measured, row.record.get(field) or [])):
            found.setdefault((row.model, row.weights, row.workload), []).append(row)
    return [
        Sweep(
            model,
            workload,
            several[0].random,
            [(row.label, [row]) for row in sorted(several, key=lambda row: row not in first)],
        )
        for (model, _, workload), several in found.items()
    ]
