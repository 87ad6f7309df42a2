"""The report's charts of runs over thresholds, layers and capacities, and of eviction policies on traces."""

from __future__ import annotations

import math
from typing import Any

from report_drawing import COLOURS, INK, MOST_LINES, draw, evenly, legend, log_axis, new_panels, pyplot, svg_of
from report_numbers import measured, percent, plain_number
from report_records import Row
from report_sweeps import Sweep
from scenarios import PAPER_BAND
from traces import OPTIMUM, lines_of


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
    return svg_of(figure, name, f"Speed-up and quality over the threshold, {sweep.title}")


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
    return svg_of(figure, name, f"{title}, {sweep.title}")


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
    return svg_of(figure, name, f"Hit rate over capacity, {sweep.title}")


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
        f"doubling adds {100 * (y1 - y0) / (x1 - x0):.1f} points at the small end, "
        f"{100 * (y3 - y2) / (x3 - x2):.1f} at the large end"
    )


def eviction_chart(document: dict[str, Any], name: str) -> str:
    """Hit rate of each policy over the capacity, with the optimum (Belady) in black."""
    lines = lines_of(document)
    if not lines:
        return ""
    figure, (axes,) = new_panels(1, len(lines) + 1, 2.8)
    place = 0
    sizes: list[float] = []
    for policy, points in lines.items():
        xs, ys = list(points), [100 * rate for rate in points.values()]
        sizes += xs
        if policy == OPTIMUM:
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
