"""Local data files (JSON lines, a JSON array, CSV, Parquet) to tables of text, with line numbers in errors."""

from __future__ import annotations

import csv
import io
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from fedtune.data.folder import SUFFIXES, client_files
from fedtune.data.values import arrow_texts, parse_float, texts
from fedtune.errors import MissingError, UsageError

logger = logging.getLogger(__name__)

_SPELLINGS_OF_MISSING = ("nan", "nat", "<na>", "null")
"""Words that other programs write into a CSV for a missing value; there they are text all the same."""

_field_limit = threading.Lock()


@dataclass(frozen=True)
class _Table:
    """A file's columns before they are text."""

    columns: Mapping[str, Sequence[Any] | pyarrow.ChunkedArray]
    rows: int
    place: Callable[[int], str]
    """Names a row, counted from 0."""


def read_file(path: Path, needed: Collection[str] | None = None) -> datasets.Dataset:
    """Read one data file into memory; every value becomes text, a missing one None (`fedtune/data/values.py`).

    Args:
        path: The file.
        needed: The columns in which a value that has no text is refused; elsewhere it becomes None. All unless given.

    Raises:
        MissingError: there is no such file, or it cannot be read.
        UsageError: the suffix is unknown, the content is not what the suffix says, or a value has no text; names file
            and line.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} is not a data file that fedtune reads.", hint=f"It reads {', '.join(SUFFIXES)}.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingError(f"There is no file {path}.") from None
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror}.") from None
    if not content.strip():
        raise UsageError(f"{path} is empty.")
    read = {".csv": _read_csv, ".parquet": _read_parquet}.get(path.suffix.lower(), _read_json)
    table = read(path, content)
    if not table.rows:
        raise UsageError(f"{path} has no rows.")
    features = datasets.Features({name: datasets.Value("string") for name in table.columns})
    columns = {
        name: column_texts(values, name, table.place, strict=needed is None or name in needed)
        for name, values in table.columns.items()
    }
    return datasets.Dataset.from_dict(columns, features=features)


def column_texts(
    values: Sequence[Any] | pyarrow.ChunkedArray, name: str, place: Callable[[int], str], *, strict: bool
) -> list[str | None]:
    """Return one column as texts; `place` names a row, counted from 0."""

    def cell(row: int) -> str:
        return f"{place(row)}, column {name!r}"

    convert = arrow_texts if isinstance(values, pyarrow.ChunkedArray) else texts
    return convert(values, cell, strict=strict)


def read_folder(folder: Path, needed: Collection[str] | None = None) -> dict[str, datasets.Dataset]:
    """Read every data file of a folder, in the order of `client_files`; all must have the same columns.

    Args:
        folder: The folder.
        needed: As for `read_file`.

    Returns:
        File name to table.

    Raises:
        UsageError: there is no data file, a file has an unknown suffix or other columns, or cannot be read.
    """
    tables: dict[str, datasets.Dataset] = {}
    for path in client_files(folder):
        table = read_file(path, needed)
        first_name, first = next(iter(tables.items()), (path.name, table))
        if set(table.column_names) != set(first.column_names):
            raise UsageError(
                f"{path} has the columns {', '.join(table.column_names)}, "
                f"but {first_name} has {', '.join(first.column_names)}.",
                hint="All files of a folder need the same columns.",
            )
        tables[path.name] = table.select_columns(first.column_names)
    return tables


def _read_json(path: Path, content: bytes) -> _Table:
    """Read an array of objects, or one object a line; a key that a row lacks is None there."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    found: Iterable[tuple[str, Any]]
    if content.lstrip().startswith(b"["):
        items = _parse_json(str(path), content)
        found = ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))
    else:
        lines = ((f"{path}, line {n}", line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip())
        found = ((place, _parse_json(place, line)) for place, line in lines)
    records, places = [], []
    names: dict[str, None] = {}
    for place, record in found:
        if not isinstance(record, dict):
            raise UsageError(f"{place}: a row must be a JSON object with the columns as keys.")
        names.update(dict.fromkeys(record))
        records.append(record)
        places.append(place)
    if records and not names:
        raise UsageError(f"{path} has rows without any column.")
    columns = {name: [record.get(name) for record in records] for name in names}
    return _Table(columns, len(records), places.__getitem__)


def _parse_json(place: str, content: bytes) -> Any:
    try:
        text = content.decode("utf-8")
        value = json.loads(text, parse_float=parse_float, object_pairs_hook=_unique_keys)
        # Escapes can spell half a surrogate pair, which no tokenizer takes; in keys it would be a column's name.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{place}: the text is not UTF-8.", hint="Save the file as UTF-8.") from None
    except UnicodeEncodeError:
        raise UsageError(f"{place}: the text has half of a surrogate pair, which is no character.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UsageError(f"{place}: malformed JSON at {where}: {error.msg}.") from None
    except _DuplicateKeyError as error:
        raise UsageError(f"{place}: an object has the key {error} twice.") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{place}: malformed JSON: a number or a nesting is too large.") from None
    return value


class _DuplicateKeyError(ValueError):
    """A JSON object has a key twice; which value is meant, nobody knows."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _DuplicateKeyError(repr(Counter(key for key, _ in pairs).most_common(1)[0][0]))
    return members


def _read_csv(path: Path, content: bytes) -> _Table:
    """Read comma-separated values under a header line; a field may span lines within quotes, an empty one is missing."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: the text is not UTF-8.", hint="Save the file as UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    header: list[str] = []
    try:
        with _fields_as_long_as(len(text)):
            for fields in reader:
                if fields and not header:
                    header = fields
                    _check_csv_header(path, header)
                elif fields and len(fields) != len(header):
                    raise UsageError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, but the header names {len(header)}."
                    )
                elif fields:
                    rows.append(fields)
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: malformed CSV: {error}.") from None
    columns = {name: [fields[place] or None for fields in rows] for place, name in enumerate(header)}
    for name, cells in columns.items():
        _warn_of_words_for_missing(path, name, cells)
    return _Table(columns, len(rows), lambda row: f"{path}, row {row + 1}")


@contextmanager
def _fields_as_long_as(characters: int) -> Iterator[None]:
    """Let the csv module read fields of so many characters in the block; its limit holds for the whole process."""
    with _field_limit:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, characters))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _warn_of_words_for_missing(path: Path, name: str, cells: Sequence[str | None]) -> None:
    words = [cell for cell in cells if cell is not None and cell.lower() in _SPELLINGS_OF_MISSING]
    if words:
        logger.warning(
            "%s: %d cells of the column %r are the word %s, which is text in a CSV file; leave a cell empty where its "
            "value is missing.",
            path,
            len(words),
            name,
            words[0],
        )


def _read_parquet(path: Path, content: bytes) -> _Table:
    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UsageError(f"{path} is not a readable Parquet file: {reason}.") from None
    names: list[str] = table.column_names
    _check_header(path, names)
    columns = {name: table.column(place) for place, name in enumerate(names)}
    return _Table(columns, table.num_rows, lambda row: f"{path}, row {row + 1}")


def _check_header(path: Path, columns: Sequence[str]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UsageError(f"{path} has two columns named {twice[0]!r}.")


def _check_csv_header(path: Path, columns: Sequence[str]) -> None:
    _check_header(path, columns)
    if "\0" in "".join(columns):
        raise UsageError(
            f"{path}, line 1: the header holds NUL characters, as UTF-16 text does.", hint="Save the file as UTF-8."
        )
    if len(columns) == 1 and (other := next((mark for mark in ";\t|" if mark in columns[0]), None)):
        raise UsageError(
            f"{path}, line 1: the header is a single column, {columns[0]!r}, separated by {other!r} instead of commas.",
            hint="Save the file with commas between the fields.",
        )
