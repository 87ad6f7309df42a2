"""Records of one model on one kind of traffic: which setting a user would choose, and its fair baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tools.data.workloads import words_for
from tools.report.formatting import measured, times
from tools.report.outcomes import over_budget
from tools.report.records import Row

PAPER_BAND = (0.82, 0.88)  # similarity thresholds that the LLMCache paper calls best
# The error budget that a user would begin with, by what the error is.
USUAL_EPSILON = {"decision": 0.02, "token": 0.05, "relative": 0.1}
WORTH_A_BUDGET = 1.1  # times the speed of lossless from which on errors are worth having
NO_CACHE, KV_CACHE = "no cache", "kvcache"
FIRST_TOKEN, ANSWERS, REQUESTS = "first token", "answers", ""
_BASELINES = {NO_CACHE: "without a cache", KV_CACHE: "with a KV cache per request"}


@dataclass(frozen=True)
class Ratio:
    """It tells how many times as fast a run is, in what, and against which baseline."""

    value: float
    of: str
    against: str

    @property
    def loses(self) -> bool:
        return round(self.value, 2) < 1

    @property
    def text(self) -> str:
        if not self.of and self.against == NO_CACHE:
            return times(self.value)
        what = f"{self.of} {times(self.value)}".strip()
        how = "as fast as" if self.loses or not self.of else "sooner than"
        return f"{what} {how} {_BASELINES[self.against]}"


def _ratio(value: object, of: str, against: str) -> Ratio | None:
    return Ratio(float(value), of, against) if measured(value) and value > 0 else None  # type: ignore[arg-type]


def ratios(row: Row) -> list[Ratio]:
    """Against fair baselines, the most telling first: encoders against no cache. A decoder's first token against keys
    and values that are kept inside a request; its answers against no cache, too. Empty if nothing was compared."""
    whole = _ratio(row.speedup_vs_nocache, ANSWERS if row.generates else REQUESTS, NO_CACHE)
    if not row.decodes or row.plain:
        return [whole] if whole else []
    at_once = row.output == "new"  # one call: nothing comes behind the first token
    of = REQUESTS if at_once else FIRST_TOKEN
    prefill = _ratio(row.prefill_speedup_vs_kvcache, of, KV_CACHE) if row.mode != KV_CACHE else None
    prefill = prefill or _ratio(row.prefill_speedup_vs_nocache, of, NO_CACHE)
    if row.generates:
        against = _ratio(row.speedup_vs_kvcache, ANSWERS, KV_CACHE) if row.mode != KV_CACHE else None
        found = [prefill, whole] if row.later_turns else [whole, against or prefill]
    else:
        found = [prefill or whole]
    return [ratio for ratio in found if ratio]


def fair(row: Row) -> Ratio | None:
    return next(iter(ratios(row)), None)


def lost(row: Row) -> Ratio | None:
    """The ratio below 1 that has to be explained: the fair one, or else that against no cache."""
    found = [*ratios(row), _ratio(row.speedup_vs_nocache, REQUESTS, NO_CACHE)]
    return next((ratio for ratio in found if ratio and ratio.loses), None)


@dataclass(eq=False)
class Scenario:
    """All runs of one model on one kind of traffic."""

    rows: list[Row]
    apart: str = ""  # what sets it apart from others on this traffic

    @property
    def model(self) -> str:
        return self.rows[0].model

    @property
    def random(self) -> bool:
        return self.rows[0].random

    @property
    def workload(self) -> str:
        return self.rows[0].workload

    @property
    def written(self) -> bool:
        """Whether it is this repository's own text and not a real data set."""
        return self.workload.partition("-")[0] == "sample"

    @property
    def name(self) -> str:
        return f"{self.model}, {self.words}"

    @property
    def words(self) -> str:
        """Says what kind of traffic it is."""
        return words_for(self.workload) + (f", {self.apart}" if self.apart else "")

    @property
    def lossless(self) -> Row | None:
        """The fastest that promises the model's own answers, weights as loaded if these were measured."""
        rows = [row for row in self.rows if row.exact and fair(row)]
        return max(rows, key=lambda row: (row.weights_held in (None, "as-loaded"), _speed(row)), default=None)

    @property
    def budget(self) -> Row | None:
        """The fastest of the budget that a user would begin with."""
        rows = [row for row in self.rows if row.kind == "budget" and fair(row) and measured(row.budget_epsilon)]
        rows = [row for row in rows if row.budget_epsilon > 0]
        return max(rows, key=lambda row: (-_from_usual(row), _speed(row)), default=None)

    @property
    def paper(self) -> Row | None:
        """The paper's mode at the threshold nearest the middle of what the paper chooses."""
        return max(self.paper_rows, key=lambda row: -abs(row.threshold - sum(PAPER_BAND) / 2), default=None)

    @property
    def paper_rows(self) -> list[Row]:
        """The paper's mode by rising threshold; not centred, as the paper's, if there are such runs."""
        rows = [row for row in self.rows if row.kind == "threshold" and measured(row.threshold)]
        rows = [row for row in rows if measured(row.speedup_vs_nocache) and row.weights_held in (None, "as-loaded")]
        like = [row for row in rows if row.centring in (None, "off")]
        return sorted(like or rows, key=lambda row: row.threshold)

    @property
    def chosen(self) -> Row | None:
        """What a user would run: the fastest lossless setting, or a budget that was kept and is worth its errors."""
        safe = max((row for row in self.rows if row.exact and fair(row)), key=_speed, default=None)
        budget = self.budget
        if budget and not over_budget(budget) and (safe is None or _speed(budget) > WORTH_A_BUDGET * _speed(safe)):
            return budget
        if safe or budget:
            return safe or budget
        others = [row for row in self.rows if not row.plain and fair(row)]
        return self.paper or max(others, key=lambda row: (row.mode == "llmcache", _speed(row)), default=None)

    @property
    def repeats(self) -> float | None:
        """The share of what was asked that repeats something word for word."""
        for row in self.rows:
            if not measured(row.hit_rate):
                continue
            if row.exact and row.mode == "llmcache":
                return row.hit_rate
            shares = (row.share_reused or {}).values()
            if row.kind == "budget" and all(map(measured, shares)):
                return max(0.0, row.hit_rate - sum(shares))
        return None


