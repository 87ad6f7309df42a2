"""Why a run is slower than what it is compared with: its own note, or what its figures tell."""

from __future__ import annotations

from tools.report.formatting import counted, measured, percent, plain_ascii
from tools.report.records import Row
from tools.report.scenarios import lost

SHORT = 32  # tokens a text, below which the cost of a call shows
FEW = 10  # requests that say little
NOTHING = 0.02  # share of what was asked


def reason(row: Row) -> str:
    """Says why a run is slower, in ASCII and without a full stop. The text is empty where nothing is lost."""
    if row.plain or lost(row) is None:
        return ""
    text = row.note_text or _of_figures(row)
    if not row.note_text and measured(row.requests) and row.requests < FEW:
        text += f"; only {counted(row.requests, 'request')}"
    return plain_ascii(text)


def short_reason(row: Row) -> str:
    """Leaves out the figures that a note has behind a colon."""
    return reason(row).partition(": ")[0]


def _of_figures(row: Row) -> str:
    if row.similar:
        return _of_similarity(row)
    if row.mode == "kvcache":
        return "what it keeps inside a request is not asked for again"
    if row.kind == "budget" and _reused(row) < NOTHING:
        return "calibration allowed hardly any reuse, so that nearly all is computed"
    slower = _slower_for_its_weights(row)
    if slower:
        return slower
    tokens = row.tokens / row.sequences if measured(row.tokens) and measured(row.sequences) and row.sequences else None
    short = bool(tokens) and tokens < SHORT and not row.decodes
    saved = _saved(row)
    if saved is not None and saved < NOTHING:
        if row.decodes:
            return "no text begins like an earlier one, so there is nothing to save"
        if short:
            return f"texts of {tokens:.0f} tokens, none of them known: the cost of a call shows"
        return "no text repeats or is padded, so there is nothing to save"
    if short:
        return f"texts of {tokens:.0f} tokens: the cost of a call shows"
    if measured(row.speedup_median) and row.speedup_median >= 1:
        return "half of the requests gain, but a few slow ones decide the sum"
    return "finding and keeping cost more than was saved"


def _of_similarity(row: Row) -> str:
    if measured(row.hit_rate) and row.hit_rate < 0.2:
        return f"only {percent(row.hit_rate)} found a text that is similar enough, and all had to look"
    return "looking costs more than the hits save"


def _reused(row: Row) -> float:
    return sum(share for share in (row.share_reused or {}).values() if measured(share))


def _saved(row: Row) -> float | None:
    """Share of what the model alone computes that was not computed: known tokens and texts, and padding."""
    found = [value for value in (row.tokens_reused_fraction, row.tokens_shared_fraction) if measured(value)]
    if found:
        return sum(found)
    if not measured(row.tokens_computed_fraction):
        return row.hit_rate if measured(row.hit_rate) else None
    plain = [other.tokens_computed_fraction for other in row.beside if other.plain]
    whole = max((value for value in plain if measured(value)), default=1.0)
    return 1 - row.tokens_computed_fraction / whole if whole > 0 else None


def _slower_for_its_weights(row: Row) -> str:
    if row.weights_held in (None, "as-loaded"):
        return ""
    same = [other for other in row.beside if other.kind == row.kind and other.weights_held == "as-loaded"]
    speeds = [other.speedup_vs_nocache for other in same if measured(other.speedup_vs_nocache)]
    if not speeds or not measured(row.speedup_vs_nocache) or row.speedup_vs_nocache >= max(speeds):
        return ""
    return "packed weights are slower here than weights as loaded"
