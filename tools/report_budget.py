"""The report's charts of runs under an error budget: what was promised and what came, and what it was worth."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from report_charts import chart_by_layer, speed_and_answers
from report_drawing import (
    COLOURS,
    INK,
    LABEL_WIDTH,
    MARKERS,
    MOST_LINES,
    evenly,
    legend,
    log_axis,
    new_panels,
    plain,
    svg_of,
)
from report_numbers import interval, measured
from report_records import Row, Sweep, budget_of, sweeps

SHIFT = 0.06  # between lines, as a part of an octave, so that their intervals stay apart


def budget_sweeps(rows: list[Row], least: int = 2) -> list[Sweep]:
    """Runs that differ in their error budget, `least` of them or more."""
    return sweeps([row for row in rows if budget_of(row)], "budget_epsilon", least)


def error_sweeps(rows: list[Row]) -> list[Sweep]:
    """The same, of runs that promised or observed an error rate."""
    return budget_sweeps([row for row in rows if _promised(row) is not None or _observed(row) is not None], least=1)


def _percent_text(value: float) -> str:
    return f"{100 * value:g}"


def _promised(row: Row) -> float | None:
    return 100 * row.promised_error if measured(row.promised_error) else None


def _observed(row: Row) -> float | None:
    found = (row.observed_error or {}).get("value")
    return 100 * found if measured(found) else None


def interval_bars(row: Row) -> tuple[float, float]:
    """Lengths of the interval's bars below and above the observed error."""
    found = row.observed_error or {}
    bounds, value = interval([found.get("low"), found.get("high")]), _observed(row)
    if bounds is None or value is None:
        return 0.0, 0.0
    return max(0.0, value - 100 * bounds[0]), max(0.0, 100 * bounds[1] - value)


def error_chart(sweep: Sweep, name: str) -> str:
    """Over the budget: the promised error as a bar's end, the observed one as a marker with its interval."""
    lines = evenly(sweep.lines, MOST_LINES)
    figure, (axes,) = new_panels(1, len(lines) + 1, 2.8)
    budgets = [row.budget_epsilon for _, rows in lines for row in rows]
    for place, (label, rows) in enumerate(lines):
        shift = 2 ** (SHIFT * (place - (len(lines) - 1) / 2))
        _draw_errors(axes, place, [row.budget_epsilon * shift for row in rows], rows, label)
    ends = sorted({min(budgets) / 1.15, *budgets, max(budgets) * 1.15})
    axes.plot(ends, [100 * end for end in ends], color=INK, linewidth=1.2, linestyle="--", label="the budget")
    log_axis(axes, budgets, _percent_text)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("error budget ε (% of sequences, log scale)")
    axes.set_ylabel("error (% of sequences)")
    legend(figure, axes)
    return svg_of(figure, name, f"Promised and observed error, {sweep.model}, {sweep.workload}")


def _draw_errors(axes: Any, place: int, xs: list[float], rows: list[Row], label: str) -> None:
    colour = COLOURS[place]
    promised, observed = ([math.nan if y is None else y for y in map(of, rows)] for of in (_promised, _observed))
    axes.plot(xs, promised, color=colour, marker="_", markersize=13, markeredgewidth=2, linestyle=":", linewidth=1)
    axes.errorbar(
        xs,
        observed,
        yerr=list(zip(*map(interval_bars, rows), strict=True)),
        color=colour,
        marker=MARKERS[place],
        markersize=5,
        linestyle="none",
        elinewidth=1.4,
        capsize=3,
        label=plain(textwrap.fill(label, LABEL_WIDTH - 8)),
    )


def epsilon_chart(sweep: Sweep, name: str) -> str:
    figure, _, below, rows = speed_and_answers(sweep, "budget_epsilon")
    log_axis(below, [row.budget_epsilon for row in rows], _percent_text)
    below.set_xlabel("error budget ε (% of sequences, log scale)")
    return svg_of(figure, name, f"Speed-up and quality over the error budget, {sweep.model}, {sweep.workload}")


def exits_chart(sweep: Sweep, name: str) -> str:
    return chart_by_layer(sweep, "exits_by_layer", "answered there (%)", name, "Early exits by layer")
