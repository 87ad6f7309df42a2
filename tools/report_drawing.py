"""What the report's charts are drawn with: matplotlib SVG, as wide as a phone, in colours that colour-blind readers can
tell apart. Lines differ in marker and dash as well as in colour."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable
from typing import Any

WIDTH = 4.2  # inches: 400 CSS pixels, a phone's width, where text keeps its size
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b08900", "#56b4e9")  # after Okabe and Ito
MARKERS = "os^DvP"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MOST_LINES = len(COLOURS)
INK = "#123456"  # stands for the page's text colour inside charts
LABEL_WIDTH = 60  # characters that fit beside one another
BAR_ROW = 0.36  # inches: a line of text and what it names


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


def quiet(axes: Any, grid: str = "both") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color=INK, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)


def svg_of(figure: Any, name: str, title: str) -> str:
    plt = pyplot()
    plt.rcParams["svg.hashsalt"] = name  # ids must differ between the charts of one page
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
    return text.replace(
        "<svg ", f'<svg role="img" preserveAspectRatio="xMinYMin" aria-label="{html.escape(title)}" ', 1
    )


def plain(text: str) -> str:
    return text.replace("$", r"\$")  # no mathematics


def draw(axes: Any, place: int, xs: list[float], ys: list[float | None], label: str = "") -> None:
    axes.plot(
        xs,
        [math.nan if y is None else y for y in ys],
        color=COLOURS[place],
        marker=MARKERS[place],
        linestyle=DASHES[place],
        markersize=5,
        linewidth=1.6,
        label=plain(textwrap.fill(label, LABEL_WIDTH - 8)),
    )


def evenly(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, first and last among them."""
    if len(items) <= count:
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(
        once.values(), once.keys(), loc="outside lower left", ncols=1, frameon=False, fontsize=8.5, handlelength=3.2
    )


def new_panels(count: int, lines: int, height: float) -> tuple[Any, list[Any]]:
    figure, axes = pyplot().subplots(
        count, 1, figsize=(WIDTH, height + 0.2 * lines), layout="constrained", sharex=True, squeeze=False
    )
    for one in axes[:, 0]:
        quiet(one)
    return figure, list(axes[:, 0])


def log_axis(axes: Any, values: list[float], text: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=2)
    ticks = evenly(sorted(set(values)), 7)
    axes.set_xticks(ticks, [text(value) for value in ticks])
    axes.minorticks_off()


def bars(places: float) -> tuple[Any, Any]:
    """For lines below one another, each with its name above."""
    figure, axes = pyplot().subplots(figsize=(WIDTH, 0.5 + BAR_ROW * places), layout="constrained")
    quiet(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    return figure, axes


def above_bar(axes: Any, place: float, text: str, **how: Any) -> None:
    """Text at the left edge, above what is at this place."""
    how = {"va": "bottom", "linespacing": 1.0, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.4}, **how}
    axes.text(0, place - 0.24, plain(text), transform=axes.get_yaxis_transform(), **how).set_in_layout(False)
