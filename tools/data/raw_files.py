"""Raw data files: the folders they are in, and reading them line by line; every mistake is named with file, line and
remedy."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "sample"
LOCK_FILE = "sources.lock.json"  # in the folder with what download_data.py fetched
GPT2_FILES = ("tokenizers/gpt2/encoder.json", "tokenizers/gpt2/vocab.bpe")


class DataError(RuntimeError):
    """A file is not what it should be; the text names file, line and remedy."""


def raw_folders(given: Path | None, downloaded: Path | None = None) -> list[tuple[Path, str]]:
    """The folders with raw data, and how each was chosen: files are looked for in the first, then in the next."""
    variable = os.environ.get("LLMCACHE_RAW_DATA")
    for path, chosen in ((given, "--raw"), (Path(variable) if variable else None, "$LLMCACHE_RAW_DATA")):
        if path is not None:
            if not path.is_dir():
                raise DataError(f"{path}, given by {chosen}, is not a folder")
            return [(path, chosen)]
    found: list[tuple[Path, str]] = []
    if downloaded and (downloaded / LOCK_FILE).is_file():
        found.append((downloaded, "downloaded"))
    beside = ROOT.parent / "shared" / "data"
    if beside.is_dir():
        found.append((beside, "found beside the repository"))
    return found


def raw_folder_of(files: tuple[str, ...], folders: list[Path]) -> Path | None:
    """Finds the first folder that has all these files."""
    return next((folder for folder in folders if all((folder / file).exists() for file in files)), None)


def bad_line(path: Path, number: int, found: str, wanted: str) -> DataError:
    return DataError(f"{path}:{number}: {found}; expected {wanted}. The file may be cut off: fetch it again")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the number (from 1) and the text of each line."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8").rstrip("\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason}); fetch the file again") from error


@dataclass(frozen=True)
class Row:
    """An object of a file, and where it stands."""

    path: Path
    number: int  # from 1
    fields: dict[str, Any]

    def __getitem__(self, field: str) -> Any:
        return self.fields.get(field)

    def part(self, fields: Any) -> Row:
        """An object within this one."""
        return replace(self, fields=fields)

    def bad(self, found: str, wanted: str) -> DataError:
        return bad_line(self.path, self.number, found, wanted)

    def text(self, field: str) -> str:
        value = self[field]
        if not isinstance(value, str) or not value.strip():
            raise self.bad(f"'{field}' is {value!r}", f"a text in '{field}'")
        return value


def json_lines(path: Path) -> Iterator[Row]:
    """Yields the object of each line that is not empty."""
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise bad_line(path, number, f"not valid JSON ({error})", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise bad_line(path, number, f"a {type(row).__name__}", "one JSON object a line")
        yield Row(path, number, row)


def tsv_rows(path: Path, header: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yields the number and the fields of each row. The first line must be the header, and no field may be empty."""
    wanted = "<TAB>".join(header)
    for number, line in lines(path):
        fields = line.split("\t")
        if number == 1:
            if tuple(fields) != header:
                raise bad_line(path, number, f"header {line[:60]!r}", wanted)
        elif len(fields) != len(header):
            raise bad_line(path, number, f"{len(fields)} field(s)", wanted)
        elif not all(field.strip() for field in fields):
            raise bad_line(path, number, "an empty field", wanted)
        else:
            yield number, fields


def number_of(text: str, low: float, high: float, path: Path, number: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise bad_line(path, number, f"{text[:20]!r}", f"a number from {low:g} to {high:g}")
    return value
