"""At most a dozen lines in words on what was measured, the most telling first. In ASCII, as they go to terminals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.report.formatting import counted, measured, percent, plain_ascii, plain_number, times
from tools.report.outcomes import answers_text, loss_percent, over_budget
from tools.report.paper import DATA_SETS, MOST_LOSS, faithful_row, family_of, loss_text, lossless_rows, span, taus
from tools.report.reasons import FEW, reason, short_reason
from tools.report.records import Row
from tools.report.scenarios import KV_CACHE, NO_CACHE, Ratio, Scenario, by_model, fair, ratios
from tools.report.traces import best_policies

MOST_LINES = 12
PACKED = {
    "packed-fp16": "weights packed in half precision",
    "packed-bf16": "weights packed in bfloat16",
    "packed-int8": "weights packed in 8 bits",
    "packed-fp32": "packed weights",
}


@dataclass
class Line:
    subject: str
    text: str
    rows: list[Row] = field(default_factory=list)  # those it speaks of
    value: float = 1.0  # how many times as fast, for the order

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" if self.subject else self.text


def summary_lines(scenarios: list[Scenario], traces: list[dict[str, Any]] | None = None) -> list[Line]:
    """Gains on trained weights; the paper's cells; other gains; losses with their reasons; what has no comparison."""
    of_paper = {id(one) for one in scenarios if family_of(one) and (one.paper or lossless_rows([one]))}
    rest = [one for one in scenarios if id(one) not in of_paper]
    compared = [(one, ratio) for one in rest if one.chosen and (ratio := fair(one.chosen))]
    gains = [(one, ratio) for one, ratio in compared if not ratio.loses]
    gains.sort(key=lambda pair: -_weight(pair[1]))
    middle = [_family_line(several) for several in by_model(one for one in scenarios if id(one) in of_paper)]
    losses = [_loss_line(several) for several in by_model(one for one, ratio in compared if ratio.loses)]
    trained, random = ([_gain_line(*pair) for pair in gains if pair[0].random == made] for made in (False, True))
    alone = [line for one in rest if not one.chosen and (line := _lonely_line(one))]
    lines = _fitting(trained, middle, random, losses, alone)
    lines += [line for one in traces or [] if (line := _trace_line(one))]
    return lines[:MOST_LINES]


def _weight(ratio: Ratio) -> float:
    """Faster than no cache is easily said of a decoder, so that it counts half."""
    decoder = ratio.against == NO_CACHE and ratio.of
    return math.log(ratio.value) * (0.5 if decoder else 1.0)


def _fitting(
    trained: list[Line], middle: list[Line], random: list[Line], losses: list[Line], alone: list[Line]
) -> list[Line]:
    """All of them, or as many as fit; the least gains go first, and a line says how many they were."""
    gains, losses = [*trained, *random], [*losses, *alone]
    if len(gains) + len(middle) + len(losses) <= MOST_LINES:
        return [*trained, *middle, *random, *losses]
    losses = losses[: MOST_LINES - len(middle) - 2]
    room = max(1, MOST_LINES - len(middle) - len(losses) - 1)
    left = gains[room:]
    more = [Line("", f"and {len(left)} more, {span([line.value for line in left])}: see the report")] if left else []
    return [*gains[: min(room, len(trained))], *middle, *gains[len(trained) : room], *losses, *more]


def line_numbers(lines: list[Line]) -> dict[int, int]:
    """The number of the line that speaks of a row, by the row's id()."""
    return {id(row): number for number, line in enumerate(lines, start=1) for row in line.rows}


def setting_words(row: Row) -> str:
    """How the run was made, as far as it is not the library's default."""
    texts = []
    if row.kind == "budget" and measured(row.budget_epsilon):
        of = " of the distance between outputs" if row.budget_metric == "relative" else ""
        texts.append(f"within an error budget of {row.budget_epsilon:g}{of}")
    elif row.kind == "threshold":
        texts.append("in the paper's mode" + (f" at tau {row.threshold:.3g}" if measured(row.threshold) else ""))
    elif row.kind == "semantic-cache":
        texts.append(
            "with a cache of whole answers" + (f" at tau {row.threshold:.3g}" if measured(row.threshold) else "")
        )
    elif row.kind == "identical":
        texts.append("by word-for-word repeats alone")
    elif row.kind == "lossless" and not row.decodes:
        texts.append("lossless")
    if row.weights_held in PACKED:
        texts.append(PACKED[row.weights_held] if not texts else f"with {PACKED[row.weights_held]}")
    return " ".join(texts)


def _gain_line(scenario: Scenario, ratio: Ratio) -> Line:
    row = scenario.chosen
    assert row is not None
    setting = setting_words(row)
    glue = ", " if setting.startswith(tuple(PACKED.values())) else " "
    text = ratio.text + (glue + setting if setting else "")
    asides = [_later_turns(row), *(one.text for one in ratios(row)[1:])]
    if why := reason(row):
        asides[-1] += f" ({why})"
    text = ", ".join([text, *filter(None, asides)])
    # A measured error belongs to its budget, other answers stand for themselves.
    text += (", " if measured(row.budget_epsilon) else "; ") + answers_text(row)
    budget = scenario.budget
    if budget and budget is not row and over_budget(budget):
        text += f"; a budget of {budget.budget_epsilon:g} was not kept (measured {budget.observed:.3f})"
    return Line(scenario.name, plain_ascii(text + _context(scenario, row)), [row], ratio.value)


