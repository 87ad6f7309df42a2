"""From the files of the model hub (data_sources.py) to raw data files, as the readers (readers.py) take them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.data.raw_files import DataError, Row, json_lines, number_of

Line = str | tuple[str, ...] | dict[str, Any]  # of a raw data file: text, fields of a .tsv file, or an object
Written = dict[str, Iterable[str]]  # the lines of each raw data file

NEWS_CLASSES = ("World", "Sports", "Business", "Sci/Tech")  # by number
NEWS_TITLE_WORDS = 8  # taken for the title where nothing tells where it ends
SENTIMENT_SAMPLE = 3000  # of the training phrases
SENTIMENT_WORDS = 8  # that a phrase has at least


@dataclass(frozen=True)
class TableRow(Row):
    """A row of a file of the hub, with the names of the classes of each column that has classes."""

    classes: dict[str, list[str]]

    def line(self, column: str) -> str:
        """A text for a field of a .tsv file: with single spaces, on one line."""
        return " ".join(self.text(column).split())

    def class_name(self, column: str, names: Iterable[str] | None = None) -> str:
        known = list(self.classes.get(column, []) if names is None else names)
        if not known:
            where = f"{self.path}: no names of the classes in '{column}' in it"
            raise DataError(f"{where}, expected them in its schema")
        value = self[column]
        if not isinstance(value, int) or not 0 <= value < len(known):
            raise self.bad(f"'{column}' is {value!r}", f"0 to {len(known) - 1}")
        return known[value]

    def lists(self, column: str, *names: str) -> Iterator[tuple[Any, ...]]:
        """What stands together in lists of equal length, which the column has under these names."""
        found = [(self[column] or {}).get(name) for name in names]
        if not all(isinstance(one, list) and len(one) == len(found[0]) for one in found):
            wanted = ", ".join(f"{name}[]" for name in names)
            raise self.bad(f"'{column}' is {str(self[column] or {})[:40]}", f"{column}{{{wanted}}}")
        return zip(*found, strict=True)


@dataclass(frozen=True)
class Table:
    """A file of the hub: its rows, and the names of the classes of each column that has classes."""

    path: Path
    rows: list[dict[str, Any]]
    classes: dict[str, list[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[TableRow]:
        return (TableRow(self.path, number, fields, self.classes) for number, fields in enumerate(self.rows, 1))


def read_table(path: Path, columns: tuple[str, ...], count: int) -> Table:
    """A .jsonl or Parquet file with these columns, among others, and `count` rows."""
    if path.suffix == ".jsonl":
        table = Table(path, [row.fields for row in json_lines(path)])
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


def each(convert: Callable[[TableRow], Line], *files: str, header: str = "") -> Callable[..., Written]:
    """Each table becomes a file; `convert` makes a line of a row. A .tsv file begins with the header's words."""

    def written(*tables: Table) -> Written:
        return {file: lines_of(map(convert, table), header) for file, table in zip(files, tables, strict=True)}

    return written


def lines_of(lines: Iterable[Line], header: str = "") -> Iterator[str]:
    """The fields of a .tsv file become a line, an object becomes JSON; a text stands for itself."""
    if header:
        yield header.replace(" ", "\t")
    for line in lines:
        if isinstance(line, tuple):
            yield "\t".join(line)
        else:
            yield line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)


def wikitext(row: TableRow) -> Line:
    """The hub has an empty text for a line with one space, which all lines without text are in the original."""
    text = row["text"]
    if not isinstance(text, str) or "\n" in text[:-1]:
        raise row.bad(f"'text' is {str(text)[:40]!r}", "one line of text")
    return text.removesuffix("\n") or " "


def squad(row: TableRow) -> Line:
    answers = [{"text": text, "answer_start": start} for text, start in row.lists("answers", "text", "answer_start")]
    texts = {column: row.text(column) for column in ("id", "title", "context", "question")}
    return {**texts, "answers": answers, "is_impossible": not answers}


def openbookqa(row: TableRow) -> Line:
    choices = [{"text": text, "label": label} for text, label in row.lists("choices", "text", "label")]
    return {
        "id": row.text("id"),
        "question": {"stem": row.text("question_stem"), "choices": choices},
        "answerKey": row.text("answerKey").strip(),
        "fact1": row["fact1"],
    }


def banking77(row: TableRow) -> Line:
    return row.line("label_text"), row.line("text")


def clinc150(row: TableRow) -> Line:
    return row.class_name("intent"), row.line("text")


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


def ag_news(row: TableRow) -> Line:
    article = " ".join(row.text("text").replace("\\", " ").split())
    if " " not in article:
        raise row.bad(f"'text' is {article!r}", "title and text")
    return row.class_name("label", NEWS_CLASSES), *title_and_text(article)


def sst2(train: Table, dev: Table) -> Written:
    """The hub's training part has 67,349 phrases, most of them parts of sentences, and does not say which are whole:
    a sample is taken of those that end like a sentence and have some words."""

    def rows(table: Table) -> list[tuple[str, str]]:
        return [(row.class_name("label", ("0", "1")), row.line("sentence")) for row in table]

    def like_a_sentence(row: tuple[str, str]) -> bool:
        words = row[1].split()
        return len(words) >= SENTIMENT_WORDS and words[-1] in (".", "!", "?")

    phrases = list(filter(like_a_sentence, rows(train)))
    sample = random.Random(0).sample(phrases, min(SENTIMENT_SAMPLE, len(phrases)))
    parts = {"sst2/train_sample.tsv": sample, "sst2/dev.tsv": rows(dev)}
    return {file: lines_of(lines, "label text") for file, lines in parts.items()}


def stsb(row: TableRow) -> Line:
    """The hub's scores are 0 to 1, and it leaves out where a pair is from."""
    score = 5 * number_of(str(row["score"]), 0, 1, row.path, row.number)
    return f"{round(score, 4):g}", row.line("sentence1"), row.line("sentence2"), "unknown", "unknown"
