"""All charts of the report: matplotlib's SVG, as wide as a phone, in colours that colour-blind readers can tell apart.
Lines differ in marker and dash as well as in colour."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.report.formatting import measured, percent
from tools.report.records import Row
from tools.report.scenarios import PAPER_BAND, Scenario
from tools.report.speed_map import KINDS, LARGEST, SMALLEST, Mark, beside, placed
from tools.report.sweeps import Sweep, interval_bars, of_budget
from tools.report.traces import OPTIMUM

WIDTH = 4.2  # inches: 400 CSS pixels, a phone's width, where text keeps its size
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b08900", "#56b4e9")  # after Okabe and Ito
MARKERS = "os^DvP"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MOST_LINES = len(COLOURS)
MOST_ERRORS = 20
INK = "#123456"  # stands for the page's text colour inside charts
LABEL_WIDTH = 60  # characters that fit beside one another
BAR_ROW = 0.36  # inches: a line of text and what it names

Rates = list[tuple[str, dict[float, Any]]]  # names of lines, and their shares by their places on the axis


# --- what all charts are made with ----------------------------------------------------------------


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.unicode_minus": True}
    )
    for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        plt.rcParams[name] = INK
    return plt


def svg_of(figure: Any, name: str, title: str, titles: dict[str, str] | None = None) -> str:
    """Makes the SVG for the page. `titles` are shown for the parts with these ids."""
    plt = pyplot()
    plt.rcParams["svg.hashsalt"] = name  # ids must differ between the charts of one page
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for part, shown in (titles or {}).items():
        text = text.replace(f'<g id="{part}">', f'<g id="{part}"><title>{html.escape(shown)}</title>')
    text = re.sub(r'(\bid="|href="#(?!line-)|url\(#)', rf"\g<1>{name}-", text)
    return text.replace(
        "<svg ", f'<svg role="img" preserveAspectRatio="xMinYMin" aria-label="{html.escape(title)}" ', 1
    )


def quiet(axes: Any, grid: str = "both") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color=INK, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)


def plain(text: str) -> str:
    return text.replace("$", r"\$")  # no mathematics


def evenly(items: list[Any], count: int) -> list[Any]:
    """Chooses at most `count` of the items, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(
        once.values(), once.keys(), loc="outside lower left", ncols=1, frameon=False, fontsize=8.5, handlelength=3.2
    )


def even_line(axes: Any, place: float, across: bool = True) -> None:
    """Draws the dashed line at which there is neither gain nor loss."""
    (axes.axhline if across else axes.axvline)(place, color=INK, linewidth=1.2, linestyle="--")


def log_axis(axes: Any, values: list[float], text: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=2)
    ticks = evenly(sorted(set(values)), 7)
    axes.set_xticks(ticks, [text(value) for value in ticks])
    axes.minorticks_off()


# --- lines over a setting -------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    label: str
    xs: list[float]
    ys: list[float | None]
    ends: list[tuple[float, float]] | None = None  # of the interval around each y
    optimum: bool = False

    def draw(self, axes: Any, place: int) -> None:
        how: dict[str, Any] = {
            "color": COLOURS[place % MOST_LINES],
            "marker": MARKERS[place % MOST_LINES],
            "linestyle": DASHES[place % MOST_LINES],
            "markersize": 5,
            "linewidth": 1.6,
        }
        if self.optimum:
            how = {"color": INK, "linestyle": (0, (4, 2)), "marker": "x", "linewidth": 1.4}
        label = plain(textwrap.fill(self.label, LABEL_WIDTH - 8))
        axes.plot(self.xs, [math.nan if y is None else y for y in self.ys], label=label, **how)
        if self.ends:
            axes.fill_between(self.xs, *zip(*self.ends, strict=True), color=how["color"], alpha=0.15, linewidth=0)


