"""The leaderboard's result files: written to the byte as its scripts do, read and scored again without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.evaluation.benchmarks.base import AnswerType, Benchmark, Selection, content_hash, finance_instruction
from fedtune.evaluation.benchmarks.find import benchmarks, parse_bench
from fedtune.evaluation.scoring import Answer, Score, predict, score
from fedtune.runs.atomic import write_text

Form = Literal["array", "lines", "published"]

CHOICES = frozenset("ABCDE")
DECISIONS = frozenset(("yes", "no", "maybe"))


@dataclass(frozen=True)
class Artefacts:
    """Where one result was written."""

    accuracy: Path
    generations: Path


@dataclass(frozen=True)
class RescoreResult:
    """An existing generation file, scored again."""

    path: Path
    form: Form
    """A JSON array, JSON lines, or an object with `published_accuracy` and `rows`."""
    benchmark: str
    """What `parse_bench` calls it, as far as the content tells: `mmlu:stem`, or `medmcqa or careqa`."""
    answer_type: AnswerType
    verified: bool
    """The prompts and golds are the official ones, all of them in their order."""
    score: Score
    published: float | None
    """The accuracy that the file claims."""

    @property
    def agrees(self) -> bool | None:
        """Whether the accuracy equals the published one to the last digit; None where none is claimed."""
        return None if self.published is None else self.score.accuracy == self.published


def artefact_paths(folder: Path, selection: Selection, run: str) -> Artefacts:
    """Return the leaderboard's file names (protocol, section 4) in `folder`.

    Raises:
        UsageError: `run` cannot be part of a file name.
    """
    if not run or run != Path(run).name:
        raise UsageError(f"{run!r} cannot be part of a file name.", hint="Give the run a name without / in it.")
    name = "_".join(filter(None, (selection.benchmark.name, selection.category, run)))
    return Artefacts(folder / f"acc_{name}.txt", folder / f"generation_{name}.jsonl")


def write_artefacts(
    folder: Path, selection: Selection, run: str, answers: Sequence[Answer], accuracy: float
) -> Artefacts:
    """Write accuracy and generations in the leaderboard's names and forms, each file whole or not at all.

    Returns:
        The two paths; the accuracy is written last, so that where it stands its generations do too.
    """
    paths = artefact_paths(folder, selection, run)
    folder.mkdir(parents=True, exist_ok=True)
    form = lines_text if selection.benchmark.answer_type == "sentiment" else array_text
    write_text(paths.generations, form(answers))
    write_text(paths.accuracy, accuracy_text(accuracy))
    return paths


def accuracy_text(accuracy: float) -> str:
    """Return what `acc_….txt` holds, the blank at the end included.

    >>> accuracy_text(2 / 3)
    'Accuracy: 0.6666666666666666. '
    """
    return f"Accuracy: {float(accuracy)!r}. "


def array_text(answers: Sequence[Answer]) -> str:
    """Return `generation_….jsonl` of general-nlp and medical: one JSON array as pandas writes records."""
    return "[" + ",".join(_pandas_json(_record(answer)) for answer in answers) + "]"


def lines_text(answers: Sequence[Answer]) -> str:
    """Return `generation_….jsonl` of finance: JSON lines with the mapped target and output."""
    records = (
        {
            "context": answer.prompt,
            "new_target": predict(answer.gold, "sentiment").value,
            "new_out": predict(answer.output, "sentiment").value,
        }
        for answer in answers
    )
    return "".join(_pandas_json(record) + "\n" for record in records)


def rescore(path: Path) -> RescoreResult:
    """Score an existing generation file: ours, the leaderboard's, or one with its published accuracy.

    Benchmark and kind of answer are taken from prompts and golds; the file's name only helps where these fit several.

    Raises:
        MissingError: there is no such file.
        UsageError: it is truncated, garbage, or no generation file; one sentence says which.
    """
    form, rows, published = _read(path)
    finance = bool(rows) and isinstance(rows[0], dict) and "new_out" in rows[0]
    answers = [_answer(row, number, path, finance) for number, row in enumerate(rows, 1)]
    if not answers:
        raise UsageError(f"{path} holds no answers.")
    answer_type = _answer_type({answer.gold for answer in answers}, finance, path)
    benchmark, verified = _recognise(answers, answer_type, path)
    return RescoreResult(
        path=path,
        form=form,
        benchmark=benchmark,
        answer_type=answer_type,
        verified=verified,
        score=score(answers, answer_type, mapped=finance),
        published=published,
    )


def _record(answer: Answer) -> dict[str, str]:
    subset = {} if answer.subset is None else {"subset": answer.subset}
    return {"prompt": answer.prompt, "gold": answer.gold, **subset, "output": answer.output}


def _pandas_json(record: dict[str, str]) -> str:
    """Return a record as `pandas.DataFrame.to_json` writes it: no blanks, ASCII only, and `/` escaped."""
    text = json.dumps(record, separators=(",", ":")).replace("/", r"\/")
    # The one other character that the two write differently.
    return text.replace(r"\u007f", "\x7f")


def _read(path: Path) -> tuple[Form, list[Any], float | None]:
    """Return form, rows and claimed accuracy of a file; what is wrong with it is said in one sentence."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise MissingError(
            f"There is no file {path}.",
            hint="Generations lie in a run: fedtune eval --rescore RUN/benchmarks/generation_….jsonl",
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise _not_generations(path, "it is not UTF-8 text") from None
    # `splitlines` would also split at the line separators that a prompt may hold.
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
            raise _not_generations(path, "`rows` is no array or `published_accuracy` no number from 0 to 1")
        return "published", rows, None if published is None else float(published)
    if isinstance(whole, dict):
        return "lines", [whole], None
    raise _not_generations(path, "it holds neither an array nor objects")


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


