"""Labelled texts of your own, from CSV and JSONL files."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import DataError


class Labelled(NamedTuple):
    """One row of a file.

    Attributes:
      line: of the file, from 1; of a row of several lines the last.
      texts: one or two.
      label: as text, without spaces around it.
    """

    line: int
    texts: tuple[str, ...]
    label: str


def read_labelled(
    file: str | Path, text_columns: Sequence[str], label_column: str
) -> list[Labelled]:
    """Reads texts and their labels.

    Args:
      file: ``.csv`` (a header, then one row per text) or ``.jsonl`` (one object per
        line), in UTF-8.
      text_columns: the names of the one or two texts.
      label_column: the name of the label; numbers and booleans become text.

    Returns:
      The rows, at least one.

    Raises:
      DataError: the file is missing, malformed, or lacks a column or a value; the
        message names the place.
    """
    file = Path(file)
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if file.suffix not in readers:
        raise DataError(f"{file} must end in .csv or .jsonl")
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    rows = []
    for line, row in readers[file.suffix](content, file):
        place = f"{file}: line {line}"
        for column in (*text_columns, label_column):
            if row.get(column) is None:
                raise DataError(
                    f"{place} lacks {column!r}; it has "
                    f"{', '.join(str(name) for name in row)}"
                )
        label = row[label_column]
        if isinstance(label, str):
            label = label.strip()
        if not isinstance(label, str | int | bool) or label == "":
            raise DataError(f"{place}: {label_column} must be a class, got {label!r}")
        texts = tuple(row[column] for column in text_columns)
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}: texts must be text, got {texts}")
        check_text(place, *texts)
        rows.append(Labelled(line, texts, str(label)))
    if not rows:
        raise DataError(f"{file} holds no rows")
    return rows


def check_text(place: str, *texts: str) -> None:
    """Raises a DataError that names the place if a text is not valid Unicode.

    JSON may hold half of a surrogate pair, as of an emoji that was cut off.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: not valid Unicode: {error}") from error


def _read_csv(content: str, file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(max(len(content), 2**17))  # a text may be long
    try:
        rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        header = rows.fieldnames or []
        if twice := {name for name in header if header.count(name) > 1}:
            raise DataError(f"{file} has the column {min(twice)!r} twice")
        for row in rows:
            if None in row:
                raise DataError(
                    f"{file}: line {rows.line_num} has more fields than the header; "
                    f"quote texts that hold commas"
                )
            yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{file} is not CSV: {error}") from error


def _read_jsonl(content: str, file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}: line {number} must be an object")
        yield number, row
