"""Statistics and tables of compare.py. No process is started here, so that all of it can be tested by itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Times = dict[int, float]  # number of the measurement -> milliseconds; a lane may lack some


def quantile(values: list[float], share: float) -> float:
    """Linear between the neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(times: Times) -> dict[str, Any]:
    values = list(times.values())
    return {
        "median": quantile(values, 0.5),
        "p25": quantile(values, 0.25),
        "p75": quantile(values, 0.75),
        "count": len(values),
    }


def paired_ratio(times: Times, base: Times) -> float | None:
    """Median of times/base over the measurements that both have: what ran right after each other is compared."""
    both = [number for number in times if number in base]
    return quantile([times[number] / base[number] for number in both], 0.5) if both else None


class Quality:
    """How far a lane's outputs are from the reference lane's."""

    def __init__(self) -> None:
        self.compared = 0
        self.largest = 0.0  # absolute difference
        self.scale = 0.0  # largest magnitude of the reference
        self.agreed = 0  # outputs whose largest element is the same
        self.finite = True

    def add(self, output: np.ndarray, reference: np.ndarray) -> None:
        if output.shape != reference.shape:
            raise ValueError(f"the output has {output.size} numbers, the reference lane's {reference.size}")
        self.compared += 1
        self.finite = self.finite and bool(np.isfinite(output).all())
        self.largest = max(self.largest, float(np.abs(output - reference).max()))
        self.scale = max(self.scale, float(np.abs(reference).max()))
        self.agreed += int(output.argmax() == reference.argmax())

    def record(self, argmax: bool) -> dict[str, Any]:
        record = {"outputs": self.compared, "max_difference": self.largest, "scale": self.scale}
        if argmax:
            record["argmax_agreement"] = self.agreed / self.compared if self.compared else None
        return record

    def wrong(self, tolerance: float) -> bool:
        """True also where there is nothing to compare, or NaN."""
        return not (self.compared and self.finite and self.largest <= tolerance * self.scale)


def mib(kilobytes: int | None) -> str:
    return "-" if kilobytes is None else f"{kilobytes / 1024:,.0f}"


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def grid(rows: list[list[str]]) -> list[str]:
    """Columns of equal width; the first is text, the others are numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _quality_cells(quality: dict[str, Any], reference: bool) -> list[str]:
    agreement = [f"{100 * quality['argmax_agreement']:.0f} %"] if quality.get("argmax_agreement") is not None else []
    exact = reference or quality["max_difference"] == 0
    return ["0" if exact else f"{quality['max_difference']:.1e}", *agreement]


def model_rows(model: dict[str, Any], spread: bool) -> list[list[str]]:
    """One row a lane: a column for each case, memory, quality. `spread`: the quartiles too."""
    decoder = model["family"] == "decoder"
    what = "ms a token at context" if decoder else "ms,"
    head = ["lane", *(f"{what} {case['tokens']}" + ("" if decoder else " tokens") for case in model["cases"])]
    head += ["MiB", "before loading", "peak", "max diff", *(["argmax"] if decoder else [])]
    rows = [head]
    for lane in model["lanes"]:
        if "failed" in lane:
            rows.append(
                [lane["title"], *["failed"] * len(model["cases"]), *["-"] * (len(head) - 1 - len(model["cases"]))]
            )
            continue
        cells = []
        for case in model["cases"]:
            times = case["times"].get(lane["lane"])
            cell = milliseconds(times["median"]) if times else "-"
            if times and spread:
                cell += f" ({milliseconds(times['p25'])}-{milliseconds(times['p75'])})"
            cells.append(cell)
        memory = lane["memory"]
        cells += [mib(memory["resident"]), mib(memory["before"]), mib(memory["peak"])]
        rows.append([lane["title"], *cells, *_quality_cells(lane["quality"], lane.get("reference", False))])
    return rows


def ratio_rows(model: dict[str, Any]) -> list[list[str]]:
    """How many times as long the peers take as each lane of ours, case by case."""
    ours = [lane for lane in model["lanes"] if lane["ours"] and "failed" not in lane]
    peers = [lane for lane in model["lanes"] if not lane["ours"] and "failed" not in lane]
    columns = [(case, lane) for case in model["cases"] for lane in ours]
    if not columns or not peers:
        return []
    rows = [["time / ours", *(f"{case['tokens']}: {lane['lane']}" for case, lane in columns)]]
    for peer in peers:
        ratios = [case["ratios"].get(peer["lane"], {}).get(lane["lane"]) for case, lane in columns]
        rows.append([peer["title"], *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    return rows


def prefill_rows(model: dict[str, Any]) -> list[list[str]]:
    cases = [case for case in model["cases"] if case.get("prefill")]
    if not cases:
        return []
    rows = [["prefill", *(f"ms, {case['tokens']} tokens" for case in cases)]]
    for lane in model["lanes"]:
        medians = [case["prefill"].get(lane["lane"]) for case in cases]
        if any(medians):
            rows.append([lane["title"], *(milliseconds(m["median"]) if m else "-" for m in medians)])
    return rows


def notes(model: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know, one line a lane."""
    lines = []
    for lane in model["lanes"]:
        known = lane.get("failed") or lane.get("note")
        steps = lane.get("steps")
        if known:
            lines.append(f"{lane['title']}: {known}")
        elif lane["ours"] and steps:
            share = 100 * steps["reused"] / steps["tokens"]
            lines.append(f"{lane['title']}: {share:.1f} % of the tokens of its steps were known")
    return lines


def heading(model: dict[str, Any]) -> str:
    kind = "decode steps" if model["family"] == "decoder" else "whole passes"
    return f"{model['model']} ({kind}; weights: {model['weights']})"


def text_report(document: dict[str, Any]) -> str:
    lines = []
    for model in document["models"]:
        lines += [heading(model), "", *grid(model_rows(model, spread=True)), ""]
        for rows in (ratio_rows(model), prefill_rows(model)):
            lines += [*grid(rows), ""] if rows else []
        lines += [*notes(model), ""]
    lines.append(setting(document))
    return "\n".join(lines) + "\n"


def markdown_report(document: dict[str, Any]) -> str:
    lines = [setting(document), ""]
    for model in document["models"]:
        lines += [f"**{heading(model)}**", "", *markdown(model_rows(model, spread=False)), ""]
        rows = prefill_rows(model)
        lines += [*markdown(rows), ""] if rows else []
        for note in notes(model):
            lines += [note, ""]
    lines.append(f"Command: `{document['command']}`")
    return "\n".join(lines) + "\n"


def setting(document: dict[str, Any]) -> str:
    machine, threads = document["machine"], document["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB; "
        f"{threads} {'thread' if threads == 1 else 'threads'} a lane; {versions}"
    )
