"""The report's tables: at a glance, the runs of a chart, and all figures of a model."""

from __future__ import annotations

from outcomes import answers_text, change
from reasons import reason
from report_cells import Cell, Column, Table, table, text
from report_map import Mark
from report_numbers import DASH, error_number, interval, measured, mebibytes, percent, plain_number, times
from report_records import Row
from scenarios import KV_CACHE, NO_CACHE, Ratio, Scenario, fair, ratios
from summary_lines import MOST_LINES, Line, setting_words

BASELINES = {NO_CACHE: "against no cache", KV_CACHE: "against a KV cache"}


def bar(value: float, most: float) -> dict[str, float]:
    """Share of a bar's width, and where 1 is on it."""
    widest = max(most, 1.0)
    return {"share": round(value / widest, 4), "one": round(1 / widest, 4)}


def ratio_cell(ratio: Ratio | None, most: float, *small: str) -> Cell:
    if ratio is None:
        return Cell()
    css = "best loses" if ratio.loses else "best"
    return Cell(times(ratio.value), tuple(filter(None, small)), css, **bar(ratio.value, most))


def rate(found: dict[str, object] | None) -> str:
    """A rate with its 95 % interval, or an empty text."""
    found = found or {}
    if not measured(found.get("rate")):
        return ""
    bounds = interval(found.get("ci95"))
    return percent(found["rate"]) + (f" ({percent(bounds[0])} to {percent(bounds[1])})" if bounds else "")


# --- at a glance ----------------------------------------------------------------------------------


def glance(lines: list[Line], scenarios: list[Scenario], without: list[Scenario]) -> Table | None:
    """A row for each kind of traffic, in the order of the summary; `without` are shown elsewhere."""
    numbers = {id(row): number for number, line in enumerate(lines, start=1) for row in line.rows}
    shown = [one for one in scenarios if one not in without and one.chosen and fair(one.chosen)]
    shown.sort(key=lambda one: numbers.get(id(one.chosen), len(lines) + 1))
    shown = shown[:MOST_LINES]
    if not shown:
        return None
    rows = [(one, row) for one in shown if (row := one.chosen)]
    values = [ratio.value for _, row in rows if (ratio := fair(row))]
    papers = [one.paper.speedup_vs_nocache for one in shown if one.paper and one.paper is not one.chosen]
    most = max([*values, *papers])

    def speed(pair: tuple[Scenario, Row]) -> Cell:
        one, row = pair
        ratio = fair(row)
        assert ratio is not None
        what = f"{ratio.of}, " if ratio.of else ""
        others = [f"{other.of or 'all'} {times(other.value)} {BASELINES[other.against]}" for other in ratios(row)[1:]]
        why = reason(row, one)
        return ratio_cell(ratio, most, what + BASELINES[ratio.against], *others, f"why: {why}" if why else "")

    def paper(pair: tuple[Scenario, Row]) -> Cell:
        one, chosen = pair
        row = one.paper
        if row is None or row is chosen:
            return Cell()
        ratio = Ratio(row.speedup_vs_nocache, "", NO_CACHE)
        why = reason(row, one) if ratio.loses else ""
        return ratio_cell(ratio, most, f"τ {row.threshold:.3g}: {answers_text(row)}", f"why: {why}" if why else "")

    columns = [
        Column("", lambda pair: text(str(numbers.get(id(pair[1]), "") or ""), css="key")),
        Column(
            "traffic",
            lambda pair: text(
                pair[0].words,
                f"{pair[0].model} · {pair[0].rows[0].workload}",
                setting_words(pair[1]) or "lossless",
                f"{plain_number(pair[1].requests)} requests",
                css="what",
            ),
        ),
        Column("speed-up", speed),
        Column("the answers", lambda pair: text(answers_text(pair[1]), css="prose")),
        Column("the paper's mode", paper),
    ]
    return table(columns, rows, "glance")


# --- the runs of a chart --------------------------------------------------------------------------


def marks_table(marks: list[Mark]) -> Table:
    """The first chart in figures."""

    def speed(mark: Mark) -> Cell:
        ratio = fair(mark.row)
        assert ratio is not None
        why = reason(mark.row, mark.scenario)
        what = f"{ratio.of}, " if ratio.of else ""
        css = "best loses" if ratio.loses else "best"
        return text(times(ratio.value), what + BASELINES[ratio.against], f"why: {why}" if why else "", css=css)

    def changed(mark: Mark) -> Cell:
        found = change(mark.row)
        assert found is not None
        value = "0" if found.percent == 0 else f"{found.percent:.2g}" if found.percent < 1 else f"{found.percent:.1f}"
        return text(f"{value} %" if found.percent < 0.01 or not found.of.startswith("points") else value, found.of)

    columns = [
        Column("", lambda mark: text(str(mark.number or ""), css="key")),
        Column("traffic", lambda mark: text(mark.scenario.name, mark.row.label, css="what")),
        Column("speed-up", speed),
        Column("change", changed),
        Column("the answers", lambda mark: text(answers_text(mark.row), css="prose")),
    ]
    ordered = sorted(marks, key=lambda mark: (not mark.number, mark.number, -mark.speed))
    return table(columns, ordered, "marks")


