"""What a cache did to the answers of one record: in words, and as one number."""

from __future__ import annotations

from dataclasses import dataclass

from tools.report.formatting import Quality, error_number, measured, percent, plain_ascii, plain_number
from tools.report.records import Row

ROUNDING = 1e-3  # divergence up to which outputs count as equal up to rounding
COUNTED = {
    "decision": "answers that differ",
    "token": "tokens that differ",
    "relative": "distance to the answers, of that between answers",
}
PLAIN_METRICS = {"answer nll": "likelihood of the answers", "spearman": "rank correlation"}
NO_QUALITY = "random weights: no quality"


@dataclass(frozen=True)
class Change:
    """How much of the answers changed, in percent, and what of them was counted."""

    percent: float
    of: str


def change(row: Row) -> Change | None:
    """Takes the most direct measure that the record has. The result is None if it has none."""
    if row.observed is not None:
        return Change(100 * row.observed, COUNTED.get(row.error_metric, "error"))
    share = greedy_share(row)
    if share is not None:
        return Change(100 * share, "tokens that differ")
    quality = row.quality
    if quality and measured(quality.change):
        if quality.share:
            return Change(abs(100 * quality.change), f"points of {quality.metric}")
        if measured(quality.baseline) and quality.baseline:
            return Change(abs(100 * quality.change / quality.baseline), f"change of {quality.metric}")
    distance = row.part("divergence", "mean")
    return Change(100 * distance, "distance of outputs") if measured(distance) else None


def greedy_share(row: Row) -> float | None:
    """The share of the compared tokens that come out otherwise. Ties within rounding do not count."""
    if row.tokens_differing is None:
        return None
    different, tied, compared = row.tokens_differing
    return max(0.0, different - tied) / compared


def loss_percent(row: Row) -> float | None:
    """How much quality was lost: points of accuracy and the like, else percent; below 0 it was gained. Where
    two metrics say it, the larger one."""
    found = [] if row.random else [_loss(quality) for quality in (row.quality, row.second_quality) if quality]
    return max((loss for loss in found if loss is not None), default=None)


def _loss(found: Quality) -> float | None:
    if not measured(found.change):
        return None
    worse = found.change if found.lower_is_better else -found.change
    if found.share:
        return 100 * worse
    return 100 * worse / abs(found.baseline) if measured(found.baseline) and found.baseline else None


def over_budget(row: Row) -> bool:
    """Whether the error that was observed is larger than the budget."""
    return measured(row.budget_epsilon) and row.observed is not None and row.observed > row.budget_epsilon


def answers_text(row: Row) -> str:
    """Says in ASCII what happened to the answers."""
    if row.random:
        distance = row.part("divergence", "mean")
        off = row.similar and measured(distance)
        return f"outputs {_off(distance)} off; {NO_QUALITY}" if off else NO_QUALITY
    parts = [_observed(row), _tokens(row), quality_text(row)]
    text = "; ".join(filter(None, parts))
    return text or _by_divergence(row)


def quality_text(row: Row) -> str:
    """Says how accuracy, F1 or perplexity changed, with the interval. The text is empty where none was measured."""
    first, second = row.quality, row.second_quality
    if first and second and _same(first) and _same(second):
        of_choices = second.metric == f"{first.metric} per byte"
        return (
            f"{first.metric} the same, by sums and per byte"
            if of_choices
            else f"{first.metric} and {second.metric} the same"
        )
    return "; ".join(_change_text(found) for found in (first, second) if found)


def _same(found: Quality) -> bool:
    return found.change is not None and not any(digit in found.signed(found.change) for digit in "123456789")


def _change_text(found: Quality) -> str:
    if found.change is None:
        return plain_ascii(found.levels_text)
    if _same(found):
        return f"{PLAIN_METRICS.get(found.metric, found.metric)} the same"
    if not found.ci95:
        return plain_ascii(f"{found.metric} {found.change_text}")
    bounds = ", ".join(found.signed(end) for end in found.ci95)
    return plain_ascii(f"{found.metric} {found.change_text} [{bounds}]")


def _observed(row: Row) -> str:
    value = row.observed
    if not measured(row.budget_epsilon):
        if value is None or not row.similar:
            return ""
        kinds = {"decision": "of the answers differ", "token": "of the tokens differ"}
        return plain_ascii(f"{percent(value)} {kinds.get(row.error_metric, 'off')}")
    if value is None:
        if not measured(row.promised_error):
            return "error not measured"
        return f"promised {row.promised_error:.3f}, not measured"
    ends = row.observed_ends
    text = f"measured {value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
    return text + (", over the budget" if over_budget(row) else "")


def _tokens(row: Row) -> str:
    share = greedy_share(row)
    if share is None:
        return ""
    compared = row.greedy["compared"]
    if share == 0:
        ties = row.greedy["different"]
        same = f"the same {plain_ascii(plain_number(compared))} tokens"
        return same + (f" but for {ties} tie{'s' if ties > 1 else ''}" if ties else "")
    return (
        f"{plain_ascii(plain_number(round(share * compared)))} of {plain_ascii(plain_number(compared))} tokens differ"
    )


def _off(distance: float) -> str:
    return plain_ascii(percent(distance, 0 if distance >= 0.1 else 1))


def _by_divergence(row: Row) -> str:
    found = row.divergence or {}
    largest = found.get("max") if measured(found.get("max")) else found.get("mean")
    if not measured(largest):
        return "answers not compared"
    if largest == 0:
        return "the same answers, bit by bit"
    if largest <= ROUNDING:
        return f"the same answers up to rounding ({plain_ascii(error_number(largest))})"
    return f"outputs {_off(found['mean'])} off" if measured(found.get("mean")) else "answers not compared"
