"""Local data files (JSON lines, a JSON array, CSV, Parquet) to tables of text, with line numbers in errors."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from fedtune.data.folder import SUFFIXES, client_files
from fedtune.data.prompt import as_text
from fedtune.errors import MissingError, UsageError


def read_file(path: Path) -> datasets.Dataset:
    """Read one data file into memory; every value becomes text (`as_text`), a missing one stays None.

    Raises:
        MissingError: there is no such file.
        UsageError: the suffix is unknown, or the content is not what the suffix says; names file and line.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} is not a data file that fedtune reads.", hint=f"It reads {', '.join(SUFFIXES)}.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingError(f"There is no file {path}.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    if not content.strip():
        raise UsageError(f"{path} is empty.")
    match path.suffix.lower():
        case ".csv":
            columns, rows = _read_csv(path, content)
        case ".parquet":
            columns, rows = _read_parquet(path, content)
        case _:
            columns, rows = _read_json(path, content)
    if not rows:
        raise UsageError(f"{path} has no rows.")
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    table = {
        name: [None if value is None else as_text(value) for value in values]
        for name, values in zip(columns, zip(*rows, strict=True), strict=True)
    }
    return datasets.Dataset.from_dict(table, features=features)


def read_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """Read every data file of a folder, in the order of `client_files`; all must have the same columns.

    Returns:
        File name to table.

    Raises:
        UsageError: there is no data file, a file has an unknown suffix or other columns, or cannot be read.
    """
    tables: dict[str, datasets.Dataset] = {}
    for path in client_files(folder):
        table = read_file(path)
        first_name, first = next(iter(tables.items()), (path.name, table))
        if set(table.column_names) != set(first.column_names):
            raise UsageError(
                f"{path} has the columns {', '.join(table.column_names)}, "
                f"but {first_name} has {', '.join(first.column_names)}.",
                hint="All files of a folder need the same columns.",
            )
        tables[path.name] = table.select_columns(first.column_names)
    return tables


def _read_json(path: Path, content: bytes) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Read an array of objects, or one object a line; a key that a row lacks is None there."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    found: Iterable[tuple[str, Any]]
    if content.lstrip().startswith(b"["):
        items = _parse_json(str(path), content)
        found = ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))
    else:
        lines = ((f"{path}, line {n}", line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip())
        found = ((place, _parse_json(place, line)) for place, line in lines)
    records = []
    columns: dict[str, None] = {}
    for place, record in found:
        if not isinstance(record, dict):
            raise UsageError(f"{place}: a row must be a JSON object with the columns as keys.")
        columns.update(dict.fromkeys(record))
        records.append(record)
    if records and not columns:
        raise UsageError(f"{path} has rows without any column.")
    return list(columns), [tuple(record.get(name) for name in columns) for record in records]


def _parse_json(place: str, content: bytes) -> Any:
    try:
        text = content.decode("utf-8")
        value = json.loads(text)
        # Escapes can spell half a surrogate pair, which no tokenizer takes.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{place}: the text is not UTF-8.") from None
    except UnicodeEncodeError:
        raise UsageError(f"{place}: the text has half of a surrogate pair, which is no character.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UsageError(f"{place}: malformed JSON at {where}: {error.msg}.") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{place}: malformed JSON: a number or a nesting is too large.") from None
    return value


def _read_csv(path: Path, content: bytes) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Read comma-separated values under a header line; a field may span lines within quotes."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: the text is not UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[Any, ...]] = []
    columns: list[str] = []
    try:
        for fields in reader:
            if fields and not columns:
                columns = fields
                _check_header(path, columns)
            elif fields and len(fields) != len(columns):
                raise UsageError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, but the header names {len(columns)}."
                )
            elif fields:
                rows.append(tuple(fields))
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: malformed CSV: {error}.") from None
    return columns, rows


def _read_parquet(path: Path, content: bytes) -> tuple[list[str], list[tuple[Any, ...]]]:
    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
        columns: list[str] = table.column_names
        values = [table.column(index).to_pylist() for index in range(table.num_columns)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UsageError(f"{path} is not a readable Parquet file: {reason}.") from None
    _check_header(path, columns)
    return columns, list(zip(*values, strict=True))


def _check_header(path: Path, columns: Sequence[str]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UsageError(f"{path} has two columns named {twice[0]!r}.")
