"""Reading raw data files line by line; every mistake is named with file, line and remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DataError(RuntimeError):
    """A file is not what it should be; the text names file, line and remedy."""


def bad_line(path: Path, number: int, found: str, wanted: str) -> DataError:
    return DataError(f"{path}:{number}: {found}; expected {wanted}. The file may be cut off: fetch it again")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8").rstrip("\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason}); fetch the file again") from error


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that is not empty."""
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise bad_line(path, number, f"not valid JSON ({error})", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise bad_line(path, number, f"a {type(row).__name__}", "one JSON object a line")
        yield number, row


def text_of(row: dict[str, Any], field: str, path: Path, number: int) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise bad_line(path, number, f"'{field}' is {value!r}", f"a text in '{field}'")
    return value


def tsv_rows(path: Path, header: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each row; the first line must be the header, and no field may be empty."""
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