def runs_table(named: list[tuple[str, Row]], *columns: Column) -> Table:
    """The runs of a chart by rows: name, the given columns, speed-up and answers."""
    shown = [
        Column("run", lambda pair: text(pair[0], css="what")),
        *(Column(column.head, lambda pair, column=column: column.cell(pair[1])) for column in columns),
        Column("speed-up", lambda pair: speedup_cell(pair[1])),
        Column("the answers", lambda pair: text(answers_text(pair[1]), css="prose")),
        Column("hit rate", lambda pair: text(percent(pair[1].hit_rate))),
    ]
    return table(shown, named, "runs")


def speedup_cell(row: Row, scenario: Scenario | None = None) -> Cell:
    """Against no cache; below 1 with the reason."""
    if row.plain or not measured(row.speedup_vs_nocache):
        why = reason(row, scenario)
        return text(DASH, f"why: {why}" if why else "")
    why = reason(row, scenario)
    css = "best loses" if round(row.speedup_vs_nocache, 2) < 1 else "best"
    return text(plain_number(row.speedup_vs_nocache), f"why: {why}" if why else "", css=css)


def layers_table(named: list[tuple[str, Row]], field: str) -> Table:
    """A column for each layer."""
    deepest = max(len(row.record[field]) for _, row in named)

    def at(layer: int) -> Column:
        def cell(pair: tuple[str, Row]) -> Cell:
            rates = pair[1].record[field]
            return text(percent(rates[layer]) if layer < len(rates) else DASH)

        return Column(str(layer), cell)

    return table([Column("run", lambda pair: text(pair[0], css="what")), *map(at, range(deepest))], named, "runs")


# --- all figures of a model -----------------------------------------------------------------------


def _summary(name: str, part: str) -> Column:
    return Column(
        ("mean ms" if part == "mean" else part) if name == "latency_ms" else f"div. {part}",
        lambda pair: text(
            (plain_number if name == "latency_ms" else error_number)((pair[1].record.get(name) or {}).get(part))
        ),
        "divergence, the relative distance of outputs from those without a cache; 0 means bit-identical"
        if name == "divergence" and part == "mean"
        else "",
    )


def _change_cell(pair: tuple[Scenario, Row]) -> Cell:
    row = pair[1]
    quality = row.quality
    small = [
        f"wrongly served {rate(row.unsafe_served)}" if rate(row.unsafe_served) else "",
        f"same gold answer {rate(row.same_answer)}" if rate(row.same_answer) else "",
    ]
    if quality and quality.change is not None and not row.plain:
        ends = f", 95 %: {quality.interval_text}" if quality.ci95 else ""
        return text(quality.change_text, quality.metric + ends, quality.verdict, *small, css=quality.verdict)
    if quality and quality.change is None and not row.plain:
        return text(quality.levels_text, f"95 %: {quality.interval_text}" if quality.ci95 else "", *small)
    return text("", "random weights" if row.random and not row.plain else "", *small)


def _observed_cell(pair: tuple[Scenario, Row]) -> Cell:
    n = (pair[1].observed_error or {}).get("n")
    return text(pair[1].observed_text, f"of {plain_number(n)}" if measured(n) else "")


def _budget_cell(pair: tuple[Scenario, Row]) -> Cell:
    row = pair[1]
    if not measured(row.budget_epsilon):
        return Cell()
    delta = f"δ {percent(row.budget_delta)}" if measured(row.budget_delta) else ""
    return text(percent(row.budget_epsilon), row.budget_metric if isinstance(row.budget_metric, str) else "", delta)


def _audits_cell(pair: tuple[Scenario, Row]) -> Cell:
    row = pair[1]
    closed = f"closed {plain_number(row.gate_closings)}, reopened {plain_number(row.gate_reopenings)}"
    return text(plain_number(row.audits), closed if measured(row.gate_closings) else "")


def _later(row: Row, name: str) -> str:
    found = (row.later_turns or {}).get(name)
    found = found.get("mean") if isinstance(found, dict) else found
    return f"later turns {plain_number(found)}" if measured(found) else ""


