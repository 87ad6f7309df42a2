#!/usr/bin/env python3
"""Draws the panels of a Grafana dashboard as one picture, from what a Prometheus server answers to their queries.

Example: tools/report/dashboard.py docs/metrics/dashboard.json --prometheus http://127.0.0.1:9090 -o dashboard.png

Only panels of the type "timeseries" are drawn, with their queries, legends, units and stacks."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

COLUMNS = 2
UNITS = {"short": "", "percentunit": " %", "s": " ms", "bytes": " MiB"}
SCALES = {"percentunit": 100.0, "s": 1000.0, "bytes": 1 / 2**20}


def expand(query: str, interval: str) -> str:
    """With values in place of Grafana's variables: all of them for those of the dashboard."""
    return re.sub(r"\$\{?\w+\}?", ".*", query.replace("$__rate_interval", interval))


def legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), template)


def query_range(server: str, query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
    asked = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": step})
    with urllib.request.urlopen(f"{server}/api/v1/query_range?{asked}", timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def lines_of(panel: dict[str, Any], ask: Any, interval: str) -> list[tuple[str, dict[float, float]]]:
    """Name and values by time of each series; without what is not a number."""
    lines = []
    for target in panel["targets"]:
        for series in ask(expand(target["expr"], interval)):
            points = {float(at): float(value) for at, value in series["values"]}
            numbers = {at: value for at, value in points.items() if math.isfinite(value)}
            if numbers:
                lines.append((legend(target["legendFormat"], series["metric"]), numbers))
    return lines


def draw_panel(axes: Any, panel: dict[str, Any], lines: list[tuple[str, dict[float, float]]], start: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    scale = SCALES.get(defaults["unit"], 1.0)
    times = sorted({at for _, points in lines for at in points})
    minutes = [(at - start) / 60 for at in times]
    if lines and defaults["custom"]["stacking"]["mode"] == "normal":
        values = [[scale * points.get(at, 0.0) for at in times] for _, points in lines]
        axes.stackplot(minutes, values, labels=[name for name, _ in lines], alpha=0.7)
    else:
        for name, points in lines:
            axes.plot(minutes, [scale * points.get(at, math.nan) for at in times], label=name, linewidth=1.2)
    axes.set_title(panel["title"] + UNITS.get(defaults["unit"], "").replace(" ", ", "), loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=7, loc="upper left", framealpha=0.6)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="grey")


def draw(dashboard: dict[str, Any], ask: Any, start: float, interval: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"]
    rows = math.ceil(len(panels) / COLUMNS)
    figure, all_axes = pyplot.subplots(rows, COLUMNS, figsize=(12, 2.4 * rows), squeeze=False, layout="constrained")
    for axes, panel in zip(all_axes.flat, panels, strict=False):
        draw_panel(axes, panel, lines_of(panel, ask, interval), start)
    for axes in list(all_axes.flat)[len(panels) :]:
        axes.axis("off")
    for axes in all_axes[-1]:
        axes.set_xlabel("minutes", fontsize=8)
    figure.savefig(out, dpi=80)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("dashboard", type=Path, help="JSON of the dashboard")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="address of the server")
    parser.add_argument("--minutes", type=float, default=10, help="how far back from now")
    parser.add_argument("--step", type=float, default=5, help="seconds between points")
    parser.add_argument("--interval", default="30s", help="over which rates are taken; four scrapes or more")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args(arguments)
    end = time.time()
    start = end - 60 * args.minutes

    def ask(query: str) -> list[dict[str, Any]]:
        return query_range(args.prometheus, query, start, end, args.step)

    try:
        draw(json.loads(args.dashboard.read_text(encoding="utf-8")), ask, start, args.interval, args.out)
    except OSError as error:
        print(f"dashboard.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
