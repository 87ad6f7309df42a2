"""Workloads in plain words: what kind of traffic a name stands for, and whose place the written samples take."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SAMPLE = "sample-"
# Beginning of a name, without "sample-" -> words. The first that fits counts.
_WORDS = (
    ("faq", "help-desk questions"),
    ("banking77", "bank customers' questions"),
    ("clinc150-in-scope", "assistant commands"),
    ("clinc150", "assistant commands, some out of scope"),
    ("agnews", "news"),
    ("sst2", "film reviews"),
    ("instruct", "questions behind one instruction"),
    ("small-edits", "lightly edited documents"),
    ("edits", "edited documents"),
    ("documents", "questions about documents"),
    ("squad", "questions about documents"),
    ("passages", "known passages in changing order"),
    ("openbookqa", "multiple-choice questions"),
    ("choices", "multiple-choice questions"),
    ("wikitext", "growing articles"),
    ("articles", "growing articles"),
    ("generate", "text generation"),
    ("chat-edit", "chats with a corrected turn"),
    ("chat", "chat"),
    ("qqp", "pairs of questions"),
    ("stsb", "pairs of sentences"),
    ("sample", "short texts of all kinds"),
)
_TOKENS = ("generate", "instruct", "edits", "small-edits")


@dataclass(frozen=True)
class Traffic:
    """A workload, and what it is like in words."""

    name: str
    words: str

    @property
    def written(self) -> bool:
        """Whether it is this repository's own text and not a real data set."""
        return self.name == "sample" or self.name.startswith(_SAMPLE)


def traffic(workload: str) -> Traffic:
    """Says what a name stands for. An unknown name stands for itself."""
    base = workload.removeprefix(_SAMPLE)
    shots = re.search(r"-(\d+)shot$", base)
    plain = base[: shots.start()] if shots else base
    words = next((words for start, words in _WORDS if re.fullmatch(rf"{start}(-\d+)?", plain)), "")
    known = bool(words)
    words = words or workload
    tokens = re.search(r"-(\d+)$", plain)
    if known and tokens and plain[: tokens.start()] in _TOKENS:
        words += f" ({tokens[1]} tokens)"
    if known and shots:
        words += f" behind {shots[1]} solved ones"
    return Traffic(workload, words)
