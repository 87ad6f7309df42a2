"""The benchmark workloads as text: where each one's raw file is, and how it becomes requests.

A request is a list of sequences. For an encoder a sequence is (first text, second text or None), which
its tokenizer joins with its own special tokens; for a decoder it is a list of pieces that are tokenised
one by one and put together, so that a shared beginning is shared token by token."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_TOKENS = 512
IN_ORDER, SHUFFLED = "data order", "shuffled, seed 0"


class DataError(RuntimeError):
    """A raw file is not what it should be; the text names file, line and remedy."""


@dataclass(frozen=True)
class Sequence:
    pair: tuple[str, str | None]  # for encoders
    pieces: tuple[str, ...]  # for decoders
    shorten: int = -1  # the piece that gives way when the sequence is longer than MAX_TOKENS


Request = list[Sequence]


@dataclass(frozen=True)
class Workload:
    name: str
    file: str  # below the raw folder
    description: str
    order: str
    read: Callable[[Path], list[Request]]
    decoders_only: bool = False
    growing: bool = False  # each request is a document so far: stop once it has reached MAX_TOKENS


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8").rstrip("\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason}); fetch the file again") from error


def _bad(path: Path, number: int, found: str, wanted: str) -> DataError:
    return DataError(f"{path}:{number}: {found}; expected {wanted}. The file may be cut off: fetch it again")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _bad(path, number, f"not valid JSON ({error})", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise _bad(path, number, f"a {type(row).__name__}", "one JSON object a line")
        yield number, row


def _text(row: dict[str, Any], field: str, path: Path, number: int) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise _bad(path, number, f"'{field}' is {value!r}", f"a text in '{field}'")
    return value


def _some(requests: list[Request], path: Path) -> list[Request]:
    if not requests:
        raise DataError(f"{path}: no record in it; fetch the file again")
    return requests


def _batches(sequences: list[Sequence], size: int) -> list[Request]:
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


def _single(text: str) -> Sequence:
    return Sequence((text, None), (text,))


def _question(passage: str, question: str) -> Sequence:
    return Sequence((question, passage), (passage, f"\nQuestion: {question}\nAnswer:"), shorten=0)


def read_wikitext(path: Path) -> list[Request]:
    """Every article, once for each of its paragraphs: the article up to and with that paragraph."""
    heading = re.compile(r" (?P<level>=( =)*) [^=].* (?P=level) ")
    requests: list[Request] = []
    pieces: list[str] = []
    waiting = ""  # headings go with the paragraph after them
    for number, line in _lines(path):
        if "\0" in line:
            raise _bad(path, number, "a zero byte", "text")
        if not line.strip():
            continue
        match = heading.fullmatch(line)
        if match and match["level"] == "=":
            pieces, waiting = [], ""
        if match:
            waiting += line + "\n"
            continue
        if not pieces and not waiting:
            raise _bad(path, number, "text before the first ' = Title = ' line", "WikiText raw text")
        pieces.append(waiting + line + "\n")
        waiting = ""
        requests.append([Sequence(("".join(pieces), None), tuple(pieces))])
    return _some(requests, path)


def read_squad(path: Path) -> list[Request]:
    return _some(
        [
            [_question(_text(row, "context", path, number), _text(row, "question", path, number))]
            for number, row in _json_lines(path)
        ],
        path,
    )


def read_openbookqa(path: Path) -> list[Request]:
    requests: list[Request] = []
    for number, row in _json_lines(path):
        question = row.get("question")
        choices = question.get("choices") if isinstance(question, dict) else None
        if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, dict) for c in choices):
            raise _bad(path, number, "no four choices", "question{stem, choices[4]{text}}")
        stem = _text(question, "stem", path, number)
        texts = [_text(choice, "text", path, number) for choice in choices]
        requests.append([Sequence((stem, text), (stem, f" {text}"), shorten=0) for text in texts])
    return _some(requests, path)


def read_banking77(path: Path) -> list[Request]:
    queries: list[Sequence] = []
    for number, line in _lines(path):
        fields = line.split("\t")
        if len(fields) != 2 or not fields[1].strip():
            raise _bad(path, number, f"{len(fields)} field(s)", "label<TAB>text")
        if number > 1:
            queries.append(_single(fields[1]))
        elif fields != ["label", "text"]:
            raise _bad(path, number, f"header {line[:40]!r}", "label<TAB>text")
    random.Random(0).shuffle(queries)
    return _some(_batches(queries, 8), path)


def read_sample(path: Path) -> list[Request]:
    queries: list[Sequence] = []
    requests: list[Request] = []
    for number, row in _json_lines(path):
        kind = row.get("kind")
        if kind == "query":
            queries.append(_single(_text(row, "text", path, number)))
        elif kind in ("passage", "edit"):
            requests.append([_single(_text(row, "text", path, number))])
        elif kind == "question":
            requests.append([_question(_text(row, "passage", path, number), _text(row, "question", path, number))])
        else:
            raise _bad(path, number, f"kind {kind!r}", "query, passage, edit or question")
    requests = _batches(queries, 4) + requests
    random.Random(0).shuffle(requests)
    return _some(requests, path)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            "wikitext",
            "wikitext/wiki.test.raw",
            f"WikiText test articles, scored paragraph by paragraph: each request is the article so far, up to "
            f"{MAX_TOKENS} tokens",
            IN_ORDER,
            read_wikitext,
            decoders_only=True,
            growing=True,
        ),
        Workload(
            "squad",
            "squad_v2/squad_v2_dev.jsonl",
            "SQuAD 2.0 development questions, one a request, about ten for each passage",
            IN_ORDER,
            read_squad,
        ),
        Workload(
            "openbookqa",
            "openbookqa/test.jsonl",
            "OpenBookQA test questions: a request is one question with its four choices",
            IN_ORDER,
            read_openbookqa,
        ),
        Workload(
            "banking77",
            "banking77/test.tsv",
            "Banking77 test queries in batches of eight",
            SHUFFLED,
            read_banking77,
        ),
        Workload(
            "sample",
            "sample.jsonl",
            "The repository's own sample: short queries in batches of four, passages, edits and questions alone",
            SHUFFLED,
            read_sample,
        ),
    )
}
