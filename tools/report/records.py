"""What the report and the summary read: benchmark records and trace results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.report.formatting import Quality, interval, measured, percent, plain_number, quality, with_interval

SCHEMA = 1
REQUIRED = ("model", "weights", "workload", "mode", "threads", "requests", "tokens", "latency_ms")
_SUMMARIES = ("latency_ms", "divergence", "prefill_ms", "decode_ms", "later_turns")
_OUTCOMES = ("task", "second_task", "unsafe_served", "same_answer", "greedy", "observed_error", "share_reused")
OBJECTS = (*_SUMMARIES, *_OUTCOMES, "versions")
LISTS = ("hit_rate_by_layer", "exits_by_layer")
PLAIN = "nocache"
# What makes two records of one model and workload different runs, and how it is written.
_THRESHOLD = ("threshold", "fingerprint", "fingerprint_layer", "centring")
_BUDGET = ("budget_metric", "budget_epsilon", "budget_delta", "cache_free")
_CACHE = ("cache_layers", "eviction", "ttl_seconds", "audit_rate", "capacity_bytes")
SETTINGS = ("weights_held", "weights_sample", "output", *_THRESHOLD, *_BUDGET, *_CACHE, "threads", "shuffle")
ALWAYS_SHOWN = ("weights_held", "weights_sample", "threshold", "fingerprint", "centring", "budget_metric", "budget_epsilon", "cache_free")
CENTRING = {"off": "not centred", "running": "centred", "fitted": "centred (fitted)"}


class ReportError(RuntimeError):
    """The results cannot be shown; the text says what is wrong and what to do."""


def _with_sign(sign: str) -> Callable[[Any], str]:
    return lambda value: f"{sign}\u00a0{value:g}" if measured(value) else f"{sign}\u00a0{value}"


_SETTING_TEXTS: dict[str, Callable[[Any], str]] = {
    "threshold": _with_sign("τ"),
    "budget_epsilon": _with_sign("ε"),
    "budget_delta": _with_sign("δ"),
    "capacity_bytes": lambda value: f"{value / 2**20:g} MiB" if measured(value) else f"{value} MiB",
    "weights_held": lambda value: "" if value == "as-loaded" else str(value),
    "weights_sample": lambda value: f"tuned on {value}",
    "fingerprint": str,
    "budget_metric": lambda value: f"{value} error",
    "cache_free": lambda value: "no neighbours" if value is True else "",
    "centring": lambda value: CENTRING.get(str(value), f"centring {value}"),
}


def setting_text(name: str, value: Any) -> str:
    if name in _SETTING_TEXTS:
        return _SETTING_TEXTS[name](value)
    shown = ",".join(map(str, value)) if isinstance(value, list) else value
    return f"{name.removesuffix('_seconds').replace('_', ' ')} {shown}"


@dataclass(eq=False)
class Row:
    """One record, ready to be shown."""

    record: dict[str, Any]
    label: str = ""  # what distinguishes it from the other records
    document: int = 0  # which of the files it is from
    beside: list[Row] = field(default_factory=list)  # all runs of its model on its traffic, once they are known

    def part(self, name: str, part: str) -> Any:
        """Reads a part of one of the OBJECTS. The result is None if there is no such part."""
        return (self.record.get(name) or {}).get(part)

    @property
    def error_metric(self) -> str:
        """What its observed error counts: its budget's metric, or that of a budget beside it."""
        metrics = [row.budget_metric for row in (self, *self.beside)]
        return next((metric for metric in metrics if isinstance(metric, str)), "")

    @property
    def observed(self) -> float | None:
        """The error that came on requests which calibration never saw."""
        found = self.part("observed_error", "value")
        return found if measured(found) else None

    @property
    def observed_ends(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval of the observed error."""
        return interval([self.part("observed_error", end) for end in ("low", "high")])

    @property
    def tokens_differing(self) -> tuple[int, int, int] | None:
        """Tokens that do not come out on top as without a cache, those of them that are tied, and all compared."""
        different, tied, compared = (self.part("greedy", name) for name in ("different", "tied", "compared"))
        if not measured(different) or not measured(compared) or compared <= 0:
            return None
        return different, tied if measured(tied) else 0, compared

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
    def second_quality(self) -> Quality | None:
        """By the task's second metric: choices by likelihoods a byte, answers by exact match."""
        return quality(self.record.get("second_task"))

    def key(self, *without: str) -> tuple[str, ...]:
        """Equal for records that differ in nothing but the named settings."""
        names = ("model", "weights", "workload", "mode", "fidelity", *(s for s in SETTINGS if s not in without))
        return tuple(json.dumps(self.record.get(name), sort_keys=True) for name in names)

    def name(self, *parts: str) -> str:
        """Names the kind and the given settings, as far as the record has them."""
        texts = [setting_text(part, self.record[part]) for part in parts if self.record.get(part) is not None]
        return ", ".join([self.kind, *filter(None, texts)])

    @property
    def exact(self) -> bool:
        """Whether it promises what the model computes."""
        return self.kind in ("lossless", "identical")

    @property
    def similar(self) -> bool:
        """Whether answers of similar requests are taken for its own, without a promise."""
        return self.kind in ("threshold", "semantic-cache")

    @property
    def generates(self) -> bool:
        return measured(self.part("decode_ms", "mean"))

    @property
    def decodes(self) -> bool:
        """Whether the model is a decoder that reuses prefixes."""
        return measured(self.part("prefill_ms", "mean")) or measured(self.prefill_speedup_vs_kvcache)

    @property
    def note_text(self) -> str:
        return self.note.strip() if isinstance(self.note, str) else ""

    @property
    def observed_text(self) -> str:
        """Writes the observed error with its interval. The text is empty where it was not observed."""
        return "" if self.observed is None else with_interval(self.observed, self.observed_ends)

    def rate_text(self, name: str, words: str) -> str:
        """A rate with its 95 % interval behind what it is; empty where it was not measured."""
        rate = self.part(name, "rate")
        return f"{words} {with_interval(rate, interval(self.part(name, 'ci95')))}" if measured(rate) else ""

    @property
    def reused_texts(self) -> list[str]:
        """In which ways sequences were answered under a budget, with their shares."""
        shares = {name: share for name, share in (self.share_reused or {}).items() if measured(share) and share > 0}
        return [f"{name.replace('_', ' ')} {percent(share)}" for name, share in shares.items()]

    @property
    def greedy_text(self) -> str:
        """Tokens that come out on top as without a cache, of those compared; empty where none were."""
        if self.tokens_differing is None:
            return ""
        different, tied, compared = self.tokens_differing
        text = f"{plain_number(compared - different)} of {plain_number(compared)}"
        return f"{text} ({tied} tied)" if tied else text

    @property
    def greedy_differences(self) -> list[dict[str, Any]]:
        """The tokens that come out otherwise than without a cache, where weights are as loaded."""
        listed = self.part("greedy", "differences")
        if self.weights_held not in (None, "as-loaded") or not isinstance(listed, list):
            return []
        return [difference for difference in listed if isinstance(difference, dict)]

    def __getattr__(self, name: str) -> Any:
        if name == "record":
            raise AttributeError(name)
        return self.record.get(name)


def read_documents(paths: list[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads benchmark results, and apart from them results of llmcache-trace."""
    documents = [read_document(path) for path in paths]
    return [one for one in documents if "trace" not in one], [one for one in documents if "trace" in one]


def read_document(path: Path) -> dict[str, Any]:
    """Benchmark results, or the results of llmcache-trace (which have `trace` and `results`)."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}; run the benchmark first") from error
    except ValueError as error:
        raise ReportError(f"{path}: not valid JSON ({error}); run the benchmark again") from error
    trace = isinstance(document, dict) and "trace" in document
    problem = _problem_of_trace(document) if trace else _problem(document)
    if problem:
        raise ReportError(f"{path}: {problem}; run {'llmcache-trace' if trace else 'the benchmark'} again")
    return document


def _problem(document: Any) -> str:
    """Says what is wrong with benchmark results. The text is empty if nothing is."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        return f"schema {found!r}, this report reads schema {SCHEMA}"
    records = document.get("records")
    if not isinstance(records, list):
        return "'records' is not a list"
    for number, record in enumerate(records):
        missing = [name for name in REQUIRED if not isinstance(record, dict) or record.get(name) is None]
        if missing:
            return f"record {number} has no {', '.join(missing)}"
        for names, kind, what in ((OBJECTS, dict, "an object"), (LISTS, list, "a list")):
            wrong = [name for name in names if not isinstance(record.get(name), kind | None)]
            if wrong:
                return f"record {number}: {', '.join(wrong)} is not {what}"
    return ""


def _problem_of_trace(document: dict[str, Any]) -> str:
    results = document.get("results")
    if not isinstance(results, list):
        return "'results' is not a list"
    for number, result in enumerate(results):
        whole = isinstance(result, dict) and isinstance(result.get("policy"), str) and measured(result.get("capacity"))
        if not whole or result["capacity"] <= 0:
            return f"result {number} has no policy or no positive capacity"
    return ""


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
