"""Questions of a selection, from files or the hub, checked against what the official data holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.errors import MissingError, UsageError
from fedtune.evaluation.benchmarks.base import Benchmark, Part, Question, Row, RowError, Selection, content_hash
from fedtune.evaluation.benchmarks.files import files_of, read_rows
from fedtune.evaluation.benchmarks.hub import SourceError, describe, hub_rows, require_hub


@dataclass(frozen=True)
class Finding:
    """Something about the data that stands beside the score."""

    kind: Literal["row-count", "duplicates", "content", "unverified"]
    text: str
    """One sentence for people."""
    count: int
    """Rows concerned."""
    marks: bool
    """Whether the score is therefore not comparable with the leaderboard's."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions that will be asked, and how they compare with the official data."""

    selection: Selection
    questions: tuple[Question, ...]
    """In the data set's order."""
    expected: int | None
    """Rows that the official data holds; None where whatever ships is right."""
    sha256: str
    """`content_hash` of `questions`."""
    source: str
    """Where the rows come from."""
    verified: bool
    """The content hash of every part is known and is right."""
    findings: tuple[Finding, ...] = ()
    partial_because: str = ""
    """Why this is not the whole benchmark; empty when it is."""

    @property
    def count(self) -> int:
        """Number of questions."""
        return len(self.questions)

    @property
    def partial(self) -> bool:
        """Whether some of the benchmark's questions are left out."""
        return bool(self.partial_because)

    @property
    def comparable(self) -> bool:
        """Whether a score on these questions may stand beside the leaderboard's."""
        return not self.partial and not any(finding.marks for finding in self.findings)


@dataclass(frozen=True)
class _Loaded:
    """One part's questions."""

    questions: list[Question]
    source: str
    trusted: bool
    """The original, a checked copy of it, or what ships; False for the user's own files."""
    original: bool


