"""The result of an evaluation (`BenchmarkResult`), and `results.json`: reads, validates, refuses and writes it.

The file contains one JSON array with an object per result. The key `format` names the object's format; an object without it
has the first format. A file that is cut off, is not a file of results, or was written by a newer version is refused, and never
overwritten.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from fedtune.errors import MissingError
from fedtune.evaluation.scoring import Score
from fedtune.evaluation.statistics import Interval, PairedTest
from fedtune.runs.atomic import alone_in, write_text

Record = Mapping[str, Any]
"""One result, as an object of `results.json`."""

FILE = "results.json"
FORMAT = 2
"""1: without `format` and `path`; 2: with the path on which the answers were computed."""

_TEXTS = ("subject", "label", "bench", "protocol", "mode")
_KEY = ("label", "bench", "protocol", "mode")
"""The keys that identify a result: a new one with the same values replaces the old one."""
_LEVELS = 32
"""A value that is nested deeper is refused; fedtune writes at most five levels."""
_DIGITS = 20
"""An integer with more digits is refused; floating-point numbers cannot be computed from the largest ones."""


@dataclass(frozen=True)
class Agreement:
    """How many answers of the fast mode equal one-by-one generation."""

    asked: int
    equal: int
    smallest_gaps: tuple[float, ...]
    """The five smallest gaps between the two best logits of a first token."""
    ties: int = 0
    """Answers that differ from a token on at which only rounding separates the two best logits."""

    @property
    def holds(self) -> bool:
        """Whether every answer is the same, except for ties."""
        return self.equal + self.ties == self.asked


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of one subject on one benchmark."""

    subject: str
    bench: str
    label: str
    """The subject's name in file names, with every setting that differs from the leaderboard's."""
    protocol: str
    mode: str
    score: Score = field(repr=False)
    interval: Interval
    """95 % interval of the accuracy."""
    partial: str
    """Why this is not the whole benchmark; empty when it is."""
    findings: tuple[str, ...]
    comparable: bool
    """Whether the accuracy is comparable with the leaderboard's; it is not where verified answers differ."""
    seconds: float
    prompt_tokens: int
    details: Mapping[str, Any] = field(repr=False)
    """Arithmetic, hashes and versions, as in results.json."""
    used_mib: float | None = None
    against_base: PairedTest | None = None
    agreement: Agreement | None = None
    answer_path: str = ""
    """How the answers were computed: a name of `fast.PATHS`, one by one, or the name of another protocol."""
    answer_path_reason: str = ""
    """Why on that path."""

    @property
    def questions_per_second(self) -> float:
        """Questions per second, over all processes that answered."""
        return self.score.n / self.seconds if self.seconds else 0.0

    def to_record(self) -> dict[str, Any]:
        """Return the result as an object of results.json."""
        score = self.score
        record = {
            "format": FORMAT,
            "subject": self.subject,
            "bench": self.bench,
            "label": self.label,
            "protocol": self.protocol,
            "mode": self.mode,
            "accuracy": score.accuracy,
            "n": score.n,
            "k": score.k,
            "interval_95": [self.interval.low, self.interval.high],
            "unparsed": score.unparsed,
            "unparsed_outputs": [list(pair) for pair in score.unparsed_outputs],
            "accuracy_parsed": score.accuracy_parsed,
            "majority": {"prediction": score.majority, "share": score.majority_share},
            "subsets": [{"name": s.name, "n": s.n, "k": s.k, "unparsed": s.unparsed} for s in score.subsets],
            "partial": self.partial or None,
            "findings": list(self.findings),
            "comparable": self.comparable,
            "against_base": self.against_base and asdict(self.against_base),
            "used_mib": self.used_mib,
            "seconds": self.seconds,
            "prompt_tokens": self.prompt_tokens,
            "questions_per_second": self.questions_per_second,
            "tokens_per_second": self.prompt_tokens / self.seconds if self.seconds else None,
            "verified": self.agreement and asdict(self.agreement),
            "answer_path": self.answer_path,
            "answer_path_reason": self.answer_path_reason,
            **{key: value for key, value in self.details.items() if key not in ("bench", "protocol", "mode")},
        }
        return {key: _without_nan(value) for key, value in record.items()}


