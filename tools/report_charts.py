"""The report's charts of records and traces. Bars carry their names and numbers."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from report_drawing import (
    COLOURS,
    INK,
    LABEL_WIDTH,
    MOST_LINES,
    WIDTH,
    draw,
    evenly,
    legend,
    log_axis,
    new_panels,
    plain,
    pyplot,
    quiet,
    svg_of,
)
from report_numbers import THIN, measured, percent, plain_number
from report_records import PAPER_BAND, Model, Row, Sweep

GREY = "#8a8f98"
BAR_ROW = 0.36  # inches: a line of text and a bar


# --- bars -----------------------------------------------------------------------------------------


def _bars(places: float) -> tuple[Any, Any]:
    figure, axes = pyplot().subplots(figsize=(WIDTH, 0.5 + BAR_ROW * places), layout="constrained")
    quiet(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    return figure, axes


def _above(axes: Any, place: float, text: str, **how: Any) -> None:
    """Text at the left edge, above the bar at this place."""
    how = {"va": "bottom", "linespacing": 1.0, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.4}, **how}
    axes.text(0, place - 0.24, plain(text), transform=axes.get_yaxis_transform(), **how).set_in_layout(False)


def _name(row: Row) -> str:
    return textwrap.fill(f"{row.workload} ({row.label})", LABEL_WIDTH)


def _further(label: str) -> float:
    """What the lines of a label beyond the first need, in places."""
    return 0.42 * label.count("\n")


def colours_of(rows: list[Row]) -> dict[str, str]:
    kinds = list(dict.fromkeys(row.kind for row in rows if not row.plain))
    return {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}


def speedup_chart(models: list[Model], chosen: list[Row], colours: dict[str, str]) -> str:
    """A bar for each chosen run, grouped by model, with a line where nothing is gained."""

    def beside(row: Row) -> str:
        quality = row.quality
        return f" · {quality.metric} {quality.change_text}" if quality and measured(quality.change) else ""

    bars = {
        id(row): (row.speedup_vs_nocache, _name(row), beside(row)) for row in chosen if measured(row.speedup_vs_nocache)
    }
    return _times_chart(
        models, bars, colours, "times as fast as without a cache", "speedup", "Speed-up by model and workload"
    )


def kvcache_chart(models: list[Model], chosen: list[Row], colours: dict[str, str]) -> str:
    """The same for prefill against kvcache."""
    bars = {}
    for row in chosen:
        against = row.against_kvcache
        if row.mode != "kvcache" and against:
            bars[id(row)] = (against[0], _name(row), "" if against[1] == "prefill" else f" · {against[1]}")
    return _times_chart(
        models, bars, colours, "prefill: times as fast as kvcache", "kvcache", "Prefill against kvcache"
    )


def _times_chart(
    models: list[Model],
    bars: dict[int, tuple[float, str, str]],
    colours: dict[str, str],
    axis: str,
    name: str,
    title: str,
) -> str:
    """`bars`: id of a row -> how many times as fast, the text above, what stands behind the number."""
    groups = [(model, [row for row in model.rows if id(row) in bars]) for model in models]
    groups = [(model, rows) for model, rows in groups if rows]
    if not groups:
        return ""
    values = [bars[id(row)][0] for _, rows in groups for row in rows]
    figure, axes = _bars(len(values) + 1.2 * len(groups) + sum(_further(label) for _, label, _ in bars.values()))
    wide = max(values) > 20 and min(values) > 0
    start = 1.0 if wide else 0.0
    place = 0.0
    for model, rows in groups:
        _above(axes, place + 0.25, model.name + (" (random weights)" if model.random else ""), fontweight="bold")
        for row in rows:
            value, label, behind = bars[id(row)]
            place += 1 + _further(label)
            axes.barh(place, value - start, left=start, height=0.4, color=colours[row.kind])
            right = max(value, 1.0) if value > 0.7 or wide else value  # not across the dashed line
            axes.annotate(
                f"{value:.2f}{behind}", (right, place), xytext=(4, 0), textcoords="offset points", va="center"
            )
            _above(axes, place, label, fontsize=8)
        place += 1.2
    axes.axvline(1.0, color=INK, linewidth=1.2, linestyle="--")
    axes.set_ylim(place - 0.75, -0.5)
    if wide:
        axes.set_xscale("log")
        axes.set_xlim(min(0.8, min(values) * 0.9), max(values) ** 1.6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_xlim(0, max(*values, 1.0) * 1.6)
    axes.set_xlabel(axis + (" (log scale)" if wide else ""))
    return svg_of(figure, name, title)


def latency_chart(model: Model, chosen: list[Row], name: str, colours: dict[str, str]) -> str:
    """p50 as a bar, p95 as a tick at the end of a line; without a cache and for the chosen runs."""
    rows = [row for row in model.rows if (row.plain or row in chosen) and measured(row.latency_ms.get("p50"))]
    if not rows:
        return ""
    labels = [_name(row) for row in rows]
    figure, axes = _bars(len(rows) + 0.2 + sum(map(_further, labels)))
    place = -1.0
    for row, label in zip(rows, labels, strict=True):
        place += 1 + _further(label)
        p50, p95 = row.latency_ms["p50"], row.latency_ms.get("p95")
        axes.barh(place, p50, height=0.4, color=GREY if row.plain else colours[row.kind])
        if measured(p95):
            axes.plot([p50, p95], [place, place], color=INK, linewidth=1)
            axes.plot([p95], [place], marker="|", markersize=8, markeredgewidth=1.6, color=INK)
        _above(axes, place, label, fontsize=8)
    axes.set_ylim(place + 0.4, -0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms a request: p50 (bar), p95 (tick)")
    return svg_of(figure, name, f"Latency of {model.name}")


# --- lines ----------------------------------------------------------------------------------------


def _percent_hits(row: Row) -> float | None:
    return 100 * row.hit_rate if measured(row.hit_rate) else None


def speed_and_answers(sweep: Sweep, setting: str) -> tuple[Any, Any, Any, list[Row]]:
    """Over the setting: speed-up in the upper panel, what happened to the answers in the lower; and the rows shown."""
    lines = evenly(sweep.lines, MOST_LINES)
    all_rows = [row for _, rows in lines for row in rows]
    qualities = [row.quality for row in all_rows]
    first = next((quality for quality in qualities if quality and measured(quality.change)), None)
    figure, (above, below) = new_panels(2, len(lines), 3.9)
    for place, (label, rows) in enumerate(lines):
        xs = [row.record[setting] for row in rows]
        draw(above, place, xs, [r.speedup_vs_nocache if measured(r.speedup_vs_nocache) else None for r in rows], label)
        if first:
            known = [row.quality for row in rows]
            same = [q if q and q.metric == first.metric and measured(q.change) else None for q in known]
            draw(below, place, xs, [q.change * q.scale if q else None for q in same])
            bounds = [q.ci95 if q and q.ci95 else (math.nan, math.nan) for q in same]
            low, high = ([first.scale * bound[side] for bound in bounds] for side in (0, 1))
            below.fill_between(xs, low, high, color=COLOURS[place], alpha=0.15, linewidth=0)
        else:
            draw(below, place, xs, [(row.divergence or {}).get("mean") for row in rows])
    if first:
        worse = "higher is worse" if first.lower_is_better else "lower is worse"
        unit = f" ({first.unit})" if first.unit else ""
        below.set_ylabel(f"change of {first.metric}{unit}\n{worse}")
        below.axhline(0, color=INK, linewidth=1.2, linestyle="--")
    else:
        below.set_ylabel("output divergence, mean\nhigher is worse")
        below.set_ylim(bottom=0)
    above.set_ylabel("times as fast as\nwithout a cache")
    above.axhline(1, color=INK, linewidth=1.2, linestyle="--")
    legend(figure, above)
    return figure, above, below, all_rows


def tau_chart(sweep: Sweep, name: str) -> str:
    figure, above, below, rows = speed_and_answers(sweep, "threshold")
    for axes in (above, below):
        axes.axvspan(*PAPER_BAND, color="#f0e442", alpha=0.35, linewidth=0, zorder=0)
    label = f"{PAPER_BAND[0]:g} to {PAPER_BAND[1]:g}: the paper's choice"
    above.annotate(
        label,
        (sum(PAPER_BAND) / 2, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
    )
    below.set_xlabel("similarity threshold τ")
    thresholds = [row.threshold for row in rows]
    span = max(*thresholds, 0.95) - min(*thresholds, 0.8)
    step = 0.05 if span < 0.25 else 0.1 if span < 0.7 else 0.2
    below.xaxis.set_major_locator(pyplot().MultipleLocator(step))
    below.set_xlim(min(*thresholds, 0.8) - 0.01, max(*thresholds, 0.95) + 0.01)
    return svg_of(figure, name, f"Speed-up and quality over the threshold, {sweep.model}, {sweep.workload}")


def layer_chart(sweep: Sweep, name: str) -> str:
    return chart_by_layer(sweep, "hit_rate_by_layer", "hit rate (%)", name, "Hit rate by layer")


def chart_by_layer(sweep: Sweep, field: str, axis: str, name: str, title: str) -> str:
    """A line for each record: the shares that it lists under `field`, one a layer."""
    lines = sweep.lines[:MOST_LINES]
    figure, (axes,) = new_panels(1, len(lines), 2.4)
    deepest = 0
    for place, (label, (row,)) in enumerate(lines):
        rates = [100 * rate if measured(rate) else None for rate in row.record[field]]
        deepest = max(deepest, len(rates))
        draw(axes, place, list(range(len(rates))), rates, label)
    axes.set_xticks(evenly(list(range(deepest)), 13))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel(axis)
    legend(figure, axes)
    return svg_of(figure, name, f"{title}, {sweep.model}, {sweep.workload}")


def capacity_chart(sweep: Sweep, name: str) -> str:
    lines = evenly(sweep.lines, MOST_LINES)
    figure, (axes,) = new_panels(1, len(lines), 2.4)
    sizes: list[float] = []
    for place, (label, rows) in enumerate(lines):
        xs = [row.capacity_bytes / 2**20 for row in rows]
        sizes += xs
        draw(axes, place, xs, [_percent_hits(row) for row in rows], label)
    log_axis(axes, sizes, lambda size: f"{size:g}" if size < 1 else plain_number(round(size)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cache capacity (MiB, log scale)")
    axes.set_ylabel("hit rate (%)")
    legend(figure, axes)
    return svg_of(figure, name, f"Hit rate over capacity, {sweep.model}, {sweep.workload}")


def growth_text(rows: list[Row]) -> str:
    """Whether the hit rate grows with the logarithm of the capacity: a straight line on the log axis."""
    points = [(math.log2(row.capacity_bytes), row.hit_rate) for row in rows if measured(row.hit_rate)]
    points = [(x, y) for x, y in points if math.isfinite(x)]
    if len(points) < 2:
        return ""
    (x0, y0), (x1, y1) = points[0], points[1]
    (x2, y2), (x3, y3) = points[-2], points[-1]
    if len(points) == 2:
        return f"{100 * (y1 - y0) / (x1 - x0):+.1f} points for each doubling; two sizes cannot show the shape"
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread_x = sum((x - mean_x) ** 2 for x, _ in points)
    spread_y = sum((y - mean_y) ** 2 for _, y in points)
    if spread_y < 1e-12:
        return "the hit rate is the same at every size"
    together = sum((x - mean_x) * (y - mean_y) for x, y in points)
    explained = together**2 / (spread_x * spread_y)
    return (
        f"a straight line on this axis (logarithmic growth) explains {percent(explained, 0)} of the variation; a "
        f"doubling adds {100 * (y1 - y0) / (x1 - x0):.1f} points at the small end, {100 * (y3 - y2) / (x3 - x2):.1f} at "
        "the large end"
    )


def eviction_chart(document: dict[str, Any], name: str) -> str:
    """Hit rate of each policy over the capacity, with the optimum (Belady) in black."""
    lines = eviction_lines(document)
    if not lines:
        return ""
    figure, (axes,) = new_panels(1, len(lines) + 1, 2.8)
    place = 0
    sizes: list[float] = []
    for policy, points in lines.items():
        xs, ys = list(points), [100 * rate for rate in points.values()]
        sizes += xs
        if policy == "belady":
            axes.plot(xs, ys, color=INK, linestyle=(0, (4, 2)), marker="x", linewidth=1.4, label="belady (optimum)")
        else:
            draw(axes, place % MOST_LINES, xs, ys, policy)
            place += 1
    bound = document.get("unbounded_hit_rate")
    if measured(bound):
        axes.axhline(100 * bound, color=INK, linewidth=1, linestyle=":", label=f"nothing evicted ({percent(bound)})")
    log_axis(axes, sizes, lambda size: plain_number(round(size)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity (blocks, log scale)")
    axes.set_ylabel("hit rate (%)")
    legend(figure, axes)
    return svg_of(figure, name, "Hit rate of eviction policies over capacity")


def eviction_lines(document: dict[str, Any]) -> dict[str, dict[float, float]]:
    """Policy -> capacity -> hit rate, by rising capacity, the optimum last."""
    lines: dict[str, dict[float, float]] = {}
    for result in document["results"]:
        if measured(result.get("hit_rate")):
            lines.setdefault(result["policy"], {})[result["capacity"]] = result["hit_rate"]
    return {
        policy: dict(sorted(lines[policy].items())) for policy in sorted(lines, key=lambda policy: policy == "belady")
    }


def eviction_text(document: dict[str, Any]) -> list[str]:
    """For each capacity, the best policy that does not know the future, beside LRU."""
    lines = eviction_lines(document)
    texts = []
    for capacity in sorted({capacity for points in lines.values() for capacity in points}):
        rates = {policy: points[capacity] for policy, points in lines.items() if capacity in points}
        real = {policy: rate for policy, rate in rates.items() if policy != "belady"}
        if len(real) < 2:
            continue
        best = max(real, key=lambda policy: real[policy])
        text = f"{plain_number(int(capacity))} blocks: {best} {percent(real[best])}"
        if "lru" in real and best != "lru":
            text += f", {100 * (real[best] - real['lru']):+.1f}{THIN}points against lru"
        if "belady" in rates:
            text += f", optimum {percent(rates['belady'])}"
        texts.append(text)
    return texts