def _answer(row: Any, number: int, path: Path, finance: bool) -> Answer:
    """Turn a row of the file into an answer; every field must be a text."""
    names = ("context", "new_target", "new_out") if finance else ("prompt", "gold", "output")
    if not isinstance(row, dict):
        raise _not_generations(path, f"row {number} is not an object")
    for name in names:
        if not isinstance(row.get(name), str):
            raise _not_generations(path, f"row {number} has no text in {name!r}")
    subset = row.get("subset")
    if subset is not None and not isinstance(subset, str):
        raise _not_generations(path, f"row {number} has no text in 'subset'")
    prompt, gold, output = (row[name] for name in names)
    return Answer(prompt, gold, output, subset)


def _answer_type(golds: set[str], finance: bool, path: Path) -> AnswerType:
    if finance:
        return "sentiment"
    if golds <= CHOICES:
        return "choice"
    if golds <= DECISIONS:
        return "yes-no"
    odd = min(golds - CHOICES - DECISIONS, default="letters beside yes and no")
    raise _not_generations(path, f"its golds are neither letters nor yes, no and maybe but {odd[:40]!r}")


def _recognise(answers: Sequence[Answer], answer_type: AnswerType, path: Path) -> tuple[str, bool]:
    """Return the benchmark's name, as far as the content tells, and whether the questions are the official ones."""
    fitting = [bench for bench in benchmarks().values() if bench.answer_type == answer_type and _fits(bench, answers)]
    for bench in fitting:
        if len(bench.parts) == 1 and bench.parts[""].sha256 == content_hash((a.prompt, a.gold) for a in answers):
            return bench.name, True
    if any(bench.name == "mmlu" for bench in fitting) and (selection := _mmlu_selection(answers)):
        return selection.name, _mmlu_verified(selection, answers)
    names = [bench.name for bench in fitting]
    by_count = [bench.name for bench in fitting if sum(part.rows or 0 for part in bench.parts.values()) == len(answers)]
    by_name = [name for name in names if name in path.stem.lower().split("_")]
    for few in (by_count, by_name):
        if len(few) == 1:
            return few[0], False
    return " or ".join(names) or "unknown", False


def _fits(bench: Benchmark, answers: Sequence[Answer]) -> bool:
    """Whether every prompt starts as the benchmark's do; FIQA mixes news and tweets."""
    starts = {answer.prompt.partition("\n")[0] for answer in answers}
    if bench.answer_type != "sentiment":
        return starts == {bench.instruction}
    own = {bench.instruction, finance_instruction("tweet")} if bench.name == "fiqa" else {bench.instruction}
    return starts <= {f"Instruction: {instruction}" for instruction in own}


def _mmlu_selection(answers: Sequence[Answer]) -> Selection | None:
    """Return the category (or subject) of MMLU whose subjects these are."""
    subjects = {answer.subset for answer in answers}
    parts = benchmarks()["mmlu"].parts
    if not subjects <= set(parts):
        return None
    names = [f"mmlu:{subject}" for subject in subjects] if len(subjects) == 1 else ["mmlu"]
    names += [f"mmlu:{category}" for category in benchmarks()["mmlu"].categories]
    chosen = (selection for name in names for selection in parse_bench(name))
    return next((selection for selection in chosen if subjects <= set(selection.parts)), None)


def _mmlu_verified(selection: Selection, answers: Sequence[Answer]) -> bool:
    by_subject = {part: [(a.prompt, a.gold) for a in answers if a.subset == part] for part in selection.parts}
    return all(selection.benchmark.parts[part].sha256 == content_hash(by_subject[part]) for part in selection.parts)


def _not_generations(path: Path, reason: str) -> FedTuneError:
    return UsageError(f"{path} is not a generation file: {reason}.")
