"""The report's charts of runs under an error budget: what was promised and what came, and what it was worth."""

from __future__ import annotations

from report_charts import chart_by_layer, speed_and_answers
from report_drawing import COLOURS, INK, above_bar, bars, legend, log_axis, svg_of
from report_numbers import interval, measured
from report_records import Row
from report_sweeps import Sweep, sweeps
from scenarios import Scenario

MOST_ERRORS = 20


def budget_sweeps(rows: list[Row]) -> list[Sweep]:
    """Runs that differ in their error budget."""
    return sweeps([row for row in rows if measured(row.budget_epsilon) and row.budget_epsilon > 0], "budget_epsilon")


def with_errors(scenarios: list[Scenario]) -> list[tuple[Scenario, Row]]:
    """Runs under a budget that promised or observed an error."""
    return [
        (scenario, row)
        for scenario in scenarios
        for row in sorted(scenario.rows, key=lambda row: row.budget_epsilon if measured(row.budget_epsilon) else 0)
        if measured(row.budget_epsilon)
        and row.budget_epsilon > 0
        and (_promised(row) is not None or _observed(row) is not None)
    ]


def _percent_text(value: float) -> str:
    return f"{100 * value:g}"


def _promised(row: Row) -> float | None:
    """As a part of the budget."""
    return row.promised_error / row.budget_epsilon if measured(row.promised_error) else None


def _observed(row: Row) -> float | None:
    found = (row.observed_error or {}).get("value")
    return found / row.budget_epsilon if measured(found) else None


def interval_bars(row: Row) -> tuple[float, float]:
    """Lengths of the interval's bars below and above the observed error, as parts of the budget."""
    found = row.observed_error or {}
    bounds, value = interval([found.get("low"), found.get("high")]), _observed(row)
    if bounds is None or value is None:
        return 0.0, 0.0
    return max(0.0, value - bounds[0] / row.budget_epsilon), max(0.0, bounds[1] / row.budget_epsilon - value)


def error_chart(pairs: list[tuple[Scenario, Row]], name: str) -> str:
    """One run a line: the observed error with its interval, and the promised one, as parts of the budget."""
    pairs = pairs[:MOST_ERRORS]
    figure, axes = bars(len(pairs) + 1.2)
    for place, (scenario, row) in enumerate(pairs):
        promised, observed = _promised(row), _observed(row)
        label = f"{scenario.name}, ε {row.budget_epsilon:g}" + (", no neighbours" if row.cache_free is True else "")
        above_bar(axes, place, label, fontsize=8)
        if observed is not None:
            low, high = interval_bars(row)
            axes.errorbar(
                [observed],
                [place],
                xerr=[[low], [high]],
                color=COLOURS[0] if observed <= 1 else COLOURS[1],
                marker="o",
                markersize=5,
                elinewidth=1.4,
                capsize=3,
                label="observed, with its 95 % interval",
            )
        if promised is not None:
            axes.plot(
                [promised],
                [place],
                marker="|",
                markersize=11,
                markeredgewidth=2,
                color=COLOURS[2],
                linestyle="none",
                label="promised by calibration",
            )
    axes.axvline(1, color=INK, linewidth=1.2, linestyle="--")
    axes.set_ylim(len(pairs) - 0.4, -0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("error as a part of the budget ε (dashed line: all of it)")
    legend(figure, axes)
    return svg_of(figure, name, "Promised and observed error")


def epsilon_chart(sweep: Sweep, name: str) -> str:
    figure, _, below, rows = speed_and_answers(sweep, "budget_epsilon")
    log_axis(below, [row.budget_epsilon for row in rows], _percent_text)
    below.set_xlabel("error budget ε (% of sequences, log scale)")
    return svg_of(figure, name, f"Speed-up and quality over the error budget, {sweep.title}")


def exits_chart(sweep: Sweep, name: str) -> str:
    return chart_by_layer(sweep, "exits_by_layer", "answered there (%)", name, "Early exits by layer")
