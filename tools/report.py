#!/usr/bin/env python3
"""Turns benchmark results (llmcache-bench --json) into one HTML file that needs nothing beside it."""

from __future__ import annotations

import argparse
import html
import io
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atomic_files import write_atomically

SCHEMA = 1
REQUIRED = ("model", "weights", "workload", "mode", "threads", "requests", "tokens", "latency_ms")
PLAIN = "nocache"
GREY = "#8a8f98"
COLOURS = ("#2f7fc1", "#d9822b", "#2f9e6e", "#a45bb0", "#c94f4f", "#7d8a2e")
INK = "#123456"  # stands for the page's text colour inside charts


class ReportError(RuntimeError):
    """The results cannot be shown; the text says what is wrong and what to do."""


@dataclass
class Row:
    """One record, ready to be shown."""

    record: dict[str, Any]
    label: str = ""  # what distinguishes it from the other records of its model and workload

    @property
    def plain(self) -> bool:
        return self.record["mode"] == PLAIN

    def __getattr__(self, name: str) -> Any:
        return self.record.get(name)


@dataclass
class Model:
    name: str
    weights: str
    rows: list[Row] = field(default_factory=list)
    latency_chart: str = ""

    @property
    def random(self) -> bool:
        return self.weights.startswith("random")


def read_results(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}; run the benchmark first") from error
    except ValueError as error:
        raise ReportError(f"{path}: not valid JSON ({error}); run the benchmark again") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise ReportError(f"{path}: schema {found!r}, this report reads schema {SCHEMA}; run the benchmark again")
    records = document.get("records")
    if not isinstance(records, list):
        raise ReportError(f"{path}: 'records' is not a list; run the benchmark again")
    for number, record in enumerate(records):
        missing = [name for name in REQUIRED if not isinstance(record, dict) or record.get(name) is None]
        if missing or not isinstance(record["latency_ms"], dict):
            raise ReportError(f"{path}: record {number} has no {', '.join(missing) or 'latency_ms object'}")
    return document


def label_rows(rows: list[Row]) -> None:
    """Names each row by fidelity and by whatever else differs between the rows."""
    varied = [name for name in ("threads", "zipf", "shuffle") if len({str(row.record.get(name)) for row in rows}) > 1]
    for row in rows:
        parts = ["no cache" if row.plain else row.fidelity or row.mode]
        parts += [f"{name} {row.record[name]}" for name in varied if row.record.get(name) is not None]
        row.label = ", ".join(parts)


def group(documents: list[dict[str, Any]]) -> list[Model]:
    models: dict[tuple[str, str], Model] = {}
    rows = [Row(record) for document in documents for record in document["records"]]
    label_rows(rows)
    for row in rows:
        key = (row.model, row.weights)
        models.setdefault(key, Model(*key)).rows.append(row)
    for model in models.values():
        workloads = list(dict.fromkeys(row.workload for row in model.rows))
        model.rows.sort(key=lambda row: (workloads.index(row.workload), not row.plain))
    return list(models.values())


# --- charts ---------------------------------------------------------------------------------------


def _figure(rows: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        plt.rcParams[name] = INK
    figure, axes = plt.subplots(figsize=(5.2, 0.6 + 0.25 * max(rows, 2)), layout="constrained")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, name: str, title: str) -> str:
    import matplotlib.pyplot as plt

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


def _colours(models: list[Model]) -> dict[str, str]:
    labels = list(dict.fromkeys(row.label for model in models for row in model.rows if not row.plain))
    return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(labels)}


