"""Readers of the raw data sets: from files to requests (traffic.py)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from tools.data.edits import read_edits
from tools.data.raw_files import DataError, Row, bad_line, json_lines, lines, number_of, tsv_rows
from tools.data.squad_rule import normal_answer
from tools.data.traffic import (
    ASSISTANT,
    INSTRUCTED,
    MAX_TOKENS,
    NEXT_USER,
    SYSTEM,
    USER,
    Request,
    Sequence,
    Traffic,
    batches,
    interleaved,
    shuffled,
    single,
    some,
)

T = TypeVar("T")


def _question(passage: str, question: str, answer: str | None = None) -> Sequence:
    pieces = (passage, f"\nQuestion: {question}\nAnswer:")
    if answer is None:
        return Sequence((question, passage), pieces, shorten=0)
    return Sequence((question, passage), (*pieces, f" {answer}"), shorten=0, scored=2)


def _paragraphs(path: Path) -> Iterator[list[str]]:
    """Yields each article of WikiText once for each of its paragraphs: the paragraphs up to and with that one."""
    heading = re.compile(r" (?P<level>=( =)*) [^=].* (?P=level) ")
    pieces: list[str] = []
    waiting = ""  # headings go with the paragraph after them
    for number, line in lines(path):
        if "\0" in line:
            raise bad_line(path, number, "a zero byte", "text")
        if not line.strip():
            continue
        match = heading.fullmatch(line)
        if match and match["level"] == "=":
            pieces, waiting = [], ""
        if match:
            waiting += line + "\n"
            continue
        if not pieces and not waiting:
            raise bad_line(path, number, "text before the first ' = Title = ' line", "WikiText raw text")
        pieces.append(waiting + line + "\n")
        waiting = ""
        yield pieces


def read_wikitext(path: Path) -> Traffic:
    """Every article, once for each of its paragraphs: the article up to and with that paragraph, which is scored."""
    requests = [
        Request([Sequence(("".join(pieces), None), tuple(pieces), scored=len(pieces) - 1)])
        for pieces in _paragraphs(path)
    ]
    return Traffic(some(requests, path))


def read_beginnings(path: Path) -> Traffic:
    """The beginning of every article of WikiText, as many paragraphs as have MAX_TOKENS words, or all."""
    texts: list[str] = []
    for pieces in _paragraphs(path):
        text = "".join(pieces)
        if len(pieces) == 1:
            texts.append(text)
        elif len(texts[-1].split()) < MAX_TOKENS:
            texts[-1] = text
    return Traffic(some([Request([single(text)]) for text in texts], path))


def _conversation(turns: list[str], system: str = SYSTEM) -> Request:
    parts = [(system, USER, turns[0], ASSISTANT), *((NEXT_USER, turn, ASSISTANT) for turn in turns[1:])]
    return Request([Sequence((turn, None), part) for turn, part in zip(turns, parts, strict=True)])


def turns_of(row: Row) -> list[str]:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise row.bad(f"'turns' is {str(turns)[:40]}", "a list of texts in 'turns'")
    return turns


def read_chat(bench: Path, two_turns: Path) -> Traffic:
    """Conversations of one or two turns; what the model answers is not part of them."""
    requests = [_conversation(turns_of(row)) for row in json_lines(bench)]
    requests += [_conversation([row.text("u0"), row.text("u1")]) for row in json_lines(two_turns)]
    return Traffic(some(shuffled(requests), bench))


def systems_of(path: Path) -> dict[str, str]:
    """Reads the system prompts of a file, by their names."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(found, dict) or not found or not all(isinstance(text, str) for text in found.values()):
        raise DataError(f"{path}: expected one JSON object of names and texts; fetch the file again")
    return found


def system_of(row: Row, systems: dict[str, str]) -> str:
    """Makes the piece that a row's system prompt is."""
    name = row.text("system")
    if name not in systems:
        raise row.bad(f"'system' is {name!r}", f"one of {', '.join(systems)}")
    return INSTRUCTED + systems[name]


def read_instructed_chat(chat: Path, system_prompts: Path) -> Traffic:
    """Conversations behind one of a few system prompts; what the model answers is not part of them."""
    systems = systems_of(system_prompts)
    requests = [_conversation(turns_of(row), system_of(row, systems)) for row in json_lines(chat)]
    return Traffic(some(shuffled(requests), chat))