def _later_turns(row: Row) -> str:
    found = (row.later_turns or {}).get("speedup_vs_kvcache")
    return f"{times(found)} from the second turn on" if measured(found) and row.mode != KV_CACHE else ""


def _context(scenario: Scenario, row: Row) -> str:
    """Says in brackets what of the traffic made that possible."""
    found = []
    if measured(row.tokens_reused_fraction) and row.tokens_reused_fraction >= 0.01:
        found.append(f"{percent(row.tokens_reused_fraction, 0)} of the prompts known before")
    elif not row.decodes and measured(scenario.repeats) and scenario.repeats >= 0.01:
        texts = "questions" if "questions" in scenario.words else "texts"
        found.append(f"{percent(scenario.repeats, 0)} of the {texts} repeat word for word")
    if measured(row.requests) and row.requests < FEW:
        found.append(f"only {counted(row.requests, 'request')}")
    return f" ({', '.join(found)})" if found else ""


def _family_line(scenarios: list[Scenario]) -> Line:
    """The paper's cells of one model: lossless, and in the paper's mode."""
    names = [name for name, own in DATA_SETS.items() if any(one.workload in own for one in scenarios)]
    like = "like " if any(one.written for one in scenarios) else ""
    papers = [row for one in scenarios if (row := one.paper)]
    lossless = lossless_rows(scenarios)
    parts = []
    if lossless:
        parts.append(", ".join(filter(None, (_lossless_text(scenarios), _packed_text(scenarios)))))
    if papers:
        values = [row.speedup_vs_nocache for row in papers]
        parts.append(
            f"the paper's mode {span(values)} at tau {taus(papers)}, {loss_text(papers)}{_faithful(scenarios)}"
        )
    else:
        parts.append(answers_text(lossless[0]))
    few = min((row.requests for one in scenarios for row in one.rows if measured(row.requests)), default=FEW)
    text = "; ".join(parts) + (f" (some from {counted(few, 'request')} only)" if few < FEW else "")
    subject = f"{scenarios[0].model}, the paper's cells ({like}{', '.join(names)})"
    return Line(subject, plain_ascii(text), papers or lossless)


def _faithful(scenarios: list[Scenario]) -> str:
    """What the paper's mode gains where it loses as little as the paper says."""
    judged = [one for one in scenarios if any(loss_percent(row) is not None for row in one.paper_rows)]
    if not judged:
        return ""
    kept = [row for one in judged if (row := faithful_row(one))]
    if not kept:
        return f"; under {MOST_LOSS} % loss at no tau that was tried"
    where = "" if len(kept) == len(judged) else f", in {len(kept)} of {len(judged)} cells"
    return f"; with under {MOST_LOSS} % loss {span([row.speedup_vs_nocache for row in kept])} (tau {taus(kept)}{where})"


def _lossless_text(scenarios: list[Scenario]) -> str:
    rows = lossless_rows(scenarios)
    text = f"{span([row.speedup_vs_nocache for row in rows])} lossless{_why(scenarios)}"
    against = [ratio.value for row in rows for ratio in ratios(row) if ratio.against == KV_CACHE]
    return text + (f" ({span(against)} against a KV cache per request)" if against else "")


def _packed_text(scenarios: list[Scenario]) -> str:
    """Says what weights in another format gain, where they do."""
    for held, words in PACKED.items():
        pairs = [
            (row, one.lossless)
            for one in scenarios
            for row in one.rows
            if row.exact and row.weights_held == held and one.lossless and measured(row.speedup_vs_nocache)
        ]
        if pairs and all(row.speedup_vs_nocache > plain.speedup_vs_nocache for row, plain in pairs):
            return f"{span([row.speedup_vs_nocache for row, _ in pairs])} with {words}"
    return ""


def _why(scenarios: list[Scenario]) -> str:
    texts = dict.fromkeys(short_reason(one.lossless) for one in scenarios if one.lossless)
    text = "; ".join(filter(None, texts))
    return f" ({text})" if text else ""


def _loss_line(scenarios: list[Scenario]) -> Line:
    texts, rows = [], []
    for one in scenarios:
        row = one.chosen
        assert row is not None
        ratio = fair(row)
        assert ratio is not None
        setting = setting_words(row)
        words = f"{one.words} " if len(scenarios) > 1 else ""
        why = reason(row) if len(scenarios) == 1 else short_reason(row)
        texts.append(f"{words}{ratio.text}{' ' + setting if setting else ''} ({why})")
        rows.append(row)
    answers = list(dict.fromkeys(answers_text(row) for row in rows))
    subject = scenarios[0].name if len(scenarios) == 1 else scenarios[0].model
    text = ", ".join(texts) + (f"; {answers[0]}" if len(answers) == 1 else "")
    return Line(subject, plain_ascii(text), rows, min(fair(row).value for row in rows if fair(row)))


def _lonely_line(scenario: Scenario) -> Line | None:
    for row in scenario.rows:
        mean = (row.latency_ms or {}).get("mean")
        if measured(mean):
            text = f"{plain_number(float(mean))} ms a request ({row.kind}); nothing to compare it with"
            return Line(scenario.name, plain_ascii(text), [row])
    return None


def _trace_line(document: dict[str, Any]) -> Line | None:
    texts = best_policies(document)
    name = Path(str(document["trace"])).stem
    return Line(f"eviction on {name}", plain_ascii(texts[len(texts) // 2])) if texts else None