def speedup_chart(models: list[Model], colours: dict[str, str]) -> str:
    """A bar for each cached run, grouped by model, with a line where nothing is gained."""
    chosen = [
        (model, [row for row in model.rows if row.speedup_vs_nocache is not None and not row.plain]) for model in models
    ]
    chosen = [(model, rows) for model, rows in chosen if rows]
    if not chosen:
        return ""
    figure, axes = _figure(sum(len(rows) + 1 for _, rows in chosen))
    place, ticks, names, headings = 0.0, [], [], []
    several = len(colours) > 1
    for model, rows in chosen:
        headings.append(place)
        ticks.append(place)
        names.append(model.name + (" (random weights)" if model.random else ""))
        for row in rows:
            place += 1
            value = row.speedup_vs_nocache
            axes.barh(place, value, height=0.72, color=colours[row.label])
            beside = 1.0 if 0.7 < value < 1 else value  # not across the dashed line
            axes.annotate(f"{value:.2f}", (beside, place), xytext=(4, 0), textcoords="offset points", va="center")
            ticks.append(place)
            names.append(f"{row.workload} ({row.label})" if several else row.workload)
        place += 1.3
    axes.set_yticks(ticks, names)
    for tick, where in zip(axes.get_yticklabels(), ticks, strict=True):
        if where in headings:
            tick.set_fontweight("bold")
    axes.axvline(1.0, color=INK, linewidth=1.2, linestyle="--")
    axes.set_ylim(place - 0.7, -0.7)
    longest = max(row.speedup_vs_nocache for _, rows in chosen for row in rows)
    axes.set_xlim(0, max(longest, 1.0) * 1.12)
    axes.set_xlabel("times as fast as without a cache")
    return _svg(figure, "speedup", "Speed-up by model and workload")


def latency_chart(model: Model, name: str, colours: dict[str, str]) -> str:
    """p50 as a bar, p95 as a tick at the end of a line."""
    rows = [row for row in model.rows if row.latency_ms.get("p50") is not None]
    if not rows:
        return ""
    figure, axes = _figure(len(rows) + len({row.workload for row in rows}) // 2)
    place, ticks, names, last = 0.0, [], [], rows[0].workload
    for row in rows:
        place += 1.5 if row.workload != last else 1
        last = row.workload
        p50, p95 = row.latency_ms["p50"], row.latency_ms.get("p95")
        axes.barh(place, p50, height=0.72, color=GREY if row.plain else colours[row.label])
        if p95 is not None:
            axes.plot([p50, p95], [place, place], color=INK, linewidth=1)
            axes.plot([p95], [place], marker="|", markersize=9, markeredgewidth=1.6, color=INK)
        ticks.append(place)
        names.append(f"{row.workload} ({row.label})")
    axes.set_yticks(ticks, names)
    axes.set_ylim(place + 0.7, 0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms a request: p50 (bar), p95 (tick)")
    return _svg(figure, name, f"Latency of {model.name}")


# --- numbers --------------------------------------------------------------------------------------


def measured(value: object) -> bool:
    return isinstance(value, int | float)


def plain_number(value: Any, digits: int = 2) -> str:
    """2 or 3 significant places; a dash for what was not measured."""
    if not measured(value):
        return "–"
    grouped = f"{value:,.0f}".replace(",", "\u2009")
    return grouped if isinstance(value, int) or abs(value) >= 100 else f"{value:.{digits}f}"


def error_number(value: Any) -> str:
    return "–" if not measured(value) else "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def percent(value: Any) -> str:
    return f"{100 * value:.1f}\u2009%" if measured(value) else "–"


def mebibytes(value: Any) -> str:
    return f"{value / 2**20:.1f}" if measured(value) and value else "–"


def versions(documents: list[dict[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for document in documents:
        for record in document["records"]:
            for name, value in (record.get("versions") or {}).items():
                if value is not None:
                    found[f"{name} {value}"] = None
    return list(found)


def render(documents: list[dict[str, Any]]) -> str:
    import jinja2

    models = group(documents)
    colours = _colours(models)
    for number, model in enumerate(models):
        model.latency_chart = latency_chart(model, f"latency{number}", colours)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=plain_number, error=error_number, percent=percent, mib=mebibytes)
    return environment.get_template("report_template.html").render(
        models=models,
        documents=documents,
        versions=versions(documents),
        speedup_chart=speedup_chart(models, colours),
        any_random=any(model.random for model in models),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    options = parser.parse_args(arguments)
    try:
        page = render([read_results(path) for path in options.results])
        write_atomically(options.output, lambda path: path.write_text(page, encoding="utf-8"))
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