def _speed(row: Row) -> float:
    """The speed by which settings of one scenario are compared."""
    ratio = fair(row)
    assert ratio is not None
    return row.speedup_vs_nocache if measured(row.speedup_vs_nocache) and not row.later_turns else ratio.value


def _from_usual(row: Row) -> float:
    usual = USUAL_EPSILON.get(str(row.budget_metric), USUAL_EPSILON["decision"])
    return round(abs(math.log(row.budget_epsilon / usual)), 9)


def scenarios_of(rows: list[Row]) -> list[Scenario]:
    """By model, weights and workload; runs that a later file has again, with equal settings, count from there."""
    latest: dict[tuple[object, ...], int] = {}
    for row in rows:
        latest[*row.key(), _batch(row)] = row.document
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.document != latest[*row.key(), _batch(row)]:
            continue
        settings = (row.model, row.weights, row.workload, row.shuffle, row.threads, _batch(row))
        found.setdefault(tuple(map(repr, settings)), []).append(row)
    scenarios = [Scenario(several) for several in found.values()]
    for one in scenarios:
        for row in one.rows:
            row.beside = one.rows
        alike = [other for other in scenarios if (other.model, other.workload) == (one.model, one.workload)]
        one.apart = _apart(one, alike)
    return scenarios


def by_model(scenarios: Iterable[Scenario]) -> list[list[Scenario]]:
    models: dict[tuple[str, str], list[Scenario]] = {}
    for one in scenarios:
        models.setdefault((one.model, one.rows[0].weights), []).append(one)
    return list(models.values())


def _batch(row: Row) -> int:
    """Sequences a request, of which conversations have as many as they have turns."""
    if row.generates or not measured(row.sequences) or not measured(row.requests) or row.requests <= 0:
        return 1
    return max(1, round(row.sequences / row.requests))


def _apart(one: Scenario, alike: list[Scenario]) -> str:
    def differ(values: list[object]) -> bool:
        return len(set(map(repr, values))) > 1

    first, firsts = one.rows[0], [other.rows[0] for other in alike]
    texts = []
    if differ([_batch(row) for row in firsts]):
        texts.append(f"{_batch(first)} at once" if _batch(first) > 1 else "one at a time")
    if differ([row.threads for row in firsts]):
        texts.append(f"threads: {first.threads}")
    if differ([row.shuffle for row in firsts]):
        texts.append(f"shuffled (seed {first.shuffle})" if measured(first.shuffle) else "in order")
    if differ([row.weights for row in firsts]):
        texts.append(str(first.weights))
    return ", ".join(texts)