@dataclass(frozen=True)
class EvalResult:
    """The results of all subjects on all benchmarks."""

    results: tuple[BenchmarkResult, ...]
    file: Path
    """results.json"""


def read_results(file: Path) -> list[Record]:
    """Return the results in `file`, an empty list where there is no such file.

    Raises:
        MissingError: the file cannot be read, or is not a file of results that this version can read.
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
        _refuse(file, "it does not contain an array of results")
    for number, record in enumerate(table, start=1):
        if isinstance(record, dict) and _is_newer(record):
            _refuse_newer(file)
        reason = _not_writable(record) or _wrong_with(record)
        if reason:
            _refuse(file, f"entry {number} is not a result of an evaluation: {reason}")
    return table


def add_results(file: Path, fresh: Sequence[Record]) -> None:
    """Write results to `file`; they replace those of the same label, benchmark, protocol and mode.

    Raises:
        MissingError: the existing file is refused, or the folder cannot be written.
    """
    taken = {_key(record) for record in fresh}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(file.parent):
            kept = [record for record in read_results(file) if _key(record) not in taken]
            table = [*kept, *map(_without_nan, fresh)]
            write_text(file, json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise cannot_write(file.parent, error) from error


def prepare_folder(folder: Path) -> None:
    """Create the results folder, and check before any long work that it can be written and its results can be read.

    Raises:
        MissingError: the folder cannot be written, or contains a `results.json` that is refused.
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
    """Return the error for a folder that cannot be written."""
    return MissingError(
        f"Results cannot be written to {folder}: {error.strerror or error}.",
        hint="Free space there or choose another folder, --out DIR. The same command then continues where it stopped.",
    )


def _without_nan(value: Any) -> Any:
    """Return `value` with None in place of every number that JSON cannot represent."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return value


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in _KEY)


def _is_newer(record: Record) -> bool:
    version = record.get("format", 1)
    return isinstance(version, int) and not isinstance(version, bool) and version > FORMAT


def _wrong_with(record: Any) -> str:
    """Return why a value is not a result; an empty text if it is one."""
    if not isinstance(record, dict):
        return "it is not an object"
    if record.get("format", 1) not in (1, FORMAT) or isinstance(record.get("format"), bool):
        return f"its format is {record['format']!r}"
    for name in _TEXTS:
        if not isinstance(record.get(name), str):
            return f"{name!r} is not a text"
    n, k, accuracy, unparsed = record.get("n"), record.get("k"), record.get("accuracy"), record.get("unparsed")
    if not _is_count(n) or not _is_count(k) or not 0 <= k <= n or n == 0:
        return "'k' and 'n' are not counts"
    if not _is_number(accuracy) or not math.isclose(accuracy, k / n, rel_tol=1e-9, abs_tol=1e-12):
        return "'accuracy' is not k / n"
    if "unparsed" not in record or not (unparsed is None or (_is_count(unparsed) and 0 <= unparsed <= n)):
        return "'unparsed' is not a count"
    interval = record.get("interval_95")
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(_is_number, interval)):
        return "'interval_95' is not a pair of numbers"
    return ""


def _not_writable(value: Any, where: str = "it", levels: int = 0) -> str:
    """Return which part of a value cannot be written as JSON again, and why; an empty text if all of it can."""
    if levels > _LEVELS:
        return f"it is nested in more than {_LEVELS} levels"
    if isinstance(value, Mapping):
        inner = [*((where, key) for key in value), *((repr(key), each) for key, each in value.items())]
    elif isinstance(value, list):
        inner = [(where, each) for each in value]
    else:
        if isinstance(value, float) and not math.isfinite(value):
            return f"{where} contains a number that is too large"
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            return f"{where} contains {value[:40]!r}, which is not Unicode text"
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
    raise ValueError(f"{name} is not a JSON number")


def _refuse(file: Path, reason: str) -> NoReturn:
    raise MissingError(
        f"{file} is not a file of results: {reason}. Nothing was written.",
        hint=f"Move the file and run the same command again: mv {file} {file}.old",
    )


def _refuse_newer(file: Path) -> NoReturn:
    raise MissingError(
        f"{file} was written by a newer version of fedtune. Nothing was written.",
        hint="Update fedtune: pip install --upgrade fedtune",
    )
