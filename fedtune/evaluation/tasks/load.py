"""Loads the questions of a selection from files or the hub, and compares them with the official data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.errors import MissingError, UsageError
from fedtune.evaluation.tasks.base import Part, Question, Selection, Task, content_hash
from fedtune.evaluation.tasks.files import files_of, read_rows
from fedtune.evaluation.tasks.hub import SourceError, describe, hub_rows, require_hub


@dataclass(frozen=True)
class Finding:
    """A remark about the data that is reported with the score."""

    kind: Literal["row-count", "duplicates", "content", "unverified"]
    text: str
    """One sentence for people."""
    count: int
    """Number of affected rows."""
    marks: bool
    """Whether it makes the score incomparable with the leaderboard's."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of an evaluation, and how they compare with the official data."""

    selection: Selection
    questions: tuple[Question, ...]
    """In the data set's order."""
    expected: int | None
    """Rows of the official data; None where fedtune's own file defines them."""
    sha256: str
    """`content_hash` of `questions`."""
    source: str
    """Origin of the rows."""
    verified: bool
    """Whether the content hash of every part is known and equal."""
    findings: tuple[Finding, ...] = ()
    partial_because: str = ""
    """Why this is not the whole benchmark; empty when it is."""

    @property
    def count(self) -> int:
        """Number of questions."""
        return len(self.questions)

    @property
    def partial(self) -> bool:
        """Whether some of the benchmark's questions are missing."""
        return bool(self.partial_because)

    @property
    def comparable(self) -> bool:
        """Whether a score on these questions is comparable with the leaderboard's."""
        return not self.partial and not any(finding.marks for finding in self.findings)


@dataclass(frozen=True)
class _Loaded:
    """One part's questions."""

    questions: list[Question]
    source: str
    trusted: bool
    """Whether this is the original, a checked copy of it, or part of fedtune; not the user's own files."""
    original: bool


def load_questions(selection: Selection, data_dir: Path | None = None, limit: int | None = None) -> QuestionSet:
    """Return the questions of `selection`, in the data set's order.

    Args:
        selection: As `parse_bench` returns it.
        data_dir: Folder with `<bench>.jsonl|parquet` or `mmlu/<subject>.jsonl|parquet` in the fields of the protocol's
            tables; None loads from the hub. The tiny benchmark is part of fedtune and needs neither.
        limit: Return the first so many questions only, which marks the result as partial.

    Raises:
        MissingError: files are missing, the hub cannot be reached, or no source has the official rows.
        UsageError: rows have missing or unknown fields, or answers out of range; a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} is less than one question.", hint="Give 1 or more, or omit it.")
    task = selection.task
    if task.shipped and (data_dir is None or not _has_file(selection, data_dir)):
        shipped = read_rows(task.shipped)
        questions = task.questions("", shipped, task.shipped.name)
        parts = {"": _Loaded(questions, "shipped with fedtune", trusted=True, original=True)}
    elif data_dir is not None:
        files = files_of(selection, data_dir)
        parts = {part: _from_file(task, part, path) for part, path in files.items()}
    else:
        require_hub()
        parts = {part: _from_hub(task, part) for part in selection.parts}

    questions = [question for each in parts.values() for question in each.questions]
    verified = all(_is_right(task.parts[part], each.questions) for part, each in parts.items())
    findings = [finding for part, each in parts.items() for finding in _compare(task, part, each)]
    findings += _repeated(questions, known=verified or all(each.trusted for each in parts.values()))
    expected, partial = selection.expected, ""
    if expected is not None and len(questions) < expected:
        partial = f"the data has {len(questions)} of {expected} rows"
    if limit is not None and limit < len(questions):
        partial = f"--limit {limit} of {len(questions)} rows"
        questions = questions[:limit]
    if not questions:
        raise MissingError(f"{selection.name}: the data has no rows ({_sources(parts.values())}).")
    return QuestionSet(
        selection=selection,
        questions=tuple(questions),
        expected=expected,
        sha256=content_hash((question.prompt, question.gold) for question in questions),
        source=_sources(parts.values()),
        verified=verified,
        findings=tuple(findings),
        partial_because=partial,
    )


def _has_file(selection: Selection, data_dir: Path) -> bool:
    try:
        return bool(files_of(selection, data_dir))
    except MissingError:
        return False


def _from_file(task: Task, part: str, path: Path) -> _Loaded:
    return _Loaded(task.questions(part, read_rows(path), str(path)), str(path), trusted=False, original=False)


def _from_hub(task: Task, part: str) -> _Loaded:
    """Load a part from the first source whose rows are, as far as fedtune knows, the official ones."""
    official = task.parts[part]
    refused = []
    for source in task.sources:
        try:
            rows = hub_rows(source, part)
            known = ({name: row[name] for name in task.fields if name in row} for row in rows)
            numbered = ((f"row {number}", row) for number, row in enumerate(known, 1))
            questions = task.questions(part, numbered, source.hub_id)
            if not source.original and len(questions) != official.rows:
                raise SourceError(f"has {len(questions)} of the {official.rows} rows")
            if not source.original and official.sha256 and not _is_right(official, questions):
                raise SourceError("its rows differ from the official ones")
            return _Loaded(questions, describe(source), trusted=True, original=source.original)
        except SourceError as error:
            refused.append(f"{describe(source)} ({error})")
        except UsageError as error:
            refused.append(error.message.rstrip("."))
    label = f"{task.name}:{part}" if part else task.name
    raise MissingError(
        f"No source on the hub has the official rows of {label}: {'; '.join(refused)}.",
        hint="Give the rows with --data-dir DIR.",
    )


def _is_right(part: Part, questions: Sequence[Question]) -> bool:
    return part.sha256 == content_hash((question.prompt, question.gold) for question in questions)


def _compare(task: Task, part: str, loaded: _Loaded) -> list[Finding]:
    """Compare one part with the known content of the official data."""
    official, count = task.parts[part], len(loaded.questions)
    name = f"{task.name}:{part}" if part else task.name
    if official.rows is None or _is_right(official, loaded.questions):
        return []
    if official.rows != count:
        text = f"{name} has {count} rows, the official data {official.rows} ({loaded.source})."
        return [Finding("row-count", text, abs(count - official.rows), marks=True)]
    if official.sha256:
        text = f"{name} has as many rows as the official data, but with other content or in another order ({loaded.source})."
        return [Finding("content", text, count, marks=True)]
    if loaded.original:
        return []
    text = f"{name} has as many rows as the official data, whose content hash fedtune does not know ({loaded.source})."
    return [Finding("unverified", text, count, marks=False)]


def _repeated(questions: Sequence[Question], *, known: bool) -> list[Finding]:
    """Return a finding about rows that repeat an earlier prompt, of which the official data has some."""
    times = Counter(question.prompt for question in questions)
    count = len(questions) - len(times)
    if not count:
        return []
    earliest = {question.prompt: question.id for question in reversed(questions)}
    first = next(question.id for question in questions if earliest[question.prompt] != question.id)
    text = f"{count} of {len(questions)} rows repeat an earlier prompt, first {first}" + (
        ", as in the official data." if known else "; whether the official data does so is not known."
    )
    return [Finding("duplicates", text, count, marks=not known)]


def _sources(parts: Iterable[_Loaded]) -> str:
    """Return the distinct sources in one line; the folder replaces several files of one folder."""
    sources = list(dict.fromkeys(each.source for each in parts))
    if len(sources) > 1 and len({str(Path(source).parent) for source in sources}) == 1:
        return str(Path(sources[0]).parent)
    return ", ".join(sources)