def _recall(row: Row) -> object:
    return row.recall if row.recall is not None else (row.record.get("task") or {}).get("recall")


def _filled(row: Row) -> str:
    some = measured(row.fill_available) and row.fill_available
    return f"{plain_number(row.filled)} of {plain_number(row.fill_available)}" if some else ""


def _quality_level(row: Row, name: str) -> str:
    quality = row.quality
    return quality.level(getattr(quality, name)) if quality and measured(getattr(quality, name)) else ""


COLUMNS = [
    Column("workload and run", lambda pair: text(pair[1].workload, pair[1].label, pair[1].note_text, css="what")),
    Column("speed-up", lambda pair: speedup_cell(pair[1], pair[0]), "against no cache, over the same requests"),
    Column(
        "change of answers",
        _change_cell,
        "with its 95 % interval; “no clear change” if that holds zero. Wrongly served: share of the served requests whose "
        "cached answer belongs to another question. Same gold answer: share of the served questions whose cached "
        "question has the same gold answer",
    ),
    Column("value", lambda pair: text(_quality_level(pair[1], "value"))),
    Column("baseline", lambda pair: text(_quality_level(pair[1], "baseline"))),
    Column(
        "budget",
        _budget_cell,
        "the share of sequences that may be in error (ε), by which measure, and the probability that calibration is "
        "misled (δ)",
    ),
    Column("promised", lambda pair: text(percent(pair[1].promised_error)), "upper bound of the error, from calibration"),
    Column("observed", _observed_cell, "error on requests that calibration never saw, with its 95 % interval"),
    Column("reused by", lambda pair: text(DASH, *pair[1].reused_texts), "shares of sequences"),
    Column("calibrated", lambda pair: text(plain_number(pair[1].calibration_requests)), "on that many requests"),
    Column(
        "audits",
        _audits_cell,
        "served sequences that were also computed in full, and how often that stopped reuse and let it go on",
    ),
    Column("recall", lambda pair: text(percent(_recall(pair[1])))),
    Column("hit rate", lambda pair: text(percent(pair[1].hit_rate)), "sequences answered from an earlier request"),
    *(_summary("latency_ms", part) for part in ("mean", "p50", "p95", "p99")),
    Column(
        "computed",
        lambda pair: text(percent(pair[1].tokens_computed_fraction)),
        "tokens that went through the layers, padding included, of the real ones",
    ),
    Column(
        "reused", lambda pair: text(percent(pair[1].tokens_reused_fraction)), "tokens of prompts known from before"
    ),
    Column(
        "shared", lambda pair: text(percent(pair[1].tokens_shared_fraction)), "computed once for several rows of a batch"
    ),
    Column(
        "prefill ms",
        lambda pair: text(plain_number((pair[1].prefill_ms or {}).get("mean")), _later(pair[1], "prefill_ms")),
        "until the first token's output is there; later turns send the conversation again",
    ),
    Column("vs no cache", lambda pair: text(plain_number(pair[1].prefill_speedup_vs_nocache)), "the prefill"),
    Column(
        "vs kvcache",
        lambda pair: text(plain_number(pair[1].prefill_speedup_vs_kvcache), _later(pair[1], "speedup_vs_kvcache")),
        "the prefill, against keys and values that are kept inside one request, weights held alike",
    ),
    Column("decode ms", lambda pair: text(plain_number((pair[1].decode_ms or {}).get("mean"))), "each further token"),
    Column("tokens/s", lambda pair: text(plain_number(pair[1].tokens_per_second, 1)), "said, of all time"),
    Column(
        "greedy",
        lambda pair: text(pair[1].greedy_text),
        "tokens that come out on top as without a cache, of those compared; tied ones lie within 1e-4 of the best",
    ),
    *(_summary("divergence", part) for part in ("mean", "p95", "max")),
    Column("cache MiB", lambda pair: text(mebibytes(pair[1].cache_bytes))),
    Column("filled", lambda pair: text(_filled(pair[1])), "requests put into the cache before, of those there are"),
    Column("requests", lambda pair: text(plain_number(pair[1].requests))),
    Column("tokens", lambda pair: text(plain_number(pair[1].tokens))),
    Column("threads", lambda pair: text(plain_number(pair[1].threads))),
]


def all_figures(scenarios: list[Scenario]) -> Table:
    """Everything that was measured of one model; runs without a cache first in each kind of traffic."""
    pairs = [(one, row) for one in scenarios for row in sorted(one.rows, key=lambda row: not row.plain)]
    return table(COLUMNS, pairs, "full", ["plain" if row.plain else "" for _, row in pairs])
