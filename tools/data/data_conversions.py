"""From the files of the model hub (data_sources.py) to raw data files, as the readers (readers.py) take them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.data.raw_files import DataError, bad_line, json_lines, number_of, text_of

Written = dict[str, Iterable[str]]  # the lines of each raw data file

NEWS_CLASSES = ("World", "Sports", "Business", "Sci/Tech")  # by number
NEWS_TITLE_WORDS = 8  # taken for the title where nothing tells where it ends
SENTIMENT_SAMPLE = 3000  # of the training phrases
SENTIMENT_WORDS = 8  # that a phrase has at least


@dataclass(frozen=True)
class Table:
    """A file of the hub: its rows, and the names of the classes of each column that has classes."""

    path: Path
    rows: list[dict[str, Any]]
    classes: dict[str, list[str]] = field(default_factory=dict)

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate(self.rows, 1)

    def bad(self, number: int, found: str, wanted: str) -> DataError:
        return bad_line(self.path, number, found, wanted)

    def text(self, row: dict[str, Any], column: str, number: int) -> str:
        return text_of(row, column, self.path, number)

    def line(self, row: dict[str, Any], column: str, number: int) -> str:
        """A text for a field of a .tsv file: with single spaces, on one line."""
        return " ".join(self.text(row, column, number).split())

    def class_name(self, row: dict[str, Any], column: str, number: int, names: Iterable[str] | None = None) -> str:
        known = list(self.classes.get(column, []) if names is None else names)
        if not known:
            raise DataError(f"{self.path}: no names of the classes in '{column}' in it, expected them in its schema")
        value = row[column]
        if not isinstance(value, int) or not 0 <= value < len(known):
            raise self.bad(number, f"'{column}' is {value!r}", f"0 to {len(known) - 1}")
        return known[value]

    def lists(self, row: dict[str, Any], column: str, number: int, *names: str) -> Iterator[tuple[Any, ...]]:
        """What stands together in lists of equal length, which the column has under these names."""
        found = [(row[column] or {}).get(name) for name in names]
        if not all(isinstance(one, list) and len(one) == len(found[0]) for one in found):
            wanted = ", ".join(f"{name}[]" for name in names)
            raise self.bad(number, f"'{column}' is {str(row[column] or {})[:40]}", f"{column}{{{wanted}}}")
        return zip(*found, strict=True)


def read_table(path: Path, columns: tuple[str, ...], count: int) -> Table:
    """A .jsonl or Parquet file with these columns, among others, and `count` rows."""
    if path.suffix == ".jsonl":
        table = Table(path, [row for _, row in json_lines(path)])
        present = set.intersection(*(set(row) for row in table.rows)) if table.rows else set(columns)
    else:
        table, present = _read_parquet(path, columns)
    missing = [column for column in columns if column not in present]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)} in it, only {', '.join(sorted(present))}")
    if len(table.rows) != count:
        raise DataError(f"{path}: {len(table.rows)} rows in it, expected {count}")
    return table


def _read_parquet(path: Path, columns: tuple[str, ...]) -> tuple[Table, set[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            known = [column for column in columns if column in schema.names]
            rows = file.read(columns=known).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]})") from error
    return Table(path, rows, _classes((schema.metadata or {}).get(b"huggingface"))), set(schema.names)


def _classes(description: bytes | None) -> dict[str, list[str]]:
    """The names of classes, from what the `datasets` package writes into the schema of a Parquet file."""
    try:
        features = json.loads(description or b"{}")["info"]["features"]
        return {column: list(map(str, kind["names"])) for column, kind in features.items() if kind.get("names")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def tsv(header: str, rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield header.replace(" ", "\t")
    for row in rows:
        yield "\t".join(row)


def json_rows(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) for row in rows)


def wikitext(test: Table) -> Written:
    """The hub has an empty text for a line with one space, which all lines without text are in the original."""

    def lines() -> Iterator[str]:
        for number, row in test.numbered():
            text = row["text"]
            if not isinstance(text, str) or "\n" in text[:-1]:
                raise test.bad(number, f"'text' is {str(text)[:40]!r}", "one line of text")
            yield text.removesuffix("\n") or " "

    return {"wikitext/wiki.test.raw": lines()}


def squad(dev: Table) -> Written:
    def rows() -> Iterator[dict[str, Any]]:
        for number, row in dev.numbered():
            answers = [
                {"text": t, "answer_start": s} for t, s in dev.lists(row, "answers", number, "text", "answer_start")
            ]
            yield {
                **{column: dev.text(row, column, number) for column in ("id", "title", "context", "question")},
                "answers": answers,
                "is_impossible": not answers,
            }

    return {"squad_v2/squad_v2_dev.jsonl": json_rows(rows())}


def openbookqa(test: Table, dev: Table, train: Table) -> Written:
    def rows(table: Table) -> Iterator[dict[str, Any]]:
        for number, row in table.numbered():
            choices = table.lists(row, "choices", number, "text", "label")
            yield {
                "id": table.text(row, "id", number),
                "question": {
                    "stem": table.text(row, "question_stem", number),
                    "choices": [{"text": text, "label": label} for text, label in choices],
                },
                "answerKey": table.text(row, "answerKey", number).strip(),
                "fact1": row["fact1"],
            }

    tables = {"test": test, "dev": dev, "train_sample": train}
    return {f"openbookqa/{name}.jsonl": json_rows(rows(table)) for name, table in tables.items()}


def banking77(train: Table, test: Table) -> Written:
    def rows(table: Table) -> Iterator[tuple[str, ...]]:
        for number, row in table.numbered():
            yield table.line(row, "label_text", number), table.line(row, "text", number)

    tables = {"train": train, "test": test}
    return {f"banking77/{name}.tsv": tsv("label text", rows(table)) for name, table in tables.items()}


def clinc150(train: Table, val: Table, test: Table) -> Written:
    def rows(table: Table) -> Iterator[tuple[str, ...]]:
        for number, row in table.numbered():
            yield table.class_name(row, "intent", number), table.line(row, "text", number)

    tables = {"train_small": train, "val": val, "test": test}
    return {f"clinc150/{name}.tsv": tsv("label text", rows(table)) for name, table in tables.items()}


_AGENCY = r"(?:AP|Reuters|AFP|CSM|Ziff Davis|InfoWorld|TechWeb|(?:SPACE|washingtonpost|USATODAY|Forbes)\.com)"
_TITLE_ENDS = (
    re.compile(rf".{{8,}}?\({_AGENCY}\) (?!- )"),  # ... a Title (Reuters) Reuters - The text ...
    re.compile(rf".{{8,}}? (?={_AGENCY} - )"),  # ... a Title AP - The text ...
    re.compile(rf".{{8,}}?[^A-Z,. ] (?=[A-Z][A-Z,. ]+(?:[A-Z][a-z]+\.? )?\({_AGENCY}\) - )"),  # ... NEW YORK (AP) - ...
    re.compile(r".{8,}?[a-z0-9)'\"][.!?] (?=\S)"),  # the first sentence
)


def title_and_text(article: str) -> tuple[str, str]:
    """The hub joins title and text by a space. Where an agency's name, a dateline or a sentence tells where the title
    ends, it is cut there, else behind some words: no word is lost, but few titles are exact."""
    for pattern in _TITLE_ENDS:
        match = pattern.match(article)
        if match and match.end() < len(article):
            return article[: match.end()].rstrip(), article[match.end() :]
    words = article.split()
    end = min(NEWS_TITLE_WORDS, len(words) - 1)
    return " ".join(words[:end]), " ".join(words[end:])


def ag_news(test: Table) -> Written:
    def rows() -> Iterator[tuple[str, ...]]:
        for number, row in test.numbered():
            article = " ".join(test.text(row, "text", number).replace("\\", " ").split())
            if " " not in article:
                raise test.bad(number, f"'text' is {article!r}", "title and text")
            yield test.class_name(row, "label", number, NEWS_CLASSES), *title_and_text(article)

    return {"ag_news/test_sample.tsv": tsv("label title description", rows())}


def sst2(train: Table, dev: Table) -> Written:
    """The hub's training part has 67,349 phrases, most of them parts of sentences, and does not say which are whole:
    a sample is taken of those that end like a sentence and have some words."""

    def rows(table: Table) -> list[tuple[str, str]]:
        names = ("0", "1")
        return [
            (table.class_name(row, "label", number, names), table.line(row, "sentence", number))
            for number, row in table.numbered()
        ]

    def like_a_sentence(text: str) -> bool:
        words = text.split()
        return len(words) >= SENTIMENT_WORDS and words[-1] in (".", "!", "?")

    phrases = [(label, text) for label, text in rows(train) if like_a_sentence(text)]
    sample = random.Random(0).sample(phrases, min(SENTIMENT_SAMPLE, len(phrases)))
    return {"sst2/train_sample.tsv": tsv("label text", sample), "sst2/dev.tsv": tsv("label text", rows(dev))}


def stsb(dev: Table) -> Written:
    """The hub's scores are 0 to 1, and it leaves out where a pair is from."""

    def rows() -> Iterator[tuple[str, ...]]:
        for number, row in dev.numbered():
            score = 5 * number_of(str(row["score"]), 0, 1, dev.path, number)
            pair = (dev.line(row, column, number) for column in ("sentence1", "sentence2"))
            yield f"{round(score, 4):g}", *pair, "unknown", "unknown"

    return {"pairs/stsb_dev.tsv": tsv("score text_a text_b genre subset", rows())}
