"""Statistics and tables of compare.py. No process is started here, so that all of it can be tested by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Times = dict[int, float]  # number of the measurement -> milliseconds; a backend may lack some


def summary(times: Times) -> dict[str, Any]:
    quartiles = np.quantile(list(times.values()), (0.5, 0.25, 0.75)).tolist()
    return {**dict(zip(("median", "p25", "p75"), quartiles, strict=True)), "count": len(times)}


def paired_ratio(times: Times, base: Times) -> float | None:
    """Median of times/base over the measurements that both have: what ran right after each other is compared."""
    both = [number for number in times if number in base]
    return float(np.median([times[number] / base[number] for number in both])) if both else None


class Quality:
    """How far a backend's outputs are from the reference backend's."""

    def __init__(self) -> None:
        self.compared = 0
        self.largest = 0.0  # absolute difference
        self.scale = 0.0  # largest magnitude of the reference
        self.agreed = 0  # outputs whose largest element is the same
        self.finite = True

    def add(self, output: np.ndarray, reference: np.ndarray) -> None:
        if output.shape != reference.shape:
            raise ValueError(f"the output has {output.size} numbers, the reference backend's {reference.size}")
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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


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


def state(backend: dict[str, Any]) -> str:
    return next((word for word in ("failed", "unavailable") if word in backend), "ran")


def label(case: dict[str, Any]) -> str:
    rows = case.get("rows", 1)
    return f"{rows} x {case['tokens']}" if rows > 1 else f"{case['tokens']}"


def column(family: str, case: dict[str, Any]) -> str:
    return {
        "encoder": f"ms, {label(case)} tokens",
        "decoder": f"ms a token at context {label(case)}",
        "encoder-decoder": f"ms, {case.get('target')} tokens of a source of {label(case)}",
    }[family]


def model_rows(model: dict[str, Any], spread: bool) -> list[list[str]]:
    """One row a backend: a column for each case, memory, quality. `spread`: the quartiles too."""
    head = ["backend", *(column(model["family"], case) for case in model["cases"])]
    head += ["MiB", "before loading", "peak", "max diff", *(["argmax"] if model["family"] != "encoder" else [])]
    rows = [head]
    for backend in model["backends"]:
        if state(backend) == "unavailable":
            continue  # named below the table
        if state(backend) == "failed":
            rows.append(
                [backend["title"], *["failed"] * len(model["cases"]), *["-"] * (len(head) - 1 - len(model["cases"]))]
            )
            continue
        cells = []
        for case in model["cases"]:
            times = case["times"].get(backend["backend"])
            cell = milliseconds(times["median"]) if times else "-"
            if times and spread:
                cell += f" ({milliseconds(times['p25'])}-{milliseconds(times['p75'])})"
            cells.append(cell)
        memory = backend["memory"]
        cells += [mib(memory["resident"]), mib(memory["before"]), mib(memory["peak"])]
        rows.append([backend["title"], *cells, *_quality_cells(backend["quality"], backend.get("reference", False))])
    return rows


def ran(model: dict[str, Any], ours: bool) -> list[dict[str, Any]]:
    return [backend for backend in model["backends"] if backend["ours"] == ours and state(backend) == "ran"]


def ratio_rows(model: dict[str, Any], case: dict[str, Any]) -> list[list[str]]:
    """How many times as long the peers take as each backend of ours."""
    ours = [backend["backend"] for backend in ran(model, ours=True)]
    peers = ran(model, ours=False)
    if not ours or not peers:
        return []
    rows = [["time / ours", *(f"{label(case)}: {name}" for name in ours)]]
    for peer in peers:
        ratios = [case["ratios"].get(peer["backend"], {}).get(name) for name in ours]
        rows.append([peer["title"], *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    return rows


def prefill_of(case: dict[str, Any], backend: dict[str, Any]) -> dict[str, Any] | None:
    """One that keeps nothing computes the whole sequence in each step."""
    return case["prefill"].get(backend["backend"]) or (
        None if backend.get("keeps", True) else case["times"].get(backend["backend"])
    )


def prefill_rows(model: dict[str, Any]) -> list[list[str]]:
    cases = [case for case in model["cases"] if case.get("prefill")]
    if not cases:
        return []
    rows = [["prefill", *(f"ms, {case['tokens']} tokens" for case in cases)]]
    for backend in model["backends"]:
        medians = [prefill_of(case, backend) for case in cases] if state(backend) == "ran" else []
        if any(medians):
            rows.append([backend["title"], *(milliseconds(m["median"]) if m else "-" for m in medians)])
    return rows


def source_rows(model: dict[str, Any]) -> list[list[str]]:
    """When the first token is there: of a source that is new, and of one that another target was computed from."""
    cases = [case for case in model["cases"] if "second" in case]
    if not cases:
        return []
    which = ("first", "second")
    rows = [["first token, ms", *(f"{one} request of {label(case)}" for case in cases for one in which)]]
    for backend in [*ran(model, ours=False), *ran(model, ours=True)]:
        found = [case[one].get(backend["backend"]) for case in cases for one in which]
        rows.append([backend["title"], *(milliseconds(one["median"]) if one else "-" for one in found)])
    return rows


def fastest(backends: list[dict[str, Any]], ms: dict[str, float], float32: bool = False) -> dict[str, Any] | None:
    known = [one for one in backends if one["backend"] in ms]
    if float32:
        known = [one for one in known if one.get("precision", "float32") == "float32"]
    return min(known, key=lambda one: ms[one["backend"]], default=None)


BEST = ["best float32 peer", "ours in float32", "ratio", "best peer of any precision", "ours of any precision", "ratio"]


def best_cells(model: dict[str, Any], ms: dict[str, float]) -> list[str]:
    """The fastest peer beside the fastest of ours, in float32 and of all; the ratio is peer / ours."""
    cells = []
    for float32 in (True, False):
        peer, own = (fastest(ran(model, ours=ours), ms, float32) for ours in (False, True))
        cells += [f"{one['title']}: {milliseconds(ms[one['backend']])}" if one else "-" for one in (peer, own)]
        cells.append(f"{ms[peer['backend']] / ms[own['backend']]:.2f}" if peer and own else "-")
    return cells


def best_rows(model: dict[str, Any]) -> list[list[str]]:
    """One row a case, by the medians."""
    names = {"encoder": "{} tokens", "decoder": "step at {}", "encoder-decoder": "target of {}"}
    found: list[tuple[str, dict[str, float]]] = []
    for case in model["cases"]:
        if case.get("prefill"):
            prefill = {one["backend"]: prefill_of(case, one) for one in model["backends"]}
            found.append((f"prefill of {label(case)}", {name: at["median"] for name, at in prefill.items() if at}))
        medians = {name: times["median"] for name, times in case["times"].items()}
        found.append((names[model["family"]].format(label(case)), medians))
    return [["fastest, ms", *BEST], *([name, *best_cells(model, ms)] for name, ms in found)]


def workload_rows(document: dict[str, Any]) -> list[list[str]]:
    """One row a model and workload: the mean of a request, as ours are either known or new."""
    rows = [["workload, ms a request", *BEST, "known to ours"]]
    for model in document["models"]:
        for workload in model.get("workloads", []):
            own = fastest(ran(model, ours=True), workload["means"])
            share = workload["shares"].get(own["backend"]) if own else None
            known = f"{100 * share['reused'] / share['tokens']:.0f} %" if share else "-"
            name = f"{workload['workload']}, {model['model']} ({workload['requests']})"
            rows.append([name, *best_cells(model, workload["means"]), known])
    return rows if len(rows) > 1 else []


def workload_lane_rows(model: dict[str, Any]) -> list[list[str]]:
    """The same of each backend that took part."""
    workloads = model.get("workloads", [])
    rows = [["ms a request", *(workload["workload"] for workload in workloads)]]
    for backend in [*ran(model, ours=False), *ran(model, ours=True)]:
        means = [workload["means"].get(backend["backend"]) for workload in workloads]
        if any(means):
            rows.append([backend["title"], *(milliseconds(mean) if mean else "-" for mean in means)])
    return rows if len(rows) > 1 else []


def notes(model: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know, one line a backend."""
    lines = []
    scale = max((backend["quality"]["scale"] for backend in ran(model, False)), default=0)
    if scale:
        lines.append(f"Largest magnitude of the outputs that differences are of: {scale:.3g}")
    for backend in model["backends"]:
        known = backend.get("failed") or backend.get("note")
        if "unavailable" in backend:
            known = f"not available: {backend['unavailable']}"
        steps = backend.get("steps")
        if known:
            lines.append(f"{backend['title']}: {known}")
        elif backend["ours"] and steps:
            share = 100 * steps["reused"] / steps["tokens"]
            lines.append(f"{backend['title']}: {share:.1f} % of the tokens of its steps were known")
    return lines


