"""The benchmark workloads as text: where each one's raw files are, and how they become requests.

A request is a batch of sequences. For an encoder a sequence is (first text, second text or None), which
its tokenizer joins with its own special tokens; for a decoder it is a list of pieces that are tokenised
one by one and put together, so that a shared beginning is shared token by token. What a workload's task
needs to be scored (classes, gold answers, pairs) stands beside the text. Where text is generated, the sequences
of a request are the user's parts of one conversation: the model's answers come between them."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from raw_files import DataError, bad_line, json_lines, lines, number_of, text_of, tsv_rows

MAX_TOKENS = 512
NEW_TOKENS = 32  # that are generated for each prompt
PROMPT_TOKENS = (128, 512)
SHOTS = "openbookqa"  # the workload that can have solved examples in front
IN_ORDER, SHUFFLED = "data order", "shuffled, seed 0"
FILL_SHUFFLED = "fill part and asking part each shuffled, seed 0"
# Pieces that each tokenizer writes in its own way, see prepare_data.py.
SYSTEM, USER, ASSISTANT, NEXT_USER = "\0system", "\0user", "\0assistant", "\0next user"
T = TypeVar("T")


@dataclass(frozen=True)
class Sequence:
    pair: tuple[str, str | None]  # for encoders
    pieces: tuple[str, ...]  # for decoders
    shorten: int = -1  # the piece that gives way when the sequence is longer than MAX_TOKENS
    scored: int | None = None  # the piece whose tokens' log-likelihood is scored (decoders)
    label: int | None = None  # class (classification), or 1 for the right choice and 0 for the others


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


@dataclass(frozen=True)
class Workload:
    name: str
    files: tuple[str, ...]  # below the raw folder
    description: str
    order: str
    read: Callable[..., Traffic]  # from the files' paths
    task: str = ""  # "", classification, choice, perplexity, answer, similarity, duplicates or generation
    decoders_only: bool = False
    encoders_only: bool = False
    growing: bool = False  # each request is a document so far: stop once it has reached MAX_TOKENS
    prompt_tokens: int = 0  # each sequence is cut to that many, shorter ones are left out; 0: as they are
    new_tokens: int = 0  # task generation: that many are generated behind each sequence


def _some(requests: list[Request], path: Path) -> list[Request]:
    if not requests:
        raise DataError(f"{path}: no record in it; fetch the file again")
    return requests


def _shuffled(items: Iterable[T]) -> list[T]:
    items = list(items)
    random.Random(0).shuffle(items)
    return items


def _batches(sequences: list[Sequence], size: int) -> list[Request]:
    return [Request(sequences[start : start + size]) for start in range(0, len(sequences), size)]


def _single(text: str, label: int | None = None) -> Sequence:
    return Sequence((text, None), (text,), label=label)


def _question(passage: str, question: str, answer: str | None = None) -> Sequence:
    pieces = (passage, f"\nQuestion: {question}\nAnswer:")
    if answer is None:
        return Sequence((question, passage), pieces, shorten=0)
    return Sequence((question, passage), (*pieces, f" {answer}"), shorten=0, scored=2)


def _paragraphs(path: Path) -> Iterator[list[str]]:
    """Every article of WikiText, once for each of its paragraphs: its paragraphs up to and with that one."""
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
    return Traffic(_some(requests, path))


def read_beginnings(path: Path) -> Traffic:
    """The beginning of every article of WikiText, as many paragraphs as have MAX_TOKENS words, or all."""
    texts: list[str] = []
    for pieces in _paragraphs(path):
        text = "".join(pieces)
        if len(pieces) == 1:
            texts.append(text)
        elif len(texts[-1].split()) < MAX_TOKENS:
            texts[-1] = text
    return Traffic(_some([Request([_single(text)]) for text in texts], path))


def _conversation(turns: list[str]) -> Request:
    parts = [(SYSTEM, USER, turns[0], ASSISTANT), *((NEXT_USER, turn, ASSISTANT) for turn in turns[1:])]
    return Request([Sequence((turn, None), part) for turn, part in zip(turns, parts, strict=True)])


def read_chat(bench: Path, two_turns: Path) -> Traffic:
    """Conversations of one or two turns; what the model answers is not part of them."""
    requests: list[Request] = []
    for number, row in json_lines(bench):
        turns = row.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise bad_line(bench, number, f"'turns' is {str(turns)[:40]}", "a list of texts in 'turns'")
        requests.append(_conversation(turns))
    for number, row in json_lines(two_turns):
        requests.append(_conversation([text_of(row, turn, two_turns, number) for turn in ("u0", "u1")]))
    return Traffic(_some(_shuffled(requests), bench))


def normal_answer(text: str) -> str:
    """SQuAD's rule for equal answers: case, punctuation, articles and white space do not count."""
    lower = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(word for word in lower.split() if word not in ("a", "an", "the")) or text.lower()


