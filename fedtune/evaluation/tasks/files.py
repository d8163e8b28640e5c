"""Reads a benchmark's rows from the user's own files (`--data-dir`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fedtune.errors import MissingError, UsageError
from fedtune.evaluation.tasks.base import Row, Selection

SUFFIXES = (".jsonl", ".parquet")


def files_of(selection: Selection, data_dir: Path) -> dict[str, Path]:
    """Return the file of each part: `<bench>.jsonl|parquet`, or `<bench>/<part>.jsonl|parquet`.

    Raises:
        MissingError: the folder or some of the files do not exist; the message names them.
    """
    if not data_dir.is_dir():
        raise MissingError(f"There is no folder {data_dir}.", hint="Give the benchmarks' files with --data-dir DIR.")
    found, missing = {}, []
    for part in selection.parts:
        stem = data_dir / selection.task.name / part if part else data_dir / selection.task.name
        paths = [path for suffix in SUFFIXES if (path := stem.with_name(stem.name + suffix)).is_file()]
        if paths:
            found[part] = paths[0]
        else:
            missing.append(str(stem.relative_to(data_dir)) + SUFFIXES[0])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise MissingError(
            f"{selection.name}: {len(missing)} of {len(selection.parts)} files are not in {data_dir}: {shown}.",
            hint="Add them (.jsonl or .parquet), or omit --data-dir to load the rows from the hub.",
        )
    return found


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each row of a JSON-lines or Parquet file with its position: `line 3` or `row 3`, from 1.

    Raises:
        MissingError: there is no such file.
        UsageError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    except FileNotFoundError:
        raise MissingError(f"There is no file {path}.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text.") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UsageError(f"{path}, line {number} is not a JSON object.")
            yield f"line {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise UsageError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row
