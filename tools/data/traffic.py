"""Requests as text: what every reader of raw data makes.

A request is a batch of sequences. For an encoder a sequence is (first text, second text or None), which
its tokenizer joins with its own special tokens; for a decoder it is a list of pieces that are tokenised
one by one and put together, so that a shared beginning is shared token by token. What a workload's task
needs to be scored (classes, gold answers, pairs) stands beside the text. Where text is generated, the sequences
of a request are the user's parts of one conversation: the model's answers come between them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tools.data.raw_files import DataError

MAX_TOKENS = 512
# Pieces, or with ANSWER the beginning of one, that each tokenizer writes in its own way, see tokenization.py.
SYSTEM, USER, ASSISTANT, NEXT_USER = "\0system", "\0user", "\0assistant", "\0next user"
ANSWER = "\0answer "
INSTRUCTED = "\0instructed "  # the same of a system prompt of the conversation's own
AS_IT_IS = "none"
EDIT_KINDS = (AS_IT_IS, "substituted", "inserted", "deleted", "appended", "moved")
T = TypeVar("T")


@dataclass(frozen=True)
class Sequence:
    pair: tuple[str, str | None]  # for encoders
    pieces: tuple[str, ...]  # for decoders
    shorten: int = -1  # the piece that gives way when the sequence is longer than MAX_TOKENS
    scored: int | None = None  # the piece whose tokens' log-likelihood is scored (decoders)
    label: int | None = None  # class (classification), or 1 for the right choice and 0 for the others
    pool_from: int | None = None  # encoders: the output is read at the tokens of the first text from this character on
    edit_kind: str | None = None  # one of EDIT_KINDS: how it differs from the last sequence that is AS_IT_IS
    edit_percent: float | None = None  # share of its words that were changed
    answers: tuple[str, ...] | None = None  # encoders: all gold answers by SQuAD's rule, none: it has no answer


@dataclass(frozen=True)
class Request:
    sequences: list[Sequence]
    group: int | None = None  # task answer: number of the gold answer, -1 unanswerable
    partner: int | None = None  # task duplicates: the fill request that the pair names, -1 in the fill part
    pair_label: int | None = None  # task duplicates: 1 duplicate, 0 not, -1 in the fill part
    pair_score: float | None = None  # task similarity: gold score of the two sequences


@dataclass(frozen=True)
class Traffic:
    requests: list[Request]
    fill: int = 0  # the first that many requests fill the cache and are not measured
    label_names: list[str] = field(default_factory=list)


def some(requests: list[Request], path: Path) -> list[Request]:
    if not requests:
        raise DataError(f"{path}: no record in it; fetch the file again")
    return requests


def shuffled(items: Iterable[T]) -> list[T]:
    items = list(items)
    random.Random(0).shuffle(items)
    return items


def batches(sequences: list[Sequence], size: int) -> list[Request]:
    return [Request(sequences[start : start + size]) for start in range(0, len(sequences), size)]


def interleaved(first: list[T], second: list[T]) -> list[T]:
    """Both lists as one: each in its own order, and each spread evenly over the whole."""
    placed = [((index + 0.5) / len(items), item) for items in (first, second) for index, item in enumerate(items)]
    return [item for _, item in sorted(placed, key=lambda entry: entry[0])]


def single(text: str, label: int | None = None) -> Sequence:
    return Sequence((text, None), (text,), label=label)
