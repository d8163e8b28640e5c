"""Reads, validates, refuses and writes `results.json`, the file of an evaluation's results.

The file holds one JSON array with an object a result. `format` in an object says how to read it; without one it is of the
first format. A file that is torn, foreign or from a newer fedtune is refused, and never written over.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from fedtune.errors import MissingError
from fedtune.runs.atomic import alone_in, write_text

Record = Mapping[str, Any]
"""One result as `results.json` holds it."""

FILE = "results.json"
FORMAT = 2
"""1: without `format` and `path`; 2: with the path on which the answers were computed."""

_TEXTS = ("subject", "label", "bench", "protocol", "mode")
_KEY = ("label", "bench", "protocol", "mode")
"""What tells results apart: one with the same values replaces the other."""
_LEVELS = 32
"""A value that is nested deeper is refused; fedtune writes at most five levels."""
_DIGITS = 20
"""An integer with more digits is refused; floating-point numbers cannot be computed from the largest ones."""


def read_results(file: Path) -> list[Record]:
    """Return the results in `file`, none where there is no such file.

    Raises:
        MissingError: it cannot be read, or is not a file of results that this version can read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        _refuse(file, "it is not UTF-8 text")
    except IsADirectoryError:
        _refuse(file, "it is a directory")
    except OSError as error:
        raise MissingError(
            f"{file} cannot be read: {error.strerror}.", hint="Choose another folder: --out DIR"
        ) from error
    try:
        table = json.loads(
            text, parse_constant=_refuse_constant, parse_int=_integer, object_pairs_hook=_without_duplicates
        )
    except json.JSONDecodeError as error:
        torn = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        _refuse(file, "it is cut off" if torn else f"it is not JSON (line {error.lineno}: {error.msg})")
    except ValueError as error:
        _refuse(file, f"it is not JSON ({error})")
    except RecursionError:
        _refuse(file, f"it is nested in more than {_LEVELS} levels")
    if isinstance(table, dict) and _is_newer(table):
        _refuse_newer(file)
    if not isinstance(table, list):
        _refuse(file, "it holds no array of results")
    for number, record in enumerate(table, start=1):
        if isinstance(record, dict) and _is_newer(record):
            _refuse_newer(file)
        reason = _not_writable(record) or _wrong_with(record)
        if reason:
            _refuse(file, f"entry {number} is no result of an evaluation: {reason}")
    return table


def add_results(file: Path, fresh: Sequence[Record]) -> None:
    """Write results to `file`, in place of those of the same subject, benchmark, protocol and mode; others stay.

    Raises:
        MissingError: the file that is there is refused, or the folder cannot be written.
    """
    taken = {_key(record) for record in fresh}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(file.parent):
            kept = [record for record in read_results(file) if _key(record) not in taken]
            table = [*kept, *map(without_nan, fresh)]
            write_text(file, json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise cannot_write(file.parent, error) from error


def prepare_folder(folder: Path) -> None:
    """Make the results folder, write a file in it for a moment, and read its results, before anything costs time.

    Raises:
        MissingError: the folder cannot be written, or holds a `results.json` that is refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(folder, error) from error
    read_results(folder / FILE)


def cannot_write(folder: Path, error: OSError) -> MissingError:
    """Return the error that says why results cannot be written to `folder`."""
    return MissingError(
        f"Results cannot be written to {folder}: {error.strerror or error}.",
        hint="Free space there or choose another folder, --out DIR. The same command continues where it stopped.",
    )


def without_nan(value: Any) -> Any:
    """Return `value` with None for every number that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return value


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in _KEY)


def _is_newer(record: Record) -> bool:
    version = record.get("format", 1)
    return isinstance(version, int) and not isinstance(version, bool) and version > FORMAT


def _wrong_with(record: Any) -> str:
    """Return why a value is no result; empty for a result."""
    if not isinstance(record, dict):
        return "it is no object"
    if record.get("format", 1) not in (1, FORMAT) or isinstance(record.get("format"), bool):
        return f"its format is {record['format']!r}"
    for name in _TEXTS:
        if not isinstance(record.get(name), str):
            return f"{name!r} is no text"
    n, k, accuracy, unparsed = record.get("n"), record.get("k"), record.get("accuracy"), record.get("unparsed")
    if not _is_count(n) or not _is_count(k) or not 0 <= k <= n or n == 0:
        return "'k' and 'n' are no counts"
    if not _is_number(accuracy) or not math.isclose(accuracy, k / n, rel_tol=1e-9, abs_tol=1e-12):
        return "'accuracy' is not k / n"
    if "unparsed" not in record or not (unparsed is None or (_is_count(unparsed) and 0 <= unparsed <= n)):
        return "'unparsed' is no count"
    interval = record.get("interval_95")
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(_is_number, interval)):
        return "'interval_95' is no pair of numbers"
    return ""


def _not_writable(value: Any, place: str = "it", levels: int = 0) -> str:
    """Return where a value holds what cannot be written as JSON again, and what; empty where all of it can be."""
    if levels > _LEVELS:
        return f"it is nested in more than {_LEVELS} levels"
    if isinstance(value, Mapping):
        inner = [*((place, key) for key in value), *((repr(key), each) for key, each in value.items())]
    elif isinstance(value, list):
        inner = [(place, each) for each in value]
    else:
        if isinstance(value, float) and not math.isfinite(value):
            return f"{place} holds a number that is too large"
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            return f"{place} holds {value[:40]!r}, which is no Unicode text"
        return ""
    return next(filter(None, (_not_writable(each, key, levels + 1) for key, each in inner)), "")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(text: str) -> float:
    return int(text) if len(text.lstrip("-")) <= _DIGITS else math.inf


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice[:40]!r} twice")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _refuse(file: Path, reason: str) -> NoReturn:
    raise MissingError(
        f"{file} is not a file of results: {reason}. Nothing was written.",
        hint=f"Move it away and run the same command again: mv {file} {file}.old",
    )


def _refuse_newer(file: Path) -> NoReturn:
    raise MissingError(
        f"{file} was written by a newer version of fedtune. Nothing was written.",
        hint="Update fedtune: pip install --upgrade fedtune",
    )