def read_squad(path: Path) -> Traffic:
    """One question a request. Its gold answer is the first one listed; unanswerable ones have group -1."""
    requests: list[Request] = []
    numbers: dict[str, int] = {}
    for number, row in json_lines(path):
        answers = row.get("answers")
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            raise bad_line(path, number, f"'answers' is {str(answers)[:40]}", "a list of answers{text} in 'answers'")
        gold = text_of(answers[0], "text", path, number).strip() if answers else None
        group = -1 if gold is None else numbers.setdefault(normal_answer(gold), len(numbers))
        passage, question = text_of(row, "context", path, number), text_of(row, "question", path, number)
        requests.append(Request([_question(passage, question, gold)], group=group))
    return Traffic(_some(requests, path))


def _choices(path: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Each question of OpenBookQA with its four choices, of which one is right (1)."""
    for number, row in json_lines(path):
        question = row.get("question")
        choices = question.get("choices") if isinstance(question, dict) else None
        if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, dict) for c in choices):
            raise bad_line(path, number, "no four choices", "question{stem, choices[4]{text, label}}")
        stem = text_of(question, "stem", path, number)
        texts = [text_of(choice, "text", path, number) for choice in choices]
        right = [int(choice.get("label") == row.get("answerKey")) for choice in choices]
        if sum(right) != 1:
            raise bad_line(path, number, f"'answerKey' is {row.get('answerKey')!r}", "the label of one choice")
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
    return Traffic(_some(requests, path))


def read_intents(train: Path, test: Path) -> Traffic:
    """Labelled queries in batches of eight: the training file fills the cache, the test file asks."""
    rows: dict[Path, list[tuple[str, str]]] = {}
    known: set[str] = set()
    for path in (train, test):
        rows[path] = []
        for number, (label, text) in tsv_rows(path, ("label", "text")):
            if path == train:
                known.add(label)
            elif label not in known:
                raise bad_line(path, number, f"label {label!r}", f"one of the {len(known)} labels of {train.name}")
            rows[path].append((label, text))
        if not rows[path]:
            raise DataError(f"{path}: no record in it; fetch the file again")
    names = sorted(known)
    numbers = {name: number for number, name in enumerate(names)}
    fill, ask = (
        _batches(_shuffled(_single(text, numbers[label]) for label, text in rows[path]), 8) for path in (train, test)
    )
    return Traffic(fill + ask, fill=len(fill), label_names=names)


def read_qqp(path: Path) -> Traffic:
    """Question pairs: the distinct first questions fill, then the second question of every pair asks.

    A pair's label is about its own first question only; what else in the cache may be a duplicate is not labelled."""
    rows: list[tuple[str, str, int]] = []
    for number, (label, first, second) in tsv_rows(path, ("label", "text_a", "text_b")):
        if label not in ("0", "1"):
            raise bad_line(path, number, f"label {label!r}", "0 or 1")
        rows.append((first, second, int(label)))
    firsts = _shuffled(dict.fromkeys(first for first, _, _ in rows))
    place = {text: number for number, text in enumerate(firsts)}
    fill = [Request([_single(text)], partner=-1, pair_label=-1) for text in firsts]
    ask = [
        Request([_single(second)], partner=place[first], pair_label=label) for first, second, label in _shuffled(rows)
    ]
    return Traffic(_some(fill + ask, path), fill=len(fill))


def read_stsb(path: Path) -> Traffic:
    """A request is a pair of sentences with its gold similarity, 0 to 5."""
    requests = [
        Request([_single(first), _single(second)], pair_score=number_of(score, 0, 5, path, number))
        for number, (score, first, second, _, _) in tsv_rows(path, ("score", "text_a", "text_b", "genre", "subset"))
    ]
    return Traffic(_some(_shuffled(requests), path))


def read_sample(path: Path) -> Traffic:
    queries: list[Sequence] = []
    requests: list[Request] = []
    for number, row in json_lines(path):
        kind = row.get("kind")
        if kind == "query":
            queries.append(_single(text_of(row, "text", path, number)))
        elif kind in ("passage", "edit"):
            requests.append(Request([_single(text_of(row, "text", path, number))]))
        elif kind == "question":
            passage, question = text_of(row, "passage", path, number), text_of(row, "question", path, number)
            requests.append(Request([_question(passage, question)]))
        else:
            raise bad_line(path, number, f"kind {kind!r}", "query, passage, edit or question")
    return Traffic(_some(_shuffled(_batches(queries, 4) + requests), path))


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            "wikitext",
            ("wikitext/wiki.test.raw",),
            f"WikiText test articles, scored paragraph by paragraph: each request is the article so far, up to "
            f"{MAX_TOKENS} tokens",
            IN_ORDER,
            read_wikitext,
            task="perplexity",
            decoders_only=True,
            growing=True,
        ),
        Workload(
            "squad",
            ("squad_v2/squad_v2_dev.jsonl",),
            "SQuAD 2.0 development questions, one a request, about ten for each passage; for decoders with the gold "
            "answer behind them",
            IN_ORDER,
            read_squad,
            task="answer",
        ),
        Workload(
            "openbookqa",
            ("openbookqa/test.jsonl",),
            "OpenBookQA test questions: a request is one question with its four choices",
            IN_ORDER,
            read_openbookqa,
            task="choice",
        ),
        Workload(
            "banking77",
            ("banking77/train.tsv", "banking77/test.tsv"),
            "Banking77 queries in batches of eight: the training queries fill, the test queries ask",
            FILL_SHUFFLED,
            read_intents,
            task="classification",
        ),
        Workload(
            "clinc150",
            ("clinc150/train_small.tsv", "clinc150/test.tsv"),
            "CLINC150 queries in batches of eight, 150 intents and out of scope (a class of its own): the small "
            "training split (50 queries an intent) fills, the test queries ask",
            FILL_SHUFFLED,
            read_intents,
            task="classification",
        ),
        Workload(
            "qqp",
            ("pairs/qqp_gptcache.tsv",),
            "Quora question pairs, one question a request: the distinct first questions fill, the second ones ask",
            FILL_SHUFFLED,
            read_qqp,
            task="duplicates",
        ),
        Workload(
            "stsb",
            ("pairs/stsb_dev.tsv",),
            "STS Benchmark development pairs: a request is the two sentences of a pair",
            SHUFFLED,
            read_stsb,
            task="similarity",
            encoders_only=True,
        ),
        *(
            Workload(
                f"generate-{tokens}",
                ("wikitext/wiki.test.raw",),
                f"The first {tokens} tokens of WikiText test articles, each continued by {NEW_TOKENS} tokens",
                IN_ORDER,
                read_beginnings,
                task="generation",
                decoders_only=True,
                prompt_tokens=tokens,
                new_tokens=NEW_TOKENS,
            )
            for tokens in PROMPT_TOKENS
        ),
        Workload(
            "chat",
            ("prompts/mt_vicuna_bench.jsonl", "prompts/meancache_multiturn.jsonl"),
            f"MT-bench, Vicuna-bench and two-turn conversations: each turn sends the conversation so far and is answered "
            f"by up to {NEW_TOKENS} tokens; those that would be longer than {MAX_TOKENS} tokens are left out",
            SHUFFLED,
            read_chat,
            task="generation",
            decoders_only=True,
            new_tokens=NEW_TOKENS,
        ),
        Workload(
            "sample",
            ("sample.jsonl",),
            "The repository's own sample: short queries in batches of four, passages, edits and questions alone",
            SHUFFLED,
            read_sample,
        ),
    )
}


def with_shots(shots: int) -> Workload:
    """The workload SHOTS with that many solved examples in front of each question, the same for all."""
    plain = WORKLOADS[SHOTS]
    return replace(
        plain,
        name=f"{SHOTS}-{shots}shot",
        files=(*plain.files, "openbookqa/train_sample.jsonl"),
        description=f"{plain.description}, behind {shots} solved training questions, the same for all",
        read=partial(read_openbookqa, shots=shots),
        decoders_only=True,
    )


def named(name: str) -> list[str]:
    """The workloads that a name means: itself, or all that are it with a number behind it."""
    return [known for known in WORKLOADS if known == name or re.fullmatch(re.escape(name) + r"-\d+", known)]
