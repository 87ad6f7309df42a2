"""Edits of passages: what encoders see when a document is sent again after a change.

A text is a list of words, put together with single spaces. An edit of p percent changes round(p * words / 100) words,
at least one:
  substituted  words at random places, each by a word of another passage
  inserted     a run of words of another passage, put between two words
  deleted      a run of words
  appended     a run of words of another passage, behind the last word
  moved        a run of words, to another place of the text"""

from __future__ import annotations

import random
import re
from pathlib import Path

from tools.data.raw_files import DataError, json_lines
from tools.data.traffic import AS_IT_IS, EDIT_KINDS, Request, Sequence, Traffic, shuffled

PERCENTS = (1, 2, 5, 10, 20)
SMALL_PERCENTS = (1, 1, 2, 2)  # as many edits again: a document that is corrected here and there
PASSAGES = 40  # at most, in each of the two parts
WORDPIECES = 1.07  # for each word or sign of SQuAD's text
SPECIAL_TOKENS = 2
MARGIN = 40  # a text of the model's full length could not take any addition

Words = list[str]
Sizes = tuple[int, ...]


def changed_words(words: int, percent: float) -> int:
    return max(1, round(percent * words / 100))


def _other_word(word: str, others: Words, draw: random.Random) -> str:
    """A word that differs from the given one in more than case."""
    while True:
        other = draw.choice(others)
        if other.lower() != word.lower():
            return other


def edited(words: Words, kind: str, percent: float, others: Words, draw: random.Random) -> Words:
    """The words after an edit; what is new comes from `others`, the text of other passages, which must hold more
    words than are changed, and not all equal."""
    count = changed_words(len(words), percent)
    if kind == "substituted":
        result = list(words)
        for place in draw.sample(range(len(words)), count):
            result[place] = _other_word(words[place], others, draw)
        return result
    if kind in ("inserted", "appended"):
        start = draw.randrange(len(others) - count)
        place = draw.randrange(1, len(words)) if kind == "inserted" else len(words)
        return words[:place] + others[start : start + count] + words[place:]
    start = draw.randrange(len(words) - count)
    run, rest = words[start : start + count], words[:start] + words[start + count :]
    if kind == "deleted":
        return rest
    if kind == "moved":
        place = draw.choice([place for place in range(len(rest) + 1) if place != start])
        return rest[:place] + run + rest[place:]
    raise ValueError(f"no edit is called {kind!r}")


def _pieces(word: str) -> float:
    return WORDPIECES * len(re.findall(r"\w+|[^\w\s]", word))


def passages_of(path: Path, tokens: int) -> list[Words]:
    """SQuAD's passages in the order of the file, cut to about that many tokens; a shorter one is continued by the
    next ones of its article. No two share a paragraph."""
    paragraphs: dict[str, dict[str, None]] = {}
    for row in json_lines(path):
        paragraphs.setdefault(row.text("title"), {})[row.text("context")] = None
    passages: list[Words] = []
    for contexts in paragraphs.values():
        words: Words = []
        length = float(SPECIAL_TOKENS)
        for context in contexts:
            for word in context.split():
                if length < tokens:
                    words.append(word)
                    length += _pieces(word)
            if length >= tokens:
                passages.append(words)
                words, length = [], float(SPECIAL_TOKENS)
    return passages


def read_edits(path: Path, tokens: int, most_tokens: int, percents: Sizes = PERCENTS) -> Traffic:
    """Passages of about `tokens` tokens, each followed by its edits of all kinds and sizes in random order.

    The first passages fill, with their edits, and others ask. What edits put in comes from the same part's passages."""
    passages = shuffled(passages_of(path, min(tokens, most_tokens - MARGIN)))
    half = min(PASSAGES, len(passages) // 2)
    if half < 2:
        raise DataError(f"{path}: {len(passages)} passages of {tokens} tokens in it, too few; fetch the file again")
    requests: list[Request] = []
    for part in (passages[:half], passages[half : 2 * half]):
        for number, words in enumerate(part):
            draw = random.Random(f"{tokens} {' '.join(words)}")
            others = [word for other in part[:number] + part[number + 1 :] for word in other]
            edits = [(kind, percent) for kind in EDIT_KINDS if kind != AS_IT_IS for percent in percents]
            draw.shuffle(edits)
            requests.append(_request(words, AS_IT_IS, 0))
            requests += [_request(edited(words, *edit, others, draw), *edit) for edit in edits]
    return Traffic(requests, fill=len(requests) // 2)


def _request(words: Words, kind: str, percent: float) -> Request:
    text = " ".join(words)
    return Request([Sequence((text, None), (text,), edit_kind=kind, edit_percent=percent)])