def heading(model: dict[str, Any]) -> str:
    kinds = {"encoder": "whole passes", "decoder": "decode steps", "encoder-decoder": "generation"}
    kind = kinds[model["family"]]
    return f"{model['model']} ({kind}; weights: {model['weights']})"


def tables_of(model: dict[str, Any]) -> list[list[list[str]]]:
    ratios = [ratio_rows(model, case) for case in model["cases"]]
    return [prefill_rows(model), source_rows(model), *ratios, best_rows(model), workload_lane_rows(model)]


def _blocks(
    document: dict[str, Any], draw: Callable[[list[list[str]]], list[str]], title: str, spread: bool
) -> list[list[str]]:
    """What a report is made of: headings, tables and notes, each a list of lines."""
    blocks = []
    for model in document["models"]:
        tables = [model_rows(model, spread), *tables_of(model)]
        blocks += [
            [title.format(heading(model))],
            *(draw(rows) for rows in tables if rows),
            *([note] for note in notes(model)),
        ]
    rows = workload_rows(document)
    return [*blocks, *([draw(rows)] if rows else [])]


def _joined(blocks: list[list[str]]) -> str:
    return "\n\n".join("\n".join(lines) for lines in blocks) + "\n"


def text_report(document: dict[str, Any]) -> str:
    return _joined([*_blocks(document, grid, "{}", spread=True), [setting(document)]])


def markdown_report(document: dict[str, Any]) -> str:
    command = f"Command: `{document['command']}`"
    return _joined([[setting(document)], *_blocks(document, markdown, "**{}**", spread=False), [command]])


def setting(document: dict[str, Any]) -> str:
    machine, threads = document["machine"], document["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    isa = f" ({', '.join(machine['isa'])})" if machine.get("isa") else ""
    return (
        f"{machine['cpu']}{isa}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB; "
        f"{threads} {'thread' if threads == 1 else 'threads'} a backend; {versions}"
    )
