"""The leaderboard's result files: writes them to the byte as its scripts do, and scores existing ones again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.evaluation.scoring import Score, score_answers
from fedtune.evaluation.tasks.base import Answer, Question, Selection, Task, content_hash
from fedtune.evaluation.tasks.registry import all_tasks, parse_bench
from fedtune.runs.atomic import write_text

Form = Literal["array", "lines", "published"]


@dataclass(frozen=True)
class Artefacts:
    """The two files of one result."""

    accuracy: Path
    generations: Path


@dataclass(frozen=True)
class RescoreResult:
    """An existing generation file, scored again."""

    path: Path
    form: Form
    """A JSON array, JSON lines, or an object with `published_accuracy` and `rows`."""
    benchmark: str
    """Its name for `parse_bench`, as far as the content shows it: `mmlu:stem`, or `medmcqa or careqa`."""
    answer_type: str
    verified: bool
    """Whether prompts and right answers are the official ones, complete and in their order."""
    score: Score
    published: float | None
    """The accuracy that the file states."""

    @property
    def agrees(self) -> bool | None:
        """Whether the accuracy equals the published one to the last digit; None where the file states none."""
        return None if self.published is None else self.score.accuracy == self.published


def artefact_paths(folder: Path, selection: Selection, run: str) -> Artefacts:
    """Return the paths of a result's files in `folder`.

    Raises:
        UsageError: `run` cannot be part of a file name.
    """
    if not run or run != Path(run).name:
        raise UsageError(f"{run!r} cannot be part of a file name.", hint="Give the run a name without / in it.")
    accuracy, generations = selection.task.artefact_names(selection.category, run)
    return Artefacts(folder / accuracy, folder / generations)


def write_artefacts(
    folder: Path, selection: Selection, run: str, answers: Sequence[Answer], accuracy: float
) -> Artefacts:
    """Write accuracy and generations, each file completely or not at all.

    Returns:
        The two paths. The accuracy is written last, so that the generations exist wherever it does.
    """
    paths = artefact_paths(folder, selection, run)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(paths.generations, selection.task.generations_text(answers))
    write_text(paths.accuracy, accuracy_text(accuracy))
    return paths


def accuracy_text(accuracy: float) -> str:
    """Return the content of `acc_….txt`, with its blank at the end.

    >>> accuracy_text(2 / 3)
    'Accuracy: 0.6666666666666666. '
    """
    return f"Accuracy: {float(accuracy)!r}. "


def rescore(path: Path) -> RescoreResult:
    """Score an existing generation file: fedtune's, the leaderboard's, or one with its published accuracy.

    Prompts and right answers identify the benchmark; the file's name decides only where several fit.

    Raises:
        MissingError: there is no such file.
        UsageError: the file is cut off or is not a generation file.
    """
    form, rows, published = _read(path)
    kinds = _kinds_with_columns_of(rows)
    answers = [_answer(row, number, path, kinds[0].columns) for number, row in enumerate(rows, 1)]
    if not answers:
        raise UsageError(f"{path} does not contain any answers.")
    task = _kind_with_golds(kinds, {answer.question.gold for answer in answers}, path)
    benchmark, verified = _recognise(answers, task.answer_type, path)
    return RescoreResult(
        path=path,
        form=form,
        benchmark=benchmark,
        answer_type=task.answer_type,
        verified=verified,
        score=score_answers(task, answers, mapped=not task.keeps_outputs),
        published=published,
    )


def _read(path: Path) -> tuple[Form, list[Any], float | None]:
    """Return form, rows and stated accuracy of a file; refuse any other content in one sentence."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise MissingError(
            f"There is no file {path}.",
            hint="A run's generations are in its benchmarks folder: fedtune eval --rescore RUN/benchmarks/generation_….jsonl",
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise _not_generations(path, "it is not UTF-8 text") from None
    # `splitlines` would also split at the line separators inside a prompt.
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise _not_generations(path, "it is empty")
    try:
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            if len(lines) == 1 or not lines[0].rstrip().endswith("}") or not lines[0].startswith("{"):
                raise
            return "lines", _read_lines(lines, path), None
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        reason = "its JSON is cut off" if cut else f"it is not JSON ({error.msg} at character {error.pos + 1})"
        raise _not_generations(path, reason) from None
    except (ValueError, RecursionError):
        raise _not_generations(path, "its JSON cannot be parsed") from None
    if isinstance(whole, list):
        return "array", whole, None
    if isinstance(whole, dict) and "rows" in whole:
        rows, published = whole["rows"], whole.get("published_accuracy")
        if not isinstance(rows, list) or not (published is None or _is_share(published)):
            raise _not_generations(path, "`rows` is not an array, or `published_accuracy` is not a number from 0 to 1")
        return "published", rows, None if published is None else float(published)
    if isinstance(whole, dict):
        return "lines", [whole], None
    raise _not_generations(path, "it contains neither an array nor objects")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _read_lines(lines: Sequence[str], path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            where = f"its last line, {number}, is cut off" if number == len(lines) else f"line {number} is not JSON"
            raise _not_generations(path, where) from None
    return rows


def _kinds_with_columns_of(rows: Sequence[Any]) -> list[Task]:
    """Return one task of each answer type whose generation files have the columns of these rows."""
    first = rows[0] if rows and isinstance(rows[0], dict) else {}
    kinds = list({task.answer_type: task for task in all_tasks().values()}.values())
    own = [task for task in kinds if task.columns != Task.columns and task.columns[-1] in first]
    return own[:1] or [task for task in kinds if task.columns == Task.columns]


def _answer(row: Any, number: int, path: Path, columns: Sequence[str]) -> Answer:
    """Turn a row of the file into an answer; every field must be a text."""
    if not isinstance(row, dict):
        raise _not_generations(path, f"row {number} is not an object")
    for name in columns:
        if not isinstance(row.get(name), str):
            raise _not_generations(path, f"row {number} has no text in {name!r}")
    subset = row.get("subset")
    if subset is not None and not isinstance(subset, str):
        raise _not_generations(path, f"row {number} has no text in 'subset'")
    prompt, gold, output = (row[name] for name in columns)
    return Answer(Question(f"row {number}", prompt, gold, subset), output)


def _kind_with_golds(kinds: Sequence[Task], golds: set[str], path: Path) -> Task:
    """Return the task among `kinds` whose right answers these may be."""
    fitting = [task for task in kinds if golds <= task.golds]
    if fitting or len(kinds) == 1:
        return (fitting or kinds)[0]
    odd = min(golds.difference(*(task.golds for task in kinds)), default="letters beside yes and no")
    raise _not_generations(path, f"its right answers are neither letters nor yes, no and maybe, but {odd[:40]!r}")


def _recognise(answers: Sequence[Answer], answer_type: str, path: Path) -> tuple[str, bool]:
    """Return the benchmark's name, as far as the content shows it, and whether the questions are the official ones."""
    starts = {answer.question.prompt.partition("\n")[0] for answer in answers}
    fitting = [task for task in all_tasks().values() if task.answer_type == answer_type and starts <= task.first_lines]
    for task in fitting:
        if len(task.parts) == 1 and _is_official(task, "", answers):
            return task.name, True
    for task in fitting:
        if len(task.parts) > 1 and (selection := _selection_of(task, answers)):
            by_part = {part: [each for each in answers if each.question.subset == part] for part in selection.parts}
            return selection.name, all(_is_official(task, part, each) for part, each in by_part.items())
    names = [task.name for task in fitting]
    by_count = [task.name for task in fitting if sum(part.rows or 0 for part in task.parts.values()) == len(answers)]
    by_name = [name for name in names if name in path.stem.lower().split("_")]
    for few in (by_count, by_name):
        if len(few) == 1:
            return few[0], False
    return " or ".join(names) or "unknown", False


def _selection_of(task: Task, answers: Sequence[Answer]) -> Selection | None:
    """Return the category or part of a task whose parts are the subsets of these answers."""
    subsets = {answer.question.subset for answer in answers}
    if not subsets <= set(task.parts):
        return None
    names = [f"{task.name}:{subset}" for subset in subsets] if len(subsets) == 1 else [task.name]
    names += [f"{task.name}:{category}" for category in task.categories]
    chosen = (selection for name in names for selection in parse_bench(name))
    return next((selection for selection in chosen if subsets <= set(selection.parts)), None)


def _is_official(task: Task, part: str, answers: Sequence[Answer]) -> bool:
    pairs = ((answer.question.prompt, answer.question.gold) for answer in answers)
    return task.parts[part].sha256 == content_hash(pairs)


def _not_generations(path: Path, reason: str) -> FedTuneError:
    return UsageError(f"{path} is not a generation file: {reason}.")