def gold_answers(row: Row) -> list[str]:
    """The answers are in the order of the file. There is none if the question cannot be answered."""
    answers = row["answers"]
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise row.bad(f"'answers' is {str(answers)[:40]}", "a list of answers{text} in 'answers'")
    return [row.part(answer).text("text").strip() for answer in answers]


def read_squad(path: Path) -> Traffic:
    """One question a request. Its gold answer is the first one listed; unanswerable ones have group -1."""
    requests: list[Request] = []
    numbers: dict[str, int] = {}
    for row in json_lines(path):
        golds = gold_answers(row)
        gold = golds[0] if golds else None
        group = -1 if gold is None else numbers.setdefault(normal_answer(gold) or gold.lower(), len(numbers))
        asked = _question(row.text("context"), row.text("question"), gold)
        asked = replace(asked, answers=tuple(filter(None, map(normal_answer, golds))))
        requests.append(Request([asked], group=group))
    return Traffic(some(requests, path))


def _choices(path: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yields each question of OpenBookQA with its four choices, of which one is right (1)."""
    for row in json_lines(path):
        question, key = row["question"], row["answerKey"]
        choices = question.get("choices") if isinstance(question, dict) else None
        if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, dict) for c in choices):
            raise row.bad("no four choices", "question{stem, choices[4]{text, label}}")
        stem = row.part(question).text("stem")
        texts = [row.part(choice).text("text") for choice in choices]
        right = [int(choice.get("label") == key) for choice in choices]
        if sum(right) != 1:
            raise row.bad(f"'answerKey' is {key!r}", "the label of one choice")
        yield stem, list(zip(texts, right, strict=True))


def read_openbookqa(path: Path, examples: Path | None = None, shots: int = 0) -> Traffic:
    """A question with its four choices is a request; in front of all stand the same `shots` solved examples."""
    solved = [
        f"{stem} {next(text for text, right in choices if right)}\n"
        for stem, choices in islice(_choices(examples) if examples else (), shots)
    ]
    if len(solved) < shots:
        raise DataError(f"{examples}: {len(solved)} questions in it, too few for {shots} examples")
    requests = [
        Request(
            [
                Sequence((stem, text), (*solved, stem, f" {text}"), shorten=shots, scored=shots + 1, label=label)
                for text, label in choices
            ]
        )
        for stem, choices in _choices(path)
    ]
    return Traffic(some(requests, path))


def _words(text: str) -> tuple[str, ...]:
    """The result is equal for texts that a tokenizer without case takes for the same."""
    return tuple(re.findall(r"\w+|[^\w\s]", text.lower()))


def _labelled(train: Path, test: Path, without: str | None) -> tuple[list[str], dict[Path, list[tuple[str, str]]]]:
    """The names of the classes, and the (label, text) rows of both files; the second has no classes of its own."""
    known: set[str] = set()
    rows: dict[Path, list[tuple[str, str]]] = {train: [], test: []}
    for path, found in rows.items():
        for number, (label, text) in tsv_rows(path, ("label", "text")):
            if path == train:
                known.add(label)
            elif label not in known:
                raise bad_line(path, number, f"label {label!r}", f"one of the {len(known)} labels of {train.name}")
            if label != without:
                found.append((label, text))
        if not found:
            raise DataError(f"{path}: no record in it; fetch the file again")
    return sorted(known - {without}), rows


def read_intents(
    train: Path,
    test: Path,
    instruction: str = "",
    most: int | None = None,
    apart: bool = False,
    without: str | None = None,
    repeats: float = 0,
) -> Traffic:
    """Labelled texts in batches of eight: the training file fills the cache, the test file asks.

    In front of each text stands the instruction, if there is one, which is no part of what is pooled. At most
    `most` training texts fill; where the parts are to be `apart`, none that the test file has too. Texts of the class
    `without` are left out. Of what asks, the share `repeats` says again word for word what was asked before: popular
    texts more often, the most popular one twice as often as the second (Zipf's law)."""
    names, rows = _labelled(train, test, without)
    if apart:
        asked = {_words(text) for _, text in rows[test]}
        rows[train] = [(label, text) for label, text in rows[train] if _words(text) not in asked]

    def sequence(label: str, text: str) -> Sequence:
        if not instruction:
            return single(text, names.index(label))
        return replace(single(f"{instruction} {text}", names.index(label)), pool_from=len(instruction) + 1)

    texts = {path: shuffled(sequence(*row) for row in found) for path, found in rows.items()}
    fill, ask = batches(texts[train][:most], 8), batches(with_repeats(texts[test], repeats), 8)
    return Traffic(fill + ask, fill=len(fill), label_names=names)


def with_repeats(items: list[T], share: float) -> list[T]:
    """The items in random order, with so many further draws among them that these are that share of all. The item at
    place p of the list is drawn with a weight of 1 / p."""
    draw = random.Random(0)
    count = round(share / (1 - share) * len(items))
    weights = [1 / place for place in range(1, len(items) + 1)]
    return shuffled([*items, *draw.choices(items, weights, k=count)]) if count else items


def read_queries_and_edits(train: Path, test: Path, passages: Path, tokens: int, percents: tuple[int, ...]) -> Traffic:
    """Short queries in batches of eight, with edited passages between them, one a request; nothing is labelled."""
    queries = read_intents(train, test)
    edits = read_edits(passages, tokens, MAX_TOKENS, percents)
    fill = interleaved(queries.requests[: queries.fill], edits.requests[: edits.fill])
    ask = interleaved(queries.requests[queries.fill :], edits.requests[edits.fill :])
    return Traffic([_unlabelled(request) for request in fill + ask], fill=len(fill))


def _unlabelled(request: Request) -> Request:
    return Request([replace(row, label=None, edit_kind=None, edit_percent=None) for row in request.sequences])


def read_news(path: Path, fill: int) -> Traffic:
    """Labelled articles, title and description, in batches of eight: the first `fill` after shuffling fill."""
    rows = [
        (label, f"{title}. {text}") for _, (label, title, text) in tsv_rows(path, ("label", "title", "description"))
    ]
    names = sorted({label for label, _ in rows})
    distinct = {_words(text): single(text, names.index(label)) for label, text in rows}
    if len(distinct) <= fill:
        raise DataError(f"{path}: {len(distinct)} articles in it, expected more than {fill}; fetch the file again")
    articles = shuffled(distinct.values())
    filling = batches(articles[:fill], 8)
    return Traffic(filling + batches(articles[fill:], 8), fill=len(filling), label_names=names)


def read_qqp(path: Path) -> Traffic:
    """Question pairs: the distinct first questions fill, then the second question of every pair asks.

    A pair's label is about its own first question only; what else in the cache may be a duplicate is not labelled."""
    rows: list[tuple[str, str, int]] = []
    for number, (label, first, second) in tsv_rows(path, ("label", "text_a", "text_b")):
        if label not in ("0", "1"):
            raise bad_line(path, number, f"label {label!r}", "0 or 1")
        rows.append((first, second, int(label)))
    firsts = shuffled(dict.fromkeys(first for first, _, _ in rows))
    place = {text: number for number, text in enumerate(firsts)}
    fill = [Request([single(text)], partner=-1, pair_label=-1) for text in firsts]
    ask = [Request([single(second)], partner=place[first], pair_label=label) for first, second, label in shuffled(rows)]
    return Traffic(some(fill + ask, path), fill=len(fill))


def read_stsb(path: Path) -> Traffic:
    """A request is a pair of sentences with its gold similarity, 0 to 5."""
    requests = [
        Request([single(first), single(second)], pair_score=number_of(score, 0, 5, path, number))
        for number, (score, first, second, _, _) in tsv_rows(path, ("score", "text_a", "text_b", "genre", "subset"))
    ]
    return Traffic(some(shuffled(requests), path))


def read_sample(path: Path) -> Traffic:
    queries: list[Sequence] = []
    requests: list[Request] = []
    for row in json_lines(path):
        kind = row["kind"]
        if kind == "query":
            queries.append(single(row.text("text")))
        elif kind in ("passage", "edit"):
            requests.append(Request([single(row.text("text"))]))
        elif kind == "question":
            requests.append(Request([_question(row.text("passage"), row.text("question"))]))
        else:
            raise row.bad(f"kind {kind!r}", "query, passage, edit or question")
    return Traffic(some(shuffled(batches(queries, 4) + requests), path))
