"""Texts from files of any size, one after the other."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rewire.errors import EncodeError

FORMATS = (".txt", ".jsonl", ".csv", ".tsv")
"""Endings of files that are read; anything else is taken for text, one per line."""


@contextmanager
def open_texts(source: str | Path, field: str | None = None) -> Iterator[Iterator[str]]:
    """The texts of a file; `-` is standard input.

    `.jsonl` holds a JSON text or object per line, `.csv` and `.tsv` a table with a header; `field` names the key or
    column (by default `text`). Any other file holds one text per line.

    Raises:
        EncodeError: the file cannot be read, is not UTF-8, or a line is not what it should be (its number is named).
    """
    path = Path(source)
    try:
        file: IO[str] = sys.stdin if str(source) == "-" else path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise EncodeError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        yield _read(file, str(source), path.suffix.lower(), field)
    finally:
        if file is not sys.stdin:
            file.close()


def _read(file: IO[str], name: str, ending: str, field: str | None) -> Iterator[str]:
    try:
        if ending == ".jsonl":
            yield from _json_lines(file, name, field or "text")
        elif ending in {".csv", ".tsv"}:
            yield from _table(file, name, field or "text", "\t" if ending == ".tsv" else ",")
        elif field is not None:
            raise EncodeError(f"{name} has no fields; --field goes with {', '.join(FORMATS[1:])}")
        else:
            yield from (line.rstrip("\r\n") for line in file)
    except UnicodeDecodeError as error:
        raise EncodeError(f"{name} is not UTF-8 text ({error.reason}); convert it first") from error


def _json_lines(file: IO[str], name: str, field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise EncodeError(f"{name}, line {number}: no JSON ({error})") from error
        text = value.get(field) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise EncodeError(f"{name}, line {number}: no text under {field!r}; name the key with --field")
        yield text


def _table(file: IO[str], name: str, field: str, delimiter: str) -> Iterator[str]:
    rows = csv.DictReader(file, delimiter=delimiter)
    if field not in (rows.fieldnames or ()):
        raise EncodeError(
            f"{name} has no column {field!r}, but {', '.join(rows.fieldnames or ('none',))}; name one with --field"
        )
    try:
        for row in rows:
            yield row[field] or ""
    except csv.Error as error:
        raise EncodeError(f"{name}, line {rows.line_num}: {error}") from error