@dataclass(frozen=True)
class Panel:
    axis: str
    lines: list[Line]
    even: float | None = None  # where there is neither gain nor loss
    from_zero: bool = False


def lines_chart(
    name: str, title: str, panels: list[Panel], axis: str, height: float, dress: Callable[[list[Any]], None]
) -> str:
    """Panels above one another over one axis, with one legend; `dress` does what is special about its axes."""
    figure, grid = pyplot().subplots(
        len(panels),
        1,
        figsize=(WIDTH, height + 0.2 * len(panels[0].lines)),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    several = list(grid[:, 0])
    for axes, panel in zip(several, panels, strict=True):
        quiet(axes)
        for place, line in enumerate(panel.lines):
            line.draw(axes, place)
        axes.set_ylabel(panel.axis)
        if panel.even is not None:
            even_line(axes, panel.even)
    dress(several)
    for axes, panel in zip(several, panels, strict=True):
        if panel.from_zero:
            axes.set_ylim(bottom=0)
    several[-1].set_xlabel(axis)
    legend(figure, several[0])
    return svg_of(figure, name, title)


def speed_and_answers(sweep: Sweep, setting: str) -> tuple[list[Panel], list[float]]:
    """The upper panel shows speed-ups, the lower one what happened to the answers. Returns the setting's values, too."""
    lines = [(label, rows, [row.record[setting] for row in rows]) for label, rows in evenly(sweep.lines, MOST_LINES)]
    speeds = [Line(label, xs, [_measured(row.speedup_vs_nocache) for row in rows]) for label, rows, xs in lines]
    values = [x for _, _, xs in lines for x in xs]
    return [Panel("times as fast as\nwithout a cache", speeds, even=1), _answers(lines)], values


def _answers(lines: list[tuple[str, list[Row], list[float]]]) -> Panel:
    """Answers are judged by their quality where it was measured, else by the distance of outputs."""
    qualities = (row.quality for _, rows, _ in lines for row in rows)
    first = next((quality for quality in qualities if quality and measured(quality.change)), None)
    if first is None:
        distances = [Line("", xs, [(row.divergence or {}).get("mean") for row in rows]) for _, rows, xs in lines]
        return Panel("output divergence, mean\nhigher is worse", distances, from_zero=True)
    drawn = []
    for _, rows, xs in lines:
        same = [q if (q := row.quality) and q.metric == first.metric and measured(q.change) else None for row in rows]
        ends = [q.ci95 if q and q.ci95 else (math.nan, math.nan) for q in same]
        scaled = [(first.scale * low, first.scale * high) for low, high in ends]
        drawn.append(Line("", xs, [q.change * q.scale if q and q.change is not None else None for q in same], scaled))
    unit = f" ({first.unit})" if first.unit else ""
    worse = "higher is worse" if first.lower_is_better else "lower is worse"
    return Panel(f"change of {first.metric}{unit}\n{worse}", drawn, even=0)


def _measured(value: Any) -> float | None:
    return value if measured(value) else None


def _hundredfold(rates: list[Any]) -> list[float | None]:
    return [100 * rate if measured(rate) else None for rate in rates]


def tau_chart(sweep: Sweep, name: str) -> str:
    panels, taus = speed_and_answers(sweep, "threshold")
    low, high = min(*taus, 0.8), max(*taus, 0.95)

    def dress(several: list[Any]) -> None:
        for axes in several:
            axes.axvspan(*PAPER_BAND, color="#f0e442", alpha=0.35, linewidth=0, zorder=0)
        several[0].annotate(
            f"{PAPER_BAND[0]:g} to {PAPER_BAND[1]:g}: the paper's choice",
            (sum(PAPER_BAND) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
        step = 0.05 if high - low < 0.25 else 0.1 if high - low < 0.7 else 0.2
        several[-1].xaxis.set_major_locator(pyplot().MultipleLocator(step))
        several[-1].set_xlim(low - 0.01, high + 0.01)

    title = f"Speed-up and quality over the threshold, {sweep.title}"
    return lines_chart(name, title, panels, "similarity threshold τ", 3.9, dress)


def epsilon_chart(sweep: Sweep, name: str) -> str:
    panels, budgets = speed_and_answers(sweep, "budget_epsilon")
    title = f"Speed-up and quality over the error budget, {sweep.title}"
    axis = "error budget ε (% of sequences, log scale)"
    return lines_chart(
        name, title, panels, axis, 3.9, lambda axes: log_axis(axes[-1], budgets, lambda value: f"{100 * value:g}")
    )


def rates_chart(
    name: str,
    title: str,
    rates: Rates,
    axis: str,
    *,
    shares: str = "hit rate (%)",
    size_text: Callable[[float], str] | None = None,
    bound: Any = None,
    height: float = 2.4,
) -> str:
    """Draws shares over layers, or with `size_text` over sizes, on a logarithmic axis. The optimum (Belady) is black,
    and so is the `bound` that nothing is above."""
    lines = []
    for label, points in rates:
        optimum = label == OPTIMUM
        shown = "belady (optimum)" if optimum else label
        lines.append(Line(shown, list(points), _hundredfold(list(points.values())), optimum=optimum))
    places = [place for line in lines for place in line.xs]

    def dress(several: list[Any]) -> None:
        (axes,) = several
        if measured(bound):
            label = f"nothing evicted ({percent(bound)})"
            axes.axhline(100 * bound, color=INK, linewidth=1, linestyle=":", label=label)
        if size_text:
            log_axis(axes, places, size_text)
        else:
            axes.set_xticks(evenly(range(int(max(places)) + 1), 13))

    return lines_chart(name, title, [Panel(shares, lines, from_zero=True)], axis, height, dress)


# --- promised and observed errors -----------------------------------------------------------------


def error_chart(pairs: list[tuple[Scenario, Row]], name: str) -> str:
    """Each run is a line: the observed error with its interval, and the promised one, as parts of the budget."""
    pairs = pairs[:MOST_ERRORS]
    figure, axes = pyplot().subplots(figsize=(WIDTH, 0.5 + BAR_ROW * (len(pairs) + 1.2)), layout="constrained")
    quiet(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    for place, (scenario, row) in enumerate(pairs):
        label = f"{scenario.name}, ε {row.budget_epsilon:g}" + (", no neighbours" if row.cache_free is True else "")
        _above(axes, place, label)
        _errors_of(axes, place, row)
    even_line(axes, 1, across=False)
    axes.set_ylim(len(pairs) - 0.4, -0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("error as a part of the budget ε (dashed line: all of it)")
    legend(figure, axes)
    return svg_of(figure, name, "Promised and observed error")


def _above(axes: Any, place: float, text: str) -> None:
    """Writes a text at the left edge, above what is at this place."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    how = {"va": "bottom", "linespacing": 1.0, "fontsize": 8, "bbox": box}
    axes.text(0, place - 0.24, plain(text), transform=axes.get_yaxis_transform(), **how).set_in_layout(False)


def _errors_of(axes: Any, place: float, row: Row) -> None:
    promised, observed = of_budget(row)
    if observed is not None:
        below, above = interval_bars(row)
        axes.errorbar(
            [observed],
            [place],
            xerr=[[below], [above]],
            color=COLOURS[0] if observed <= 1 else COLOURS[1],
            marker="o",
            markersize=5,
            elinewidth=1.4,
            capsize=3,
            label="observed, with its 95 % interval",
        )
    if promised is not None:
        how = {"marker": "|", "markersize": 11, "markeredgewidth": 2, "color": COLOURS[2], "linestyle": "none"}
        axes.plot([promised], [place], label="promised by calibration", **how)


# --- speed and answers of all runs ----------------------------------------------------------------


def map_chart(found: list[Mark], wide: bool) -> str:
    """A mark for each run. Numbered ones lead to their lines of the summary; the wide chart names them, as far as there
    is room. Empty without marks."""
    if not found:
        return ""
    figure, axes = pyplot().subplots(figsize=(11.7, 5.2) if wide else (3.96, 4.5), dpi=72)  # a point is a pixel
    sides = (0.045, 0.99, 0.11, 0.97) if wide else (0.12, 0.99, 0.14, 0.97)
    figure.subplots_adjust(**dict(zip(("left", "right", "bottom", "top"), sides, strict=True)))
    _map_axes(axes, [mark.speed for mark in found], wide)

    def centre(mark: Mark) -> tuple[float, float]:
        changed = SMALLEST / 2 if mark.changed < SMALLEST else min(mark.changed, LARGEST)
        x, y = axes.transData.transform((changed, mark.speed))
        return float(x), float(y)

    edges = (axes.bbox.x0, axes.bbox.x1)
    places = placed(found, centre, edges, wide)
    for number, (mark, x, y, radius) in enumerate(places):
        _draw_mark(axes, mark, x, y, radius, f"mark{number}")
    for text, x, y, side in beside(places, edges) if wide else ():
        axes.text(x, y, plain(text), ha=side, va="center", zorder=4, transform=None)
    titles = {f"mark{number}": mark.title for number, (mark, *_) in enumerate(places)}
    return svg_of(figure, "wide" if wide else "narrow", "Speed-up and change of the answers, all runs", titles)


def _map_axes(axes: Any, speeds: list[float], wide: bool) -> None:
    """Speeds go up by powers of two. Changes go right by powers of ten, behind a zone of unchanged answers."""
    quiet(axes)
    axes.spines[:].set_visible(False)
    low, high = min(-0.5, math.log2(min(speeds)) - 0.25), max(1.5, math.log2(max(speeds)) + 0.35)
    axes.set_yscale("log", base=2)
    axes.set_ylim(2**low, 2**high)
    between = (1.0, 1.5) if high - low < 3.5 else (1.0,)
    axes.yaxis.set_major_locator(pyplot().LogLocator(base=2, subs=between, numticks=99))
    axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}x")
    axes.set_xscale("symlog", linthresh=SMALLEST, linscale=1.3 if wide else 2)
    axes.set_xlim(0, (1.3 if wide else 2) * LARGEST)
    zone, ticks = "the same answers" if wide else "same answers", [10.0**power for power in range(-2, 3)]
    axes.set_xticks([SMALLEST / 2, *ticks], [zone, *(f"{tick:g}" for tick in ticks)])
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.xaxis.get_gridlines()[0].set_visible(False)
    axes.axvspan(0, SMALLEST, color="#eef5ef", zorder=0)
    even_line(axes, 1)
    axis = "change of the answers (%, log scale) →" if wide else "change of the answers (%) →"
    axes.set_xlabel(axis, loc="right", weight="bold")
    axes.annotate("↑ times as fast", (0, 1), (4, -4), "axes fraction", "offset points", va="top", weight="bold")


def _draw_mark(axes: Any, mark: Mark, x: float, y: float, radius: float, name: str) -> None:
    """Marks of random weights, whose answers mean nothing, are hollow."""
    colour, hollow = KINDS[mark.kind][1], mark.row.random
    how = {"facecolor": "white" if hollow else colour, "edgecolor": colour if hollow else "white", "gid": name}
    how |= {"url": f"#line-{mark.number}"} if mark.number else {"alpha": 0.75}
    place = {"zorder": 3, "transform": None}
    axes.add_patch(pyplot().Circle((x, y), radius, linewidth=1.3 if hollow else 0.9, **how, **place))
    if mark.number:
        text = {"color": colour if hollow else "white", "fontsize": 8.5, "weight": "bold"}
        axes.text(x, y, str(mark.number), ha="center", va="center_baseline", **text, **place)