def load_questions(selection: Selection, data_dir: Path | None = None, limit: int | None = None) -> QuestionSet:
    """Return the questions of `selection`, in the data set's order.

    Args:
        selection: What `parse_bench` returned.
        data_dir: Folder with `<bench>.jsonl|parquet` or `mmlu/<subject>.jsonl|parquet` in the fields of the protocol's
            tables; None loads from the hub. The tiny benchmark ships and needs neither.
        limit: Ask the first so many questions only, which marks the result partial.

    Raises:
        MissingError: files are missing, the hub cannot be reached, or no source holds the official rows.
        UsageError: rows have missing or unknown fields, or answers out of range; a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} leaves no question.", hint="Give 1 or more, or leave it out.")
    benchmark = selection.benchmark
    if benchmark.shipped and (data_dir is None or not _has_file(selection, data_dir)):
        shipped = read_rows(benchmark.shipped)
        questions = questions_of(benchmark, "", shipped, benchmark.shipped.name)
        parts = {"": _Loaded(questions, "shipped with fedtune", trusted=True, original=True)}
    elif data_dir is not None:
        files = files_of(selection, data_dir)
        parts = {part: _from_file(benchmark, part, path) for part, path in files.items()}
    else:
        require_hub()
        parts = {part: _from_hub(benchmark, part) for part in selection.parts}

    questions = [question for each in parts.values() for question in each.questions]
    verified = all(_is_right(benchmark.parts[part], each.questions) for part, each in parts.items())
    findings = [finding for part, each in parts.items() for finding in _compare(benchmark, part, each)]
    findings += _repeated(questions, known=verified or all(each.trusted for each in parts.values()))
    expected, partial = selection.expected, ""
    if expected is not None and len(questions) < expected:
        partial = f"the data holds {len(questions)} of {expected} rows"
    if limit is not None and limit < len(questions):
        partial = f"--limit {limit} of {len(questions)} rows"
        questions = questions[:limit]
    if not questions:
        raise MissingError(f"{selection.name}: the data holds no rows ({_sources(parts.values())}).")
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


def questions_of(benchmark: Benchmark, part: str, rows: Iterable[tuple[str, Row]], where: str) -> list[Question]:
    """Turn rows into questions; every row that cannot be one is counted.

    Args:
        rows: Pairs of a row's place (`line 3`) and the row.
        where: File or source, for the message.

    Raises:
        UsageError: some rows have missing or unknown fields, or values that make no question.
    """
    allowed = {*benchmark.fields, *benchmark.more_fields}
    questions: list[Question] = []
    problems: dict[str, tuple[str, int]] = {}
    for index, (place, row) in enumerate(rows):
        missing = [name for name in benchmark.fields if name not in row]
        unknown = sorted(str(name) for name in row if name not in allowed)
        try:
            if missing:
                raise RowError(f"no field {missing[0]}")
            if unknown:
                raise RowError(f"an unknown field {unknown[0]}")
            prompt, gold = benchmark.ask(row)
        except RowError as error:
            kind = str(error).split(" is ")[0]
            first, count = problems.get(kind, (f"{place}: {error}", 0))
            problems[kind] = (first, count + 1)
            continue
        subset = str(row[benchmark.subset_field]) if benchmark.subset_field else part or None
        questions.append(Question("/".join(filter(None, (benchmark.name, part, str(index)))), prompt, gold, subset))
    if problems:
        bad = sum(count for _, count in problems.values())
        raise UsageError(
            f"{where}: {bad} of {bad + len(questions)} rows cannot be used; "
            + "; ".join(f"{first} ({count} such)" for first, count in list(problems.values())[:3])
            + ".",
            hint=f"A {benchmark.name} row has the fields {', '.join(benchmark.fields)}.",
        )
    return questions


def _has_file(selection: Selection, data_dir: Path) -> bool:
    try:
        return bool(files_of(selection, data_dir))
    except MissingError:
        return False


def _from_file(benchmark: Benchmark, part: str, path: Path) -> _Loaded:
    return _Loaded(questions_of(benchmark, part, read_rows(path), str(path)), str(path), trusted=False, original=False)


def _from_hub(benchmark: Benchmark, part: str) -> _Loaded:
    """Load a part from the first source whose rows are, as far as is known, the official ones."""
    official = benchmark.parts[part]
    refused = []
    for source in benchmark.sources:
        try:
            rows = hub_rows(source, part)
            known = ({name: row[name] for name in benchmark.fields if name in row} for row in rows)
            places = ((f"row {number}", row) for number, row in enumerate(known, 1))
            questions = questions_of(benchmark, part, places, source.hub_id)
            if not source.original and len(questions) != official.rows:
                raise SourceError(f"holds {len(questions)} of the {official.rows} rows")
            if not source.original and official.sha256 and not _is_right(official, questions):
                raise SourceError("its rows differ from the official ones")
            return _Loaded(questions, describe(source), trusted=True, original=source.original)
        except SourceError as error:
            refused.append(f"{describe(source)} ({error})")
        except UsageError as error:
            refused.append(error.message.rstrip("."))
    label = f"{benchmark.name}:{part}" if part else benchmark.name
    raise MissingError(
        f"No source on the hub has the official rows of {label}: {'; '.join(refused)}.",
        hint="Give the rows with --data-dir DIR.",
    )


def _is_right(part: Part, questions: Sequence[Question]) -> bool:
    return part.sha256 == content_hash((question.prompt, question.gold) for question in questions)


def _compare(benchmark: Benchmark, part: str, loaded: _Loaded) -> list[Finding]:
    """Compare one part with what the official data is known to hold."""
    official, count = benchmark.parts[part], len(loaded.questions)
    name = f"{benchmark.name}:{part}" if part else benchmark.name
    if official.rows is None or _is_right(official, loaded.questions):
        return []
    if official.rows != count:
        text = f"{name} has {count} rows, the official data {official.rows} ({loaded.source})."
        return [Finding("row-count", text, abs(count - official.rows), marks=True)]
    if official.sha256:
        text = f"{name} has as many rows as the official data, but other ones or in another order ({loaded.source})."
        return [Finding("content", text, count, marks=True)]
    if loaded.original:
        return []
    text = f"{name} has as many rows as the official data, whose content hash fedtune does not know ({loaded.source})."
    return [Finding("unverified", text, count, marks=False)]


def _repeated(questions: Sequence[Question], *, known: bool) -> list[Finding]:
    """Say how many rows repeat an earlier prompt; the official data itself does so in places."""
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
    """Return the distinct sources in one line; files of one folder are named by their folder."""
    sources = list(dict.fromkeys(each.source for each in parts))
    if len(sources) > 1 and len({str(Path(source).parent) for source in sources}) == 1:
        return str(Path(sources[0]).parent)
    return ", ".join(sources)
